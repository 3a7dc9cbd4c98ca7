"""The folder that ``adamae-fast extract`` writes: shards of features, and an index.

Layout::

    features.json               the index: settings, checkpoint, versions; at the end what is unreadable, and "complete"
    shard-00000.safetensors     videos 0 to n - 1 of the manifest, shard-00001 the next n, …; or .npz

A shard holds ``features`` (V, D) or (V, N, D), ``ids`` (V,), the videos' places in the manifest, and ``labels`` (V,),
-1 where the manifest has none; unreadable videos have no row. Their list, and the paths, are JSON: in safetensors the
metadata's ``videos``, in npz the array ``videos``. Shards cover fixed ranges of the manifest and take their names when
they are whole: what is missing shows in the names, and equal input gives equal bytes.

Shapes: V videos, N tokens, D width, X either (D,) or (N, D).
"""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo
from adamae_fast.errors import RunStoppedError
from adamae_fast.tensor_file import write_tensors_file

INDEX_NAME = "features.json"
FORMAT = "adamae-fast features"
VERSION = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
UNLABELLED = -1

_INDEXED = {"settings", "command", "shape", "num_videos", "complete"}
"""Keys of the index that reading needs."""

_SUMMED_UP = {"weights_sha256": "checkpoint", "entries_sha256": "data.manifest"}
"""Settings that are checksums, and the option whose content each sums up."""


class FeaturesError(ValueError):
    """A folder of features that cannot be used; the text names what is wrong and the remedy."""


@dataclass(frozen=True)
class ShardContent:
    """What one shard holds."""

    features_VX: Tensor
    """In the dtype of the store, on the CPU."""

    ids: Sequence[int]
    """Of the videos that could be read, ascending."""

    bad: Sequence[BadVideo]


class _ShardIndex(NamedTuple):
    ids: list[int]
    labels: list[int]
    paths: list[str]
    unreadable: list[dict[str, Any]]


class FeatureStore:
    """A folder of features that is being made.

    Args:
        folder: need not exist yet.
        settings: what decides the features, by the names of the options; a folder made with others is refused.
        facts: what else the index says.
        num_videos: lines of the manifest.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], num_videos: int) -> None:
        self.folder = folder
        self.num_videos = num_videos
        self._settings = dict(settings)
        self._header = {"format": FORMAT, "version": VERSION, "complete": False, **facts, "num_videos": num_videos}
        self._header["settings"] = self._settings

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one video's features: (D,) or (N, D)."""
        return tuple(self._header["shape"])

    @property
    def num_shards(self) -> int:
        """Shards of the whole manifest."""
        return -(-self.num_videos // self._settings["shard_videos"])

    def check(self) -> None:
        """Raise FeaturesError unless the folder is empty or was begun with these settings."""
        if not (self.folder / INDEX_NAME).exists():
            if self.folder.exists() and not self.folder.is_dir():
                raise FeaturesError(f"output_dir={str(self.folder)!r}: is a file; name a folder for the features")
            # Hidden files are the lock, and an index that is being written.
            if self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise FeaturesError(
                    f"output_dir={str(self.folder)!r}: already holds something, but no {INDEX_NAME}; "
                    "choose another folder"
                )
            return
        header = _read_header(self.folder)
        old = header["settings"]
        for key, value in self._settings.items():
            if old.get(key) != value:
                option = _SUMMED_UP.get(key, key)
                raise FeaturesError(
                    f"output_dir={str(self.folder)!r}: was made with {option}={_shown(header, key)}, now it is "
                    f"{_shown(self._header, key)}; choose another folder, or the same {option} as before"
                )

    def begin(self) -> None:
        """Write the index of a fresh folder; one that was begun keeps its own."""
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / INDEX_NAME).exists():
            self._write_index(self._header)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        return [number for number in range(self.num_shards) if not self._shard(number).exists()]

    def range_of(self, shard: int) -> range:
        """Places in the manifest of the videos of a shard."""
        size = self._settings["shard_videos"]
        return range(shard * size, min(self.num_videos, (shard + 1) * size))

    def write(self, shard: int, content: ShardContent, entries: Sequence[Entry]) -> None:
        """Write a shard, whole or not at all. Raises RunStoppedError where that cannot be done."""
        expected = self.range_of(shard)
        bad_ids = sorted(set(expected) - set(content.ids))
        assert len(content.ids) + len(bad_ids) == len(expected)
        assert [entries[i].path for i in bad_ids] == [video.path for video in content.bad]
        videos = {
            "paths": [entries[i].path for i in content.ids],
            "unreadable": [
                {"id": i, "path": video.path, "reason": video.reason}
                for i, video in zip(bad_ids, content.bad, strict=True)
            ],
        }
        labels = [UNLABELLED if entries[i].label is None else entries[i].label for i in content.ids]
        arrays = {
            "features": content.features_VX.contiguous(),
            "ids": torch.tensor(content.ids, dtype=torch.int64),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        path = self._shard(shard)
        draft = path.with_name(f".{path.name}.tmp")
        try:
            if self._settings["format"] == "safetensors":
                write_tensors_file(arrays, draft, {"videos": json.dumps(videos)})
            else:
                with draft.open("wb") as file:
                    numbers = {name: tensor.numpy() for name, tensor in arrays.items()}
                    np.savez(file, **numbers, videos=np.array(json.dumps(videos)))  # type: ignore[arg-type]
            draft.replace(path)
        except OSError as error:
            raise RunStoppedError(
                f"{path} cannot be written ({error}); the other shards stand: see to the cause, such as a full disk, "
                "and the same command goes on"
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        """Write into the index that all is there, and what is unreadable; return the index."""
        assert not self.missing()
        before = _read_header(self.folder)
        shards = [_read_shard(self._shard(number), self.range_of(number)) for number in range(self.num_shards)]
        header = before | {
            "complete": True,
            "num_readable": sum(len(shard.ids) for shard in shards),
            "num_labelled": sum(label != UNLABELLED for shard in shards for label in shard.labels),
            "unreadable": [video for shard in shards for video in shard.unreadable],
        }
        if header != before:  # a lost shard that was made again may hold other videos than the first one
            self._write_index(header)
        return header

    def _shard(self, number: int) -> Path:
        return _shard_path(self.folder, number, self._settings["format"])

    def _write_index(self, header: Mapping[str, Any]) -> None:
        draft = self.folder / f".{INDEX_NAME}.tmp"
        draft.write_text(json.dumps(header, indent=1) + "\n")
        draft.replace(self.folder / INDEX_NAME)


class FeatureFolder:
    """Finished features, to be read; the features themselves are read when they are asked for.

    Args:
        folder: what ``adamae-fast extract`` wrote.

    Raises:
        FeaturesError: not such a folder, not finished, or damaged; the text says how to go on.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.header = _read_header(self.path)
        settings = self.header["settings"]
        num_videos, size = self.header["num_videos"], settings["shard_videos"]
        self._shards = [_shard_path(self.path, n, settings["format"]) for n in range(-(-num_videos // size))]
        there = sum(path.exists() for path in self._shards)
        if there < len(self._shards) or not self.header["complete"]:
            if self.header["complete"]:
                remedy = "bring the others back, or make them again, which keeps these"
            else:
                remedy = "the command that began it goes on with the rest and keeps these"
            raise FeaturesError(
                f"{self.path}: not finished: {there} of {len(self._shards)} shards are there; {remedy}: "
                f"{self.header['command']} {shlex.quote(f'--output_dir={self.path}')}"
            )
        places = [range(i, min(num_videos, i + size)) for i in range(0, num_videos, size)]
        shards = [_read_shard(path, expected) for path, expected in zip(self._shards, places, strict=True)]
        self.ids = [i for shard in shards for i in shard.ids]
        """Places in the manifest of the videos that could be read, ascending: one for each row."""
        self.paths = [path for shard in shards for path in shard.paths]
        self.labels = [None if label == UNLABELLED else label for shard in shards for label in shard.labels]
        self.unreadable = [BadVideo(v["path"], v["reason"]) for shard in shards for v in shard.unreadable]
        self.shape: tuple[int, ...] = tuple(self.header["shape"])
        """Of one video's features: (D,) or (N, D)."""
        self._places = [(number, row) for number, shard in enumerate(shards) for row in range(len(shard.ids))]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the features of these rows, of all if None: fp32 (V, D) or (V, N, D). Others stay on the disk."""
        wanted = range(len(self)) if rows is None else rows
        features_VX = torch.empty(len(wanted), *self.shape)
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(wanted):
            number, row_in_shard = self._places[row]
            by_shard.setdefault(number, []).append((place, row_in_shard))
        for number, pairs in by_shard.items():
            places, rows_in_shard = zip(*pairs, strict=True)
            found_VX = _read_rows(self._shards[number], rows_in_shard)
            if found_VX.shape[1:] != self.shape:
                raise FeaturesError(
                    f"{self._shards[number]}: features of shape {tuple(found_VX.shape[1:])}, not {self.shape} as the "
                    "index says: it is of another extraction; bring the right one back, or remove it and extract again"
                )
            features_VX[list(places)] = found_VX
        return features_VX


def is_feature_folder(path: str | Path) -> bool:
    """Whether features were put, or begun to be put, into this folder."""
    return (Path(path) / INDEX_NAME).is_file()


def _shard_path(folder: Path, number: int, file_format: str) -> Path:
    return folder / f"shard-{number:05d}.{file_format}"


def _read_header(folder: Path) -> dict[str, Any]:
    index = folder / INDEX_NAME
    if not index.is_file():
        raise FeaturesError(f"{folder}: no {INDEX_NAME} in it; adamae-fast extract writes such folders")
    try:
        header = json.loads(index.read_text())
    except ValueError as error:
        raise FeaturesError(f"{index}: not JSON ({error}); extract the features again, into another folder") from error
    is_index = isinstance(header, dict) and header.keys() >= _INDEXED
    if not is_index or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise FeaturesError(
            f"{index}: not the index of features of version {VERSION}; extract them again, into another folder"
        )
    return header


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Around the reading of a shard: what is wrong with it becomes a FeaturesError that names it."""
    try:
        yield
    except (SafetensorError, zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise FeaturesError(f"{path}: damaged ({error}); remove it, and extract again: only it will be made") from error


def _read_shard(path: Path, expected: range) -> _ShardIndex:
    """Everything but the features. ``expected``: places in the manifest of the videos that it should have."""
    with _damage_told(path):
        if path.suffix == ".npz":
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:  # numpy would leave it open
                ids, labels, videos = arrays["ids"].tolist(), arrays["labels"].tolist(), str(arrays["videos"])
        else:
            with safe_open(path, framework="pt") as file:
                ids, labels = (file.get_tensor(name).tolist() for name in ("ids", "labels"))
                videos = file.metadata()["videos"]
        named = json.loads(videos)
        index = _ShardIndex(ids, labels, named["paths"], named["unreadable"])
        if sorted([*ids, *(video["id"] for video in index.unreadable)]) != list(expected):
            raise ValueError(f"it should have videos {expected.start} to {expected.stop - 1} of the manifest")
        return index


def _read_rows(path: Path, rows: Sequence[int]) -> Tensor:
    with _damage_told(path):
        if path.suffix == ".npz":
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays["features"])[list(rows)].float()
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice("features")
            if len(rows) == stored.get_shape()[0]:  # the whole shard in one piece
                return stored[:][list(rows)].float()
            return torch.cat([stored[row : row + 1] for row in rows]).float()


def _shown(header: Mapping[str, Any], key: str) -> str:
    """A setting as a user knows it: before a checksum stands the path whose content it sums up."""
    value = str(header["settings"].get(key))
    return f"{header[_SUMMED_UP[key]]} ({value[:12]}…)" if key in _SUMMED_UP else value
