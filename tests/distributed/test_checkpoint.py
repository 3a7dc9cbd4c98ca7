"""Checkpoints of 2 processes, read by 4 and by this one; what they hold is put together by PyTorch, not by us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adamae_fast.interop.convert import convert
from adamae_fast.interop.starting_point import load_encoder
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.run_folder import RunFolder
from adamae_fast.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, verify_checkpoint
from tests.distributed import checkpoint_worker as worker

REPOSITORY = Path(__file__).parents[2]
SHARDS = "optimizer/*.safetensors"


def start(what: str, folder: Path, num_processes: int) -> list[subprocess.Popen[str]]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    command = [sys.executable, worker.__file__, what, str(folder)]
    return [
        subprocess.Popen(
            [*command, str(rank), str(num_processes)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_processes)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[int]:
    """Exit codes; what the processes printed is shown when a test fails."""
    try:
        for process in processes:
            print(process.communicate(timeout=240)[0])
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Runs of 2 processes that have weights in parts ("split") or whole ("whole"), and of this one ("one")."""
    folder = tmp_path_factory.mktemp("written")
    processes = start("write", folder, 2)
    model, optimizer = worker.build(0, split=False)
    for step in (1, 2, 3):
        worker.train_a_step(model, optimizer, step)
    averaged = worker.average_of(model)
    save_checkpoint(RunFolder(folder / "one"), worker.CONFIG, model, optimizer, worker.state(3), averaged)
    save_file(worker.snapshot(model, optimizer, averaged), folder / "one_3.safetensors")
    assert finish(processes) == [0, 0]
    return folder


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("name", ["split", "whole"])
def test_one_process_reads_what_two_have_written(written, name, step):
    """They were saved in the background while the next step changed the weights in place."""
    found = worker.load(RunFolder(written / name).checkpoint(step), split=False)
    worker.assert_equal_bits(found, load_file(written / f"{name}_{step}.safetensors"))


def test_one_process_continues_the_curve(written):
    model, optimizer = worker.build(99, split=False)
    load_checkpoint(RunFolder(written / "whole").checkpoint(3), model, optimizer)
    assert worker.train_a_step(model, optimizer, seed=4) == float((written / "next loss").read_text())


def test_four_processes_read_it_too_and_continue(written):
    assert finish(start("read", written, 4)) == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["model.safetensors", "trained.safetensors"])
def test_weights_are_the_same_file_whoever_wrote_them(written, name):
    for run in ("split", "whole", "one"):
        folder = RunFolder(written / run).checkpoint(3)
        prefix = "average." if name == "model.safetensors" else "weights."
        truth = {
            key.removeprefix(prefix): value
            for key, value in load_file(written / f"{run}_3.safetensors").items()
            if key.startswith(prefix)
        }
        worker.assert_equal_bits(load_file(folder / name), truth)
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
            "config.yaml",
            "model.safetensors",
            *(["optimizer.safetensors"] if run == "one" else []),
            "state.json",
            "trained.safetensors",
        ]


def test_moments_are_written_once_and_by_all(written):
    shapes = {}
    for path in (RunFolder(written / "whole").checkpoint(3) / "optimizer").iterdir():  # nothing there is a pickle
        with safe_open(path, "pt") as shard:
            shapes[path.name] = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    one, two = shapes.values()
    assert one
    assert two
    assert set(one).isdisjoint(two)
    moments = load_file(RunFolder(written / "one").checkpoint(3) / "optimizer.safetensors")
    assert one | two == {name: list(value.shape) for name, value in moments.items()}


def test_saving_at_once_writes_the_same(written):
    later, at_once = (RunFolder(written / name).checkpoint(3) for name in ("whole", "at once"))
    files = [path.relative_to(later) for path in later.rglob("*.safetensors")]
    assert len(files) == 4
    for file in files:
        worker.assert_equal_bits(load_file(later / file), load_file(at_once / file))


def test_every_tool_reads_it(written, tmp_path):
    run = written / "split"
    weights = load_file(RunFolder(run).checkpoint(3) / "model.safetensors")
    worker.assert_equal_bits(AdaMAE.from_pretrained(run).state_dict(), weights)
    classifier = VideoClassifier(worker.CONFIG.model, num_classes=2)
    load_encoder(classifier, run)
    assert torch.equal(classifier.state_dict()["tokenizer.weight"], weights["tokenizer.weight"])
    convert(str(run), str(tmp_path / "exported.pth"), "adamae")
    assert (tmp_path / "exported.pth").is_file()


def test_a_damaged_shard_is_named(written):
    folder = RunFolder(written / "split").checkpoint(3)
    shard = min(folder.glob(SHARDS))
    content = shard.read_bytes()
    try:
        shard.unlink()
        with pytest.raises(CheckpointError, match=rf"damaged .*optimizer/{shard.name}.*--resume .*step_00000002"):
            load_checkpoint(folder, *worker.build(0, split=False))
    finally:
        shard.write_bytes(content)


def test_what_goes_wrong_reaches_every_process(tmp_path):
    assert finish(start("fail", tmp_path, 2)) == [0, 0]


@pytest.mark.parametrize("moment", ["among the shards", "before the name"])
def test_a_kill_during_an_asynchronous_save_leaves_the_checkpoint_before(tmp_path, moment):
    folder = tmp_path / moment
    folder.mkdir()
    codes = finish(start("kill", folder, 2))
    killed = 1 if moment == "among the shards" else 0
    assert codes[killed] == -9
    assert codes[1 - killed] != 0
    run = RunFolder(folder)
    assert run.list_checkpoints() == [run.checkpoint(1)]
    assert (run.checkpoints / ".unfinished_step_00000002").is_dir()
    assert verify_checkpoint(run.checkpoint(1)) == worker.state(1)
    model, optimizer = worker.build(99, split=False)
    load_checkpoint(run.checkpoint(1), model, optimizer)
    save_checkpoint(run, worker.CONFIG, model, optimizer, worker.state(2))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000001", "step_00000002"]
