"""A rehearsal of a run's set-up on one machine, without a GPU and without weights in memory.

PyTorch's fake process group stands for the other processes, and fake tensors, which have shapes and no numbers, for the
model: blocks recompute and are compiled where the recipe asks for it, the very
:func:`~adamae_fast.distributed.parallelize.parallelize` that training calls shares it, and it takes forward and
backward passes on a clip, and updates. That is done for two processes: the first one, which has most with fsdp2, and
the last one, which has least. Of both, the bytes of weights, gradients and moments are counted, and what the plan
models as the peak of a step stands beside them. What is no part of it: the other processes' set-up, kernels, what the
compiler makes of a block, activations, time, whether the network works.

The stream of videos is walked through, too: every place of an epoch and of the beginning of the next one must be seen
by exactly one process, also where the run goes on from a checkpoint with half of the processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adamae_fast.config import PretrainConfig
from adamae_fast.data.clips import epoch_order
from adamae_fast.data.loader import batch_positions
from adamae_fast.device import arithmetic
from adamae_fast.distributed.parallelize import only_last_syncs, parallelize
from adamae_fast.distributed.world import World
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.plan.estimate import memory_of
from adamae_fast.plan.shares import Parameters
from adamae_fast.train.compile import compile_blocks
from adamae_fast.train.optim import build_optimizer

CPU = torch.device("cpu")

MAX_PASSES = 2
"""Of a rehearsed step: one without exchange of gradients, and one with it."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """What one process was found to keep between two steps, in bytes."""

    rank: int
    weights: int
    gradients: int
    moments: int
    modelled_peak: float
    """What the plan takes for the allocated peak of a step with all clips of a pass; nothing of it was seen."""

    @property
    def total(self) -> int:
        """All that was counted."""
        return self.weights + self.gradients + self.moments


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What all processes see."""

    num_steps: int
    """Walked through."""
    num_places: int
    """Each of which was seen exactly once."""
    resumed_with: int | None
    """Processes after the resume that was tried; None where none of another size gives the same steps."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """All that was found."""

    rehearsed: str
    """Who was set up, and how, in words."""
    processes: list[Process]
    stream: Stream


def dry_run(config: PretrainConfig, num_processes: int, num_videos: int) -> DryRun:
    """Rehearse. Raises ValueError where places of the stream are missed or seen twice."""
    ranks = sorted({0, num_processes - 1})
    return DryRun(
        rehearsed=describe(config, ranks, num_processes),
        processes=[rehearse(config, rank, num_processes) for rank in ranks],
        stream=walk(config, num_processes, num_videos),
    )


def describe(config: PretrainConfig, ranks: list[int], num_processes: int) -> str:
    """What :func:`rehearse` does with the recipe for these processes, and what it leaves out."""
    train, passes = config.train, min(config.train.accumulate, MAX_PASSES)
    order = [f"recompute {train.recompute}"] * (train.recompute != "none")
    order += ["compile (blocks are traced, no code is generated)"] * train.compile
    order += [config.distributed.mode] * (num_processes > 1)
    who = f"process{'es' * (len(ranks) > 1)} {' and '.join(map(str, ranks))} of {num_processes}"
    return (
        f"set up: {who}, {' → '.join(order) or 'the plain model'}, and a step of {passes} pass{'es' * (passes > 1)} "
        "with one clip. The bytes that stay after it are counted; the peak, with all "
        f"{train.batch_size} clips of a pass, is the plan's model"
    )


@contextmanager
def fake_group(rank: int, num_processes: int) -> Iterator[None]:
    """This process as one of many, of which the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rehearse(config: PretrainConfig, rank: int, num_processes: int) -> Process:
    """Set up process ``rank`` and take one step with a clip."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model = AdaMAE(config.model, config.mask, config.loss)
    with fake:
        model = model.to_empty(device=CPU).train()
    model.set_recompute(config.train.recompute)
    if config.train.compile:
        torch._dynamo.reset()  # graphs of the process before count towards the limit of those of a block
        compile_blocks(model, backend="eager")
    world = World(rank=rank, size=num_processes)
    # Rounding gradients for their way changes nothing about who keeps what.
    distributed = dataclasses.replace(config.distributed, gradient_compression="none")
    with fake_group(rank, num_processes):
        network = parallelize(model, distributed, world, CPU, config.train.precision)
        if isinstance(network, DistributedDataParallel):
            # In place of an all-reduce, which a fake group has no result of.
            network.register_comm_hook(None, lambda state, bucket: _done(bucket.buffer()))
        with fake:
            optimizer = build_optimizer(model, config.optim)
            passes = min(config.train.accumulate, MAX_PASSES)
            for number in range(passes):
                _pass(config, model, network, is_last=number == passes - 1)
            optimizer.step()
    memory = memory_of(config, Parameters.of(config), num_processes, config.train.recompute, rank)
    parameters = list(model.parameters())
    states = chain.from_iterable(state.values() for state in optimizer.state.values())
    return Process(
        rank=rank,
        weights=_bytes(parameters),
        gradients=_bytes(p.grad for p in parameters),
        moments=_bytes(value for value in states if value.ndim),  # not the number of steps
        modelled_peak=memory.of(config.train.batch_size),
    )


def _pass(config: PretrainConfig, model: AdaMAE, network: nn.Module, *, is_last: bool) -> None:
    video = torch.zeros((1, *model.grid.video_shape), dtype=torch.uint8)
    with only_last_syncs(network, is_last), arithmetic(CPU, config.train.precision):
        network(video, seeds=torch.zeros(1, dtype=torch.int64)).loss.backward()


def _done(result: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(result)
    return future


def _bytes(tensors: Any) -> int:
    """Of the parts of tensors that this process has."""
    own = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum(x.numel() * x.element_size() for x in own)


def walk(config: PretrainConfig, num_processes: int, num_videos: int) -> Stream:
    """Follow all processes through one epoch and the step that crosses its end."""
    accumulate = config.train.accumulate
    per_step = config.train.batch_size // config.data.repeat * accumulate * num_processes
    num_steps = math.ceil(num_videos / per_step) + 1
    seen = [_places(config, step, num_processes, accumulate) for step in range(num_steps)]
    _check(np.concatenate(seen), f"{num_processes} processes")
    order = epoch_order(config.seed, 0, num_videos)
    if not np.array_equal(np.sort(order), np.arange(num_videos)):
        raise ValueError(f"seed={config.seed}: an epoch's order is no permutation of its {num_videos} videos")
    resumed_with = num_processes // 2 if num_processes % 2 == 0 else None
    if resumed_with is not None:
        half = num_steps // 2
        later = [_places(config, step, resumed_with, 2 * accumulate) for step in range(half, num_steps)]
        _check(np.concatenate([*seen[:half], *later]), f"{num_processes} processes, then {resumed_with}")
    return Stream(num_steps=num_steps, num_places=num_steps * per_step, resumed_with=resumed_with)


def _places(config: PretrainConfig, step: int, num_processes: int, accumulate: int) -> NDArray[np.int64]:
    """What all processes see in a step."""
    videos = config.train.batch_size // config.data.repeat
    ranges = [
        batch_positions(step * accumulate + number, videos_per_batch=videos, rank=rank, world_size=num_processes)
        for number in range(accumulate)
        for rank in range(num_processes)
    ]
    return np.concatenate([np.arange(r.start, r.stop) for r in ranges])


def _check(places: NDArray[np.int64], who: str) -> None:
    """Raise ValueError unless ``places`` are 0, 1, … in any order."""
    times = np.bincount(places, minlength=len(places))
    if wrong := np.flatnonzero(times != 1).tolist():
        raise ValueError(f"{who}: place {wrong[0]} of the stream of videos is seen {times[wrong[0]]} times, not once")
