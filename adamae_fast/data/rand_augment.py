"""RandAugment for clips on the device: the operations are kornia's, what is drawn is the recipe's.

The recipe (``rand-m7-n4-mstd0.5-inc1`` in the published code) draws ``layers`` of the fifteen operations for each clip,
with replacement; each is carried out with probability 0.5, at a strength m ~ N(magnitude, magnitude_std) cut to 0 … 10,
and operations that have a direction turn it around with probability 0.5. With a = m / 10:

==============================  ==================================================================
auto_contrast, equalize         of each frame and channel
invert                          1 - x
posterize                       4 - ⌊4a⌋ bits
solarize                        invert values from 256 - ⌊256a⌋ on
solarize_add                    add ⌊110a⌋ to values below 128
colour, contrast, brightness,   blend with grey, with the frame's mean grey, with black, with the
sharpness                       smoothed frame; factor 1 ± 0.9a
rotate                          ± 30a degrees about the centre
shear_x, shear_y                ± 0.3a
translate_x, translate_y        ± 0.45a of the side
==============================  ==================================================================

All frames of a clip share operations, strengths and directions; statistics (contrast, equalize) are the frame's own.

kornia's own RandAugment class is not used: it draws the same operations for a whole batch, a fixed strength, no
probability, and from the global generator. What differs from the published code: clips are augmented after they were
cropped, not before; geometry is bilinear, not bicubic (what comes in from outside is grey, 128, in both); blends round
to the nearest level, where Pillow cuts off.

Letters: B clips, L layers, C channels, T frames, H, W pixels, N frames of several clips.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

PROBABILITY = 0.5
"""Share of the drawn operations that are carried out."""

MAX_MAGNITUDE = 10.0
FILL = 128 / 255
"""What lies outside the frame."""

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""frames_NCHW in [0, 1], strength a_N in [0, 1], direction ±1 (N,) → frames_NCHW."""


def require_kornia() -> None:
    """Raise ValueError where kornia is not installed."""
    if importlib.util.find_spec("kornia") is None:
        raise ValueError("augment.layers: RandAugment needs kornia, which is not installed; install it, or choose 0")


def rand_augment(
    video_BCTHW: Tensor, layers: int, magnitude: float, magnitude_std: float, rng: np.random.Generator
) -> Tensor:
    """Change each clip by operations of its own: uint8, or floating in [0, 1] → the same shape, dtype and range.

    Everything random comes from ``rng``, on the host; nothing waits for the device. The input stays as it is.
    """
    num_clips, num_frames = video_BCTHW.shape[0], video_BCTHW.shape[2]
    names = list(OPERATIONS)
    drawn_LB = rng.integers(len(names), size=(layers, num_clips))
    done_LB = rng.random((layers, num_clips)) < PROBABILITY
    strength_LB = rng.normal(magnitude, magnitude_std, (layers, num_clips)).clip(0, MAX_MAGNITUDE) / MAX_MAGNITUDE
    direction_LB = rng.choice((-1.0, 1.0), (layers, num_clips))
    video = video_BCTHW.clone()
    for layer in range(layers):
        for operation, name in enumerate(names):
            clips = np.flatnonzero(done_LB[layer] & (drawn_LB[layer] == operation))
            if not clips.size:
                continue
            index = to_device(clips, video.device)
            strength_N, direction_N = (
                to_device(values[layer, clips].repeat(num_frames).astype(np.float32), video.device)
                for values in (strength_LB, direction_LB)
            )
            clips_nTCHW = video.index_select(0, index).transpose(1, 2)
            frames_NCHW = OPERATIONS[name](to_unit(clips_nTCHW.flatten(0, 1)), strength_N, direction_N).clamp(0, 1)
            changed_nTCHW = from_unit(frames_NCHW, video.dtype).unflatten(0, clips_nTCHW.shape[:2])
            video.index_copy_(0, index, changed_nTCHW.transpose(1, 2))
    return video


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_unit(pixels: Tensor) -> Tensor:
    """float32 in [0, 1], or the floating input itself in float32."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def from_unit(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`to_unit` came from; values outside [0, 1] are cut off, levels rounded."""
    pixels = pixels.clamp(0, 1)
    return (pixels * 255).round().to(dtype) if dtype == torch.uint8 else pixels.to(dtype)


def _auto_contrast(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    low, high = frames_NCHW.amin((2, 3), keepdim=True), frames_NCHW.amax((2, 3), keepdim=True)
    return torch.where(high > low, (frames_NCHW - low) / (high - low), frames_NCHW)


def _equalize(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    from kornia.enhance import equalize

    return equalize(frames_NCHW)


def _invert(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    return 1 - frames_NCHW


def _posterize(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    from kornia.enhance import posterize

    return posterize(frames_NCHW, 4 - (4 * strength_N).long())


def _solarize(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    from kornia.enhance import solarize

    return solarize(frames_NCHW, (256 - (256 * strength_N).floor()) / 255)


def _solarize_add(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    # kornia's solarize with additions is another operation: it adds to all values, then inverts the bright ones.
    added = frames_NCHW + ((110 * strength_N).floor() / 255)[:, None, None, None]
    return torch.where(frames_NCHW < 128 / 255, added, frames_NCHW)


def _factor(strength_N: Tensor, direction_N: Tensor) -> Tensor:
    return 1 + direction_N * 0.9 * strength_N


def _colour(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(frames_NCHW, _factor(strength_N, direction_N))


def _contrast(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    from kornia.enhance import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(frames_NCHW, _factor(strength_N, direction_N))


def _brightness(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    from kornia.enhance import adjust_brightness_accumulative

    return adjust_brightness_accumulative(frames_NCHW, _factor(strength_N, direction_N))


def _sharpness(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    from kornia.enhance import sharpness

    return sharpness(frames_NCHW, _factor(strength_N, direction_N))


def _rotate(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    angle_N = direction_N * strength_N * math.radians(30)
    cosine_N, sine_N = angle_N.cos(), angle_N.sin()
    height, width = frames_NCHW.shape[2:]
    x, y = (width - 1) / 2, (height - 1) / 2  # counter-clockwise about the centre; y runs down
    return _move(
        frames_NCHW,
        ((cosine_N, sine_N, x - cosine_N * x - sine_N * y), (-sine_N, cosine_N, y + sine_N * x - cosine_N * y)),
    )


def _shear_x(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    shear_N = direction_N * 0.3 * strength_N  # about the frame's upper left corner, half a pixel from pixel (0, 0)
    return _move(frames_NCHW, ((1.0, -shear_N, -shear_N / 2), (0.0, 1.0, 0.0)))


def _shear_y(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    shear_N = direction_N * 0.3 * strength_N
    return _move(frames_NCHW, ((1.0, 0.0, 0.0), (-shear_N, 1.0, -shear_N / 2)))


def _translate_x(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    return _move(frames_NCHW, ((1.0, 0.0, -direction_N * 0.45 * strength_N * frames_NCHW.shape[3]), (0.0, 1.0, 0.0)))


def _translate_y(frames_NCHW: Tensor, strength_N: Tensor, direction_N: Tensor) -> Tensor:
    return _move(frames_NCHW, ((1.0, 0.0, 0.0), (0.0, 1.0, -direction_N * 0.45 * strength_N * frames_NCHW.shape[2])))


def _move(frames_NCHW: Tensor, rows: tuple[tuple[Tensor | float, ...], ...]) -> Tensor:
    """Bring pixel (x, y) to the 2×3 matrix times (x, y, 1)."""
    from kornia.geometry.transform import warp_affine

    num_frames, channels, height, width = frames_NCHW.shape
    ones_N = frames_NCHW.new_ones(num_frames)
    matrix_N23 = torch.stack([torch.stack([entry * ones_N for entry in row], dim=1) for row in rows], dim=1)
    fill_C = frames_NCHW.new_full((channels,), FILL)
    return warp_affine(frames_NCHW, matrix_N23, (height, width), padding_mode="fill", fill_value=fill_C)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "colour": _colour,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""All fifteen; their order decides what a seed draws."""
