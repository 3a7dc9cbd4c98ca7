from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adamae_fast.config import MaskConfig, ModelConfig
from adamae_fast.data.batch import Batch
from bench import real_decode
from bench.arms import Setting


def test_no_batch_that_was_laid_up_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers live through the decoded steps alone, and are more than two batches each behind when the clock runs."""
    events: list[str] = []

    def clip_batches(config: Any, entries: Any, first: int, end: int, device: torch.device) -> Iterator[Batch]:
        events.append(f"workers from {first}")
        try:
            for _ in range(first, end):
                yield Batch(torch.zeros(1), [])
        finally:
            events.append("no workers")

    def seconds_of(steps: Any, num_steps: int, device: torch.device) -> float:
        events.append("clock")
        steps(num_steps)
        events.append("stop")
        return 1.0

    arm = SimpleNamespace(clips=torch.ones(1), step=lambda: events.append("on" if arm.clips.any() else "decoded"))
    monkeypatch.setattr(real_decode, "clip_batches", clip_batches)
    monkeypatch.setattr(real_decode, "seconds_of", seconds_of)
    monkeypatch.setattr(real_decode.arms, "plan_for", lambda device, attention: None)
    monkeypatch.setattr(real_decode.arms, "builders", lambda setting, plan: ({"ours": lambda: arm}, {}))
    setting = Setting(model=ModelConfig(), mask=MaskConfig(), batch_size=4, device=torch.device("cpu"))
    row = real_decode.measure(setting, "ours", [], num_workers=2, num_steps=3, rounds=2)
    assert row["share"] == 1.0
    one_round = [
        "clock",
        "on",
        "on",
        "on",
        "stop",
        "workers from {}",
        *["decoded"] * 6,
        "clock",
        *["decoded"] * 3,
        "stop",
    ]
    expected = ["on"] * real_decode.WARM_UP
    for first in (0, 15):
        expected += [event.format(first) for event in one_round] + ["no workers"]
    assert events == expected
