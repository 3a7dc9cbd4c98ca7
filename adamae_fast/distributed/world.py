"""The processes of one run, and the few words that they exchange on the host.

Gradients travel by PyTorch's own engines (:mod:`adamae_fast.distributed.parallelize`). Here is what keeps the loops of
all processes in step: a word of each before a micro-batch, figures, and work that the first process does for all. With
one process each of these is a plain call.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from adamae_fast.device import make_current, pick_device
from adamae_fast.distributed.processes import every_process_says
from adamae_fast.errors import RunStoppedError, ToldByFirstError, require

T = TypeVar("T")

MEETING = 300.0
"""Seconds in which the processes of a command without distributed.timeout have to start."""

PATIENCE = 24 * 3600.0
"""Seconds that one of them waits for the others once they have met: it may be done with its videos long before."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of its run. What is called on one of them is called on all, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def average(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its mean over the processes, on its device; the host does not wait for a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.size)

    def gather(self, mine: T) -> list[T]:
        """Return what each process gives, in the order of their ranks."""
        return every_process_says(mine)

    def news(self, mine: T | None = None) -> dict[int, T]:
        """Return what processes have to tell, by their rank: a few bytes travel where none of them has anything."""
        if self.size > 1:
            anything = torch.tensor(mine is not None, dtype=torch.int32)
            dist.all_reduce(anything, op=dist.ReduceOp.MAX)
            if not anything:
                return {}
        return {rank: word for rank, word in enumerate(self.gather(mine)) if word is not None}

    def on_first(self, work: Callable[[], T]) -> T:
        """Let the first process do ``work`` and return the result on all; where it fails, all raise an error."""
        outcome: list[tuple[bool, T | None]] = [(False, None)]
        error: Exception | None = None
        if self.is_first:
            try:
                outcome = [(False, work())]
            except Exception as caught:
                error, outcome = caught, [(True, None)]
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        failed, result = outcome[0]
        if failed:
            raise ToldByFirstError("the first process says why")
        return cast(T, result)

    @contextmanager
    def held_by_first(self, held: AbstractContextManager[None]) -> Iterator[None]:
        """Enter and leave ``held`` on the first process alone; where it cannot be entered, all raise an error."""
        with ExitStack() as stack:
            self.on_first(lambda: stack.enter_context(held))
            yield

    def agreed(self, error: Exception) -> Exception:
        """Return what each process should raise for an ``error`` that all of them have come to.

        The first one tells it. The others wait until it has got here, since torchrun ends all as soon as one has ended.
        """
        self.news()
        return error if self.is_first else ToldByFirstError(str(error))

    def named(self, rank: int, text: object) -> str:
        """``text`` with the rank in front, where there are several."""
        return f"rank {rank}: {text}" if self.size > 1 else str(text)


@contextmanager
def joined(device: str, key: str, timeout: float | None = None) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started, and say where this one computes; without torchrun it is the only one.

    Words travel over gloo, tensors of a CUDA device over NCCL. A process that waits for another one for longer than
    ``timeout`` seconds gives up; without it for longer than :data:`MEETING` at the start, and :data:`PATIENCE` later.

    Args:
        device: what the configuration names.
        key: its name there, for messages.
        timeout: distributed.timeout, in seconds; None for commands that only share a list of videos.

    Raises:
        ValueError: a device that is not there, or the same one for several processes.
        RunStoppedError: another process ended, or could not be reached.
    """
    world = World(rank=int(os.environ.get("RANK", "0")), size=int(os.environ.get("WORLD_SIZE", "1")))
    own = _own_device(device, key) if world.size > 1 else pick_device(device, key)
    make_current(own)
    if world.size == 1:
        yield World(), own
        return
    meeting, patience = (MEETING, PATIENCE) if timeout is None else (timeout, timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
            timeout=timedelta(seconds=patience),
            store=fresh_store(world, meeting),
            rank=world.rank,
            world_size=world.size,
        )
        yield world, own
    except RuntimeError as error:
        if not _is_loss_of_contact(error):
            raise
        what = f"rank {world.rank}: another process of this run has ended, or could not be reached"
        if timeout is None:
            what += "; what is written stands, and the same command does the rest"
        else:
            what += (
                f" for {timeout:g} s (distributed.timeout). Nothing of the step under way counts; torchrun "
                "--max-restarts, or the same command again, goes on from the last checkpoint"
            )
        raise RunStoppedError(f"{what} ({str(error).splitlines()[0]})") from error
    # DDP's reducer, where it outlives the group that it uses, ends the group's threads while these wait for it.
    gc.collect()
    dist.destroy_process_group()


def fresh_store(world: World, timeout: float) -> dist.Store:
    """Return a store in which these processes meet, and nothing is left of those before a restart.

    torchrun keeps one store for all restarts, and PyTorch's processes would find in it where those that have ended
    listened, and wait for them in vain. (It is so at least up to PyTorch 2.13.) So the first process chooses a name for
    the part of it that is theirs, and gives it to each other one that says hello; the hello of one that has ended is
    answered, too, and not acknowledged.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        address, port, world.size, is_master=world.is_first and not by_torchrun, timeout=timedelta(seconds=timeout)
    )
    mine = uuid4().hex
    if not world.is_first:
        store.set(f"hello/{world.rank}", mine)
        chosen = store.get(f"answer/{mine}").decode()
        store.set(f"met/{chosen}/{world.rank}", "yes")
        return dist.PrefixStore(chosen, store)
    missing = list(range(1, world.size))
    give_up = time.monotonic() + timeout
    while missing:
        if time.monotonic() > give_up:
            raise dist.DistStoreError(f"ranks {missing} have not said hello")
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set(f"answer/{store.get(f'hello/{rank}').decode()}", mine)
        missing = [rank for rank in missing if not store.check([f"met/{mine}/{rank}"])]
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def _own_device(name: str, key: str) -> torch.device:
    """Each process of a machine has a GPU of its own, by its local rank."""
    device, local_rank = pick_device(name, key), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cpu":
        return device
    is_alone = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1
    require(device.index is None or is_alone, key, name, "several processes would share it; choose auto or cuda")
    num_devices = torch.cuda.device_count()
    require(
        device.index is not None or local_rank < num_devices,
        key,
        name,
        f"there is no GPU for local rank {local_rank}; start torchrun with --nproc-per-node {num_devices} or fewer",
    )
    return device if device.index is not None else torch.device("cuda", local_rank)


def _is_loss_of_contact(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors: most name its source file, the one for a pair that timed out before does not."""
    words = str(error)
    return isinstance(error, dist.DistError) or "gloo" in words.lower() or "caused pair closure" in words
