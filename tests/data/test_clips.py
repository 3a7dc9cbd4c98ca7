from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from adamae_fast.config import CropKind, DataConfig
from adamae_fast.data.clips import (
    ClipPlan,
    CropBox,
    View,
    apply_view,
    center_box,
    clip_rng,
    derived_rng,
    draw_replacement,
    draw_view,
    epoch_order,
    frame_ids,
    multi_scale_box,
    plan_clip,
    random_resized_box,
)


def test_generators_are_their_own_and_stable() -> None:
    drawn = {
        tuple(clip_rng(*key).integers(2**63, size=2).tolist())
        for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1)]
    }
    drawn |= {tuple(derived_rng(0, p, 0, 0, 0).integers(2**63, size=2).tolist()) for p in ("order", "replacement")}
    drawn.add(tuple(derived_rng(0, "order", 0).integers(2**63, size=2).tolist()))
    assert len(drawn) == 9
    # A run that is resumed on another machine, or with another release, must see the same clips.
    assert clip_rng(3, 1, 4, 1).integers(1_000_000, size=3).tolist() == [727897, 469841, 606019]


@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 31, 32, 33, 40])
@pytest.mark.parametrize(("num_frames", "stride"), [(8, 4), (8, 1), (1, 5)])
def test_frame_ids_in_the_middle(total: int, num_frames: int, stride: int) -> None:
    walked, place = [], 0
    for unused in range(total):  # the first start that leaves no more frames before the clip than after it
        if unused + num_frames * stride + unused <= total:
            place = unused
    for _ in range(num_frames):
        walked.append(place if place < total else total - 1)
        place += stride
    ids = frame_ids(total, num_frames, stride, None)
    assert ids.dtype == np.int64
    assert ids.tolist() == walked


def test_random_starts_reach_every_place_equally_often() -> None:
    total, num_frames, stride = 20, 4, 4
    starts = Counter(int(frame_ids(total, num_frames, stride, clip_rng(0, 0, i, 0))[0]) for i in range(2000))
    assert sorted(starts) == [0, 1, 2, 3, 4]  # 4 + 4 * 4 = 20: one place more does not fit
    expected = 2000 / 5
    assert sum((n - expected) ** 2 / expected for n in starts.values()) < 18.5  # chi-square, 4 degrees, p = 0.001


def test_a_video_that_just_fits_has_one_start() -> None:
    assert {tuple(frame_ids(16, 4, 4, clip_rng(0, 0, i, 0))) for i in range(20)} == {(0, 4, 8, 12)}
    assert frame_ids(14, 4, 4, clip_rng(0, 0, 0, 0)).tolist() == [0, 4, 8, 12]
    assert frame_ids(6, 4, 4, clip_rng(0, 0, 0, 0)).tolist() == [0, 4, 5, 5]


@pytest.mark.parametrize(
    ("height", "width", "frame_size"), [(240, 320, 224), (320, 180, 64), (225, 400, 224), (6, 5, 224)]
)
def test_multi_scale_boxes_are_the_documented_ones(height: int, width: int, frame_size: int) -> None:
    short = min(height, width)
    sides = []
    for numerator, denominator in ((1000, 1000), (875, 1000), (750, 1000), (660, 1000)):
        side = short * numerator // denominator
        sides.append(frame_size if frame_size <= short and frame_size - 3 < side < frame_size + 3 else side)
    sizes = [(sides[0], sides[0]), (sides[0], sides[1])]
    for i in (1, 2):
        sizes += [(sides[i], sides[i - 1]), (sides[i], sides[i]), (sides[i], sides[i + 1])]
    sizes += [(sides[3], sides[2]), (sides[3], sides[3])]
    grid = [(row, column) for row in range(5) for column in range(5)]
    places = [(r, c) for r, c in grid if (r % 2 == 0 and c % 2 == 0) or (r % 2 == 1 and c % 2 == 1)]
    assert (len(sizes), len(places)) == (10, 13)
    expected = Counter(
        CropBox(((height - h) // 4) * r, ((width - w) // 4) * c, h, w) for h, w in sizes for r, c in places
    )
    num_draws = 6000
    drawn = Counter(multi_scale_box(clip_rng(1, 0, i, 0), height, width, frame_size) for i in range(num_draws))
    assert set(drawn) == set(expected)
    for box in drawn:
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width
    for box, ways in expected.items():  # all ten sizes and thirteen places are equally likely
        assert drawn[box] == pytest.approx(num_draws * ways / 130, abs=5.5 * (num_draws * ways / 130) ** 0.5)


def test_multi_scale_snaps_to_the_frame_size() -> None:
    heights = {multi_scale_box(clip_rng(0, 0, i, 0), 256, 340, 224).height for i in range(200)}
    assert heights == {256, 224, 192, 168}  # 0.875 * 256 is 224 already, 0.66 * 256 = 168.96
    assert 224 in {multi_scale_box(clip_rng(0, 0, i, 0), 226, 340, 224).height for i in range(50)}
    assert 224 not in {multi_scale_box(clip_rng(0, 0, i, 0), 227, 340, 224).height for i in range(50)}
    assert 224 not in {multi_scale_box(clip_rng(0, 0, i, 0), 222, 340, 224).height for i in range(50)}  # would not fit


def test_random_resized_boxes() -> None:
    height, width, low, high = 180, 320, 0.3, 0.8
    boxes = [random_resized_box(clip_rng(0, 0, i, 0), height, width, (low, high)) for i in range(1500)]
    shares = np.array([b.height * b.width / (height * width) for b in boxes])
    aspects = np.array([b.width / b.height for b in boxes])
    centre = np.array([(b.top + b.height / 2, b.left + b.width / 2) for b in boxes]).mean(0)
    assert all(0 <= b.top <= height - b.height and 0 <= b.left <= width - b.width for b in boxes)
    assert 0.29 < shares.min() < 0.31
    assert shares.max() < 0.81
    assert 0.74 < aspects.min() < 0.76
    assert 1.32 < aspects.max() < 1.35
    assert np.abs(centre - (height / 2, width / 2)).max() < 3
    small = [random_resized_box(clip_rng(0, 0, i, 0), 200, 200, (0.2, 0.4)) for i in range(1500)]
    area = np.array([b.height * b.width / 40000 for b in small])
    assert area.mean() == pytest.approx(0.3, abs=0.01)  # uniform: nothing is rejected here
    assert np.log([b.width / b.height for b in small]).mean() == pytest.approx(0, abs=0.02)


def test_random_resized_falls_back_to_the_centre() -> None:
    assert random_resized_box(clip_rng(0, 0, 0, 0), 10, 1000, (1.0, 1.0)) == CropBox(0, 495, 10, 10)


@pytest.mark.parametrize(
    ("size", "box"), [((7, 10), CropBox(0, 1, 7, 7)), ((10, 7), CropBox(1, 0, 7, 7)), ((5, 5), CropBox(0, 0, 5, 5))]
)
def test_center_box(size: tuple[int, int], box: CropBox) -> None:
    assert center_box(*size) == box


def test_draw_view_takes_the_crop_it_is_told() -> None:
    def draw(crop: str, flip: bool = False) -> View:
        return draw_view(clip_rng(0, 0, 5, 0), 120, 160, crop=crop, frame_size=64, flip=flip)  # type: ignore[arg-type]

    assert draw("center").box == center_box(120, 160)
    assert draw("multi_scale").box == multi_scale_box(clip_rng(0, 0, 5, 0), 120, 160, 64)
    assert draw("random_resized").box == random_resized_box(clip_rng(0, 0, 5, 0), 120, 160, (0.5, 1.0))
    assert draw("multi_scale", flip=True).box == draw("multi_scale").box
    views = [draw_view(clip_rng(0, 0, i, 0), 9, 9, crop="center", frame_size=8, flip=True) for i in range(400)]
    assert 160 < sum(v.flip for v in views) < 240
    assert not any(draw_view(clip_rng(0, 0, i, 0), 9, 9, crop="center", frame_size=8).flip for i in range(50))


@pytest.mark.parametrize(
    ("box", "frame_size"),
    [
        (CropBox(0, 0, 60, 80), 32),  # shrinks, and not by the same factor both ways
        (CropBox(7, 11, 40, 35), 48),  # grows
        (CropBox(5, 3, 33, 33), 33),  # stays
        (CropBox(59, 79, 1, 1), 8),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_apply_view_agrees_with_pillow(box: CropBox, frame_size: int, flip: bool) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), dtype=np.uint8)
    clip = apply_view(frames, View(box, flip), frame_size)
    assert (clip.shape, clip.dtype) == ((3, 3, frame_size, frame_size), torch.uint8)
    assert clip.is_contiguous()
    for time, frame in enumerate(frames):
        image = Image.fromarray(frame).crop((box.left, box.top, box.left + box.width, box.top + box.height))
        image = image.resize((frame_size, frame_size), Image.Resampling.BILINEAR)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = np.abs(clip[:, time].permute(1, 2, 0).numpy().astype(int) - np.asarray(image))
        assert difference.max() <= 1
    assert torch.equal(apply_view(torch.from_numpy(frames), View(box, flip), frame_size), clip)


def _plan(seed: int = 3, epoch: int = 1, sample: int = 4, **config: object) -> ClipPlan:
    data = DataConfig(stride=2, flip=True, **config)  # type: ignore[arg-type]
    size = {"num_frames": 4, "frame_size": 16, "total_frames": 100, "height": 48, "width": 64}
    return plan_clip(data, seed, epoch, sample, **size)


@pytest.mark.parametrize("crop", ["multi_scale", "random_resized"])
def test_a_plan_is_what_the_generators_of_its_crops_draw(crop: CropKind) -> None:
    plan = _plan(crop=crop, repeat=3)
    rng = clip_rng(3, 1, 4, 0)
    assert plan.frame_ids == tuple(frame_ids(100, 4, 2, rng))
    drawn = [draw_view(r, 48, 64, crop=crop, frame_size=16, flip=True) for r in (rng, clip_rng(3, 1, 4, 1))]
    assert list(plan.views[:2]) == drawn
    assert len(plan.views) == len(set(plan.views)) == 3
    assert _plan(crop=crop) == ClipPlan(plan.frame_ids, plan.views[:1])
    others = {_plan(crop=crop, **{key: 9}) for key in ("seed", "epoch", "sample")}
    assert len(others | {_plan(crop=crop)}) == 4


def test_plans_do_not_change() -> None:
    """A run that is resumed with another release must see the same clips."""
    views = View(CropBox(4, 24, 31, 31)), View(CropBox(6, 32, 36, 31), flip=True)
    assert _plan(repeat=2) == ClipPlan((55, 57, 59, 61), views)
    assert epoch_order(3, 1, 8).tolist() == [0, 5, 3, 2, 1, 6, 7, 4]
    assert draw_replacement(3, 1, 4, {4}, 100) == 55


def test_replacements_are_any_other_video() -> None:
    drawn = Counter(draw_replacement(0, 0, sample, {0, 2}, 5) for sample in range(900))
    assert set(drawn) == {1, 3, 4}
    assert sum((n - 300) ** 2 / 300 for n in drawn.values()) < 13.8  # chi-square, 2 degrees, p = 0.001
