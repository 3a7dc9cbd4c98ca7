from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F

from adamae_fast.config_finetune import AugmentConfig
from adamae_fast.data import rand_augment as module
from adamae_fast.data.augment import Augment
from adamae_fast.data.rand_augment import OPERATIONS, from_unit, rand_augment, to_unit

POINTWISE = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
BLENDS = ("colour", "contrast", "brightness", "sharpness")
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
ROUNDED = (*BLENDS, "auto_contrast")
"""Where Pillow cuts off what is behind the point."""
HEIGHT, WIDTH = 37, 45


def _smooth_frame() -> Tensor:
    """uint8 (3, H, W), not using all levels."""
    coarse = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (1, 3, 6, 7)))
    return F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").round().clamp(20, 230).to(torch.uint8)[0]


def _pillow(name: str, image: Image.Image, a: float, sign: float) -> Image.Image:
    """The recipe's operations, as its authors carry them out."""
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "invert":
        return ImageOps.invert(image)
    if name == "posterize":
        return ImageOps.posterize(image, 4 - int(4 * a))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - int(256 * a))
    if name == "solarize_add":
        return image.point([min(255, level + int(110 * a)) if level < 128 else level for level in range(256)] * 3)
    if name in BLENDS:
        enhance = {"colour": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
        return getattr(ImageEnhance, enhance[name])(image).enhance(1 + sign * 0.9 * a)
    fill = (128, 128, 128) if image.mode == "RGB" else 0
    if name == "rotate":
        return image.rotate(sign * 30 * a, resample=Image.Resampling.BILINEAR, fillcolor=fill)
    coefficients = {
        "shear_x": (1, sign * 0.3 * a, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * 0.3 * a, 1, 0),
        "translate_x": (1, 0, sign * 0.45 * a * WIDTH, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * 0.45 * a * HEIGHT),
    }[name]
    size, method = image.size, Image.Transform.AFFINE
    return image.transform(size, method, coefficients, resample=Image.Resampling.BILINEAR, fillcolor=fill)


def test_there_are_fifteen_operations() -> None:
    assert sorted(OPERATIONS) == sorted((*POINTWISE, *BLENDS, *GEOMETRY))
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("a", [0.0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operations_agree_with_pillow(name: str, a: float, sign: float) -> None:
    frame = _smooth_frame()
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    # The frame is the second of three, each with a strength of its own.
    strength, direction = torch.tensor([0.5, a, 0.1]), torch.tensor([-sign, sign, 1.0])
    done = OPERATIONS[name](to_unit(torch.stack([frame.flip(2), frame, frame.flip(1)])), strength, direction)
    pixels = from_unit(done, torch.uint8)[1].permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(pixels - np.asarray(_pillow(name, image, a, sign))).max(axis=2)
    if name not in GEOMETRY:
        assert difference.max() <= (name in ROUNDED)
        return
    # Where inside and outside meet, which may be at the edge of the frame, the two blend differently.
    inside = _pillow(name, Image.new("L", image.size, 255), a, sign)
    bright, dark = inside.filter(ImageFilter.MinFilter(5)), inside.filter(ImageFilter.MaxFilter(5))
    compared = ((np.asarray(bright) == 255) | (np.asarray(dark) == 0))[2:-2, 2:-2]
    assert compared.mean() > 0.7
    assert difference[2:-2, 2:-2][compared].max() <= 1


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Strengths and directions by operation; the operations themselves change nothing."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in OPERATIONS}

    def keep(name: str) -> module.Operation:
        def operation(frames: Tensor, strength: Tensor, direction: Tensor) -> Tensor:
            calls[name].append((strength, direction))
            return frames

        return operation

    monkeypatch.setattr(module, "OPERATIONS", {name: keep(name) for name in OPERATIONS})
    return calls


def test_the_law_of_what_is_drawn(drawn: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    video = torch.zeros(6000, 3, 2, 1, 1, dtype=torch.uint8)
    rand_augment(video, 4, 7.0, 0.5, np.random.default_rng(0))
    counts = np.array([sum(len(strength) for strength, _ in calls) / 2 for calls in drawn.values()])
    expected = 6000 * 4 * 0.5 / 15
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi-square, 15 degrees (none is fixed), p = 0.001
    strength = torch.cat([s for calls in drawn.values() for s, _ in calls])
    direction = torch.cat([d for calls in drawn.values() for _, d in calls])
    assert strength.mean() == pytest.approx(0.7, abs=0.002)
    assert strength.std() == pytest.approx(0.05, abs=0.002)
    assert set(direction.tolist()) == {-1.0, 1.0}
    assert abs(direction.mean()) < 0.03
    for calls in drawn.values():
        for strengths, directions in calls:  # two frames a clip, next to each other
            assert torch.equal(strengths[::2], strengths[1::2])
            assert torch.equal(directions[::2], directions[1::2])
            assert len(strengths[::2].unique()) == len(strengths) // 2


def test_strengths_are_cut_to_their_range(drawn: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    rand_augment(torch.zeros(300, 3, 1, 1, 1), 2, 9.0, 3.0, np.random.default_rng(0))
    strength = torch.cat([s for calls in drawn.values() for s, _ in calls])
    assert (strength.min() >= 0, strength.max()) == (True, 1)
    assert 0.3 < (strength == 1).float().mean() < 0.45  # P(N(9, 3) > 10) = 0.37


def test_layers_are_carried_out_in_turn_on_the_clips_that_drew_them() -> None:
    video = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (6, 3, 2, 9, 11), dtype=np.uint8))
    changed = rand_augment(video, 3, 7.0, 0.5, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    operations, probability = rng.integers(15, size=(3, 6)), rng.random((3, 6))
    strength, direction = rng.normal(7, 0.5, (3, 6)) / 10, rng.choice((-1.0, 1.0), (3, 6))
    for b in range(6):
        clip = video[b]
        for layer in range(3):
            if probability[layer, b] < 0.5:
                operation = OPERATIONS[list(OPERATIONS)[operations[layer, b]]]
                values = (torch.full((2,), v[layer, b], dtype=torch.float32) for v in (strength, direction))
                clip = from_unit(operation(to_unit(clip.transpose(0, 1)), *values), torch.uint8).transpose(0, 1)
        assert torch.equal(changed[b], clip)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_frames_change_alike_and_clips_differently(dtype: torch.dtype) -> None:
    frame = from_unit(to_unit(_smooth_frame()), dtype)
    video = frame[None, :, None].expand(12, 3, 5, HEIGHT, WIDTH).contiguous()
    before = video.clone()
    changed = rand_augment(video, 4, 7.0, 0.5, np.random.default_rng(0))
    assert torch.equal(video, before)
    assert (changed.shape, changed.dtype) == (video.shape, dtype)
    assert changed.is_floating_point() == dtype.is_floating_point
    assert changed.min() >= 0
    assert changed.max() <= (255 if dtype == torch.uint8 else 1)
    for t in range(1, 5):
        assert torch.equal(changed[:, :, t], changed[:, :, 0])
    assert len({clip.numpy().tobytes() for clip in changed}) >= 10
    assert torch.equal(rand_augment(video, 4, 7.0, 0.5, np.random.default_rng(0)), changed)
    assert not torch.equal(rand_augment(video, 4, 7.0, 0.5, np.random.default_rng(1)), changed)


def test_kornia_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    constants = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.2, 0.2, 0.2)}
    with pytest.raises(ValueError, match=r"augment\.layers.*kornia, which is not installed"):
        Augment(AugmentConfig(), 3, 0, **constants)
    Augment(AugmentConfig(layers=0), 3, 0, **constants)
