"""The run as a whole, mostly in processes of its own, because that is where it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from adamae_fast.run_folder import RunFolder
from adamae_fast.train.metrics import read_metrics

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


def run_and_signal(recipe: Path, output_dir: Path, after_step: int, number: int) -> int:
    """Start a run, send a signal as soon as it has logged ``after_step``, return its exit status."""
    process = subprocess.Popen(
        command(recipe, output_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    metrics = RunFolder(output_dir).metrics
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(entry["step"] >= after_step for entry in read_metrics(metrics)):
            process.send_signal(number)
            return process.wait(timeout=60)
    process.kill()
    raise AssertionError(f"the run ended with {process.wait()} before it logged step {after_step}")


def losses(output_dir: Path) -> dict[int, tuple[float, ...]]:
    names = ("loss", "loss_reconstruction", "loss_sampling", "grad_norm", "lr", "probability_entropy")
    return {entry["step"]: tuple(entry[n] for n in names) for entry in read_metrics(RunFolder(output_dir).metrics)}


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run") / "uninterrupted"
    finished = run_to_end(recipe, output_dir)
    assert finished.returncode == 0, finished.stderr
    return output_dir, finished


def test_run_folder_metrics_and_summary(uninterrupted):
    output_dir, finished = uninterrupted
    run = RunFolder(output_dir)
    entries = read_metrics(run.metrics)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    required = {"step", "loss", "loss_reconstruction", "loss_sampling", "lr", "grad_norm", "clips_per_second"}
    assert required | {"data_wait_share", "quarantined", "probability_entropy"} <= set(entries[0])
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
    for after_step in (2, 5, 10):  # before the first checkpoint, and twice between checkpoints
        assert run_and_signal(recipe, output_dir, after_step, signal.SIGKILL) == -signal.SIGKILL
    assert run_to_end(recipe, output_dir).returncode == 0
    assert losses(output_dir) == losses(expected)
    final = [load_file(RunFolder(folder).checkpoint(STEPS) / "model.safetensors") for folder in (expected, output_dir)]
    assert all((final[0][name] == final[1][name]).all() for name in final[0])


def test_sigterm_saves_and_exits_cleanly(recipe, uninterrupted, tmp_path):
    output_dir = tmp_path / "stopped"
    assert run_and_signal(recipe, output_dir, 4, signal.SIGTERM) == 0
    run = RunFolder(output_dir)
    last_step = read_metrics(run.metrics)[-1]["step"]
    assert 4 <= last_step < STEPS
    assert run.list_checkpoints()[-1] == run.checkpoint(last_step)
    assert run_to_end(recipe, output_dir).returncode == 0
    assert losses(output_dir) == losses(uninterrupted[0])


def test_a_truncated_checkpoint_is_refused_and_the_previous_one_continues(recipe, uninterrupted, tmp_path):
    import shutil

    output_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], output_dir)
    run = RunFolder(output_dir)
    weights = run.checkpoint(14) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused = run_to_end(recipe, output_dir)
    assert refused.returncode == 2
    offered = f"--resume {run.checkpoint(12)}"
    words = " ".join(refused.stderr.split())
    assert "step_00000014 is damaged" in words
    assert offered in words
    assert run_to_end(recipe, output_dir, *offered.split()).returncode == 0
    assert losses(output_dir) == losses(uninterrupted[0])


def test_a_fresh_run_can_start_from_other_weights(recipe, uninterrupted, tmp_path):
    options = ("--init_weights", str(uninterrupted[0]), "--train.steps", "1")
    assert run_to_end(recipe, tmp_path / "run", *options).returncode == 0
    first, last = losses(tmp_path / "run")[1][1], losses(uninterrupted[0])
    assert first < 0.9 * last[1][1]


def test_a_second_run_does_not_overwrite_the_first(recipe, uninterrupted):
    refused = run_to_end(recipe, uninterrupted[0], "--resume", "none")
    assert refused.returncode == 2
    assert "already holds a run" in " ".join(refused.stderr.split())
