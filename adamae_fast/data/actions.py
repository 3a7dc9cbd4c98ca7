"""The rendered action set: what two things do is the class, and no single frame tells it.

Two textured sprites, A and B, lie on a textured scene, with up to two others (distractors) like them; the camera
pans. Of the motions below, one is carried out and is the class. **All others are there as well, but stopped, each at a
random moment of its own**: in every video the pair is at some moment of a way to the left, of growing, of a turn, of an
approach. So a random frame of a video has the same distribution for every class, but for what ``Motion.of`` says about
"pass"; only the change from frame to frame differs. Sizes, speeds, starts, directions and the camera are drawn without
a look at the class. The first and the last frame tell something: there a way to the left is rather at its right end.

=======================================  =====================================================================
move-left, -right, -up, -down            both move together, relative to the scene
rotate-clockwise, -counterclockwise      each turns about its own centre
zoom-in, zoom-out                        both grow, or shrink
sway                                     both swing to and fro together, in any direction
circle                                   A goes around B, either way
approach                                 A comes to B, which lies still, and stops where they touch
leave                                    the reverse: A lies at B, then goes away
pass                                     A goes past B, which lies still
push                                     A comes to B, and they go on together
=======================================  =====================================================================

Training and validation share no look: no sprite and no scene is drawn twice, and hues, and pairs of outline and
pattern, belong to one of the two (:data:`LOOKS`).

Shape suffixes as in :mod:`adamae_fast.data.drawing`, and T frames, O moving objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adamae_fast.data.drawing import NOWHERE, OUTLINES, PATTERNS, Floats, Palette, cut, draw, sprite, texture

ACTIONS = (
    "move-left",
    "move-right",
    "move-up",
    "move-down",
    "rotate-clockwise",
    "rotate-counterclockwise",
    "zoom-in",
    "zoom-out",
    "sway",
    "circle",
    "approach",
    "leave",
    "pass",
    "push",
)
"""The classes; the index is the label."""

Split = Literal["train", "val"]

STILL = 1e-4
"""Pixels, radians or a factor: what changes by no more from frame to frame stands still."""

NUM_ARCS = 10
"""Equal arcs of the circle of hues."""

VAL_ARCS = (2, 7)
"""Those that only validation uses: greenish and bluish to violet ones."""

_VAL_LOOKS = tuple((OUTLINES[i], PATTERNS[(2 * i + 1) % len(PATTERNS)]) for i in range(len(OUTLINES)))

LOOKS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": tuple((o, p) for o in OUTLINES for p in PATTERNS if (o, p) not in _VAL_LOOKS),
    "val": _VAL_LOOKS,
}
"""Pairs of outline and pattern. Every outline is in both, and every pattern in training."""


def palette_of(split: Split) -> Palette:
    """Spread hues over the arcs of ``split``."""
    arcs = VAL_ARCS if split == "val" else tuple(arc for arc in range(NUM_ARCS) if arc not in VAL_ARCS)

    def palette(hue: float) -> float:
        arc, within = divmod(hue * len(arcs), 1)
        return (arcs[int(arc) % len(arcs)] + within) / NUM_ARCS

    return palette


@dataclass(frozen=True)
class Motion:
    """What the two sprites (A, then B) do, in pixels and radians, relative to the scene."""

    diameters: tuple[float, float]
    """At scale 1."""

    x_OT: Floats
    y_OT: Floats
    scale_T: Floats
    angle_OT: Floats

    def moving(self) -> NDArray[np.bool_]:
        """(O, T): whether a sprite moves, turns or changes its size from the frame before or to the one after."""
        scale_OT = np.broadcast_to(self.scale_T, self.x_OT.shape)
        states = np.stack([self.x_OT, self.y_OT, scale_OT, self.angle_OT])
        changes_OT = (np.abs(np.diff(states, axis=2)) > STILL).any(axis=0)
        return np.pad(changes_OT, ((0, 0), (1, 0))) | np.pad(changes_OT, ((0, 0), (0, 1)))

    @classmethod
    def of(cls, action: str, rng: np.random.Generator, *, num_frames: int, width: int, height: int) -> Motion:
        """Draw a motion of the class ``action``, which spans the whole video.

        What is left for a single frame to tell: A goes past B beside it, so that they are never in contact, while it
        comes to B in a straight line. Other classes stop at a moment of either.
        """
        assert action in ACTIONS, action
        side = min(width, height)
        elapsed_T = np.linspace(0, 1, num_frames)
        # From 0 to 1, now faster and now slower.
        ease, phase = rng.uniform(0, 0.5), rng.uniform(0, 2 * np.pi)
        clock_T = elapsed_T + ease * (np.sin(2 * np.pi * elapsed_T + phase) - np.sin(phase)) / (2 * np.pi)

        def frozen() -> NDArray[np.float64]:
            return np.full(num_frames, rng.choice(clock_T))

        def when(*actions: str) -> NDArray[np.float64]:
            return clock_T if action in actions else frozen()

        def sign(plus: str, minus: str) -> int:
            return {plus: 1, minus: -1}.get(action, rng.choice((-1, 1)))

        # Size, and the angle of each.
        diameters = rng.uniform(0.24, 0.36, 2) * side
        growth = sign("zoom-in", "zoom-out") * np.log(rng.uniform(1.6, 2.1))
        scale_T = np.exp(growth * (when("zoom-in", "zoom-out") - rng.uniform(0.2, 0.8)))
        turn = 2 * np.pi * rng.uniform(0.5, 1.0) * sign("rotate-clockwise", "rotate-counterclockwise")
        turning = when("rotate-clockwise", "rotate-counterclockwise")
        angle_OT = rng.uniform(0, 2 * np.pi, (2, 1)) + turn * turning

        # From B to A: in a straight line until they touch, or past each other; around B.
        speed, touch = rng.uniform(0.4, 0.6) * side, rng.uniform(0.45, 0.8)
        passes = action == "pass" or (action not in ("approach", "leave", "push") and rng.uniform() < 0.25)
        middle = rng.uniform(0.3, 0.7)
        contact_T = scale_T * diameters.mean() * rng.uniform(0.97, 1.1)
        heading, around = rng.uniform(0, 2 * np.pi), rng.choice((-1, 1)) * 2 * np.pi * rng.uniform(0.5, 0.9)

        def from_b_to_a(clock_T: NDArray[np.float64], circling_T: NDArray[np.float64]) -> NDArray[np.complex128]:
            if passes:
                way_T = speed * 1.2 * (middle - clock_T) + 1j * contact_T
            else:
                way_T = contact_T + speed * (touch - clock_T).clip(0)
            return way_T * np.exp(1j * (heading + around * circling_T))

        clock_of_pair_T = clock_T[::-1] if action == "leave" else when("approach", "pass", "push")
        apart_T = from_b_to_a(clock_of_pair_T, when("circle"))

        # B: where it is pushed to, and where the pair is; means over the video keep it in the frame.
        pushed_T = (when("push") - touch).clip(0) - (clock_T - touch).clip(0).mean()
        b_T = -from_b_to_a(clock_T, frozen()).mean() / 2 - speed * pushed_T * np.exp(1j * heading)
        swing = rng.uniform(0.08, 0.13) * side * np.exp(1j * rng.uniform(0, 2 * np.pi))
        b_T = b_T + swing * np.sin(2 * np.pi * (rng.uniform(1.5, 2.5) * when("sway") + rng.uniform()))
        to_the_right = sign("move-right", "move-left") * rng.uniform(0.35, 0.5)
        downwards = sign("move-down", "move-up") * rng.uniform(0.35, 0.5)
        x_T = 0.5 + rng.uniform(-0.05, 0.05) + to_the_right * (when("move-left", "move-right") - rng.uniform(0.2, 0.8))
        y_T = 0.5 + rng.uniform(-0.05, 0.05) + downwards * (when("move-up", "move-down") - rng.uniform(0.2, 0.8))
        b_T = b_T + width * x_T + 1j * height * y_T
        position_OT = np.stack([b_T + apart_T, b_T])
        return cls(
            (float(diameters[0]), float(diameters[1])),
            position_OT.real.astype(np.float32),
            position_OT.imag.astype(np.float32),
            scale_T.astype(np.float32),
            angle_OT.astype(np.float32),
        )


class Film:
    """One video before it is drawn: ``frame(t)`` for each of ``num_frames``."""

    def __init__(
        self,
        action: str,
        split: Split,
        seed: tuple[int, ...],
        *,
        num_frames: int,
        width: int,
        height: int,
        detail: float = 1.0,
    ) -> None:
        size = {"num_frames": num_frames, "width": width, "height": height}
        # Streams of their own: how a video looks does not depend on what happens in it.
        motion_rng, rng = (np.random.default_rng([*seed, stream]) for stream in range(2))
        self.motion = Motion.of(action, motion_rng, **size)
        self.moving_OT = self.motion.moving()
        self.width, self.height = width, height
        side = min(width, height)
        palette, looks = palette_of(split), LOOKS[split]

        def new_sprite(diameter: float) -> Floats:
            # Of a pattern that repeats itself within a few frames of its way, the direction would be ambiguous.
            coarseness = 1.6 * side / 80
            return sprite(rng, max(8, round(diameter)), palette, looks[rng.integers(len(looks))], coarseness)

        # One texel is one pixel where a sprite is largest, so that sampling only ever shrinks it.
        self.sprites = [new_sprite(d * float(self.motion.scale_T.max())) for d in self.motion.diameters]
        self.others = []
        """Sprite, x, y and angle of each distractor."""
        for _ in range(rng.integers(0, 3)):
            diameter = rng.uniform(0.24, 0.36) * side * np.exp(rng.uniform(-0.5, 0.5))
            place = rng.uniform(0.05, 0.95, 2) * (width, height)
            self.others.append((new_sprite(diameter), *place, rng.uniform(0, 2 * np.pi)))
        direction, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.08) * side
        self.pan_T = np.linspace(-0.5, 0.5, num_frames) * distance * np.exp(1j * direction)
        """What the camera's motion adds to every x (real) and y (imaginary part)."""
        self.margin = round(0.06 * side) + 2
        self.scene_HWC = texture(rng, height + 2 * self.margin, width + 2 * self.margin, side, palette, detail)
        slope = rng.uniform(0.15, 0.4) * np.exp(1j * rng.uniform(0, 2 * np.pi))
        down, across = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
        vignette = 0.12 * (down**2 + across**2)
        self.light_HW1 = (slope.real * across + slope.imag * down - vignette + 0.08).astype(np.float32)[:, :, None]

    def frame(self, t: int) -> tuple[Floats, NDArray[np.float64]]:
        """Draw moment ``t``: frame_HWC, and boxes_O4 of what moves, in pixels, clipped to the frame.

        Zeros for a sprite that lies still on the scene, or is out of the frame.
        """
        pan = self.pan_T[t]
        corner = self.margin - pan.real, self.margin - pan.imag
        frame_HWC = cut(self.scene_HWC, *corner, self.height, self.width) + self.light_HW1
        for sprite_SSA, x, y, angle in self.others:
            _lay(frame_HWC, sprite_SSA, x + pan.real, y + pan.imag, 1.0, angle)
        motion = self.motion
        scale = float(motion.scale_T[t] / motion.scale_T.max())
        boxes = []
        for o, sprite_SSA in enumerate(self.sprites):
            x, y = float(motion.x_OT[o, t] + pan.real), float(motion.y_OT[o, t] + pan.imag)
            box = _lay(frame_HWC, sprite_SSA, x, y, scale, float(motion.angle_OT[o, t]))
            boxes.append(box if self.moving_OT[o, t] else NOWHERE)
        return frame_HWC, np.array(boxes, dtype=np.float64)


def _lay(
    frame_HWC: Floats, sprite_SSA: Floats, x: float, y: float, scale: float, angle: float
) -> tuple[float, float, float, float]:
    """Draw a sprite and the shadow that it throws."""
    shade = np.array([0, 0, 0, 0.4], dtype=np.float32)
    offset = 0.02 * min(frame_HWC.shape[:2])
    draw(frame_HWC, sprite_SSA * shade, x + offset, y + 1.5 * offset, scale, angle)
    return draw(frame_HWC, sprite_SSA, x, y, scale, angle)


def render_action(
    action: str,
    split: Split,
    seed: tuple[int, ...],
    *,
    num_frames: int,
    width: int,
    height: int,
    detail: float = 1.0,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw one video: frames_THWC (uint8) and boxes_TO4 (float64, pixels, exclusive ends, clipped to the frame).

    ``detail`` is that of the scene (:func:`~adamae_fast.data.drawing.texture`).
    """
    film = Film(action, split, seed, num_frames=num_frames, width=width, height=height, detail=detail)
    frames, boxes = zip(*map(film.frame, range(num_frames)), strict=True)
    return np.round(np.stack(frames).clip(0, 1) * 255).astype(np.uint8), np.stack(boxes)
