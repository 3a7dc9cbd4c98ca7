from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from adamae_fast.ops.masked_patch_loss import Error, Target, masked_patch_loss, patch_targets
from adamae_fast.testing import ODD_SHAPES, InputFactory, OpShape, assert_within_budget, scattered_in_memory

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPE = OpShape(grid=(2, 3, 5))
SIZES = {"tubelet_size": SHAPE.tubelet_size, "patch_size": SHAPE.patch_size}
PUBLISHED_TOKEN = OpShape(grid=(1, 2, 2), tubelet_size=2, patch_size=16, num_visible=1)
TARGETS, ERRORS = get_args(Target), get_args(Error)


def target_formula(video: Tensor, masked_ids: Tensor, shape: OpShape, target: str, dtype: torch.dtype) -> Tensor:
    """Token by token."""
    _, rows, columns = shape.grid
    t, p = shape.tubelet_size, shape.patch_size
    clips = []
    for clip, ids in zip(video, masked_ids.tolist(), strict=True):
        tokens = []
        for n in ids:
            f, r, c = n // (rows * columns) * t, n // columns % rows * p, n % columns * p
            x = clip[:, f : f + t, r : r + p, c : c + p].permute(1, 2, 3, 0).to(dtype) / 255  # (t, h, w, c)
            over = {"normalized": (0, 1, 2), "mae_st": (0, 1, 2, 3), "raw": ()}[target]
            if over:
                variance, mean = torch.var_mean(x, over, keepdim=True)  # unbiased by default
                x = (x - mean) / (variance.sqrt() + 1e-6 if target == "normalized" else (variance + 1e-6).sqrt())
            tokens.append(x.reshape(-1))
        clips.append(torch.stack(tokens))
    return torch.stack(clips)


def loss_formula(prediction: Tensor, targets: Tensor, error: str) -> Tensor:
    difference = prediction - targets.to(prediction.dtype)
    return (difference**2 if error == "mse" else difference.abs()).mean(-1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [SHAPE, PUBLISHED_TOKEN, *[shape for shape in ODD_SHAPES if shape.num_masked]])
def test_targets_equal_the_formula(shape: OpShape, target: Target) -> None:
    factory = InputFactory(shape)
    video, ids = factory.video(), factory.split().masked_ids_BM
    in_dtype, truth = (target_formula(video, ids, shape, target, dtype) for dtype in (torch.float32, torch.float64))
    sizes = {"tubelet_size": shape.tubelet_size, "patch_size": shape.patch_size}
    for layout in (torch.Tensor.contiguous, scattered_in_memory):
        actual = patch_targets(layout(video), layout(ids), **sizes, target=target)
        assert actual.dtype == torch.float32
        assert_within_budget(actual, in_dtype, truth)


def test_a_token_of_one_colour_has_a_target_of_zero() -> None:
    video = torch.full(SHAPE.video_shape, 200, dtype=torch.uint8)
    ids = torch.zeros(SHAPE.batch_size, 1, dtype=torch.int64)
    for target in ("normalized", "mae_st"):
        assert not patch_targets(video, ids, **SIZES, target=target).any()


def test_variants_normalise_over_different_pixels() -> None:
    """A red token: no variation inside a channel, but between channels."""
    video = torch.zeros(SHAPE.video_shape, dtype=torch.uint8)
    video[:, 0] = 255
    ids = torch.zeros(SHAPE.batch_size, 1, dtype=torch.int64)
    normalized, mae_st, raw = (
        patch_targets(video, ids, **SIZES, target=target).view(-1, 3) for target in ("normalized", "mae_st", "raw")
    )
    assert torch.equal(normalized, torch.zeros_like(normalized))
    assert torch.equal(raw, torch.tensor([1.0, 0, 0]).expand_as(raw))
    count = raw.numel() // SHAPE.batch_size
    deviation = (2 / 9 * count / (count - 1)) ** 0.5
    torch.testing.assert_close(mae_st[0], torch.tensor([2 / 3, -1 / 3, -1 / 3]) / deviation, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("target", "error"), list(product(TARGETS, ERRORS)))
@pytest.mark.parametrize("shape", [SHAPE, *ODD_SHAPES[:2]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_equal_the_formula(shape: OpShape, dtype: torch.dtype, target: Target, error: Error) -> None:
    factory = InputFactory(shape, dtype=dtype)
    video, ids = factory.video(), factory.split().masked_ids_BM
    prediction = factory.prediction().requires_grad_()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    grad = factory.per_masked().to(compute)

    def with_gradient(in_dtype: torch.dtype) -> list[Tensor]:
        leaf = prediction.detach().to(in_dtype).requires_grad_()
        output = loss_formula(leaf, target_formula(video, ids, shape, target, in_dtype), error)
        return [output, *torch.autograd.grad(output, leaf, grad.to(in_dtype))]

    output = masked_patch_loss(
        prediction,
        video,
        ids,
        tubelet_size=shape.tubelet_size,
        patch_size=shape.patch_size,
        target=target,
        error=error,
    )
    (grad_prediction,) = torch.autograd.grad(output, prediction, grad)
    assert (output.dtype, grad_prediction.dtype) == (compute, dtype)
    plain, truth = with_gradient(compute), with_gradient(torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close((output, grad_prediction), tuple(truth))
    else:
        assert_within_budget(output, plain[0], truth[0])
        assert_within_budget(grad_prediction, plain[1].to(dtype), truth[1])


def test_targets_of_an_fp64_prediction_are_fp64() -> None:
    factory = InputFactory(SHAPE)
    video, ids = factory.video(), factory.split().masked_ids_BM
    for target in TARGETS:
        exact = target_formula(video, ids, SHAPE, target, torch.float64)
        error_BM = masked_patch_loss(exact, video, ids, **SIZES, target=target, error="l1")
        assert error_BM.max() < 1e-9


def test_l1_has_no_slope_where_the_prediction_is_exact() -> None:
    factory = InputFactory(SHAPE)
    video, ids = factory.video(), factory.split().masked_ids_BM
    prediction = patch_targets(video, ids, **SIZES, target="raw")
    prediction[..., 0] += 0.5
    prediction[..., 1] -= 0.5
    error_BM = masked_patch_loss(prediction.requires_grad_(), video, ids, **SIZES, target="raw", error="l1")
    error_BM.sum().backward()
    slope = prediction.grad * SHAPE.pixels_per_token
    torch.testing.assert_close(slope[..., 0], torch.ones_like(slope[..., 0]))
    torch.testing.assert_close(slope[..., 1], -torch.ones_like(slope[..., 1]))
    assert (slope[..., 2:] == 0).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("compiled", [False, True])
def test_autograd_keeps_the_inputs_and_no_target(target: Target, compiled: bool) -> None:
    def function(prediction: Tensor, video: Tensor, ids: Tensor) -> Tensor:
        return masked_patch_loss(prediction, video, ids, **SIZES, target=target, error="mse")

    factory = InputFactory(SHAPE, dtype=torch.bfloat16)
    inputs = factory.prediction().requires_grad_(), factory.video(), factory.split().masked_ids_BM
    kept: list[Tensor] = []
    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert run(*inputs).requires_grad
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in inputs)


def test_nothing_masked_gives_no_errors() -> None:
    shape = OpShape(num_visible=15)
    factory = InputFactory(shape)
    arguments = factory.prediction().requires_grad_(), factory.video(), factory.split().masked_ids_BM
    error_BM = masked_patch_loss(*arguments, **SIZES, target="normalized", error="mse")
    assert error_BM.shape == (2, 0)
    error_BM.sum().backward()
    assert arguments[0].grad.shape == (2, 0, SHAPE.pixels_per_token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(2, 26, 53)}, r"prediction has shape \(2, 26, 53\).*P=54"),
        ({"prediction": torch.zeros(2, 25, 54)}, "prediction has .*M=26"),
        ({"prediction": torch.zeros(2, 26, 54, device="meta")}, "prediction is on meta"),
        ({"video": torch.zeros(SHAPE.video_shape)}, "video has .*float32"),
        ({"masked_ids": torch.zeros(2, 26)}, "masked_ids has .*int64"),
        ({"masked_ids": torch.full((2, 26), 30)}, "masked_ids reaches from 30 to 30; 30 tokens"),
        (
            {"masked_ids": torch.arange(26).flip(0).expand(2, 26)},
            "masked_ids of clip 0 are not ascending: 24 at place 1",
        ),
        ({"target": "normalised"}, "target='normalised': choose one of normalized, raw, mae_st"),
        ({"error": "l2"}, "error='l2': choose one of mse, l1"),
        ({"patch_size": 2}, "cannot be cut"),
        ({"tubelet_size": 1, "patch_size": 1}, "target='normalized' needs the variance"),
    ],
)
def test_names_what_is_wrong(change: dict, message: str) -> None:
    factory = InputFactory(SHAPE)
    arguments = {
        "prediction": factory.prediction(),
        "video": factory.video(),
        "masked_ids": factory.split().masked_ids_BM,
        **SIZES,
        "target": "normalized",
        "error": "mse",
    } | change
    with pytest.raises(ValueError, match=message):
        masked_patch_loss(*[arguments.pop(key) for key in ("prediction", "video", "masked_ids")], **arguments)
