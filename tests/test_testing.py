import pytest
import torch

from adamae_fast.testing import InputFactory, OpShape, assert_within_budget, scattered_in_memory

TRUTH = torch.tensor([1.0, -100.0, 0.0], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def test_budget_allows_twice_the_formulas_error_and_one_rounding_step() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    formula = torch.tensor([1.0, 1.0, 1 + 4 * EPS])
    assert_within_budget(torch.tensor([1 + 9 * EPS, 1.0, 1.0]), formula, truth)
    with pytest.raises(AssertionError, match="error exceeds"):
        assert_within_budget(torch.tensor([1 + 10 * EPS, 1.0, 1.0]), formula, truth)
    assert_within_budget(torch.tensor([1 + EPS]), torch.ones(1), torch.ones(1, dtype=torch.float64))
    with pytest.raises(AssertionError, match="error exceeds"):
        assert_within_budget(torch.tensor([1 + 2 * EPS]), torch.ones(1), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("actual", "formula", "message"),
    [
        (torch.tensor([1.0, torch.nan, 0.0]), TRUTH.float(), "1 of 3 elements are not finite"),
        (torch.tensor([1.0, -100.0]), TRUTH.float(), "shape"),
        (TRUTH.float(), TRUTH.bfloat16(), "dtype"),
    ],
)
def test_budget_refuses(actual: torch.Tensor, formula: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_within_budget(actual, formula, TRUTH)


def test_budget_wants_the_truth_in_fp64() -> None:
    with pytest.raises(AssertionError, match="only the truth may be fp64"):
        assert_within_budget(TRUTH.float(), TRUTH.float(), TRUTH.float())


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4, 5, 6)])
def test_scattered_keeps_values_and_no_layout(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    scattered = scattered_in_memory(x)
    assert torch.equal(scattered, x)
    assert 1 not in scattered.stride()


def test_equal_seeds_draw_equal_inputs() -> None:
    first, second, other = (InputFactory(OpShape(), seed=seed).video() for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
