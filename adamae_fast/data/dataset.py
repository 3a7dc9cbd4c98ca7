"""The endless stream of clips that pre-training sees: position → clip, a pure function of the seed.

Letters: T frames, S the clip's side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adamae_fast.config import DataConfig
from adamae_fast.data.clips import apply_view, clip_rng, derived_rng, draw_view, frame_ids
from adamae_fast.data.decode import VideoError, open_entry, require_decoder
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo, DataStoppedError

MAX_ATTEMPTS = 10
"""Videos tried for one clip before the run stops."""

NOTHING = -1
"""What :attr:`PretrainClips.decoding` says between two videos."""


class NoReadableVideoError(DataStoppedError):
    """Every video tried for one clip was unreadable; ``bad`` are those videos."""

    def __init__(self, tried: Sequence[BadVideo]) -> None:
        super().__init__(tried)
        self.tried = self.bad = tried

    def __str__(self) -> str:
        reasons = "".join(f"\n  {video.path}: {video.reason}" for video in self.tried)
        return f"all {len(self.tried)} videos tried for one clip are unreadable:{reasons}"


class ClipSample(NamedTuple):
    """The crops of one decoded range of one video."""

    video: Tensor
    """uint8 (repeat, 3, T, S, S)."""

    bad: tuple[BadVideo, ...]
    """Videos that were to be seen here and could not be read."""


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
        self.decoding = torch.tensor(NOTHING)
        """int64: index of the entry that is being decoded. A worker shares it with its parent, which outlives it."""
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
                    return ClipSample(self._crops(tried, epoch, sample), tuple(bad.values()))
                except VideoError as error:
                    bad[tried] = BadVideo(error.path, error.reason)
            if len(bad) == min(MAX_ATTEMPTS, len(self.entries)):
                raise NoReadableVideoError(tuple(bad.values()))
            rng = derived_rng(self.seed, "replacement", epoch, sample, len(bad))
            while tried in bad:
                tried = int(rng.integers(len(self.entries)))

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            rng = derived_rng(self.seed, "order", epoch)
            self._order = epoch, rng.permutation(np.arange(len(self.entries), dtype=np.int64))
        return self._order[1]

    def _crops(self, index: int, epoch: int, sample: int) -> Tensor:
        """All crops of one range of frames of an entry, uint8 (repeat, 3, T, S, S)."""
        config = self.config
        rngs = [clip_rng(self.seed, epoch, sample, repeat) for repeat in range(config.repeat)]
        self.decoding.fill_(index)
        try:
            with closing(open_entry(self.entries[index], config.decoder)) as video:
                frames_THWC = video.read(frame_ids(video.num_frames, self.num_frames, config.stride, rngs[0]))
        finally:
            self.decoding.fill_(NOTHING)
        _, height, width, _ = frames_THWC.shape
        clips = []
        for rng in rngs:
            view = draw_view(
                rng,
                height,
                width,
                crop=config.crop,
                frame_size=self.frame_size,
                random_resized_scale=config.random_resized_scale,
                flip=config.flip,
            )
            clips.append(apply_view(frames_THWC, view, self.frame_size))
        return torch.stack(clips)
