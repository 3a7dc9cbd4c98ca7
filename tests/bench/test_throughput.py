"""Clips a second by mask and arm, at tiny sizes."""

import json

import pytest
import torch

from adamae_fast.config import MaskConfig
from adamae_fast.train.step import Stepper
from bench import arms, command, report, throughput
from bench.parity import Parity
from bench.timing import Plan

CPU = torch.device("cpu")
PLAN = arms.plan_for(CPU, None)
ARGUMENTS = ["--quick", "--device", "cpu", "--batch", "1"]


def setting(mask: MaskConfig | None = None) -> arms.Setting:
    model, default = command.TINY
    return arms.Setting(model=model, mask=mask or default, batch_size=1, device=CPU)


def test_clips_in_pinned_memory_are_uploaded_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    taken: list[int] = []
    accumulate = Stepper.accumulate

    def pin(video: torch.Tensor) -> torch.Tensor:
        pinned.append(video.clone())
        return pinned[-1]

    def spy(self: Stepper, video: torch.Tensor) -> None:
        taken.append(video.data_ptr())
        accumulate(self, video)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(Stepper, "accumulate", spy)
    monkeypatch.setattr(throughput, "CLIPS", {"cpu": ("device", "pinned")})
    rows = throughput.measure([("ours-none", setting())], PLAN, Plan(warm_up=0, rounds=1, block=2))
    assert [row["clips"] for row in rows] == ["device", "pinned"]
    (clips,) = pinned
    assert clips.dtype == torch.uint8
    assert [pointer == clips.data_ptr() for pointer in taken] == [False] * 3 + [True] * 4


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "QUICK", Plan(warm_up=0, rounds=2, block=1))


def test_every_arm_with_every_mask_is_compared_with_the_first_arm(quick: None, capsys, tmp_path) -> None:
    assert throughput.main([*ARGUMENTS, "--out", str(tmp_path), "--arm", "published-like-fp32", "ours-none"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["strategy"], row["arm"]): row for row in result["rows"]}
    strategies = ("adaptive", "tube", "random", "frame")
    assert list(rows) == [(name, arm) for name in strategies for arm in ("published-like-fp32", "ours-none")]
    for strategy in strategies:
        base, ours = rows[strategy, "published-like-fp32"], rows[strategy, "ours-none"]
        assert ours["speedup"] == pytest.approx(base["ms"] / ours["ms"], abs=1e-3)
        assert base["speedup"] == 1
    page = "\n".join(report.throughput_section(result))
    assert page.count("| ours-none |") == 4
    assert "× published-like-fp32" in page


def test_what_computes_something_else_is_not_timed_and_says_so(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    fault = Parity.fault

    def faulty(self: Parity, arm: arms.Arm) -> str | None:
        return "the loss is off" if arm.setting.mask.strategy == "tube" else fault(self, arm)

    monkeypatch.setattr(Parity, "fault", faulty)
    assert throughput.main(ARGUMENTS) == command.REFUSED
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [row["strategy"] for row in result["rows"]] == ["adaptive", "random", "frame"]
    assert result["skipped"] == {"ours-none, tube 0.9": "parity: the loss is off"}
    assert "ours-none, tube 0.9: parity: the loss is off" in out
    assert "* ours-none, tube 0.9: parity: the loss is off" in report.throughput_section(result)


def test_arms_agree_with_every_mask() -> None:
    names = ("published-like-fp32", "tuned", "ours-fc1")
    assert throughput.check([(name, setting(mask)) for name in names for mask in throughput.MASKS[1:]], PLAN) == {}


def test_arms_that_cannot_be_measured_are_named() -> None:
    with pytest.raises(ValueError, match=r"--arm='published-fp32': not measured: give --published .*; choose from"):
        throughput.main([*ARGUMENTS, "--arm", "published-fp32"])
    with pytest.raises(ValueError, match=r"--arm='none': no such arm; choose from published-like-fp32, "):
        throughput.main([*ARGUMENTS, "--arm", "none"])


def test_nothing_left_to_measure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parity, "fault", lambda self, arm: "wrong")
    with pytest.raises(ValueError, match=r"--arm ours-none: nothing can be measured: parity: wrong"):
        throughput.main(ARGUMENTS)
