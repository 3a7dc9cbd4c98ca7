"""A contact sheet of queries and their nearest videos: a row for each query, a film strip for each video.

Everything here works on plain frames. Shape suffixes: T frames, H, W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adamae_fast.report.pictures import BRIGHT, DIM, GROUND

SIDE = 96
"""Pixels of a frame."""

NUM_FRAMES = 3
"""Frames of a strip: the first, the middle and the last of the clip."""

COLUMNS = 5
"""Neighbours on a line; the others follow below."""

STRIP = NUM_FRAMES * (SIDE + 2) - 2
GAP, QUERY_GAP, ROW_GAP, PAD, HEAD = 18, 40, 34, 30, 34
CAPTION = 52
"""Height of what stands below a strip."""

PANEL = (34, 37, 44)
TRACK = (52, 56, 66)
MISSING = (60, 40, 42)
LABEL_COLOURS = (
    (96, 165, 250), (251, 146, 60), (74, 222, 128), (248, 113, 113), (192, 132, 252),
    (45, 212, 191), (250, 204, 21), (244, 114, 182), (148, 163, 184), (163, 230, 53),
)  # fmt: skip
"""A label's colour is the one at its number, modulo their count."""


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Strip:
    """A video on the sheet."""

    path: str
    label: int | None
    frames_THWC: np.ndarray | None
    """uint8; None if the video cannot be read."""

    similarity: float | None = None
    """To the query; None for the query itself."""


def strip_frames(num_frames: int) -> list[int]:
    """Which of a clip's frames a strip shows: evenly from the first to the last."""
    return np.linspace(0, num_frames - 1, min(num_frames, NUM_FRAMES)).round().astype(int).tolist()


def draw_neighbours(rows: Sequence[tuple[Strip, Sequence[Strip]]]) -> Image.Image:
    """Draw each query and its neighbours, nearest first. The bar below a neighbour is its similarity, from 0 to 1."""
    columns = min(COLUMNS, max((len(neighbours) for _, neighbours in rows), default=1))
    height = SIDE + CAPTION
    lines = [max(1, -(-len(neighbours) // COLUMNS)) for _, neighbours in rows]
    first = PAD + STRIP + QUERY_GAP
    size = (
        first + columns * (STRIP + GAP) - GAP + PAD,
        PAD + HEAD + sum(n * (height + GAP) - GAP + ROW_GAP for n in lines) - ROW_GAP + PAD,
    )
    sheet = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    draw.text((PAD, PAD + 8), "query", DIM, font, anchor="lm")
    draw.text((first, PAD + 8), "nearest videos, by cosine similarity", DIM, font, anchor="lm")
    y = PAD + HEAD
    for (query, neighbours), num_lines in zip(rows, lines, strict=True):
        bottom = y + num_lines * (height + GAP) - GAP
        box = (PAD - 10, y - 10, PAD + STRIP + 10, bottom + 8)
        draw.rounded_rectangle(box, radius=8, fill=PANEL)
        _draw_strip(sheet, draw, query, PAD, y)
        for number, neighbour in enumerate(neighbours):
            line, column = divmod(number, COLUMNS)
            _draw_strip(sheet, draw, neighbour, first + column * (STRIP + GAP), y + line * (height + GAP))
        y = bottom + ROW_GAP
    return sheet


def _draw_strip(sheet: Image.Image, draw: ImageDraw.ImageDraw, strip: Strip, x: int, y: int) -> None:
    """Frames; below them similarity and label, and the path."""
    bold, small = ImageFont.load_default(16), ImageFont.load_default(12)
    if strip.frames_THWC is None:
        draw.rectangle((x, y, x + STRIP - 1, y + SIDE - 1), fill=MISSING)
        draw.text((x + STRIP // 2, y + SIDE // 2), "cannot be read", BRIGHT, small, anchor="mm")
    else:
        for number, frame in enumerate(strip_frames(len(strip.frames_THWC))):
            picture = Image.fromarray(strip.frames_THWC[frame]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(picture, (x + number * (SIDE + 2), y))
    y += SIDE + 6
    is_query = strip.similarity is None
    if strip.similarity is not None:
        share = min(1.0, max(0.0, strip.similarity))
        draw.rectangle((x, y, x + STRIP - 1, y + 2), fill=TRACK)
        draw.rectangle((x, y, x + round(share * (STRIP - 1)), y + 2), fill=BRIGHT)
        draw.text((x, y + 17), f"{strip.similarity:.3f}", BRIGHT, bold, anchor="lm")
    free = STRIP
    if strip.label is not None:
        chip = _label(strip.label, small)
        sheet.paste(chip, (x + STRIP - chip.width, y + 8), chip)
        free -= (chip.width + 10) * is_query  # a query's path stands on the same line
    path = _elided(strip.path.encode("utf-8", "replace").decode(), small, free)
    draw.text((x, y + (17 if is_query else 38)), path, BRIGHT if is_query else DIM, small, anchor="lm")


def _label(label: int, font: Font) -> Image.Image:
    """A chip with smooth ends: drawn four times as large."""
    text, height = f"label {label}", 18
    width = round(font.getlength(text)) + 14
    shape = Image.new("L", (4 * width, 4 * height))
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, 4 * width - 1, 4 * height - 1), radius=2 * height, fill=255)
    chip = Image.new("RGB", (width, height), LABEL_COLOURS[label % len(LABEL_COLOURS)])
    ImageDraw.Draw(chip).text((width // 2, height // 2), text, GROUND, font, anchor="mm")
    chip.putalpha(shape.resize((width, height), Image.Resampling.LANCZOS))
    return chip


def _elided(text: str, font: Font, room: int) -> str:
    """The text, without its beginning where it is too long: a path says most at its end."""
    shown, cut = text, 0
    while font.getlength(shown) > room and cut < len(text):
        cut += 1
        shown = f"…{text[cut:]}"
    return shown
