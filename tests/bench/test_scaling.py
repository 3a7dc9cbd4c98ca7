"""Two processes against one: every arm is there, gradients are exchanged, and the figures are the arms' ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamae_fast.distributed.world import World
from bench import report, scaling


def rows(**ms: float) -> list[dict[str, Any]]:
    sizes = {"alone": 1}
    return [{"model": "nano", "processes": sizes.get(arm, 2), "arm": arm, "ms": value} for arm, value in ms.items()]


def test_figures_are_ratios_of_the_arms() -> None:
    (found,) = scaling.figures_of(rows(alone=80.0, overlapped=100.0, after=115.0, none=95.0))
    assert (found["model"], found["processes"]) == ("nano", 2)
    assert found["efficiency"] == pytest.approx(0.8)
    assert found["waiting"] == pytest.approx(0.05)
    assert found["hidden"] == pytest.approx(0.75)
    assert scaling.figures_of(rows(alone=80.0, overlapped=100.0, after=94.0, none=95.0))[0]["hidden"] is None


def test_gradients_are_exchanged_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def average(self: World, tensor: Tensor) -> None:
        assert tensor.tolist() == [1, 2, 3, 4, 5, 6]
        tensor.mul_(10)

    monkeypatch.setattr(World, "average", average)
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))]
    gradients: list[Any] = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None, torch.tensor([5.0, 6.0])]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    scaling.exchange(parameters, World(rank=0, size=2))
    assert gradients[0].tolist() == [[10, 20], [30, 40]]
    assert gradients[2].tolist() == [50, 60]


def test_processes_take_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--quick", "--out", str(tmp_path), "--batch", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["smoke"]
    arms = [(row["processes"], row["arm"]) for row in result["rows"]]
    assert arms == [(1, "alone"), (2, "overlapped"), (2, "after"), (2, "none")]
    assert all(row["ms"] > 0 for row in result["rows"])
    found = report.read(tmp_path)
    assert [one["command"] for one in found["scaling"]] == ["scaling"]
    text = report.page(found)
    assert "**A smoke figure**" in text
    assert "| nano | 2 | overlapped | 1 |" in text


@pytest.mark.parametrize("words", [["--device", "cuda"], ["--batch", "0"]])
def test_what_cannot_be_measured_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]):
        scaling.main(["--quick", *words])
