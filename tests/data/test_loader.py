from __future__ import annotations

import ctypes
import faulthandler
import gc
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils.data import dataloader

from adamae_fast.config import DataConfig, DecoderName, ModelConfig, PretrainConfig, TrainConfig
from adamae_fast.data import dataset as dataset_module
from adamae_fast.data import watchdog as watchdog_module
from adamae_fast.data.batch import Batch
from adamae_fast.data.dataset import NoReadableVideoError, PretrainClips, decoded_videos
from adamae_fast.data.decode import VideoError, VideoFile, decord_is_installed, open_entry
from adamae_fast.data.loader import CRASH_SIGNALS, clip_batches
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo, DataStoppedError, TooManyBadVideosError
from adamae_fast.data.watchdog import CHECKS_PER_TIMEOUT, Decoding, Watchdog
from adamae_fast.errors import RunStoppedError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> list[Entry]:
    """Seven videos, the third of them broken."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [write_video(folder / f"{i}.mp4", 16 + i) for i in range(7)]
    paths[2].write_text("no video")
    return [Entry(str(path), i) for i, path in enumerate(paths)]


@pytest.fixture
def quick_to_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch looks for dead workers only when nothing came for 5 seconds."""
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, signal.Signals]], None]:
    """Lets the decoder kill its process when it opens certain paths."""

    def install(signals: dict[str, signal.Signals]) -> None:
        def open_or_die(entry: Entry, decoder: DecoderName) -> VideoFile:
            if entry.path in signals:
                assert multiprocessing.parent_process() is not None
                faulthandler.disable()  # pytest's; it would print a traceback
                os.kill(os.getpid(), signals[entry.path])
            return open_entry(entry, decoder)

        monkeypatch.setattr(dataset_module, "open_entry", open_or_die)

    return install


def _config(batch_size: int = 4, num_workers: int = 0, repeat: int = 2, **data: object) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(num_frames=4, frame_size=16, patch_size=8),
        data=DataConfig(stride=2, repeat=repeat, num_workers=num_workers, flip=True, **data),  # type: ignore[arg-type]
        train=TrainConfig(batch_size=batch_size),
        seed=5,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_in_each_process_changes_no_clip(entries: list[Entry], num_workers: int) -> None:
    """Over three epochs and more."""
    num_batches = 2 * len(entries)
    expected = [batch.video for batch in clip_batches(_config(), entries, 0, num_batches)]
    decoded_videos.cache_clear()
    found = [
        batch.video for batch in clip_batches(_config(num_workers=num_workers, cache_gib=0.5), entries, 0, num_batches)
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(decoded_videos("auto", 2**29).videos) == (0 if num_workers else len(entries) - 1)  # one is no video
    decoded_videos.cache_clear()


@contextmanager
def _running(entries: list[Entry], num_workers: int) -> Iterator[tuple[Iterator[Batch], list[BaseProcess]]]:
    """A stream that has given its first batch, and its workers."""
    others = set(multiprocessing.active_children())
    with closing(clip_batches(_config(num_workers=num_workers), entries, 0, 10**6)) as batches:
        next(batches)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        assert len(workers) == num_workers
        yield batches, list(workers)
    for worker in workers:
        worker.join(10)


def _assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.video, b.video)
        assert a.bad == b.bad


def test_batches_are_positions_in_a_row(entries: list[Entry]) -> None:
    config = _config(batch_size=6)  # 3 videos a batch, 7 in an epoch: batches reach over its end
    clips = PretrainClips(entries, config.data, 4, 16, config.seed)
    batches = list(clip_batches(config, entries, 0, 5))
    assert len(batches) == 5
    for i, batch in enumerate(batches):
        samples = [clips[p] for p in range(3 * i, 3 * i + 3)]
        assert (batch.video.shape, batch.video.dtype) == ((6, 3, 4, 16, 16), torch.uint8)
        assert torch.equal(batch.video, torch.cat([sample.video for sample in samples]))
        assert batch.bad == [bad for sample in samples for bad in sample.bad]
    assert sum(len(batch.bad) for batch in batches) >= 2  # 15 positions are two epochs and one


def test_workers_do_not_change_a_byte(entries: list[Entry]) -> None:
    alone = list(clip_batches(_config(), entries, 0, 6))
    assert any(batch.bad for batch in alone)
    for num_workers in (1, 2):
        _assert_same(alone, list(clip_batches(_config(num_workers=num_workers), entries, 0, 6)))


def test_a_resumed_stream_goes_on_where_it_was(entries: list[Entry]) -> None:
    whole = list(clip_batches(_config(), entries, 0, 6))
    _assert_same(whole[4:], list(clip_batches(_config(num_workers=2), entries, 4, 6)))
    assert list(clip_batches(_config(num_workers=1), entries, 6, 6)) == []


def test_only_workers_open_videos(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decoder holds (threads, locks) does not survive a fork; what this process read before does no harm."""
    for decoder in ("decord", "pyav") if decord_is_installed() else ("pyav",):
        with closing(open_entry(entries[0], decoder)) as video:  # type: ignore[arg-type]
            video.read([3, 5])
            alone = list(clip_batches(_config(decoder=decoder), entries, 0, 3))

            def open_in_a_worker(entry: Entry, decoder: DecoderName) -> VideoFile:
                assert multiprocessing.parent_process() is not None
                return open_entry(entry, decoder)

            with monkeypatch.context() as patch:
                patch.setattr(dataset_module, "open_entry", open_in_a_worker)
                _assert_same(alone, list(clip_batches(_config(decoder=decoder, num_workers=2), entries, 0, 3)))


def test_workers_do_not_collect_what_their_parent_left(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch, quick_to_notice: None
) -> None:
    """A pipeline of DALI that is garbage would wait in a worker, for ever, for threads that only its parent has."""
    parent = os.getpid()

    class Left:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if os.getpid() != parent:
                os._exit(3)

    def collect_and_open(entry: Entry, decoder: DecoderName) -> VideoFile:
        gc.collect()
        return open_entry(entry, decoder)

    monkeypatch.setattr(dataset_module, "open_entry", collect_and_open)
    gc.disable()
    try:
        Left()
        assert len(list(clip_batches(_config(num_workers=1), entries[:1], 0, 1))) == 1
    finally:
        gc.enable()


def test_global_generators_are_left_alone(entries: list[Entry]) -> None:
    before = torch.random.get_rng_state()
    list(clip_batches(_config(num_workers=1), entries, 0, 2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_closing_ends_the_workers(entries: list[Entry]) -> None:
    with _running(entries, num_workers=2) as (_, workers):
        assert all(worker.is_alive() for worker in workers)
    assert not any(worker.is_alive() for worker in workers)


def test_handlers_of_signals_stay_as_they_were(entries: list[Entry]) -> None:
    names = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(name) for name in names], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with _running(entries, num_workers=1):
        assert ([signal.getsignal(name) for name in names], signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_bad_videos(tmp_path: Path, num_workers: int) -> None:
    bad = [Entry(str(tmp_path / f"{i}.mp4"), None) for i in range(3)]
    with pytest.raises(NoReadableVideoError) as caught:
        next(clip_batches(_config(num_workers=num_workers), bad, 0, 2))
    assert sorted(caught.value.bad) == [BadVideo(entry.path, "no such file or directory") for entry in bad]
    first, *reasons = str(caught.value).splitlines()
    assert first == "all 3 videos tried for one clip are unreadable:"
    assert sorted(reasons) == [f"  {entry.path}: no such file or directory" for entry in bad]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_videos_of_a_batch_that_never_comes(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """The first clip's video is replaced by the only readable one, which cannot be read for the second clip."""
    opened = []

    def open_once(entry: Entry, decoder: DecoderName) -> VideoFile:
        if entry is good and opened:
            raise VideoError(entry.path, "gone")
        video = open_entry(entry, decoder)
        opened.append(entry)
        return video

    monkeypatch.setattr(dataset_module, "open_entry", open_once)
    good, missing, config = entries[0], Entry("missing.mp4", None), _config(num_workers=num_workers)
    pair = next(p for p in ([good, missing], [missing, good]) if _opened(config, p, 0) == missing.path)
    with pytest.raises(NoReadableVideoError, match="all 2 videos") as caught:
        list(clip_batches(config, pair, 0, 1))
    assert [bad.path for bad in caught.value.bad] == ["missing.mp4", good.path, "missing.mp4"]


def test_videos_that_crash_a_worker_are_bad_videos(
    entries: list[Entry],
    crash: Callable[[dict[str, signal.Signals]], None],
    quick_to_notice: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    signals = dict(zip((entry.path for entry in entries[3:]), CRASH_SIGNALS, strict=True))
    crash(signals)
    others = set(multiprocessing.active_children())
    with closing(clip_batches(_config(num_workers=2, max_bad_share=1.0), entries, 1, 8)) as batches:
        recovered = list(itertools.islice(batches, 6))
        assert len(set(multiprocessing.active_children()) - others) == 2  # none is left of those before
        recovered += batches
    found = {bad for batch in recovered for bad in batch.bad if bad.crashed}
    assert found == {
        BadVideo(path, f"crashed the decoder ({number.name})", crashed=True) for path, number in signals.items()
    }
    assert {path for path in signals if path in caplog.text} == set(signals)
    # Without workers, an attempt to open one of them would be the end of this test.
    known = {bad.path: bad.reason for bad in found}
    _assert_same(recovered, list(clip_batches(_config(), entries, 1, 8, known_crashers=known)))
    assert known == {bad.path: bad.reason for bad in found}


def test_videos_that_keep_a_worker_are_bad_videos(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch, quick_to_notice: None, caplog: pytest.LogCaptureFixture
) -> None:
    """One of them keeps Python's lock as well, so that nothing but SIGKILL ends its worker."""
    lock_kept = {entries[3].path: True, entries[4].path: False}

    def open_or_hang(entry: Entry, decoder: DecoderName) -> VideoFile:
        if entry.path in lock_kept:
            assert multiprocessing.parent_process() is not None
            ctypes.PyDLL(None).sleep(3600) if lock_kept[entry.path] else time.sleep(3600)
        return open_entry(entry, decoder)

    monkeypatch.setattr(dataset_module, "open_entry", open_or_hang)
    others = set(multiprocessing.active_children())
    config = _config(num_workers=2, max_bad_share=1.0, timeout=2.5, decoder="pyav")  # importing decord takes long
    with closing(clip_batches(config, entries, 1, 8)) as batches:
        recovered = list(batches)
    assert set(multiprocessing.active_children()) <= others
    found = {bad for batch in recovered for bad in batch.bad if bad.crashed}
    assert found == {BadVideo(path, "took longer than 2.5 s", crashed=True) for path in lock_kept}
    assert {path for path in lock_kept if path in caplog.text} == set(lock_kept)
    known = {bad.path: bad.reason for bad in found}
    _assert_same(recovered, list(clip_batches(_config(), entries, 1, 8, known_crashers=known)))


def test_a_slow_video_is_no_stuck_one(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven videos take longer than the timeout together, none of them alone."""

    def open_slowly(entry: Entry, decoder: DecoderName) -> VideoFile:
        time.sleep(0.4)
        return open_entry(entry, decoder)

    monkeypatch.setattr(dataset_module, "open_entry", open_slowly)
    batches = list(clip_batches(_config(num_workers=1, timeout=3.0, decoder="pyav"), entries[3:4], 0, 4))
    assert len(batches) == 4
    assert not any(batch.bad for batch in batches)


def test_the_watchdog_does_not_count_time_in_which_it_stood_still_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, killed = itertools.count(1), threading.Event()
    clock = itertools.count(step=1000)  # as after Ctrl-Z and fg, before every look
    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    worker = cast(Any, SimpleNamespace(pid=7, kill=killed.set))

    def decoding() -> list[Decoding]:
        next(looks)
        return [Decoding(7, 3, 1), Decoding(8, 4, 1)]  # the second one is not this loader's

    with Watchdog([worker], decoding, 0.05) as watchdog:
        assert killed.wait(30)
    assert watchdog.killed == {7: 3}
    assert next(looks) > 1 + CHECKS_PER_TIMEOUT // 2


def test_batches_tell_what_they_cost_and_how_many_are_ready(entries: list[Entry]) -> None:
    alone = next(iter(clip_batches(_config(), entries[3:4], 0, 1)))
    assert alone.num_ready == 0
    assert alone.decode is not None
    # 19 frames, a key frame every 8: each clip of 4 × 2 begins at most 7 behind one, and there are two of them.
    assert 2 * 4 <= alone.decode.frames <= 2 * (7 + 7)
    assert alone.decode.seconds > 0
    with _running(entries[3:4], num_workers=2) as (batches, _):
        deadline = time.monotonic() + 20
        ready = 0
        while ready < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            next(batches)
            ready = next(batches).num_ready
        assert 2 <= ready <= 4  # PyTorch lets each worker be two batches ahead
    assert alone.decode.frames == next(iter(clip_batches(_config(num_workers=1), entries[3:4], 0, 1))).decode.frames


def test_too_many_crashes(
    entries: list[Entry], crash: Callable[[dict[str, signal.Signals]], None], quick_to_notice: None
) -> None:
    crash(dict.fromkeys((entry.path for entry in entries), signal.SIGSEGV))
    known = {entries[0].path: "known", entries[1].path: "known"}
    batches = clip_batches(_config(num_workers=1, max_bad_share=0.43), entries, 0, 8, known_crashers=known)
    with pytest.raises(TooManyBadVideosError, match=r"4 of 7 videos.*data\.max_bad_share=0\.43") as caught:
        next(batches)
    assert len(caught.value.bad) == 2
    assert {bad.path for bad in caught.value.bad} <= {entry.path for entry in entries[2:]}


def test_a_crash_outside_the_decoder_ends_the_run(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch, quick_to_notice: None
) -> None:
    monkeypatch.setattr(dataset_module, "apply_view", lambda *_: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(DataStoppedError, match=r"died \(SIGSEGV: worker 0, process \d+, not while it") as caught:
        next(clip_batches(_config(num_workers=1), entries, 0, 8))
    assert not caught.value.bad


def test_killed_while_decoding_is_no_crash(
    entries: list[Entry], crash: Callable[[dict[str, signal.Signals]], None], quick_to_notice: None
) -> None:
    """Memory that ran out is no fault of the video; a crash before it is not forgotten."""
    config = _config(batch_size=2, num_workers=1, max_bad_share=1.0)
    order = [_opened(config, entries, position) for position in range(2)]
    crash({order[0]: signal.SIGSEGV, order[1]: signal.SIGKILL})
    named = rf"died \(SIGKILL: worker 0, process \d+, while it decoded {re.escape(order[1])}\).*memory"
    with pytest.raises(DataStoppedError, match=named) as caught:
        list(clip_batches(config, entries, 0, 8))
    assert [bad.path for bad in caught.value.bad] == [order[0]]


def _opened(config: PretrainConfig, entries: list[Entry], position: int) -> str:
    """The video that is to be opened first at a position."""
    order = PretrainClips(entries, config.data, 4, 16, config.seed)._epoch_order(0)
    return entries[order[position]].path


def test_a_missing_decoder_is_reported_at_once(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamae_fast.data.decode.decord_is_installed", lambda: False)
    with pytest.raises(ValueError, match="decord is not installed"):
        clip_batches(_config(decoder="decord"), entries, 0, 2)


def test_a_killed_worker_ends_the_run_and_says_so(entries: list[Entry]) -> None:
    with _running(entries, num_workers=1) as (batches, (worker,)):
        assert worker.pid is not None
        threading.Timer(0.1, os.kill, (worker.pid, signal.SIGKILL)).start()
        with pytest.raises(
            RunStoppedError, match=rf"SIGKILL: worker 0, process {worker.pid}.*memory.*data\.num_workers"
        ):
            deque(batches, maxlen=0)


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_workers_outlive_signals_of_others(entries: list[Entry], name: str) -> None:
    with _running(entries, num_workers=2) as (batches, workers):
        subprocess.run(["/bin/kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
        _assert_same([next(batches) for _ in range(10)], list(clip_batches(_config(), entries, 1, 11)))
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_workers_obey_their_parent(entries: list[Entry]) -> None:
    with _running(entries, num_workers=1) as (_, (worker,)):
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def killed_parent(entries: list[Entry]) -> Iterator[list[int]]:
    """Process ids of two workers whose training process was killed with SIGKILL."""
    code = f"""
import multiprocessing, time
from adamae_fast.config import *
from adamae_fast.data.loader import clip_batches
from adamae_fast.data.manifest import Entry
config = PretrainConfig(model=ModelConfig(num_frames=4, frame_size=16), data=DataConfig(num_workers=2),
                        train=TrainConfig(batch_size=2))
batches = clip_batches(config, [Entry({entries[0].path!r}, 0)], 0, 10**6)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    yield workers
    for pid in filter(_is_running, workers):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_die_with_their_parent(killed_parent: list[int]) -> None:
    assert len(killed_parent) == 2
    deadline = time.monotonic() + 15
    while any(map(_is_running, killed_parent)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_is_running, killed_parent))
