"""Batches of clips, decoded ahead of time in worker processes, in an order that does not depend on them.

Letters: B clips, T frames, S the clip's side in pixels.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from adamae_fast.config import PretrainConfig
from adamae_fast.data.dataset import ClipSample, NoReadableVideoError, PretrainClips
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo
from adamae_fast.errors import RunStoppedError

ORPHAN_SECONDS = 1.0
"""How often a worker looks whether its training process still lives."""


class Batch(NamedTuple):
    """What one forward pass sees."""

    video: Tensor
    """uint8 (B, 3, T, S, S); the crops of one video stand together."""

    bad: list[BadVideo]
    """Videos that were to be in this batch and were replaced by others."""


def clip_batches(
    config: PretrainConfig,
    entries: Sequence[Entry],
    start_batch: int,
    num_batches: int,
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Batches ``start_batch`` to ``num_batches - 1`` of the stream of clips, in this order.

    Batch i holds positions ``i*v`` to ``(i+1)*v - 1`` of :class:`~adamae_fast.data.dataset.PretrainClips`, where v =
    train.batch_size / data.repeat videos; it may reach over the end of an epoch, so that nothing is dropped or doubled.
    The bytes depend on the seed and i alone, not on data.num_workers. Memory is pinned for a CUDA ``device``. The
    global random generators are left alone. Closing the iterator ends its workers.

    Raises:
        ValueError: at once, for a decoder that is not installed.
        RunStoppedError: while iterating, when every video tried for a clip is unreadable, or a worker died.
    """
    data = config.data
    dataset = PretrainClips(entries, data, config.model.num_frames, config.model.frame_size, config.seed)
    videos_per_batch = config.train.batch_size // data.repeat
    positions = (range(i * videos_per_batch, (i + 1) * videos_per_batch) for i in range(start_batch, num_batches))
    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=positions,  # type: ignore[arg-type]
        num_workers=data.num_workers,
        collate_fn=_collate,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=_guard_worker,
        generator=torch.Generator(),  # the loader draws a seed; not from the global generator
    )
    return _with_clear_errors(loader)


def _with_clear_errors(loader: DataLoader[Batch]) -> Generator[Batch, None, None]:
    iterator, workers = _start(loader)
    try:
        yield from iterator
    except NoReadableVideoError as error:
        # From a worker the text comes wrapped in its traceback.
        raise NoReadableVideoError(str(error).rpartition(f"{NoReadableVideoError.__name__}: ")[2].strip()) from None
    # PyTorch's word for a lost worker, and what breaks when one dies while its batch is being handed over.
    except (RuntimeError, OSError, EOFError) as error:
        deaths = [death for worker in workers if (death := _cause_of_death(worker))]
        if not deaths:
            raise
        raise RunStoppedError(
            f"a data worker died ({', '.join(deaths)}). The memory probably ran out (of the machine, or of /dev/shm): "
            "lower data.num_workers or train.batch_size; a decoder's crash is possible too: try data.decoder=pyav"
        ) from error


def _start(loader: DataLoader[Batch]) -> tuple[Iterator[Batch], list[BaseProcess]]:
    """Fork the workers.

    The signals that they ignore once :func:`_guard_worker` has run are held back until then. PyTorch's handler of
    SIGCHLD is taken away: it would raise in whatever line of the training step a worker dies. Without it, the next
    batch reports the death, after 5 seconds at most.
    """
    others = set(multiprocessing.active_children())
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        iterator = iter(loader)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return iterator, [child for child in multiprocessing.active_children() if child not in others]


def _cause_of_death(worker: BaseProcess) -> str | None:
    worker.join(timeout=1.0)
    if worker.exitcode is None:
        return None
    return signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f"exit status {worker.exitcode}"


def _collate(samples: list[ClipSample]) -> Batch:
    # default_collate stacks into shared memory when it runs in a worker.
    video = default_collate([sample.video for sample in samples]).flatten(0, 1)
    return Batch(video, [bad for sample in samples for bad in sample.bad])


def _guard_worker(worker_id: int) -> None:
    """Let a worker outlive signals meant for the training process, and die with it.

    Ctrl-C, a batch system or a container send SIGINT or SIGTERM to every process. The training process then saves,
    which may need batches still under way; it ends its workers itself, also by SIGTERM. So SIGTERM counts from the
    parent only. A parent that is killed cannot end anything: the worker checks that it is there.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    forked_by = os.getppid()  # the parent, or its fork server
    while os.getppid() == forked_by:
        received = signal.sigtimedwait({signal.SIGTERM}, ORPHAN_SECONDS)
        if received is not None and parent is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
