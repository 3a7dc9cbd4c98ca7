"""How the launchers choose their settings: a table of rows (largest size, settings) at the top of each file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Settings = Mapping[str, int]
"""Keyword arguments of a launch: block sizes and the number of warps."""

Table = Sequence[tuple[int, Settings]]
"""Rows by ascending size; the first row is the pinned default, at the paper's shapes."""


def choose(table: Table, size: int) -> Settings:
    """Return the settings of the first row that ``size`` fits in, or of the last row."""
    return next((settings for largest, settings in table if size <= largest), table[-1][1])
