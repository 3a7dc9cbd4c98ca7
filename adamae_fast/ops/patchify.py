"""Cut a uint8 clip into tokens of normalised pixels, and embed the tokens linearly.

    pixels[b, n, (c, t, h, w)] = (v / 255 - mean_c) / std_c        tokens = pixels · weightᵀ + bias
    backward: grad_weight = gradᵀ · pixels,  grad_bias = Σ grad

Token n is a tubelet of ``tubelet_size`` frames × ``patch_size`` × ``patch_size`` pixels; tokens are ordered
frame-major, then row, then column. Inside a token the order is that of a flattened Conv3d weight, so the matrix
product *is* the tokenizer's strided 3-D convolution (paper section 3.1, tokenizer). The constants are arguments of the
operations, so that no kernel repeats them.

Letters: B clips, C channels, T frames, H, W pixels, N tokens, P pixels a token, D encoder width; t, h, w in a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from adamae_fast.ops.registry import (
    Impl,
    accumulate_dtype,
    autocast_dtype,
    check_floating,
    check_same_device,
    choose,
    describe,
    like,
    names_wrong_types,
    register,
    register_autograd,
    without_autocast,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue in [0, 1] units."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue in [0, 1] units."""

_PATCHIFY_SCHEMA = (
    "patchify(Tensor video, int tubelet_size, int patch_size, float[] mean, float[] std, ScalarType dtype) -> Tensor"
)
_EMBED_SCHEMA = "embed_tubelets(Tensor video, Tensor weight, Tensor bias, float[] mean, float[] std) -> Tensor"
_EMBED_BACKWARD_SCHEMA = (
    "embed_tubelets_backward(Tensor grad, Tensor video, int tubelet_size, int patch_size, float[] mean, float[] std)"
    " -> (Tensor grad_weight, Tensor grad_bias)"
)


def tubelet_grid(video_BCTHW: Tensor, tubelet_size: int, patch_size: int) -> tuple[int, int, int]:
    """Tokens along time, height and width."""
    _, _, num_frames, height, width = video_BCTHW.shape
    return num_frames // tubelet_size, height // patch_size, width // patch_size


def tubelet_view(video_BCTHW: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """The clip as a strided view (B, token frame, token row, token column, C, t, h, w); nothing is copied."""
    cut = video_BCTHW.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size)).unflatten(2, (-1, tubelet_size))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7)


def check_video(video_BCTHW: Tensor, tubelet_size: int, patch_size: int) -> None:
    """Raise ValueError unless the clip is uint8 RGB and the tubelets divide it."""
    if tubelet_size < 1 or patch_size < 1:
        raise ValueError(f"tubelet_size={tubelet_size}, patch_size={patch_size}: both must be at least 1")
    if video_BCTHW.dim() != 5 or video_BCTHW.shape[1] != 3 or video_BCTHW.dtype != torch.uint8:
        raise ValueError(
            f"video has {describe(video_BCTHW)}; pass uint8 RGB clips (B, 3, T, H, W), normalisation happens here"
        )
    _, _, num_frames, height, width = video_BCTHW.shape
    if num_frames % tubelet_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"video of {num_frames} frames of {height} × {width} pixels cannot be cut into tubelets of {tubelet_size} "
            f"frames of {patch_size} × {patch_size}; choose sizes that divide"
        )


def _patchify_reference(
    video_BCTHW: Tensor, tubelet_size: int, patch_size: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    compute = accumulate_dtype(dtype)
    channels = tubelet_view(video_BCTHW, tubelet_size, patch_size).unbind(4)
    # The constants stay Python numbers: as tensors they would be copied to the device at every call.
    pixels = [x.to(compute).div(255).sub(m).div(s).to(dtype) for x, m, s in zip(channels, mean, std, strict=True)]
    return torch.stack(pixels, dim=4).flatten(4).flatten(1, 3)


def _patchify_fake(
    video_BCTHW: Tensor, tubelet_size: int, patch_size: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    frames, rows, columns = tubelet_grid(video_BCTHW, tubelet_size, patch_size)
    num_pixels = video_BCTHW.shape[1] * tubelet_size * patch_size**2
    return video_BCTHW.new_empty((video_BCTHW.shape[0], frames * rows * columns, num_pixels), dtype=dtype)


_patchify = register(_PATCHIFY_SCHEMA, reference=_patchify_reference, fake=_patchify_fake)


@names_wrong_types
def patchify(
    video_BCTHW: Tensor,
    *,
    tubelet_size: int,
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """Return the normalised pixels of every token, (B, N, P), in ``dtype``.

    ``video_BCTHW`` is uint8 of any strides, ``dtype`` a floating-point type. Arithmetic runs in fp32 (fp64 for fp64)
    and is rounded once. Deterministic. There is no gradient: the clip is a constant.

    Raises ValueError if the clip is not uint8 RGB, the sizes do not divide it, ``dtype`` is not floating point or
    ``impl`` cannot run here.
    """
    check_video(video_BCTHW, tubelet_size, patch_size)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: normalised pixels need a floating-point type such as torch.float32")
    operation = choose(_patchify, impl, video_BCTHW.device)
    result: Tensor = operation(video_BCTHW, tubelet_size, patch_size, IMAGENET_MEAN, IMAGENET_STD, dtype)
    return result


# The products are PyTorch's own in every implementation; what differs is who cuts the clip.
def _embed(
    cut: Callable[..., Tensor],
    video_BCTHW: Tensor,
    weight_DCthw: Tensor,
    bias_D: Tensor,
    mean: list[float],
    std: list[float],
) -> Tensor:
    _, _, tubelet_size, patch_size, _ = weight_DCthw.shape
    pixels_BNP = cut(video_BCTHW, tubelet_size, patch_size, mean, std, weight_DCthw.dtype)
    with without_autocast(video_BCTHW.device):
        return F.linear(pixels_BNP, weight_DCthw.flatten(1), bias_D)


def _embed_backward(
    cut: Callable[..., Tensor],
    grad_BND: Tensor,
    video_BCTHW: Tensor,
    tubelet_size: int,
    patch_size: int,
    mean: list[float],
    std: list[float],
) -> tuple[Tensor, Tensor]:
    pixels_BNP = cut(video_BCTHW, tubelet_size, patch_size, mean, std, grad_BND.dtype)
    with without_autocast(video_BCTHW.device):
        grad_weight_DP = grad_BND.flatten(0, 1).T @ pixels_BNP.flatten(0, 1)
    grad_bias_D = grad_BND.sum((0, 1), dtype=accumulate_dtype(grad_BND.dtype)).to(grad_BND.dtype)
    return grad_weight_DP.unflatten(1, (video_BCTHW.shape[1], tubelet_size, patch_size, patch_size)), grad_bias_D


def _embed_fake(
    video_BCTHW: Tensor, weight_DCthw: Tensor, bias_D: Tensor, mean: list[float], std: list[float]
) -> Tensor:
    frames, rows, columns = tubelet_grid(video_BCTHW, weight_DCthw.shape[2], weight_DCthw.shape[3])
    return weight_DCthw.new_empty((video_BCTHW.shape[0], frames * rows * columns, weight_DCthw.shape[0]))


def _embed_backward_fake(
    grad_BND: Tensor, video_BCTHW: Tensor, tubelet_size: int, patch_size: int, mean: list[float], std: list[float]
) -> tuple[Tensor, Tensor]:
    width = grad_BND.shape[2]
    weight_shape = (width, video_BCTHW.shape[1], tubelet_size, patch_size, patch_size)
    return grad_BND.new_empty(weight_shape), grad_BND.new_empty((width,))


_embed_tubelets = register(
    _EMBED_SCHEMA,
    reference=partial(_embed, _patchify_reference),
    composed=partial(_embed, _patchify),
    fake=_embed_fake,
)
_embed_tubelets_backward = register(
    _EMBED_BACKWARD_SCHEMA,
    reference=partial(_embed_backward, _patchify_reference),
    composed=partial(_embed_backward, _patchify),
    fake=_embed_backward_fake,
)


class _EmbedTubelets(torch.autograd.Function):
    """Keeps the uint8 clip alone: the weight's gradient rebuilds the pixels, and nothing else needs them.

    The rebuilding is inside one operation, so that a compiler cannot notice the repetition and keep the float pixels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        overload: OpOverload,
        video_BCTHW: Tensor,
        weight_DCthw: Tensor,
        bias_D: Tensor,
        mean: list[float],
        std: list[float],
    ) -> Tensor:
        ctx.backward_operation = like(overload, _embed_tubelets_backward)
        ctx.save_for_backward(video_BCTHW)
        ctx.settings = (weight_DCthw.shape[2], weight_DCthw.shape[3], mean, std)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = overload(video_BCTHW, weight_DCthw, bias_D, mean, std)
            return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[None, None, Tensor, Tensor, None, None]:
        grad_weight_DCthw, grad_bias_D = ctx.backward_operation(grad_BND, *ctx.saved_tensors, *ctx.settings)
        return None, None, grad_weight_DCthw, grad_bias_D, None, None


register_autograd(_embed_tubelets, _EmbedTubelets)


@names_wrong_types
def embed_tubelets(video_BCTHW: Tensor, weight_DCthw: Tensor, bias_D: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return the tokens (B, N, D) of a uint8 clip: ``linear(patchify(video), weight.flatten(1), bias)``.

    ``weight_DCthw`` (D, 3, tubelet, patch, patch) and ``bias_D`` are the tokenizer's Conv3d parameters. The product
    runs in the weight's dtype, or in autocast's where autocast is on; the tokens come in that dtype and gradients
    arrive in the parameters' own. Autograd keeps the uint8 clip only, a quarter of a float one: pixels are rebuilt
    for the weight's gradient. Differentiable once.

    Raises ValueError if the clip is not uint8 RGB, the weight's sizes do not divide it, shapes, dtypes or devices
    disagree, or ``impl`` cannot run here. "cpp" never can: the products are PyTorch's, and "auto" cuts the clip in C++.
    """
    check_floating("weight", weight_DCthw, (None, 3, None, None, None), "DCthw")
    check_floating("bias", bias_D, (weight_DCthw.shape[0],), "D")
    _, _, tubelet_size, patch_size, patch_width = weight_DCthw.shape
    if patch_size != patch_width:
        raise ValueError(f"weight has {describe(weight_DCthw)}; tubelets are square, so its last two sizes must agree")
    check_video(video_BCTHW, tubelet_size, patch_size)
    check_same_device("weight", weight_DCthw, video_BCTHW.device)
    check_same_device("bias", bias_D, video_BCTHW.device)
    if weight_DCthw.dtype != bias_D.dtype:
        raise ValueError(f"weight is {weight_DCthw.dtype} and bias {bias_D.dtype}; convert one of them")
    dtype = autocast_dtype(weight_DCthw)
    weight_DCthw, bias_D = weight_DCthw.to(dtype), bias_D.to(dtype)
    operation = choose(_embed_tubelets, impl, video_BCTHW.device)
    result: Tensor = operation(video_BCTHW, weight_DCthw, bias_D, IMAGENET_MEAN, IMAGENET_STD)
    return result
