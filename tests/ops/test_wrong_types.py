"""Arguments of another type than an operation takes: the public function names them, and says what to pass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from adamae_fast.ops.assemble_decoder import assemble_decoder
from adamae_fast.ops.attention import attention
from adamae_fast.ops.gather_tokens import gather_tokens
from adamae_fast.ops.head_patch_loss import head_patch_loss
from adamae_fast.ops.masked_patch_loss import masked_patch_loss, patch_targets
from adamae_fast.ops.patchify import embed_tubelets, patchify
from adamae_fast.ops.sample_visible import sample_visible, split_tokens
from adamae_fast.ops.sampling_loss import sampling_loss
from adamae_fast.testing import OPERATIONS

# Two clips of 4 tokens of 12 pixels, 2 of them visible; width 6.
IDS = torch.tensor([[0, 1], [1, 3]])
VIDEO = torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8)
SIZES = {"tubelet_size": 1, "patch_size": 2}
COMPARED = {"video_BCTHW": VIDEO, "masked_ids_BM": IDS, **SIZES, "target": "raw"}
CALLS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (patchify, {"video_BCTHW": VIDEO, **SIZES, "dtype": torch.float32}),
    (embed_tubelets, {"video_BCTHW": VIDEO, "weight_DCthw": torch.zeros(6, 3, 1, 2, 2), "bias_D": torch.zeros(6)}),
    (
        sample_visible,
        {"logits_BN": torch.zeros(2, 4), "seeds_B": torch.zeros(2, dtype=torch.int64), "num_visible": 2},
    ),
    (split_tokens, {"visible_ids_BK": IDS, "num_tokens": 4}),
    (
        gather_tokens,
        {
            "tokens_BND": torch.zeros(2, 4, 6),
            "ids_BK": IDS,
            "slots_BN": torch.zeros(2, 4, dtype=torch.int64),
            "positions_ND": torch.zeros(4, 6),
        },
    ),
    (
        assemble_decoder,
        {
            "visible_BKE": torch.zeros(2, 2, 6),
            "mask_token_E": torch.zeros(6),
            "positions_NE": torch.zeros(4, 6),
            "visible_ids_BK": IDS,
            "masked_ids_BM": IDS,
        },
    ),
    (patch_targets, COMPARED),
    (masked_patch_loss, {"prediction_BMP": torch.zeros(2, 2, 12), **COMPARED, "error": "mse"}),
    (
        head_patch_loss,
        {
            "hidden_BME": torch.zeros(2, 2, 6),
            "weight_PE": torch.zeros(12, 6),
            "bias_P": torch.zeros(12),
            **COMPARED,
            "error": "mse",
        },
    ),
    (sampling_loss, {"logits_BN": torch.zeros(2, 4), "masked_ids_BM": IDS, "error_BM": torch.zeros(2, 2)}),
    (attention, {f"{name}_BNHd": torch.zeros(2, 4, 3, 8) for name in "qkv"} | {"backend": "auto"}),
]
ARGUMENTS = [
    pytest.param(function, arguments, key, id=f"{function.__name__}-{key}")
    for function, arguments in CALLS
    for key in arguments
    if key not in ("target", "error")  # choices, whose own errors list them
]


@pytest.mark.parametrize(("function", "arguments", "key"), ARGUMENTS)
def test_the_argument_its_type_and_the_remedy_are_named(
    function: Callable[..., Any], arguments: dict[str, Any], key: str
) -> None:
    function(**arguments)
    annotation, value = get_type_hints(function)[key], arguments[key]
    name = re.sub("_[A-Z]+[a-z]*$", "", key)
    wrong_values: list[object] = [None, [1, 2], {}]
    remedy = "a torch.Tensor; torch.as_tensor makes one of lists and arrays"
    if annotation is Tensor:
        wrong_values += [value.tolist(), value.numpy(), np.zeros(3)]
    else:
        remedy = {int: "an int", str: "a string", torch.dtype: "a torch.dtype such as torch.float32"}[annotation]
        wrong_values += [2.0] + (["2"] if annotation is int else [])
    for wrong in wrong_values:
        message = f"{name} of {function.__name__} is a {type(wrong).__name__}; pass {remedy}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            function(**(arguments | {key: wrong}))


def test_every_argument_of_every_operation_is_covered() -> None:
    of_modules = [(m, f) for m in OPERATIONS for _, f in inspect.getmembers(m, inspect.isfunction)]
    public = {f for m, f in of_modules if f.__module__ == m.__name__ and "impl" in inspect.signature(f).parameters}
    assert {function for function, _ in CALLS} == public | {attention}
    for function, arguments in CALLS:
        assert set(arguments) == set(get_type_hints(function)) - {"impl", "return"}


def test_errors_of_right_types_are_left_alone() -> None:
    with pytest.raises(ValueError, match=r"^num_visible=5: choose 1 to 4, the number of tokens$"):
        sample_visible(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 5)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'num_visible'"):
        sample_visible(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
