"""What the tests look at, computed in one program: steps and runs of 1, 2 and 4 processes.

``python -m tests.distributed.scenarios FOLDER MANIFEST [NAME…]`` leaves a folder for each scenario. What a process
would import on its way is imported before it is forked.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import yaml
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from adamae_fast.cli import main
from adamae_fast.config import MaskConfig, ModelConfig, OptimConfig, PretrainConfig, SamplerConfig, TrainConfig
from adamae_fast.config_distributed import DistributedConfig
from adamae_fast.data.quarantine import DataStoppedError
from adamae_fast.distributed.parallelize import whole
from adamae_fast.distributed.world import World, joined
from adamae_fast.train import pretrain, sharded_checkpoint, step
from adamae_fast.train.compile import compile_blocks
from adamae_fast.train.step import Stepper
from tests.distributed.processes import run_world
from tests.train.labelled_videos import write_manifest
from tests.train.labelled_videos import write_recipe as write_finetune_recipe

SIZES = {"size": "nano", "num_frames": 4, "frame_size": 32, "tubelet_size": 2, "patch_size": 16}  # 8 tokens
TOTAL = 8
"""Clips of a step, on all processes together."""
STEPS = 3
LEARNING_RATE = 1e-3


def clips(number: int) -> torch.Tensor:
    """All clips of step ``number``."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (TOTAL, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)


def config_of(*, mode="ddp", compression="none", dropout=0.0, **train) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(**SIZES, sampler=SamplerConfig(dropout=dropout)),
        mask=MaskConfig(ratio=0.5),
        optim=OptimConfig(clip_grad_norm=0.2),  # less than the gradients have
        train=TrainConfig(**{"precision": "fp32", "device": "cpu", **train}),
        distributed=DistributedConfig(mode=mode, gradient_compression=compression, timeout=90),
    )


def in_world(work: Callable[..., dict[str, Any]], folder: Path, rank: int, **options: Any) -> dict[str, Any]:
    """Call ``work`` in a process group, of which nothing that it has made is left when the group ends."""
    with joined("cpu", "train.device", 90) as (world, device):
        return work(folder, world, device, **options)


def steps(folder: Path, world: World, device: torch.device, *, accumulate=1, **options) -> dict[str, Any]:
    """Take STEPS steps; keep figures, visible ids of each clip in the order of the step, and all parameters."""
    config = config_of(accumulate=accumulate, **options)
    compiler = partial(compile_blocks, backend="eager")
    with patch.object(step, "compile_blocks", compiler):
        stepper = Stepper(config, device, world)
    seen: list[list[list[int]]] = []
    stepper.model.register_forward_hook(lambda m, a, output: seen.append(output.visible_ids.tolist()))
    figures: list[dict[str, float]] = []
    exchanges: list[str] = []
    for number in range(STEPS):
        is_last = number == STEPS - 1
        with profile(activities=[ProfilerActivity.CPU]) if is_last else nullcontext() as trace:
            stepper.begin(number, LEARNING_RATE)
            for mine in clips(number).chunk(world.size * accumulate)[world.rank :: world.size]:
                stepper.accumulate(mine)
            stepper.finish(number)
        if trace is not None:
            exchanges = [event.name for event in trace.events() if event.name.startswith("c10d::")]
        figures.append(stepper.read_figures())
    parameters = {name: whole(p.detach()).clone() for name, p in stepper.model.named_parameters()}
    first_moments = {
        f"moment.{n}": whole(stepper.optimizer.state[p]["exp_avg"]).clone() for n, p in stepper.model.named_parameters()
    }
    shares = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in stepper.model.parameters())
    if world.is_first:
        save_file({**parameters, **first_moments}, folder / "parameters.safetensors")
    return {"figures": figures, "ids": seen, "exchanges": exchanges, "share": shares}


def bad_loss(folder: Path, world: World, device: torch.device, mode: str) -> dict[str, Any]:
    """The last rank's loss is not a number in the second step."""
    stepper = Stepper(config_of(mode=mode), device, world)

    def spoil(module, arguments, output):
        return dataclasses.replace(output, loss=output.loss * float("nan"))

    before: list[torch.Tensor] = []
    for number in range(STEPS):
        if number == 1:
            before = [whole(p.detach()).clone() for p in stepper.model.parameters()]
            if world.rank == world.size - 1:
                stepper.model.register_forward_hook(spoil)
        stepper.begin(number, LEARNING_RATE)
        stepper.accumulate(clips(number).chunk(world.size)[world.rank])
        stepper.finish(number)
    unchanged = [torch.equal(a, whole(p.detach())) for a, p in zip(before, stepper.model.parameters(), strict=True)]
    try:
        stepper.check()
    except Exception as error:
        return {"unchanged": all(unchanged), "error": type(error).__name__, "text": str(error)}
    return {"error": None}


def write_recipe(path: Path, manifest: Path) -> Path:
    recipe = {
        "model": {"size": "nano", "num_frames": 4, "frame_size": 32, "patch_size": 16},
        "mask": {"ratio": 0.5},
        "data": {"manifest": str(manifest), "stride": 1, "num_workers": 0, "max_bad_share": 0.5},
        "optim": {"base_lr": 0.05, "min_lr": 0.01},
        "train": {"steps": 6, "batch_size": 2, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every": 100},
        "log": {"every": 1, "tensorboard": False},
        "distributed": {"timeout": 90},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(recipe: Path, output_dir: Path, rank: int, *options: str) -> list[list[int]]:
    """``adamae-fast pretrain``; return the videos of each micro-batch. Ends the process with the command's status."""
    shown: list[list[int]] = []
    original = Stepper.take

    def take(self, batch):
        shown.append(list(batch.shown))
        original(self, batch)

    words = ["pretrain", "--config", str(recipe), "--output_dir", str(output_dir), *options]
    # The report is drawn with other threads in it, and is no matter of processes.
    with patch.object(Stepper, "take", take), patch("adamae_fast.train.summary.write_report", None):
        status = main(words)
    if status:
        raise SystemExit(status)
    return shown


def finetune(recipe: Path, output_dir: Path, options: tuple[str, ...], folder: Path, rank: int) -> None:
    """``adamae-fast finetune``; ends the process with the command's status where that is not 0."""
    if status := main(["finetune", "--config", str(recipe), "--output_dir", str(output_dir), *options]):
        raise SystemExit(status)


def slow_command(rank: int, call: Callable[[], Any]) -> Any:
    """The second process takes longer for each forward pass."""
    original = Stepper._forward

    def slow(self, *inputs):
        time.sleep(0.2)
        return original(self, *inputs)

    with patch.object(Stepper, "_forward", slow if rank == 1 else original):
        return call()


def broken_data(rank: int, call: Callable[[], Any]) -> Any:
    """The second process gets no fourth batch."""

    def batches(*arguments):
        for number, batch in enumerate(original(*arguments)):
            if number == 3 and rank == 1:
                raise DataStoppedError("a data worker died")
            yield batch

    original = pretrain.clip_batches
    with patch.object(pretrain, "clip_batches", batches):
        return call()


def full_disk(rank: int, call: Callable[[], Any]) -> Any:
    """The second checkpoint finds no space."""
    original, calls = sharded_checkpoint.write_tensors_file, []

    def write(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata)

    with patch.object(sharded_checkpoint, "write_tensors_file", write):
        return call()


def all_scenarios(root: Path, manifest: Path) -> dict[str, tuple[int, Callable[[Path, int], Any]]]:
    """Name, number of processes, and what each does."""
    found: dict[str, tuple[int, Callable[..., Any]]] = {}

    def add(name: str, size: int, **options: Any) -> None:
        found[name] = size, partial(in_world, steps, **options)

    add("whole", 1)
    add("whole_x4", 1, accumulate=4, dropout=0.1)
    for size in (2, 4):
        for mode in ("ddp", "fsdp2"):
            add(f"{mode}_{size}", size, mode=mode)
    for mode in ("ddp", "fsdp2"):
        add(f"{mode}_2x2", 2, mode=mode, accumulate=2, dropout=0.1)
        add(f"{mode}_ordered", 2, mode=mode, recompute="block", compile=True)
        add(f"{mode}_bf16", 2, mode=mode, precision="bf16")
        add(f"{mode}_compressed", 2, mode=mode, compression="bf16")
        found[f"{mode}_bad_loss"] = 2, partial(in_world, bad_loss, mode=mode)
    add("ddp_4x1", 4, dropout=0.1)
    add("whole_bf16", 1, precision="bf16")

    recipe = write_recipe(root / "recipe.yaml", manifest)

    def run(name: str, size: int, *options: str, wrapped: Callable[..., Any] | None = None, into: str = "") -> None:
        def work(folder: Path, rank: int) -> Any:
            call = partial(command, recipe, root / "runs" / (into or name), rank, *options)
            return wrapped(rank, call) if wrapped else call()

        found[name] = size, work

    two = ("--train.accumulate", "2")
    run("run_1x2", 1, *two)
    run("run_2", 2)
    run("run_2_begins", 2, "--train.steps", "6", "--log.every", "2", wrapped=broken_data, into="stopped")
    run("run_1_goes_on", 1, *two, into="stopped")
    run("run_fsdp2", 2, "--distributed.mode", "fsdp2", "--checkpoint.asynchronous", "true")
    run("run_fsdp2_begins", 2, "--distributed.mode", "fsdp2", wrapped=broken_data, into="stopped_fsdp2")
    run("run_ddp_goes_on", 2, into="stopped_fsdp2")
    run("run_4", 4, "--train.batch_size", "1", "--mask.strategy", "tube")
    run("run_1_tube", 1, "--train.batch_size", "4", "--mask.strategy", "tube")
    run("run_2_tube_begins", 2, "--mask.strategy", "tube", wrapped=broken_data, into="stopped_tube")
    run("run_4_goes_on", 4, "--train.batch_size", "1", "--mask.strategy", "tube", into="stopped_tube")
    run("run_other_batch", 4, into="run_2")
    run("run_slow", 2, "--train.steps", "3", wrapped=slow_command)
    run("run_full_disk", 2, "--checkpoint.every", "2", wrapped=full_disk)
    run("run_too_bad", 2, "--data.max_bad_share", "0.1")

    labelled = root / "labelled.txt"
    videos = [line.split()[0] for line in manifest.read_text().splitlines()]
    write_manifest(labelled, videos, [number % 3 for number in range(len(videos))])
    finetune_recipe = write_finetune_recipe(root / "finetune.yaml", labelled, labelled)
    common = (
        "--train.epochs",
        "2",
        "--train.ema_decay",
        "0.5",
        "--data.max_bad_share",
        "0.5",
        "--augment.mixup",
        "0.8",
    )
    for name, size, options in (
        ("finetune_1x2", 1, two),
        ("finetune_2", 2, ()),
        ("finetune_fsdp2", 2, ("--distributed.mode", "fsdp2")),
    ):
        found[name] = size, partial(finetune, finetune_recipe, root / "runs" / name, (*common, *options))
    return found


if __name__ == "__main__":
    root, manifest = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    took = {}
    for name, (size, work) in all_scenarios(root, manifest).items():
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        start = time.monotonic()
        run_world(size, partial(work, root / name), root / name)
        took[name] = round(time.monotonic() - start, 2)
        print(name, took[name], flush=True)
    print(json.dumps(took))
