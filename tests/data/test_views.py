from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest

from adamae_fast.config_finetune import LabelledDataConfig, ViewsConfig
from adamae_fast.data.clips import CropBox, View, center_box, clip_rng, frame_ids, plan_clip
from adamae_fast.data.views import (
    dense_view_ids,
    even_start,
    plan_labelled,
    plan_views,
    segment_ids,
    segment_view_ids,
    spatial_box,
)

LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 100, 300)


@pytest.mark.parametrize(
    ("num_views", "free", "starts"),
    [
        (1, 0, [0]),
        (1, 7, [3]),
        (2, 7, [0, 7]),
        (3, 116, [0, 58, 116]),
        (3, 7, [0, 3, 7]),
        (5, 10, [0, 2, 5, 7, 10]),
        (5, 236, [0, 59, 118, 177, 236]),
        (5, 2, [0, 0, 1, 1, 2]),
        (4, 0, [0, 0, 0, 0]),
    ],
)
def test_even_starts(num_views: int, free: int, starts: list[int]) -> None:
    assert [even_start(view, num_views, free) for view in range(num_views)] == starts


@pytest.mark.parametrize(
    ("total", "num_frames", "stride", "num_views", "first_and_last"),
    [
        (300, 16, 4, 5, [(0, 60), (59, 119), (118, 178), (177, 237), (236, 296)]),  # K400: 10 s at 30 frames a second
        (64, 16, 4, 5, [(0, 60)] * 5),
        (66, 16, 4, 5, [(0, 60), (0, 60), (1, 61), (1, 61), (2, 62)]),
        (40, 16, 4, 2, [(0, 39), (0, 39)]),
        (100, 16, 4, 1, [(18, 78)]),
    ],
)
def test_dense_views(
    total: int, num_frames: int, stride: int, num_views: int, first_and_last: list[tuple[int, int]]
) -> None:
    ids = [dense_view_ids(total, num_frames, stride, view, num_views) for view in range(num_views)]
    assert [(clip[0], clip[-1]) for clip in ids] == first_and_last
    for clip in ids:
        assert clip.tolist() == [min(clip[0] + stride * i, total - 1) for i in range(num_frames)]


@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("num_views", [1, 2, 3, 5, 10])
def test_dense_views_reach_from_end_to_end(total: int, num_views: int) -> None:
    ids = [dense_view_ids(total, 8, 2, view, num_views) for view in range(num_views)]
    assert all(clip.dtype == np.int64 and clip.shape == (8,) for clip in ids)
    assert all(clip.min() >= 0 and clip.max() < total for clip in ids)
    if num_views == 1:
        assert np.array_equal(ids[0], frame_ids(total, 8, 2, None))  # the centre clip of the training code
        return
    assert ids[0][0] == 0
    assert ids[-1][-1] >= total - 2  # the last of a group of `stride` frames
    starts = [int(clip[0]) for clip in ids]
    gaps = [b - a for a, b in pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1
    if num_views * 16 >= total:  # then nothing is left out but what the stride skips
        seen = np.unique(np.concatenate(ids))
        assert np.diff(seen).max(initial=0) <= 2


@pytest.mark.parametrize(
    ("total", "num_frames", "views"),
    [
        (32, 4, [[0, 8, 16, 24], [4, 12, 20, 28]]),  # by hand: segments of 8, their beginnings and centres
        (10, 4, [[0, 2, 5, 7], [1, 3, 6, 8]]),  # segments of 2.5
        (3, 4, [[0, 0, 1, 2], [0, 1, 1, 2]]),
        (1, 4, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (32, 4, [[4, 12, 20, 28]]),
        (10, 4, [[1, 3, 6, 8]]),
        (24, 2, [[2, 14], [6, 18], [10, 22]]),  # 1/6, 1/2 and 5/6 of segments of 12
        (32, 2, [[0, 16], [4, 20], [8, 24], [12, 28]]),
    ],
)
def test_segment_views(total: int, num_frames: int, views: list[list[int]]) -> None:
    assert [segment_view_ids(total, num_frames, k, len(views)).tolist() for k in range(len(views))] == views


@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("num_views", [1, 2, 3, 4])
def test_segment_views_agree_with_fractions(total: int, num_views: int) -> None:
    """The published protocol for two views, in exact arithmetic: floor(tick * x) and floor(tick / 2 + tick * x)."""
    tick = Fraction(total, 16)
    ids = [segment_view_ids(total, 16, view, num_views) for view in range(num_views)]
    places = {2: (Fraction(0), Fraction(1, 2)), 1: (Fraction(1, 2),)}.get(num_views)
    if places:
        assert [clip.tolist() for clip in ids] == [[floor(tick * (x + place)) for x in range(16)] for place in places]
    centre = segment_view_ids(total, 16, 0, 1)
    assert any(np.array_equal(clip, centre) for clip in ids)
    merged = np.sort(np.concatenate(ids))
    assert merged[0] >= 0
    assert merged[-1] < total
    if total >= 16 * num_views:  # no frame twice, and evenly spaced to a frame
        gaps = np.diff(merged)
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("total", LENGTHS)
def test_random_segments(total: int) -> None:
    drawn = np.stack([segment_ids(total, 16, clip_rng(0, 0, i, 0)) for i in range(300)])
    assert (drawn.shape, drawn.dtype) == ((300, 16), np.int64)
    for i in range(16):
        low, end = floor(Fraction(total * i, 16)), floor(Fraction(total * (i + 1), 16))
        expected = set(range(low, end)) or {low}
        assert set(drawn[:, i].tolist()) <= expected
        if len(expected) <= 20:
            assert set(drawn[:, i].tolist()) == expected
    assert (np.diff(drawn, axis=1) >= 0).all()


def test_random_segments_are_uniform() -> None:
    drawn = Counter(int(segment_ids(40, 8, clip_rng(0, 0, i, 0))[3]) for i in range(2000))
    assert sorted(drawn) == [15, 16, 17, 18, 19]
    assert sum((n - 400) ** 2 / 400 for n in drawn.values()) < 18.5  # chi-square, 4 degrees, p = 0.001


@pytest.mark.parametrize(
    ("height", "width", "boxes"),
    [
        (256, 340, [CropBox(0, 0, 256, 256), CropBox(0, 42, 256, 256), CropBox(0, 84, 256, 256)]),
        (240, 427, [CropBox(0, 0, 240, 240), CropBox(0, 93, 240, 240), CropBox(0, 187, 240, 240)]),
        (340, 256, [CropBox(0, 0, 256, 256), CropBox(42, 0, 256, 256), CropBox(84, 0, 256, 256)]),
        (7, 7, [CropBox(0, 0, 7, 7)] * 3),
        (240, 427, [CropBox(0, 93, 240, 240)]),
    ],
)
def test_squares(height: int, width: int, boxes: list[CropBox]) -> None:
    assert [spatial_box(view, len(boxes), height, width) for view in range(len(boxes))] == boxes


@pytest.mark.parametrize(("height", "width"), [(240, 427), (427, 240), (5, 5), (1, 9), (31, 64)])
@pytest.mark.parametrize("num_views", [1, 2, 3, 4])
def test_squares_lie_in_the_frame_and_touch_its_ends(height: int, width: int, num_views: int) -> None:
    boxes = [spatial_box(view, num_views, height, width) for view in range(num_views)]
    turned = [spatial_box(view, num_views, width, height) for view in range(num_views)]
    assert [(b.left, b.top) for b in turned] == [(b.top, b.left) for b in boxes]
    for box in boxes:
        assert box.height == box.width == min(height, width)
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width
    if num_views == 1:
        assert boxes == [center_box(height, width)]
    else:
        assert (boxes[0].top, boxes[0].left) == (0, 0)
        assert (boxes[-1].top + boxes[-1].height, boxes[-1].left + boxes[-1].width) == (height, width)


def test_labelled_plans() -> None:
    config = LabelledDataConfig(repeat=2, flip=True)
    sizes = {"num_frames": 8, "frame_size": 16, "total_frames": 90, "height": 48, "width": 64}
    dense = plan_labelled(config, 3, 1, 4, **sizes)
    assert dense == plan_clip(config, 3, 1, 4, **sizes)
    segments = replace(config, sampling="segments")
    plans = [plan_labelled(segments, *key, **sizes) for key in [(3, 1, 4), (3, 2, 4), (3, 1, 5), (4, 1, 4), (3, 1, 4)]]
    assert plans[0] == plans[-1]
    assert len({plan.frame_ids for plan in plans}) == 4
    assert plans[0].views == dense.views
    assert all(90 * i // 8 <= frame < 90 * (i + 1) // 8 for i, frame in enumerate(plans[0].frame_ids))
    # A run that is resumed with another release must see the same clips.
    assert plans[0].frame_ids == (9, 14, 24, 33, 50, 57, 68, 78)


def test_plans_of_all_views() -> None:
    sizes = {"num_frames": 4, "total_frames": 32, "height": 48, "width": 64}
    plan = plan_views("segments", 4, ViewsConfig(temporal=2, spatial=3), **sizes)
    assert plan.frame_ids == (0, 8, 16, 24, 4, 12, 20, 28)
    assert plan.views == tuple(View(CropBox(0, left, 48, 48)) for left in (0, 8, 16))
    plan = plan_views("dense", 3, ViewsConfig(temporal=2, spatial=1), **sizes)
    assert plan.frame_ids == (0, 3, 6, 9, 20, 23, 26, 29)
    assert plan.views == (View(CropBox(0, 8, 48, 48)),)


@pytest.mark.parametrize(("key", "value"), [("temporal", 0), ("spatial", -1)])
def test_views_are_at_least_one(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"views\.{key}={value}: choose at least 1"):
        ViewsConfig(**{key: value})
