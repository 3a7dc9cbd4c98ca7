from itertools import product
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from adamae_fast.ops.head_patch_loss import CHUNK_ROWS, head_patch_loss
from adamae_fast.ops.masked_patch_loss import Error, Target, masked_patch_loss
from adamae_fast.testing import ODD_SHAPES, InputFactory, OpShape, assert_within_budget
from tests.ops.test_masked_patch_loss import loss_formula, target_formula

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPE = OpShape(grid=(2, 3, 5))  # 26 masked tokens of each of two clips
TARGETS, ERRORS = get_args(Target), get_args(Error)
DEFAULT = {"target": "normalized", "error": "mse"}


def sizes(shape: OpShape) -> dict[str, int]:
    return {"tubelet_size": shape.tubelet_size, "patch_size": shape.patch_size}


def make(shape: OpShape, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, weight and bias, which want gradients; clip; masked ids."""
    factory = InputFactory(shape, dtype=dtype)
    weight = factory.normal(shape.pixels_per_token, shape.width) / shape.width**0.5
    inputs = [factory.tokens(shape.num_masked), weight, factory.normal(shape.pixels_per_token)]
    return [x.detach().requires_grad_() for x in inputs], factory.video(), factory.split().masked_ids_BM


def fused(inputs: list[Tensor], video: Tensor, ids: Tensor, shape: OpShape, **loss: str) -> tuple[Tensor, Tensor]:
    return head_patch_loss(*inputs, video, ids, **sizes(shape), **loss)


def unfused(inputs: list[Tensor], video: Tensor, ids: Tensor, shape: OpShape, **loss: str) -> tuple[Tensor, Tensor]:
    """The same from a whole prediction."""
    error_BM = masked_patch_loss(F.linear(*inputs), video, ids, **sizes(shape), **loss)
    return error_BM.mean(), error_BM


def formula(
    inputs: list[Tensor], video: Tensor, ids: Tensor, shape: OpShape, target: str, error: str
) -> tuple[Tensor, Tensor]:
    targets = target_formula(video, ids, shape, target, inputs[0].dtype)
    error_BM = loss_formula(F.linear(*inputs), targets, error)
    return error_BM.mean(), error_BM


def with_gradients(function, inputs: list[Tensor], *arguments, **loss: str) -> list[Tensor]:
    mean, error_BM = function(inputs, *arguments, **loss)
    return [mean, error_BM, *torch.autograd.grad(3 * mean, inputs)]


@pytest.mark.parametrize(("target", "error"), list(product(TARGETS, ERRORS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "chunk_rows"),
    # Chunks of one clip, of two, of one token, of all; the last of them shorter, or not.
    [(SHAPE, 7), (SHAPE, 26), (SHAPE, 20), (SHAPE, 1000), (ODD_SHAPES[0], 10), (ODD_SHAPES[1], 16), (ODD_SHAPES[2], 1)],
)
def test_values_and_gradients_are_those_of_linear_and_loss(
    shape: OpShape, chunk_rows: int, dtype: torch.dtype, target: Target, error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_ROWS, "cpu", chunk_rows)
    loss = {"target": target, "error": error}
    inputs, *rest = make(shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    actual = with_gradients(fused, inputs, *rest, shape, **loss)
    truth = with_gradients(formula, exact, *rest, shape, **loss)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in actual] == [compute, compute, dtype, dtype, dtype]
    if dtype == torch.float64:
        torch.testing.assert_close(actual, truth)
    else:
        plain = with_gradients(unfused, inputs, *rest, shape, **loss)
        # The mean's terms are the errors.
        terms = [truth[1], *truth[1:]]
        for x, in_dtype, exactly, term in zip(actual, plain, truth, terms, strict=True):
            assert_within_budget(x, in_dtype, exactly, largest_term=float(term.detach().abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the products of 16-bit factors come in fp32, and Triton compares."""
    monkeypatch.setitem(CHUNK_ROWS, "cuda", 20)
    inputs, *rest = make(SHAPE, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = with_gradients(formula, exact, *rest, SHAPE, **DEFAULT)
    on_gpu = [x.detach().cuda().requires_grad_() for x in inputs], *(x.cuda() for x in rest)
    actual, plain = (with_gradients(f, *on_gpu, SHAPE, **DEFAULT) for f in (fused, unfused))
    terms = [truth[1], *truth[1:]]
    for x, in_dtype, exactly, term in zip(actual, plain, truth, terms, strict=True):
        largest_term = float(term.detach().abs().max())
        assert_within_budget(x.cpu(), in_dtype.cpu(), exactly, largest_term=largest_term)


def test_a_constant_prediction_has_a_closed_form() -> None:
    shape = OpShape(grid=(1, 2, 3))
    video = torch.full(shape.video_shape, 51, dtype=torch.uint8)
    (hidden, weight, bias), _, ids = make(shape, torch.float32)
    values = torch.zeros_like(hidden), torch.ones_like(weight), torch.full_like(bias, 0.7)
    inputs = [x.requires_grad_() for x in values]
    mean, error_BM = fused(inputs, video, ids, shape, target="raw", error="mse")
    torch.testing.assert_close(error_BM, torch.full_like(error_BM, 0.25))
    torch.testing.assert_close(mean, torch.tensor(0.25))
    mean.backward()
    torch.testing.assert_close(inputs[0].grad, torch.full_like(hidden, 1 / error_BM.numel()))
    torch.testing.assert_close(inputs[1].grad, torch.zeros_like(weight))
    torch.testing.assert_close(inputs[2].grad, torch.full_like(bias, 1 / shape.pixels_per_token))


def allocations(function) -> tuple[int, int]:
    """Bytes of the largest allocation, and the most bytes that were in use at once, beyond those before."""
    function()  # what is kept from a first call is none of its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [x for x in recorded.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
    in_use = torch.tensor(changes).cumsum(0)
    return max(changes), int(in_use.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_prediction_and_no_target_is_ever_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_ROWS, "cpu", 16)
    shape = OpShape(grid=(4, 14, 14), patch_size=8, num_visible=40, width=12)
    inputs, *rest = make(shape, dtype)
    whole = shape.batch_size * shape.num_masked * shape.pixels_per_token * dtype.itemsize
    largest, peak = allocations(lambda: fused(inputs, *rest, shape, **DEFAULT)[0].backward())
    assert largest < whole / 6
    assert peak < whole / 3
    # The meter sees it where it is.
    largest, peak = allocations(lambda: unfused(inputs, *rest, shape, **DEFAULT)[0].backward())
    assert largest >= whole
    assert peak >= 2 * whole


@pytest.mark.parametrize("compiled", [False, True])
def test_autograd_keeps_the_unit_gradients_and_nothing_else(compiled: bool) -> None:
    inputs, *rest = make(SHAPE, torch.bfloat16)
    run = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert run(inputs, *rest, SHAPE, **DEFAULT)[0].requires_grad
    assert sorted(x.shape for x in kept) == sorted(x.shape for x in inputs)
    assert {x.dtype for x in kept} == {torch.float32}


def test_a_graph_walked_twice_gives_the_gradients_twice() -> None:
    inputs, *rest = make(SHAPE, torch.float32)
    mean, _ = fused(inputs, *rest, SHAPE, **DEFAULT)
    first = torch.autograd.grad(mean, inputs, retain_graph=True)
    second = torch.autograd.grad(mean, inputs, torch.tensor(4.0))
    torch.testing.assert_close(second, tuple(4 * x for x in first))


def test_fp16_gradients_survive_the_mean_over_many_values() -> None:
    shape = OpShape(grid=(4, 14, 14), patch_size=8, num_visible=40, width=12)
    inputs, *rest = make(shape, torch.float16)
    mean, _ = fused(inputs, *rest, shape, **DEFAULT)
    gradients = torch.autograd.grad(65536 * mean, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = torch.autograd.grad(formula(exact, *rest, shape, **DEFAULT)[0], exact)
    # A slope divided by P · B · M = 571392 would have lost bits before the loss scale could lift it.
    for x, exactly in zip(gradients, truth, strict=True):
        scaled = 65536 * exactly
        assert x.dtype == torch.float16
        torch.testing.assert_close(x.double(), scaled, rtol=2**-10, atol=1e-5 * float(scaled.abs().max()))


@pytest.mark.parametrize("compiled", [False, True])
def test_products_run_in_autocasts_dtype_and_gradients_come_in_the_inputs(compiled: bool) -> None:
    inputs, *rest = make(SHAPE, torch.float32)
    run = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    with torch.autocast("cpu", torch.bfloat16):
        mean, error_BM = run(inputs, *rest, SHAPE, **DEFAULT)
        gradients = torch.autograd.grad(mean, inputs)
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs]
    expected = fused(rounded, *rest, SHAPE, **DEFAULT)
    torch.testing.assert_close((mean, error_BM), expected, rtol=0, atol=0)
    expected_gradients = [x.float() for x in torch.autograd.grad(expected[0], rounded)]
    torch.testing.assert_close(list(gradients), expected_gradients, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", range(3))
def test_each_input_may_be_the_only_one_that_wants_a_gradient(wanted: int) -> None:
    inputs, *rest = make(SHAPE, torch.float32)
    alone = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    fused(alone, *rest, SHAPE, **DEFAULT)[0].backward()
    expected = torch.autograd.grad(fused(inputs, *rest, SHAPE, **DEFAULT)[0], inputs[wanted])
    torch.testing.assert_close(alone[wanted].grad, *expected, rtol=0, atol=0)
    assert [x.grad is None for x in alone] == [i != wanted for i in range(3)]


def test_gradients_are_not_computed_where_nobody_wants_them() -> None:
    inputs, *rest = make(SHAPE, torch.float32)
    mean, error_BM = fused(inputs, *rest, SHAPE, **DEFAULT)
    assert not error_BM.requires_grad
    products: list[str] = []
    for frozen in (False, True):
        given = [x.detach() for x in inputs] if frozen else inputs
        with torch.set_grad_enabled(frozen), profile(activities=[ProfilerActivity.CPU]) as recorded:
            results = fused(given, *rest, SHAPE, **DEFAULT)
        products += [x.name for x in recorded.events() if x.name in ("aten::mm", "aten::addmm")]
        torch.testing.assert_close(results, (mean.detach(), error_BM), rtol=0, atol=0)
        assert not results[0].requires_grad
    assert products == ["aten::addmm", "aten::addmm"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 25, 6)}, r"hidden has shape \(2, 25, 6\).*M=26"),
        ({"hidden": torch.zeros(2, 26, 6, dtype=torch.int64)}, "hidden has .*floating-point"),
        ({"weight": torch.zeros(54, 5)}, r"weight has shape \(54, 5\).*P=54, E=6"),
        ({"bias": torch.zeros(53)}, "bias has .*P=54"),
        ({"bias": torch.zeros(54, device="meta")}, "bias is on meta; move it to cpu"),
        ({"weight": torch.zeros(54, 6, dtype=torch.float64)}, "weight torch.float64 and bias torch.float32"),
        ({"video": torch.zeros(SHAPE.video_shape)}, "video has .*float32"),
        ({"masked_ids": torch.zeros(2, 26)}, "masked_ids has .*int64"),
        ({"masked_ids": torch.full((2, 26), 30)}, "masked_ids reaches from 30 to 30; 30 tokens"),
        ({"masked_ids": torch.zeros(2, 0, dtype=torch.int64)}, "mean over at least one masked token"),
        ({"target": "normalised"}, "target='normalised': choose one of normalized, raw, mae_st"),
        ({"error": "l2"}, "error='l2': choose one of mse, l1"),
        ({"patch_size": 2}, "cannot be cut"),
        ({"impl": "cpp"}, "impl='cpp'"),
    ],
)
def test_names_what_is_wrong(change: dict, message: str) -> None:
    (hidden, weight, bias), video, ids = make(SHAPE, torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "video": video, "masked_ids": ids}
    arguments |= sizes(SHAPE) | DEFAULT | change
    positional = [arguments.pop(key) for key in ("hidden", "weight", "bias", "video", "masked_ids")]
    with pytest.raises(ValueError, match=message):
        head_patch_loss(*positional, **arguments)
