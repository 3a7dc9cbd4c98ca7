"""A small labelled set of real video files, rendered and encoded here: nothing is downloaded.

Textured sprites move, turn, grow or shrink over a textured background that pans slowly; the class of a video is the
kind of motion, and the sprites' true boxes are kept beside each clip. Distractors, as many, as large and of the same
textures as the sprites, are fixed to the background: they pan with it and have no box.

What the adaptivity figure (``report.adaptivity``) shows on this set: how much the mask favours the sprites over all
else, distractors included; an untrained sampler already favours strong texture a little, so training is to be judged by
the difference. What it cannot show is that a mask follows motion rather than texture. Background is predicted early,
from its light and coarse structure; to fill in a distractor better than a sprite, a model has to carry texture from one
moment to another, which a few minutes of a small model do not teach. Until then its mask favours both about alike.

Layout of the output folder::

    manifest.txt                       one line a video: "videos/0000_zoom-in.mp4 4" (path, label)
    labels.json                        names of the classes; the index is the label
    videos/0000_zoom-in.mp4            H.264; every second video is VP9 in webm
    videos/0000_zoom-in.boxes.json     true boxes, read by read_boxes

Pixels are float32 RGB in [0, 1] until they are encoded; x runs right, y runs down, (0, 0) is the corner of the frame.
Shape suffixes: T frames, O moving objects, H height, W width, S texels along a side, C channels, A red, green, blue and
alpha (colours multiplied by alpha).
"""

from __future__ import annotations

import json
import tempfile
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MOTIONS = ("move-left", "move-right", "move-up", "move-down", "zoom-in", "zoom-out", "rotate", "oscillate")
"""The classes; the index is the label."""

FRAME_RATE = 24
"""Frames per second of every video."""

# x264's macroblock tree gives other bytes from one call to the next for the same frames, even with one thread: off.
_CODECS = (
    ("mp4", "libx264", {"preset": "veryfast", "crf": "20", "mbtree": "0"}),
    ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "24", "row-mt": "0"}),
)


@dataclass(frozen=True)
class _Path:
    """Where a sprite is, as it is drawn in each frame. Each field has shape (T,)."""

    x: Floats
    y: Floats
    scale: Floats
    angle: Floats


def synthesize(
    out: str,
    num_videos: int = 48,
    num_frames: int = 48,
    width: int = 160,
    height: int = 120,
    seed: int = 0,
) -> Path:
    """Render a small labelled set of videos with the true boxes of what moves in them.

    Eight kinds of motion are the classes: move-left, move-right, move-up, move-down, zoom-in, zoom-out, rotate and
    oscillate; eight consecutive videos hold each once. H.264 in mp4 and VP9 in webm alternate. A motion spans its whole
    video, so fewer frames make it faster. The same arguments give the same bytes on one machine, and video i does not
    depend on num_videos. The folder appears when it is complete: an interrupted render leaves nothing.

    Args:
        out: Folder to make. It must not exist yet, or be empty.
        num_videos: Videos to render; a multiple of 8 has every class equally often.
        num_frames: Frames of each video, at 24 frames per second; at least 8.
        width: Width of the frames in pixels; even, at least 64.
        height: Height of the frames in pixels; even, at least 64.
        seed: Source of every random choice; 0 or more.

    Returns:
        The path of the manifest, ready for data.manifest.

    Raises:
        ValueError: for an argument out of its range, or an ``out`` that holds something already.
    """
    for name, value, least in (
        ("num_videos", num_videos, 1),
        ("num_frames", num_frames, 8),
        ("width", width, 64),
        ("height", height, 64),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: choose at least {least}")
        if name in ("width", "height") and value % 2:
            raise ValueError(f"{name}={value}: choose an even number, which both codecs' 4:2:0 colour needs")
    folder = Path(out).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out={out!r}: already holds something; choose a new folder, or remove this one first")

    from rich.console import Console
    from rich.progress import track

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-unfinished-") as scratch:
        # One level down, because the scratch folder itself is readable by its owner only.
        draft = Path(scratch) / "draft"
        (draft / "videos").mkdir(parents=True)
        lines = []
        for index in track(range(num_videos), "Rendering videos", console=Console(stderr=True)):
            block, place = divmod(index, len(MOTIONS))
            label = int(np.random.default_rng([seed, 0, block]).permutation(len(MOTIONS))[place])
            extension, codec, options = _CODECS[index % 2]
            path = draft / "videos" / f"{index:04d}_{MOTIONS[label]}.{extension}"
            rng = np.random.default_rng([seed, 1, index])
            frames_THWC, boxes_TO4 = render(MOTIONS[label], rng, num_frames=num_frames, width=width, height=height)
            encode(path, frames_THWC, codec, options)
            truth = {"width": width, "height": height, "num_frames": num_frames, "label": label}
            _boxes_path(path).write_text(json.dumps({**truth, "boxes": boxes_TO4.tolist()}))
            lines.append(f"videos/{path.name} {label}\n")
        (draft / "manifest.txt").write_text("".join(lines))
        (draft / "labels.json").write_text(json.dumps(MOTIONS))
        draft.rename(folder)
    return folder / "manifest.txt"


def read_boxes(video_path: str | Path) -> NDArray[np.float64] | None:
    """Read the true boxes kept beside a video, in pixels of the video's own frames.

    Returns:
        boxes_TO4, float64: (x0, y0, x1, y1) with exclusive ends, clipped to the frame, for each frame and moving
        object; None where the video has no such file.

    Raises:
        ValueError: if the file is there but does not hold one box per frame and object.
    """
    path = _boxes_path(Path(video_path))
    if not path.is_file():
        return None
    try:
        truth = json.loads(path.read_text())
        boxes_TO4 = np.array(truth["boxes"], dtype=np.float64)
        valid = boxes_TO4.ndim == 3 and boxes_TO4.shape[::2] == (truth["num_frames"], 4)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of boxes ({error}); render the set again") from error
    if not valid:
        raise ValueError(
            f"{path}: boxes of shape {boxes_TO4.shape}, not (num_frames, objects, 4); render the set again"
        )
    return boxes_TO4


def render(
    motion: str, rng: np.random.Generator, *, num_frames: int, width: int, height: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw one video: frames_THWC (uint8) and boxes_TO4 (float64, pixels, exclusive ends, clipped to the frame).

    One or two sprites perform the same ``motion`` (one of MOTIONS), in lanes of their own.
    """
    frames_THWC = _background(rng, num_frames, width, height)
    num_objects, diameter = _count_and_diameter(rng, width, height)
    paths = _paths(motion, rng, num_objects, num_frames, width, height)
    boxes_TO4 = np.empty((num_frames, num_objects, 4))
    for o, path in enumerate(paths):
        # One texel is one pixel where the sprite is largest, so that sampling only ever shrinks it.
        sprite_SSA = _sprite(rng, max(8, round(diameter * float(path.scale.max()))))
        for t in range(num_frames):
            scale = float(path.scale[t] / path.scale.max())
            boxes_TO4[t, o] = _draw(
                frames_THWC[t], sprite_SSA, float(path.x[t]), float(path.y[t]), scale, float(path.angle[t])
            )
    return np.round(frames_THWC.clip(0, 1) * 255).astype(np.uint8), boxes_TO4


def _paths(
    motion: str, rng: np.random.Generator, num_objects: int, num_frames: int, width: int, height: int
) -> list[_Path]:
    """Motion of each sprite. Two sprites get half of the frame each: stacked where they move sideways, else abreast."""
    progress_T = np.linspace(0, 1, num_frames, dtype=np.float32)
    still_T = np.zeros_like(progress_T)
    stacked = motion in ("move-left", "move-right", "oscillate")
    paths = []
    for o in range(num_objects):
        lane = (o + 0.5) / num_objects + rng.uniform(-0.06, 0.06)
        free = 0.5 + rng.uniform(-0.1, 0.1)
        x_T = width * ((free if stacked else lane) + still_T)
        y_T = height * ((lane if stacked else free) + still_T)
        scale_T, angle_T = 1 + still_T, rng.uniform(0, 2 * np.pi) + still_T
        travel_T = rng.uniform(0.10, 0.16) + (0.76 - rng.uniform(0, 0.04)) * progress_T
        turn_T = rng.uniform(-0.7, 0.7) * progress_T
        if motion == "move-left":
            x_T, angle_T = width * (1 - travel_T), angle_T + turn_T
        elif motion == "move-right":
            x_T, angle_T = width * travel_T, angle_T + turn_T
        elif motion == "move-up":
            y_T, angle_T = height * (1 - travel_T), angle_T + turn_T
        elif motion == "move-down":
            y_T, angle_T = height * travel_T, angle_T + turn_T
        elif motion == "zoom-in":
            scale_T = 0.55 + 0.85 * progress_T
        elif motion == "zoom-out":
            scale_T = 1.40 - 0.85 * progress_T
        elif motion == "rotate":
            angle_T = angle_T + rng.choice((-1, 1)) * 2 * np.pi * rng.uniform(1.0, 1.5) * progress_T
        else:
            assert motion == "oscillate", motion
            x_T = x_T + 0.22 * width * np.sin(2 * np.pi * (2 * progress_T + rng.uniform()))
        paths.append(_Path(x_T, y_T, scale_T, angle_T))
    return paths


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Floats:
    """Smooth noise of zero mean and unit variance, (height, width): cubic B-splines on cells of ``cell`` pixels."""

    def weights(length: int) -> Floats:
        knots = np.arange(int(length / cell) + 4)
        distance = np.abs(np.arange(length)[:, None] / cell + 1 - knots)
        near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clip(0) ** 3 / 6
        return np.where(distance < 1, near, far).astype(np.float32)

    rows, columns = weights(height), weights(width)
    noise_HW = rows @ rng.standard_normal((rows.shape[1], columns.shape[1])).astype(np.float32) @ columns.T
    # Smoothing leaves 151/315 of the variance along each direction (mean over a cell of the sum of squared weights).
    return noise_HW * np.float32(315 / 151)


def _count_and_diameter(rng: np.random.Generator, width: int, height: int) -> tuple[int, float]:
    """How many sprites (one or two) and their diameter: their squares have 8 to 12 % of the frame's area in all."""
    count = int(rng.integers(1, 3))
    diameter = float(np.sqrt(rng.uniform(0.08, 0.12) * width * height / count))
    return count, min(diameter, 0.5 * min(width, height))  # in long frames, so that a grown sprite still fits


def _background(rng: np.random.Generator, num_frames: int, width: int, height: int) -> Floats:
    """A textured scene, lit from above, that pans slowly in one direction, distractors with it: (T, H, W, C)."""
    margin = round(0.1 * height) + 2
    scene_HWC = _texture(rng, height + 2 * margin, width + 2 * margin, height)
    direction, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.04, 0.10) * height
    light_H11 = np.linspace(0.38, -0.34, height, dtype=np.float32)[:, None, None]
    count, diameter = _count_and_diameter(rng, width, height)
    abreast = rng.uniform() < 0.5
    distractors = []
    for o in range(count):
        # Two distractors get half of the frame each, so that neither hides the other.
        lane, free = (o + 0.5) / count + rng.uniform(-0.08, 0.08), rng.uniform(0.2, 0.8)
        x, y = (lane, free) if abreast else (free, lane)
        distractors.append((_sprite(rng, round(diameter)), x * width, y * height, rng.uniform(0, 2 * np.pi)))

    frames_THWC = np.empty((num_frames, height, width, 3), dtype=np.float32)
    for t in range(num_frames):
        shift = distance * (t / (num_frames - 1) - 0.5)
        dx, dy = shift * np.cos(direction), shift * np.sin(direction)
        left, top = int(margin + dx), int(margin + dy)
        right, down = np.float32(margin + dx - left), np.float32(margin + dy - top)
        wide = scene_HWC[top : top + height + 1, left : left + width + 1]
        wide = wide[:-1] + down * (wide[1:] - wide[:-1])
        frames_THWC[t] = wide[:, :-1] + right * (wide[:, 1:] - wide[:, :-1]) + light_H11
        for sprite_SSA, x, y, angle in distractors:
            _draw(frames_THWC[t], sprite_SSA, x - dx, y - dy, 1.0, angle)
    return frames_THWC


def _texture(rng: np.random.Generator, rows: int, columns: int, height: int) -> Floats:
    """Noise of many octaves between two colours, with darker veins: like stone, ground or cloth. (rows, columns, C)."""
    mix_HW = np.full((rows, columns), 0.5, dtype=np.float32)
    for cell, strength in ((0.45, 0.20), (0.22, 0.10), (0.11, 0.07), (0.055, 0.06), (0.028, 0.07)):
        mix_HW += strength * _noise(rng, rows, columns, cell * height)
    hue = rng.uniform()
    first, second = (
        np.array(hsv_to_rgb((hue + shift) % 1, rng.uniform(0.25, 0.55), value), dtype=np.float32)
        for shift, value in ((0, rng.uniform(0.42, 0.5)), (rng.uniform(0.12, 0.3), rng.uniform(0.64, 0.74)))
    )
    veins_HW = np.exp(-((_noise(rng, rows, columns, 0.2 * height) / 0.12) ** 2))
    return first + (mix_HW - 0.2 * veins_HW)[:, :, None] * (second - first)


def _sprite(rng: np.random.Generator, size: int) -> Floats:
    """A textured shape with a darker rim, transparent around it: (S, S, A), S = size + 2, alpha multiplied in."""
    axis_S = (np.arange(size + 2, dtype=np.float32) - (size + 1) / 2) / (size / 2)
    y_SS, x_SS = np.meshgrid(axis_S, axis_S, indexing="ij")
    radius_SS, angle_SS = np.hypot(x_SS, y_SS), np.arctan2(y_SS, x_SS)
    # Distance to the outline along the radius, in texels, positive inside.
    depth_SS = (_outline(rng, angle_SS) - radius_SS) * (size / 2)
    if rng.uniform() < 0.2:
        depth_SS = np.minimum(depth_SS, (radius_SS - rng.uniform(0.28, 0.38)) * (size / 2))  # a ring
    alpha_SS = (depth_SS + 0.5).clip(0, 1)

    hue = rng.uniform()
    dark = np.array(hsv_to_rgb(hue, rng.uniform(0.6, 1.0), rng.uniform(0.1, 0.3)), dtype=np.float32)
    bright = np.array(
        hsv_to_rgb((hue + rng.uniform(0.25, 0.75)) % 1, rng.uniform(0.15, 0.7), rng.uniform(0.92, 1.0)),
        dtype=np.float32,
    )
    colour_SSC = dark + _pattern(rng, size + 2)[:, :, None] * (bright - dark)
    colour_SSC = colour_SSC * (1 + 0.08 * _noise(rng, size + 2, size + 2, 3.0)[:, :, None])
    rim_SS1 = (1 - (depth_SS - 1.0)).clip(0, 1)[:, :, None]
    colour_SSC = colour_SSC + rim_SS1 * (0.5 * dark - colour_SSC)
    return np.concatenate([colour_SSC.clip(0, 1), np.ones_like(rim_SS1)], axis=2) * alpha_SS[:, :, None]


def _outline(rng: np.random.Generator, angle: Floats) -> Floats:
    """Radius (at most 1) of a disc, polygon, star or blob in each direction."""
    kind = rng.choice(("disc", "polygon", "star", "blob"))
    corners = int(rng.integers(5, 8))
    if kind == "disc":
        return np.ones_like(angle)
    if kind == "blob":
        wobble = sum(np.sin(k * angle + rng.uniform(0, 2 * np.pi)) * rng.uniform(0.4, 1.0) / k for k in range(2, 6))
        return (0.86 + 0.14 * wobble / np.abs(wobble).max()).astype(np.float32)
    # Straight edges between outer corners (radius 1) and inner ones, half a corner further on.
    half = np.pi / corners
    inner = np.cos(half) if kind == "polygon" else 0.66
    turned = np.abs((angle % (2 * half)) - half)  # 0 at an inner corner, half at an outer one
    return (inner * np.sin(half) / (np.sin(turned) * inner + np.sin(half - turned))).astype(np.float32)


def _pattern(rng: np.random.Generator, size: int) -> Floats:
    """A fine two-tone pattern in [0, 1], shape (size, size); none looks the same when it is turned by a small angle."""
    kind = rng.choice(("stripes", "checkers", "dots", "waves", "blotches"))
    period = rng.uniform(6.0, 9.0)
    x, y = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32))
    phase, angle = rng.uniform(0, 2 * np.pi, size=2)
    u = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period) + phase
    v = (y * np.cos(angle) - x * np.sin(angle)) * (2 * np.pi / period)
    if kind == "stripes":
        wave = np.sin(u)
    elif kind == "checkers":
        wave = 1.5 * np.sin(0.7 * u) * np.sin(0.7 * v)
    elif kind == "dots":
        wave = np.sin(0.9 * u) + np.sin(0.9 * v) - 0.3
    elif kind == "waves":
        wave = np.sin(u + 1.6 * np.sin(0.6 * v))
    else:
        wave = _noise(rng, size, size, 0.45 * period)
    return (0.5 + 1.2 * wave).clip(0, 1).astype(np.float32)


def _draw(
    frame_HWC: Floats, sprite_SSA: Floats, x: float, y: float, scale: float, angle: float
) -> tuple[float, float, float, float]:
    """Put a sprite's centre at (x, y) of the frame, in place, shrunk by ``scale`` and turned by ``angle`` (radians).

    Each pixel is the mean of four bilinear samples. Returns the box of the pixels it covers (by a tenth or more).
    """
    height, width = frame_HWC.shape[:2]
    reach = (sprite_SSA.shape[0] / 2) * scale + 1
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
    dx = (np.arange(2 * left, 2 * right, dtype=np.float32) + 0.5) / 2 - np.float32(x)
    dy = (np.arange(2 * top, 2 * bottom, dtype=np.float32)[:, None] + 0.5) / 2 - np.float32(y)
    cosine, sine = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    samples = _bilinear(sprite_SSA, dx * cosine + dy * sine, dy * cosine - dx * sine)
    rgba = samples.reshape(bottom - top, 2, right - left, 2, 4).mean(axis=(1, 3))
    region = frame_HWC[top:bottom, left:right]
    region *= 1 - rgba[:, :, 3:]
    region += rgba[:, :, :3]
    covered = rgba[:, :, 3] > 0.1
    columns, rows = np.flatnonzero(covered.any(axis=0)), np.flatnonzero(covered.any(axis=1))
    return left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1


def _bilinear(texture_SSA: Floats, u: NDArray[np.floating], v: NDArray[np.floating]) -> Floats:
    """Sample a square texture at (u, v) texels from its centre. Its outermost texels are transparent, as all beyond."""
    side = texture_SSA.shape[0]
    u, v = ((c + np.float32(side / 2 - 0.5)).clip(0, side - 1.001) for c in (u, v))
    column, row = u.astype(np.int32), v.astype(np.int32)
    right, down = (u - column)[..., None], (v - row)[..., None]
    flat = texture_SSA.reshape(-1, 4)
    place = row * side + column
    above = flat[place] + right * (flat[place + 1] - flat[place])
    below = flat[place + side] + right * (flat[place + side + 1] - flat[place + side])
    return above + down * (below - above)


def encode(
    path: Path,
    frames_THWC: NDArray[np.uint8],
    codec: str,
    options: dict[str, str],
    *,
    rate: int = FRAME_RATE,
    gop_size: int = FRAME_RATE,
) -> None:
    """Write one video, with one thread and no date or random identifier: the same frames give the same bytes.

    ``codec`` and ``options`` are FFmpeg's; ``rate`` is in frames per second, ``gop_size`` the most frames from one key
    frame to the next.
    """
    import av

    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=rate, options={**options, "threads": "1"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop_size
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))


def _boxes_path(video_path: Path) -> Path:
    return video_path.with_suffix(".boxes.json")
