"""What every kernel owes its schema, as tests that run in a process of their own: interpreted, or on a GPU.

Inputs are drawn, and results compared, on the CPU.
"""

import os
from dataclasses import replace
from functools import partial

import adamae_kernels
import pytest
import torch
import triton
import triton.language as tl
from adamae_kernels.exponential import exp_of_negative
from torch import Tensor
from torch.utils import _pytree as pytree

from adamae_fast.ops.registry import NAMESPACE
from adamae_fast.testing import (
    ODD_SHAPES,
    OPERATION_INPUTS,
    Arguments,
    InputFactory,
    OpShape,
    assert_within_budget,
    scattered_in_memory,
)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# Memory that torch hands out holds NaN (the largest number, for ids), so that an element never written shows.
torch.use_deterministic_algorithms(True)

NAMES = sorted(adamae_kernels.LAUNCHERS)
PER_TOKEN = {"patch_targets", "masked_patch_loss", "masked_patch_loss_backward", "patch_loss_step"}
"""One program for each masked token, slow to interpret."""

every_kernel = pytest.mark.parametrize("name", NAMES)


def on_device(x: Tensor) -> Tensor:
    """Moving gives a scattered tensor up; it is scattered again."""
    moved = x.to(DEVICE)
    return moved if x.is_contiguous() else scattered_in_memory(moved)


def kernel(name: str, *arguments: object) -> list[Tensor]:
    arguments = pytree.tree_map_only(Tensor, on_device, arguments)
    return [x.cpu() for x in OPERATION_INPUTS[name].results(adamae_kernels.LAUNCHERS[name], arguments)]


def reference(name: str, *arguments: object) -> object:
    """What the operation gives where nothing but its reference is registered."""
    return getattr(getattr(torch.ops, NAMESPACE), name).reference(*arguments)


def plain(name: str, *arguments: object) -> list[Tensor]:
    return OPERATION_INPUTS[name].results(partial(reference, name), arguments)


def in_fp64(arguments: Arguments) -> Arguments:
    def convert(x: object) -> object:
        if isinstance(x, Tensor):
            return x.double() if x.is_floating_point() else x
        return torch.float64 if isinstance(x, torch.dtype) else x

    return tuple(map(convert, arguments))


def calls(name: str, shape: OpShape, dtype: torch.dtype = torch.float32) -> list[Arguments]:
    """The first and the last of the arguments: between them every target and error."""
    made = OPERATION_INPUTS[name].make(InputFactory(shape, dtype=dtype))
    return made[::5] if len(made) == 6 else made


def shapes(name: str) -> list[OpShape]:
    if name in PER_TOKEN:
        return [OpShape(batch_size=1, grid=(2, 3, 2), patch_size=5), ODD_SHAPES[4]]
    odd = [replace(s, patch_size=3) for s in ODD_SHAPES if s.num_masked or name != "sampling_loss"]
    if name in ("sample_visible", "sampling_loss"):
        # One number of a clip: plain PyTorch's error, which bounds ours, is luck unless there are many clips.
        return [replace(s, batch_size=32) for s in (OpShape(), *odd)]
    return [OpShape(), *odd]


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [(name, shape, dtype) for name in NAMES for shape in shapes(name) for dtype in (torch.float32, torch.bfloat16)]
    + [(name, shapes(name)[0], torch.float16) for name in NAMES],
)
def test_is_as_right_as_the_reference(name: str, shape: OpShape, dtype: torch.dtype) -> None:
    for arguments in calls(name, shape, dtype):
        expected = plain(name, *arguments)
        truth = plain(name, *in_fp64(arguments))
        actual = kernel(name, *arguments)
        assert len(actual) == len(expected)
        for x, formula, exact in zip(actual, expected, truth, strict=True):
            assert (x.shape, x.dtype, x.is_contiguous()) == (formula.shape, formula.dtype, True)
            if not x.is_floating_point():
                assert torch.equal(x, formula)
            elif x.numel():
                assert_within_budget(x, formula, exact, largest_term=float(exact.abs().max()))


@every_kernel
def test_any_strides_give_the_same_bits_and_so_does_a_second_run(name: str) -> None:
    for arguments in calls(name, OpShape(batch_size=2, grid=(2, 1, 3), num_visible=2, width=5)):
        scattered = pytree.tree_map_only(Tensor, scattered_in_memory, arguments)
        once = pytree.tree_map_only(Tensor, lambda x: x.flatten()[:1].expand(x.shape) if x.dim() == 1 else x, arguments)
        expected = kernel(name, *arguments)
        for same in (arguments, scattered):
            assert all(map(torch.equal, kernel(name, *same), expected))
        copied = pytree.tree_map_only(Tensor, lambda x: x.clone(memory_format=torch.contiguous_format), once)
        assert all(map(torch.equal, kernel(name, *once), kernel(name, *copied)))


@pytest.mark.parametrize("wrong", [-1, 15, 2**40, 0, "twice"])
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("gather_tokens", 1),
        ("assemble_decoder", 3),
        ("assemble_decoder", 4),
        ("patch_targets", 1),
        ("masked_patch_loss", 2),
        ("masked_patch_loss_backward", 3),
        ("sampling_loss", 1),
    ],
)
def test_an_id_out_of_range_or_order_becomes_nan_and_nothing_else_changes(
    name: str, position: int, wrong: int | str
) -> None:
    arguments = list(calls(name, OpShape())[-1])
    right = kernel(name, *arguments)
    ids = arguments[position].clone()
    ids[1, 2] = ids[1, 1] if wrong == "twice" else wrong
    arguments[position] = ids
    before = [-1, *ids[1].tolist()]
    places = [place for place, id_ in enumerate(ids[1].tolist()) if not max(before[place], -1) < id_ < 15]
    assert 2 in places
    rows = [place + (4 if (name, position) == ("assemble_decoder", 4) else 0) for place in places]
    for actual, expected in zip(kernel(name, *arguments), right, strict=True):
        expected[(1,) if name == "sampling_loss" else (1, rows)] = torch.nan
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["patch_loss_step"])
def test_a_step_with_an_id_out_of_range_has_nan_in_its_row_alone(name: str) -> None:
    arguments = list(calls(name, OpShape())[-1])
    first, num_masked = arguments[3], OpShape().num_masked
    right = kernel(name, *arguments)
    arguments[2] = arguments[2].clone()
    arguments[2][1, 2] = -1
    row = num_masked + 2 - first
    for x, expected in zip(kernel(name, *arguments), right, strict=True):
        assert x[row].isnan().all()
        assert torch.equal(x[:row], expected[:row])
        assert torch.equal(x[row + 1 :], expected[row + 1 :])


@pytest.mark.parametrize("name", ["gather_tokens_backward"])
@pytest.mark.parametrize("wrong", [-1, -(2**63), 2**63 - 1])
def test_a_slot_out_of_range_reads_no_gradient(name: str, wrong: int) -> None:
    grad, slots = calls(name, OpShape())[-1]
    slots = slots.clone()
    slots[1, 3] = 0  # of a visible token
    (expected,) = kernel(name, grad, slots)
    slots[1, 3] = wrong
    expected[1, 3] = 0
    (actual,) = kernel(name, grad, slots)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["split_tokens"])
@pytest.mark.parametrize("ids", [[3, 3, 1], [3, 7, 1], [3, -2, 1]])
def test_a_token_named_twice_or_out_of_range_leaves_an_id_that_no_token_has(name: str, ids: list[int]) -> None:
    visible, masked, slots = kernel(name, torch.tensor([ids, [0, 1, 2]]), 5)
    assert visible.tolist() == [[1, 3, -1], [0, 1, 2]]
    assert masked[1].tolist() == [3, 4]
    assert slots.tolist() == [[3, 0, 4, 1, 5], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", ["sample_visible"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("num_visible", [1, 700, 2099, 2100])
def test_selects_among_ties_infinities_and_nan_as_a_stable_sort_does(name: str, num_visible: int) -> None:
    """Ids to the last one, so that noise has the same bits; statistics say NaN for the same clips."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2100, generator=generator)
    logits[1] = logits[1].round() * 2**30
    logits[2] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45]).repeat(300)
    seeds = torch.tensor([5, -6, 2**62])
    actual, expected = (f(name, logits, seeds, num_visible) for f in (kernel, reference))
    assert all(map(torch.equal, actual[:3], expected[:3]))
    assert actual[3][:, 2].isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["assemble_decoder_backward"])
def test_the_mask_tokens_gradient_sums_many_chunks(name: str) -> None:
    grad = InputFactory(OpShape(batch_size=5, grid=(257, 1, 1), width=7)).tokens(257)
    actual = kernel(name, grad, 9, torch.float32)[1]
    _, formula = reference(name, grad, 9, torch.float32)
    _, truth = reference(name, grad.double(), 9, torch.float64)
    assert_within_budget(actual, formula, truth, largest_term=float(truth.abs().max()))


@pytest.mark.parametrize("name", ["assemble_decoder"])
def test_the_decoders_input_may_hold_a_part_of_the_masked_tokens(name: str) -> None:
    *arguments, masked_ids = calls(name, OpShape())[-1]
    for part in (masked_ids[:, ::3], masked_ids[:, :1]):
        (actual,), (expected,) = (f(name, *arguments, part) for f in (kernel, plain))
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["patch_targets"])
def test_a_token_too_large_for_32_bit_sums_is_refused(name: str) -> None:
    video, ids = torch.zeros(1, 3, 4, 64, 64, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a token has 49152 values.*smaller tubelets"):
        kernel(name, video, ids, 4, 64, "normalized", torch.float32)


@triton.jit
def _exponential_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, exp_of_negative(tl.load(x + place)))


def test_the_exponential_is_a_rounding_step_off_at_most() -> None:
    x = torch.cat([-torch.linspace(0, 87.3, 8187), torch.tensor([-0.0, -1e-30, -87.4, -torch.inf, torch.nan])])
    out = torch.empty_like(on_device(x))
    _exponential_kernel[(len(x) // 1024,)](on_device(x), out, BLOCK=1024)
    actual, truth = out.cpu(), x.double().exp()
    normal = truth >= torch.finfo(torch.float32).tiny
    steps = (actual.double() - truth).abs()[normal] / (truth[normal].log2().floor().exp2() * 2.0**-23)
    assert steps.max() <= 1
    assert actual[-5:-3].tolist() == [1, 1]
    assert actual[-3:-1].tolist() == [0, 0]
    assert actual[-1].isnan()
