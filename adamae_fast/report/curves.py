"""Inline SVG for the report: line charts of a run's metrics, the map of visible tokens, and the adaptivity bars.

Hand-made, so that text stays text, colours follow the page's light and dark mode (CSS classes), and nothing is
scripted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from adamae_fast.report.adaptivity import AdaptivityResult

WIDTH, HEIGHT = 460, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 22, 10, 26
MAX_POINTS = 400
MAX_COLUMNS = 96
MIN_POINTS_TO_SMOOTH = 40


def compact_number(value: float) -> str:
    """Write a number with about three digits: 0.00015 as 1.5e-4, 12000 as 12k, 0.6134 as 0.613."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1e4:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if size >= 100 else f"{value:.3g}"


def line_chart(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    label: str,
    colour: str = "a",
    smooth: bool = True,
    reference: tuple[float, str] | None = None,
) -> Markup:
    """One metric over the run. ``label`` names it to screen readers; ``colour`` is a CSS class of the page.

    Runs with many logged lines are averaged to at most 400 points; from 40 points on, with ``smooth``, the points are a
    thin line and their running mean is the thick one. ``values`` are finite and at least one (``figures.series``).
    ``reference`` is a height that is always in view, with a dashed line, and the words beside it.
    """
    x, y = (_mean_of_bins(np.asarray(numbers, dtype=np.float64), MAX_POINTS) for numbers in (steps, values))
    in_view = y if reference is None else np.append(y, reference[0])
    x_ticks, y_ticks = _ticks(x.min(), x.max(), 5), _ticks(in_view.min(), in_view.max(), 4)
    x_low, x_high = x.min(), x.max() if x.max() > x.min() else x.min() + 1
    y_low, y_high = min(y_ticks[0], in_view.min()), max(y_ticks[-1], in_view.max())

    def place_x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def points(heights: np.ndarray) -> str:
        return " ".join(f"{place_x(a):.1f},{place_y(b):.1f}" for a, b in zip(x, heights, strict=True))

    parts = []
    for tick in y_ticks:
        parts.append(_line("grid", LEFT, place_y(tick), WIDTH - RIGHT, place_y(tick)))
        parts.append(_text(compact_number(tick), LEFT - 8, place_y(tick) + 4, anchor="end"))
    parts.extend(_text(compact_number(tick), place_x(tick), HEIGHT - 8) for tick in x_ticks if x_low <= tick <= x_high)
    if reference is not None:
        height, words = place_y(reference[0]), reference[1]
        # On the side of the line where the curve does not end, but not on the ticks of the other axis.
        below = y[-1] > reference[0] and height + 20 < HEIGHT - BOTTOM
        parts.append(_line("reference", LEFT, height, WIDTH - RIGHT, height))
        parts.append(_text(words, WIDTH - RIGHT, height + (15 if below else -6), anchor="end"))
    main = y
    if smooth and len(y) >= MIN_POINTS_TO_SMOOTH:
        main = _running_mean(y)
        parts.append(f'<polyline class="line faint {colour}" points="{points(y)}"/>')
    parts.append(f'<polyline class="line {colour}" points="{points(main)}"/>')
    parts.append(f'<circle class="dot {colour}" cx="{place_x(x[-1]):.1f}" cy="{place_y(main[-1]):.1f}" r="3.5"/>')
    return _svg(WIDTH, HEIGHT, f"{label} over the run", parts)


def share_map(steps: Sequence[float], shares_LS: Sequence[Sequence[float]], *, label: str) -> Markup:
    """Which share fell into each of S slots at each of L logged steps, at least two: one row a slot, the first on top.

    A cell is the stronger, the larger its share; below the map are the colours of 0 and of the largest share. Runs with
    many lines are averaged to at most 96 columns, each as wide as the steps that it stands for.
    """
    x = _mean_of_bins(np.asarray(steps, dtype=np.float64), MAX_COLUMNS)
    shares_SX = np.stack([_mean_of_bins(shares_L, MAX_COLUMNS) for shares_L in np.asarray(shares_LS).T])
    largest, num_slots = shares_SX.max(), len(shares_SX)

    def place(step: float) -> float:
        return LEFT + (step - x[0]) / (x[-1] - x[0]) * (WIDTH - LEFT - RIGHT)

    edges = [place(edge) for edge in (x[0], *(x[1:] + x[:-1]) / 2, x[-1])]
    height = (HEIGHT - TOP - BOTTOM) / num_slots
    parts = []
    for slot, shares_X in enumerate(shares_SX):
        y = TOP + slot * height
        if slot % -(-num_slots // 8) == 0:
            parts.append(_text(str(slot), LEFT - 8, y + height / 2 + 4, anchor="end"))
        for left, right, share in zip(edges[:-1], edges[1:], shares_X, strict=True):
            parts.append(_cell(left, y, right - left, height, share / largest))
    parts.extend(
        _text(compact_number(tick), place(tick), HEIGHT - 8) for tick in _ticks(x[0], x[-1], 5) if x[0] <= tick <= x[-1]
    )
    end = WIDTH - RIGHT - 40
    parts.append(_text("0 %", end - 128, HEIGHT + 18, anchor="end"))
    parts.extend(_cell(end - 120 + 12 * tenth, HEIGHT + 8, 12, 12, (tenth + 0.5) / 10) for tenth in range(10))
    parts.append(_text(f"{largest * 100:.0f} %", end + 8, HEIGHT + 18, anchor="start"))
    return _svg(WIDTH, HEIGHT + 24, f"{label} over the run", parts)


def _cell(x: float, y: float, width: float, height: float, strength: float) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="cell" {size} fill-opacity="{strength:.2f}"/>'


def adaptivity_bars(result: AdaptivityResult) -> Markup:
    """Bars from 0 for the trained sampler, the untrained one and random masks, ± one standard error; a line at 1."""
    rows = (
        ("Trained", "a", result["adaptive"]),
        ("Untrained", "c", result["untrained"]),
        ("Random", "neutral", result["random"]),
    )
    left, right, row_height = 84, 118, 44
    height = len(rows) * row_height + 30
    largest = max(1.0, *(figure["value"] + (figure["standard_error"] or 0) for _, _, figure in rows))
    ticks = _ticks(0, largest, 5)
    high = max(ticks[-1], largest)

    def place(value: float) -> float:
        return left + value / high * (WIDTH - left - right)

    parts = []
    for tick in ticks:
        parts.append(_text(compact_number(tick), place(tick), height - 8))
        parts.append(_line("grid", place(tick), 0, place(tick), height - 26))
    for index, (name, colour, figure) in enumerate(rows):
        y, value, error = 8 + index * row_height, figure["value"], figure["standard_error"] or 0.0
        middle, end, label = y + 15, place(value + error), f"{value:.2f}×"
        width = place(value) - left
        parts.append(_text(name, left - 12, middle + 5, anchor="end", style="strong"))
        parts.append(f'<rect class="bar {colour}" x="{left}" y="{y}" width="{width:.1f}" height="30" rx="3"/>')
        if error:
            start = place(max(0.0, value - error))
            parts.append(_line("whisker", start, middle, end, middle))
            parts.extend(_line("whisker", x, middle - 5, x, middle + 5) for x in (start, end))
            label += f" ± {error:.2f}"
        parts.append(_text(label, end + 10, middle + 5, anchor="start", style="strong"))
    parts.append(_line("reference", place(1), 0, place(1), height - 26))
    return _svg(WIDTH, height, "Adaptivity of trained, untrained and random masks", parts)


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(text: str, x: float, y: float, *, anchor: str = "middle", style: str = "") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> Markup:
    """An image for screen readers too. ``parts`` hold numbers and fixed words only; ``label`` is escaped."""
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)
    return opening + Markup("".join(parts)) + Markup("</svg>")


def _ticks(low: float, high: float, count: int) -> np.ndarray:
    """Round numbers that enclose low to high; some around low if both are equal."""
    from matplotlib.ticker import MaxNLocator

    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), low + 0.5 * (abs(low) or 1)
    return np.asarray(MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))


def _mean_of_bins(values: np.ndarray, max_bins: int) -> np.ndarray:
    """At most ``max_bins`` numbers: means of equal runs of neighbours."""
    run = -(-len(values) // max_bins)
    starts = np.arange(0, len(values), run)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the points, over fewer near the ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    return (sums[places + reaches + 1] - sums[places - reaches]) / (2 * reaches + 1)
