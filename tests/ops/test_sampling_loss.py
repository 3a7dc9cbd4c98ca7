import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adamae_fast.ops.sampling_loss import PROBABILITY_EPS, sampling_loss
from adamae_fast.testing import ODD_SHAPES, InputFactory, OpShape, assert_within_budget

pytestmark = pytest.mark.usefixtures("each_impl")

# One number for each clip: the largest error of a few clips would be a matter of luck.
SHAPES = [replace(shape, batch_size=32) for shape in (OpShape(), *ODD_SHAPES) if shape.num_masked]


def formula(logits: Tensor, masked_ids: Tensor, error: Tensor) -> Tensor:
    """Autograd's own gradient of the loss as written down."""
    p = torch.softmax(logits, dim=1)
    log_p = (p / p.sum(1, keepdim=True)).clamp(PROBABILITY_EPS, 1 - PROBABILITY_EPS).log()
    return -(log_p.gather(1, masked_ids) * error.to(logits.dtype)).mean(1)


def categorical(logits: Tensor, masked_ids: Tensor, error: Tensor) -> Tensor:
    """The distribution that the published code asks, clip by clip."""
    p = torch.softmax(logits, dim=1)
    return torch.stack(
        [
            -(torch.distributions.Categorical(probs=p[b]).log_prob(ids) * error[b]).mean()
            for b, ids in enumerate(masked_ids)
        ]
    )


def make(shape: OpShape, dtype: torch.dtype, peak: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    factory = InputFactory(shape, dtype=dtype)
    return peak * factory.logits(), factory.split().masked_ids_BM, InputFactory(shape, seed=1).per_masked()


def with_gradient(function, logits: Tensor, masked_ids: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of a weighted sum over clips, so that each clip's gradient has its own factor."""
    logits = logits.detach().requires_grad_()
    loss = function(logits, masked_ids, error)
    (grad,) = torch.autograd.grad(loss, logits, torch.linspace(1, 2, len(loss), dtype=loss.dtype))
    return loss.detach(), grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [1.0, 10.0], ids=["plain", "clamped"])
def test_value_and_gradient_equal_the_formula(shape: OpShape, dtype: torch.dtype, peak: float) -> None:
    logits, ids, error = make(shape, dtype, peak)
    if peak > 1:
        assert (logits.float().softmax(1).gather(1, ids) < PROBABILITY_EPS).any()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    truth = with_gradient(formula, logits.double(), ids, error)
    plain = with_gradient(formula, logits.to(compute), ids, error)
    loss, grad = with_gradient(sampling_loss, logits, ids, error)
    assert (loss.dtype, grad.dtype) == (compute, dtype)
    if dtype == torch.float64:
        torch.testing.assert_close((loss, grad), truth)
    else:
        assert_within_budget(loss, plain[0], truth[0])
        # Near p = 1, p · Σw and w cancel; 2 is the last clip's factor.
        p = logits.double().softmax(1).gather(1, ids)
        sum_w = float((error * (p > PROBABILITY_EPS)).sum(1).max()) / shape.num_masked
        assert_within_budget(grad, plain[1].to(dtype), truth[1], largest_term=2 * sum_w)


@pytest.mark.parametrize("peak", [1.0, 10.0], ids=["plain", "clamped"])
def test_equals_the_published_codes_distribution_in_fp32(peak: float) -> None:
    """In fp32 the distribution clamps at the same eps."""
    arguments = make(OpShape(batch_size=4, grid=(8, 4, 4)), torch.float32, peak)
    actual, expected = (with_gradient(function, *arguments) for function in (sampling_loss, categorical))
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-7)


def test_equals_the_categorical_distribution_in_fp64_where_nothing_is_clamped() -> None:
    arguments = make(OpShape(), torch.float64, peak=0.5)
    assert arguments[0].softmax(1).min() > PROBABILITY_EPS
    actual, expected = (with_gradient(function, *arguments) for function in (sampling_loss, categorical))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clamped_tokens_have_a_value_and_no_gradient(dtype: torch.dtype) -> None:
    """Token 0 takes all: its own p is clamped below 1, the others' above 0."""
    logits = torch.tensor([[60.0, 0.0, 1.0, -3.0]], dtype=dtype)
    ids, error = torch.tensor([[0, 2, 3]]), torch.tensor([[5.0, 7.0, 9.0]])
    loss, grad = with_gradient(sampling_loss, logits, ids, error)
    low, high = math.log(PROBABILITY_EPS), math.log1p(-PROBABILITY_EPS)
    assert loss.item() == pytest.approx(-(5 * high + 7 * low + 9 * low) / 3, rel=1e-6)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_closed_form() -> None:
    """dL/dlogit_j = p_j · Σw - w_j, with p and w worked out by hand."""
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    _, grad = with_gradient(sampling_loss, p.log(), torch.tensor([[1, 3]]), torch.tensor([[2.0, 6.0]]))
    expected = torch.tensor([[2.0, 1 - 1, 0.5, 0.5 - 3]], dtype=torch.float64)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_far_from_zero_lose_no_digits(offset: float) -> None:
    """Multiples of 1/64 near 10⁴ are exact in fp32, so the shifted logits are the same distribution."""
    logits, ids, error = make(OpShape(), torch.float32)
    logits = (logits * 64).round() / 64
    shifted, plain = (with_gradient(sampling_loss, x, ids, error) for x in (logits + offset, logits))
    torch.testing.assert_close(shifted, plain, rtol=1e-6, atol=1e-7)


def test_autograd_keeps_the_gradient_alone() -> None:
    logits, ids, error = make(OpShape(), torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        sampling_loss(logits.requires_grad_(), ids, error)
    assert [(x.shape, x.dtype) for x in kept] == [(logits.shape, torch.float32)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in Triton's interpreter, of inf - inf
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 9])
def test_a_logit_that_is_no_number_spreads_over_its_clip(dtype: torch.dtype, logit: float, place: int) -> None:
    logits, ids, error = make(OpShape(), dtype)
    logits[1, place] = logit
    loss, grad = with_gradient(sampling_loss, logits, ids, error)
    assert torch.equal(loss.isnan(), torch.tensor([False, True]))
    assert torch.equal(grad.isnan().all(1), torch.tensor([False, True]))
    assert grad[0].isfinite().all()


def test_any_bits_of_nan_spread() -> None:
    """``make sanitize`` looks at the arithmetic with them."""
    logits, ids, error = make(OpShape(), torch.float32)
    for bits in (2**31 - 1, 0x7FC00000, -1):
        logits[1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        loss, grad = with_gradient(sampling_loss, logits, ids, error)
        assert loss.isnan().tolist() == [False, True]
        assert grad.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_that_is_never_drawn_has_no_gradient_and_the_value_of_eps(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]], dtype=dtype)
    loss, grad = with_gradient(sampling_loss, logits, torch.tensor([[1, 2]]), torch.tensor([[3.0, 4.0]]))
    assert loss.item() == pytest.approx(-(3 * math.log(PROBABILITY_EPS) + 4 * math.log(0.5)) / 2, rel=1e-6)
    assert grad.tolist() == [[1.0, 0.0, -1.0]]


def test_error_is_a_constant() -> None:
    logits, ids, error = make(OpShape(), torch.float32)
    error.requires_grad_()
    sampling_loss(logits.requires_grad_(), ids, error).sum().backward()
    assert error.grad is None
    assert not sampling_loss(logits.detach(), ids, error).requires_grad


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, torch.zeros(15), r"logits has shape \(15,\)"),
        (1, torch.zeros(2, 0, dtype=torch.int64), "masked_ids has .*at least one masked"),
        (1, torch.zeros(3, 11, dtype=torch.int64), "masked_ids has .*2 rows"),
        (1, torch.full((2, 11), 15), "masked_ids reaches from 15 to 15; 15 tokens have ids 0 to 14"),
        (
            1,
            torch.full((2, 11), 7),
            "masked_ids of clip 0 are not ascending: 7 at place 1 follows 7; pass ids as Token",
        ),
        (2, torch.zeros(2, 10), r"error has shape \(2, 10\).*M=11"),
        (2, torch.zeros(2, 11, device="meta"), "error is on meta; move it to cpu"),
    ],
)
def test_names_what_is_wrong(position: int, change: Tensor, message: str) -> None:
    arguments = list(make(OpShape(), torch.float32))
    arguments[position] = change
    with pytest.raises(ValueError, match=message):
        sampling_loss(*arguments)
