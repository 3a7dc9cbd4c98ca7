"""Clips with labels: random ones for fine-tuning, all views of every video for testing.

Both use the workers of :mod:`adamae_fast.data.loader`, with all that it says about unreadable videos and crashes.

Letters: B clips, T frames, S the clip's side in pixels, H, W pixels, V views of a video.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adamae_fast.config_finetune import LabelledDataConfig, ViewsConfig
from adamae_fast.data.clips import ClipPlan, apply_view
from adamae_fast.data.dataset import ClipSample, DecodeCost, PretrainClips, Videos
from adamae_fast.data.decode import Frameable, VideoError
from adamae_fast.data.loader import load_batches, stream_batches
from adamae_fast.data.manifest import Entry, ManifestError
from adamae_fast.data.quarantine import BadVideo
from adamae_fast.data.views import plan_labelled, plan_views

log = logging.getLogger(__name__)

MOST_CLASSES = 1_000_000
"""A label as large as that is rather the number of something else."""


class LabelledBatch(NamedTuple):
    """What one forward pass of fine-tuning sees."""

    video: Tensor
    """uint8 (B, 3, T, S, S); the crops of one video stand together."""

    labels: Tensor
    """int64 (B,): the class of the video that each clip shows, also where that one replaces another."""

    bad: list[BadVideo]
    """Videos that were to be in this batch and were replaced by others."""

    decode: DecodeCost | None
    """Of all its videos."""

    num_ready: int
    """Batches that stood ready when this one was asked for."""

    num_by_dali: int = 0
    """Videos of it that DALI decoded."""

    fell_back: tuple[str, ...] = ()
    """With data.decoder=dali, why the other ones were not, a reason for each."""


class ViewBatch(NamedTuple):
    """All views of some videos."""

    video: Tensor
    """uint8 (B, 3, T, S, S), B a multiple of V, 0 where none of the videos could be read."""

    ids: Tensor
    """int64 (B,): index of each clip's video in the manifest; the V views of a video stand together, in order."""

    bad: list[BadVideo]
    """Videos that were to be in this batch and could not be read, one for each line of the manifest."""


def read_class_names(manifest: str, num_classes: int) -> list[str] | None:
    """What ``labels.json`` beside the manifest (or in the folder that it is) calls each class; None if it does not.

    It holds a list, whose index is the label, or, as that of Something-Something, an object of names and labels.
    """
    path = Path(manifest).expanduser()
    path = (path if path.is_dir() else path.parent) / "labels.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        named = dict(enumerate(found)) if isinstance(found, list) else {int(found[name]): name for name in found}
        if len(named) != num_classes:
            raise ValueError(f"it has {len(named)} names")
        return [str(named[label]) for label in range(num_classes)]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s does not name the %d classes, so their numbers stand for them: %r", path, num_classes, error)
        return None


def read_labels(entries: Sequence[Entry], manifest: str, num_classes: int | None = None) -> tuple[list[int], int]:
    """The class of every video, and how many classes there are: ``num_classes``, or the largest one plus 1.

    A class that no video has is not an error, but mostly a sign of labels that do not start at 0: a warning names it.

    Args:
        entries: what ``manifest`` holds.
        manifest: its path, for messages.
        num_classes: classes of a trained model; None where the manifest decides.

    Raises:
        ManifestError: a video without a label, or with one that is not among ``num_classes``, or where the manifest
            decides, not below :data:`MOST_CLASSES`; the text names it.
    """
    labels: list[int] = []
    for entry in entries:
        if entry.label is None:
            raise ManifestError(
                f"{manifest}: {entry.path} has no label; every line needs a class, a whole number from 0 on, behind "
                "the path ('path label', or 'folder total_frames label')"
            )
        if num_classes is not None and entry.label >= num_classes:
            raise ManifestError(
                f"{manifest}: {entry.path} has label {entry.label}, but there are {num_classes} classes, 0 to "
                f"{num_classes - 1}; correct the label, or name the manifest that these classes were trained with"
            )
        if num_classes is None and entry.label >= MOST_CLASSES:
            raise ManifestError(
                f"{manifest}: {entry.path} has label {entry.label}, but labels below {MOST_CLASSES:,} are expected, "
                "since the largest one decides how many classes there are; number the classes from 0 on"
            )
        labels.append(entry.label)
    total = max(labels) + 1 if num_classes is None else num_classes
    if num_classes is None and (empty := sorted(set(range(total)) - set(labels))):
        names = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        largest = entries[labels.index(total - 1)].path
        text = "%s: of %d classes, %d have no video: %s (the largest label, %d, is that of %s)"
        log.warning(text, manifest, total, len(empty), names, total - 1, largest)
    return labels, total


class LabelledClips(PretrainClips):
    """Clips by their position in the stream, with ``config.sampling``; labels follow from :attr:`ClipSample.shown`.

    Order, crops, repeats and replacements are those of :class:`~adamae_fast.data.dataset.PretrainClips`.
    """

    config: LabelledDataConfig

    plan = staticmethod(plan_labelled)


class EvaluationViews(Videos):
    """All views of each video of a manifest, by the video's index.

    View v shows clip ``v // views.spatial`` along time in square ``v % views.spatial``. Each video is decoded once, for
    the frames of all its views, which are in memory together.
    """

    config: LabelledDataConfig

    def __init__(
        self,
        entries: Sequence[Entry],
        config: LabelledDataConfig,
        views: ViewsConfig,
        num_frames: int,
        frame_size: int,
        known_crashers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(entries, config, num_frames, frame_size, known_crashers)
        self.views = views

    def __getitem__(self, number: int) -> ClipSample:
        """All views of video ``number``; none, and the video in ``bad``, if it cannot be read."""
        path = self.entries[number].path
        if path in self.crashers:
            bad = BadVideo(path, self.crashers[path], crashed=True)
        else:
            try:
                return self._all_views(number)
            except VideoError as error:
                bad = BadVideo(error.path, error.reason)
        nothing = torch.empty(0, 3, self.num_frames, self.frame_size, self.frame_size, dtype=torch.uint8)
        return ClipSample(nothing, (bad,), DecodeCost(0.0, 0), number)

    def _all_views(self, number: int) -> ClipSample:
        start = time.perf_counter()
        with self._open(number) as video:
            plan = self._plan(video)
            frames_THWC = video.read(plan.frame_ids)
            cost = DecodeCost(time.perf_counter() - start, video.num_decoded)
        frames_KTHWC = frames_THWC.reshape(self.views.temporal, self.num_frames, *frames_THWC.shape[1:])
        clips = [apply_view(clip, view, self.frame_size) for clip in frames_KTHWC for view in plan.views]
        return ClipSample(torch.stack(clips), (), cost, number)

    def _plan(self, video: Frameable) -> ClipPlan:
        return plan_views(
            self.config.sampling,
            self.config.stride,
            self.views,
            num_frames=self.num_frames,
            total_frames=video.num_frames,
            height=video.height,
            width=video.width,
        )


def labelled_batches(
    entries: Sequence[Entry],
    labels: Sequence[int],
    config: LabelledDataConfig,
    *,
    num_frames: int,
    frame_size: int,
    seed: int,
    batch_size: int,
    start_batch: int,
    num_batches: int,
    device: torch.device | str = "cpu",
    known_crashers: Mapping[str, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[LabelledBatch, None, None]:
    """Batches ``start_batch`` to ``num_batches - 1`` of labelled clips, as ``loader.clip_batches`` describes it.

    Args:
        entries: the manifest.
        labels: of each entry, from :func:`read_labels`.
        config: sampling, stride, crop, flip, repeat, decoder, workers.
        num_frames: T.
        frame_size: S.
        seed: of the run.
        batch_size: B, repeated crops counted; a multiple of ``config.repeat``.
        start_batch: 0, or where a resumed run goes on.
        num_batches: of the whole run.
        device: memory is pinned for a CUDA device.
        known_crashers: videos that are not opened.
        rank: of this process.
        world_size: number of processes, which share the stream.
    """
    clips = LabelledClips(entries, config, num_frames, frame_size, seed, known_crashers)
    batches = stream_batches(clips, batch_size // config.repeat, start_batch, num_batches, device, rank, world_size)

    def with_labels() -> Generator[LabelledBatch, None, None]:
        with closing(batches):
            for batch in batches:
                labels_B = torch.tensor([labels[index] for index in batch.shown])
                yield LabelledBatch(
                    batch.video,
                    labels_B,
                    batch.bad,
                    batch.decode,
                    batch.num_ready,
                    batch.num_by_dali,
                    batch.fell_back,
                )

    return with_labels()


def view_batches(
    entries: Sequence[Entry],
    config: LabelledDataConfig,
    views: ViewsConfig,
    *,
    num_frames: int,
    frame_size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    numbers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    known_crashers: Mapping[str, str] | None = None,
) -> Generator[ViewBatch, None, None]:
    """Every view of every video exactly once: rank r of W has videos r, r + W, r + 2W, … and all of their views.

    ``numbers`` names other videos for this process, by their places among the entries and in this order.

    An unreadable video is in the ``bad`` of exactly one batch of one rank, and no other video takes its place; so on
    all ranks together, videos in ``ids`` and videos in ``bad`` are as many as ``entries``. Ranks may have different
    numbers of batches. A batch holds whole videos: as many as fit into ``batch_size`` clips, at least one; the last one
    may be smaller. Of ``config``, its crop, flip, repeat and cache_gib have no effect here, and decoder=dali decodes
    as auto does.

    Raises:
        The same as :func:`~adamae_fast.data.loader.clip_batches`, but for NoReadableVideoError.
    """
    num_videos = max(1, batch_size // (views.temporal * views.spatial))
    mine = range(rank, len(entries), world_size) if numbers is None else numbers
    batches = load_batches(
        EvaluationViews(entries, config, views, num_frames, frame_size, known_crashers),
        lambda i: mine[i * num_videos : (i + 1) * num_videos],
        0,
        -(-len(mine) // num_videos),
        device,
    )

    def with_ids() -> Generator[ViewBatch, None, None]:
        with closing(batches):
            for batch in batches:
                yield ViewBatch(batch.video, torch.tensor(batch.shown, dtype=torch.int64), batch.bad)

    return with_ids()
