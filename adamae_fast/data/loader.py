"""Batches of clips, decoded ahead of time in worker processes, in an order that does not depend on them.

A damaged video can crash the decoder, and the worker with it. Each worker says in shared memory which video it is
decoding. So the parent knows the culprit, and starts the workers again at the next batch, without that video. A worker
that is stuck is killed, and its video is treated alike.

Letters: B clips, T frames, S the clip's side in pixels.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from adamae_fast.config import PretrainConfig
from adamae_fast.data.batch import Batch
from adamae_fast.data.dataset import NOTHING, ClipSample, DecodeCost, NoReadableVideoError, PretrainClips, Videos
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo, DataStoppedError, TooManyBadVideosError
from adamae_fast.data.watchdog import Decoding, Watchdog

log = logging.getLogger(__name__)

CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE)
"""What a decoder's fault ends a process with; SIGKILL, which memory that ran out ends it with, is not among them."""

ORPHAN_SECONDS = 1.0
"""How often a worker looks whether its training process still lives."""


PID, ENTRY, NUM_BEGUN, NUM_FINISHED = range(4)
"""Columns of the table with a row for each worker, shared with all of them: its process, the video that it is decoding,
the videos that it has begun, the batches that it has finished."""


def clip_batches(
    config: PretrainConfig,
    entries: Sequence[Entry],
    start_batch: int,
    num_batches: int,
    device: torch.device | str = "cpu",
    known_crashers: Mapping[str, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch, None, None]:
    """Batches ``start_batch`` to ``num_batches - 1`` of rank ``rank`` of the stream of clips, in this order.

    Batch i of rank r among W is batch g = i·W + r of the stream: positions ``g*v`` to ``(g+1)*v - 1`` of
    :class:`~adamae_fast.data.dataset.PretrainClips`, where v = train.batch_size / data.repeat videos. It may reach over
    the end of an epoch, so that nothing is dropped or doubled.
    The bytes depend on the seed and i alone, not on data.num_workers. Memory is pinned for a CUDA ``device``. The
    global random generators are left alone. Closing the iterator ends its workers.

    ``known_crashers`` are path and reason of videos that are not opened, because they crashed a decoder before
    (``Quarantine.crashers``). A video that crashes a worker joins them: the workers start again at the batch that was
    to come next, and every batch is what it would be had the video been known from the start (but for batches
    before it that used another, harmless range of that video). So does a video that takes longer than data.timeout.
    With data.num_workers=0 such a video ends the process, or keeps it for ever; nothing can catch that.

    Raises:
        ValueError: at once, for a decoder that is not installed.
        NoReadableVideoError: while iterating, when every video tried for a clip is unreadable.
        TooManyBadVideosError: while iterating, when more than data.max_bad_share of the videos crashed the decoder.
        DataStoppedError: while iterating, when a worker died for another reason. It is the base of the two above;
            ``bad`` of all three are unreadable videos that no batch has told of.
    """
    data = config.data
    clips = PretrainClips(
        entries, data, config.model.num_frames, config.model.frame_size, config.seed, known_crashers=known_crashers
    )
    videos_per_batch = config.train.batch_size // data.repeat
    return stream_batches(clips, videos_per_batch, start_batch, num_batches, device, rank, world_size)


def batch_positions(batch: int, *, videos_per_batch: int, rank: int, world_size: int) -> range:
    """Positions of the stream that batch ``batch`` of process ``rank`` shows."""
    first = (batch * world_size + rank) * videos_per_batch
    return range(first, first + videos_per_batch)


def stream_batches(
    clips: PretrainClips,
    videos_per_batch: int,
    start_batch: int,
    num_batches: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch, None, None]:
    """:func:`clip_batches` for any stream of clips, by the decoder that its configuration names."""
    device = torch.device(device)
    positions = partial(batch_positions, videos_per_batch=videos_per_batch, rank=rank, world_size=world_size)

    if clips.config.decoder != "dali":
        return load_batches(clips, positions, start_batch, num_batches, device)

    from adamae_fast.data import dali

    suitability = dali.Suitability(device)
    batches = _Batches(clips, partial(clips.read_encoded, suitability.reason_against), dali.collate)
    return dali.DaliStream(clips, suitability, device, videos_per_batch).batches(
        lambda first: _load(batches, positions, first, num_batches, device), start_batch
    )


def load_batches(
    videos: Videos,
    numbers: Callable[[int], Sequence[int]],
    start_batch: int,
    num_batches: int,
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Batches ``start_batch`` to ``num_batches - 1`` of any data set, decoded by the workers.

    Batch i holds the clips of ``videos[n]`` for each n in ``numbers(i)``, in this order. For the rest, and what it
    raises, see :func:`clip_batches`.
    """
    return _load(_Batches(videos, videos.__getitem__, _collate), numbers, start_batch, num_batches, device)


def _load(
    batches: _Batches,
    numbers: Callable[[int], Sequence[int]],
    start_batch: int,
    num_batches: int,
    device: torch.device | str,
) -> Generator[Any, None, None]:
    num_workers = batches.clips.config.num_workers
    workers_table = torch.empty(num_workers, 4, dtype=torch.int64).share_memory_()

    def load_from(first: int) -> DataLoader[Any]:
        workers_table.copy_(torch.tensor([0, NOTHING, 0, 0]))
        return DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,  # the data set makes batches itself
            sampler=(numbers(i) for i in range(first, num_batches)),
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.device(device).type == "cuda",
            worker_init_fn=partial(_init_worker, workers_table),
            generator=torch.Generator(),  # the loader draws a seed; not from the global generator
        )

    return _without_crashers(batches.clips, load_from, start_batch, workers_table)


class _Batches:
    """A data set whose items are batches, or the error that ended one.

    An error that a worker raises would arrive as a text without its ``bad``.

    Args:
        clips: what is read.
        read: makes the sample of a number.
        collate: makes a batch of samples and their numbers.
    """

    def __init__(self, clips: Videos, read: Callable[[int], Any], collate: Callable[[Any, Any], Any]) -> None:
        self.clips = clips
        self.num_finished = torch.tensor(0)
        self._read = read
        self._collate = collate

    def __getitem__(self, numbers: Sequence[int]) -> Any:
        samples: list[Any] = []
        for number in numbers:
            try:
                samples.append(self._read(number))
            except NoReadableVideoError as error:
                error.bad = (*_all_bad(samples), *error.bad)
                return error
        batch = self._collate(samples, numbers)
        self.num_finished += 1
        return batch


def _collate(samples: Sequence[ClipSample], numbers: Sequence[int]) -> Batch:
    clips = [clip for sample in samples for clip in sample.video]
    # default_collate stacks into shared memory when it runs in a worker.
    video = default_collate(clips) if clips else samples[0].video
    costs = [sample.decode for sample in samples]
    cost = DecodeCost(sum(c.seconds for c in costs), sum(c.frames for c in costs))
    shown = [sample.shown for sample in samples for _ in sample.video]
    return Batch(video, _all_bad(samples), cost, shown=shown)


def _all_bad(samples: Sequence[ClipSample]) -> list[BadVideo]:
    return [bad for sample in samples for bad in sample.bad]


def _unchanged(batch: Any) -> Any:
    return batch


class _WorkersDiedError(Exception):
    """The loader lost workers; ``exit_codes`` by process id, and what those that were ``stuck`` were decoding."""

    def __init__(self, exit_codes: Mapping[int, int], stuck: Mapping[int, int]) -> None:
        super().__init__(exit_codes, stuck)
        self.exit_codes = exit_codes
        self.stuck = stuck


def _without_crashers(
    clips: Videos,
    load_from: Callable[[int], DataLoader[Batch | NoReadableVideoError]],
    next_batch: int,
    workers_table: Tensor,
) -> Generator[Batch, None, None]:
    """Yield batches; when videos crashed workers or kept them too long, go on without these, with new workers.

    Each restart knows one more such video, so that data.max_bad_share bounds their number.
    """
    found: list[BadVideo] = []
    timeout = clips.config.timeout
    while True:
        first, num_ready = next_batch, 0
        try:
            with closing(_until_death(load_from(first), workers_table, timeout)) as batches:
                for batch in batches:
                    if isinstance(batch, NoReadableVideoError):
                        batch.bad = (*found, *batch.bad)
                        raise batch
                    next_batch += 1
                    yield batch._replace(num_ready=num_ready)
                    num_ready = max(0, int(workers_table[:, NUM_FINISHED].sum()) - (next_batch - first))
            return
        except _WorkersDiedError as death:
            crashed = _crashed_videos(death, workers_table, clips.entries, timeout)
            found += crashed
            if len(crashed) < len(death.exit_codes):
                error = DataStoppedError(
                    f"a data worker died ({_causes_of_death(death.exit_codes, workers_table, clips.entries)}). The "
                    "memory probably ran out (of the machine, or of /dev/shm): lower data.num_workers or "
                    "train.batch_size"
                )
                error.bad = found
                raise error from death
        # The old workers have ended: with the exception went the last reference to their loader.
        for video in crashed:
            log.warning("%s: %s; the data workers start again without it", video.path, video.reason)
            clips.crashers[video.path] = video.reason
        if len(clips.crashers) > clips.config.max_bad_share * len(clips.entries):
            too_many = TooManyBadVideosError(
                f"{len(clips.crashers)} of {len(clips.entries)} videos crashed the decoder or took longer than "
                f"data.timeout, more than data.max_bad_share={clips.config.max_bad_share:g} allows; the last one is "
                f"{crashed[-1].path}. Take them out of the manifest, try another data.decoder, or raise "
                "data.max_bad_share"
            )
            too_many.bad = found
            raise too_many


def _crashed_videos(
    death: _WorkersDiedError, workers_table: Tensor, entries: Sequence[Entry], timeout: float
) -> list[BadVideo]:
    """What the workers that a decoder's fault or the watchdog ended were decoding; nothing for other deaths."""
    decoding = {state.pid: state.entry for state in _decoding(workers_table)}
    videos = []
    for pid, exit_code in death.exit_codes.items():
        if pid in death.stuck:
            videos.append(BadVideo(entries[death.stuck[pid]].path, f"took longer than {timeout:g} s", crashed=True))
        elif -exit_code in CRASH_SIGNALS and pid in decoding:
            reason = f"crashed the decoder ({_signal_or_status(exit_code)})"
            videos.append(BadVideo(entries[decoding[pid]].path, reason, crashed=True))
    return videos


def _decoding(workers_table: Tensor) -> list[Decoding]:
    """What each worker that is decoding is at."""
    rows = workers_table[:, : NUM_BEGUN + 1].tolist()
    return [Decoding(*row) for row in rows if row[ENTRY] != NOTHING]


def _causes_of_death(exit_codes: Mapping[int, int], workers_table: Tensor, entries: Sequence[Entry]) -> str:
    """Which workers ended, by what, and what they were decoding."""
    decoding = {state.pid: entries[state.entry].path for state in _decoding(workers_table)}
    number = {pid: worker for worker, pid in enumerate(workers_table[:, PID].tolist())}
    return "; ".join(
        f"{_signal_or_status(exit_code)}: worker {number.get(pid, '?')}, process {pid}, "
        + (f"while it decoded {decoding[pid]}" if pid in decoding else "not while it decoded")
        for pid, exit_code in exit_codes.items()
    )


def _until_death(
    loader: DataLoader[Batch | NoReadableVideoError], workers_table: Tensor, timeout: float
) -> Generator[Batch | NoReadableVideoError, None, None]:
    """What the loader yields. Raises _WorkersDiedError when workers died."""
    iterator, workers = _start(loader)
    with Watchdog(workers, partial(_decoding, workers_table), timeout) as watchdog:
        try:
            yield from iterator
        # PyTorch's word for a lost worker, and what breaks when one dies while its batch is being handed over.
        except (RuntimeError, OSError, EOFError) as error:
            exit_codes = _exit_codes(workers)
            if not exit_codes:
                raise
            # What the others have is done again; and one of them may be stuck, too, where only SIGKILL ends it.
            for worker in workers:
                worker.kill()
            raise _WorkersDiedError(exit_codes, watchdog.killed) from error


def _start(
    loader: DataLoader[Batch | NoReadableVideoError],
) -> tuple[Iterator[Batch | NoReadableVideoError], list[BaseProcess]]:
    """Fork the workers.

    The signals that they ignore once :func:`_guard_worker` has run are held back until then. PyTorch's handler of
    SIGCHLD is taken away: it would raise in whatever line of the training step a worker dies. Without it, the next
    batch reports the death, after 5 seconds at most.
    """
    others = set(multiprocessing.active_children())
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    handler = signal.getsignal(signal.SIGCHLD)
    # No worker may collect what its parent left: the end of a DALI pipeline waits for threads, which no fork has.
    gc.freeze()
    try:
        iterator = iter(loader)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return iterator, [child for child in multiprocessing.active_children() if child not in others]


def _exit_codes(workers: Sequence[BaseProcess]) -> dict[int, int]:
    """Exit codes of the workers that have died, or do so within a second."""
    ended = wait([worker.sentinel for worker in workers], timeout=1.0)
    codes: dict[int, int] = {}
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()  # the sentinel may be a moment ahead
            if worker.pid is not None and worker.exitcode is not None:
                codes[worker.pid] = worker.exitcode
    return codes


def _signal_or_status(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"


def _init_worker(workers_table: Tensor, worker_id: int) -> None:
    _guard_worker()
    workers_table[worker_id, PID] = os.getpid()
    batches = cast(Any, get_worker_info()).dataset
    batches.clips.decoding = workers_table[worker_id, ENTRY : NUM_BEGUN + 1]
    batches.num_finished = workers_table[worker_id, NUM_FINISHED]


def _guard_worker() -> None:
    """Let a worker outlive signals meant for the training process, and die with it.

    Ctrl-C, a batch system or a container send SIGINT, SIGTERM or SIGUSR1 to every process. The training process then
    saves, which may need batches still under way; it ends its workers itself, also by SIGTERM. So SIGTERM counts from
    the parent only. A parent that is killed cannot end anything: the worker checks that it is there.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
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
