"""``data.decoder=dali``: NVIDIA DALI decodes and crops on the run's device; on a GPU, frames never touch the host.

The data workers keep order, seed, replacements and crash guard. But of a video that DALI decodes rightly they hand over
the bytes, with the plan of its clips, instead of pixels. Any other one they decode themselves, as with "auto". The
training process makes a batch of both. A video on which DALI fails there is read on the CPU after all, and counts as
unreadable only if that fails, too.

Letters: V videos of a batch, R crops of each, T frames, S the clip's side in pixels, C channels.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adamae_fast.data import nvdec
from adamae_fast.data.batch import Batch
from adamae_fast.data.dataset import (
    ClipSample,
    EncodedClip,
    EncodedSample,
    NoReadableVideoError,
    PretrainClips,
    VideoKind,
)
from adamae_fast.data.decode import EncodedVideo, Frameable
from adamae_fast.data.quarantine import BadVideo, DataStoppedError
from adamae_fast.device import num_usable_cores

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]

CPU_CODECS = ("mjpeg", "vp8", "vp9")
"""What DALI decodes without a GPU."""

DALI_INSTALL = "pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for a driver of CUDA 12; Linux on x86-64 only)"

MAX_BYTES = 64 * 2**20
"""Larger files stay with the workers: a batch of them would fill the shared memory."""

MAX_THREADS = 8
"""Threads that decode; an H100 has 7 NVDEC engines."""

TRIALS = 3
"""Files of one kind that DALI may fail on, without decoding any, before that kind is left to the workers."""

NUM_BEFORE_WARNING = 32
"""Videos after which a run that DALI had no part in says so."""


def require_dali(device: torch.device) -> None:
    """Raise ValueError where DALI is not installed, or has no NVDEC to decode with on a CUDA ``device``."""
    if not dali_is_installed():
        raise ValueError(f"data.decoder='dali': NVIDIA DALI is not installed; {DALI_INSTALL}. Or choose auto")
    missing = nvdec.reason_missing() if device.type == "cuda" else None
    if missing:
        raise ValueError(f"data.decoder='dali': no decoding on {device}: {missing}. Or choose auto")


def dali_is_installed() -> bool:
    """Whether DALI can be imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class Suitability:
    """Says, in the workers, which videos DALI decodes rightly on ``device``. Raises ValueError as require_dali does."""

    def __init__(self, device: torch.device) -> None:
        require_dali(device)
        self.limits = nvdec.decodable(device) if device.type == "cuda" else None
        self.refused: set[VideoKind] = set()
        """Kinds that turned out not to decode; new workers start with a copy."""

    def reason_against(self, video: Frameable) -> str | None:
        """Why DALI is not to decode a video; None if it is."""
        if not isinstance(video, EncodedVideo):
            return "folders of images"
        kind = VideoKind.of(video)
        size = f"{kind.width}×{kind.height}"
        if kind in self.refused:
            return f"{kind.codec} of {size}, on which DALI failed"
        if self.limits is None:
            if kind.codec not in CPU_CODECS:
                return f"{kind.codec} needs a GPU"
        elif kind.codec not in self.limits:
            return f"{kind.codec} is not decoded on this GPU"
        elif not self.limits[kind.codec].admit(kind.width, kind.height):
            return f"{kind.codec} of {size} is not decoded on this GPU"
        if video.num_bytes > MAX_BYTES:
            return f"files above {MAX_BYTES >> 20} MiB"
        return video.dali_trap

    def describe(self) -> str:
        """What DALI decodes, and what happens to the rest, in words."""
        codecs, where = (CPU_CODECS, "the CPU") if self.limits is None else (self.limits, "the GPU")
        return f"DALI on {where} for {', '.join(codecs)}; the rest as with auto"


class EncodedPart(NamedTuple):
    """One video of a batch that DALI is to decode."""

    place: int
    """Which of the batch's videos it is."""

    clip: EncodedClip
    """Its content is empty here."""

    begin: int
    end: int
    """Its bytes in the batch's content."""


class EncodedBatch(NamedTuple):
    """What a worker hands over for a batch."""

    positions: range
    """Of its V videos in the stream."""

    encoded: list[EncodedPart]
    """Those that DALI is to decode."""

    content: Tensor
    """uint8 (bytes,): their files, one after another. One tensor, since each one costs a file descriptor."""

    clips: Tensor
    """uint8 (others, R, 3, T, S, S): the crops of the other ones, in their order."""

    bad: list[tuple[BadVideo, ...]]
    """Unreadable videos found for each of the V places."""

    fell_back: list[str]
    """Why the other ones are not left to DALI."""

    shown: list[int]
    """Index of the manifest's entry at each of the V places."""

    num_ready: int = 0
    """Batches that stood ready when this one was asked for."""

    def pin_memory(self) -> Self:
        """The DataLoader calls this for a CUDA device; encoded bytes are read on the host."""
        return self._replace(clips=self.clips.pin_memory())


def collate(samples: Sequence[ClipSample | EncodedSample], positions: range) -> EncodedBatch:
    """Put what a worker has read for the places of a batch together."""
    encoded, contents, clips, fell_back, end = [], [], [], [], 0
    for place, sample in enumerate(samples):
        if isinstance(sample, EncodedSample):
            begin, end = end, end + len(sample.clip.content)
            contents.append(np.frombuffer(sample.clip.content, dtype=np.uint8))
            encoded.append(EncodedPart(place, sample.clip._replace(content=b""), begin, end))
        else:
            clips.append(sample.video)
            fell_back.append(sample.not_encoded)
    content = torch.from_numpy(np.concatenate(contents)) if contents else torch.empty(0, dtype=torch.uint8)
    decoded = torch.stack(clips) if clips else torch.empty(0, dtype=torch.uint8)
    bad, shown = [sample.bad for sample in samples], [sample.shown for sample in samples]
    return EncodedBatch(positions, encoded, content, decoded, bad, fell_back, shown)


class DaliError(Exception):
    """DALI could not make a batch; the text is its reason in one line."""


class DaliPipeline:
    """Decodes, crops, resizes and mirrors; one batch at a time, while the caller does something else.

    Built when it is first needed, and again after an error, which is the end of a DALI pipeline.
    """

    def __init__(self, device: torch.device, max_videos: int, repeat: int, frame_size: int) -> None:
        self._device = device
        self._max_videos = max_videos
        self._repeat = repeat
        self._frame_size = frame_size
        self._pipeline: Any = None

    def start(self, clips: Iterable[tuple[Bytes, EncodedClip]]) -> None:
        """Begin with a batch of files (uint8 (bytes,)) and their plans. Raises DaliError."""
        inputs: dict[str, list[NDArray[Any]]] = {name: [] for name in ("content", "frames", "order", "boxes", "sizes")}
        for content, clip in clips:
            # A frame that a short video shows again is decoded once.
            frames, order = np.unique(clip.plan.frame_ids, return_inverse=True)
            views, side = clip.plan.views, self._frame_size
            boxes = [(view.box.top, view.box.left, view.box.height, view.box.width) for view in views]
            sizes = [(side, -side if view.flip else side) for view in views]  # a negative side mirrors
            inputs["content"].append(content)
            inputs["frames"].append(frames.astype(np.int32))
            inputs["order"].append(order.astype(np.int32))
            inputs["boxes"].append(np.array(boxes, dtype=np.int32))
            inputs["sizes"].append(np.array(sizes, dtype=np.float32))
        try:
            if self._pipeline is None:
                self._pipeline = self._build()
            for name, arrays in inputs.items():
                self._pipeline.feed_input(name, arrays)
            self._pipeline.schedule_run()
        except RuntimeError as error:
            self._pipeline = None
            raise DaliError(_plain_dali(error)) from error

    def finish(self) -> Tensor:
        """Wait for the batch: uint8 (V, R, 3, T, S, S) on the device, without a copy. Raises DaliError."""
        is_cuda = self._device.type == "cuda"
        try:
            # Given a stream, DALI orders its memory's use by it, and the host waits for nothing.
            (clips,) = self._pipeline.outputs(torch.cuda.current_stream(self._device) if is_cuda else None)
        except RuntimeError as error:
            self._pipeline = None
            raise DaliError(_plain_dali(error)) from error
        return torch.from_dlpack(clips.as_tensor())

    def _build(self) -> Any:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        is_cuda = self._device.type == "cuda"
        index = self._device.index
        pipeline = Pipeline(
            batch_size=self._max_videos,
            num_threads=max(1, min(MAX_THREADS, self._max_videos, num_usable_cores())),
            device_id=None if not is_cuda else torch.cuda.current_device() if index is None else index,
            prefetch_queue_depth=1,  # batches are fed one by one
        )
        with pipeline:
            content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
            ids_F = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            order_T = fn.external_source(name="order", dtype=types.INT32, ndim=1)
            boxes_R4 = fn.external_source(name="boxes", dtype=types.INT32, ndim=2)
            sizes_R2 = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=2)
            frames_FHWC = fn.decoders.video(
                content,
                device="mixed" if is_cuda else "cpu",
                frames=ids_F,
                pad_mode="none",  # a frame that is not there is an error, not a black one
                affine=False,  # pinned threads of several ranks would share the first cores
            )
            crops = []
            for r in range(self._repeat):
                # Cut out before it is resized: a filter must not see what lies around the box.
                part_FHWC = fn.slice(frames_FHWC, start=boxes_R4[r, 0:2], shape=boxes_R4[r, 2:4], axes=[1, 2])
                crop_FSSC = fn.resize(part_FHWC, size=sizes_R2[r], interp_type=types.INTERP_LINEAR, antialias=True)
                crops.append(fn.sequence_rearrange(crop_FSSC, new_order=order_T))
            pipeline.set_outputs(fn.transpose(fn.stack(*crops), perm=[0, 4, 1, 2, 3]))
        pipeline.build()
        return pipeline


def _plain_dali(error: RuntimeError) -> str:
    """The line of DALI's message that says what was wrong."""
    told = str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
    return told.rpartition('" failed: ')[2]


class _Started(NamedTuple):
    """A batch that is under way."""

    handed_over: EncodedBatch
    parts: list[EncodedPart]
    """What DALI was given."""
    error: DaliError | None
    """Why it did not even begin."""


class DaliStream:
    """Makes batches of what the workers hand over.

    Args:
        clips: the stream; also reads on the CPU what DALI fails on.
        suitability: which videos the workers leave to DALI.
        device: where clips are wanted.
        num_videos: V.
    """

    def __init__(self, clips: PretrainClips, suitability: Suitability, device: torch.device, num_videos: int) -> None:
        self._clips = clips
        self._suitability = suitability
        self._device = device
        self._num_videos = num_videos
        self._pipeline = DaliPipeline(device, num_videos, clips.config.repeat, clips.frame_size)
        self._failed: dict[str, str] = {}
        self._blamed: set[str] = set()
        self._failures: Counter[VideoKind] = Counter()
        self._decoded_kinds: set[VideoKind] = set()
        self._num_seen = 0
        self._fell_back: Counter[str] = Counter()
        self._has_warned = False

    def batches(
        self, handed_over_from: Callable[[int], Generator[EncodedBatch, None, None]], next_batch: int
    ) -> Generator[Batch, None, None]:
        """Batches from ``next_batch`` on; DALI decodes one while the one before it is used.

        ``handed_over_from(i)`` are the workers' batches from i on. When another kind of video turns out not to decode,
        the workers start again at the next batch and decode it themselves. Raises what the workers' batches raise.
        """
        try:
            while True:
                num_refused = len(self._suitability.refused)
                with closing(handed_over_from(next_batch)) as handed_over:
                    ahead = self._start(next(handed_over, None))
                    while ahead is not None:
                        batch = self._finish(ahead)
                        next_batch += 1
                        if len(self._suitability.refused) > num_refused:
                            yield batch
                            break
                        stopped: DataStoppedError | None = None
                        try:
                            ahead = self._start(next(handed_over, None))
                        except DataStoppedError as error:  # of the batch to come, not of this one
                            stopped = error
                        yield batch
                        if stopped is not None:
                            raise stopped
                    else:
                        return
        finally:
            self._warn_if_unused()

    def _start(self, handed_over: EncodedBatch | None) -> _Started | None:
        """Let DALI begin with a batch, but for what it is known to fail on."""
        if handed_over is None:
            return None
        parts = [part for part in handed_over.encoded if part.clip.path not in self._failed]
        if not parts:
            return _Started(handed_over, parts, None)
        try:
            self._pipeline.start(self._files(handed_over, parts))
        except DaliError as error:
            return _Started(handed_over, parts, error)
        return _Started(handed_over, parts, None)

    def _files(self, handed_over: EncodedBatch, parts: Sequence[EncodedPart]) -> list[tuple[Bytes, EncodedClip]]:
        content = handed_over.content.numpy()
        return [(content[part.begin : part.end], part.clip) for part in parts]

    def _finish(self, started: _Started) -> Batch:
        handed_over, parts, _ = started
        together, decoded = self._decoded(started)
        left_to_dali = {part.place: part.clip for part in handed_over.encoded}
        by_workers = iter(handed_over.clips)
        crops: list[Tensor] = []
        bad, fell_back, shown = list(handed_over.bad), list(handed_over.fell_back), list(handed_over.shown)
        for place, position in enumerate(handed_over.positions):
            if place in decoded:
                crops.append(decoded[place])
            elif place not in left_to_dali:
                crops.append(next(by_workers))
            else:
                sample = self._read_on_cpu(position, [video for videos in bad[:place] for video in videos])
                crops.append(sample.video)
                bad[place] = sample.bad
                shown[place] = sample.shown
                fell_back.append(self._blame(left_to_dali[place], sample))
        if together is not None and len(parts) == len(crops):
            video = together
        elif not left_to_dali:
            video = handed_over.clips
        else:
            video = torch.empty((len(crops), *crops[0].shape), dtype=torch.uint8, device=self._device)
            for place, crop in enumerate(crops):
                video[place].copy_(crop, non_blocking=True)
        self._count(len(crops), fell_back)
        all_bad = [video for videos in bad for video in videos]
        return Batch(
            video.flatten(0, 1),
            all_bad,
            num_ready=handed_over.num_ready,
            shown=[index for index in shown for _ in crops[0]],
            num_by_dali=len(decoded),
            fell_back=tuple(fell_back),
        )

    def _decoded(self, started: _Started) -> tuple[Tensor | None, dict[int, Tensor]]:
        """What DALI made: all in one tensor where nothing failed, and the crops (R, 3, T, S, S) by place."""
        handed_over, parts, error = started
        if not parts:
            return None, {}
        together, decoded = None, {}
        try:
            if error is not None:
                raise error
            together = self._pipeline.finish()
            decoded = dict(zip((part.place for part in parts), together, strict=True))
        except DaliError:  # one file spoils a batch, and which one it was is not told
            for part in parts:
                try:
                    self._pipeline.start(self._files(handed_over, [part]))
                    decoded[part.place] = self._pipeline.finish()[0]
                except DaliError as its_error:
                    self._failed[part.clip.path] = str(its_error)
        self._decoded_kinds |= {part.clip.kind for part in parts if part.place in decoded}
        return together, decoded

    def _read_on_cpu(self, position: int, bad_before: Sequence[BadVideo]) -> ClipSample:
        try:
            return self._clips[position]
        except NoReadableVideoError as error:
            error.bad = (*bad_before, *error.bad)
            raise

    def _blame(self, clip: EncodedClip, sample: ClipSample) -> str:
        """Say why DALI did not decode a clip. A file that the CPU reads speaks against its kind, not for its damage."""
        reason = self._failed[clip.path]
        if clip.path not in self._blamed and all(video.path != clip.path for video in sample.bad):
            self._blamed.add(clip.path)
            log.warning("%s: DALI failed (%s); it is decoded on the CPU", clip.path, reason)
            self._failures[clip.kind] += 1
            is_settled = clip.kind in self._suitability.refused or clip.kind in self._decoded_kinds
            if self._failures[clip.kind] >= TRIALS and not is_settled:
                log.warning("DALI decodes no %s: the data workers start again and decode it", clip.kind)
                self._suitability.refused.add(clip.kind)
        return f"DALI failed: {reason}"

    def _count(self, num_videos: int, fell_back: Sequence[str]) -> None:
        self._num_seen += num_videos
        self._fell_back.update(fell_back)
        if self._num_seen >= NUM_BEFORE_WARNING:
            self._warn_if_unused()

    def _warn_if_unused(self) -> None:
        """Say once if everything so far was decoded on the CPU."""
        if not self._has_warned and self._num_seen and self._fell_back.total() == self._num_seen:
            self._has_warned = True
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self._fell_back.most_common(5))
            log.warning(
                "data.decoder=dali has decoded none of %d videos: %s. The CPU decodes them, as with auto",
                self._num_seen,
                reasons,
            )
