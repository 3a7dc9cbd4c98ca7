from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from adamae_fast.config_finetune import AugmentConfig
from adamae_fast.data.augment import Augment, cutmix_box, erased_box, mix, random_erase, smooth_labels

MEAN, STD = (0.5, 0.45, 0.4), (0.1, 0.08, 0.06)
NUM_CLASSES = 7


def _augment(seed: int = 0, **config: float) -> Augment:
    off = {"layers": 0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
    return Augment(AugmentConfig(**{**off, **config}), NUM_CLASSES, seed, pixel_mean=MEAN, pixel_std=STD)  # type: ignore[arg-type]


def _constant_clips(num_clips: int, height: int = 17, width: int = 23, num_frames: int = 3) -> tuple[Tensor, Tensor]:
    """Clip i is 20·i everywhere, and of class i."""
    values = 20 * torch.arange(num_clips, dtype=torch.uint8)
    return values[:, None, None, None, None].expand(-1, 3, num_frames, height, width).clone(), torch.arange(num_clips)


def _rng(number: int) -> np.random.Generator:
    return np.random.default_rng([7, number])


def test_defaults_are_the_recipe() -> None:
    config = AugmentConfig()
    assert (config.layers, config.magnitude, config.magnitude_std) == (4, 7, 0.5)
    assert (config.erase, config.mixup, config.cutmix, config.switch) == (0.25, 0.8, 1.0, 0.5)
    assert config.label_smoothing == 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", -1),
        ("magnitude", 10.5),
        ("magnitude_std", -0.1),
        ("erase", 1.5),
        ("mixup", -0.1),
        ("cutmix", -1.0),
        ("switch", 2.0),
        ("label_smoothing", 1.0),
    ],
)
def test_bad_values_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"augment\.{key}={value}: choose"):
        AugmentConfig(**{key: value})  # type: ignore[arg-type]


def test_smoothing() -> None:
    targets = smooth_labels(torch.tensor([2, 0]), 4, 0.1)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    logits, labels = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 8, 3, 3, 1])
    by_torch = F.cross_entropy(logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(F.cross_entropy(logits, smooth_labels(labels, 9, 0.3)), by_torch)
    assert torch.equal(smooth_labels(labels, 9, 0.0), F.one_hot(labels, 9).float())


def test_mixtures_have_the_weight_that_their_labels_say() -> None:
    video, labels = _constant_clips(5)
    weights = []
    for i in range(2000):
        mixed, targets = mix(video[:, :, :1, :1, :1].float() / 255, smooth_labels(labels, 5, 0.0), 0.8, 0, 0.5, _rng(i))
        weight = float(targets[0, 0])
        weights.append(weight)
        own = torch.arange(5) * 20 / 255
        expected = weight * own + (1 - weight) * own.flip(0)
        torch.testing.assert_close(mixed[:, 0, 0, 0, 0], expected, atol=1e-6, rtol=0)
        identity = torch.eye(5)
        torch.testing.assert_close(targets, weight * identity + (1 - weight) * identity.flip(0), atol=1e-6, rtol=0)
    centred = np.array(weights) - 0.5
    # Beta(a, a): variance 1 / (4 (2a + 1)), excess kurtosis -6 / (2a + 3).
    assert abs(centred.mean()) < 4 * (1 / 10.4 / 2000) ** 0.5
    assert centred.var() == pytest.approx(1 / 10.4, rel=0.05)
    assert (centred**4).mean() / centred.var() ** 2 - 3 == pytest.approx(-6 / 4.6, abs=0.06)


def test_mixtures_of_uint8_are_rounded_once() -> None:
    video = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 2, 5, 7), dtype=np.uint8))
    before = video.clone()
    mixed, targets = mix(video, smooth_labels(torch.arange(4), 4, 0.1), 0.8, 0, 0.5, _rng(3))
    weight = float(_rng(3).beta(0.8, 0.8))
    exact = weight * video.double() + (1 - weight) * video.flip(0).double()
    assert mixed.dtype == torch.uint8
    assert (mixed.double() - exact).abs().max() <= 0.5 + 1e-4
    assert torch.equal(video, before)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


@pytest.mark.parametrize(("height", "width"), [(17, 23), (16, 16), (5, 9)])
def test_boxes_of_others_have_the_area_that_their_labels_say(height: int, width: int) -> None:
    video, labels = _constant_clips(4, height, width)
    shares = []
    for i in range(60):
        mixed, targets = mix(video, smooth_labels(labels, 4, 0.0), 0, 1.0, 0.5, _rng(i))
        assert mixed.dtype == torch.uint8
        for own in range(4):
            other = 3 - own
            assert set(mixed[own].unique().tolist()) <= {20 * own, 20 * other}
            is_other = mixed[own] == 20 * other
            assert torch.equal(is_other, is_other[:1, :1].expand_as(is_other))  # in all channels and frames
            rows, columns = is_other[0, 0].any(1).nonzero(), is_other[0, 0].any(0).nonzero()
            area = int(is_other[0, 0].sum())
            if area:  # a full rectangle
                assert area == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            expected = torch.zeros(4)
            expected[own], expected[other] = 1 - area / (height * width), area / (height * width)
            torch.testing.assert_close(targets[own], expected, atol=1e-7, rtol=0)
        shares.append(area)
    assert len(set(shares)) > 5


def test_boxes_of_cutmix() -> None:
    assert cutmix_box(1.0, 20, 30, _rng(0)).height == 0
    corners = Counter()
    for i in range(2000):
        box = cutmix_box(0.75, 20, 30, _rng(i))  # half of each side: 10 × 15, cut where its centre is near an edge
        assert 0 <= box.top <= box.top + box.height <= 20
        assert 0 <= box.left <= box.left + box.width <= 30
        assert 5 <= box.height <= 10
        assert 7 <= box.width <= 15
        if 0 < box.top < 10:
            assert box.height == 10
        if 0 < box.left < 15:
            assert box.width == 15
        corners[box.top] += 1
    # Centre row c = 0 … 19 puts the top at max(0, c - 5): six centres lead to 0, one to each of 1 … 14.
    expected = {0: 600, **dict.fromkeys(range(1, 15), 100)}
    assert set(corners) == set(expected)
    assert sum((corners[top] - n) ** 2 / n for top, n in expected.items()) < 36.1  # chi-square, 14 degrees, p = 0.001


@pytest.mark.parametrize(
    ("mixup", "cutmix", "switch", "share"),
    [
        (0.8, 1.0, 0.5, 0.5),
        (0.8, 1.0, 0.2, 0.2),
        (0.8, 1.0, 0.0, 0.0),
        (0.8, 1.0, 1.0, 1.0),
        (0, 1.0, 0.0, 1.0),  # where one is off, the switch does not matter
        (0.8, 0, 1.0, 0.0),
    ],
)
def test_how_often_boxes_replace_mixtures(mixup: float, cutmix: float, switch: float, share: float) -> None:
    video = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 3, 1, 8, 8)
    targets = smooth_labels(torch.arange(2), 2, 0.0)
    boxes = 0
    for i in range(600):
        mixed, _ = mix(video, targets, mixup, cutmix, switch, _rng(i))
        boxes += set(mixed.unique().tolist()) <= {0.0, 1.0}
    assert abs(boxes / 600 - share) <= 4 * (share * (1 - share) / 600) ** 0.5


def test_single_clips_and_odd_batches() -> None:
    for num_clips in (1, 3):
        video, labels = _constant_clips(num_clips)
        mixed, targets = mix(video, smooth_labels(labels, 3, 0.0), 0.8, 1.0, 0.5, _rng(1))
        middle = num_clips // 2  # meets itself
        assert torch.equal(mixed[middle], video[middle])
        assert targets[middle, middle] == 1


def test_erased_boxes_are_the_same_in_all_frames() -> None:
    video = torch.full((200, 3, 4, 31, 27), 255, dtype=torch.uint8)
    erased = random_erase(video, 0.25, _rng(0), MEAN, STD)
    assert (erased.shape, erased.dtype) == (video.shape, torch.uint8)
    assert torch.equal(video, torch.full_like(video, 255))
    changed = (erased != video).any(1).any(1)  # noise this far from 255 never looks like it
    hit = changed.flatten(1).any(1)
    assert 30 <= int(hit.sum()) <= 70
    for clip, mask in zip(erased[hit], changed[hit], strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = clip[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box < 255).all()  # all of the box, in every channel and frame
        assert mask.sum() == len(rows) * len(columns)
        assert 0.01 < len(rows) * len(columns) / (31 * 27) < 0.37
        assert not torch.equal(box[:, 0], box[:, 1])


def test_erased_pixels_are_normal_noise() -> None:
    video = torch.full((8, 3, 6, 64, 64), -1.0)
    erased = random_erase(video, 1.0, _rng(0), MEAN, STD)
    for c in range(3):
        noise = erased[:, c][erased[:, c] > 0]
        assert len(noise) > 5000
        assert noise.mean() == pytest.approx(MEAN[c], abs=5 * STD[c] / len(noise) ** 0.5)
        assert noise.std() == pytest.approx(STD[c], rel=0.05)
        assert len(noise.unique()) > 0.9 * len(noise)


def test_erased_boxes() -> None:
    boxes = [erased_box(200, 300, _rng(i)) for i in range(1500)]
    assert all(box is not None for box in boxes)
    found = [box for box in boxes if box is not None]
    shares = np.array([box.height * box.width / 60000 for box in found])
    aspects = np.log([box.height / box.width for box in found])
    assert all(0 <= b.top <= 200 - b.height and 0 <= b.left <= 300 - b.width for b in found)
    assert all(b.height < 200 and b.width < 300 for b in found)
    assert 0.019 < shares.min() < 0.025
    assert 0.31 < shares.max() < 0.335
    assert np.log(0.29) < aspects.min() < np.log(0.35)
    assert aspects.max() < np.log(3.4)
    corners = np.array([((b.top + b.height / 2) / 200, (b.left + b.width / 2) / 300) for b in found])
    assert np.abs(corners.mean(0) - 0.5).max() < 0.02
    square = [erased_box(1000, 1000, _rng(i)) for i in range(1500)]
    areas = np.array([box.height * box.width / 1e6 for box in square if box is not None])
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)  # hardly any box is too long


def test_a_frame_too_small_for_a_box_stays() -> None:
    assert erased_box(1, 1, _rng(0)) is None
    video = torch.full((4, 3, 2, 1, 1), 9, dtype=torch.uint8)
    assert torch.equal(random_erase(video, 1.0, _rng(0), MEAN, STD), video)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_everything_together(dtype: torch.dtype) -> None:
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 3, 19, 21), dtype=np.uint8))
    video = levels if dtype == torch.uint8 else (levels.float() / 255).to(dtype)
    before, labels = video.clone(), torch.tensor([0, 6, 3, 3, 1, 5])
    augment = Augment(AugmentConfig(erase=0.5), NUM_CLASSES, 11, pixel_mean=MEAN, pixel_std=STD)
    state = torch.random.get_rng_state()
    seen = []
    for key in [(0,), (1,), (2,), (0, 1), (0,)]:
        changed, targets = augment(video, labels, *key)
        assert (changed.shape, changed.dtype) == (video.shape, dtype)
        assert changed.min() >= 0
        assert changed.max() <= (255 if dtype == torch.uint8 else 1)
        assert (targets.shape, targets.dtype) == ((6, NUM_CLASSES), torch.float32)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        assert targets.min() >= 0.1 / NUM_CLASSES - 1e-6
        seen.append((changed, targets))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(video, before)
    assert torch.equal(seen[0][0], seen[-1][0])
    assert torch.equal(seen[0][1], seen[-1][1])
    assert len({changed.float().numpy().tobytes() for changed, _ in seen}) == 4
    other = Augment(AugmentConfig(erase=0.5), NUM_CLASSES, 12, pixel_mean=MEAN, pixel_std=STD)(video, labels, 0)
    assert not torch.equal(other[0], seen[0][0])


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values: to ask for one, or for a shape that depends on one, is an error."""
    augment = Augment(AugmentConfig(erase=0.9), NUM_CLASSES, 0, pixel_mean=MEAN, pixel_std=STD)
    video, labels = torch.zeros(64, 3, 2, 9, 11, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for key in range(4):  # boxes and mixtures
            changed, targets = augment(mode.from_tensor(video), mode.from_tensor(labels), key)
            assert isinstance(changed, FakeTensor)
            assert isinstance(targets, FakeTensor)


def test_all_turned_off() -> None:
    video, labels = _constant_clips(4)
    changed, targets = _augment(label_smoothing=0.1)(video, labels, 0)
    assert torch.equal(changed, video)
    assert torch.equal(targets, smooth_labels(labels, NUM_CLASSES, 0.1))


@pytest.mark.parametrize(
    "video", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 1, 8, 8), torch.zeros(2, 3, 1, 8, 8, dtype=torch.int64)]
)
def test_other_shapes_and_types_are_refused(video: Tensor) -> None:
    with pytest.raises(ValueError, match=r"give \(B, 3, T, H, W\) of uint8"):
        _augment()(video, torch.zeros(2, dtype=torch.int64), 0)
