"""The count of saved bytes sees all that a forward pass leaves behind."""

import gc
import weakref
from functools import partial
from typing import get_args

import pytest
import torch

from adamae_fast.config import Precision, Recompute
from bench.saved import CASTS, NANO, PARTS, alive_bytes, build, draw_video, forward, saved_bytes


@pytest.mark.parametrize("policy", get_args(Recompute))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_bytes_are_those_that_stay_alive(policy: Recompute, precision: Precision) -> None:
    model = build(NANO)
    model.set_recompute(policy)
    call = partial(forward, model, draw_video(model, 2), precision)
    call()  # what is built once
    saved = saved_bytes(model, call)
    # The loss itself and what it was multiplied with.
    assert 0 <= alive_bytes(call) - saved.total() <= 64
    assert set(saved) <= {*PARTS, CASTS}
    assert (saved[CASTS] > 0) == (precision == "bf16")


def test_what_hides_from_the_hooks_is_alive() -> None:
    hidden = []

    def call() -> torch.Tensor:
        hidden.append(torch.ones(1000))
        return torch.zeros(())

    assert saved_bytes(build(NANO), call).total() == 0
    assert 4000 <= alive_bytes(call) <= 4064


def test_counting_keeps_no_model_alive() -> None:
    model = build(NANO)
    saved_bytes(model, partial(forward, model, draw_video(model, 2), "fp32"))
    there = weakref.ref(model.encoder.blocks[0].attention.qkv.weight)
    del model
    gc.collect()
    assert there() is None
