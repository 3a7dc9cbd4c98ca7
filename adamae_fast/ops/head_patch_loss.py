"""The decoder's last linear layer and the mean error of what it predicts, without the prediction.

    prediction = hidden · weightᵀ + bias,   error[b, m] as in masked_patch_loss.py,   loss = mean over B and M of error
    slope = 2 (prediction - target)   or   sign(prediction - target) (0 where they are equal)
    grad_hidden = s · slope · weight,   grad_weight = s · slopeᵀ · hidden,   grad_bias = s · Σ slope,
    where s = grad_loss / (P · B · M)

The mean has one upstream gradient, a number. So the forward computes the gradients too, from rows of tokens that pass
through one small buffer as prediction, then as slope, and the backward multiplies what it kept by s. These *unit*
gradients do not know s, whose smallness would make fp16 values vanish.

Letters: B clips, C channels, T frames, H, W pixels, M masked tokens, E decoder width, P pixels a token; R rows, tokens
of one or several clips.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from adamae_fast.ops.masked_patch_loss import Error, Target, build_targets, check_error, check_target
from adamae_fast.ops.patchify import tubelet_grid
from adamae_fast.ops.registry import (
    Impl,
    accumulate_dtype,
    autocast_dtype,
    check_ascending_ids,
    check_floating,
    check_same_device,
    choose,
    describe,
    names_wrong_types,
    register,
    register_autograd,
    without_autocast,
)

CHUNK_ROWS = {"cpu": 512, "cuda": 8192}
"""Rows that pass at a time, by device type. CPU: measured at ViT-B, more rows are no faster and take more memory. CUDA:
not measured."""

_STEP_SCHEMA = (
    "patch_loss_step(Tensor(a!) prediction, Tensor video, Tensor masked_ids, int first_row, int tubelet_size,"
    " int patch_size, str target, str error) -> Tensor"
)
_SCHEMA = (
    "head_patch_loss(Tensor hidden, Tensor weight, Tensor bias, Tensor video, Tensor masked_ids, int tubelet_size,"
    " int patch_size, str target, str error, bool with_gradients)"
    " -> (Tensor loss, Tensor error, Tensor unit_grad_hidden, Tensor unit_grad_weight, Tensor unit_grad_bias)"
)


def _step_reference(
    prediction_RP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    first_row: int,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    """Turn predictions into slopes in place and return the rows' errors; row i is masked token ``first_row`` + i."""
    frames, rows, columns = tubelet_grid(video_BCTHW, tubelet_size, patch_size)
    check_ascending_ids("masked_ids", masked_ids_BM, frames * rows * columns)
    row_R = torch.arange(first_row, first_row + prediction_RP.shape[0], device=video_BCTHW.device)
    clip_R, ids_R = row_R // masked_ids_BM.shape[1], masked_ids_BM.flatten()[row_R]
    dtype = accumulate_dtype(prediction_RP.dtype)
    difference_RP = prediction_RP.to(dtype) - build_targets(
        video_BCTHW, clip_R, ids_R, tubelet_size, patch_size, target, dtype
    )
    prediction_RP.copy_(2 * difference_RP if error == "mse" else difference_RP.sign())
    return (difference_RP.square() if error == "mse" else difference_RP.abs()).mean(dim=1)


def _step_fake(
    prediction_RP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    first_row: int,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    return prediction_RP.new_empty((prediction_RP.shape[0],), dtype=accumulate_dtype(prediction_RP.dtype))


_patch_loss_step = register(_STEP_SCHEMA, reference=_step_reference, fake=_step_fake)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b, where CUDA does not round the sums of 16-bit factors to 16 bits again."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


# The products are PyTorch's own in every implementation; what differs is who compares a chunk with its targets.
def _forward(
    step: Callable[..., Tensor],
    hidden_BME: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device_type, sum_dtype = hidden_BME.device.type, accumulate_dtype(hidden_BME.dtype)
    # Off CUDA a product comes in its factors' dtype, and sums need more than the range of fp16. bf16 stays as it is:
    # some processors multiply it many times faster than fp32.
    dtype = torch.float32 if hidden_BME.dtype == torch.float16 and device_type != "cuda" else hidden_BME.dtype
    weight_PE, bias_P = weight_PE.to(dtype), bias_P.to(dtype)
    hidden_RE = hidden_BME.flatten(0, 1)

    error_BM = hidden_BME.new_empty(masked_ids_BM.shape, dtype=sum_dtype)
    grad_hidden, grad_weight, grad_bias = (
        x.new_zeros(x.shape if with_gradients else (0,), dtype=sum_dtype) for x in (hidden_BME, weight_PE, bias_P)
    )
    error_R, grad_hidden_RE = error_BM.view(-1), grad_hidden.view(-1, hidden_RE.shape[1])
    chunk_rows = CHUNK_ROWS.get(device_type, CHUNK_ROWS["cuda"])
    buffer_RP = weight_PE.new_empty((min(chunk_rows, len(hidden_RE)), len(weight_PE)))
    with without_autocast(hidden_BME.device):
        for first in range(0, len(hidden_RE), chunk_rows):
            rows = slice(first, first + chunk_rows)
            chunk_RE = hidden_RE[rows].to(dtype)
            prediction_RP = torch.addmm(bias_P, chunk_RE, weight_PE.T, out=buffer_RP[: len(chunk_RE)])
            error_R[rows] = step(
                prediction_RP, video_BCTHW, masked_ids_BM, first, tubelet_size, patch_size, target, error
            )
            if with_gradients:
                slope_RP = prediction_RP
                grad_hidden_RE[rows] = _product(slope_RP, weight_PE)
                grad_weight += _product(slope_RP.T, chunk_RE)
                grad_bias += slope_RP.sum(0, dtype=sum_dtype)
    return error_BM.mean(), error_BM, grad_hidden, grad_weight, grad_bias


def _fake(
    hidden_BME: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = [x.shape if with_gradients else (0,) for x in (hidden_BME, weight_PE, bias_P)]
    dtype = accumulate_dtype(hidden_BME.dtype)
    new = [hidden_BME.new_empty(shape, dtype=dtype) for shape in ((), masked_ids_BM.shape, *shapes)]
    return new[0], new[1], new[2], new[3], new[4]


_head_patch_loss = register(
    _SCHEMA, reference=partial(_forward, _step_reference), composed=partial(_forward, _patch_loss_step), fake=_fake
)


class _HeadPatchLoss(torch.autograd.Function):
    """Keeps the unit gradients alone; scaling them makes new tensors, so that a graph can be walked more than once."""

    @staticmethod
    def forward(
        ctx: Any,
        overload: OpOverload,
        hidden_BME: Tensor,
        weight_PE: Tensor,
        bias_P: Tensor,
        video_BCTHW: Tensor,
        masked_ids_BM: Tensor,
        tubelet_size: int,
        patch_size: int,
        target: str,
        error: str,
        with_gradients: bool,
    ) -> tuple[Tensor, ...]:
        settings = (tubelet_size, patch_size, target, error, with_gradients)
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = overload(hidden_BME, weight_PE, bias_P, video_BCTHW, masked_ids_BM, *settings)
        ctx.dtype, ctx.num_values = hidden_BME.dtype, masked_ids_BM.numel() * weight_PE.shape[0]
        ctx.save_for_backward(*results[2:])
        ctx.mark_non_differentiable(*(results[1:] if with_gradients else results))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 11
        scale = grad_loss / ctx.num_values
        # Into the final dtype at once: another fp32 tensor would be larger than what it becomes.
        gradients = (
            torch.mul(unit, scale, out=unit.new_empty(unit.shape, dtype=ctx.dtype)) for unit in ctx.saved_tensors
        )
        return None, *gradients, *[None] * 7


register_autograd(_head_patch_loss, _HeadPatchLoss)


@names_wrong_types
def head_patch_loss(
    hidden_BME: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    *,
    tubelet_size: int,
    patch_size: int,
    target: Target,
    error: Error,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the mean error of all masked tokens and the error of each of them, (B, M).

    The same as ``masked_patch_loss(linear(hidden, weight, bias), …)`` and its mean, but no tensor of B·M·P elements
    ever exists. Both results are fp32 (fp64 for fp64 inputs); the mean carries gradients to ``hidden_BME`` and the
    head's ``weight_PE`` and ``bias_P``, the (B, M) error is a constant. Products run in the inputs' dtype, or in
    autocast's where autocast is on, chunks are summed in fp32, and gradients arrive in the inputs' own dtypes.
    ``video_BCTHW`` is the uint8 clip, ``masked_ids_BM`` int64. Where a gradient is wanted it is computed here, and
    autograd keeps it, in fp32, and no input. Deterministic where PyTorch's products are, differentiable once.

    Raises ValueError if shapes, dtypes or devices disagree, no token is masked, sizes do not divide the clip,
    ``target`` or ``error`` is unknown, a variance is asked of a single value, ``impl`` cannot run here, or, for ids on
    the CPU, one is out of range or does not ascend. "cpp" never can: the products are PyTorch's, and "auto" compares
    in C++.
    """
    check_target(video_BCTHW, masked_ids_BM, tubelet_size, patch_size, target)
    check_error(error)
    if masked_ids_BM.numel() == 0:
        raise ValueError(f"masked_ids has {describe(masked_ids_BM)}; the loss is a mean over at least one masked token")
    check_floating("hidden", hidden_BME, (*masked_ids_BM.shape, None), "BME")
    num_pixels = video_BCTHW.shape[1] * tubelet_size * patch_size**2
    check_floating("weight", weight_PE, (num_pixels, hidden_BME.shape[2]), "PE")
    check_floating("bias", bias_P, (num_pixels,), "P")
    for name, tensor in (("hidden", hidden_BME), ("weight", weight_PE), ("bias", bias_P)):
        check_same_device(name, tensor, video_BCTHW.device)
    hidden_BME, weight_PE, bias_P = inputs = [x.to(autocast_dtype(x)) for x in (hidden_BME, weight_PE, bias_P)]
    if not hidden_BME.dtype == weight_PE.dtype == bias_P.dtype:
        raise ValueError(
            f"hidden is {hidden_BME.dtype}, weight {weight_PE.dtype} and bias {bias_P.dtype}; convert them to one dtype"
        )
    with_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    operation = choose(_head_patch_loss, impl, video_BCTHW.device)
    loss, error_BM, *_ = operation(
        *inputs, video_BCTHW, masked_ids_BM, tubelet_size, patch_size, target, error, with_gradients
    )
    return loss, error_BM
