import io
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from adamae_fast.config import MaskConfig, ModelConfig, PretrainConfig, load_config
from adamae_fast.config_distributed import DistributedConfig
from adamae_fast.data.manifest import Entry
from adamae_fast.data.synthetic import read_boxes
from adamae_fast.distributed.world import World
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.adaptivity import box_coverage
from adamae_fast.report.sampler_alarms import sampler_alarms
from adamae_fast.report.visualize import read_center_clip
from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train import sampler_watch
from adamae_fast.train.pretrain import _watch_sampler, pretrain
from adamae_fast.train.sampler_watch import SamplerWatch, read_boxed_clips

CONFIG = PretrainConfig(
    model=ModelConfig(size="nano", num_frames=4, frame_size=32, patch_size=16),  # 8 tokens
    mask=MaskConfig(ratio=0.5),
)


def build_model(config=CONFIG):
    torch.manual_seed(0)
    return AdaMAE(config.model, config.mask, config.loss).train()


def entries_of(videos):
    return [Entry(str(video), None) for video in videos]


@pytest.fixture(scope="module")
def boxed(tiny_videos):
    return read_boxed_clips(entries_of(tiny_videos), CONFIG, build_model().grid)


@pytest.fixture
def without_boxes(tiny_videos, tmp_path):
    """The same videos without what is known of them."""
    folder = tmp_path / "plain"
    folder.mkdir()
    return [Path(shutil.copy(video, folder)) for video in tiny_videos]


def test_motion_lift_of_equal_probabilities_is_one(boxed):
    model = build_model()
    with torch.no_grad():
        model.sampler.head.weight.zero_()
    assert SamplerWatch(CONFIG, model, boxed).measure() == {"motion_lift": pytest.approx(1, abs=1e-6)}


def test_motion_lift_is_that_of_a_plain_loop(boxed, tiny_videos):
    model = build_model()
    with torch.no_grad():
        model.sampler.head.weight.mul_(5)
    lifts = []
    for entry in entries_of(tiny_videos):
        clip = read_center_clip(entry, CONFIG)
        coverage_N = box_coverage(read_boxes(entry.path), clip.frame_ids, clip.crop, model.grid)
        if not coverage_N.any():
            continue
        model.eval()
        with torch.no_grad():
            logits_N = model(clip.video_CTHW[None]).logits[0].double().numpy()
        model.train()
        p_N = np.exp(logits_N) / np.exp(logits_N).sum()
        lifts.append(sum(p * x for p, x in zip(p_N, coverage_N, strict=True)) / (sum(coverage_N) / len(coverage_N)))
    assert len(lifts) == len(boxed[0]) > 1
    measured = SamplerWatch(CONFIG, model, boxed).measure()["motion_lift"]
    assert measured == pytest.approx(sum(lifts) / len(lifts), rel=1e-5)
    assert measured != pytest.approx(1, abs=1e-3)


def test_measuring_draws_nothing_and_leaves_the_mode(boxed):
    model = build_model()
    before = torch.get_rng_state()
    SamplerWatch(CONFIG, model, boxed).measure()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_videos_without_boxes_are_not_read(without_boxes, monkeypatch):
    monkeypatch.setattr(sampler_watch, "read_center_clip", None)
    assert read_boxed_clips(entries_of(without_boxes), CONFIG, build_model().grid) is None
    assert SamplerWatch(CONFIG, build_model(), None).measure() == {}


def test_what_cannot_be_read_is_told_and_passed_over(tiny_videos, tmp_path, caplog):
    for name in ("broken.mp4", "cut.mp4"):
        boxes = f"{tiny_videos[0].stem}.boxes.json"
        shutil.copy(tiny_videos[0], tmp_path / name)
        shutil.copy(tiny_videos[0].parent / boxes, tmp_path / name.replace(".mp4", ".boxes.json"))
    (tmp_path / "broken.boxes.json").write_text("{}")
    (tmp_path / "cut.mp4").write_bytes(b"not a video")
    entries = entries_of([tmp_path / "broken.mp4", tmp_path / "cut.mp4", *tiny_videos])
    videos, coverages = read_boxed_clips(entries, CONFIG, build_model().grid, left_out={str(tiny_videos[0])})
    assert len(videos) == len(coverages) == len(tiny_videos) - 1
    assert "broken.boxes.json: not a file of boxes" in caplog.text
    assert "cut.mp4" in caplog.text
    assert videos.dtype == torch.uint8


def test_few_videos_are_read(tiny_videos, monkeypatch):
    entries, grid = entries_of(tiny_videos), build_model().grid
    monkeypatch.setattr(sampler_watch, "NUM_CLIPS", 2)
    assert len(read_boxed_clips(entries, CONFIG, grid)[0]) == 2
    monkeypatch.setattr(sampler_watch, "NUM_SEARCHED", 1)
    assert len(read_boxed_clips(entries, CONFIG, grid)[0]) == 1


@pytest.mark.parametrize(
    ("rank", "size", "mode", "measured"),
    [(0, 1, "fsdp2", {"motion_lift"}), (0, 2, "ddp", {"motion_lift"}), (0, 2, "fsdp2", set()), (1, 2, "ddp", None)],
)
def test_only_a_first_process_with_all_weights_measures(rank, size, mode, measured, tiny_videos, tmp_path):
    config = PretrainConfig(model=CONFIG.model, mask=CONFIG.mask, distributed=DistributedConfig(mode=mode))
    world = World(rank=rank, size=size)
    watch = _watch_sampler(config, RunFolder(tmp_path), entries_of(tiny_videos), build_model(), world)
    assert (None if watch is None else set(watch.measure())) == measured


def test_a_mask_without_a_sampler_is_not_watched(tiny_videos, tmp_path):
    config = PretrainConfig(model=CONFIG.model, mask=MaskConfig(ratio=0.5, strategy="tube"))
    assert _watch_sampler(config, RunFolder(tmp_path), entries_of(tiny_videos), build_model(config), World()) is None


def test_each_alarm_is_one_warning_at_the_step_that_the_report_tells(caplog):
    model, rng = build_model(), np.random.default_rng(0)
    for _ in range(20):
        caplog.clear()
        lines = [
            {
                "step": step,
                "probability_entropy": math.log(rng.choice([3.0, 6.0], p=[0.7, 0.3])),
                "clamped_share": rng.choice([0.1, 0.9], p=[0.3, 0.7]),
                "sampler_grad_norm": rng.choice([1e-9, 1.0], p=[0.7, 0.3]),
                "grad_norm": 1.0,
            }
            for step in range(1, 13)
        ]
        watch = SamplerWatch(CONFIG, model, None)
        with caplog.at_level(logging.WARNING, "adamae_fast"):
            for line in lines:
                watch.observe(line)
        alarms = sampler_alarms(lines, CONFIG, model)
        assert caplog.messages == [f"step {alarm.step}: {alarm.message}" for alarm in alarms]


def run(folder, videos, **options):
    """A few steps on ``videos``; return the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.txt"
    manifest.write_text("".join(f"{path} 0\n" for path in videos))
    recipe = {
        "model": {"size": "nano", "num_frames": 4, "frame_size": 32, "patch_size": 16},
        "mask": {"ratio": 0.5},
        "data": {"manifest": str(manifest), "stride": 1, "num_workers": 0},
        "optim": {"base_lr": 0.05},
        "train": {"steps": 5, "batch_size": 2, "precision": "fp32", "device": "cpu"},
        "log": {"every": 1, "tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output_dir = folder / "run"
    overrides = {"output_dir": str(output_dir), **options}
    pretrain(load_config(folder / "recipe.yaml", overrides), Console(file=io.StringIO()))
    return RunFolder(output_dir)


def test_training_is_the_same_to_the_bit_with_and_without_boxes(tiny_videos, without_boxes, tmp_path):
    with_boxes, without = run(tmp_path / "with", tiny_videos), run(tmp_path / "without", without_boxes)
    one, two = (load_file(folder.list_checkpoints()[-1] / "model.safetensors") for folder in (with_boxes, without))
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines, plain = (read_json_lines(folder.metrics) for folder in (with_boxes, without))
    assert all(line["motion_lift"] > 0 for line in lines)
    assert not any("motion_lift" in line for line in plain)
    figures = set(plain[0]) & {"loss", "grad_norm", "sampler_grad_norm", "error_lift", "visible_in_time/1"}
    assert len(figures) == 5
    for line, other in zip(lines, plain, strict=True):
        assert {name: line[name] for name in figures} == {name: other[name] for name in figures}


def test_a_weight_that_lets_the_gradients_vanish_is_told_in_the_log_and_in_the_report(tiny_videos, tmp_path, caplog):
    folder = run(tmp_path, tiny_videos, **{"loss.sampling_weight": 1e-12})
    told = [message for message in caplog.messages if "sampler_grad_norm" in message]
    assert len(told) == 1
    assert told[0].startswith("step 3: the sampler hardly learns")
    page = folder.report.read_text()
    assert "Step 3: the sampler hardly learns" in page
    assert "raise loss.sampling_weight=1e-12" in page
    caplog.clear()
    run(tmp_path, tiny_videos, **{"loss.sampling_weight": 1e-12, "train.steps": 6})  # a resume
    assert "Step 3: the sampler hardly learns" in folder.report.read_text()


def test_a_sampler_that_learns_raises_no_alarm(tiny_videos, tmp_path, caplog):
    folder = run(tmp_path, tiny_videos)
    assert "the sampler" not in caplog.text
    assert 'class="alarm"' not in folder.report.read_text()
