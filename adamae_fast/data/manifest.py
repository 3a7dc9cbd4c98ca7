"""Reads the list of videos: an annotation file in any of the formats that peers use, or a folder of videos.

One line names one video; columns are separated by a comma, by blanks or by tabs:

====================================  =================================================================================
``path``                              a video
``path label``                        a video (VideoMAE, AdaMAE, MAE-ST, V-JEPA)
``path 0 -1`` and ``path -1 label``   a video (VideoMAEv2: -1 says that the path is no folder of images)
``folder start_index total_frames``   images from the one numbered start_index on (VideoMAEv2)
``folder total_frames label``         images from the first one on (raw frames)
====================================  =================================================================================

The last two look alike. One manifest holds one of them, and :func:`_choose_columns` finds out which.

A folder that ``data prepare`` wrote is a manifest too; :mod:`adamae_fast.data.shards` reads it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adamae_fast.data.shards import PreparedError, PreparedVideo, find_index, read_prepared

VIDEO_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        "mp4",
        "m4v",
        "mov",
        "mkv",
        "webm",
        "avi",
        "mpg",
        "mpeg",
        "ts",
        "mts",
        "m2ts",
        "flv",
        "wmv",
        "3gp",
        "ogv",
    )
)
"""What a folder is searched for, in lower case."""

IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
"""Frames of a folder of images, in lower case."""

NUM_PROBED_FILES = 20
"""If all of this many first files are missing, the root is wrong rather than the files."""

NUM_PROBED_FOLDERS = 200
"""Folders that are listed at most, to tell the two formats of folders apart."""

ACCEPTED_FORMATS = """accepted lines, with a comma, blanks or tabs between columns (no blanks if the path has some):
  path                              a video
  path label                        a video and its class, a whole number
  path 0 -1                         a video
  folder start_index total_frames   a folder of images such as img_00001.jpg
  folder total_frames label         a folder of images
  # anything                        a comment
or, in place of a manifest, a folder that is searched for videos, or one that adamae-fast data prepare wrote"""

Columns = Literal["start_index total_frames", "total_frames label"]
_BOTH: tuple[Columns, ...] = ("start_index total_frames", "total_frames label")
_DIRECTIVE = re.compile(r"#\s*columns:\s*folder\s+(\w+\s+\w+)\s*$")
_INTEGER = re.compile(r"[+-]?\d{1,18}")  # longer ones count nothing, and Python refuses to convert thousands of digits
_HEADER_WORD = re.compile(
    r"(video|file|youtube)?_?(path|name|id|file|video|label|class)s?|folder|start_index|\w+_frames"
)


class ManifestError(ValueError):
    """A manifest that cannot be read; the text names file, line and the accepted formats."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One video of a manifest."""

    path: str
    """A video file, a folder of images, or ``shard path:member`` of a prepared video; its name in quarantine."""

    label: int | None
    """Its class; None where the manifest does not say."""

    start: int = 0
    """kind="frames": number in the name of the first image that may be used."""

    num_frames: int | None = None
    """kind="frames": images that belong to the clip, counted from ``start``; None for a video."""

    kind: Literal["video", "frames", "prepared"] = "video"
    """A video file, a folder of images, or a video in a shard that ``data prepare`` wrote."""

    prepared: PreparedVideo | None = None
    """kind="prepared": where the video lies in its shard, and its size, frames and checksum."""


@dataclass(frozen=True)
class _FolderLine:
    """A line with two numbers of 0 or more, before it is known what they mean."""

    place: int
    """Index of its entry."""

    number: int
    """Line number, from 1."""

    line: str
    path: str
    first: int
    second: int

    def entry(self, columns: Columns) -> Entry:
        if columns == "start_index total_frames":
            return Entry(self.path, None, start=self.first, num_frames=self.second, kind="frames")
        return Entry(self.path, self.second, num_frames=self.first, kind="frames")


KeyNames = tuple[str, str]
"""What the user calls the path of a manifest and its root."""


def read_manifest(path: str, root: str | None = None, names: KeyNames = ("data.manifest", "data.root")) -> list[Entry]:
    """Read an annotation file, search a folder for videos, or take those of a folder that ``data prepare`` wrote.

    ``root`` is where relative paths start; the manifest's own folder if None. A video path without an extension gets
    ``.mp4``. A folder is searched through, its videos sorted by path, without labels. Missing files are no error here:
    they are quarantined when they are drawn — unless the first 20 are all missing, which means a wrong root. ``names``
    are the user's words for the two, for messages.

    Raises:
        ManifestError: nothing at ``path``, no permission to read it or a folder in it, no videos in it, no text in
            UTF-8, or a line that fits no format, or fits two; a preparation that is unfinished, or whose index names
            anything outside its folder or its shards.
    """
    source = Path(os.path.expanduser(path))
    base = source.parent if root is None else Path(os.path.expanduser(root))
    with _clear_os_errors(path, names[0]):
        index = find_index(path)
        if index is not None:
            return _read_prepared(index, root, names[1])
        if _is_folder(path, names[0]):
            if root is not None:
                raise ManifestError(f"{names[1]}={root!r}: has no effect on a folder of videos ({path}); leave it out")
            return _search_folder(source)
        entries = _read_lines(source, base)
    probed = entries[:NUM_PROBED_FILES]
    if not any(os.path.exists(entry.path) for entry in probed):
        raise ManifestError(
            f"{path}: none of its first {len(probed)} videos exists, the first being {probed[0].path}; "
            f"paths start at {base} — set {names[1]} to the folder that they really start from"
        )
    return entries


def numbered_images(folder: str) -> dict[int, str]:
    """Images of a folder by the last number in their name, ascending; images without a number are left out.

    Raises ValueError if two images have the same number, OSError if the folder cannot be listed.
    """
    images: dict[int, str] = {}
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        digits = re.findall(r"\d+", stem)
        if extension.lower() not in IMAGE_EXTENSIONS or not digits:
            continue
        number = int(digits[-1])
        if number in images:
            raise ValueError(f"{images[number]} and {name} have the same number; keep one kind of image in a folder")
        images[number] = name
    return dict(sorted(images.items()))


def digest_entries(entries: Sequence[Entry]) -> str:
    """A checksum of what the manifest says, wherever it was read from."""
    digest = hashlib.sha256()
    for entry in entries:
        checksum = entry.prepared and entry.prepared.sha256
        facts = (os.path.abspath(entry.path), entry.label, entry.start, entry.num_frames, entry.kind, checksum)
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _read_prepared(index: Path, root: str | None, root_name: str) -> list[Entry]:
    if root is not None:
        raise ManifestError(f"{root_name}={root!r}: has no effect on prepared videos ({index}); leave it out")
    try:
        videos = read_prepared(index)
    except PreparedError as error:
        raise ManifestError(str(error)) from error
    if not videos:
        raise ManifestError(f"{index}: holds no videos; quarantine.jsonl beside it says why they were unreadable")
    return [Entry(video.path, label, kind="prepared", prepared=video) for video, label in videos]


def _is_folder(path: str, name: str) -> bool:
    try:
        if path:
            return stat.S_ISDIR(os.stat(os.path.expanduser(path)).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        pass
    raise ManifestError(f"{name}={path!r}: no such file or folder; check the path")


@contextmanager
def _clear_os_errors(path: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ManifestError(
            f"{name}={path!r}: {error.filename} cannot be read: {(error.strerror or str(error)).lower()}; "
            "change its permissions, or name another manifest"
        ) from error


def _search_folder(folder: Path) -> list[Entry]:
    def stop(error: OSError) -> None:
        raise error  # os.walk would skip a folder that it cannot list

    found: list[str] = []
    visited: set[str] = set()
    for parent, children, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back
            children.clear()
            continue
        visited.add(real)
        found += [os.path.join(parent, n) for n in names if os.path.splitext(n)[1].lower() in VIDEO_EXTENSIONS]
    if not found:
        raise ManifestError(
            f"{folder}: no videos in this folder; files are recognised by {' '.join(sorted(VIDEO_EXTENSIONS))}"
        )
    return [Entry(path, None) for path in sorted(found)]


def _read_lines(source: Path, base: Path) -> list[Entry]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ManifestError(
            f"{source}: not a text file in UTF-8; a single video is not a manifest, but the folder that holds it is one"
            f"\n{ACCEPTED_FORMATS}"
        )
    entries: list[Entry | None] = []
    folders: list[_FolderLine] = []
    candidates = _BOTH
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if line.startswith("#") and (match := _DIRECTIVE.match(line)):
            candidates = tuple(c for c in _BOTH if c.split() == match[1].split())
            if not candidates:
                raise _error(source, number, raw, "columns must be 'folder " + "' or 'folder ".join(_BOTH) + "'")
        if not line or line.startswith("#"):
            continue
        try:
            columns = _split(line)
        except csv.Error as error:
            raise _error(source, number, raw, str(error)) from error
        if columns is None:
            raise _error(source, number, raw, _explain(line))
        name, numbers = columns
        full = os.path.join(base, name)
        if len(numbers) < 2 or -1 in numbers:
            entries.append(_video(source, number, raw, full, numbers))
            continue
        problem = _folder_problem(name, *numbers)
        if problem:
            raise _error(source, number, raw, problem)
        folders.append(_FolderLine(len(entries), number, raw, full, *numbers))
        entries.append(None)
    if not entries:
        raise ManifestError(f"{source}: names no video; it is empty, or holds comments only\n{ACCEPTED_FORMATS}")
    if folders:
        chosen = _choose_columns(source, folders, candidates)
        for folder in folders:
            entries[folder.place] = folder.entry(chosen)
    return [entry for entry in entries if entry is not None]


def _split(line: str) -> tuple[str, tuple[int, ...]] | None:
    """Path and the one or two whole numbers behind it; None if no separator gives that. Raises csv.Error."""
    candidates = [line.split()]
    if "\t" in line:
        candidates.append([field.strip() for field in line.split("\t") if field.strip()])
    if "," in line:
        fields = [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]
        candidates.insert(0, fields[:-1] if len(fields) == 2 and not fields[1] else fields)
    for path, *rest in candidates:
        if path and len(rest) in (1, 2) and all(_INTEGER.fullmatch(field) for field in rest):
            return path, tuple(int(field) for field in rest)
    path = candidates[0][0]
    if len(candidates[0]) == 1 and path and not _is_header(path):
        return path, ()
    if os.path.splitext(line)[1].lower() in VIDEO_EXTENSIONS:
        return line, ()
    return None


def _video(source: Path, number: int, line: str, path: str, numbers: tuple[int, ...]) -> Entry:
    problem = None
    if len(numbers) == 2 and numbers != (0, -1) and (numbers[0] != -1 or numbers[1] < 0):
        problem = "a video with two numbers is 'path 0 -1' or 'path -1 label'"
    elif len(numbers) == 1 and numbers[0] < -1:
        problem = "a label is 0 or more, or -1 for none"
    if problem:
        raise _error(source, number, line, problem)
    if not os.path.splitext(path)[1]:
        path += ".mp4"
    return Entry(path, None if not numbers or numbers[-1] == -1 else numbers[-1])


def _folder_problem(name: str, first: int, second: int) -> str | None:
    if os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS:
        return "two numbers belong to a folder of images, but the path is a video; write 'path label' or 'path 0 -1'"
    if first < 0 or second < 0:
        return "numbers of frames and labels are 0 or more"
    if first == second == 0:
        return "a folder of images needs a number of frames of 1 or more"
    return None


def _choose_columns(source: Path, folders: list[_FolderLine], candidates: tuple[Columns, ...]) -> Columns:
    """What the two numbers behind a folder mean, the same for the whole manifest.

    In this order: a comment ``# columns: folder total_frames label`` decides. A first number of 0 can only be a
    start_index, a second number of 0 only a label. Then the folders themselves are counted, line by line, until one
    decides: the meaning under which the line covers exactly the folder's images, or the only one under which it asks
    for no more images than there are.
    """
    if len(candidates) == 1:
        return candidates[0]
    starts = next((f for f in folders if f.first == 0), None)
    labels = next((f for f in folders if f.second == 0), None)
    if starts and labels:
        raise _error(
            source,
            labels.number,
            labels.line,
            f"0 frames: line {starts.number} ({starts.line.strip()!r}) can only be 'folder start_index total_frames', "
            "this one only 'folder total_frames label'",
        )
    if starts or labels:
        return _BOTH[0] if starts else _BOTH[1]
    existing = (f for f in folders if os.path.isdir(f.path))
    for folder, _ in zip(existing, range(NUM_PROBED_FOLDERS), strict=False):
        try:
            numbers = list(numbered_images(folder.path))
        except (ValueError, OSError) as error:
            raise _error(source, folder.number, folder.line, f"in {folder.path}: {error}") from error
        total = len(numbers)
        after_start = sum(number >= folder.first for number in numbers)
        exact = (after_start == total == folder.second, total == folder.first)
        fits = (after_start >= folder.second, total >= folder.first)
        for meanings in (exact, fits):
            if sum(meanings) == 1:
                return _BOTH[meanings.index(True)]
    raise _error(
        source,
        folders[0].number,
        folders[0].line,
        "ambiguous: it may be 'folder start_index total_frames' or 'folder total_frames label', and the images in the "
        f"folders do not decide; put one of these comments on top of the file: '# columns: folder {_BOTH[0]}' or "
        f"'# columns: folder {_BOTH[1]}'",
    )


def _is_header(line: str) -> bool:
    return all(_HEADER_WORD.fullmatch(word) for word in re.split(r"[,\s]+", line.lower()))


def _explain(line: str) -> str:
    if _is_header(line):
        return "this is a header row; remove it, or begin it with #"
    return "not a path with up to two whole numbers behind it"


def _error(source: Path, number: int, line: str, problem: str) -> ManifestError:
    return ManifestError(f"{source}, line {number}: {line.strip()[:200]!r}: {problem}\n{ACCEPTED_FORMATS}")
