"""Which frames and squares of a labelled video are seen, in training and in testing, in integer arithmetic.

Letters: n frames of the video, T of a clip, s its stride, K clips along time (temporal views) of which k is one, S
squares along the longer side (spatial views), H, W pixels. All divisions round down.

========================  ===============================================================================
dense, training           start + s·i, i = 0 … T-1, start uniform in 0 … max(0, n - T·s)
dense, view k of K        the same, start = ``even_start(k, K, max(0, n - T·s))``
segments, training        uniform in i·n // T … (i + 1)·n // T - 1
segments, view k of K     n·(2(K·i + k) + K mod 2) // (2·K·T)
square k of S             ``even_start(k, S, |H - W|)`` pixels along the longer side, min(H, W) wide
========================  ===============================================================================

Dense clips that are longer than their video repeat its last frame. Videos of fewer frames than segments show each frame
several times.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from adamae_fast.config_finetune import LabelledDataConfig, Sampling, ViewsConfig
from adamae_fast.data.clips import ClipPlan, CropBox, View, derived_rng, plan_clip


def even_start(view: int, num_views: int, free: int) -> int:
    """Where view number ``view`` of ``num_views`` evenly spaced ones starts: ``view·free // (num_views - 1)``.

    The first starts at 0, the last at ``free``; a single one in the middle, at ``free // 2``.
    """
    return free // 2 if num_views == 1 else view * free // (num_views - 1)


def dense_view_ids(total_frames: int, num_frames: int, stride: int, view: int, num_views: int) -> NDArray[np.int64]:
    """Frames of a dense clip in testing, int64 (T,); all views together reach from the first to the last frame.

    As in training a clip takes up ``num_frames * stride`` frames.
    """
    start = even_start(view, num_views, max(0, total_frames - num_frames * stride))
    return np.minimum(start + stride * np.arange(num_frames, dtype=np.int64), total_frames - 1)


def segment_ids(total_frames: int, num_frames: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One random frame of each of ``num_frames`` equal parts of the video (TSN), int64 (T,), ascending."""
    bounds = np.arange(num_frames + 1, dtype=np.int64) * total_frames // num_frames
    return bounds[:-1] + rng.integers(np.maximum(1, np.diff(bounds)))


def segment_view_ids(total_frames: int, num_frames: int, view: int, num_views: int) -> NDArray[np.int64]:
    """Frames of a segment clip in testing, int64 (T,): the segments' centres, shifted by shares of a segment.

    Of each segment, view k shows what lies at ``(2k + K mod 2) / 2K`` of it: the centre for K = 1, the beginning and
    the centre for K = 2 (as published for SSv2), 1/6, 1/2 and 5/6 for K = 3.
    """
    places = num_views * np.arange(num_frames, dtype=np.int64) + view
    return total_frames * (2 * places + num_views % 2) // (2 * num_views * num_frames)


def spatial_box(view: int, num_views: int, height: int, width: int) -> CropBox:
    """A square as large as the short side, at a place along the long one: left to right, or top to bottom.

    Cut out and resized to the clip's side, it is what resizing the short side and cutting a square shows.
    """
    side = min(height, width)
    return CropBox(even_start(view, num_views, height - side), even_start(view, num_views, width - side), side, side)


def plan_labelled(
    config: LabelledDataConfig,
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
    """:func:`~adamae_fast.data.clips.plan_clip` for ``config.sampling``; its crops do not depend on the sampling."""
    sizes = {"total_frames": total_frames, "height": height, "width": width}
    plan = plan_clip(config, seed, epoch, sample, num_frames=num_frames, frame_size=frame_size, **sizes)
    if config.sampling == "dense":
        return plan
    ids_T = segment_ids(total_frames, num_frames, derived_rng(seed, "segments", epoch, sample))
    return replace(plan, frame_ids=tuple(ids_T.tolist()))


def plan_views(
    sampling: Sampling,
    stride: int,
    views: ViewsConfig,
    *,
    num_frames: int,
    total_frames: int,
    height: int,
    width: int,
) -> ClipPlan:
    """All views of a video: the frames of every temporal one, K·T in all, and the squares that each of them gets."""
    ids = [
        segment_view_ids(total_frames, num_frames, k, views.temporal)
        if sampling == "segments"
        else dense_view_ids(total_frames, num_frames, stride, k, views.temporal)
        for k in range(views.temporal)
    ]
    squares = [View(spatial_box(k, views.spatial, height, width)) for k in range(views.spatial)]
    return ClipPlan(tuple(np.concatenate(ids).tolist()), tuple(squares))
