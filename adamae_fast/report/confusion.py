"""Which classes are taken for which: the confusion matrix, its picture, and a table by class.

K classes; rows of the matrix are true classes, columns predicted ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

MAX_NUMBERED = 30
"""Classes up to which each cell of the picture shows its count."""

MAX_LETTERS = 28
"""Of a class's name in the picture."""

MAX_ROWS = 20
"""Classes in the table on the screen."""


def confusion_matrix(labels: Sequence[int], predicted: Sequence[int], num_classes: int) -> NDArray[np.int64]:
    """Count videos by true and predicted class, int64 (K, K)."""
    matrix_KK = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix_KK, (np.asarray(labels, np.int64), np.asarray(predicted, np.int64)), 1)
    return matrix_KK


def describe_classes(matrix_KK: NDArray[np.int64], class_names: Sequence[str] | None = None) -> list[dict[str, object]]:
    """For each class its videos, how many were right, their share, the class that most others were taken for, its name.

    Share and other class are None where there is nothing to name; of equally frequent ones it is the smallest.
    """
    rows: list[dict[str, object]] = []
    for label, row_K in enumerate(matrix_KK):
        num_videos, correct = int(row_K.sum()), int(row_K[label])
        wrong_K = row_K.copy()
        wrong_K[label] = 0
        rows.append(
            {
                "class": label,
                "videos": num_videos,
                "correct": correct,
                "accuracy": correct / num_videos if num_videos else None,
                "most_often_taken_for": int(wrong_K.argmax()) if wrong_K.any() else None,
                "name": None if class_names is None else class_names[label],
            }
        )
    return rows


def describe(row: dict[str, object]) -> str:
    """A class's number, and its name if it has one."""
    return str(row["class"]) if row["name"] is None else f"{row['class']} {row['name']}"


def class_table(classes: Sequence[dict[str, object]]) -> Table:
    """The classes with videos, the least accurate first, at most twenty."""
    tested = [row for row in classes if row["videos"]]
    tested.sort(key=lambda row: float(str(row["accuracy"])))
    caption = f"the {MAX_ROWS} least accurate of {len(tested)} classes" if len(tested) > MAX_ROWS else None
    table = Table("class", "videos", "top-1", "most often taken for", caption=caption)
    for row in tested[:MAX_ROWS]:
        other = row["most_often_taken_for"]
        accuracy = f"{float(str(row['accuracy'])):.1%}"
        taken_for = "" if other is None else describe(classes[int(str(other))])
        table.add_row(escape(describe(row)), str(row["videos"]), accuracy, escape(taken_for))
    return table


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"


def draw_confusion(matrix_KK: NDArray[np.int64], path: Path, names: Sequence[str] | None = None) -> None:
    """Write a PNG: each cell's share of its row, and for few classes its count and what ``names`` has for them."""
    from matplotlib.figure import Figure

    num_classes = len(matrix_KK)
    share_KK = matrix_KK / np.maximum(1, matrix_KK.sum(1, keepdims=True))
    side = min(16.0, max(5.0, 2 + 0.4 * num_classes))
    figure = Figure(figsize=(side, 0.85 * side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share_KK, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if num_classes <= MAX_NUMBERED:
        ticks = list(map(str, range(num_classes))) if names is None else [_shorten(name) for name in names]
        rotation = 90 if max(map(len, ticks), default=0) > 2 else 0
        axes.set_xticks(range(num_classes), ticks, rotation=rotation, parse_math=False)
        axes.set_yticks(range(num_classes), ticks, parse_math=False)
        for row, column in zip(*np.nonzero(matrix_KK), strict=True):
            colour = "white" if share_KK[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix_KK[row, column]), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="share of the true class's videos")
    figure.savefig(path, dpi=120)
