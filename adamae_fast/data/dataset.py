"""The endless stream of clips that pre-training sees: position → clip, a pure function of the seed.

Letters: T frames, S the clip's side in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adamae_fast.config import DataConfig
from adamae_fast.data.clips import apply_view, draw_replacement, epoch_order, plan_clip
from adamae_fast.data.decode import VideoError, open_entry, require_decoder
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo, DataStoppedError

MAX_ATTEMPTS = 10
"""Videos tried for one clip before the run stops."""

NOTHING = -1
"""The entry in :attr:`PretrainClips.decoding` between two videos."""


class NoReadableVideoError(DataStoppedError):
    """Every video tried for one clip was unreadable; ``bad`` are those videos."""

    def __init__(self, tried: Sequence[BadVideo]) -> None:
        super().__init__(tried)
        self.tried = self.bad = tried

    def __str__(self) -> str:
        reasons = "".join(f"\n  {video.path}: {video.reason}" for video in self.tried)
        return f"all {len(self.tried)} videos tried for one clip are unreadable:{reasons}"


class DecodeCost(NamedTuple):
    """What decoding took; opening the file is part of it, crops are not."""

    seconds: float
    frames: int
    """Frames decoded, with those that were needed for others only."""


class ClipSample(NamedTuple):
    """The crops of one decoded range of one video."""

    video: Tensor
    """uint8 (repeat, 3, T, S, S)."""

    bad: tuple[BadVideo, ...]
    """Videos that were to be seen here and could not be read."""

    decode: DecodeCost
    """Of the video that was read."""


class PretrainClips:
    """Clips by their position in the stream; for a DataLoader whose sampler says which positions.

    Position p shows video ``order(epoch)[p % len(entries)]`` with epoch ``p // len(entries)``; each epoch has an order
    of its own. What a position shows depends on ``seed`` and ``config`` alone, in whichever process it is computed.

    Args:
        entries: the manifest.
        config: stride, crop, flip, repeat and decoder.
        num_frames: T.
        frame_size: S.
        seed: source of order, start, crop, flip and replacements.
        known_crashers: path and reason of videos that must not be opened: they count as unreadable. A copy is taken.

    Raises:
        ValueError: no entries, or a decoder that is not installed.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        config: DataConfig,
        num_frames: int,
        frame_size: int,
        seed: int,
        known_crashers: Mapping[str, str] | None = None,
    ) -> None:
        if not entries:
            raise ValueError("entries=[]: a stream of clips needs at least one video")
        require_decoder(config.decoder)
        self.entries = entries
        self.config = config
        self.num_frames = num_frames
        self.frame_size = frame_size
        self.seed = seed
        self.crashers = dict(known_crashers or {})
        """Grows by what crashes a worker; new workers start with a copy."""
        self.decoding = torch.tensor([NOTHING, 0])
        """int64 (2,): index of the entry that is being decoded, and how many were begun. A worker shares it with its
        parent, which outlives it."""
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, position: int) -> ClipSample:
        """Decode one video range and cut its crops.

        An unreadable video is replaced by another one, drawn for this place, and reported in ``bad``. Raises
        NoReadableVideoError when ten videos, or all there are, were unreadable.
        """
        epoch, place = divmod(position, len(self.entries))
        sample = int(self._epoch_order(epoch)[place])
        bad: dict[int, BadVideo] = {}
        tried = sample
        while True:
            path = self.entries[tried].path
            if path in self.crashers:
                bad[tried] = BadVideo(path, self.crashers[path], crashed=True)
            else:
                try:
                    crops, cost = self._crops(tried, epoch, sample)
                    return ClipSample(crops, tuple(bad.values()), cost)
                except VideoError as error:
                    bad[tried] = BadVideo(error.path, error.reason)
            if len(bad) == min(MAX_ATTEMPTS, len(self.entries)):
                raise NoReadableVideoError(tuple(bad.values()))
            tried = draw_replacement(self.seed, epoch, sample, bad.keys(), len(self.entries))

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self.seed, epoch, len(self.entries))
        return self._order[1]

    def _crops(self, index: int, epoch: int, sample: int) -> tuple[Tensor, DecodeCost]:
        """All crops of one range of frames of an entry, uint8 (repeat, 3, T, S, S), and what that range cost."""
        start = time.perf_counter()
        self.decoding[1] += 1
        self.decoding[0] = index
        try:
            with closing(open_entry(self.entries[index], self.config.decoder)) as video:
                plan = plan_clip(
                    self.config,
                    self.seed,
                    epoch,
                    sample,
                    num_frames=self.num_frames,
                    frame_size=self.frame_size,
                    total_frames=video.num_frames,
                    height=video.height,
                    width=video.width,
                )
                frames_THWC = video.read(plan.frame_ids)
                num_decoded = video.num_decoded
        finally:
            self.decoding[0] = NOTHING
        cost = DecodeCost(time.perf_counter() - start, num_decoded)
        return torch.stack([apply_view(frames_THWC, view, self.frame_size) for view in plan.views]), cost
