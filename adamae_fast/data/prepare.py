"""``adamae-fast data prepare``: encode a manifest's videos once so that every later read is cheap.

A pre-training clip starts anywhere in its video, and a decoder starts at the key frame before it. Videos from the web
have one every 250 frames, and more pixels than a model sees. Here each is decoded once, brought to a smaller size, and
encoded with a key frame every ``keyint`` frames, in closed groups, and without the tools that make decoding slow.

Workers encode single videos into ``.unfinished``, in any order; the parent appends them to shards in the manifest's
order. What a killed run left there is used by the next one, and equal input gives equal bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from adamae_fast.data.decode import VideoError
from adamae_fast.data.encode import ENCODERS, Codec, Settings, encode
from adamae_fast.data.loader import CRASH_SIGNALS
from adamae_fast.data.manifest import Entry, digest_entries, read_manifest
from adamae_fast.data.shards import (
    FORMAT,
    INDEX_NAME,
    VERSION,
    PreparedIndex,
    ShardWriter,
    append_line,
    read_index,
    write_file,
)
from adamae_fast.device import num_usable_cores
from adamae_fast.errors import RunStoppedError

UNFINISHED = ".unfinished"
"""Folder in OUT for what no shard holds yet."""

LOOK_SECONDS = 0.5
"""How often the workers are looked at where none of them reports."""


def prepare(
    manifest: str,
    out: str,
    root: str | None = None,
    short_side: int = 320,
    codec: Codec = "h264",
    keyint: int = 16,
    shards: str = "512MB",
    max_seconds: float = 0.0,
    num_workers: int | None = None,
    timeout: float = 3600.0,
) -> int:
    """Encode a manifest's videos once into tar shards that are cheap to read: data.manifest=OUT trains from them.

    Each video becomes an mp4 file with as many frames as it had, upright, without sound, at a constant rate. A run that
    was stopped, at any moment, goes on when the same command is given again; the folder is that of a run that never
    stopped. What cannot be read is skipped, and listed in quarantine.jsonl.

    Args:
        manifest: an annotation file, a folder of videos, or a folder that was prepared before.
        out: folder to make.
        root: folder that relative paths start from; the manifest's own folder if null.
        short_side: the short side of a frame becomes at most this many pixels; even.
        codec: h264 decodes fastest, on a CPU or a GPU; vp9 is what DALI decodes on a CPU.
        keyint: distance between two key frames.
        shards: size of a tar file, such as 512MB or 2GB.
        max_seconds: only so much of each video from its start on is kept; 0 for all of it.
        num_workers: encoding processes; one for each core if null.
        timeout: seconds that one video may take. One that takes longer counts as unreadable: its decoder is stuck.

    Returns:
        The exit status: 0; 1 if anything is unreadable; 130 after Ctrl-C.

    Raises:
        ManifestError: the manifest itself cannot be read.
        ValueError: an argument out of its range, or an ``out`` that holds something else.
        RunStoppedError: the disk is full, or a process was killed.
    """
    if num_workers is None:
        num_workers = num_usable_cores()
    for name, value, is_valid, remedy in (
        ("short_side", short_side, short_side >= 16 and short_side % 2 == 0, "an even number of at least 16"),
        ("keyint", keyint, 1 <= keyint <= 1000, "1 to 1000 frames"),
        ("max_seconds", max_seconds, 0 <= max_seconds < math.inf, "0 or more seconds"),
        ("num_workers", num_workers, num_workers >= 1, "at least 1"),
        ("timeout", timeout, timeout > 0, "a positive number of seconds"),
    ):
        if not is_valid:
            raise ValueError(f"{name}={value}: choose {remedy}")
    if codec not in ENCODERS:
        raise ValueError(f"codec={codec!r}: choose {' or '.join(ENCODERS)}")
    settings = Settings(short_side=short_side, codec=codec, keyint=keyint, max_seconds=max_seconds)
    shard_bytes = _bytes(shards)
    entries = read_manifest(manifest, root, ("MANIFEST", "--root"))
    folder = Path(os.path.abspath(os.path.expanduser(out)))
    with _locked(folder) as lock:
        index = _begin(folder, {**asdict(settings), "shards": shard_bytes}, manifest, entries)
        if not index.is_finished:
            try:
                with closing(_Assembler(folder, shard_bytes, entries, index)) as assembler:
                    _encode_all(assembler, settings, num_workers, timeout, lock)
            except KeyboardInterrupt:
                done = read_index(index.path)
                print(f"stopped; {_whole(done)} in {folder}; the same command goes on", file=sys.stderr)
                return 130
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                done = read_index(index.path)
                raise RunStoppedError(
                    f"{folder}: {(error.strerror or '').lower()}; {_whole(done)}. Make room; the same command goes on"
                ) from error
            index = read_index(index.path)
        _tidy(folder, index)
    return _summarize(folder, index)


def _bytes(size: str) -> int:
    units = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([a-zA-Z]*)", size.strip())
    number = float(match[1]) * units.get(match[2], 0) if match else 0
    if not 1 <= number <= 10**12:
        raise ValueError(f"shards={size!r}: choose a size up to 1000 GB, such as 512MB or 2GB")
    return int(number)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Make the folder and keep other runs away from it, as long as this process has the yielded descriptor."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r}: not a folder; choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"out={str(folder)!r}: another process prepares videos in it; wait for it, or stop it"
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


def _begin(folder: Path, settings: dict[str, Any], manifest: str, entries: Sequence[Entry]) -> PreparedIndex:
    """Start an index in an empty folder, or take up the one of the same preparation."""
    index = folder / INDEX_NAME
    header = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "manifest": os.path.abspath(os.path.expanduser(manifest)),
        "entries": len(entries),
        "entries_sha256": digest_entries(entries),
    }
    if not index.exists():
        found = [name for name in sorted(os.listdir(folder)) if name != UNFINISHED]
        if found:
            raise ValueError(f"out={str(folder)!r}: already holds something ({found[0]}); choose a new folder")
        scratch = folder / UNFINISHED
        if scratch.exists():  # "rm OUT/*" leaves it behind: of which settings, nothing says any more
            shutil.rmtree(scratch)
        scratch.mkdir()
        write_file(index, json.dumps(header) + "\n", scratch)
    prepared = read_index(index)
    theirs = prepared.header
    old = theirs.get("settings")
    if old != settings:
        old = old if isinstance(old, dict) else {}
        differing = [f"{key}={old.get(key)}, not {new}" for key, new in settings.items() if old.get(key) != new]
        raise ValueError(
            f"out={str(folder)!r}: prepared with other settings ({'; '.join(differing)}); choose a new folder, or the "
            "same settings"
        )
    if (theirs["entries"], theirs.get("entries_sha256")) != (header["entries"], header["entries_sha256"]):
        raise ValueError(
            f"out={str(folder)!r}: prepared from another manifest ({theirs.get('manifest')}, {theirs['entries']} "
            f"videos; now {len(entries)}); choose a new folder"
        )
    return prepared


def _whole(index: PreparedIndex) -> str:
    videos = sum(len(shard.videos) for shard in index.shards)
    return f"{_count(len(index.shards), 'shard')} with {_count(videos, 'video')} stand"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _summarize(folder: Path, index: PreparedIndex) -> int:
    videos = [video for shard in index.shards for video, _ in shard.videos]
    unreadable = sum(len(shard.record["unreadable"]) for shard in index.shards)
    size = sum(video.length for video in videos) / 1e6
    num_shards = len({video.shard for video in videos})
    print(f"{_count(len(videos), 'video')}, {size:.1f} MB, in {_count(num_shards, 'shard')} in {folder}")
    if unreadable:
        print(f"{unreadable} unreadable; {folder / 'quarantine.jsonl'} says why")
    return int(unreadable > 0)


def _tidy(folder: Path, index: PreparedIndex) -> None:
    """What is left to do when every video is in a shard."""
    scratch = folder / UNFINISHED
    if scratch.exists():
        unreadable = [json.dumps(line) + "\n" for shard in index.shards for line in shard.record["unreadable"]]
        if unreadable:
            write_file(folder / "quarantine.jsonl", "".join(unreadable), scratch)
        shutil.rmtree(scratch)


def _encode_all(assembler: _Assembler, settings: Settings, num_workers: int, timeout: float, lock: int) -> None:
    entries = assembler.entries
    progress = Progress(
        TextColumn("preparing"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        auto_refresh=False,  # no thread: this process forks
    )
    positions = range(assembler.position, len(entries))
    pool = _Pool(assembler.scratch, settings, entries, timeout, lock)
    with progress, closing(pool.run(positions, num_workers, progress.refresh)) as outcomes:
        task = progress.add_task("", total=len(entries), completed=positions.start)
        waiting: dict[int, Outcome] = {}
        for position, outcome in outcomes:
            waiting[position] = outcome
            progress.advance(task)
            while assembler.position in waiting:
                assembler.add(waiting.pop(assembler.position))
        assembler.finish()


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} videos/s" if task.speed else "")


@dataclass(frozen=True)
class Outcome:
    """What became of one video: its facts, or why it is unreadable. The encoded file lies in ``.unfinished``."""

    facts: dict[str, Any] | None
    problem: str = ""


class _Assembler:
    """Puts encoded videos into shards, in the manifest's order."""

    def __init__(self, folder: Path, shard_bytes: int, entries: Sequence[Entry], index: PreparedIndex) -> None:
        self.position = index.end
        """Place in the manifest of the next video."""
        self.entries = entries
        self.scratch = folder / UNFINISHED
        self.scratch.mkdir(exist_ok=True)
        self._folder = folder
        self._limit = shard_bytes
        self._index = index.path
        self._num_shards = sum(bool(shard.videos) for shard in index.shards)
        self._writer: ShardWriter | None = None
        self._first = self.position
        self._videos: list[dict[str, Any]] = []
        self._unreadable: list[dict[str, str]] = []
        # A killed run may have left a last line without its end.
        os.truncate(self._index, self._index.read_bytes().rfind(b"\n") + 1)

    def add(self, outcome: Outcome) -> None:
        """The video at ``position``."""
        entry, key = self.entries[self.position], f"{self.position:08d}"
        source = os.path.abspath(entry.path)
        if outcome.facts is None:
            self._unreadable.append({"path": source, "reason": outcome.problem})
        else:
            record = {"name": f"{key}.mp4", "label": entry.label, "source": source, **outcome.facts}
            parts = {"mp4": (self.scratch / f"{key}.video").read_bytes(), "json": json.dumps(record).encode()}
            if entry.label is not None:
                parts["cls"] = str(entry.label).encode()
            if self._writer is not None and self._writer.size + len(parts["mp4"]) > self._limit:
                self.finish()
            if self._writer is None:
                self._writer = ShardWriter(self.scratch / f"shard-{self._num_shards:05d}.tar")
            self._videos.append({**record, "offset": self._writer.add(key, parts)})
        self.position += 1

    def finish(self) -> None:
        """Close the shard, move it to its place, and only then write down what it holds."""
        if self._first == self.position:
            return
        name = None
        if self._writer is not None:
            self._writer.close()
            name = self._writer.path.name
            for path in (self._writer.path.with_suffix(".idx"), self._writer.path):
                path.replace(self._folder / path.name)
            self._num_shards += 1
            self._writer = None
        record = {"shard": name, "end": self.position, "videos": self._videos, "unreadable": self._unreadable}
        append_line(self._index, json.dumps(record))
        for position in range(self._first, self.position):
            for extension in ("video", "json"):
                (self.scratch / f"{position:08d}.{extension}").unlink(missing_ok=True)
        self._first, self._videos, self._unreadable = self.position, [], []

    def close(self) -> None:
        """Give up a shard that is not finished; its videos stay in ``.unfinished``."""
        if self._writer is not None:
            self._writer.abandon()


class _Worker:
    """A process that encodes one video after another; the parent's end of it."""

    def __init__(self, pool: _Pool) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.position = -1
        """What it is encoding."""
        self.seconds = 0.0
        """So long it has been at it."""
        # Copies of the parent's ends would keep workers from noticing that the parent has died.
        inherited = [self.connection.fileno(), *(other.connection.fileno() for other in pool.workers), pool.lock]
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process = context.Process(target=_work, args=(theirs, inherited, pool), daemon=True)
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()

    def send(self, position: int) -> None:
        self.position, self.seconds = position, 0.0
        with suppress(ConnectionError):  # it has died: that shows when its outcome is waited for
            self.connection.send(position)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


@dataclass
class _Pool:
    """Processes that encode; one that a video crashes, or keeps for longer than ``timeout`` seconds, is replaced."""

    scratch: Path
    settings: Settings
    entries: Sequence[Entry]
    timeout: float
    lock: int
    workers: list[_Worker] = field(default_factory=list)

    def run(
        self, positions: Sequence[int], num_workers: int, refresh: Callable[[], None]
    ) -> Generator[tuple[int, Outcome], None, None]:
        """Places and outcomes, in any order. ``refresh`` is called at every look."""
        following = iter(positions)
        try:
            for position in islice(following, num_workers):
                self._start(position)
            before = time.monotonic()
            while self.workers:
                ready = wait([worker.connection for worker in self.workers], timeout=LOOK_SECONDS)
                # Where everything stood still (Ctrl-Z, a shard that is written), no video is to blame.
                now = time.monotonic()
                passed, before = min(now - before, 2 * LOOK_SECONDS), now
                for worker in self.workers:
                    worker.seconds += passed
                    if worker.seconds > self.timeout and worker.connection not in ready:
                        worker.process.kill()  # which shows as the end of its connection
                for worker in [worker for worker in self.workers if worker.connection in ready]:
                    try:
                        outcome = worker.connection.recv()
                    except (EOFError, ConnectionError):
                        outcome = _died(worker, self.entries[worker.position], self.timeout)
                    if isinstance(outcome, OSError):
                        raise outcome
                    yield worker.position, outcome
                    upcoming = next(following, None)
                    if upcoming is not None and worker.process.is_alive():
                        worker.send(upcoming)
                        continue
                    self.workers.remove(worker)
                    worker.end()
                    if upcoming is not None:
                        self._start(upcoming)
                refresh()
        finally:
            for worker in self.workers:
                worker.end()

    def _start(self, position: int) -> None:
        worker = _Worker(self)
        self.workers.append(worker)
        worker.send(position)


def _died(worker: _Worker, entry: Entry, timeout: float) -> Outcome:
    """A decoder's fault is the video's; any other death of a worker ends the run."""
    worker.process.join()
    code = worker.process.exitcode or 0
    if worker.seconds > timeout and code == -signal.SIGKILL:
        return Outcome(None, f"took longer than {timeout:g} s")
    cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    if -code in CRASH_SIGNALS:
        return Outcome(None, f"crashed the decoder ({cause})")
    raise RunStoppedError(
        f"{entry.path}: the process that encoded it died ({cause}). If the memory ran out, lower num_workers; the same "
        "command goes on"
    )


def _work(connection: Connection, inherited: Sequence[int], pool: _Pool) -> None:
    """Encode what the parent asks for, until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends its workers itself
    for descriptor in inherited:
        os.close(descriptor)
    try:
        while True:
            position = connection.recv()
            path = pool.scratch / f"{position:08d}.video"
            connection.send(_prepare_one(path, pool.entries[position], pool.settings))
    except (EOFError, ConnectionError):
        pass


def _prepare_one(path: Path, entry: Entry, settings: Settings) -> Outcome | OSError:
    """Encode one video into ``path`` and its facts beside it, unless both are there; or say why not.

    An OSError is about the place that is written to, and ends the run.
    """
    facts_path = path.with_suffix(".json")
    try:
        facts = json.loads(facts_path.read_bytes())
        if hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]:
            return Outcome(facts)
    except (OSError, ValueError):
        pass
    draft = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
    try:
        facts = encode(entry, draft, settings)
        facts_path.write_text(json.dumps(facts))  # half of it would not be JSON
        draft.replace(path)
        return Outcome(facts)
    except VideoError as error:
        return Outcome(None, error.reason)
    except OSError as error:
        return OSError(error.errno, error.strerror, str(path))
    finally:
        draft.unlink(missing_ok=True)
