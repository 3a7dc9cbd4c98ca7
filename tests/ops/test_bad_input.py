"""Bad and unusual input straight to the operations, past the checks of the public functions, as C++ gets it.

What memory does here shows under the sanitizers: ``make sanitize``.
"""

import re
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload

from adamae_fast.testing import OPERATION_INPUTS, Arguments, InputFactory, OpShape, scattered_in_memory
from tests.ops.conftest import needs_cpp

PRODUCTS = ("embed_tubelets", "head_patch_loss")  # of PyTorch, which checks their factors
IN_CPP = [name for name in OPERATION_INPUTS if not name.startswith(PRODUCTS)]


def call(name: str, shape: OpShape | None = None) -> tuple[OpOverload, Arguments]:
    """An operation, and fresh arguments that it takes: some are written to."""
    operation = getattr(torch.ops.adamae_fast, name).default
    return operation, OPERATION_INPUTS[name].make(InputFactory(shape or OpShape()))[0]


def with_each(arguments: Arguments, kind: type) -> Iterator[tuple[int, object]]:
    return ((i, argument) for i, argument in enumerate(arguments) if type(argument) is kind)


@needs_cpp
@pytest.mark.parametrize("name", [n for n in IN_CPP if n not in ("patchify", "split_tokens", "patch_targets")])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e5m2, torch.complex64])
def test_other_dtypes_are_an_error(name: str, dtype: torch.dtype) -> None:
    operation, arguments = call(name)
    first = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.is_floating_point())
    # The gradient of an error is converted; the prediction decides.
    first += name == "masked_patch_loss_backward"
    other = arguments[first].to(dtype)
    with pytest.raises(ValueError, match=r"the C\+\+ operations take Float, Double, BFloat16 and Half"):
        operation(*arguments[:first], other, *arguments[first + 1 :])


@needs_cpp
@pytest.mark.parametrize("name", sorted(OPERATION_INPUTS))
@pytest.mark.parametrize("wrong", [-1, 2**40])
def test_ids_out_of_range_are_an_error(name: str, wrong: int) -> None:
    operation, arguments = call(name)
    for i, argument in enumerate(arguments):
        if name == "gather_tokens" and i == 2:
            continue  # the inverse map is read in the backward
        if isinstance(argument, Tensor) and argument.dtype == torch.int64 and argument.dim() == 2:  # not seeds
            ids = argument.clone()
            ids[-1, -1] = wrong
            with pytest.raises(ValueError, match=re.escape(str(wrong))):
                operation(*arguments[:i], ids, *arguments[i + 1 :])


@pytest.mark.parametrize(
    ("name", "position", "argument"),
    [
        ("gather_tokens", 1, "ids"),
        ("assemble_decoder", 3, "visible_ids"),
        ("assemble_decoder", 4, "masked_ids"),
        ("patch_targets", 1, "masked_ids"),
        ("masked_patch_loss", 2, "masked_ids"),
        ("masked_patch_loss_backward", 3, "masked_ids"),
        ("patch_loss_step", 2, "masked_ids"),
        ("sampling_loss", 1, "masked_ids"),
    ],
)
@pytest.mark.parametrize("place", [1, -1])
@pytest.mark.parametrize("step", [0, -1])
def test_ids_that_do_not_ascend_are_an_error(
    name: str, position: int, argument: str, place: int, step: int, impl: str
) -> None:
    packet = getattr(torch.ops.adamae_fast, name)
    arguments = list(OPERATION_INPUTS[name].make(InputFactory(OpShape(grid=(3, 10, 5), num_visible=70)))[0])
    ids = arguments[position] = arguments[position].clone()
    place %= ids.shape[1]
    ids[1] = torch.arange(1, ids.shape[1] + 1)
    ids[1, place] = ids[1, place - 1] + step
    message = (
        f"{argument} of clip 1 are not ascending: {ids[1, place]} at place {place} follows {ids[1, place - 1]}; "
        "pass ids as TokenSplit has them, ascending and distinct"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        (packet.reference if impl == "reference" else packet.default)(*arguments)


@needs_cpp
@pytest.mark.parametrize("name", IN_CPP)
def test_smaller_shapes_never_reach_memory(name: str) -> None:
    """Each tensor in turn loses a column, a row or a dimension: an error, or a smaller result."""
    operation, arguments = call(name)
    for i, argument in with_each(arguments, Tensor):
        for smaller in (argument[..., :-1], argument[:-1], argument[0], argument[:0]):
            with suppress(ValueError):
                operation(*arguments[:i], smaller, *arguments[i + 1 :])


@needs_cpp
@pytest.mark.parametrize("name", IN_CPP)
def test_larger_shapes_never_reach_memory(name: str) -> None:
    """Each tensor in turn gets another column, row or dimension."""
    operation, arguments = call(name)
    for i, argument in with_each(arguments, Tensor):
        for larger in (torch.cat([argument, argument[..., :1]], -1), torch.cat([argument, argument]), argument[None]):
            with suppress(ValueError):
                operation(*arguments[:i], larger, *arguments[i + 1 :])


@needs_cpp
@pytest.mark.parametrize("name", IN_CPP)
@pytest.mark.parametrize("number", [0, -1, 1, 1000, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)])
def test_numbers_of_any_size_never_reach_memory(name: str, number: int) -> None:
    """RuntimeError is torch's, which cannot make a result of that size."""
    operation, arguments = call(name)
    for i, _ in with_each(arguments, int):
        with suppress(ValueError, RuntimeError):
            operation(*arguments[:i], number, *arguments[i + 1 :])


@needs_cpp
@pytest.mark.parametrize("num_visible", [0, -1, 16, 2**40])
def test_more_visible_tokens_than_there_are_is_an_error(num_visible: int) -> None:
    (operation, (logits, seeds, _)), is_said = call("sample_visible"), re.escape(f"num_visible={num_visible}")
    with pytest.raises(ValueError, match=is_said):
        operation(logits, seeds, num_visible)


@needs_cpp
@pytest.mark.parametrize("name", IN_CPP)
def test_strides_and_places_in_memory_change_nothing(name: str) -> None:
    """Gaps between elements, and rows that begin at odd addresses."""

    def displaced(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)

    operation, arguments = call(name)
    expected = operation(*arguments)
    for move in (scattered_in_memory, displaced):
        _, arguments = call(name)
        results = operation(*(move(x) if isinstance(x, Tensor) else x for x in arguments))
        torch.testing.assert_close(results, expected, rtol=0, atol=0, equal_nan=True)


@needs_cpp
@pytest.mark.parametrize("name", IN_CPP)
@pytest.mark.parametrize(
    "shape",
    [OpShape(batch_size=0), OpShape(num_visible=15), OpShape(width=0), OpShape(batch_size=0, num_visible=15, width=0)],
    ids=["no clip", "nothing masked", "no channel", "none of them"],
)
def test_empty_tensors_are_results_like_others(name: str, shape: OpShape) -> None:
    operation, arguments = call(name, shape)
    if name == "sampling_loss" and not shape.num_masked:
        with pytest.raises(ValueError, match="masked_ids has no columns"):
            operation(*arguments)
        return
    expected = getattr(torch.ops.adamae_fast, name).reference(*call(name, shape)[1])
    torch.testing.assert_close(operation(*arguments), expected, equal_nan=True)
