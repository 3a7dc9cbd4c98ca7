"""Knobs of what sees labels: clips for fine-tuning, views for testing, augmentation.

As in :mod:`adamae_fast.config`: frozen keyword-only dataclasses that check their own values. Defaults are the recipe
for Kinetics-400 (paper Table 6, with the corrections of the published code); what SSv2 wants is said at the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adamae_fast.config import CropKind, DataConfig, _require

Sampling = Literal["dense", "segments"]


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(DataConfig):
    """Where labelled clips come from and how they are cut."""

    sampling: Sampling = "dense"
    """dense: consecutive frames, data.stride apart; segments: one frame of each of as many equal parts of the video as
    the clip has frames (SSv2), where data.stride has no effect."""

    crop: CropKind = "random_resized"
    """random_resized: area in random_resized_scale; multi_scale: VideoMAE's crop; center: the largest square."""

    random_resized_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the frame's area for crop=random_resized."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Which views of a video are tested: temporal × spatial. One of each is the centre clip."""

    temporal: int = 5
    """Clips along time, evenly placed (5 for K400, 2 for SSv2)."""

    spatial: int = 3
    """Squares along the longer side, evenly placed."""

    def __post_init__(self) -> None:
        _require(self.temporal >= 1, "views.temporal", self.temporal, "choose at least 1 clip of each video")
        _require(self.spatial >= 1, "views.spatial", self.spatial, "choose at least 1 square of each clip")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to labelled clips on the device, and to their labels, in this order."""

    layers: int = 4
    """RandAugment: operations drawn for each clip, each carried out with probability 0.5; 0 turns it off."""

    magnitude: float = 7.0
    """RandAugment: mean strength of an operation, 0 to 10; larger ones change the clip more."""

    magnitude_std: float = 0.5
    """RandAugment: standard deviation of the strength, which is cut to 0 to 10."""

    erase: float = 0.25
    """Share of the clips in which a box, the same in all frames, becomes noise."""

    mixup: float = 0.8
    """a of the Beta(a, a) that a clip's weight in a mixture of two is drawn from; 0 turns mixtures off."""

    cutmix: float = 1.0
    """a of the Beta(a, a) that the share of a clip that another one's box leaves is drawn from; 0 turns boxes off."""

    switch: float = 0.5
    """Probability that a batch gets boxes rather than mixtures, where both are on."""

    label_smoothing: float = 0.1
    """Share of the label that is spread over all classes."""

    def __post_init__(self) -> None:
        _require(self.layers >= 0, "augment.layers", self.layers, "choose 0 (off) or more operations")
        _require(0 <= self.magnitude <= 10, "augment.magnitude", self.magnitude, "choose a strength in [0, 10]")
        _require(self.magnitude_std >= 0, "augment.magnitude_std", self.magnitude_std, "choose 0 or more")
        _require(0 <= self.erase <= 1, "augment.erase", self.erase, "choose a share in [0, 1]")
        _require(self.mixup >= 0, "augment.mixup", self.mixup, "choose a positive number, or 0 for off")
        _require(self.cutmix >= 0, "augment.cutmix", self.cutmix, "choose a positive number, or 0 for off")
        _require(0 <= self.switch <= 1, "augment.switch", self.switch, "choose a probability in [0, 1]")
        _require(
            0 <= self.label_smoothing < 1, "augment.label_smoothing", self.label_smoothing, "choose a share in [0, 1)"
        )
