"""One of several processes that save and load a nano model: ``python checkpoint_worker.py WHAT FOLDER RANK PROCESSES``.

What it finds wrong ends it with an assertion; :mod:`tests.distributed.test_checkpoint` starts it.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from adamae_fast.config import CheckpointConfig, MaskConfig, ModelConfig, OptimConfig, PretrainConfig
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.model.block import Block
from adamae_fast.run_folder import RunFolder
from adamae_fast.train import checkpoint, sharded_checkpoint
from adamae_fast.train.checkpoint import CheckpointError, CheckpointSaver, RunState, load_checkpoint, save_checkpoint
from adamae_fast.train.optim import build_optimizer, export_state

CONFIG = PretrainConfig(
    model=ModelConfig(size="nano", num_frames=2, frame_size=32, patch_size=16),
    mask=MaskConfig(ratio=0.5),
)
ASYNCHRONOUS = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(asynchronous=True))
FULL = OSError(28, "No space left on device")


def build(seed: int, split: bool) -> tuple[AdaMAE, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = AdaMAE(CONFIG.model, CONFIG.mask)
    if split:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model, build_optimizer(model, OptimConfig())


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """The same clip and masks in every process: what is split and what is not learn the same."""
    torch.manual_seed(seed)
    clip = torch.randint(0, 256, (2, 3, 2, 32, 32), dtype=torch.uint8)
    loss = model(clip, visible_ids=torch.tensor([[0, 1], [1, 3]])).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def average_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() * 0.5 for name, parameter in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, averaged: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a checkpoint must bring back, put together by PyTorch itself."""
    tensors = {f"weights.{name}": whole(p.detach()) for name, p in model.state_dict().items()}
    tensors |= {f"average.{name}": whole(p) for name, p in averaged.items()}
    state = export_state(optimizer)
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": whole(value) for key, value in state[parameter].items()}
    return tensors


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def state(step: int) -> RunState:
    return RunState(step=step, num_videos=5, loss_scale={})


def load(folder: Path, split: bool) -> dict[str, Tensor]:
    model, optimizer = build(99, split)
    averaged = {name: torch.zeros_like(parameter.detach()) for name, parameter in model.named_parameters()}
    assert load_checkpoint(folder, model, optimizer, averaged) == state(int(folder.name[-8:]))
    return snapshot(model, optimizer, averaged)


def write(folder: Path) -> None:
    """Save what is split among processes and what each has whole; the truth goes beside it."""
    for name, split in (("split", True), ("whole", False)):
        run = RunFolder(folder / name)
        model, optimizer = build(0, split)
        with CheckpointSaver(run, ASYNCHRONOUS) as saver:
            for step in (1, 2, 3):
                train_a_step(model, optimizer, step)
                averaged = average_of(model)
                truth = snapshot(model, optimizer, averaged)
                if dist.get_rank() == 0:
                    save_file(truth, folder / f"{name}_{step}.safetensors")
                saver.save(model, optimizer, state(step), averaged)
        assert run.list_checkpoints() == [run.checkpoint(2), run.checkpoint(3)]
    save_checkpoint(RunFolder(folder / "at once"), CONFIG, model, optimizer, state(3), averaged)
    if dist.get_rank() == 0:
        (folder / "next loss").write_text(repr(train_a_step(model, optimizer, seed=4)))


def read(folder: Path) -> None:
    """Load what another number of processes has written, and what one process has; then go on."""
    for name, split in (("split", True), ("split", False), ("whole", True), ("one", True)):
        truth = load_file(folder / f"{name}_3.safetensors")
        assert_equal_bits(load(RunFolder(folder / name).checkpoint(3), split), truth)
    expected = float((folder / "next loss").read_text())
    for split in (True, False):
        model, optimizer = build(99, split)
        load_checkpoint(RunFolder(folder / "whole").checkpoint(3), model, optimizer)
        found = train_a_step(model, optimizer, seed=4)
        assert found == pytest.approx(expected, rel=1e-6) if split else found == expected


def fail(folder: Path) -> None:
    """What goes wrong reaches every process, and leaves the checkpoints before it."""
    run = RunFolder(folder / "fail")
    model, optimizer = build(0, split=True)
    train_a_step(model, optimizer)
    save_checkpoint(run, CONFIG, model, optimizer, state(1))
    truth = snapshot(model, optimizer, {})

    # The files are written while the training goes on, and only whole checkpoints are listed.
    released = threading.Event()
    write_data = sharded_checkpoint._ShardWriter.write_data

    def write_later(*args: object) -> object:
        assert released.wait(60)
        return write_data(*args)

    with CheckpointSaver(run, ASYNCHRONOUS) as saver:
        with mock.patch.object(sharded_checkpoint._ShardWriter, "write_data", write_later):
            saver.save(model, optimizer, state(2))
            train_a_step(model, optimizer, seed=1)
            assert run.list_checkpoints() == [run.checkpoint(1)]
            dist.barrier()
            released.set()
            saver.wait()
        assert run.list_checkpoints() == [run.checkpoint(1), run.checkpoint(2)]
        other = build(99, split=True)
        load_checkpoint(run.checkpoint(2), *other)
        assert_equal_bits(snapshot(*other, {}), truth)

        # A disk that is full for one process alone.
        full = mock.Mock(side_effect=FULL if dist.get_rank() == 1 else None, wraps=write_data)
        with mock.patch.object(sharded_checkpoint._ShardWriter, "write_data", lambda *args: full(*args)):
            saver.save(model, optimizer, state(3))
            with pytest.raises(OSError, match=r"step_00000003 could not be written .*process 1.*No space") as caught:
                saver.wait()
        assert caught.value.errno == 28

        # A disk that the first process does not see.
        def write_elsewhere(writer: sharded_checkpoint._ShardWriter, *args: object) -> object:
            written = write_data(writer, *args)
            for shard in writer.path.glob("shard-00002-*") if dist.get_rank() == 1 else ():
                shard.unlink()
            return written

        with mock.patch.object(sharded_checkpoint._ShardWriter, "write_data", write_elsewhere):
            saver.save(model, optimizer, state(3))
            with pytest.raises(OSError, match=r"shard-00002.* is not there; output_dir must be .* share"):
                saver.wait()
        # A disk that is full at the end.
        with mock.patch.object(checkpoint, "save_config", mock.Mock(side_effect=FULL)):
            saver.save(model, optimizer, state(3))
            with pytest.raises(OSError, match=r"process 0.*No space"):
                saver.save(model, optimizer, state(4))
        dist.barrier()
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000001", "step_00000002"]

    # A shard that was damaged afterwards; whichever process looks at it, all refuse the checkpoint.
    for shard in sorted((run.checkpoint(2) / "optimizer").iterdir()):
        content = shard.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier()
        with pytest.raises(
            CheckpointError, match=rf"step_00000002 is damaged \(optimizer/{shard.name} has .*--resume .*step_00000001"
        ):
            load_checkpoint(run.checkpoint(2), *other)
        dist.barrier()
        if dist.get_rank() == 0:
            shard.write_bytes(content)


def kill(folder: Path) -> None:
    """Save once, then die without notice while the second checkpoint is being written."""
    run = RunFolder(folder)
    model, optimizer = build(0, split=True)
    with CheckpointSaver(run, ASYNCHRONOUS) as saver:
        train_a_step(model, optimizer)
        saver.save(model, optimizer, state(1))
        saver.wait()

        def die(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        # The one in the middle of its shards, or the other one when only the name is missing.
        rank, target = (1, "torch.distributed.checkpoint.filesystem._write_item")
        if folder.name == "before the name":
            rank, target = (0, "pathlib.Path.rename")
        if dist.get_rank() == rank:
            mock.patch(target, die).start()
        saver.save(model, optimizer, state(2))
        while True:
            train_a_step(model, optimizer)  # ends when the other process is gone


def main() -> None:
    torch.set_num_threads(1)
    what, folder, rank, num_processes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    meeting = f"file://{folder.resolve()}/.{what}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_processes)
    {"write": write, "read": read, "fail": fail, "kill": kill}[what](folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
