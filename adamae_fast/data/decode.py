"""Opens videos and folders of images, and reads single frames of them: the picture asked for, or :class:`VideoError`.

Frame i is the i-th picture that comes out of a complete decode; several of one time count as one. PyAV first lists the
file's packets (no decoding, a few per cent of a read), so that a read goes straight to what it needs. decord counts
packets instead: with open groups of pictures, edit lists, hidden packets or wrong time stamps it returns other frames
than those asked for, without a word. Where the list shows such a trap, it is an error to ask decord. What both read has
the same bytes.

Letters: T frames, H, W pixels.
"""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import re
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from adamae_fast.config import DecoderName
from adamae_fast.data.manifest import Entry, numbered_images
from adamae_fast.data.packets import (
    I_SLICE,
    P_SLICE,
    Packet,
    find_dali_trap,
    find_decord_trap,
    h264_slice_kind,
    is_h264_disposable,
    presentation_times,
    shows_old_vp9,
)
from adamae_fast.data.shards import DamagedVideoError, PreparedVideo

Frames = NDArray[np.uint8]

NO_RECOVERED_FRAMES = "0.0000001"
"""decord's ``fault_tol``: the first frame replaced by another one is an error (its 0 would mean "never")."""

DALI_PIXEL_FORMATS = ("yuv420p", "yuvj420p")
"""FFmpeg's names of 8-bit 4:2:0, which every NVDEC decodes."""

BT601 = (2, 5, 6)
"""FFmpeg's numbers of colour matrices that all decoders take for BT.601: not marked, BT.470 BG, SMPTE 170M. The CPU
decoders heed other marks; DALI does not, and its colours would be 2 to 5 levels away."""


class VideoError(Exception):
    """A video that cannot be read. ``path`` names it, ``reason`` says why in plain words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Frameable(Protocol):
    """What clips are cut from."""

    num_frames: int
    height: int
    width: int
    """Pixels of the upright frames that :meth:`read` returns."""
    num_decoded: int
    """Frames that the last :meth:`read` decoded: from a key frame to the last one asked for, without those that PyAV
    may leave out."""

    def read(self, ids: Sequence[int] | NDArray[np.int64]) -> Frames:
        """Upright RGB frames (T, H, W, 3); ids may repeat. Raises IndexError for one outside 0..num_frames-1."""


class VideoFile(Frameable, Protocol):
    """An open video. Every method that touches the file raises :class:`VideoError` for a broken one."""

    path: str
    decoder: str
    """"decord", "pyav" or "pillow": what read the last frames, or what will read the first ones."""
    codec: str
    fps: float | None

    def in_order(self, short_side: int) -> Iterator[Frames]:
        """All frames (H, W, 3), one after another, of the size that :func:`fitted_size` says."""

    def close(self) -> None:
        """Give the file back. The object cannot be used afterwards."""


def open_entry(entry: Entry, decoder: DecoderName = "auto") -> VideoFile:
    """Open what a manifest's line names: a video, a folder of images, or a prepared video."""
    if entry.kind == "frames":
        return FrameFolder(entry.path, entry.start, entry.num_frames)
    if entry.prepared is not None:
        require_decoder(decoder)
        return PreparedFile(entry.prepared, decoder)
    return open_video(entry.path, decoder)


def open_video(path: str, decoder: DecoderName = "auto") -> VideoFile:
    """Open one video file.

    ``decoder``: "decord" takes decord; "pyav" and "auto" take PyAV, which reads more files, and faster. Of several
    video streams FFmpeg's "best" is taken: the default one if only one is marked so, then the one with more frames,
    then the higher bit rate. Rotations by 90, 180 and 270 degrees in the metadata are carried out, others and mirroring
    ignored.

    Raises:
        VideoError: the file is missing, a folder, empty, no video, or does not decode.
        ValueError: decoder="decord" where decord is not installed.
    """
    require_decoder(decoder)
    return EncodedVideo(path, decoder)


def require_decoder(decoder: DecoderName) -> None:
    """Raise ValueError if ``decoder`` is not installed."""
    if decoder == "decord" and not decord_is_installed():
        raise ValueError("data.decoder='decord': decord is not installed; install it, or choose auto or pyav")


def decord_is_installed() -> bool:
    """Whether decord can be imported; it has wheels for Linux on x86-64 only."""
    return importlib.util.find_spec("decord") is not None


class EncodedVideo:
    """One video file, read by decord or PyAV. A :class:`VideoFile`."""

    def __init__(self, path: str, decoder: DecoderName) -> None:
        self.num_bytes = _require_file(path)
        self.path = path
        self._file = os.path.abspath(path)  # FFmpeg takes what stands before a colon for a protocol
        self._container: Any = None
        with _errors_of_pyav(path, "no video, cut short or damaged"), ExitStack() as unless_it_opens:
            unless_it_opens.callback(self.close)  # it and its streams refer to each other: nothing else would soon
            self._open()
            self._index()
            unless_it_opens.pop_all()
        self.decoder: str = "decord" if decoder == "decord" else "pyav"

    def close(self) -> None:
        """Close the container, if it was opened."""
        if self._container is not None:
            self._container.close()

    def read(self, ids: Sequence[int] | NDArray[np.int64]) -> Frames:
        """See :class:`VideoFile`."""
        wanted, inverse = _checked(ids, self.num_frames)
        if self.decoder == "decord":
            return _select(self._read_decord(wanted), wanted, inverse)
        with _errors_of_pyav(self.path, "damaged, these frames do not decode"):
            return _select(self._read_pyav(wanted), wanted, inverse)

    def _source(self) -> str | BinaryIO:
        """What the decoders open."""
        return self._file

    def in_order(self, short_side: int) -> Iterator[Frames]:
        """See :class:`VideoFile`. One complete decode, by PyAV."""
        size = fitted_size(self.height, self.width, short_side)
        count = 0
        with _errors_of_pyav(self.path, "damaged, its frames do not decode"):
            self._reopen()
            for frame in self._container.decode(self._stream):
                yield self._upright_rgb(frame, size)
                count += 1
        if count != self.num_frames:
            raise VideoError(self.path, f"damaged: {count} of {self.num_frames} frames decode")

    def _open(self) -> None:
        import av

        # Metadata in an unknown encoding is no reason to refuse the pictures.
        self._container = av.open(self._source(), "r", metadata_errors="replace")
        stream = self._container.streams.best("video")
        if stream is None:
            sound = self._container.streams.audio
            raise VideoError(self.path, f"no video stream, {'only sound' if sound else 'probably cut short'}")
        if stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError(self.path, "no video stream, only a cover picture")
        if self._container.format.name == "tty":
            raise VideoError(self.path, "a text file")
        if stream.codec_context is None:
            raise VideoError(self.path, "no decoder for codec of its video stream: FFmpeg does not know it")
        self._stream = cast(Any, stream)
        self._stream.thread_count = 1  # the data workers are the parallelism

    def _index(self) -> None:
        """List the packets, decode the first frame, and find out how frames are to be addressed."""
        codec = self._stream.codec_context
        packets: list[Packet] = []
        latest = -math.inf
        first = None
        shows_old = False
        for packet in self._container.demux(self._stream):
            if packet.size:
                shows_old = shows_old or (codec.name == "vp9" and shows_old_vp9(memoryview(packet)[0]))
                is_early = packet.pts is not None and packet.pts < latest
                latest = max(latest, latest if packet.pts is None else packet.pts)
                kind = None
                if codec.name == "h264" and (packet.is_keyframe or is_early):
                    kind = h264_slice_kind(packet, codec.extradata)
                restarts = packet.is_keyframe and (codec.name != "h264" or kind == I_SLICE)
                is_misplaced = is_early and kind in (I_SLICE, P_SLICE)
                packets.append(Packet(packet.pts, packet.is_keyframe, restarts, packet.is_discard, is_misplaced))
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise VideoError(self.path, "no frame of its video stream decodes")
        self.codec = str(codec.name)
        self.fps = float(self._stream.average_rate) if self._stream.average_rate else None
        self._frame_size = (first.width, first.height)
        # Counter-clockwise quarter turns; the metadata says how the picture is turned to stand upright.
        self._turns = first.rotation // 90 % 4 if first.rotation % 90 == 0 else 0
        self.height, self.width = self._frame_size if self._turns % 2 else self._frame_size[::-1]
        self._pts, self._key_pts = presentation_times(packets, first.pts)
        if self._container.format.name == "avi" and codec.has_b_frames:
            self._pts = None  # AVI stores no presentation times: these are guesses that do not fit the order
        self.num_frames = len(self._pts) if self._pts else self._count_frames()
        if not self.num_frames:
            raise VideoError(self.path, "its frames do not decode a second time")
        container = self._container.format.name
        self._decord_trap = find_decord_trap(packets, self._pts, container, self._turns)
        trap = find_dali_trap(packets, self._pts, container, self._turns)
        self.dali_trap = trap or self._odd_for_dali(first, shows_old)
        """Why DALI would return other pictures than this class; None if it would not."""

    def _odd_for_dali(self, first: Any, shows_old: bool) -> str | None:
        if first.format.name not in DALI_PIXEL_FORMATS:
            return f"pixels stored as {first.format.name}"
        if first.colorspace not in BT601:
            return "colours marked as other than BT.601"
        if first.interlaced_frame:
            return "interlaced frames"
        if len(self._container.streams.video) > 1:
            return "several video streams"
        return "packets that only show an earlier picture" if shows_old else None

    def encoded(self) -> bytes:
        """The bytes of the file."""
        try:
            with open(self._file, "rb") as file:
                return file.read()
        except OSError as error:
            raise VideoError(self.path, _plain_os(error)) from error

    def _read_decord(self, wanted: list[int]) -> Frames:
        if self._decord_trap:
            raise VideoError(self.path, f"decord would return wrong frames: {self._decord_trap}; use auto or pyav")
        decord = _import_decord()
        try:
            reader = decord.VideoReader(self._source(), ctx=decord.cpu(0), num_threads=1, fault_tol=NO_RECOVERED_FRAMES)
            if len(reader) != self.num_frames:
                raise VideoError(self.path, f"decord: counts {len(reader)} frames, there are {self.num_frames}")
            self.num_decoded = self._frames_on_the_way(wanted)
            frames = cast(Frames, reader.get_batch(wanted).asnumpy())
        # What decord raises: its own two errors from C++, RuntimeError and AssertionError from its Python part.
        except (decord.DECORDError, decord._ffi.base.DECORDLimitReachedError, RuntimeError, AssertionError) as error:
            raise VideoError(self.path, f"decord: {_plain_decord(error)}") from error
        if frames.shape[1:3] != (self.height, self.width):
            expected = (self.height, self.width)
            raise VideoError(self.path, f"decord: frames of {frames.shape[1:3]}, expected {expected}")
        return frames

    def _frames_on_the_way(self, wanted: list[int]) -> int:
        """How many frames there are from the key frame before the first wanted one to the last."""
        assert self._pts  # without times decord reads nothing
        return wanted[-1] + 1 - bisect_left(self._pts, self._key_before(wanted[0], self._pts))

    def _key_before(self, frame: int, pts: list[int]) -> int:
        """The time of the last key frame that is not shown after ``frame``."""
        return self._key_pts[bisect_right(self._key_pts, pts[frame]) - 1]

    def _read_pyav(self, wanted: list[int]) -> Frames:
        if self._pts:
            key = self._key_before(wanted[0], self._pts)
            # Where a container seeks badly, once more from its beginning.
            for start in dict.fromkeys((key, self._key_pts[0])):
                frames = self._read_by_time(wanted, self._pts, start)
                if frames is not None:
                    return frames
        return self._read_by_count(wanted)

    def _read_by_time(self, wanted: list[int], pts: list[int], start: int) -> Frames | None:
        """Decode from the key frame at ``start``; None unless the first wanted one and its successors come in turn."""
        import av

        needed = {pts[place] for place in wanted}
        try:
            self._container.seek(start, stream=self._stream)
        except av.error.FFmpegError:  # this container cannot seek
            return None
        packets, times = self._needed_packets(needed)
        self.num_decoded = len(packets)
        due = [time for time in times if time >= min(needed)]
        found: list[Frames] = []
        for packet in (*packets, None):  # None: the decoder gives what it has kept back
            for frame in self._stream.decode(packet):
                # What comes before the first one, and a second picture of the same time.
                if frame.pts is not None and (not due or frame.pts < due[0]):
                    continue
                if not due or frame.pts != due.pop(0):
                    return None
                if frame.pts in needed:
                    found.append(self._upright_rgb(frame))
        return np.stack(found) if len(found) == len(needed) else None

    def _needed_packets(self, needed: set[int]) -> tuple[list[Any], list[int]]:
        """What has to be decoded for the frames of these times, from here on, and the times of all its frames.

        Pictures that nobody wants and no other one is made from are left out: with x264's defaults half of them.
        Nothing where the file does not go on with a key frame before these times, or ends before them.
        """
        packets: list[Any] = []
        missing = set(needed)
        for packet in self._container.demux(self._stream):
            if not packet.size or not (packets or packet.is_keyframe):
                continue
            if not packets and (packet.pts is None or packet.pts > min(needed)):
                return [], []
            if not missing and packet.pts not in needed:
                break
            packets.append(packet)
            missing.discard(packet.pts)
        if missing:
            return [], []
        codec = self._stream.codec_context
        if codec.name == "h264":
            disposable: set[int | None] = set()
            others: set[int | None] = set(needed)
            for packet in packets:
                is_disposable = is_h264_disposable(packet, codec.extradata)
                (disposable if is_disposable else others).add(packet.pts)
            # Two packets of one time are the fields of one picture, of which both are needed or none.
            packets = [packet for packet in packets if packet.pts not in disposable - others]
        times = {packet.pts for packet in packets if packet.pts is not None and not packet.is_discard}
        return packets, sorted(times)

    def _read_by_count(self, wanted: list[int]) -> Frames:
        """Decode the whole file and count; for files whose time stamps do not tell frames apart."""
        self.num_decoded = self.num_frames
        self._reopen()
        found: list[Frames] = []
        count = 0
        for frame in self._container.decode(self._stream):
            if len(found) < len(wanted) and count == wanted[len(found)]:
                found.append(self._upright_rgb(frame))
            count += 1
        if count != self.num_frames:
            raise VideoError(self.path, f"{count} of {self.num_frames} frames decode; which ones is unknown")
        return np.stack(found)

    def _count_frames(self) -> int:
        self._reopen()
        return sum(1 for _ in self._container.decode(self._stream))

    def _reopen(self) -> None:
        self.close()
        self._open()

    def _upright_rgb(self, frame: Any, size: tuple[int, int] | None = None) -> Frames:
        """``size``: upright height and width; by default the first frame's.

        Frames that change size in mid-stream are brought to that of the first one, as decord does.
        """
        height, width = size or (self.height, self.width)
        if self._turns % 2:
            height, width = width, height
        rgb = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC", threads=1)
        return np.rot90(rgb, self._turns)


class PreparedFile(EncodedVideo):
    """A video that ``data prepare`` wrote, in a tar shard.

    Its frames follow one another at one distance in time from 0 on, and nothing in it leads decord astray: its packets
    need not be listed. Its bytes are read at once and their checksum is compared: 3 % of a clip's decoding.
    """

    def __init__(self, video: PreparedVideo, decoder: DecoderName) -> None:
        self.path = video.path
        try:
            self._content = video.read()
        except DamagedVideoError as error:
            raise VideoError(self.path, str(error)) from error
        self.codec = video.codec
        self.fps = video.fps
        self.num_frames = video.num_frames
        self._frame_size = (video.width, video.height)
        self.height, self.width = video.height, video.width
        self.num_bytes = video.length
        self._turns = 0
        self._pts = None
        self._decord_trap = self.dali_trap = None
        self._container = None  # opened when PyAV is to read from it
        self.decoder = "decord" if decoder == "decord" else "pyav"

    def encoded(self) -> bytes:
        """The bytes of the member."""
        return self._content

    def _source(self) -> BinaryIO:
        return BytesIO(self._content)

    def _frames_on_the_way(self, wanted: list[int]) -> int:
        return wanted[-1] + 1 - wanted[0]  # and those between the key frame and the first one, fewer than --keyint

    def _read_pyav(self, wanted: list[int]) -> Frames:
        if self._container is None:
            self._open()
            found = (self._stream.frames, self._stream.width, self._stream.height)
            if found != (self.num_frames, *self._frame_size):
                raise VideoError(self.path, f"holds (frames, width, height) {found}, its index says otherwise")
            step = (self._stream.duration or 0) // self.num_frames
            # A seek goes to the key frame before; so every frame's time may stand for one.
            self._pts = self._key_pts = list(range(0, self.num_frames * step, step))
        return super()._read_pyav(wanted)


class FrameFolder:
    """A folder of numbered images, read by Pillow. A :class:`VideoFile`.

    Its frames are the images whose number is ``start`` or more, in ascending order, the first ``num_frames`` of them.
    """

    decoder: str = "pillow"
    fps: float | None = None

    def __init__(self, path: str, start: int, num_frames: int | None) -> None:
        self.path = path
        try:
            images = numbered_images(path)
        except (OSError, ValueError) as error:
            raise VideoError(path, _plain_os(error)) from error
        names = [name for number, name in images.items() if number >= start]
        self._names = names if num_frames is None else names[:num_frames]
        self.num_frames = len(self._names)
        if not names or (num_frames is not None and num_frames > len(names)):
            raise VideoError(path, f"holds {len(names)} images numbered {start} or more, not {num_frames}")
        self.codec = os.path.splitext(self._names[0])[1][1:].lower()
        with self._open_image(self._names[0]) as first:
            self.width, self.height = first.size

    def close(self) -> None:
        """Nothing stays open."""

    def read(self, ids: Sequence[int] | NDArray[np.int64]) -> Frames:
        """See :class:`VideoFile`."""
        wanted, inverse = _checked(ids, self.num_frames)
        self.num_decoded = len(wanted)
        frames = [self._image(self._names[i]) for i in wanted]
        sizes = {(self.height, self.width), *(frame.shape[:2] for frame in frames)}
        if len(sizes) > 1:
            raise VideoError(self.path, f"images of different sizes (height, width): {sorted(sizes)}")
        return _select(np.stack(frames), wanted, inverse)

    def in_order(self, short_side: int) -> Iterator[Frames]:
        """See :class:`VideoFile`."""
        from PIL import Image

        first = self._image(self._names[0]).shape
        height, width = fitted_size(first[0], first[1], short_side)
        for name in self._names:
            frame = self._image(name)
            if frame.shape != first:
                raise VideoError(self.path, f"images of different sizes: {name} has {frame.shape[:2]}, not {first[:2]}")
            yield np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))

    def _image(self, name: str) -> Frames:
        with self._open_image(name) as image:
            return np.asarray(image.convert("RGB"))

    @contextmanager
    def _open_image(self, name: str) -> Iterator[Any]:
        from PIL import Image

        try:
            with Image.open(os.path.join(self.path, name)) as image:
                yield image
        # SyntaxError is Pillow's word for a broken PNG, EOFError for a cut-off file.
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise VideoError(self.path, f"{name}: {error}") from error


class DecodedVideo:
    """All frames of a video in memory: :class:`Frameable`, so that clips are cut from it as from a file."""

    def __init__(self, video: VideoFile) -> None:
        """Decode ``video``, which can be closed afterwards. Raises VideoError where a frame does not decode."""
        self.num_frames, self.height, self.width = video.num_frames, video.height, video.width
        self.frames_THWC = video.read(range(video.num_frames))
        self.num_decoded = self._decoded_before_read = video.num_decoded

    def read(self, ids: Sequence[int] | NDArray[np.int64]) -> Frames:
        """See :class:`Frameable`. Decoding counts for the first time."""
        self.num_decoded, self._decoded_before_read = self._decoded_before_read, 0
        wanted, inverse = _checked(ids, self.num_frames)
        return _select(self.frames_THWC[wanted], wanted, inverse)


def fitted_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with a short side of at most ``short_side``, which is even: same shape, even, never enlarged."""
    scale = min(1.0, short_side / min(height, width))
    return _even(height, scale), _even(width, scale)


def _even(side: int, scale: float) -> int:
    return max(2, min(2 * round(side * scale / 2), side // 2 * 2))


def _checked(ids: Sequence[int] | NDArray[np.int64], num_frames: int) -> tuple[list[int], NDArray[np.intp]]:
    """The different ids in ascending order, and where each id stands among them."""
    ids_T = np.asarray(ids, dtype=np.int64)
    if not ids_T.size or ids_T.min() < 0 or ids_T.max() >= num_frames:
        raise IndexError(f"ids={ids_T.tolist()}: choose at least one, all from 0 to {num_frames - 1}")
    wanted, inverse = np.unique(ids_T, return_inverse=True)
    return wanted.tolist(), inverse


def _select(frames: Frames, wanted: list[int], inverse: NDArray[np.intp]) -> Frames:
    return frames if np.array_equal(inverse, np.arange(len(wanted))) else frames[inverse]


def _require_file(path: str) -> int:
    """Raise VideoError unless ``path`` is a file that is not empty; return its bytes."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise VideoError(path, _plain_os(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "a folder, not a video" if stat.S_ISDIR(status.st_mode) else "not a file")
    if status.st_size == 0:
        raise VideoError(path, "the file is empty")
    return status.st_size


@contextmanager
def _errors_of_pyav(path: str, if_invalid: str) -> Iterator[None]:
    """Turn what PyAV raises for a broken file into VideoError; ``if_invalid`` is what invalid data means here."""
    import av

    try:
        yield
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise VideoError(path, f"{if_invalid}: {error.strerror}") from error
    # PyAV raises ValueError for pixel formats and sizes that it cannot convert.
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.EPERM:
            reason = "finds no stream that it can read"  # what it returns, -1, merely reads like a matter of permission
        raise VideoError(path, f"FFmpeg: {reason}") from error


def _plain_os(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror.lower() if strerror else str(error)


def _plain_decord(error: Exception) -> str:
    """The first line of decord's error without times, source files and stack."""
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"(\[[\d:]+\] )?\S+\.cc:\d+: ", "", first)


def _import_decord() -> Any:
    # Read when decord's library is loaded. Frames that do not decode are an error: no rewinding for a substitute.
    os.environ.setdefault("DECORD_REWIND_RETRY_MAX", "-1")
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord
