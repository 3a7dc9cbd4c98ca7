"""What ``adamae-fast plan`` is asked, beside the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GpuName = Literal["a100", "h100", "h200"]
DatasetName = Literal["k400", "ssv2"]
FilesKind = Literal["prepared", "original"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Size and shape of a known set of videos."""

    num_videos: int
    frames: int
    """Of a usual video."""
    stride: int
    """data.stride of its recipe."""


DATASETS = {
    "k400": Dataset(num_videos=240_436, frames=300, stride=4),
    "ssv2": Dataset(num_videos=168_913, frames=48, stride=2),
}
"""Training sets of Kinetics-400 (ten seconds, 30 frames a second) and Something-Something v2 (four, 12)."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The machines and the videos; everything else is the recipe's."""

    gpu: GpuName
    """Kind of GPU: the SXM cards, A100 and H100 with 80 GB."""

    num_gpus: int
    """All GPUs of the run; one process each."""

    gpus_per_node: int = 8
    """GPUs of one machine, between which NVLink carries the gradients."""

    node_network_gbit: float | None = None
    """Gbit/s that a machine sends to others; null for one adapter for each GPU: 200 each with a100, else 400."""

    dataset: DatasetName | None = None
    """Known videos: how many, how long, how costly to decode. Other videos: --num-videos, which are taken to be like
    those of the named data set, or like k400's."""

    num_videos: int | None = None
    """Videos of the manifest, in place of the data set's."""

    frames: int | None = None
    """Frames of a usual video, in place of the data set's."""

    files: FilesKind = "prepared"
    """prepared: what adamae-fast data prepare wrote; original: as they came."""

    epochs: float | None = None
    """Short for --train.epochs."""

    batch: int | None = None
    """Short for --train.batch_size: clips in one forward pass on one GPU, repeated crops counted."""

    total_batch: int | None = None
    """Clips of an optimizer step on all GPUs; sets train.accumulate."""

    price_per_gpu_hour: float | None = None
    """In any currency; without it, costs are GPU hours."""

    def __post_init__(self) -> None:
        _require_positive("--num-gpus", self.num_gpus, "GPU")
        _require_positive("--gpus-per-node", self.gpus_per_node, "GPU")
        _require_positive("--node-network-gbit", self.node_network_gbit, "Gbit/s")
        _require_positive("--num-videos", self.num_videos, "video")
        _require_positive("--frames", self.frames, "frame")
        _require_positive("--total-batch", self.total_batch, "clip")
        _require_positive("--price-per-gpu-hour", self.price_per_gpu_hour, "unit of money")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ValueError(
                f"--num-gpus {self.num_gpus}: not whole machines of --gpus-per-node {self.gpus_per_node}; choose a "
                "multiple, or say how many GPUs a machine has"
            )
        if self.dataset is None and self.num_videos is None:
            raise ValueError(f"--dataset: choose one of {', '.join(DATASETS)}, or give --num-videos")

    @property
    def videos(self) -> Dataset:
        """What the run reads."""
        like = DATASETS[self.like]
        return Dataset(
            num_videos=self.num_videos or like.num_videos, frames=self.frames or like.frames, stride=like.stride
        )

    @property
    def like(self) -> DatasetName:
        """The data set whose videos cost as much to decode."""
        return self.dataset or "k400"

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return max(1, self.num_gpus // self.gpus_per_node)

    def recipe_overrides(self, batch_size: int) -> dict[str, object]:
        """Keys of the recipe that these options set; ``batch_size`` is the recipe's own. Raises ValueError."""
        found: dict[str, object] = {}
        if self.epochs is not None:
            found["train.epochs"] = self.epochs
        if self.batch is not None:
            _require_positive("--batch", self.batch, "clip")
            found["train.batch_size"] = batch_size = self.batch
        if self.total_batch is not None:
            pass_clips = batch_size * self.num_gpus
            if self.total_batch % pass_clips:
                below = self.total_batch // pass_clips * pass_clips
                fitting = " or ".join(str(n) for n in (below, below + pass_clips) if n)
                raise ValueError(
                    f"--total-batch {self.total_batch}: {self.num_gpus} GPUs × {batch_size} clips are {pass_clips} in "
                    f"one forward pass, and no whole number of passes makes it; choose {fitting}, or another --batch"
                )
            found["train.accumulate"] = self.total_batch // pass_clips
        return found


def _require_positive(option: str, value: float | None, unit: str) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"{option} {value:g}: choose more than 0, at least a {unit}")
