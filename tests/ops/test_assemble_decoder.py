import pytest
import torch
from torch import Tensor

from adamae_fast.ops.assemble_decoder import assemble_decoder
from adamae_fast.testing import ODD_SHAPES, InputFactory, OpShape, assert_within_budget, scattered_in_memory

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPES = [OpShape(), *ODD_SHAPES]


def formula(visible: Tensor, mask_token: Tensor, positions: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
    """Rows one by one."""
    table = positions.to(visible.dtype)
    clips = []
    for b in range(len(visible)):
        rows = [visible[b, k] + table[n] for k, n in enumerate(visible_ids[b].tolist())]
        rows += [mask_token.to(visible.dtype) + table[n] for n in masked_ids[b].tolist()]
        clips.append(torch.stack(rows))
    return torch.stack(clips)


def make(shape: OpShape, dtype: torch.dtype, parameter_dtype: torch.dtype) -> list[Tensor]:
    factory = InputFactory(shape, dtype=dtype)
    parameters = InputFactory(shape, dtype=parameter_dtype, seed=1)
    split = factory.split()
    return [
        factory.tokens(shape.num_visible).requires_grad_(),
        parameters.normal(shape.width).requires_grad_(),
        parameters.positions(),
        split.visible_ids_BK,
        split.masked_ids_BM,
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_value_and_gradients_equal_the_formula(
    shape: OpShape, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    arguments = make(shape, dtype, parameter_dtype)
    grad = InputFactory(shape, dtype=dtype, seed=2).tokens(shape.num_tokens)

    def with_gradients(function, arguments: list[Tensor], grad: Tensor) -> list[Tensor]:
        output = function(*arguments)
        gradients = torch.autograd.grad(output, arguments[:2], grad, allow_unused=True, materialize_grads=True)
        return [output, *gradients]

    in_double = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in arguments]
    actual = with_gradients(assemble_decoder, arguments, grad)
    assert [x.dtype for x in actual] == [dtype, dtype, parameter_dtype]
    in_dtype = with_gradients(formula, arguments, grad)
    for x, plain, truth in zip(actual, in_dtype, with_gradients(formula, in_double, grad.double()), strict=True):
        if x.dtype == torch.float64:
            torch.testing.assert_close(x, truth)
        else:
            assert_within_budget(x, plain, truth)
    scattered = [scattered_in_memory(x.detach()).requires_grad_(x.requires_grad) for x in arguments]
    for x, y in zip(actual, with_gradients(assemble_decoder, scattered, scattered_in_memory(grad)), strict=True):
        torch.testing.assert_close(x, y)


def test_a_part_of_the_masked_tokens_makes_fewer_rows() -> None:
    arguments = make(OpShape(), torch.float64, torch.float64)
    arguments[4] = arguments[4][:, ::3]
    output, expected = assemble_decoder(*arguments), formula(*arguments)
    assert output.shape[1] == 4 + 4
    assert torch.equal(output, expected)
    grad = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for x, y in zip(*(torch.autograd.grad(out, arguments[:2], grad) for out in (output, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_mask_tokens_gradient_is_summed_in_fp32() -> None:
    """A bf16 sum of 600 ones stops at 256."""
    shape = OpShape(batch_size=1, grid=(601, 1, 1), num_visible=1)
    arguments = make(shape, torch.bfloat16, torch.bfloat16)
    assemble_decoder(*arguments).sum().backward()
    assert arguments[1].grad.tolist() == [600.0] * shape.width


def test_autograd_keeps_no_tensor() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert assemble_decoder(*make(OpShape(), torch.float32, torch.float32)).requires_grad
    assert not kept


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, torch.zeros(2, 4), r"visible has shape \(2, 4\)"),
        (1, torch.zeros(5), r"mask_token has shape \(5,\).*E=6"),
        (1, torch.zeros(6, device="meta"), "mask_token is on meta"),
        (2, torch.zeros(14, 6), r"positions has shape \(14, 6\).*4 visible and 11 masked tokens need .* 15 tokens"),
        (2, torch.zeros(15, 6, requires_grad=True), "positions requires a gradient"),
        (3, torch.zeros(2, 5, dtype=torch.int64), "visible_ids has .* 4 visible tokens"),
        (3, torch.full((2, 4), -1), "visible_ids reaches from -1"),
        (
            3,
            torch.tensor([[0, 1, 2, 3], [0, 9, 5, 6]]),
            "visible_ids of clip 1 are not ascending: 5 at place 2 follows 9",
        ),
        (4, torch.zeros(2, 11), "masked_ids has .*float32.*int64"),
        (4, torch.full((2, 11), 15), "masked_ids reaches from 15 to 15"),
        (
            4,
            torch.full((2, 11), 7),
            "masked_ids of clip 0 are not ascending: 7 at place 1 follows 7; pass ids as Token",
        ),
    ],
)
def test_names_what_is_wrong(position: int, change: Tensor, message: str) -> None:
    arguments = make(OpShape(), torch.float32, torch.float32)
    arguments[position] = change
    with pytest.raises(ValueError, match=message):
        assemble_decoder(*arguments)
