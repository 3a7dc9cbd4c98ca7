"""The run as a whole, mostly in processes of its own, because that is where it is killed."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from adamae_fast import AdaMAE
from adamae_fast.cli import main
from adamae_fast.config import MaskConfig, ModelConfig, PretrainConfig, load_config, save_config
from adamae_fast.data.manifest import Entry
from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train.pretrain import KEYS, changed_choices, pretrain
from adamae_fast.train.step import Stepper
from adamae_fast.train.summary import print_facts, suggest_commands

STEPS = 14
SAVE_EVERY = 3  # an epoch has 5 clips in batches of 2: saves fall into the middle of epochs


def write_recipe(path: Path, manifest: Path) -> Path:
    recipe = {
        "model": {"size": "nano", "num_frames": 4, "frame_size": 32, "patch_size": 16},
        "mask": {"ratio": 0.5},
        "data": {"manifest": str(manifest), "stride": 1, "num_workers": 1},
        "optim": {"base_lr": 0.05, "min_lr": 0.01},
        "train": {"steps": STEPS, "batch_size": 2, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every": SAVE_EVERY},
        "log": {"every": 1, "tensorboard": False},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_videos):
    folder = tmp_path_factory.mktemp("recipe")
    manifest = folder / "manifest.txt"
    manifest.write_text("".join(f"{path} 0\n" for path in tiny_videos))
    return write_recipe(folder / "recipe.yaml", manifest)


def command(recipe: Path, output_dir: Path, *options: str) -> list[str]:
    program = [sys.executable, "-m", "adamae_fast", "pretrain"]
    return [*program, "--config", str(recipe), "--output_dir", str(output_dir), *options]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_to_end(recipe: Path, output_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, output_dir, *options), capture_output=True, text=True, env=ENVIRONMENT)


def run_and_signal(recipe: Path, output_dir: Path, after_step: int, number: int, *options: str) -> int:
    """Start a run, send a signal as soon as it has logged ``after_step``, return its exit status."""
    # The suite may itself have been started with signals ignored, as in a shell's background; the run would inherit it.
    process = subprocess.Popen(
        command(recipe, output_dir, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None,
    )
    metrics = RunFolder(output_dir).metrics
    deadline = time.monotonic() + 120
    poll = threading.Event()
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if any(entry["step"] >= after_step for entry in read_json_lines(metrics)):
                process.send_signal(number)
                return process.wait(timeout=60)
            poll.wait(0.005)
    finally:
        process.kill()
    raise AssertionError(f"the run ended with {process.wait()} before it logged step {after_step}")


def losses(output_dir: Path) -> dict[int, tuple[float, ...]]:
    names = ("loss", "loss_reconstruction", "loss_sampling", "grad_norm", "lr", "probability_entropy")
    return {entry["step"]: tuple(entry[n] for n in names) for entry in read_json_lines(RunFolder(output_dir).metrics)}


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run") / "uninterrupted"
    finished = run_to_end(recipe, output_dir)
    assert finished.returncode == 0, finished.stderr
    return output_dir, finished


def test_run_folder_metrics_and_summary(uninterrupted):
    output_dir, finished = uninterrupted
    run = RunFolder(output_dir)
    entries = read_json_lines(run.metrics)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    required = {"step", "loss", "loss_reconstruction", "loss_sampling", "lr", "grad_norm", "clips_per_second"}
    assert required | {
        "data_wait_share",
        "quarantined",
        "batches_ready",
        "decode_seconds",
        "decoded_frames",
        "probability_entropy",
    } <= set(entries[0])
    assert [path.name for path in run.list_checkpoints()] == ["step_00000012", "step_00000014"]
    assert run.config.is_file()
    summary = json.loads(run.summary.read_text())
    assert json.loads(finished.stdout.splitlines()[-1]) == summary
    assert (summary["step"], summary["quarantined"]) == (STEPS, 0)
    assert Path(summary["checkpoint"]) == run.checkpoint(STEPS)
    assert Path(summary["report"]) == run.report
    assert run.report.stat().st_size > 10_000


def test_a_run_killed_at_several_moments_equals_the_uninterrupted_one(recipe, uninterrupted, tmp_path):
    expected, _ = uninterrupted
    output_dir = tmp_path / "killed"
    beside = ("--checkpoint.asynchronous", "true")
    for after_step in (2, 5, 10):  # before the first checkpoint, and twice between checkpoints
        assert run_and_signal(recipe, output_dir, after_step, signal.SIGKILL, *beside) == -signal.SIGKILL
    assert run_to_end(recipe, output_dir, *beside).returncode == 0
    assert losses(output_dir) == losses(expected)
    final = [load_file(RunFolder(folder).checkpoint(STEPS) / "model.safetensors") for folder in (expected, output_dir)]
    assert all((final[0][name] == final[1][name]).all() for name in final[0])


def test_the_commands_to_run_next_do_run(uninterrupted, recipe, tmp_path, capsys):
    output_dir, finished = uninterrupted
    lines = finished.stdout.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("next ")]
    saliency, finetune = (shlex.split(line.removeprefix("next")) for line in lines[first:-1])
    assert saliency[:3] == ["adamae-fast", "saliency", str(output_dir)]
    assert main([*saliency[1:], "--out", str(tmp_path / "saliency"), "--device", "cpu"]) == 0
    val = finetune.index("ANOTHER_LIST")
    finetune[val] = finetune[finetune.index("--data.manifest") + 1]
    small = ["--train.steps=1", "--train.batch_size=2", "--data.num_workers=0", "--augment.layers=0"]
    small += [f"--output_dir={tmp_path / 'finetuned'}", "--train.device=cpu", "--log.tensorboard=false"]
    assert main([*finetune[1:], *small]) == 0
    assert f"next          adamae-fast evaluate {tmp_path / 'finetuned'}\n" in capsys.readouterr().out


def test_what_to_run_next_fits_the_run(tmp_path):
    config = PretrainConfig(mask=MaskConfig(strategy="tube", ratio=0.9), model=ModelConfig(size="nano", frame_size=32))
    model, run = AdaMAE(config.model, config.mask), RunFolder(tmp_path / "my run")
    entries = [Entry("a b.mp4", None), Entry("c.mp4", None)]
    assert suggest_commands(run, config, model, entries) == [
        f"adamae-fast visualize '{run.path}' 'a b.mp4'",
        f"adamae-fast finetune --init '{run.path}' --model.size=nano --model.frame_size=32 "
        "--data.manifest LABELLED_LIST --val.manifest ANOTHER_LIST",
    ]
    assert len(suggest_commands(run, config, model, [Entry("images", 0, num_frames=8, kind="frames")])) == 1
    console = Console(record=True, file=io.StringIO(), width=200)
    print_facts([("next", "adamae-fast evaluate 'runs/[bold]'")], console)
    assert console.export_text() == "next          adamae-fast evaluate 'runs/[bold]'\n"  # brackets are no mark-up


@pytest.mark.parametrize("where", ["read_figures", "accumulate"])
def test_a_signal_at_any_moment_saves_every_finished_step(recipe, tmp_path, monkeypatch, where):
    original = getattr(Stepper, where)
    calls = 0

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Stepper, where, interrupted)
    overrides = {"output_dir": str(tmp_path), "train.accumulate": 2, "checkpoint.every": 1000, "data.num_workers": 0}
    summary = pretrain(load_config(recipe, overrides), Console(quiet=True))
    run = RunFolder(tmp_path)
    # Two forward passes make a step: the third belongs to the second step, which is left out.
    done = 3 if where == "read_figures" else 1
    assert (summary["step"], summary["stopped_by"]) == (done, "SIGTERM")
    assert run.list_checkpoints() == [run.checkpoint(done)]
    assert [entry["step"] for entry in read_json_lines(run.metrics)] == list(range(1, done + 1))


def test_figures_of_a_stopped_run_are_those_of_its_last_whole_step(recipe, tmp_path, monkeypatch):
    overrides = {"train.accumulate": 2, "data.num_workers": 0, "checkpoint.every": 1000}
    runs = {}
    for name, stop_at in (("whole", None), ("stopped", 5)):
        calls, original = 0, Stepper.accumulate

        def interrupted(self, *arguments, stop_at=stop_at, original=original):
            nonlocal calls
            calls += 1
            if calls == stop_at:  # in the third step, which is left out
                signal.raise_signal(signal.SIGTERM)
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Stepper, "accumulate", interrupted)
            every = {"output_dir": str(tmp_path / name), "log.every": 1 if stop_at is None else 1000}
            pretrain(load_config(recipe, {**overrides, **every}), Console(quiet=True))
        runs[name] = {entry["step"]: entry for entry in read_json_lines(RunFolder(tmp_path / name).metrics)}
    assert list(runs["stopped"]) == [1, 2]
    for key in ("loss", "loss_sampling", "grad_norm", "probability_entropy"):
        assert runs["stopped"][2][key] == runs["whole"][2][key]


def test_what_was_begun_from_another_run_does_not_restart_from_nothing(recipe, uninterrupted, tmp_path):
    overrides = {"output_dir": str(tmp_path / "run"), "data.num_workers": 0}
    begun = load_config(recipe, {**overrides, "resume": str(uninterrupted[0])})
    RunFolder(begun.output_dir).path.mkdir()
    save_config(begun, RunFolder(begun.output_dir).config)  # all that a kill before the first checkpoint leaves
    with pytest.raises(ValueError, match="give that --resume again"):
        pretrain(load_config(recipe, overrides), Console(quiet=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_cleanly(recipe, tmp_path, number):
    output_dir = tmp_path / "stopped"
    # Too long to end by itself before the signal; it saves only because it is told to stop.
    endless = ("--train.steps", "100000", "--checkpoint.every", "100000")
    assert run_and_signal(recipe, output_dir, 4, number, *endless) == (130 if number == signal.SIGINT else 0)
    run = RunFolder(output_dir)
    last_step = read_json_lines(run.metrics)[-1]["step"]
    assert run.list_checkpoints() == [run.checkpoint(last_step)]
    assert json.loads(run.summary.read_text())["step"] == last_step >= 4
    assert run_to_end(recipe, output_dir, "--train.steps", str(last_step + 2)).returncode == 0
    assert [entry["step"] for entry in read_json_lines(run.metrics)] == list(range(1, last_step + 3))


@pytest.mark.parametrize(
    "options",
    [
        ("--data.num_workers", "0"),
        ("--train.batch_size", "4", "--data.repeat", "2", "--train.accumulate", "2", "--seed", "20260101"),
    ],
    ids=["no workers", "repeat, accumulate, seed"],
)
def test_a_killed_run_with_other_options_equals_the_uninterrupted_one(recipe, tmp_path, options):
    options = (*options, "--train.steps", "8")
    assert run_to_end(recipe, tmp_path / "whole", *options).returncode == 0
    assert run_and_signal(recipe, tmp_path / "killed", 4, signal.SIGKILL, *options) == -signal.SIGKILL
    harmless = ("--data.num_workers", "2", "--train.recompute", "block")
    resumed = run_to_end(recipe, tmp_path / "killed", *options, *harmless)
    assert resumed.returncode == 0, resumed.stderr
    assert "was" not in resumed.stderr, resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_truncated_checkpoint_is_refused_and_the_previous_one_continues(recipe, uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], output_dir)
    run = RunFolder(output_dir)
    weights = run.checkpoint(14) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused = run_to_end(recipe, output_dir)
    assert refused.returncode == 2
    offered = f"--resume {run.checkpoint(12)}"
    assert "step_00000014 is damaged" in refused.stderr
    assert offered in refused.stderr
    assert run_to_end(recipe, output_dir, *offered.split()).returncode == 0
    assert losses(output_dir) == losses(uninterrupted[0])


def test_a_fresh_run_can_start_from_other_weights(recipe, uninterrupted, tmp_path):
    overrides = {"output_dir": str(tmp_path), "init_weights": str(uninterrupted[0]), "train.steps": 1}
    nothing_learned = {"optim.base_lr": 1e-12, "optim.min_lr": 0.0, "optim.weight_decay": 0.0, "data.num_workers": 0}
    pretrain(load_config(recipe, {**overrides, **nothing_learned}), Console(quiet=True))
    before, after = (AdaMAE.from_pretrained(path) for path in (uninterrupted[0], tmp_path))
    for one, two in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_a_second_run_does_not_overwrite_the_first(recipe, uninterrupted):
    refused = run_to_end(recipe, uninterrupted[0], "--resume", "none")
    assert refused.returncode == 2
    assert "already holds another run" in refused.stderr


def test_two_processes_do_not_write_one_run(recipe, tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.lock():
        refused = run_to_end(recipe, run.path)
    assert refused.returncode == 2
    assert "another process is writing this run" in refused.stderr


def test_a_shorter_run_than_its_checkpoint_is_refused(recipe, uninterrupted):
    refused = run_to_end(recipe, uninterrupted[0], "--train.steps", "9")
    assert refused.returncode == 2
    assert "stands at step 14, but this run ends at step 9" in refused.stderr


def test_another_experiment_in_the_folder_of_a_run_is_refused(recipe, uninterrupted, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], output_dir)
    before = RunFolder(output_dir).config.read_text()
    for option, words in {
        "model.size": r"model\.size='small', but .*step_00000014 was trained with 'nano'; choose another output_dir$",
        "mask.ratio": r"mask\.ratio=0\.25, .*--resume .*step_00000014",
    }.items():
        value = {"model.size": "small", "mask.ratio": 0.25}[option]
        with pytest.raises(ValueError, match=words):
            pretrain(load_config(recipe, {"output_dir": str(output_dir), option: value}), Console(quiet=True))
    assert RunFolder(output_dir).config.read_text() == before


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (KEYS.other_model, ["model.size", "model.decoder.depth", "model.sampler.width", "mask.strategy"]),
        (
            KEYS.other_experiment,
            ["mask.ratio", "optim.base_lr", "optim.sampler_lr_scale", "model.decoder.keep_ratio"],
        ),
        (KEYS.worth_a_warning, ["train.compile", "optim.implementation", "model.layer_norm", "train.epochs"]),
        (KEYS.harmless, ["train.cuda_graph", "data.num_workers", "data.cache_gib", "log.every"]),
    ],
    ids=["model", "experiment", "warning", "harmless"],
)
def test_what_a_changed_key_means_for_a_checkpoint(kind, keys):
    assert [KEYS.kind_of(key) for key in keys] == [kind] * len(keys)


def test_keys_that_do_not_change_the_experiment_may_change_in_a_runs_folder(recipe, tmp_path, caplog):
    overrides = {"output_dir": str(tmp_path), "train.steps": 1, "data.num_workers": 0}
    pretrain(load_config(recipe, overrides), Console(quiet=True))
    with patch("adamae_fast.train.step.compile_blocks"):
        summary = pretrain(
            load_config(recipe, {**overrides, "train.steps": 2, "train.compile": True}), Console(quiet=True)
        )
    assert summary["step"] == 2
    assert "train.compile was False" in caplog.text
    with pytest.raises(ValueError, match=r"keep_ratio=0\.5, .*choose another output_dir, with --resume"):
        pretrain(load_config(recipe, {**overrides, "model.decoder.keep_ratio": 0.5}), Console(quiet=True))


def test_a_checkpoint_may_go_on_as_another_experiment_elsewhere(recipe, uninterrupted, tmp_path, caplog):
    overrides = {"resume": str(uninterrupted[0]), "output_dir": str(tmp_path / "other"), "data.num_workers": 0}
    summary = pretrain(load_config(recipe, {**overrides, "mask.ratio": 0.25, "train.steps": 15}), Console(quiet=True))
    assert summary["step"] == 15
    assert "mask.ratio was 0.5" in caplog.text


def test_another_attention_back_end_continues_a_run_in_its_folder(recipe, uninterrupted, tmp_path, caplog):
    output_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], output_dir)
    overrides = {"output_dir": str(output_dir), "train.steps": STEPS + 1, "data.num_workers": 0}
    config = load_config(recipe, {**overrides, "model.attention.decoder": "reference"})
    assert pretrain(config, Console(quiet=True))["step"] == STEPS + 1
    assert "model.attention" not in caplog.text


def test_an_attention_back_end_that_cannot_run_stops_the_run_at_once(recipe, tmp_path):
    overrides = {"output_dir": str(tmp_path / "run"), "model.attention.encoder": "sdpa_cudnn"}
    with pytest.raises(ValueError, match=r"model\.attention\.encoder='sdpa_cudnn' .*it takes CUDA tensors"):
        pretrain(load_config(recipe, overrides), Console(quiet=True))
    assert not RunFolder(tmp_path / "run").config.exists()


def test_the_start_of_a_run_shows_the_options_that_were_chosen(recipe, tmp_path):
    overrides = {"model.decoder.keep_ratio": 0.5, "train.recompute": "fc1", "train.steps": 1, "data.num_workers": 0}
    console = Console(record=True, file=io.StringIO())
    pretrain(load_config(recipe, {"output_dir": str(tmp_path / "run"), **overrides}), console)
    assert "options       model.decoder.keep_ratio=0.5, train.recompute=fc1\n" in console.export_text()


def test_options_at_their_defaults_are_not_shown(uninterrupted):
    assert changed_choices(load_config(RunFolder(uninterrupted[0]).config)) == {}


def test_a_finished_run_only_draws_its_report_again(recipe, uninterrupted, tmp_path):
    before = losses(uninterrupted[0])
    RunFolder(uninterrupted[0]).report.unlink()
    assert run_to_end(recipe, uninterrupted[0]).returncode == 0
    assert losses(uninterrupted[0]) == before
    assert RunFolder(uninterrupted[0]).report.is_file()


def test_a_report_that_fails_does_not_cost_the_summary(recipe, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr("adamae_fast.train.summary.write_report", fail)
    config = load_config(recipe, {"output_dir": str(tmp_path), "train.steps": 2, "data.num_workers": 0})
    summary = pretrain(config, Console(quiet=True))
    assert summary == json.loads(RunFolder(tmp_path).summary.read_text())
    assert "report" not in summary
    assert "the report could not be drawn" in caplog.text


def test_options_without_effect_are_named(recipe, tmp_path, caplog):
    unused = {"loss.sampling_weight": 1.0, "loss.sampling_baseline": 0.5, "optim.sampler_lr_scale": 2.0}
    overrides = {"mask.strategy": "tube", **unused, "train.steps": 1, "data.num_workers": 0}
    pretrain(load_config(recipe, {"output_dir": str(tmp_path), **overrides}), Console(quiet=True))
    for key in unused:
        assert f"{key} has no effect: mask.strategy=tube has no sampler" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"loss.sampling_weight": 0, "loss.sampling_baseline": 0.5},
            "loss.sampling_baseline has no effect: loss",
        ),
        ({"loss.sampling_weight": 0, "optim.sampler_lr_scale": 2}, "optim.sampler_lr_scale has no effect: loss"),
        ({"data.decoder": "dali", "data.cache_gib": 1}, "data.cache_gib has no effect: data.decoder=dali decodes"),
    ],
)
def test_options_that_others_make_useless(recipe, overrides, message):
    (found,) = load_config(recipe, overrides).without_effect()
    assert found.startswith(message)
