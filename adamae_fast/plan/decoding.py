"""What a clip costs the data path: frames decoded, CPU time, bytes read. From measurements of one CPU core.

Exactly what was measured is taken as it is. Anything else is *modelled* from it: with r crops of one decoded range, a
clip takes a / r + b seconds, a for decoding, in proportion to the frames, b for cropping, in proportion to the pixels;
a and b are fitted to the measured r.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import linear_regression

from adamae_fast.config import DataConfig, ModelConfig
from adamae_fast.plan.calibration import Calibration, MeasuredDecode
from adamae_fast.plan.options import DATASETS, PlanOptions

MEASURED_CLIP = ModelConfig()
"""Frames and size of the clips that were measured."""


@dataclass(frozen=True, kw_only=True)
class ClipCost:
    """Of one clip of a batch."""

    frames: float
    """Decoded; a share of them where several crops are cut from one range."""
    seconds: float
    """Of CPU time on one core, where the CPU decodes."""
    read_bytes: float
    measured: bool
    source: str


def span(num_frames: int, stride: int) -> int:
    """Frames of the video from a clip's first to its last."""
    return (num_frames - 1) * stride + 1


def clip_cost(calibration: Calibration, options: PlanOptions, model: ModelConfig, data: DataConfig) -> ClipCost:
    """Of the recipe's clips; with data.decoder=dali, ``seconds`` are those of the CPU's decoder."""
    decoder = "decord" if data.decoder == "decord" else "pyav"
    rows = {
        row.repeat: row
        for row in calibration.decodes
        if (row.dataset, row.files, row.decoder) == (options.like, options.files, decoder)
    }
    usual = DATASETS[options.like]
    measured_span = span(MEASURED_CLIP.num_frames, usual.stride)
    # Before a clip stand the frames from the key frame on; a video has no more frames than it has.
    frames = min(rows[1].frames - measured_span + span(model.num_frames, data.stride), options.videos.frames)
    as_measured = (
        data.stride == usual.stride
        and (model.num_frames, model.frame_size) == (MEASURED_CLIP.num_frames, MEASURED_CLIP.frame_size)
        and options.videos.frames == usual.frames
    )
    read_bytes = calibration.video_bytes[options.like][options.files] * options.videos.frames / usual.frames
    measured = as_measured and data.repeat in rows and options.dataset is not None
    if measured:
        seconds = rows[data.repeat].seconds
    else:
        decode, crop = _fit(list(rows.values()))
        pixels = model.num_frames * model.frame_size**2 / (MEASURED_CLIP.num_frames * MEASURED_CLIP.frame_size**2)
        seconds = decode * frames / rows[1].frames / data.repeat + crop * pixels
    return ClipCost(
        frames=frames / data.repeat,
        seconds=seconds,
        read_bytes=read_bytes / data.repeat,
        measured=measured,
        source=rows[1].source,
    )


def _fit(rows: list[MeasuredDecode]) -> tuple[float, float]:
    """Seconds of decoding a range, and of one crop."""
    decode, crop = linear_regression([1 / row.repeat for row in rows], [row.seconds for row in rows])
    return decode, max(0.0, crop)
