"""What a classifier says about every video of a manifest: views, merged; processes, gathered.

Shapes: B clips, S views of a video, V videos, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from adamae_fast.config_finetune import FinetuneConfig, Merge, ViewsConfig
from adamae_fast.data.labelled import view_batches
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo
from adamae_fast.device import Uploader, arithmetic
from adamae_fast.distributed.world import World
from adamae_fast.errors import RunStoppedError
from adamae_fast.model.classifier import VideoClassifier

TOP = 5
"""The other accuracy that is reported beside the first: the label is among so many best classes."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Scores of the videos that could be read, and the videos that could not."""

    ids_V: Tensor
    """int64: each video's index in the manifest."""

    scores_VK: Tensor
    """float64 on the CPU: what the views say together, as probabilities, or as logits with merge="logits"."""

    bad: Sequence[BadVideo]
    """Unreadable videos, one for each line of the manifest."""

    def ranking(self) -> Tensor:
        """Classes of each video from best to worst, int64 (V, K); of equal scores, the smaller class is the better."""
        return self.scores_VK.sort(dim=1, descending=True, stable=True).indices

    def accuracy(self, labels: Sequence[int]) -> dict[str, float]:
        """Shares of the readable videos whose label is the best class and among the best five; NaN if there are none.

        ``labels`` are those of the whole manifest.
        """
        labels_V = torch.tensor(labels, dtype=torch.int64)[self.ids_V]
        hits_VK = self.ranking() == labels_V[:, None]
        return {f"top{n}": hits_VK[:, :n].any(1).double().mean().item() for n in (1, TOP)}


def merge_views(logits_BK: Tensor, num_views: int, merge: Merge) -> Tensor:
    """Mean over a video's views of their softmax, or of their logits: float64 (V, K); its views stand together."""
    logits_VSK = logits_BK.double().unflatten(0, (-1, num_views))
    return (logits_VSK.softmax(-1) if merge == "softmax" else logits_VSK).mean(1)


@torch.no_grad()
def predict_views(
    model: VideoClassifier,
    entries: Sequence[Entry],
    config: FinetuneConfig,
    views: ViewsConfig,
    merge: Merge = "softmax",
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    known_crashers: Mapping[str, str] | None = None,
    stop: Sequence[str] = (),
    advance: Callable[[int], None] = lambda num_videos: None,
) -> Predictions | None:
    """Show ``model`` all views of process ``rank``'s share of the videos; None once ``stop`` is not empty.

    Args:
        model: in eval mode, on ``device``.
        entries: the whole manifest.
        config: how videos are read, size of clips and batches, precision.
        views: of each video.
        merge: see :func:`merge_views`.
        device: where it computes.
        rank: of this process.
        world_size: number of processes; on all together each video is seen once.
        known_crashers: videos that are not opened.
        stop: receives the name of a stop signal.
        advance: is told how many videos were done.

    Raises:
        RunStoppedError: scores that are not finite.
        DataStoppedError: as :func:`~adamae_fast.data.labelled.view_batches` does.
    """
    num_views = views.temporal * views.spatial
    batches = view_batches(
        entries,
        config.data,
        views,
        num_frames=config.model.num_frames,
        frame_size=config.model.frame_size,
        batch_size=config.train.batch_size,
        rank=rank,
        world_size=world_size,
        device=device,
        known_crashers=known_crashers,
    )
    upload = Uploader(device)
    ids = [torch.empty(0, dtype=torch.int64)]
    scores = [torch.empty(0, model.num_classes, dtype=torch.float64, device=device)]
    bad: list[BadVideo] = []
    with closing(batches):
        for batch in batches:
            if stop:
                return None
            bad += batch.bad
            if len(batch.ids):
                with arithmetic(device, config.train.precision):
                    clips = upload(batch.video).split(config.train.batch_size)  # a video may have more views than that
                    logits_BK = torch.cat([model(clips_BCTHW) for clips_BCTHW in clips])
                scores.append(merge_views(logits_BK, num_views, merge))
                ids.append(batch.ids[::num_views])
            advance(len(batch.ids) // num_views + len(batch.bad))
    predictions = Predictions(ids_V=torch.cat(ids), scores_VK=torch.cat(scores).cpu(), bad=bad)
    finite_V = predictions.scores_VK.isfinite().all(1)
    if not finite_V.all():
        first = entries[int(predictions.ids_V[~finite_V][0])].path
        raise RunStoppedError(
            f"{int((~finite_V).sum())} videos have scores that are not finite, the first being {first}; the weights "
            "are broken, or precision=fp16 overflows: try fp32"
        )
    return predictions


def join_predictions(parts: Sequence[Predictions], num_videos: int) -> Predictions:
    """What several processes have found, in the order of the manifest of ``num_videos`` lines."""
    ids_V = torch.cat([part.ids_V for part in parts])
    order_V = ids_V.argsort()
    joined = Predictions(
        ids_V=ids_V[order_V],
        scores_VK=torch.cat([part.scores_VK for part in parts])[order_V],
        bad=[video for part in parts for video in part.bad],
    )
    assert len(ids_V.unique()) == len(ids_V) == num_videos - len(joined.bad)
    return joined


def gather_predictions(mine: Predictions, num_videos: int, world: World) -> Predictions:
    """:func:`join_predictions` of all processes, on each of them."""
    return join_predictions(world.gather(mine), num_videos)
