"""The contact sheet: frames where they belong, bars as long as what they stand for, any name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from adamae_fast.report.neighbours import (
    BRIGHT,
    COLUMNS,
    GAP,
    LABEL_COLOURS,
    MISSING,
    PAD,
    QUERY_GAP,
    SIDE,
    STRIP,
    Strip,
    _elided,
    draw_neighbours,
    strip_frames,
)


def frames(value, num_frames=4):
    """Grey frames, each a step brighter than the one before."""
    levels = np.full((num_frames, 32, 32, 3), value, np.uint8)
    return levels + np.arange(num_frames, dtype=np.uint8)[:, None, None, None]


def find(sheet, colour):
    """Rows and columns of the pixels of a colour."""
    return np.nonzero((np.asarray(sheet) == colour).all(-1))


@pytest.mark.parametrize(("num_frames", "shown"), [(16, [0, 8, 15]), (4, [0, 2, 3]), (2, [0, 1]), (1, [0])])
def test_a_strip_shows_first_middle_and_last(num_frames, shown):
    assert strip_frames(num_frames) == shown


def test_every_video_stands_in_its_place():
    neighbours = [Strip(f"/videos/{n}.mp4", n, frames(100 + 10 * n), 0.9 - 0.1 * n) for n in range(COLUMNS + 2)]
    sheet = draw_neighbours([(Strip("/query.mp4", None, frames(60)), neighbours)])
    pixels = np.asarray(sheet)
    (top, *_), (left, *_) = find(sheet, (60, 60, 60))
    assert left == PAD
    first = PAD + STRIP + QUERY_GAP
    tops = {}
    for n in range(COLUMNS + 2):
        rows, columns = find(sheet, (100 + 10 * n,) * 3)
        assert columns.min() == first + (n % COLUMNS) * (STRIP + GAP)
        tops.setdefault(n // COLUMNS, set()).add(rows.min())
        # The third frame of four, and the last, follow to the right.
        assert (pixels[rows.min(), columns.min() + SIDE + 2] == 102 + 10 * n).all()
        assert (pixels[rows.min(), columns.min() + 2 * (SIDE + 2)] == 103 + 10 * n).all()
    assert tops[0] == {top}
    assert len(tops[1]) == 1
    assert min(tops[1]) > top + SIDE
    assert sheet.width == first + COLUMNS * (STRIP + GAP) - GAP + PAD


@pytest.mark.parametrize(("similarity", "share"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0), (-0.4, 0.0)])
def test_a_bar_is_as_long_as_the_similarity(similarity, share):
    sheet = draw_neighbours([(Strip("q", None, frames(60)), [Strip("n", None, frames(100), similarity)])])
    rows, columns = find(sheet, (100, 100, 100))
    bar = np.asarray(sheet)[rows.max() + 7, columns.min() : columns.min() + STRIP]
    assert (bar == BRIGHT).all(-1).sum() == pytest.approx(share * STRIP, abs=1.5)


def test_equal_labels_have_equal_colours_and_none_has_none():
    rows = [(Strip("q", 3, frames(60)), [Strip("a", 3, frames(100), 0.5), Strip("b", None, frames(120), 0.4)])]
    sheet = draw_neighbours(rows)
    _, columns = find(sheet, LABEL_COLOURS[3])
    assert (columns < PAD + STRIP).any()
    assert (columns > PAD + STRIP + QUERY_GAP).any()
    assert columns.max() < PAD + 2 * STRIP + QUERY_GAP
    assert not len(find(sheet, LABEL_COLOURS[4])[0])


def test_what_cannot_be_read_is_shown_as_such():
    sheet = draw_neighbours([(Strip("gone.mp4", None, None), []), (Strip("q", None, frames(60)), [])])
    rows, columns = find(sheet, MISSING)
    assert (columns.min(), columns.max()) == (PAD, PAD + STRIP - 1)
    assert rows.min() < find(sheet, (60, 60, 60))[0].min()


def test_long_and_strange_paths_fit():
    font = ImageFont.load_default(12)
    path = "/a/very/long/path" * 9 + "/clip.mp4"
    shown = _elided(path, font, STRIP)
    assert shown.startswith("…")
    assert path.endswith(shown[1:])
    assert STRIP - 20 < font.getlength(shown) <= STRIP
    assert _elided("short.mp4", font, STRIP) == "short.mp4"
    draw_neighbours([(Strip("bad \udcff.mp4", 1, frames(60)), [Strip("日本.mp4", 2, frames(60), 0.1)])])
