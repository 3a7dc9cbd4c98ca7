"""Tiny videos whose frames say which number they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

HEIGHT, WIDTH = 48, 64
Frames = NDArray[np.uint8]


def numbered_frame(number: int, height: int = HEIGHT, width: int = WIDTH) -> Frames:
    """Eight bits as bright or dark blocks, four in a row, two rows."""
    frame = np.full((height, width, 3), 30, np.uint8)
    for bit in range(8):
        if number >> bit & 1:
            row, column = divmod(bit, 4)
            frame[row * height // 2 : (row + 1) * height // 2, column * width // 4 : (column + 1) * width // 4] = 220
    return frame


def frame_numbers(frames_THWC: Frames) -> list[int]:
    """What :func:`numbered_frame` wrote into each frame, at any size."""
    num_frames, height, width, _ = frames_THWC.shape
    blocks = frames_THWC[:, : height // 2 * 2, : width // 4 * 4].reshape(num_frames, 2, height // 2, 4, width // 4, 3)
    bits = blocks[:, :, 2:-2, :, 2:-2].mean(axis=(2, 4, 5)).reshape(num_frames, 8) > 128
    return [int(number) for number in bits @ (1 << np.arange(8))]


def _write_video(
    path: Path,
    num_frames: int = 24,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    height: int = HEIGHT,
    width: int = WIDTH,
    pix_fmt: str = "yuv420p",
) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = options or {"g": "8"}
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _write_images(folder: Path, numbers: range, name: str = "img_{:05}.png", height: int = HEIGHT) -> Path:
    from PIL import Image

    folder.mkdir(parents=True)
    for number in numbers:
        Image.fromarray(numbered_frame(number, height)).save(folder / name.format(number))
    return folder


@pytest.fixture(scope="session")
def numbers() -> Callable[[Frames], list[int]]:
    """Reads the numbers of frames."""
    return frame_numbers


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """Writes a video of numbered frames."""
    return _write_video


@pytest.fixture(scope="session")
def write_unknown_codec() -> Callable[[Path], Path]:
    """Writes an MP4 file whose codec FFmpeg does not know."""

    def write(path: Path) -> Path:
        content = _write_video(path, 5).read_bytes()
        path.write_bytes(content.replace(b"avc1", b"zzzz"))
        return path

    return write


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    """Writes a folder of numbered images."""
    return _write_images
