"""What fine-tuning does to a batch on the device: RandAugment, random erasing, mixup or cutmix, soft labels.

In this order, as published. Random numbers come from (seed, key) alone, so that a resumed run repeats them; only the
noise of erased boxes is drawn on the device, and so differs from one kind of device to another.

Letters: B clips, C channels, T frames, H, W pixels, n erased clips, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adamae_fast.config_finetune import AugmentConfig
from adamae_fast.data.clips import CropBox, derived_rng
from adamae_fast.data.rand_augment import from_unit, rand_augment, require_kornia, to_device, to_unit

ERASED_AREA = (0.02, 1 / 3)
"""Smallest and largest share of the frame that an erased box has."""

ERASED_ASPECT = (0.3, 1 / 0.3)
"""Smallest and largest height / width of an erased box."""

ERASE_TRIES = 100
"""Boxes drawn before a clip is left as it is."""


class Augment:
    """Everything that ``config`` asks for, for the batches of one run.

    Args:
        config: how much of what.
        num_classes: K.
        seed: of the run.
        pixel_mean: of red, green and blue in [0, 1] units, the mean of the noise in erased boxes.
        pixel_std: likewise, its standard deviation.

    Raises:
        ValueError: RandAugment is on and kornia is not installed.
    """

    def __init__(
        self,
        config: AugmentConfig,
        num_classes: int,
        seed: int,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        if config.layers:
            require_kornia()
        self.config = config
        self.num_classes = num_classes
        self.seed = seed
        self.pixel_mean = tuple(pixel_mean)
        self.pixel_std = tuple(pixel_std)

    def __call__(self, video_BCTHW: Tensor, labels_B: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Augmented clips and their soft labels. The inputs stay as they are.

        Args:
            video_BCTHW: uint8, or floating in [0, 1]; three channels.
            labels_B: int64, on the same device, each in 0 … K - 1.
            key: what names this batch among all of the run: its number, and the rank where there are several.

        Returns:
            The clips, of the same shape, dtype and range, and float32 (B, K) whose rows sum to 1.

        Raises:
            ValueError: a video of another shape or dtype.
        """
        is_pixels = video_BCTHW.dtype == torch.uint8 or video_BCTHW.is_floating_point()
        if video_BCTHW.ndim != 5 or video_BCTHW.shape[1] != 3 or not is_pixels:
            raise ValueError(
                f"video of shape {tuple(video_BCTHW.shape)}, {video_BCTHW.dtype}: give (B, 3, T, H, W) of uint8, or of "
                "a floating type in [0, 1]"
            )
        config = self.config
        rng = derived_rng(self.seed, "augment", *key)
        video = video_BCTHW
        if config.layers:
            video = rand_augment(video, config.layers, config.magnitude, config.magnitude_std, rng)
        if config.erase:
            video = random_erase(video, config.erase, rng, self.pixel_mean, self.pixel_std)
        targets_BK = smooth_labels(labels_B, self.num_classes, config.label_smoothing)
        if config.mixup or config.cutmix:
            video, targets_BK = mix(video, targets_BK, config.mixup, config.cutmix, config.switch, rng)
        return video, targets_BK


def smooth_labels(labels_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """float32 (B, K): 1 - s + s / K for the clip's own class, s / K for each other one."""
    rest = smoothing / num_classes
    targets_BK = torch.full((len(labels_B), num_classes), rest, device=labels_B.device)
    return targets_BK.scatter_(1, labels_B[:, None], 1 - smoothing + rest)


def mix(
    video_BCTHW: Tensor,
    targets_BK: Tensor,
    mixup: float,
    cutmix: float,
    switch: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Mix clip i with clip B - 1 - i, all by the same weight: by mixup, or, with probability ``switch``, by cutmix.

        mixup    w ~ Beta(mixup, mixup)     video = w · own + (1 - w) · other
        cutmix   w ~ Beta(cutmix, cutmix)   a box of √(1 - w) of both sides, in all frames, comes from the other;
                                            centred anywhere, it is cut at the edges, and w becomes 1 - its area / (H·W)
        labels   w · own + (1 - w) · other

    (Zhang et al. 2018, eq. 1; Yun et al. 2019, eq. 1–2.) A parameter of 0 leaves only the other way.
    """
    height, width = video_BCTHW.shape[3:]
    use_cutmix = cutmix > 0 and (mixup == 0 or rng.random() < switch)
    if use_cutmix:
        box = cutmix_box(float(rng.beta(cutmix, cutmix)), height, width, rng)
        weight = 1 - box.height * box.width / (height * width)
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        mixed_BCTHW = video_BCTHW.clone()
        mixed_BCTHW[..., rows, columns] = video_BCTHW[..., rows, columns].flip(0)
    else:
        weight = float(rng.beta(mixup, mixup))
        own_BCTHW = video_BCTHW.float()
        mixed_BCTHW = torch.lerp(own_BCTHW.flip(0), own_BCTHW, weight)
        mixed_BCTHW = (mixed_BCTHW if video_BCTHW.is_floating_point() else mixed_BCTHW.round()).to(video_BCTHW.dtype)
    return mixed_BCTHW, weight * targets_BK + (1 - weight) * targets_BK.flip(0)


def cutmix_box(weight: float, height: int, width: int, rng: np.random.Generator) -> CropBox:
    """A box of ⌊√(1 - weight) · side⌋ pixels both ways, its centre uniform over the frame, cut at the edges."""
    ratio = math.sqrt(1 - weight)
    box_height, box_width = int(height * ratio), int(width * ratio)
    top = int(rng.integers(height)) - box_height // 2
    left = int(rng.integers(width)) - box_width // 2
    bottom, right = min(height, top + box_height), min(width, left + box_width)
    return CropBox(max(0, top), max(0, left), bottom - max(0, top), right - max(0, left))


def random_erase(
    video_BCTHW: Tensor,
    probability: float,
    rng: np.random.Generator,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> Tensor:
    """In a share of the clips, replace a box, the same in all frames, by noise (Zhong et al. 2020).

    Every value in the box is drawn anew, N(mean, std) of its channel: standard normal after normalisation, as
    published, except that values outside [0, 1] are cut off.
    """
    num_clips, _, _, height, width = video_BCTHW.shape
    boxes: dict[int, CropBox] = {}
    for clip in np.flatnonzero(rng.random(num_clips) < probability).tolist():
        box = erased_box(height, width, rng)
        if box is not None:
            boxes[clip] = box
    noise_seed = int(rng.integers(2**63))
    if not boxes:
        return video_BCTHW
    device = video_BCTHW.device
    index_n = to_device(np.array(list(boxes)), device)
    edges_4n = to_device(
        np.array([(b.top, b.top + b.height, b.left, b.left + b.width) for b in boxes.values()]).T.copy(), device
    )
    top, bottom, left, right = edges_4n[:, :, None, None, None, None].unbind()
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)
    inside_n11HW = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    clips_nCTHW = to_unit(video_BCTHW.index_select(0, index_n))
    generator = torch.Generator(device).manual_seed(noise_seed)
    noise_nCTHW = torch.randn(clips_nCTHW.shape, generator=generator, device=device)
    mean_C111, std_C111 = (
        to_device(np.array(values, np.float32), device)[:, None, None, None] for values in (pixel_mean, pixel_std)
    )
    erased_nCTHW = torch.where(inside_n11HW, noise_nCTHW * std_C111 + mean_C111, clips_nCTHW)
    return video_BCTHW.index_copy(0, index_n, from_unit(erased_nCTHW, video_BCTHW.dtype))


def erased_box(height: int, width: int, rng: np.random.Generator) -> CropBox | None:
    """A box smaller than the frame both ways, its area uniform and its aspect log-uniform; None if none was found."""
    log_low, log_high = (math.log(aspect) for aspect in ERASED_ASPECT)
    for _ in range(ERASE_TRIES):
        area = rng.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(rng.uniform(log_low, log_high))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_height < height and 0 < box_width < width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return CropBox(top, left, box_height, box_width)
    return None
