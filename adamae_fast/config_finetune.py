"""Knobs of what sees labels: fine-tuning and testing.

As in :mod:`adamae_fast.config`: frozen keyword-only dataclasses that check their own values. Defaults are the recipe
for Kinetics-400 (paper Table 6, with the corrections of the published code); what SSv2 wants is said at the field.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from adamae_fast.config import (
    AttentionConfig,
    CropKind,
    DataConfig,
    DecoderConfig,
    OptimConfig,
    Precision,
    RunConfig,
    SamplerConfig,
    TrainConfig,
    _require,
)

Sampling = Literal["dense", "segments"]
Merge = Literal["softmax", "logits"]


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


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What a classifier has beside the encoder."""

    num_classes: int | None = None
    """Number of classes; the largest label of data.manifest plus 1 if null."""

    drop_path: float = 0.1
    """Probability that, in training, the last block leaves out what it computes for a clip; it grows linearly from 0 at
    the first block."""

    def __post_init__(self) -> None:
        _require(
            self.num_classes is None or self.num_classes >= 1,
            "classifier.num_classes",
            self.num_classes,
            "choose at least 1 class, or null for those of the manifest",
        )
        _require(0 <= self.drop_path < 1, "classifier.drop_path", self.drop_path, "choose a probability in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """AdamW and its schedule."""

    base_lr: float = 1e-3
    """Peak learning rate for a total batch of 256 clips; scaled linearly with the total batch. SSv2 wants 5e-4."""

    min_lr: float = 1e-6
    """Learning rate at the end of the cosine, for a total batch of 256; scaled likewise."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""

    layer_decay: float = 0.75
    """Factor on the learning rate for each encoder block towards the input; 1 for one rate everywhere."""

    warmup_epochs: float = 5.0
    """Length of the linear warm-up from 0. With train.steps it keeps its share of the run."""


@dataclass(frozen=True, kw_only=True)
class FinetuneTrainConfig(TrainConfig):
    """Length, batch and arithmetic of the run."""

    epochs: float = 100.0
    """Passes over the manifest; an epoch shows each video data.repeat times (50 for SSv2)."""

    batch_size: int = 16
    """Clips in one forward pass on one device, repeated crops counted; in validation, too."""

    ema_decay: float | None = None
    """Share of a moving average of the weights that each step keeps, such as 0.9999: the average is then what is
    validated, and what a checkpoint's model.safetensors holds; null for the weights themselves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "train.ema_decay",
            self.ema_decay,
            "choose a share strictly between 0 and 1, such as 0.9999, or null",
        )


@dataclass(frozen=True, kw_only=True)
class ValConfig:
    """The videos that measure the run: the centre clip of each, after every epoch."""

    manifest: str = ""
    """An annotation file, or a folder that data prepare wrote, with labels."""

    root: str | None = None
    """Folder that relative paths of this manifest start from; its own folder if null."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Everything that decides a fine-tuning run; saved as config.yaml beside its checkpoints."""

    output_dir: str = "runs/finetune"
    """Folder of the run."""

    init: str | None = None
    """Pre-trained encoder to start a fresh run from: a run or checkpoint of ours (of a run of fine-tuning, the best
    one), a published AdaMAE or VideoMAE file, a transformers folder; random weights if null. What was used, missing and
    left over is printed."""

    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """What the classifier has beside the encoder."""

    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """Where labelled clips come from and how they are cut."""

    val: ValConfig = field(default_factory=ValConfig)
    """The videos that measure the run."""

    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Which views adamae-fast evaluate shows of each video, if not told otherwise. Training does not use them."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What is done to clips on the device, and to their labels."""

    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    """AdamW and its schedule."""

    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    """Length, batch and arithmetic of the run."""

    def without_effect(self) -> list[str]:
        """Return a sentence for each option that was set but does nothing in this combination."""
        messages = super().without_effect()
        if self.data.sampling == "segments" and self.data.stride != LabelledDataConfig().stride:
            messages.append("data.stride has no effect: data.sampling=segments takes a frame of each part of the video")
        if self.init is not None and self.resume not in ("auto", "none"):
            messages.append(f"init has no effect: resume={self.resume} brings its own weights")
        reason = "fine-tuning has no sampler and no decoder"
        for key, is_default in (
            ("model.sampler", self.model.sampler == SamplerConfig()),
            ("model.decoder", self.model.decoder == DecoderConfig()),
            ("model.attention.sampler", self.model.attention.sampler == AttentionConfig().sampler),
            ("model.attention.decoder", self.model.attention.decoder == AttentionConfig().decoder),
            ("optim.sampler_lr_scale", self.optim.sampler_lr_scale == 1),
        ):
            if not is_default:
                messages.append(f"{key} has no effect: {reason}")
        augment, default = self.augment, AugmentConfig()
        if not augment.layers:
            for key in ("magnitude", "magnitude_std"):
                if getattr(augment, key) != getattr(default, key):
                    messages.append(f"augment.{key} has no effect: augment.layers=0 turns RandAugment off")
        if augment.switch != default.switch and not (augment.mixup and augment.cutmix):
            messages.append("augment.switch has no effect: one of augment.mixup and augment.cutmix is off")
        if self.train.batch_size == 1 and (augment.mixup or augment.cutmix):
            messages.append("augment.mixup and augment.cutmix have no effect: train.batch_size=1 has nothing to mix")
        return messages


@dataclass(frozen=True, kw_only=True)
class EvaluateDataConfig:
    """Which videos are tested and how they are read; what is null is as in the run that trained the checkpoint."""

    manifest: str | None = None
    """An annotation file, or a folder that data prepare wrote, with labels; the run's val.manifest if null."""

    root: str | None = None
    """Folder that relative paths of the manifest start from; its own folder if null."""

    sampling: Sampling | None = None
    """dense or segments (docs/data.md)."""

    stride: int | None = None
    """Distance between two frames of a dense clip, in frames of the video."""

    num_workers: int | None = None
    """Decoding processes; 0 decodes in the process itself."""

    timeout: float | None = None
    """Seconds that a worker may spend on one video. One that takes longer counts as unreadable."""

    max_bad_share: float | None = None
    """More unreadable videos than this share of the manifest are an error; they are listed in any case."""


@dataclass(frozen=True, kw_only=True)
class EvaluateViewsConfig:
    """Which views of a video are tested: temporal × spatial; what is null is as in the run."""

    temporal: int | None = None
    """Clips along time, evenly placed (5 for K400, 2 for SSv2)."""

    spatial: int | None = None
    """Squares along the longer side, evenly placed."""


@dataclass(frozen=True, kw_only=True)
class ViewingConfig:
    """How a checkpoint is shown the videos of a manifest; what is null is as in the run that trained it."""

    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    """Which videos are tested and how they are read."""

    views: EvaluateViewsConfig = field(default_factory=EvaluateViewsConfig)
    """Which views of a video are tested."""

    batch_size: int | None = None
    """Clips in one forward pass; train.batch_size of the run if null."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""

    precision: Precision | None = None
    """Arithmetic of matrix products; as in the run if null."""

    def __post_init__(self) -> None:
        _require(
            self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "choose at least 1 clip"
        )

    def applied_to(self, trained: FinetuneConfig) -> FinetuneConfig:
        """The run's configuration with what this one says. Raises ValueError for a value out of its range."""
        given = _not_null(self.data)
        if self.data.manifest is None:
            given = {"manifest": trained.val.manifest, "root": trained.val.root, **given}
        else:
            given["root"] = self.data.root  # the run's is another manifest's
        train: dict[str, Any] = {"batch_size": self.batch_size, "precision": self.precision}
        return replace(
            trained,
            # Crops and repeats act in training alone; a repeat must not stand against another batch size.
            data=replace(trained.data, **given, repeat=1),
            views=replace(trained.views, **_not_null(self.views)),
            train=replace(trained.train, **{key: value for key, value in train.items() if value is not None}),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ViewingConfig):
    """What adamae-fast evaluate does with a fine-tuned checkpoint."""

    output_dir: str | None = None
    """Folder for the results, which replace earlier ones there; evaluation/ in the run's folder if null."""

    merge: Merge = "softmax"
    """What is averaged over the views of a video: their probabilities (softmax, as VideoMAE does), or their logits (as
    the published AdaMAE does)."""


def _not_null(config: EvaluateDataConfig | EvaluateViewsConfig) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if value is not None}
