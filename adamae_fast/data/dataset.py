"""The endless stream of clips that training sees: position → clip, a pure function of the seed.

Letters: T frames, S the clip's side in pixels.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import cache
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adamae_fast.config import DataConfig
from adamae_fast.data.clips import ClipPlan, apply_view, draw_replacement, epoch_order, plan_clip
from adamae_fast.data.decode import (
    DecodedVideo,
    EncodedVideo,
    Frameable,
    VideoError,
    VideoFile,
    open_entry,
    require_decoder,
)
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo, DataStoppedError

MAX_ATTEMPTS = 10
"""Videos tried for one clip before the run stops."""

NOTHING = -1
"""The entry in :attr:`Videos.decoding` between two videos."""


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
    """What is cut from one decoded video."""

    video: Tensor
    """uint8 (clips, 3, T, S, S)."""

    bad: tuple[BadVideo, ...]
    """Videos that were to be seen here and could not be read."""

    decode: DecodeCost
    """Of the video that was read."""

    shown: int
    """Index of the entry that was read."""

    not_encoded: str = ""
    """Why it was decoded here where another decoder was to do it."""


class VideoKind(NamedTuple):
    """What decides whether a decoder can be used at all."""

    codec: str
    width: int
    height: int

    @classmethod
    def of(cls, video: EncodedVideo) -> Self:
        """The kind of an open video."""
        return cls(video.codec, video.width, video.height)

    def __str__(self) -> str:
        return f"{self.codec} of {self.width}×{self.height}"


class EncodedClip(NamedTuple):
    """A video as it is stored, and what is to be decoded of it."""

    path: str
    content: bytes
    plan: ClipPlan
    kind: VideoKind


class EncodedSample(NamedTuple):
    """In place of :class:`ClipSample` where another process decodes."""

    clip: EncodedClip
    bad: tuple[BadVideo, ...]
    """Videos that were to be seen here and could not be read."""

    shown: int
    """Index of the entry that ``clip`` holds."""


ReasonAgainst = Callable[[Frameable], str | None]
"""Says why another process is not to decode a video; None if it is."""


class DecodedVideos:
    """What this process has decoded and kept for ``data.cache_gib``: videos that fitted whole into ``room`` bytes.

    While one is decoded, its frames are there twice.
    """

    def __init__(self, room: int) -> None:
        self.videos: dict[Entry, DecodedVideo] = {}
        self.room = room
        self.damaged: set[Entry] = set()
        """Those that do not decode whole; frames of a clip may be none of the damaged ones."""

    def keep(self, entry: Entry, video: VideoFile) -> DecodedVideo | None:
        """Decode the whole video, where it fits."""
        num_bytes = video.num_frames * video.height * video.width * 3
        if num_bytes > self.room or entry in self.damaged:
            return None
        try:
            decoded = DecodedVideo(video)
        except VideoError:
            self.damaged.add(entry)
            return None
        self.videos[entry] = decoded
        self.room -= num_bytes
        return decoded


@cache
def decoded_videos(decoder: str, room: int) -> DecodedVideos:
    """Those of this process. They outlive a run, so that a study of many runs decodes its videos once."""
    return DecodedVideos(room)


class Videos(ABC):
    """What a data set that decodes has: its videos, those that it must not open, and word of what it is decoding.

    Args:
        entries: the manifest.
        config: the decoder, and what the data set itself looks up.
        num_frames: T.
        frame_size: S.
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
        known_crashers: Mapping[str, str] | None = None,
    ) -> None:
        if not entries:
            raise ValueError("entries=[]: clips need at least one video")
        require_decoder(config.decoder)
        self.entries = entries
        self.config = config
        self.num_frames = num_frames
        self.frame_size = frame_size
        self.crashers = dict(known_crashers or {})
        """Grows by what crashes a worker; new workers start with a copy."""
        self.decoding = torch.tensor([NOTHING, 0])
        """int64 (2,): index of the entry that is being decoded, and how many were begun. A worker shares it with its
        parent, which outlives it."""

    @abstractmethod
    def __getitem__(self, number: int) -> ClipSample:
        """The clips of one video; what ``number`` counts is the data set's own matter."""

    @contextmanager
    def _open(self, index: int) -> Iterator[VideoFile]:
        """Open an entry, and leave word of it. What reads the video raises VideoError."""
        self.decoding[1] += 1
        self.decoding[0] = index
        try:
            with closing(open_entry(self.entries[index], self.config.decoder)) as video:
                yield video
        finally:
            self.decoding[0] = NOTHING


class PretrainClips(Videos):
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

    plan: ClassVar[Callable[..., ClipPlan]] = staticmethod(plan_clip)
    """Frames and views of one video."""

    def __init__(
        self,
        entries: Sequence[Entry],
        config: DataConfig,
        num_frames: int,
        frame_size: int,
        seed: int,
        known_crashers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(entries, config, num_frames, frame_size, known_crashers)
        self.seed = seed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, position: int) -> ClipSample:
        """Decode one video range and cut its crops.

        An unreadable video is replaced by another one, drawn for this place, and reported in ``bad``. Raises
        NoReadableVideoError when ten videos, or all there are, were unreadable.
        """
        sample = self._first_readable(position, None)
        assert isinstance(sample, ClipSample)
        return sample

    def read_encoded(self, reason_against: ReasonAgainst, position: int) -> ClipSample | EncodedSample:
        """The same video range undecoded, unless ``reason_against`` has a reason. Raises NoReadableVideoError alike."""
        return self._first_readable(position, reason_against)

    def _first_readable(self, position: int, reason_against: ReasonAgainst | None) -> ClipSample | EncodedSample:
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
                    read = self._read(tried, epoch, sample, reason_against)
                    return read._replace(bad=tuple(bad.values()))
                except VideoError as error:
                    bad[tried] = BadVideo(error.path, error.reason)
            if len(bad) == min(MAX_ATTEMPTS, len(self.entries)):
                raise NoReadableVideoError(tuple(bad.values()))
            tried = draw_replacement(self.seed, epoch, sample, bad.keys(), len(self.entries))

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self.seed, epoch, len(self.entries))
        return self._order[1]

    def _read(
        self, index: int, epoch: int, sample: int, reason_against: ReasonAgainst | None
    ) -> ClipSample | EncodedSample:
        """All crops of one range of frames of an entry, or its bytes where nothing speaks against that."""
        start = time.perf_counter()
        # What goes to another process as bytes needs its file.
        source: AbstractContextManager[Frameable] = self._open(index) if reason_against else self._frames_of(index)
        with source as video:
            plan = self._plan(epoch, sample, video)
            reason = reason_against(video) if reason_against else ""
            if reason is None:
                assert isinstance(video, EncodedVideo)
                clip = EncodedClip(video.path, video.encoded(), plan, VideoKind.of(video))
                return EncodedSample(clip, bad=(), shown=index)
            frames_THWC = video.read(plan.frame_ids)
            num_decoded = video.num_decoded
        cost = DecodeCost(time.perf_counter() - start, num_decoded)
        crops = torch.stack([apply_view(frames_THWC, view, self.frame_size) for view in plan.views])
        return ClipSample(crops, bad=(), decode=cost, shown=index, not_encoded=reason)

    @contextmanager
    def _frames_of(self, index: int) -> Iterator[Frameable]:
        """An entry: decoded before, or opened now."""
        entry = self.entries[index]
        decoded = decoded_videos(self.config.decoder, int(self.config.cache_gib * 2**30))
        if (kept := decoded.videos.get(entry)) is not None:
            yield kept
        else:
            with self._open(index) as video:
                yield decoded.keep(entry, video) or video

    def _plan(self, epoch: int, sample: int, video: Frameable) -> ClipPlan:
        return self.plan(
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
