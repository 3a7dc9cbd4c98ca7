"""What a classifier says about every video of a manifest: views, merged; processes, gathered.

Shapes: B clips, S views of a video, V videos, K classes, X any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

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


class Shown(NamedTuple):
    """What a model says about the views of the videos of a batch."""

    ids_V: Tensor
    """int64: index in the manifest of the videos that could be read."""

    outputs_BX: Tensor | None
    """What it says of each clip, on its device, the S views of a video together; None if no video could be read."""

    bad: Sequence[BadVideo]
    """Videos that could not."""


@torch.no_grad()
def show_views(
    compute: Callable[[Tensor], Tensor],
    entries: Sequence[Entry],
    config: FinetuneConfig,
    views: ViewsConfig,
    *,
    device: torch.device,
    numbers: Sequence[int] | None = None,
    known_crashers: Mapping[str, str] | None = None,
) -> Generator[Shown, None, None]:
    """Let ``compute`` see all views of videos, batch by batch.

    Args:
        compute: from clips, uint8 (B, 3, T, H, W) on ``device``, to something of each of them; B is train.batch_size at
            most.
        entries: the whole manifest.
        config: how videos are read, size of clips and batches, precision.
        views: of each video.
        device: where it computes.
        numbers: the videos' places in the manifest; all of it if None.
        known_crashers: videos that are not opened.

    Raises DataStoppedError as :func:`~adamae_fast.data.labelled.view_batches` does.
    """
    batches = view_batches(
        entries,
        config.data,
        views,
        num_frames=config.model.num_frames,
        frame_size=config.model.frame_size,
        batch_size=config.train.batch_size,
        numbers=numbers,
        device=device,
        known_crashers=known_crashers,
    )
    upload = Uploader(device)
    with closing(batches):
        for batch in batches:
            outputs_BX = None
            if len(batch.ids):
                with arithmetic(device, config.train.precision):
                    clips = upload(batch.video).split(config.train.batch_size)  # a video may have more views than that
                    outputs_BX = torch.cat([compute(clips_BCTHW) for clips_BCTHW in clips])
            yield Shown(batch.ids[:: views.temporal * views.spatial], outputs_BX, batch.bad)


def require_finite(values_VX: Tensor, ids_V: Tensor, entries: Sequence[Entry], what: str) -> None:
    """Raise RunStoppedError that names the first video some of whose ``values_VX`` are not finite."""
    finite_V = values_VX.isfinite().flatten(1).all(1)
    if not finite_V.all():
        first = entries[int(ids_V[~finite_V][0])].path
        raise RunStoppedError(
            f"{int((~finite_V).sum())} videos have {what} that are not finite, the first being {first}; the weights "
            "are broken, or precision=fp16 overflows: try fp32"
        )


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
    """Show ``model``, in eval mode and on ``device``, all views of process ``rank``'s share of the videos.

    Returns None once ``stop``, which receives the name of a stop signal, is not empty. Views are merged as
    :func:`merge_views` does; ``advance`` is told how many videos were done; the rest is as for :func:`show_views`.

    Raises:
        RunStoppedError: scores that are not finite.
        DataStoppedError: as :func:`~adamae_fast.data.labelled.view_batches` does.
    """
    ids = [torch.empty(0, dtype=torch.int64)]
    scores = [torch.empty(0, model.num_classes, dtype=torch.float64, device=device)]
    bad: list[BadVideo] = []
    shown_views = show_views(
        model,
        entries,
        config,
        views,
        device=device,
        numbers=range(rank, len(entries), world_size),
        known_crashers=known_crashers,
    )
    with closing(shown_views):
        for shown in shown_views:
            if stop:
                return None
            bad += shown.bad
            if shown.outputs_BX is not None:
                scores.append(merge_views(shown.outputs_BX, views.temporal * views.spatial, merge))
                ids.append(shown.ids_V)
            advance(len(shown.ids_V) + len(shown.bad))
    predictions = Predictions(ids_V=torch.cat(ids), scores_VK=torch.cat(scores).cpu(), bad=bad)
    require_finite(predictions.scores_VK, predictions.ids_V, entries, "scores")
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
