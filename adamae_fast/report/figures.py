"""The headline figures of a run, from the lines of its metrics.jsonl. The report and summary.json both show these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypedDict

LAST_LINES = 5
"""Logged lines whose mean is the last loss: one batch alone says little."""


class Headline(TypedDict):
    """What :func:`headline` found; None where the lines hold no finite number for it."""

    loss_first: float | None
    """Loss of the first logged line."""
    loss_last: float | None
    """Mean over the last five logged lines."""
    loss_fall: float | None
    """1 - loss_last / loss_first; None also where loss_first is 0."""
    clips_per_second: float | None
    """Mean over all logged lines."""
    data_wait_share: float | None
    """Mean over all logged lines."""
    decode_seconds: float | None
    """A worker's time for a clip, mean over all logged lines."""
    batches_ready: float | None
    """Mean over all logged lines."""


def headline(metrics: Sequence[Mapping[str, Any]]) -> Headline:
    """First and last loss, their relative difference, throughput and data wait of a run.

    Args:
        metrics: the logged lines in order. A value that is absent, null, NaN or infinite is left out of a mean.
    """
    first, last = _mean(metrics[:1], "loss"), _mean(metrics[-LAST_LINES:], "loss")
    return {
        "loss_first": first,
        "loss_last": last,
        "loss_fall": 1 - last / first if first and last is not None else None,
        "clips_per_second": _mean(metrics, "clips_per_second"),
        "data_wait_share": _mean(metrics, "data_wait_share"),
        "decode_seconds": _mean(metrics, "decode_seconds"),
        "batches_ready": _mean(metrics, "batches_ready"),
    }


def finite(line: Mapping[str, Any], key: str) -> float | None:
    """The finite number that a line holds under ``key``, or None."""
    value = line.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that hold a finite number under ``key``."""
    pairs = [(float(line["step"]), value) for line in metrics if (value := finite(line, key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _mean(metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = series(metrics, key)[1]
    return fmean(values) if values else None
