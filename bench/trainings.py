"""A training as a part of a study: carried out once, continued where it was stopped, its seconds added up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adamae_fast.config import PretrainConfig
from adamae_fast.data.synthetic import synthesize
from adamae_fast.errors import RunStoppedError
from adamae_fast.run_folder import RunFolder, read_json_lines

DIRECTIONS = ("move-left", "move-right", "move-up", "move-down")
"""The classes of the action set that a small model learns in some hundred steps; all of them are too much for that
(bench/LOG.md)."""


def digest_of(value: object) -> str:
    """Eight letters that tell it from others, for the name of what follows from it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def seconds_of(folder: Path) -> float:
    """What its sittings took, but for those that were killed before they could say so."""
    return sum(line["seconds"] for line in read_json_lines(folder / "seconds.jsonl"))


def is_done(folder: Path) -> bool:
    """Whether :func:`train_once` has nothing left to do."""
    summary = RunFolder(folder).summary
    return (
        (folder / "seconds.jsonl").is_file() and summary.is_file() and not json.loads(summary.read_text())["stopped_by"]
    )


def train_once(folder: Path, train: Callable[[], Mapping[str, Any]]) -> float:
    """Carry out ``train``, which returns what the run's summary.json holds, or what is left of it; return its seconds.

    Raises RunStoppedError where a signal has stopped it: the same call goes on.
    """
    if is_done(folder):
        return seconds_of(folder)
    start = time.perf_counter()
    summary = train()
    with (folder / "seconds.jsonl").open("a") as file:
        file.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
    if summary["stopped_by"]:
        raise RunStoppedError(f"stopped by {summary['stopped_by']}; the same command goes on")
    return seconds_of(folder)


def action_videos(
    work: Path, num_videos: int, recipe: PretrainConfig, seed: int, val_share: float, **options: Any
) -> Path:
    """A folder in ``work``: an action set of small videos, each as long as a clip; rendered now, if it is not there.

    ``options``: classes and detail of :func:`~adamae_fast.data.synthetic.synthesize`.
    """
    num_frames = recipe.model.num_frames * recipe.data.stride
    what = f"-{digest_of(options)}" if options else ""
    folder = work / f"videos-{num_videos}-of-{num_frames}-frames-seed{seed}-val{val_share:g}{what}"
    if not folder.exists():
        synthesize(
            str(folder), "actions", num_videos, num_frames=num_frames, width=64, height=64, seed=seed,
            val_share=val_share, **options,
        )  # fmt: skip
    return folder
