"""Knobs of what works on frozen features: extraction, probes, neighbours.

As in :mod:`adamae_fast.config`: frozen keyword-only dataclasses that check their own values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from adamae_fast.config import Precision, _require
from adamae_fast.config_finetune import EvaluateDataConfig, EvaluateViewsConfig, ValConfig, ViewingConfig

Tokens = Literal["pooled", "all"]
FeatureDtype = Literal["fp32", "fp16"]
FeatureFormat = Literal["safetensors", "npz"]
ProbeKind = Literal["linear", "attentive", "knn"]

DEFAULT_DTYPES: dict[Tokens, FeatureDtype] = {"pooled": "fp32", "all": "fp16"}


@dataclass(frozen=True, kw_only=True)
class FeatureDataConfig(EvaluateDataConfig):
    """Which videos are shown and how they are read; what is null is as in the run that trained the checkpoint."""

    manifest: str = ""
    """An annotation file, a folder that is searched for videos, or one that data prepare wrote."""


@dataclass(frozen=True, kw_only=True)
class FeatureViewsConfig(EvaluateViewsConfig):
    """Which views of a video are shown: temporal × spatial. Pooled features are their mean; of all tokens, those of one
    view follow those of the one before."""

    temporal: int = 1
    """Clips along time, evenly placed."""

    spatial: int = 1
    """Squares along the longer side, evenly placed."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(ViewingConfig):
    """How frozen features are computed."""

    data: FeatureDataConfig = field(default_factory=FeatureDataConfig)
    """Which videos are shown and how they are read."""

    views: FeatureViewsConfig = field(default_factory=FeatureViewsConfig)
    """Which views of a video are shown."""

    batch_size: int | None = None
    """Clips in one forward pass; if null train.batch_size of a fine-tuning run, and 16 for other checkpoints."""

    precision: Precision = "fp32"
    """Arithmetic of matrix products. bf16 is faster on a GPU, and less exact."""

    num_frames: int | None = None
    """Frames of a clip; as in the checkpoint if null. A .pth file that does not tell: 16."""

    frame_size: int | None = None
    """Height and width of a clip's frames, in pixels; as in the checkpoint if null. A .pth file that does not tell:
    224."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_frames", "frame_size"):
            value = getattr(self, key)
            _require(value is None or value >= 1, key, value, "choose a positive number, or null for the checkpoint's")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(FeatureConfig):
    """What adamae-fast extract writes."""

    output_dir: str = ""
    """Folder to make, or to go on with."""

    tokens: Tokens = "pooled"
    """pooled: one vector of each video, the mean of the tokens after the encoder's last LayerNorm (of a classifier:
    what its head sees). all: every token of the encoder, ordered view, time, row, column."""

    dtype: FeatureDtype | None = None
    """fp32 or fp16, of the stored numbers; if null fp32 for pooled, fp16 for all."""

    format: FeatureFormat = "safetensors"
    """Of the shards: safetensors, or npz for numpy."""

    shard_videos: int = 256
    """Videos of one shard file, rounded up to whole batches. A shard's features are in memory together, and are what a
    killed run does again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.shard_videos >= 1, "shard_videos", self.shard_videos, "choose at least 1 video")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How the linear and the attentive head are trained."""

    epochs: int | None = None
    """Passes over the videos; 100 for linear, 20 for attentive if null."""

    batch_size: int = 64
    """Videos of one step. What is left over at the end of an epoch is left out, as in MAE's linear probing."""

    lrs: tuple[float, ...] | None = None
    """Learning rates, each of a head of its own; all heads see the same batches, and the best one on val.manifest is
    reported beside the others. If null 0.01, 0.03, 0.1, 0.3, 1 for linear (SGD), 1e-4, 3e-4, 1e-3, 3e-3 for attentive
    (AdamW)."""

    def __post_init__(self) -> None:
        _require(self.epochs is None or self.epochs >= 1, "head.epochs", self.epochs, "choose at least 1, or null")
        _require(self.batch_size >= 2, "head.batch_size", self.batch_size, "choose at least 2 videos, for BatchNorm")
        _require(
            self.lrs is None or (len(self.lrs) > 0 and all(lr > 0 for lr in self.lrs)),
            "head.lrs",
            self.lrs,
            "choose positive learning rates, such as [0.03, 0.1], or null",
        )


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """How neighbours vote."""

    k: int = 20
    """Neighbours of each video."""

    temperature: float = 0.07
    """A neighbour of cosine similarity s has exp(s / temperature) votes (DINO)."""

    def __post_init__(self) -> None:
        _require(self.k >= 1, "knn.k", self.k, "choose at least 1 neighbour")
        _require(self.temperature > 0, "knn.temperature", self.temperature, "choose a positive number")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(FeatureConfig):
    """What adamae-fast probe does with a checkpoint."""

    output_dir: str = "runs/probe"
    """Folder of the cached features, and of results.json and confusion_matrix.png, which replace earlier ones there."""

    probe: ProbeKind = "linear"
    """linear: BatchNorm without weights and a linear layer on pooled features (MAE); attentive: a learned query looks
    at all tokens in one cross-attention block, then a linear layer (V-JEPA); knn: the nearest training videos vote, by
    pooled features (DINO)."""

    seed: int = 0
    """Source of every random number: first weights, and the order of the videos."""

    val: ValConfig = field(default_factory=ValConfig)
    """The videos that are classified; data.manifest names those that the probe learns from."""

    head: HeadConfig = field(default_factory=HeadConfig)
    """How the linear and the attentive head are trained."""

    knn: KnnConfig = field(default_factory=KnnConfig)
    """How neighbours vote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.seed >= 0, "seed", self.seed, "choose 0 or more")

    def without_effect(self) -> list[str]:
        """Return a sentence for each group that was set but does nothing with this probe."""
        unused = ("head", self.head != HeadConfig()) if self.probe == "knn" else ("knn", self.knn != KnnConfig())
        return [f"{unused[0]} has no effect: probe={self.probe}"] if unused[1] else []


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig(FeatureConfig):
    """What adamae-fast retrieve looks for."""

    k: int = 5
    """Neighbours of each query."""

    out: str = "neighbours.png"
    """The contact sheet to write; its lines as JSON go beside it (.jsonl), and the manifest's features (.features/),
    which the next search with the same settings takes as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.k >= 1, "k", self.k, "choose at least 1 neighbour")
        _require(self.out.endswith(".png"), "out", self.out, "choose a name that ends in .png")
