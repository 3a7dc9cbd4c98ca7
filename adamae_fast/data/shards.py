"""The folder that ``data prepare`` writes: tar shards of short videos, and an index that says where each video lies.

Layout::

    prepared.jsonl          the index: a header, then one line for each finished shard
    shard-00000.tar         plain tar: 00000000.mp4, 00000000.json, 00000000.cls (label, if known), 00000001.mp4, …
    shard-00000.idx         the same shard for DALI's fn.readers.webdataset (what its wds2idx would write)
    quarantine.jsonl        videos that could not be read, with reasons; only where there are some

The number in a member's name is the video's place in the manifest. A shard's line is appended when the shard is whole,
so that the index never speaks of more than there is. Nothing read from an index is trusted: names have a fixed form,
ranges lie within their shard, and each video carries its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

INDEX_NAME = "prepared.jsonl"
FORMAT = "adamae-fast prepared videos"
VERSION = 1

_SHARD_NAME = re.compile(r"shard-\d{5,9}\.tar")
_MEMBER_NAME = re.compile(r"\d{8,12}\.mp4")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = tarfile.BLOCKSIZE


class PreparedError(ValueError):
    """A prepared folder whose index cannot be used; the text names file, line and remedy."""


class DamagedVideoError(Exception):
    """A prepared video whose bytes cannot be read, or are not those that were written."""


@dataclass(frozen=True, slots=True)
class PreparedVideo:
    """Where a prepared video lies, and what is in it."""

    shard: str
    """Path of its tar file."""

    name: str
    """Name of its member there, such as 00000012.mp4."""

    offset: int
    """Its first byte in the tar file."""

    length: int
    """Its bytes."""

    sha256: str
    """Of these bytes, in hexadecimal digits."""

    codec: str
    """h264 or vp9."""

    num_frames: int
    height: int
    width: int
    fps: float

    @property
    def path(self) -> str:
        """What it is called in messages and in quarantine: shard path:member."""
        return f"{self.shard}:{self.name}"

    def read(self) -> bytes:
        """The bytes of the video file. Raises DamagedVideoError."""
        try:
            with open(self.shard, "rb") as shard:
                shard.seek(self.offset)
                content = shard.read(self.length)
        except OSError as error:
            raise DamagedVideoError(f"its shard cannot be read: {(error.strerror or str(error)).lower()}") from error
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise DamagedVideoError(
                f"its bytes have changed: SHA-256 {found[:12]}…, the index says {self.sha256[:12]}…"
            )
        return content


@dataclass(frozen=True)
class Shard:
    """One finished line of the index, as it was read: only ``videos`` is checked."""

    record: Mapping[str, Any]
    videos: Sequence[tuple[PreparedVideo, int | None]]
    """Videos and their labels."""


@dataclass(frozen=True)
class PreparedIndex:
    """What an index says: settings and manifest in ``header``, and the shards that are finished."""

    path: Path
    header: Mapping[str, Any]
    shards: Sequence[Shard]

    @property
    def end(self) -> int:
        """Lines of the manifest that are done."""
        return self.shards[-1].record["end"] if self.shards else 0

    @property
    def is_finished(self) -> bool:
        """Whether every line of the manifest is done."""
        return bool(self.end == self.header["entries"])


def find_index(path: str) -> Path | None:
    """The index of a prepared folder, given the folder or the index itself; None if ``path`` is neither."""
    given = Path(os.path.expanduser(path))
    index = given if given.name == INDEX_NAME else given / INDEX_NAME
    return index if path and index.is_file() else None


def read_prepared(index: Path) -> list[tuple[PreparedVideo, int | None]]:
    """Videos and labels of a finished preparation, in the order of its manifest.

    Raises:
        PreparedError: unfinished, not an index, or an index that names anything outside its folder or its shards.
        OSError: the index cannot be read.
    """
    prepared = read_index(index)
    if not prepared.is_finished:
        raise PreparedError(
            f"{index}: {prepared.end} of {prepared.header['entries']} videos are prepared; "
            "the command that began it (adamae-fast data prepare) goes on with the rest"
        )
    return [video for shard in prepared.shards for video in shard.videos]


def read_index(index: Path) -> PreparedIndex:
    """Read and check an index. A last line that a killed process left unfinished does not count.

    Raises PreparedError and OSError as :func:`read_prepared` does, but for an unfinished preparation.
    """
    content = index.read_bytes()
    first, *lines = content[: content.rfind(b"\n") + 1].splitlines() or [b""]
    header = _json_object(first)
    if header is None or header.get("format") != FORMAT or not _is_count(header.get("entries"), 1):
        raise PreparedError(f"{index}, line 1: not the index of prepared videos; prepare them again in a new folder")
    if header.get("version") != VERSION:
        raise PreparedError(
            f"{index}: version {header.get('version')!r}, this program reads {VERSION}; prepare the videos again"
        )
    shards: list[Shard] = []
    for number, line in enumerate(lines, start=2):
        first_entry = shards[-1].record["end"] if shards else 0
        shards.append(_read_shard(index, number, line, first_entry, header["entries"]))
    return PreparedIndex(index, header, shards)


def _read_shard(index: Path, number: int, line: bytes, first_entry: int, num_entries: int) -> Shard:
    def require(condition: object, problem: str) -> None:
        if not condition:
            raise PreparedError(f"{index}, line {number}: {problem}; prepare the videos again, in a new folder")

    record: dict[str, Any] = _json_object(line) or {}
    end: Any
    name: Any
    videos, end, name = record.get("videos"), record.get("end"), record.get("shard")
    require(isinstance(videos, list) and isinstance(record.get("unreadable"), list), "not the record of a shard")
    require(_is_count(end, first_entry + 1) and end <= num_entries, f"end={end!r} does not follow {first_entry}")
    if not videos:
        return Shard(record, ())
    # A fixed form leaves no way out of the folder.
    require(isinstance(name, str) and _SHARD_NAME.fullmatch(name), f"shard={name!r} is not the name of a shard")
    path = os.path.join(index.parent, name)
    try:
        status = os.stat(path)
    except OSError as error:
        raise PreparedError(
            f"{index}, line {number}: {path}: {(error.strerror or str(error)).lower()}; bring the shard back"
        ) from error
    require(stat.S_ISREG(status.st_mode), f"{path} is not a file")
    read: list[tuple[PreparedVideo, int | None]] = []
    for fields in videos:
        require(isinstance(fields, dict), "a video that is no object")
        for key, least in (("offset", _BLOCK), ("length", 1), ("frames", 1), ("height", 1), ("width", 1)):
            require(_is_count(fields.get(key), least), f"{key}={fields.get(key)!r} of a video")
        for key, form in (("name", _MEMBER_NAME), ("sha256", _SHA256)):
            text = fields.get(key)
            require(isinstance(text, str) and form.fullmatch(text), f"{key}={text!r} of a video")
        label, fps = fields.get("label"), fields.get("fps")
        require(max(fields["height"], fields["width"]) < 2**16, "a side of a video above 65535 pixels")
        require(fields.get("codec") in ("h264", "vp9"), f"codec={fields.get('codec')!r} of a video")
        require(label is None or _is_count(label, 0), f"label={label!r} of a video")
        require(isinstance(fps, int | float) and 0 < fps < 1e6, f"fps={fps!r} of a video")
        offset, length = fields["offset"], fields["length"]
        require(fields["frames"] <= length, f"frames={fields['frames']} in {length} bytes")
        if offset + length > status.st_size:
            raise PreparedError(
                f"{index}, line {number}: {fields['name']} ends at byte {offset + length}, {path} at {status.st_size}; "
                "bring the whole shard back"
            )
        video = PreparedVideo(
            shard=path,
            name=fields["name"],
            offset=offset,
            length=length,
            sha256=fields["sha256"],
            codec=sys.intern(fields["codec"]),  # of 240,000 videos
            num_frames=fields["frames"],
            height=fields["height"],
            width=fields["width"],
            fps=float(fps),
        )
        read.append((video, label))
    return Shard(record, read)


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass
class ShardWriter:
    """Writes one tar file, and its .idx for DALI. Equal members give equal bytes."""

    path: Path
    _idx: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file: BinaryIO = self.path.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    @property
    def size(self) -> int:
        """Bytes so far, without the end mark."""
        return self._tar.offset

    def add(self, key: str, parts: Mapping[str, bytes]) -> int:
        """Append one sample, its parts named ``key.extension``; return the place of the first part's first byte."""
        line = []
        for extension, content in parts.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(content)
            offset = self._tar.offset + _BLOCK
            self._tar.addfile(info, BytesIO(content))
            line.append((extension, offset, len(content), info.name))
        self._idx.append(" ".join(str(word) for part in line for word in part))
        return line[0][1]

    def close(self) -> None:
        """Write the end mark and the .idx; both are on the disk when this returns."""
        self._tar.close()
        _sync(self._file)
        self._file.close()
        with self.path.with_suffix(".idx").open("w", encoding="ascii") as file:
            file.write("".join(f"{line}\n" for line in (f"v1.2 {len(self._idx)}", *self._idx)))
            _sync(file)

    def abandon(self) -> None:
        """Remove the file, which is not finished."""
        with suppress(OSError):  # a full disk, once more
            self._file.close()
        self.path.unlink(missing_ok=True)


def write_file(path: Path, text: str, scratch: Path) -> None:
    """Replace a file at once, by way of ``scratch``: it holds its old text or the new one, never a part."""
    draft = scratch / f"{path.name}.{os.getpid()}.tmp"
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)
    draft.replace(path)


def append_line(path: Path, line: str) -> None:
    """Append a line; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
