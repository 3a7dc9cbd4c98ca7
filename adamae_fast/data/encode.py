"""Encodes one video so that any frame of it is cheap to reach, for ``data prepare``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from adamae_fast.data.decode import Frames, VideoError, open_entry
from adamae_fast.data.manifest import Entry
from adamae_fast.data.packets import Packet, find_decord_trap, presentation_times

Codec = Literal["h264", "vp9"]

DEFAULT_RATE = Fraction(25)
"""Frames per second of images, and of videos whose own rate makes no sense."""

# H.264: no CABAC, no deblocking and no weighted prediction (fastdecode) halve the time of a decode for 10 % more bytes.
# Of every four frames, three are B pictures that no other one is made from: a reader that wants each fourth decodes
# half as many pictures as without them, in two thirds of the time, and the files are a fifth smaller.
# x264's macroblock tree gives other bytes from one call to the next for the same frames, even with one thread: off.
# VP9: no frames that are hidden and none that come late.
ENCODERS: dict[Codec, tuple[str, dict[str, str]]] = {
    "h264": (
        "libx264",
        {
            "preset": "veryfast",
            "tune": "fastdecode",
            "crf": "20",
            "sc_threshold": "0",
            "x264-params": "mbtree=0:bframes=3:b-adapt=0:b-pyramid=none:open-gop=0",
        },
    ),
    "vp9": (
        "libvpx-vp9",
        {
            "deadline": "realtime",
            "cpu-used": "8",
            "crf": "30",
            "b": "0",
            "row-mt": "0",
            "lag-in-frames": "0",
            "auto-alt-ref": "0",
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides on the bytes of an encoded video, beside its source."""

    short_side: int
    """The short side of a frame becomes at most this many pixels."""

    codec: Codec
    keyint: int
    """Distance between two key frames, in frames."""

    max_seconds: float
    """So much from the start on is kept; 0 for all."""


def encode(entry: Entry, path: Path, settings: Settings) -> dict[str, Any]:
    """Encode one video of a manifest into the mp4 file ``path`` and return what is known of it.

    Raises VideoError if it cannot be read or encoded, OSError if the file cannot be written.
    """
    import av

    with closing(open_entry(entry, "pyav")) as video:
        rate = container_rate(video.fps)
        frames = video.in_order(settings.short_side)
        if settings.max_seconds:
            frames = islice(frames, max(1, math.ceil(settings.max_seconds * rate)))
        encoder, options = ENCODERS[settings.codec]
        options = {**options, "g": str(settings.keyint), "keyint_min": str(settings.keyint)}
        try:
            num_frames, height, width = write_frames(path, frames, rate, encoder, options)
            _require_sound(entry.path, path, num_frames, settings.keyint)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise VideoError(entry.path, f"cannot be encoded: {error.strerror}") from error
    content = path.read_bytes()
    return {
        "length": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "codec": settings.codec,
        "frames": num_frames,
        "height": height,
        "width": width,
        "fps": float(rate),
    }


def container_rate(fps: float | None) -> Fraction:
    """A rate that an mp4 file can hold: 30000/1001 and the like, or the default."""
    return Fraction(fps).limit_denominator(1001) if fps and 1 <= fps <= 1000 else DEFAULT_RATE


def write_frames(
    path: Path, frames: Iterable[Frames], rate: Fraction, encoder: str, options: Mapping[str, str]
) -> tuple[int, int, int]:
    """Write RGB frames (H, W, 3) of even height and width as an mp4 file; return how many, their height and width.

    The same frames give the same bytes. Raises PyAV's FFmpegError.
    """
    import av

    height = width = num_frames = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream(encoder, rate=rate, options=dict(options))
        stream.thread_count = 1  # the processes are the parallelism; and threads may change the bytes
        stream.pix_fmt = "yuv420p"
        for frame_HWC in frames:
            if not num_frames:
                height, width, _ = frame_HWC.shape
                stream.height, stream.width = height, width
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts, frame.time_base = num_frames, 1 / rate
            container.mux(stream.encode(frame))
            num_frames += 1
        container.mux(stream.encode())
    return num_frames, height, width


def _require_sound(source: str, path: Path, num_frames: int, keyint: int) -> None:
    """Make sure of what readers rely on: no trap, one distance between frames, a key frame every ``keyint``."""
    import av

    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        packets = [Packet(p.pts, p.is_keyframe, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
        step = (stream.duration or 0) // num_frames
    times, keys = presentation_times(packets, 0)
    expected = list(range(0, step * num_frames, step)) if step else None
    problem = find_decord_trap(packets, times, "mp4", 0)
    if times != expected or expected is None or keys != expected[::keyint]:
        problem = problem or "frames or key frames at other times than asked for"
    if problem:
        raise VideoError(source, f"cannot be encoded: the encoded file has {problem}")
