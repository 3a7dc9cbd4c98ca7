"""Small files that decoders stumble over: ``write_torture_set(folder)`` makes them, to try a decoder with.

All have at most NUM_FRAMES frames, so that a clip of that many with stride 1 needs each of them.
"""

from __future__ import annotations

import os
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

NUM_FRAMES = 8
HEIGHT, WIDTH = 48, 64

Verdict = Literal["good", "bad", "damaged"]


@dataclass(frozen=True)
class TortureFile:
    """One file of the set, and what is to be expected of it."""

    path: Path

    verdict: Verdict
    """Known from how it was made: readable, unreadable, or whatever a complete decode makes of it."""

    refused_by_decord: bool = False
    """decord cannot read it, or would return other frames than those asked for."""


def write_torture_set(folder: Path) -> list[TortureFile]:
    """Write all files into ``folder``, which must exist, the same ones each time."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    files = [*_awkward(folder), *_broken(folder)]
    for name in ("plain.mkv", "index_first.mp4", "vp9.webm"):
        files += _damaged(folder / name)
    return files


def _awkward(folder: Path) -> Iterator[TortureFile]:
    """Unusual, but without fault."""

    def write(name: str, **options: Any) -> TortureFile:
        refused = bool(options.pop("refused_by_decord", False))
        _encode(folder / name, **options)
        return TortureFile(folder / name, "good", refused)

    vp9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}
    av1 = {"codec": "libsvtav1", "options": {"preset": "11"}}
    yield write("plain.mp4")
    yield write("plain.mkv")
    yield write("index_first.mp4", container_options={"movflags": "+faststart"})
    yield write("fragmented.mp4", container_options={"movflags": "+frag_keyframe+empty_moov"})
    yield write("vp8.webm", codec="libvpx", options={"cpu-used": "8", "deadline": "realtime"})
    yield write("vp9.webm", **vp9)
    yield write("mpeg4.mp4", codec="mpeg4")
    yield write("mjpeg.mov", codec="mjpeg", pix_fmt="yuvj420p")
    yield write("one_frame.mp4", num_frames=1)
    yield write("one_frame.webm", num_frames=1, **vp9)
    yield write("8192x16.mp4", width=8192, height=16)
    yield write("16x8192.webm", width=16, height=8192, refused_by_decord=True, **vp9)
    yield write("odd_size_444_10bit.mp4", width=67, height=49, pix_fmt="yuv444p10le")
    yield write("two_video_streams.mp4", streams=2, refused_by_decord=True)
    yield write("two_video_streams.mkv", streams=2)
    yield write("variable_frame_rate.mp4", times=(0, 1, 2, 10, 11, 40, 41, 90))
    yield write("variable_frame_rate.mkv", times=(0, 1, 2, 10, 11, 40, 41, 90))
    yield write("starts_late.mp4", times=tuple(range(500, 500 + NUM_FRAMES)))
    yield write("rotated_90.mp4", rotation=90, refused_by_decord=True)
    yield write("rotated_180.mov", rotation=180)
    yield write("rotated_270.mkv", rotation=-90, refused_by_decord=True)
    open_groups = {"x265-params": "log-level=none:keyint=4:open-gop=1:bframes=2"}
    yield write("open_groups.mp4", codec="libx265", options=open_groups, refused_by_decord=True)
    yield write("av1.mp4", refused_by_decord=True, **av1)
    yield write("av1.mkv", refused_by_decord=True, **av1)
    yield write("mpeg4.avi", codec="mpeg4", refused_by_decord=True)
    yield write("stream.ts", refused_by_decord=True)
    yield write("flash.flv", codec="flv1", refused_by_decord=True)

    def copy(name: str, of: str, refused_by_decord: bool = False) -> TortureFile:
        (folder / name).write_bytes((folder / of).read_bytes())
        return TortureFile(folder / name, "good", refused_by_decord)

    yield copy("in_truth_mkv.mp4", "plain.mkv")
    yield copy("in_truth_mp4.webm", "plain.mp4")
    yield copy("in_truth_ts.txt", "stream.ts", refused_by_decord=True)
    yield copy("no_extension", "vp9.webm")
    _remux(folder / "plain.mp4", folder / "unordered_times.mov", (8, 11, 9, 10, 12, 15, 13, 14))
    yield TortureFile(folder / "unordered_times.mov", "good", refused_by_decord=True)
    _remux(folder / "plain.mp4", folder / "equal_times.mkv", (8, 9, 9, 9, 12, 13, 13, 15))
    yield TortureFile(folder / "equal_times.mkv", "good", refused_by_decord=True)


def _broken(folder: Path) -> Iterator[TortureFile]:
    """Files without a picture."""
    plain = (folder / "plain.mp4").read_bytes()  # its index is at the end
    webm = (folder / "vp9.webm").read_bytes()
    pictures, index = plain.index(b"mdat") + 4, plain.index(b"moov") - 4
    rng = np.random.default_rng(0)
    contents = {
        "empty.mp4": b"",
        "zeros.mp4": bytes(4096),
        "zeros.webm": bytes(4096),
        "noise.mp4": rng.bytes(4096),
        "noise.mkv": rng.bytes(4096),
        "text.mp4": b"no video\n" * 50,
        "page.webm": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        "header_only.webm": webm[:200],
        "unknown_codec.mp4": plain.replace(b"avc1", b"zzzz"),
        "no_pictures.mp4": plain[:pictures] + bytes(index - pictures) + plain[index:],
    }
    contents |= {f"cut_at_{percent}.mp4": plain[: len(plain) * percent // 100] for percent in (1, 10, 30, 50)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield TortureFile(folder / name, "bad")
    for name in ("sound.wav", "sound.mp4"):
        with wave.open(str(folder / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(rng.bytes(4000))
        yield TortureFile(folder / name, "bad")
    (folder / "folder.mp4").mkdir()
    yield TortureFile(folder / "folder.mp4", "bad")
    yield TortureFile(folder / "missing.mp4", "bad")


def _damaged(path: Path) -> Iterator[TortureFile]:
    """Copies of a file with its end missing, single bits turned, or a piece overwritten with zeros."""
    content = path.read_bytes()
    rng = np.random.default_rng(1)

    def write(name: str, damaged: bytes) -> TortureFile:
        place = path.with_name(f"{path.stem}_{name}{path.suffix}")
        place.write_bytes(damaged)
        return TortureFile(place, "damaged")

    for percent in (15, 40, 60, 80, 95, 99):
        yield write(f"cut_at_{percent}", content[: len(content) * percent // 100])
    for number, flips in enumerate((1, 3, 10, 30)):
        turned = bytearray(content)
        for place in rng.integers(len(content), size=flips):
            turned[place] ^= 1 << int(rng.integers(8))
        yield write(f"turned_bits_{number}", bytes(turned))
    for number in range(2):
        start = int(rng.integers(len(content) // 2, len(content) - 64))
        yield write(f"zeros_{number}", content[:start] + bytes(64) + content[start + 64 :])


def _encode(
    path: Path,
    num_frames: int = NUM_FRAMES,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    streams: int = 1,
    times: tuple[int, ...] = tuple(range(NUM_FRAMES)),
) -> None:
    """Write a video of smooth, moving colours; a second stream is twice as large and has one frame less."""
    with av.open(str(path), "w", options={"fflags": "+bitexact", **(container_options or {})}) as container:
        encoders: list[tuple[Any, int]] = []
        for number in range(streams):
            stream: Any = container.add_stream(codec, rate=25, options=options or {"g": "4", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = width << number, height << number, pix_fmt
            stream.codec_context.time_base = Fraction(1, 25)
            if rotation:
                stream.set_display_rotation(rotation)
            encoders.append((stream, num_frames - number))
        for stream, count in encoders:
            for number in range(count):
                picture = _picture(number, stream.height, stream.width)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = times[number], Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def _picture(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """Waves that move and change their colour; no two frames are alike."""
    y_H1, x_1W = np.arange(height)[:, None] / height, np.arange(width) / width
    waves = [np.sin(2 * np.pi * (x_1W * (c + 1) + y_H1 + number * (c + 1) / 12)) for c in range(3)]
    return np.rint(128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def _remux(source: Path, path: Path, times: tuple[int, ...]) -> None:
    """Copy a video's packets with other times of presentation."""
    with av.open(str(source)) as old, av.open(str(path), "w", options={"fflags": "+bitexact"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(old.streams.video[0]) if packet.size]
        for number, (packet, time) in enumerate(zip(packets, times, strict=True)):
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts, packet.dts = time, number
            new.mux_one(packet)
