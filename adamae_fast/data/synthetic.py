"""A small labelled set of real video files, rendered and encoded here: nothing is downloaded.

Textured sprites move, turn, grow or shrink over a textured background that pans slowly; the class of a video is the
kind of motion, and the sprites' true boxes are kept beside each clip. Distractors, as many, as large and of the same
textures as the sprites, are fixed to the background: they pan with it and have no box.

What the adaptivity figure (``report.adaptivity``) shows on this set: how much the mask favours the sprites over all
else, distractors included; an untrained sampler already favours strong texture a little, so training is to be judged by
the difference. What it cannot show is that a mask follows motion rather than texture. Background is predicted early,
from its light and coarse structure; to fill in a distractor better than a sprite, a model has to carry texture from one
moment to another, which a few minutes of a small model do not teach. Until then its mask favours both about alike.

The classes of ``preset=actions`` are in :mod:`adamae_fast.data.actions`; what is said above is about the demo's set.

Layout of the output folder::

    manifest.txt                       one line a video: "videos/0000_zoom-in.mp4 4" (path, label)
    labels.json                        names of the classes; the index is the label
    videos/0000_zoom-in.mp4            H.264; every second video is VP9 in webm
    videos/0000_zoom-in.boxes.json     true boxes, read by read_boxes

The action set has ``train.txt`` and ``val.txt`` in place of ``manifest.txt``, and ``videos/train-0000_push.mp4``.

Pixels are float32 RGB in [0, 1] until they are encoded; x runs right, y runs down, (0, 0) is the corner of the frame.
Shape suffixes: T frames, O moving objects, H height, W width, S texels along a side, C channels, A red, green, blue and
alpha (colours multiplied by alpha).
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adamae_fast.data.actions import ACTIONS, Split, render_action
from adamae_fast.data.drawing import Floats, cut, draw, sprite, texture

log = logging.getLogger(__name__)

MOTIONS = ("move-left", "move-right", "move-up", "move-down", "zoom-in", "zoom-out", "rotate", "oscillate")
"""The classes; the index is the label."""

FRAME_RATE = 24
"""Frames per second of every video."""

# x264's macroblock tree gives other bytes from one call to the next for the same frames, even with one thread: off.
_H264 = ("mp4", "libx264", {"preset": "veryfast", "crf": "20", "mbtree": "0"})
_VP9 = ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "24", "row-mt": "0"})
_CODECS = {"both": (_H264, _VP9), "h264": (_H264,), "vp9": (_VP9,)}


@dataclass(frozen=True)
class _Path:
    """Where a sprite is, as it is drawn in each frame. Each field has shape (T,)."""

    x: Floats
    y: Floats
    scale: Floats
    angle: Floats


@dataclass(frozen=True)
class _Preset:
    """What a rendered set holds where nothing else is asked for."""

    classes: tuple[str, ...]
    num_videos: int
    num_frames: int
    width: int
    height: int


_PRESETS = {
    "demo": _Preset(MOTIONS, num_videos=48, num_frames=48, width=160, height=120),
    "actions": _Preset(ACTIONS, num_videos=1008, num_frames=32, width=80, height=80),
}

_VAL_SHARE = 0.25

_VIDEOS_PER_PROCESS = 32
"""At least so many: starting a process takes about as long as drawing some videos."""


@dataclass(frozen=True)
class _Job:
    """One video to be rendered."""

    path: Path
    label: int
    codec: str
    options: dict[str, str]
    draw: Callable[[], tuple[NDArray[np.uint8], NDArray[np.float64]]]


def synthesize(
    out: str,
    preset: Literal["demo", "actions"] = "demo",
    num_videos: int | None = None,
    num_frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
    codec: Literal["both", "h264", "vp9"] = "both",
    val_share: float | None = None,
    classes: list[str] | None = None,
    detail: float | None = None,
) -> Path:
    """Render a small labelled set of videos with the true boxes of what moves in them.

    preset=demo: eight kinds of motion are the classes: move-left, move-right, move-up, move-down, zoom-in, zoom-out,
    rotate and oscillate; eight consecutive videos hold each once. preset=actions: fourteen classes of what two things
    do, which no single frame tells; a part of the videos, which share no look with the others, is for validation.

    A motion spans its whole video, so fewer frames make it faster. The same arguments give the same bytes on one
    machine, whatever its number of cores, and video i (of its part) does not depend on num_videos. The folder appears
    when it is complete: an interrupted render leaves nothing.

    Args:
        out: Folder to make. It must not exist yet, or be empty.
        preset: Which set: demo or actions.
        num_videos: Videos to render, by default 48 for demo and 1008 for actions. Each class is there equally often in
            every part of them that is a multiple of the number of classes.
        num_frames: Frames of each video, at 24 frames per second; at least 8, by default 48 and 32.
        width: Width of the frames in pixels; even, at least 64, by default 160 and 80.
        height: Height of the frames in pixels; even, at least 64, by default 120 and 80.
        seed: Source of every random choice; 0 or more.
        codec: h264 in mp4, vp9 in webm, or both in turns.
        val_share: Share of the videos of preset=actions that are for validation, by default 0.25.
        classes: Those of preset=actions to render, by default all fourteen; labels count in the order given:
            move-left, move-right, move-up, move-down, rotate-clockwise, rotate-counterclockwise, zoom-in, zoom-out,
            sway, circle, approach, leave, pass, push.
        detail: How finely structured the scenes of preset=actions are: 1, the default, like stone or cloth; 0 like
            what is out of focus, which small models need fewer steps for.

    Returns:
        The path of the manifest for training, ready for data.manifest.

    Raises:
        ValueError: for an argument out of its range, or an ``out`` that holds something already.
    """
    if preset not in _PRESETS:
        raise ValueError(f"preset={preset!r}: choose one of {', '.join(_PRESETS)}")
    chosen = _PRESETS[preset]
    num_videos = chosen.num_videos if num_videos is None else num_videos
    num_frames = chosen.num_frames if num_frames is None else num_frames
    width = chosen.width if width is None else width
    height = chosen.height if height is None else height
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
    if codec not in _CODECS:
        raise ValueError(f"codec={codec!r}: choose one of {', '.join(_CODECS)}")
    if val_share is not None and preset == "demo":
        raise ValueError(f"val_share={val_share}: only preset=actions has videos for validation; leave it out")
    if classes is not None and preset == "demo":
        raise ValueError(f"classes={classes}: only preset=actions has a choice of classes; leave it out")
    if detail is not None and preset == "demo":
        raise ValueError(f"detail={detail}: only preset=actions has a choice of scenes; leave it out")
    detail = 1.0 if detail is None else detail
    if not 0 <= detail <= 1:
        raise ValueError(f"detail={detail}: choose a strength in [0, 1]")
    names = chosen.classes if classes is None else tuple(classes)
    if unknown := set(names) - set(chosen.classes):
        raise ValueError(f"classes: no {', '.join(sorted(unknown))}; choose from {', '.join(chosen.classes)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"classes={classes}: choose at least one, and each once")
    num_val = round(num_videos * (_VAL_SHARE if val_share is None else val_share)) if preset == "actions" else 0
    if not 0 <= num_val < num_videos:
        raise ValueError(f"val_share={val_share}: choose a share in [0, 1) that leaves a video for training")
    if 0 < num_val < len(names):
        log.warning("val.txt gets %d videos of %d classes: raise num_videos or val_share", num_val, len(names))
    folder = Path(out).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out={out!r}: already holds something; choose a new folder, or remove this one first")

    size = {"num_frames": num_frames, "width": width, "height": height}
    look = {**size, "detail": detail}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-unfinished-") as scratch:
        # One level down, because the scratch folder itself is readable by its owner only.
        draft = Path(scratch) / "draft"
        (draft / "videos").mkdir(parents=True)
        if preset == "demo":
            parts = {"manifest.txt": _demo_jobs(draft, num_videos, seed, codec, size)}
        else:
            parts = {"train.txt": _action_jobs(draft, "train", names, num_videos - num_val, seed, codec, look)}
            if num_val:
                parts["val.txt"] = _action_jobs(draft, "val", names, num_val, seed, codec, look)
        _render_all([job for jobs in parts.values() for job in jobs])
        for name, jobs in parts.items():
            (draft / name).write_text("".join(f"videos/{job.path.name} {job.label}\n" for job in jobs))
        (draft / "labels.json").write_text(json.dumps(names))
        draft.rename(folder)
    return folder / next(iter(parts))


def _demo_jobs(draft: Path, num_videos: int, seed: int, codec: str, size: dict[str, int]) -> list[_Job]:
    jobs = []
    for index in range(num_videos):
        block, place = divmod(index, len(MOTIONS))
        label = int(np.random.default_rng([seed, 0, block]).permutation(len(MOTIONS))[place])
        extension, encoder, options = _CODECS[codec][index % len(_CODECS[codec])]
        path = draft / "videos" / f"{index:04d}_{MOTIONS[label]}.{extension}"
        rng = np.random.default_rng([seed, 1, index])
        jobs.append(_Job(path, label, encoder, options, partial(render, MOTIONS[label], rng, **size)))
    return jobs


def _action_jobs(
    draft: Path, split: Split, names: Sequence[str], num_videos: int, seed: int, codec: str, look: dict[str, Any]
) -> list[_Job]:
    """Each class once in as many consecutive videos as there are classes; with both codecs, each class has both."""
    part = 2 + (split == "val")
    jobs = []
    for index in range(num_videos):
        block, place = divmod(index, len(names))
        label = int(np.random.default_rng([seed, part, 0, block]).permutation(len(names))[place])
        extension, encoder, options = _CODECS[codec][(block + label) % len(_CODECS[codec])]
        path = draft / "videos" / f"{split}-{index:04d}_{names[label]}.{extension}"
        drawing = partial(render_action, names[label], split, (seed, part, 1, index), **look)
        jobs.append(_Job(path, label, encoder, options, drawing))
    return jobs


def _render_all(jobs: Sequence[_Job]) -> None:
    from rich.console import Console
    from rich.progress import track

    processes = min(len(os.sched_getaffinity(0)), len(jobs) // _VIDEOS_PER_PROCESS)
    with ExitStack() as stack:
        done: Iterable[None] = map(_render_one, jobs)
        if processes > 1:
            # Left early, the pool ends its processes; an interrupt is the parent's business.
            ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
            pool = stack.enter_context(multiprocessing.get_context("fork").Pool(processes, ignore))
            done = pool.imap(_render_one, jobs)
        for _ in track(done, "Rendering videos", total=len(jobs), console=Console(stderr=True)):
            pass


def _render_one(job: _Job) -> None:
    """Write a video and its boxes."""
    frames_THWC, boxes_TO4 = job.draw()
    encode(job.path, frames_THWC, job.codec, job.options)
    num_frames, height, width = frames_THWC.shape[:3]
    truth = {"width": width, "height": height, "num_frames": num_frames, "label": job.label}
    _boxes_path(job.path).write_text(json.dumps({**truth, "boxes": boxes_TO4.tolist()}))


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
        sprite_SSA = sprite(rng, max(8, round(diameter * float(path.scale.max()))))
        for t in range(num_frames):
            scale = float(path.scale[t] / path.scale.max())
            boxes_TO4[t, o] = draw(
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


def _count_and_diameter(rng: np.random.Generator, width: int, height: int) -> tuple[int, float]:
    """How many sprites (one or two) and their diameter: their squares have 8 to 12 % of the frame's area in all."""
    count = int(rng.integers(1, 3))
    diameter = float(np.sqrt(rng.uniform(0.08, 0.12) * width * height / count))
    return count, min(diameter, 0.5 * min(width, height))  # in long frames, so that a grown sprite still fits


def _background(rng: np.random.Generator, num_frames: int, width: int, height: int) -> Floats:
    """A textured scene, lit from above, that pans slowly in one direction, distractors with it: (T, H, W, C)."""
    margin = round(0.1 * height) + 2
    scene_HWC = texture(rng, height + 2 * margin, width + 2 * margin, height)
    direction, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.04, 0.10) * height
    light_H11 = np.linspace(0.38, -0.34, height, dtype=np.float32)[:, None, None]
    count, diameter = _count_and_diameter(rng, width, height)
    abreast = rng.uniform() < 0.5
    distractors = []
    for o in range(count):
        # Two distractors get half of the frame each, so that neither hides the other.
        lane, free = (o + 0.5) / count + rng.uniform(-0.08, 0.08), rng.uniform(0.2, 0.8)
        x, y = (lane, free) if abreast else (free, lane)
        distractors.append((sprite(rng, round(diameter)), x * width, y * height, rng.uniform(0, 2 * np.pi)))

    frames_THWC = np.empty((num_frames, height, width, 3), dtype=np.float32)
    for t in range(num_frames):
        shift = distance * (t / (num_frames - 1) - 0.5)
        dx, dy = shift * np.cos(direction), shift * np.sin(direction)
        frames_THWC[t] = cut(scene_HWC, margin + dx, margin + dy, height, width) + light_H11
        for sprite_SSA, x, y, angle in distractors:
            draw(frames_THWC[t], sprite_SSA, x - dx, y - dy, 1.0, angle)
    return frames_THWC


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
