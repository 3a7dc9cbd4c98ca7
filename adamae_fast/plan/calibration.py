"""Measured figures that plans start from: ``calibration.json``, which ``python -m bench.scaling_page`` writes.

It holds, from the files of ``bench/results`` and with their names: training steps on GPUs, CPU time and decoded frames
of a clip, bytes of a video.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A training step of the default model (base, 16 × 224², ratio 0.95) on one GPU, without other processes."""

    gpu: str
    """Key of ``hardware.GPUS``."""
    arm: str
    batch: int
    seconds: float
    allocated_bytes: int
    source: str


@dataclass(frozen=True, kw_only=True)
class MeasuredDecode:
    """What one clip of a data set costs one CPU core: frames read, decoded and cropped to 224."""

    dataset: str
    files: str
    decoder: str
    repeat: int
    seconds: float
    """Of CPU time."""
    frames: float
    """Decoded; shared by the crops of a range."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """All of it."""

    steps: tuple[MeasuredStep, ...] = ()
    decodes: tuple[MeasuredDecode, ...] = ()
    video_bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of one video, by data set and kind of files."""
    video_bytes_source: str = ""

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Calibration:
        """Read what :data:`PATH` holds."""
        return cls(
            steps=tuple(MeasuredStep(**row) for row in plain["steps"]),
            decodes=tuple(MeasuredDecode(**row) for row in plain["decodes"]),
            video_bytes=plain["video_bytes"],
            video_bytes_source=plain["video_bytes_source"],
        )


@cache
def calibration() -> Calibration:
    """The committed one."""
    return Calibration.from_json(json.loads(PATH.read_text()))
