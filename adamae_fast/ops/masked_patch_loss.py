"""Reconstruction error of every masked token (paper eq. 4, before its mean over tokens).

    error[b, m] = mean over P of  (prediction - target)²   or   |prediction - target|

Targets are built from the uint8 clip; x is a token's pixels v / 255 in [0, 1], laid out (t, h, w, c), channel fastest:
    normalized   (x - mean) / (sqrt(var) + 1e-6), mean and unbiased variance per token and colour channel (VideoMAE)
    mae_st       (x - mean) / sqrt(var + 1e-6), mean and unbiased variance over all P values of the token (MAE-ST)
    raw          x
Backward: 2 (prediction - target) / P · grad   or   sign(prediction - target) / P · grad (0 where they are equal).

Letters: B clips, C channels, T frames, H, W pixels, M masked tokens, P pixels a token; t, h, w inside a token.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from adamae_fast.ops.patchify import check_video, tubelet_grid, tubelet_view
from adamae_fast.ops.registry import (
    Impl,
    accumulate_dtype,
    check_ascending_ids,
    check_floating,
    check_ids,
    check_same_device,
    choose,
    like,
    names_wrong_types,
    register,
    register_autograd,
)

Target = Literal["normalized", "raw", "mae_st"]
"""What the decoder is asked for."""

Error = Literal["mse", "l1"]
"""Squared or absolute error."""

_TARGETS_SCHEMA = (
    "patch_targets(Tensor video, Tensor masked_ids, int tubelet_size, int patch_size, str target, ScalarType dtype)"
    " -> Tensor"
)
_SCHEMA = (
    "masked_patch_loss(Tensor prediction, Tensor video, Tensor masked_ids, int tubelet_size, int patch_size,"
    " str target, str error) -> Tensor"
)
_BACKWARD_SCHEMA = (
    "masked_patch_loss_backward(Tensor grad, Tensor prediction, Tensor video, Tensor masked_ids, int tubelet_size,"
    " int patch_size, str target, str error) -> Tensor"
)


def _targets_reference(
    video_BCTHW: Tensor, masked_ids_BM: Tensor, tubelet_size: int, patch_size: int, target: str, dtype: torch.dtype
) -> Tensor:
    frames, rows, columns = tubelet_grid(video_BCTHW, tubelet_size, patch_size)
    check_ascending_ids("masked_ids", masked_ids_BM, frames * rows * columns)
    clip_B1 = torch.arange(video_BCTHW.shape[0], device=video_BCTHW.device).unsqueeze(1)
    return build_targets(video_BCTHW, clip_B1, masked_ids_BM, tubelet_size, patch_size, target, dtype)


def build_targets(
    video_BCTHW: Tensor,
    clip: Tensor,
    ids: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    dtype: torch.dtype,
) -> Tensor:
    """Targets of the tokens ``ids`` of the clips ``clip``: their broadcast shape, then P. Trusts its arguments."""
    _, rows, columns = tubelet_grid(video_BCTHW, tubelet_size, patch_size)
    # Indexing the strided view copies the masked tubelets' bytes and no others.
    view = tubelet_view(video_BCTHW, tubelet_size, patch_size).movedim(4, -1)
    pixels_thwC = view[clip, ids // (rows * columns), ids // columns % rows, ids % columns]
    v_SC = pixels_thwC.flatten(-4, -2).to(dtype)
    if target == "raw":
        return (v_SC / 255).flatten(-2)
    # x - mean = (count · v - Σ v) / (255 · count), and the numerator is an exact integer even in fp32: nothing cancels,
    # and a token of one colour becomes exactly 0. So everything is kept in units of 1 / (255 · count).
    over = (-2,) if target == "normalized" else (-2, -1)
    count = math.prod(v_SC.shape[i] for i in over)
    centred_SC = count * v_SC - v_SC.sum(over, keepdim=True)
    variance = centred_SC.square().sum(over, keepdim=True) / (count - 1)
    unit = 255 * count
    deviation = variance.sqrt() + unit * 1e-6 if target == "normalized" else (variance + unit**2 * 1e-6).sqrt()
    return (centred_SC / deviation).flatten(-2)


def _reference(
    prediction_BMP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    dtype = accumulate_dtype(prediction_BMP.dtype)
    difference_BMP = prediction_BMP.to(dtype) - _targets_reference(
        video_BCTHW, masked_ids_BM, tubelet_size, patch_size, target, dtype
    )
    return (difference_BMP.square() if error == "mse" else difference_BMP.abs()).mean(dim=2)


def _backward_reference(
    grad_BM: Tensor,
    prediction_BMP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    dtype = accumulate_dtype(prediction_BMP.dtype)
    difference_BMP = prediction_BMP.to(dtype) - _targets_reference(
        video_BCTHW, masked_ids_BM, tubelet_size, patch_size, target, dtype
    )
    slope_BMP = 2 * difference_BMP if error == "mse" else difference_BMP.sign()
    grad_prediction_BMP = slope_BMP * (grad_BM.to(dtype) / prediction_BMP.shape[2]).unsqueeze(2)
    return grad_prediction_BMP.to(prediction_BMP.dtype).contiguous()


def _targets_fake(
    video_BCTHW: Tensor, masked_ids_BM: Tensor, tubelet_size: int, patch_size: int, target: str, dtype: torch.dtype
) -> Tensor:
    num_pixels = video_BCTHW.shape[1] * tubelet_size * patch_size**2
    return video_BCTHW.new_empty((*masked_ids_BM.shape, num_pixels), dtype=dtype)


def _fake(
    prediction_BMP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    return prediction_BMP.new_empty(masked_ids_BM.shape, dtype=accumulate_dtype(prediction_BMP.dtype))


def _backward_fake(
    grad_BM: Tensor,
    prediction_BMP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    return prediction_BMP.new_empty(prediction_BMP.shape)


_patch_targets = register(_TARGETS_SCHEMA, reference=_targets_reference, fake=_targets_fake)
_masked_patch_loss = register(_SCHEMA, reference=_reference, fake=_fake)
_masked_patch_loss_backward = register(_BACKWARD_SCHEMA, reference=_backward_reference, fake=_backward_fake)


class _MaskedPatchLoss(torch.autograd.Function):
    """Keeps its inputs alone; the backward builds the target again from the uint8 clip."""

    @staticmethod
    def forward(
        ctx: Any,
        overload: OpOverload,
        prediction_BMP: Tensor,
        video_BCTHW: Tensor,
        masked_ids_BM: Tensor,
        tubelet_size: int,
        patch_size: int,
        target: str,
        error: str,
    ) -> Tensor:
        ctx.backward_operation = like(overload, _masked_patch_loss_backward)
        ctx.save_for_backward(prediction_BMP, video_BCTHW, masked_ids_BM)
        ctx.settings = (tubelet_size, patch_size, target, error)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = overload(prediction_BMP, video_BCTHW, masked_ids_BM, *ctx.settings)
            return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BM: Tensor) -> tuple[None, Tensor, None, None, None, None, None, None]:
        grad_prediction = ctx.backward_operation(grad_BM, *ctx.saved_tensors, *ctx.settings)
        return None, grad_prediction, None, None, None, None, None, None


register_autograd(_masked_patch_loss, _MaskedPatchLoss)


@names_wrong_types
def patch_targets(
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    *,
    tubelet_size: int,
    patch_size: int,
    target: Target,
    impl: Impl = "auto",
) -> Tensor:
    """Return what the decoder should predict for each masked token, (B, M, P) in fp32, values ordered (t, h, w, c).

    Formulas at the top of this file. Deterministic, no gradient. Raises ValueError as :func:`masked_patch_loss` does.
    """
    check_target(video_BCTHW, masked_ids_BM, tubelet_size, patch_size, target)
    operation = choose(_patch_targets, impl, video_BCTHW.device)
    result: Tensor = operation(video_BCTHW, masked_ids_BM, tubelet_size, patch_size, target, torch.float32)
    return result


@names_wrong_types
def masked_patch_loss(
    prediction_BMP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    *,
    tubelet_size: int,
    patch_size: int,
    target: Target,
    error: Error,
    impl: Impl = "auto",
) -> Tensor:
    """Return the error of each masked token, (B, M), averaged over its P values (formulas at the top of this file).

    ``video_BCTHW`` is the uint8 clip, ``masked_ids_BM`` int64. Arithmetic and result are fp32 (fp64 for an fp64
    prediction) whatever the prediction's dtype; the gradient, to the prediction only, comes in the prediction's dtype.
    Autograd keeps the three inputs and no target. Deterministic, differentiable once.

    Raises ValueError if shapes, dtypes or devices disagree, sizes do not divide the clip, ``target`` or ``error`` is
    unknown, a variance is asked of a single value, ``impl`` cannot run here, or, for ids on the CPU, one is out of
    range or does not ascend.
    """
    check_target(video_BCTHW, masked_ids_BM, tubelet_size, patch_size, target)
    check_error(error)
    num_pixels = video_BCTHW.shape[1] * tubelet_size * patch_size**2
    check_floating("prediction", prediction_BMP, (*masked_ids_BM.shape, num_pixels), "BMP")
    check_same_device("prediction", prediction_BMP, video_BCTHW.device)
    operation = choose(_masked_patch_loss, impl, video_BCTHW.device)
    result: Tensor = operation(prediction_BMP, video_BCTHW, masked_ids_BM, tubelet_size, patch_size, target, error)
    return result


def check_target(video_BCTHW: Tensor, masked_ids_BM: Tensor, tubelet_size: int, patch_size: int, target: str) -> None:
    """Raise ValueError unless a target of this kind can be built for every masked token."""
    check_video(video_BCTHW, tubelet_size, patch_size)
    check_ids("masked_ids", masked_ids_BM, video_BCTHW.shape[0], video_BCTHW.device)
    if target not in get_args(Target):
        raise ValueError(f"target={target!r}: choose one of {', '.join(get_args(Target))}")
    if target == "normalized" and tubelet_size * patch_size**2 == 1:
        raise ValueError(
            "target='normalized' needs the variance of each colour channel of a token, but tubelet_size=1 and "
            "patch_size=1 leave one value; choose target='raw' or larger tubelets"
        )


def check_error(error: str) -> None:
    """Raise ValueError unless there is an error of this name."""
    if error not in get_args(Error):
        raise ValueError(f"error={error!r}: choose one of {', '.join(get_args(Error))}")
