"""What the rendered sets are drawn with: textures, sprites with a pattern of their own, and where they are put.

Pixels are float32 RGB in [0, 1]; x runs right, y runs down, (0, 0) is the corner of the frame. Shape suffixes: H
height, W width, S texels along a side, C channels, A red, green, blue and alpha (colours multiplied by alpha).
"""

from __future__ import annotations

from collections.abc import Callable
from colorsys import hsv_to_rgb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels, with exclusive ends."""

NOWHERE: Box = (0, 0, 0, 0)
"""The box of what is out of the frame."""

Palette = Callable[[float], float]
"""A hue in [0, 1) to the one that is used in its place."""

OUTLINES = ("disc", "polygon", "star", "blob")
PATTERNS = ("stripes", "checkers", "dots", "waves", "blotches")


def every_hue(hue: float) -> float:
    """The palette that leaves nothing out."""
    return hue


def noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Floats:
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


def texture(
    rng: np.random.Generator, rows: int, columns: int, height: int, palette: Palette = every_hue, detail: float = 1.0
) -> Floats:
    """Noise of many octaves between two colours, with darker veins: like stone, ground or cloth. (rows, columns, C).

    ``detail`` is the strength of veins and of the octaves below a fifth of ``height``: without them, out of focus.
    """
    mix_HW = np.full((rows, columns), 0.5, dtype=np.float32)
    for cell, strength in ((0.45, 0.20), (0.22, 0.10), (0.11, 0.07), (0.055, 0.06), (0.028, 0.07)):
        mix_HW += strength * (detail if cell < 0.2 else 1) * noise(rng, rows, columns, cell * height)
    hue = rng.uniform()
    first, second = (
        np.array(hsv_to_rgb(palette((hue + shift) % 1), rng.uniform(0.25, 0.55), value), dtype=np.float32)
        for shift, value in ((0, rng.uniform(0.42, 0.5)), (rng.uniform(0.12, 0.3), rng.uniform(0.64, 0.74)))
    )
    veins_HW = np.exp(-((noise(rng, rows, columns, 0.2 * height) / 0.12) ** 2))
    return first + (mix_HW - 0.2 * detail * veins_HW)[:, :, None] * (second - first)


def cut(scene_HWC: Floats, x: float, y: float, height: int, width: int) -> Floats:
    """The part of a larger picture whose corner is (x, y), between its pixels, too: (height, width, C)."""
    left, top = int(x), int(y)
    right, down = np.float32(x - left), np.float32(y - top)
    wide = scene_HWC[top : top + height + 1, left : left + width + 1]
    wide = wide[:-1] + down * (wide[1:] - wide[:-1])
    return wide[:, :-1] + right * (wide[:, 1:] - wide[:, :-1])


def sprite(
    rng: np.random.Generator,
    size: int,
    palette: Palette = every_hue,
    look: tuple[str, str] | None = None,
    coarseness: float = 1.0,
) -> Floats:
    """A textured shape with a darker rim, transparent around it: (S, S, A), S = size + 2, alpha multiplied in.

    ``look`` names its outline and its pattern; they are drawn at random without it. A pattern repeats every 6 to 9
    texels times ``coarseness``.
    """
    outline, pattern = look or (None, None)
    axis_S = (np.arange(size + 2, dtype=np.float32) - (size + 1) / 2) / (size / 2)
    y_SS, x_SS = np.meshgrid(axis_S, axis_S, indexing="ij")
    radius_SS, angle_SS = np.hypot(x_SS, y_SS), np.arctan2(y_SS, x_SS)
    # Distance to the outline along the radius, in texels, positive inside.
    depth_SS = (_outline(rng, angle_SS, outline) - radius_SS) * (size / 2)
    if rng.uniform() < 0.2:
        depth_SS = np.minimum(depth_SS, (radius_SS - rng.uniform(0.28, 0.38)) * (size / 2))  # a ring
    alpha_SS = (depth_SS + 0.5).clip(0, 1)

    hue = rng.uniform()
    dark = np.array(hsv_to_rgb(palette(hue), rng.uniform(0.6, 1.0), rng.uniform(0.1, 0.3)), dtype=np.float32)
    bright = np.array(
        hsv_to_rgb(palette((hue + rng.uniform(0.25, 0.75)) % 1), rng.uniform(0.15, 0.7), rng.uniform(0.92, 1.0)),
        dtype=np.float32,
    )
    colour_SSC = dark + _pattern(rng, size + 2, pattern, coarseness)[:, :, None] * (bright - dark)
    colour_SSC = colour_SSC * (1 + 0.08 * noise(rng, size + 2, size + 2, 3.0)[:, :, None])
    rim_SS1 = (1 - (depth_SS - 1.0)).clip(0, 1)[:, :, None]
    colour_SSC = colour_SSC + rim_SS1 * (0.5 * dark - colour_SSC)
    return np.concatenate([colour_SSC.clip(0, 1), np.ones_like(rim_SS1)], axis=2) * alpha_SS[:, :, None]


def _outline(rng: np.random.Generator, angle: Floats, kind: str | None) -> Floats:
    """Radius (at most 1) of one of OUTLINES in each direction."""
    kind = kind or rng.choice(OUTLINES)
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


def _pattern(rng: np.random.Generator, size: int, kind: str | None, coarseness: float) -> Floats:
    """A fine two-tone pattern in [0, 1], shape (size, size); none looks the same when it is turned by a small angle."""
    kind = kind or rng.choice(PATTERNS)
    period = coarseness * rng.uniform(6.0, 9.0)
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
        wave = noise(rng, size, size, 0.45 * period)
    return (0.5 + 1.2 * wave).clip(0, 1).astype(np.float32)


def draw(frame_HWC: Floats, sprite_SSA: Floats, x: float, y: float, scale: float, angle: float) -> Box:
    """Put a sprite's centre at (x, y) of the frame, in place, shrunk by ``scale`` and turned by ``angle`` (radians).

    Each pixel is the mean of four bilinear samples. Returns the box of the pixels it covers (by a tenth or more), an
    empty one where it is out of the frame.
    """
    height, width = frame_HWC.shape[:2]
    reach = (sprite_SSA.shape[0] / 2) * scale + 1
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
    if left >= right or top >= bottom:
        return NOWHERE
    dx = (np.arange(2 * left, 2 * right, dtype=np.float32) + 0.5) / 2 - np.float32(x)
    dy = (np.arange(2 * top, 2 * bottom, dtype=np.float32)[:, None] + 0.5) / 2 - np.float32(y)
    cosine, sine = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    samples = _bilinear(sprite_SSA, dx * cosine + dy * sine, dy * cosine - dx * sine)
    rgba = samples.reshape(bottom - top, 2, right - left, 2, 4).mean(axis=(1, 3))
    region = frame_HWC[top:bottom, left:right]
    region *= 1 - rgba[:, :, 3:]
    region += rgba[:, :, :3]
    covered = rgba[:, :, 3] > 0.1
    if not covered.any():
        return NOWHERE
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
