"""Videos in the shapes of the two data sets that the paper trains on, for the bench of the data path.

They are rendered: texture of natural statistics that pans, patches of other texture that move over it, and the noise of
a camera, so that an encoder spends bits as on real film. What is measured on them is decoding, not learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from adamae_fast.data.synthetic import encode


@dataclass(frozen=True, kw_only=True)
class Film:
    """What the videos of a data set are like."""

    name: str
    width: int
    height: int
    num_frames: int
    rate: int
    codec: str
    options: tuple[tuple[str, str], ...]
    extension: str
    keyint: int
    """Frames from one key frame to the next."""
    stride: int
    """Of the clips that training cuts from them."""


K400 = Film(
    name="k400",
    width=340,
    height=256,
    num_frames=300,
    rate=30,
    codec="libx264",
    options=(("preset", "medium"), ("crf", "23"), ("sc_threshold", "0")),
    extension="mp4",
    keyint=250,
    stride=4,
)
"""Kinetics-400 as it is passed around: ten seconds, FFmpeg's default distance of key frames."""

SSV2 = Film(
    name="ssv2",
    width=427,
    height=240,
    num_frames=48,
    rate=12,
    codec="libvpx-vp9",
    options=(("deadline", "realtime"), ("cpu-used", "6"), ("crf", "37"), ("b", "0")),
    extension="webm",
    keyint=128,
    stride=2,
)
"""Something-Something V2 as it is downloaded: four seconds of VP9."""


def render(film: Film, seed: int, num_frames: int | None = None) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of one video."""
    rng = np.random.default_rng(seed)
    frames = film.num_frames if num_frames is None else num_frames
    height, width = film.height, film.width
    margin = 64
    world = _texture(rng, height + margin, width + margin)
    patches = [_texture(rng, height // 3, width // 4) for _ in range(3)]
    starts, speeds = rng.uniform(0, 1, (4, 2)), rng.uniform(-2.5, 2.5, (4, 2))
    out = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        # Back and forth within the margin and the frame, a triangle wave.
        places = np.abs((starts + speeds * t / 200) % 2 - 1)
        top, left = (places[0] * margin).astype(int)
        picture = world[top : top + height, left : left + width].copy()
        for patch, place in zip(patches, places[1:], strict=True):
            y, x = (place * (height - patch.shape[0], width - patch.shape[1])).astype(int)
            picture[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
        noise = rng.standard_normal((height, width, 1), dtype=np.float32) * 6
        out[t] = (picture + noise).clip(0, 255)
    return out


def _texture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Noise whose amplitude falls with its frequency, as in photographs, (H, W, 3) in 0 to 255."""
    total = torch.zeros(1, 3, height, width)
    for octave in range(7):
        size = (max(2, height >> octave), max(2, width >> octave))
        noise = torch.from_numpy(rng.standard_normal((1, 3, *size), dtype=np.float32))
        total += 2.0 ** (octave - 6) * F.interpolate(noise, size=(height, width), mode="bilinear")
    return (127 + 45 * total[0].permute(1, 2, 0)).clamp(0, 255).numpy()


def write(film: Film, folder: Path, num_videos: int, num_frames: int | None = None) -> Path:
    """Render ``num_videos`` and return their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{film.name}-{i:03d}.{film.extension}" for i in range(num_videos)]
    for i, name in enumerate(names):
        frames = render(film, i, num_frames)
        encode(folder / name, frames, film.codec, dict(film.options), rate=film.rate, gop_size=film.keyint)
    manifest = folder / "manifest.txt"
    manifest.write_text("".join(f"{name}\n" for name in names))
    return manifest
