import pytest
import torch
from torch import Tensor

from adamae_fast.ops.gather_tokens import gather_tokens
from adamae_fast.testing import ODD_SHAPES, InputFactory, OpShape, assert_within_budget, scattered_in_memory

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPES = [OpShape(), *ODD_SHAPES]


def formula(tokens: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
    clip = torch.arange(len(tokens)).unsqueeze(1)
    return tokens[clip, ids] + positions.to(tokens.dtype)[ids]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_formula(shape: OpShape, dtype: torch.dtype) -> None:
    factory = InputFactory(shape, dtype=dtype)
    tokens, split = factory.tokens(shape.num_tokens), factory.split()
    positions = InputFactory(shape, seed=1).positions()  # fp32 whatever the tokens are
    for layout in (torch.Tensor.contiguous, scattered_in_memory):
        actual = gather_tokens(layout(tokens), split.visible_ids_BK, split.slots_BN, layout(positions))
        assert actual.dtype == dtype
        in_dtype, truth = (formula(x, split.visible_ids_BK, positions) for x in (tokens, tokens.double()))
        if dtype == torch.float64:
            torch.testing.assert_close(actual, truth)
        else:
            assert_within_budget(actual, in_dtype, truth)


def test_sum_of_half_precision_tokens_is_rounded_once() -> None:
    """1 + 2^-8 + 2^-16 rounds up to 1 + 2^-7; a table rounded to bf16 first would lose 2^-16 and the tie go to 1."""
    tokens = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    position = torch.tensor([[2**-8 + 2**-16]])
    assert (tokens + position.bfloat16()).item() == 1
    assert gather_tokens(tokens, ids, ids, position).item() == 1 + 2**-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_is_exactly_the_gradients_rows(shape: OpShape, dtype: torch.dtype) -> None:
    factory = InputFactory(shape, dtype=dtype)
    tokens, split, positions = factory.tokens(shape.num_tokens).requires_grad_(), factory.split(), factory.positions()
    grad = factory.tokens(shape.num_visible)
    expected = torch.zeros_like(tokens)
    for b, ids in enumerate(split.visible_ids_BK.tolist()):
        for k, n in enumerate(ids):
            expected[b, n] = grad[b, k]
    for layout in (torch.Tensor.contiguous, scattered_in_memory):
        output = gather_tokens(tokens, split.visible_ids_BK, split.slots_BN, positions)
        (actual,) = torch.autograd.grad(output, tokens, layout(grad))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_gradient_is_zero_where_masked_even_if_visible_rows_are_not_finite() -> None:
    factory = InputFactory(OpShape())
    tokens, split, positions = factory.tokens(15).requires_grad_(), factory.split(), factory.positions()
    output = gather_tokens(tokens, split.visible_ids_BK, split.slots_BN, positions)
    (actual,) = torch.autograd.grad(output, tokens, torch.full_like(output, torch.nan))
    assert torch.equal(actual.isfinite().all(2), split.slots_BN >= 4)


@pytest.mark.parametrize("wrong", [-1, 15, -(2**63), 2**63 - 1])
def test_slots_out_of_range_are_an_error_of_the_backward(wrong: int) -> None:
    factory = InputFactory(OpShape())
    tokens, split, positions = factory.tokens(15).requires_grad_(), factory.split(), factory.positions()
    slots = split.slots_BN.clone()
    slots[1, 3] = wrong
    output = gather_tokens(tokens, split.visible_ids_BK, slots, positions)
    with pytest.raises(ValueError, match=f"slots reaches from .*{wrong}.*; 15 tokens have ids 0 to 14"):
        output.sum().backward()


def test_autograd_keeps_the_slots_alone() -> None:
    factory = InputFactory(OpShape())
    tokens, split, positions = factory.tokens(15).requires_grad_(), factory.split(), factory.positions()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gather_tokens(tokens, split.visible_ids_BK, split.slots_BN, positions)
    assert [x.shape for x in kept] == [split.slots_BN.shape]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(15, 6)}, r"tokens has shape \(15, 6\)"),
        ({"ids": torch.zeros(2, 4, dtype=torch.int32)}, "ids has .*int32.*int64"),
        ({"ids": torch.zeros(3, 4, dtype=torch.int64)}, "ids has .*2 rows"),
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, "ids has .*choose 1 to 15"),
        ({"ids": torch.zeros(2, 4, dtype=torch.int64, device="meta")}, "ids has .*meta.* on cpu"),
        ({"ids": torch.full((2, 4), 15)}, "ids reaches from 15 to 15; 15 tokens have ids 0 to 14"),
        (
            {"ids": torch.tensor([[0, 1, 2, 3], [0, 9, 5, 6]])},
            "ids of clip 1 are not ascending: 5 at place 2 follows 9",
        ),
        ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, "ids of clip 0 are not ascending: 0 at place 1 follows 0"),
        ({"slots": torch.zeros(2, 14, dtype=torch.int64)}, r"slots has shape \(2, 14\)"),
        ({"positions": torch.zeros(15, 5)}, r"positions has shape \(15, 5\).*\(N=15, D=6\)"),
        ({"positions": torch.zeros(15, 6, device="meta")}, "positions is on meta"),
        ({"positions": torch.zeros(15, 6, requires_grad=True)}, "positions requires a gradient"),
    ],
)
def test_names_what_is_wrong(change: dict, message: str) -> None:
    factory = InputFactory(OpShape())
    split = factory.split()
    arguments = {
        "tokens": factory.tokens(15),
        "ids": split.visible_ids_BK,
        "slots": split.slots_BN,
        "positions": factory.positions(),
    }
    with pytest.raises(ValueError, match=message):
        gather_tokens(*(arguments | change).values())
