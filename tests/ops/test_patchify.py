import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adamae_fast.ops.patchify import IMAGENET_MEAN, IMAGENET_STD, embed_tubelets, patchify
from adamae_fast.testing import ODD_SHAPES, InputFactory, OpShape, assert_within_budget, scattered_in_memory

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPE = OpShape(grid=(2, 3, 5))
SIZES = {"tubelet_size": SHAPE.tubelet_size, "patch_size": SHAPE.patch_size}
HALVES = [torch.bfloat16, torch.float16]


def normalised(video: Tensor, dtype: torch.dtype) -> Tensor:
    mean, std = (torch.tensor(c, dtype=dtype).view(3, 1, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (video.to(dtype) / 255 - mean) / std


def cut(video: Tensor, shape: OpShape, dtype: torch.dtype) -> Tensor:
    """Token by token, each tubelet a slice."""
    t, p = shape.tubelet_size, shape.patch_size
    frames, rows, columns = shape.grid
    video = normalised(video, dtype)
    tubelets = [
        video[:, :, f * t : (f + 1) * t, r * p : (r + 1) * p, c * p : (c + 1) * p].flatten(1)
        for f in range(frames)
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(tubelets, dim=1)


def parameters(shape: OpShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    factory = InputFactory(shape, dtype=dtype, seed=1)
    t, p = shape.tubelet_size, shape.patch_size
    return factory.normal(shape.width, 3, t, p, p).requires_grad_(), factory.normal(shape.width).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("shape", [SHAPE, *ODD_SHAPES])
def test_patchify_equals_slices(shape: OpShape, dtype: torch.dtype) -> None:
    video = InputFactory(shape).video()
    sizes = {"tubelet_size": shape.tubelet_size, "patch_size": shape.patch_size}
    actual = patchify(video, **sizes, dtype=dtype)
    truth = cut(video, shape, torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, truth)
    else:
        assert_within_budget(actual, cut(video, shape, dtype), truth)
    assert actual.shape == (shape.batch_size, shape.num_tokens, shape.pixels_per_token)


def test_patchify_defaults_to_fp32() -> None:
    assert patchify(InputFactory(SHAPE).video(), **SIZES).dtype == torch.float32


@pytest.mark.parametrize("shape", [SHAPE, *ODD_SHAPES])
def test_embed_is_the_strided_convolution(shape: OpShape) -> None:
    video = InputFactory(shape).video()
    weight, bias = parameters(shape, torch.float64)
    expected = F.conv3d(normalised(video, torch.float64), weight, bias, stride=weight.shape[2:]).flatten(2).mT
    actual = embed_tubelets(scattered_in_memory(video), weight, bias)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (weight, bias), grad), torch.autograd.grad(expected, (weight, bias), grad)
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_embed_is_within_the_budget_of_its_dtype(dtype: torch.dtype) -> None:
    video = InputFactory(SHAPE).video()
    weight, bias = parameters(SHAPE, dtype)
    grad = InputFactory(SHAPE, dtype=dtype).tokens(SHAPE.num_tokens)

    def formula(compute: torch.dtype) -> list[Tensor]:
        w, b = (x.detach().to(compute).requires_grad_() for x in (weight, bias))
        tokens = F.linear(cut(video, SHAPE, compute), w.flatten(1), b)
        return [tokens, *torch.autograd.grad(tokens, (w, b), grad.to(compute))]

    tokens = embed_tubelets(video, weight, bias)
    actual = [tokens, *torch.autograd.grad(tokens, (weight, bias), grad)]
    for x, in_dtype, truth in zip(actual, formula(dtype), formula(torch.float64), strict=True):
        assert_within_budget(x, in_dtype, truth)


@pytest.mark.parametrize("compiled", [False, True])
def test_embed_computes_in_autocasts_dtype(compiled: bool) -> None:
    function = torch.compile(embed_tubelets, fullgraph=True, backend="aot_eager") if compiled else embed_tubelets
    video = InputFactory(SHAPE).video()
    weight, bias = parameters(SHAPE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = function(video, weight, bias)
    expected = F.linear(patchify(video, **SIZES, dtype=torch.bfloat16), weight.bfloat16().flatten(1), bias.bfloat16())
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(tokens.float().square().mean(), (weight, bias))
    expected_gradients = torch.autograd.grad(expected.float().square().mean(), (weight, bias))
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    torch.testing.assert_close(gradients, expected_gradients, rtol=2**-7, atol=1e-3)


def test_backward_under_autocast_keeps_fp32_products() -> None:
    video = InputFactory(SHAPE).video()
    weight, bias = parameters(SHAPE, torch.float32)
    tokens = embed_tubelets(video, weight, bias)
    (expected,) = torch.autograd.grad(tokens.square().sum(), weight, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (actual,) = torch.autograd.grad(tokens.square().sum(), weight)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_autograd_keeps_the_uint8_clip_and_no_pixels(compiled: bool) -> None:
    function = torch.compile(embed_tubelets, fullgraph=True, backend="aot_eager") if compiled else embed_tubelets
    shape = OpShape(grid=(2, 3, 5), width=7)
    video = InputFactory(shape).video()
    weight, bias = parameters(shape, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        tokens = function(video, weight, bias)
    assert tokens.requires_grad
    assert any(x.dtype == torch.uint8 and x.numel() == video.numel() for x in kept)
    assert sum(x.nbytes for x in kept) <= video.nbytes + weight.nbytes + bias.nbytes


def test_no_gradient_is_recorded_without_a_parameter_that_wants_one() -> None:
    weight, bias = parameters(SHAPE, torch.float32)
    assert not embed_tubelets(InputFactory(SHAPE).video(), weight.detach(), bias.detach()).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": torch.zeros(2, 3, 4, 9, 15)}, "video has .*float32.*uint8 RGB"),
        ({"video": torch.zeros(2, 4, 4, 9, 15, dtype=torch.uint8)}, r"video has shape \(2, 4"),
        ({"video": torch.zeros(3, 4, 9, 15, dtype=torch.uint8)}, r"\(B, 3, T, H, W\)"),
        ({"patch_size": 4}, "9 × 15 pixels cannot be cut into tubelets of 2 frames of 4 × 4"),
        ({"tubelet_size": 3}, "video of 4 frames"),
        ({"tubelet_size": 0}, "tubelet_size=0"),
        ({"dtype": torch.int32}, "dtype=torch.int32"),
    ],
)
def test_patchify_names_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"video": InputFactory(SHAPE).video(), **SIZES} | change
    with pytest.raises(ValueError, match=message):
        patchify(arguments.pop("video"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(6, 3, 2, 3, 5)}, "weight has .* must agree"),
        ({"weight": torch.zeros(6, 3, 2, 9)}, r"weight has .* \(D, C=3, t, h, w\)"),
        ({"weight": torch.zeros(6, 3, 3, 3, 3)}, "tubelets of 3 frames"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\).*D=6"),
        ({"bias": torch.zeros(6, dtype=torch.float64)}, "weight is torch.float32 and bias torch.float64"),
        ({"weight": torch.zeros(6, 3, 2, 3, 3, device="meta")}, "weight is on meta; move it to cpu"),
        ({"bias": torch.zeros(6, device="meta")}, "bias is on meta"),
    ],
)
def test_embed_names_what_is_wrong(change: dict, message: str) -> None:
    weight, bias = parameters(SHAPE, torch.float32)
    arguments = {"video": InputFactory(SHAPE).video(), "weight": weight, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        embed_tubelets(*arguments.values())
