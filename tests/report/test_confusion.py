import io

import numpy as np
from PIL import Image
from rich.console import Console

from adamae_fast.report.confusion import class_table, confusion_matrix, describe_classes, draw_confusion

LABELS = [0, 0, 0, 1, 1, 3]
PREDICTED = [0, 2, 2, 1, 0, 3]


def test_rows_are_true_classes():
    expected = [[1, 0, 2, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert confusion_matrix(LABELS, PREDICTED, 4).tolist() == expected


def test_no_videos_are_no_counts():
    assert confusion_matrix([], [], 2).tolist() == [[0, 0], [0, 0]]


def test_each_class_in_words():
    rows = [tuple(row.values()) for row in describe_classes(confusion_matrix(LABELS, PREDICTED, 4))]
    expected = [(0, 3, 1, 1 / 3, 2), (1, 2, 1, 0.5, 0), (2, 0, 0, None, None), (3, 1, 1, 1.0, None)]
    assert rows == [(*row, None) for row in expected]


def test_the_table_begins_with_the_least_accurate_and_leaves_out_what_was_not_tested():
    console = Console(record=True, file=io.StringIO(), width=80)
    console.print(class_table(describe_classes(confusion_matrix(LABELS, PREDICTED, 4))))
    cells = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert [row for row in cells if row and row[0].isdigit()] == [
        ["0", "3", "33.3%", "2"],
        ["1", "2", "50.0%", "0"],
        ["3", "1", "100.0%"],
    ]


def test_classes_with_names():
    names = ["push [left]", "pull", "lift", "an action with a name that is too long for a tick"]
    console = Console(record=True, file=io.StringIO(), width=80)
    console.print(class_table(describe_classes(confusion_matrix(LABELS, PREDICTED, 4), names)))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    assert ["0 push [left]", "3", "33.3%", "2 lift"] in cells


def test_names_are_no_formulas(tmp_path):
    draw_confusion(np.eye(2, dtype=np.int64), tmp_path / "x.png", ["costs $5% or $6", "$\\nothing$"])
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_many_classes_are_cut_and_it_is_said():
    console = Console(record=True, file=io.StringIO(), width=80)
    console.print(class_table(describe_classes(np.eye(25, dtype=np.int64))))
    assert "the 20 least accurate of 25 classes" in console.export_text()


def test_the_picture_darkens_where_videos_are(tmp_path):
    """A diagonal matrix is dark on its diagonal and light elsewhere."""
    draw_confusion(np.eye(40, dtype=np.int64) * 5, tmp_path / "diagonal.png")
    draw_confusion(np.zeros((40, 40), dtype=np.int64), tmp_path / "empty.png")
    pictures = []
    for name in ("diagonal", "empty"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pictures.append(np.asarray(picture.convert("L"), dtype=np.int64))
    differs = pictures[0] != pictures[1]
    assert 0 < differs.mean() < 0.1
    assert (pictures[0] < pictures[1])[differs].mean() > 0.95
