"""Which frames a clip has and which part of them is seen: pure functions of a random generator.

Letters: T frames, H, W pixels, C channels, S the clip's side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from adamae_fast.config import CropKind, DataConfig

Purpose = Literal["clip", "order", "replacement", "segments", "augment"]
_PURPOSES: tuple[Purpose, ...] = ("clip", "order", "replacement", "segments", "augment")

MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)
"""Sides of a multi-scale crop as shares of the frame's short side."""

SNAP_PIXELS = 3
"""A multi-scale side less than this away from S becomes S, so that the crop is not resized at all."""

MULTI_OFFSETS = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),  # corners and centre
    *((2, 0), (2, 4), (4, 2), (0, 2)),  # middles of the edges
    *((1, 1), (1, 3), (3, 1), (3, 3)),  # centres of the quarters
)
"""Places (row, column) of a multi-scale crop, in quarters of the free height and width."""

ASPECT_RANGE = (3 / 4, 4 / 3)
"""Width / height of a random resized crop before it is resized."""

RESIZED_TRIES = 10
"""Random resized crops drawn before the centre is taken."""


@dataclass(frozen=True, slots=True)
class CropBox:
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class View:
    """What a clip sees of its frames."""

    box: CropBox
    flip: bool = False
    """Mirrored left to right."""


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """What is decoded of one video, and what its crops see of that. Every decoder carries out the same plan."""

    frame_ids: tuple[int, ...]
    """T frames of the video in ascending order; the last one again and again where a short video lacks some."""

    views: tuple[View, ...]
    """One for each of ``data.repeat`` crops, in pixels of the upright frame."""


def plan_clip(
    config: DataConfig,
    seed: int,
    epoch: int,
    sample: int,
    *,
    num_frames: int,
    frame_size: int,
    total_frames: int,
    height: int,
    width: int,
) -> ClipPlan:
    """The plan for video ``sample`` in ``epoch``: a pure function of its arguments, without decoding.

    Args:
        config: stride, crop, random_resized_scale, flip and repeat.
        seed: of the run.
        epoch: which pass over the manifest.
        sample: index of the entry that the order names, also where another one is decoded in its place.
        num_frames: T.
        frame_size: S.
        total_frames: frames of the video that is decoded.
        height: pixels of its upright frames.
        width: pixels of its upright frames.
    """
    rngs = [clip_rng(seed, epoch, sample, repeat) for repeat in range(config.repeat)]
    ids_T = frame_ids(total_frames, num_frames, config.stride, rngs[0])
    views = [
        draw_view(
            rng,
            height,
            width,
            crop=config.crop,
            frame_size=frame_size,
            random_resized_scale=config.random_resized_scale,
            flip=config.flip,
        )
        for rng in rngs
    ]
    return ClipPlan(tuple(ids_T.tolist()), tuple(views))


def epoch_order(seed: int, epoch: int, num_videos: int) -> NDArray[np.int64]:
    """The order in which ``epoch`` shows the videos, int64 (num_videos,): a permutation of its own for each epoch."""
    return derived_rng(seed, "order", epoch).permutation(np.arange(num_videos, dtype=np.int64))


def draw_replacement(seed: int, epoch: int, sample: int, bad: Collection[int], num_videos: int) -> int:
    """The video to show for ``sample`` after those in ``bad`` were unreadable, any other one with equal probability."""
    rng = derived_rng(seed, "replacement", epoch, sample, len(bad))
    while (other := int(rng.integers(num_videos))) in bad:
        pass
    return other


def derived_rng(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """A generator of its own for each (seed, purpose, key), the same on every machine and in every process."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), *key)))


def clip_rng(seed: int, epoch: int, sample: int, repeat: int) -> np.random.Generator:
    """The generator of one clip: crop ``repeat`` of video ``sample`` in ``epoch``."""
    return derived_rng(seed, "clip", epoch, sample, repeat)


def frame_ids(total_frames: int, num_frames: int, stride: int, rng: np.random.Generator | None) -> NDArray[np.int64]:
    """Frames of a clip, int64 (T,): every ``stride``-th from a start on.

    The clip takes up ``num_frames * stride`` frames of the video. Where the video is longer, the start is uniform over
    all places at which these fit, or in the middle if ``rng`` is None; otherwise it is 0. Frames that a short video
    lacks are its last one again.
    """
    free = max(0, total_frames - num_frames * stride)
    start = free // 2 if rng is None else int(rng.integers(free + 1))
    return np.minimum(start + stride * np.arange(num_frames, dtype=np.int64), total_frames - 1)


def draw_view(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    crop: CropKind,
    frame_size: int,
    random_resized_scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = False,
) -> View:
    """Draw a crop of frames of ``height`` × ``width`` and, where ``flip`` allows it, whether it is mirrored."""
    if crop == "multi_scale":
        box = multi_scale_box(rng, height, width, frame_size)
    elif crop == "random_resized":
        box = random_resized_box(rng, height, width, random_resized_scale)
    else:
        box = center_box(height, width)
    return View(box, flip and bool(rng.random() < 0.5))


def multi_scale_box(rng: np.random.Generator, height: int, width: int, frame_size: int) -> CropBox:
    """VideoMAE's training crop: one of ten sizes at one of thirteen places, all equally likely.

    Height and width are each one of :data:`MULTI_SCALES` of the short side, at most one step of the list apart.
    """
    short = min(height, width)
    sides = [max(1, int(short * scale)) for scale in MULTI_SCALES]
    sides = [frame_size if abs(s - frame_size) < SNAP_PIXELS and frame_size <= short else s for s in sides]
    sizes = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    box_height, box_width = sizes[rng.integers(len(sizes))]
    row, column = MULTI_OFFSETS[rng.integers(len(MULTI_OFFSETS))]
    top = row * ((height - box_height) // 4)
    left = column * ((width - box_width) // 4)
    return CropBox(top, left, box_height, box_width)


def random_resized_box(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> CropBox:
    """A box with a share of the area uniform in ``scale`` and log-uniform aspect, anywhere; else the centre."""
    log_low, log_high = (math.log(aspect) for aspect in ASPECT_RANGE)
    for _ in range(RESIZED_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(log_low, log_high))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return CropBox(top, left, box_height, box_width)
    return center_box(height, width)


def center_box(height: int, width: int) -> CropBox:
    """The largest square, in the middle."""
    side = min(height, width)
    return CropBox((height - side) // 2, (width - side) // 2, side, side)


def apply_view(frames_THWC: NDArray[np.uint8] | Tensor, view: View, frame_size: int) -> Tensor:
    """Crop, :func:`resize` and mirror decoded frames: uint8 (T, H, W, 3) → uint8 (3, T, S, S), contiguous."""
    frames = torch.as_tensor(frames_THWC)
    box = view.box
    part_TCHW = frames[:, box.top : box.top + box.height, box.left : box.left + box.width].permute(0, 3, 1, 2)
    resized_TCHW = resize(part_TCHW, frame_size, frame_size)
    if view.flip:
        resized_TCHW = resized_TCHW.flip(-1)
    return resized_TCHW.transpose(0, 1).contiguous()


def resize(frames_TCHW: Tensor, height: int, width: int) -> Tensor:
    """Frames of this size: bilinear with antialiasing, as Pillow resizes; the two differ by one level at most."""
    return F.interpolate(frames_TCHW, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
