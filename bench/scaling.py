"""What several processes cost and gain on one CPU, as a smoke figure: ``python -m bench.scaling``.

Each process has a core of its own, its own clips and gloo, and takes the training's own steps; clips are in memory.
With W processes a step has W times the clips, so the efficiency is the time of a step of one process over that of W.
Three arms tell where the rest goes:

* overlapped: as in training, DDP exchanges gradients while the backward goes on;
* after: the same sum in one piece, once the backward is done;
* none: no gradients are exchanged. What is left of a loss against one process is the machine's (caches, memory, clock),
  and waiting for the other process at the end of the step.

All processes share one memory and there is no network: it says that the exchange hides behind the backward and that
nothing is grossly wrong, and nothing about GPUs or several machines.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from adamae_fast.config import MaskConfig, ModelConfig, PretrainConfig, TrainConfig
from adamae_fast.device import num_usable_cores
from adamae_fast.distributed.world import World, joined
from adamae_fast.train.step import Stepper
from bench import command, conditions
from bench.timing import summarize

CPU = torch.device("cpu")

ALONE, ARMS = ("alone",), ("overlapped", "after", "none")

MODELS = {
    "nano": (ModelConfig(size="nano", frame_size=112), MaskConfig(ratio=0.9)),
    "small": (ModelConfig(size="small", frame_size=112), MaskConfig(ratio=0.9)),
}

TIMEOUT = 300.0
LEARNING_RATE = 1e-4

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What each process does."""

    model: ModelConfig
    mask: MaskConfig
    batch_size: int
    """Clips of a step of each process."""
    num_threads: int
    rounds: int
    steps: int
    """Timed together, of each arm in each round."""
    port: int = 0
    out: str = ""


def exchange(parameters: Sequence[Tensor], world: World) -> None:
    """Average gradients in one piece."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    world.average(whole)
    parts = whole.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def take_step(stepper: Stepper, clips: Tensor, number: int, arm: str, world: World) -> None:
    """One step of the training, its gradients exchanged as ``arm`` says."""
    stepper.begin(number, LEARNING_RATE)
    network = stepper.network
    silent: AbstractContextManager[None] = nullcontext()
    if arm in ("after", "none"):
        assert isinstance(network, DistributedDataParallel)
        silent = network.no_sync()
    with silent:
        stepper.accumulate(clips)
    if arm == "after":
        exchange(list(stepper.model.parameters()), world)
    stepper.finish(number)


def measure(job: Job, world: World) -> dict[str, list[float]]:
    """Seconds of a step by arm, one figure a round: the slowest process's; the arms take turns."""
    config = PretrainConfig(
        model=job.model,
        mask=job.mask,
        train=TrainConfig(batch_size=job.batch_size, precision="fp32", device="cpu"),
    )
    stepper = Stepper(config, CPU, world)
    generator = torch.Generator().manual_seed(world.rank)
    shape_BCTHW = (job.batch_size, *stepper.model.grid.video_shape)
    clips = torch.randint(256, shape_BCTHW, dtype=torch.uint8, generator=generator)
    seconds: dict[str, list[float]] = {arm: [] for arm in (ARMS if world.size > 1 else ALONE)}
    number = 0
    for turn in range(-1, job.rounds):  # the first one warms up
        for arm, found in seconds.items():
            world.gather(None)  # all begin together
            start = time.perf_counter()
            for _ in range(job.steps):
                take_step(stepper, clips, number, arm, world)
                number += 1
            mine = (time.perf_counter() - start) / job.steps
            slowest = max(world.gather(mine))
            if turn >= 0:
                found.append(slowest)
    stepper.check()
    return seconds


def be_process(rank: int, size: int, job: Job) -> None:
    """Body of a process: join the others, measure, and let the first one write."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.port),
    }
    torch.set_num_threads(job.num_threads)
    with joined("cpu", "--device", TIMEOUT) as (world, _):
        seconds = measure(job, world)
    if rank == 0:
        Path(job.out).write_text(json.dumps(seconds))


def run_processes(size: int, job: Job) -> dict[str, list[float]]:
    """:func:`measure` in ``size`` processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        job = replace(job, port=port, out=f"{folder}/seconds.json")
        torch.multiprocessing.spawn(be_process, (size, job), nprocs=size)
        found: dict[str, list[float]] = json.loads(Path(job.out).read_text())
    return found


def rows_of(name: str, size: int, job: Job, seconds: dict[str, list[float]]) -> list[Row]:
    """A row for each arm."""
    rows = []
    for arm, found in seconds.items():
        timing = summarize(found, "steps")
        rows.append(
            {
                "model": name,
                "processes": size,
                "arm": arm,
                "batch": job.batch_size,
                "ms": timing.median * 1000,
                "ms_p20": timing.p20 * 1000,
                "ms_p80": timing.p80 * 1000,
                "steps_per_s": 1 / timing.median,
                "clips_per_s": size * job.batch_size / timing.median,
            }
        )
    return rows


def figures_of(rows: Sequence[Row]) -> list[Row]:
    """What the arms say together, for each model and number of processes beyond one.

    ``efficiency``: alone / overlapped. ``waiting``: (overlapped - none) / overlapped, the share of a step that the
    exchange takes beside the backward. ``hidden``: 1 - (overlapped - none) / (after - none), the share of the
    exchange's own time that hides behind the backward; None where that time is within the noise.
    """
    figures = []
    ms = {(row["model"], row["processes"], row["arm"]): row["ms"] for row in rows}
    for model, size in dict.fromkeys((row["model"], row["processes"]) for row in rows if row["processes"] > 1):
        overlapped, after, none = (ms[model, size, arm] for arm in ARMS)
        figures.append(
            {
                "model": model,
                "processes": size,
                "efficiency": ms[model, 1, "alone"] / overlapped,
                "waiting": (overlapped - none) / overlapped,
                "hidden": 1 - (overlapped - none) / (after - none) if after > none else None,
            }
        )
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = command.parser("scaling", __doc__)
    parser.add_argument("--batch", type=int, default=2, help="clips of a step of each process")
    options = parser.parse_args(arguments)
    if options.device not in ("auto", "cpu"):
        raise ValueError(f"--device={options.device!r}: this is a smoke figure of the CPU; choose cpu")
    if options.batch < 1:
        raise ValueError(f"--batch {options.batch}: choose at least 1 clip")
    sizes = (1, 2)
    num_threads = max(1, num_usable_cores() // max(sizes))
    taken = conditions.collect(CPU) | {"cores": str(num_usable_cores())}
    models = {"nano": command.TINY} if options.quick else MODELS
    rows: list[Row] = []
    with command.progress(len(models) * len(sizes)) as (say, advance):
        for name, (model, mask) in models.items():
            rounds, steps = (2, 1) if options.quick else (8, 5 if name == "nano" else 2)
            job = Job(
                model=model, mask=mask, batch_size=options.batch, num_threads=num_threads, rounds=rounds, steps=steps
            )
            for size in sizes:
                say(f"{name}, {size} processes")
                rows += rows_of(name, size, job, run_processes(size, job))
                advance()
    table = Table("model", "processes", "arm", "ms [p20, p80]", "steps/s", "clips/s")
    for row in rows:
        times = f"{row['ms']:.1f} [{row['ms_p20']:.1f}, {row['ms_p80']:.1f}]"
        rates = (f"{row['steps_per_s']:.2f}", f"{row['clips_per_s']:.2f}")
        table.add_row(row["model"], str(row["processes"]), row["arm"], times, *rates)
    Console().print(table)
    result = {
        "conditions": taken,
        "smoke": True,
        "threads_per_process": num_threads,
        "rows": rows,
        "figures": figures_of(rows),
    }
    command.finish("scaling", result, options)
    return 0


if __name__ == "__main__":
    command.run(main)
