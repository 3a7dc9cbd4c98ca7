"""Plans against arithmetic on paper; what is measured and what is not; errors with their remedies."""

import dataclasses
import json
import math

import pytest

from adamae_fast.cli import main
from adamae_fast.config import CheckpointConfig, DataConfig, PretrainConfig, TrainConfig
from adamae_fast.config_distributed import DistributedConfig
from adamae_fast.plan.calibration import MeasuredStep, calibration
from adamae_fast.plan.options import PlanOptions
from adamae_fast.plan.planner import make_plan
from tests.conftest import REPOSITORY

K400 = REPOSITORY / "configs" / "pretrain_k400_vitb.yaml"
LINE = ["plan", "--gpu", "h100", "--num-gpus", "64", "--dataset", "k400", "--epochs", "800"]

NO_STEPS = dataclasses.replace(calibration(), steps=())
"""What was measured but for steps on GPUs, so that what these tests expect does not change with new results."""


def plan(train=None, data=None, checkpoint=None, measured=None, mode="ddp", **options):
    config = PretrainConfig(
        train=TrainConfig(**(train or {})),
        data=DataConfig(**{"num_workers": 8, **(data or {})}),
        checkpoint=CheckpointConfig(**(checkpoint or {})),
        distributed=DistributedConfig(mode=mode),
    )
    chosen = PlanOptions(**{"gpu": "h100", "num_gpus": 64, "dataset": "k400", **options})
    return make_plan(config, chosen, measured or NO_STEPS)


def test_a_plan_by_hand():
    p = plan(price_per_gpu_hour=2.5)
    assert p.value("parameters") == 102_501_505
    assert p.value("visible_tokens") == 78
    assert p.value("clip_flops") == pytest.approx(254.4, abs=0.05)
    assert p.value("total_batch") == 2048
    assert p.value("steps") == math.ceil(800 * 240_436 / 2048) == 93_921
    assert p.value("sent_bytes") == pytest.approx(2 * 63 / 64 * 4 * 102_501_505 / 1e9)
    assert p.value("checkpoint_bytes") == pytest.approx(12 * 102_501_505 / 1e9)
    assert p.value("run_bytes") == pytest.approx(3 * 12 * 102_501_505 / 1e9)
    # The design's 20.3 ms, and the last bucket of gradients: 26 MB twice at 320 GB/s.
    step = 20.30 + 1e3 * 2 * 63 / 64 * 25 * 2**20 / 320e9
    assert p.value("step") == pytest.approx(step, abs=0.01)
    assert p.value("hours_alone") == pytest.approx(93_921 * step / 3.6e6, rel=1e-3)
    rate = 32e3 / step
    assert p.figures["clips_per_s"].high == pytest.approx(rate, rel=1e-3)
    assert p.figures["decode_rate"].high == pytest.approx(rate * 68.542, rel=1e-3)
    assert p.figures["upload"].high == pytest.approx(rate * 3 * 16 * 224**2 / 1e9, rel=1e-3)
    assert p.figures["cores"].high == pytest.approx(rate * 0.01663, rel=1e-3)
    assert p.figures["read"].high == pytest.approx(8 * rate * 1_090_560 / 1e9, rel=1e-3)
    # Eight workers on eight cores, 16.63 ms a clip, are slower than the GPU: they set the pace.
    hours = 93_921 * 32 * 0.01663 / 8 / 3600
    assert p.value("hours") == pytest.approx(hours, rel=1e-3)
    assert p.value("gpu_hours_per_epoch") == pytest.approx(64 * hours / 800, rel=1e-3)
    assert p.value("cost") == pytest.approx(64 * hours * 2.5, rel=1e-3)
    assert p.value("cost_per_epoch") == pytest.approx(64 * hours * 2.5 / 800, rel=1e-3)


def test_memory_is_that_of_the_design():
    """16 and 32 clips in the design's table of variants, whose parts are a little coarser."""
    for recompute, expected in {"pointwise": (3.57, 5.29), "fc1": (3.01, 4.18), "block": (2.95, 4.06)}.items():
        found = [plan(train={"recompute": recompute, "batch_size": b}).value("memory_bytes") for b in (16, 32)]
        assert found == pytest.approx(expected, rel=0.03)


def test_what_the_data_path_costs_comes_from_the_measurements():
    """CPU time of a clip with one, two and four crops of a range; another number of crops lies on the fitted line."""
    rows = {
        r.repeat: r for r in calibration().decodes if (r.dataset, r.files, r.decoder) == ("k400", "prepared", "pyav")
    }
    assert sorted(rows) == [1, 2, 4]
    for repeat, row in rows.items():
        p = plan(data={"repeat": repeat})
        assert p.value("clip_cpu") == pytest.approx(1e3 * row.seconds)
        assert p.value("clip_frames") == pytest.approx(row.frames, rel=1e-3)
        assert p.figures["clip_cpu"].basis == p.figures["clip_frames"].basis == "measured"
        assert row.source in p.figures["clip_cpu"].how
    p = plan(data={"repeat": 8})
    assert p.figures["clip_cpu"].basis == p.figures["clip_frames"].basis == "modelled"
    assert 0 < p.value("clip_cpu") < 1e3 * rows[4].seconds


def test_clips_that_were_not_measured_are_modelled_from_those_that_were():
    usual = plan()
    wider = plan(data={"stride": 8})
    assert wider.value("clip_frames") == pytest.approx(usual.value("clip_frames") + 60)
    assert wider.value("clip_cpu") > usual.value("clip_cpu")
    assert wider.figures["clip_cpu"].basis == "modelled"
    assert any("the recipe of k400 has 4" in warning for warning in wider.warnings)
    own = plan(dataset=None, num_videos=1_000_000, frames=40)
    assert own.value("clip_frames") == 40  # no more than there are
    assert own.figures["clip_frames"].basis == "modelled"
    assert own.value("steps") == math.ceil(800 * 1_000_000 / 2048)
    assert own.value("dataset_bytes") == pytest.approx(1_000_000 * 1_090_560 * 40 / 300 / 1e9)
    assert plan(files="original").value("clip_cpu") == pytest.approx(54.447)
    assert plan(data={"decoder": "decord"}).value("clip_cpu") == pytest.approx(33.964)


def test_without_results_of_a_gpu_nothing_but_counts_and_decoding_is_measured():
    measured = {key for key, figure in plan().figures.items() if figure.basis == "measured"}
    assert measured == {"kept_bytes", "clip_frames", "clip_cpu"}
    assert plan(train={"compile": True}).figures["kept_bytes"].basis == "modelled"  # hooks saw uncompiled blocks


@pytest.fixture
def measured():
    row = MeasuredStep(gpu="h100", arm="ours-none", batch=32, seconds=0.0254, allocated_bytes=7_000_000_000, source="x")
    return dataclasses.replace(NO_STEPS, steps=(row,))


def test_a_measured_step_replaces_the_modelled_one(measured):
    p = plan(measured=measured)
    assert p.value("step_alone") == pytest.approx(25.4)
    assert p.value("memory_bytes") == pytest.approx(7.0)
    for key in ("step_alone", "memory_bytes"):
        assert (p.figures[key].basis, p.figures[key].high) == ("measured", None)
        assert p.figures[key].how.startswith("x, ours-none")
    assert p.figures["step"].basis == "modelled"  # its network was not
    assert plan(measured=measured, num_gpus=1).figures["step"].basis == "measured"


def test_what_one_gpu_took_is_not_what_a_share_takes(measured):
    shared = plan(measured=measured, mode="fsdp2")
    assert shared.figures["memory_bytes"].basis == "modelled"
    assert shared.value("memory_bytes") == plan(mode="fsdp2").value("memory_bytes") < 7
    assert plan(measured=measured, mode="fsdp2", num_gpus=1).figures["memory_bytes"].basis == "measured"


def test_other_batches_are_modelled_in_proportion_to_the_measured_one(measured):
    factor = 25.4 / plan().value("step_alone")
    p = plan(train={"batch_size": 64}, measured=measured)
    assert p.value("step_alone") == pytest.approx(factor * plan(train={"batch_size": 64}).value("step_alone"))
    assert p.figures["step_alone"].basis == p.figures["memory_bytes"].basis == "modelled"
    assert f"roofline × {factor:.2f}" in p.figures["step_alone"].how
    assert plan(train={"recompute": "fc1"}, measured=measured).figures["step_alone"].high is not None
    assert plan(gpu="h200", measured=measured).figures["step_alone"].high is not None
    assert plan(train={"accumulate": 2}, measured=measured).figures["step_alone"].basis == "modelled"


def test_more_gpus_take_fewer_hours_and_cost_no_less():
    plans = [plan(num_gpus=n, total_batch=2048, train={"accumulate": 64 // n}) for n in (8, 32, 64)]
    hours = [p.value("hours_alone") for p in plans]
    assert hours[0] > 3.9 * hours[1]
    assert hours[1] > 1.9 * hours[2]
    assert len({p.value("steps") for p in plans}) == 1
    gpu_hours = [p.value("hours_alone") * n for p, n in zip(plans, (8, 32, 64), strict=True)]
    assert gpu_hours == sorted(gpu_hours)


def test_more_clips_take_more_memory_and_less_is_kept_by_stronger_recomputation():
    by_batch = [plan(train={"batch_size": b}).value("memory_bytes") for b in (8, 16, 32, 64)]
    assert by_batch == sorted(by_batch)
    policies = ("none", "pointwise", "fc1", "block")
    kept = [plan(train={"recompute": policy}).value("kept_bytes") for policy in policies]
    assert kept == sorted(kept, reverse=True)
    largest = [plan(train={"recompute": policy}).value("largest_batch") for policy in policies]
    assert largest == sorted(largest)
    assert plan(gpu="h200").value("largest_batch") > plan(gpu="h100").value("largest_batch")


def test_the_largest_batch_fits_and_one_more_does_not():
    largest = int(plan().value("largest_batch"))
    assert plan(train={"batch_size": largest}).value("memory_bytes") <= 78
    with pytest.raises(ValueError, match=rf"train.batch_size={largest + 1}: needs .* with train.recompute=fc1"):
        plan(train={"batch_size": largest + 1})
    assert plan(data={"repeat": 4}, train={"batch_size": 32}).value("largest_batch") % 4 == 0


def test_warnings_name_the_limit_and_the_remedy():
    slow = plan().warnings
    assert any("the data path is the limit" in w and "data.num_workers=27" in w and "data.repeat=4" in w for w in slow)
    assert any("checkpoint.every=" in w for w in plan(data={"num_workers": 40}).warnings)
    fine = plan(data={"num_workers": 40}, checkpoint={"every": 20_000})
    assert fine.warnings == []
    assert fine.figures["hours"].value == fine.figures["hours_alone"].value
    by_network = plan(data={"num_workers": 40}, checkpoint={"every": 20_000}, node_network_gbit=25)
    assert any("for the network" in w for w in by_network.warnings)
    assert any("NVDEC" in w for w in plan(data={"decoder": "dali"}).warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpus": 0}, "--num-gpus 0: choose more than 0"),
        ({"num_gpus": 12}, "--num-gpus 12: not whole machines"),
        ({"dataset": None}, "--dataset: choose one of k400, ssv2, or give --num-videos"),
        ({"num_videos": 1000}, "2048 clips in a step on 64 GPUs, but an epoch has 1000"),
        ({"train": {"precision": "fp32"}}, "train.precision='fp32'"),
        ({"price_per_gpu_hour": -1}, "--price-per-gpu-hour -1"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_the_command_line_prints_a_table(capsys):
    assert main([*LINE, "--config", str(K400), "--batch", "64", "--total-batch", "8192"]) == 0
    text = capsys.readouterr().out
    for words in (
        "64 × h100 in 8 nodes",
        "8,192",
        "measured",
        "modelled",
        "GPU hours of an epoch",
        "data.num_workers=8",
    ):
        assert words in text


def test_json_holds_every_figure_with_its_basis(capsys):
    assert main([*LINE, "--json", "--price-per-gpu-hour", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "plan"
    assert found["options"]["num_gpus"] == 64
    assert set(found["figures"]) == set(plan(price_per_gpu_hour=2).figures)
    for figure in found["figures"].values():
        assert set(figure) == {"group", "name", "value", "high", "unit", "basis", "how"}
        assert figure["basis"] in ("measured", "modelled", "exact")
        assert figure["high"] is None or figure["high"] > figure["value"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "24", "--total-batch", "2048"], "choose 1536 or 3072, or another --batch"),
        (["--batch", "1000"], "train.batch_size=1000: needs"),
        (["--epochs", "20"], "optim.warmup_epochs=40"),
        (["--gpu", "b200"], "b200"),
        (["--batch", "0"], "--batch 0: choose more than 0"),
    ],
)
def test_mistakes_are_one_message(arguments, message, capsys):
    assert main([*LINE, *arguments]) == 2
    assert message in capsys.readouterr().err


DOCUMENTED = [
    line for line in (REPOSITORY / "docs" / "scaling.md").read_text().splitlines() if "adamae-fast plan --" in line
]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_commands_of_the_page_run(line, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    words = [word for word in line.split()[1:] if word != "--dry-run"]  # that one is tested with a smaller model
    assert main(words) == 0
    assert "GPU hours" in capsys.readouterr().out


def test_the_page_has_commands():
    assert len(DOCUMENTED) == 4
