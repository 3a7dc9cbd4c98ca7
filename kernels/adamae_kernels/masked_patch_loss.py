"""The error of masked tokens, its gradient or both, and their targets: one program for each token, one launch each.

    error[b, m] = mean over P of  (prediction - target)²   or   |prediction - target|
    grad_prediction = slope · grad / P,   slope = 2 (prediction - target)   or   sign(prediction - target)

The target is built in registers from the bytes v of the token and never stored:
    normalized   centred / (deviation + unit · 1e-6)      mean and unbiased variance of each colour, count = S
    mae_st       centred / sqrt(variance + unit² · 1e-6)  of all P values, count = P
    raw          v / 255
where centred = count · v - Σ v and Σ centred² = count · (count · Σ v² - (Σ v)²) are exact integers, variance =
Σ centred² / (count - 1), and unit = 255 · count.
With at most 2¹⁵ values a token, Σ v² fits 32 bits and Σ centred² 64. The clip's sizes and M are constants of the
compiled kernel, since divisions by anything else take long.

Bytes, with e of a prediction's element: forward B·M·(P·(e + 1) + 12), backward B·M·(P·(2·e + 1) + 12), targets
B·M·(P·(e + 1) + 8), error and slope of R tokens in one step R·(P·(2·e + 1) + 12): the minimum.

An id that is out of range or not above the one before it in its clip makes its token's error and gradient NaN and reads
nothing, so that it surfaces where the loss is checked and not as a read-back in every step.

Letters: B clips, C channels, T frames, H, W pixels, M masked, P pixels a token; S = t · h · w, pixels of one colour;
R rows, masked tokens of one or several clips.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamae_kernels.ids import load_ids
from adamae_kernels.launch import Table, choose

LAUNCH: Table = ((512, {"num_warps": 4}), (4096, {"num_warps": 8}))
"""By S. A token lies in the registers of one program."""


@triton.jit
def _target(
    video,
    ids,
    masked,
    M: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The target of token ``masked`` of the batch, fp32 (S, 4 colours), its offsets in the token, and what is real."""
    S: tl.constexpr = TUBELET * PATCH * PATCH
    rows: tl.constexpr = H // PATCH
    columns: tl.constexpr = W // PATCH
    id_, valid = load_ids(ids + masked, masked % M, (T // TUBELET) * rows * columns, True)
    # A valid id is a small number, and 32 bits divide faster.
    token = tl.where(valid, id_, 0).to(tl.int32)
    frame = (token // (rows * columns) * TUBELET).to(tl.int64)
    corner = (frame * H + token // columns % rows * PATCH) * W + token % columns * PATCH

    offset_S = tl.arange(0, BLOCK_S)
    colour_C = tl.arange(0, 4)
    t_S = (offset_S // (PATCH * PATCH)).to(tl.int64)
    inside_S = (t_S * H + offset_S // PATCH % PATCH) * W + offset_S % PATCH
    real_SC = (offset_S < S)[:, None] & (colour_C < 3)[None, :]
    plane_C = ((masked // M).to(tl.int64) * 3 + colour_C) * T * H * W
    v_SC = tl.load(video + plane_C[None, :] + corner + inside_S[:, None], mask=real_SC, other=0).to(tl.int32)

    if TARGET == "raw":
        target_SC = tl.div_rn(v_SC.to(tl.float32), 255.0)
    else:
        # Σ centred² = count · (count · Σ v² - (Σ v)²), so both sums are exact integers of the bytes.
        count: tl.constexpr = S if TARGET == "normalized" else 3 * S
        sum_C = tl.sum(v_SC, 0).to(tl.int64)
        square_C = tl.sum(v_SC * v_SC, 0).to(tl.int64)
        if TARGET == "mae_st":
            sum_C = tl.zeros((4,), tl.int64) + tl.sum(sum_C, 0)
            square_C = tl.zeros((4,), tl.int64) + tl.sum(square_C, 0)
        centred_SC = count * v_SC - sum_C.to(tl.int32)[None, :]
        variance_C = tl.div_rn((count * (count * square_C - sum_C * sum_C)).to(tl.float32), count - 1.0)
        unit: tl.constexpr = 255.0 * count
        if TARGET == "normalized":
            deviation_C = tl.sqrt_rn(variance_C) + unit * 1e-6
        else:
            deviation_C = tl.sqrt_rn(variance_C + unit * unit * 1e-6)
        # A division for each pixel would be a third of the kernel; this rounds once more, and 0 stays 0.
        target_SC = centred_SC.to(tl.float32) * tl.div_rn(1.0, deviation_C)[None, :]
    target_SC = tl.where(valid, target_SC, float("nan"))
    return target_SC, offset_S[:, None] * 3 + colour_C[None, :], real_SC


@triton.jit
def _mean_error(difference_SC, real_SC, P: tl.constexpr, ERROR: tl.constexpr):
    term_SC = difference_SC * difference_SC if ERROR == "mse" else tl.abs(difference_SC)
    return tl.div_rn(tl.sum(tl.where(real_SC, term_SC, 0.0)), P * 1.0)


@triton.jit
def _slope(difference_SC, ERROR: tl.constexpr):
    if ERROR == "mse":
        slope_SC = 2 * difference_SC
    else:
        sign_SC = tl.where(difference_SC > 0, 1.0, 0.0) - tl.where(difference_SC < 0, 1.0, 0.0)
        slope_SC = tl.where(difference_SC == difference_SC, sign_SC, difference_SC)
    return slope_SC


@triton.jit
def _targets_kernel(
    video,
    ids,
    out,
    M: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    masked = tl.program_id(0).to(tl.int64)
    target_SC, offset_SC, real_SC = _target(video, ids, masked, M, T, H, W, TUBELET, PATCH, TARGET, BLOCK_S)
    to = out + masked * (3 * TUBELET * PATCH * PATCH) + offset_SC
    tl.store(to, target_SC.to(out.dtype.element_ty), mask=real_SC)


@triton.jit
def _forward_kernel(
    prediction,
    video,
    ids,
    error,
    M: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    TARGET: tl.constexpr,
    ERROR: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    P: tl.constexpr = 3 * TUBELET * PATCH * PATCH
    masked = tl.program_id(0).to(tl.int64)
    target_SC, offset_SC, real_SC = _target(video, ids, masked, M, T, H, W, TUBELET, PATCH, TARGET, BLOCK_S)
    prediction_SC = tl.load(prediction + masked * P + offset_SC, mask=real_SC, other=0.0).to(tl.float32)
    difference_SC = prediction_SC - target_SC
    tl.store(error + masked, _mean_error(difference_SC, real_SC, P, ERROR))


@triton.jit
def _backward_kernel(
    grad,
    prediction,
    video,
    ids,
    grad_prediction,
    M: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    TARGET: tl.constexpr,
    ERROR: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    P: tl.constexpr = 3 * TUBELET * PATCH * PATCH
    masked = tl.program_id(0).to(tl.int64)
    target_SC, offset_SC, real_SC = _target(video, ids, masked, M, T, H, W, TUBELET, PATCH, TARGET, BLOCK_S)
    prediction_SC = tl.load(prediction + masked * P + offset_SC, mask=real_SC, other=0.0).to(tl.float32)
    difference_SC = prediction_SC - target_SC
    grad_SC = _slope(difference_SC, ERROR) * tl.div_rn(tl.load(grad + masked).to(tl.float32), P * 1.0)
    tl.store(grad_prediction + masked * P + offset_SC, grad_SC.to(grad_prediction.dtype.element_ty), mask=real_SC)


@triton.jit
def _step_kernel(
    prediction,
    video,
    ids,
    error,
    first_row,
    M: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    TARGET: tl.constexpr,
    ERROR: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    P: tl.constexpr = 3 * TUBELET * PATCH * PATCH
    row = tl.program_id(0)
    target_SC, offset_SC, real_SC = _target(video, ids, first_row + row, M, T, H, W, TUBELET, PATCH, TARGET, BLOCK_S)
    at = prediction + row.to(tl.int64) * P + offset_SC
    difference_SC = tl.load(at, mask=real_SC, other=0.0).to(tl.float32) - target_SC
    tl.store(error + row, _mean_error(difference_SC, real_SC, P, ERROR))
    tl.store(at, _slope(difference_SC, ERROR).to(prediction.dtype.element_ty), mask=real_SC)


def _settings(
    video_BCTHW: Tensor, num_masked: int, tubelet_size: int, patch_size: int, target: str
) -> dict[str, object]:
    """What the kernels have in common after their tensors."""
    _, _, num_frames, height, width = video_BCTHW.shape
    per_colour = tubelet_size * patch_size**2
    if 3 * per_colour > 2**15:
        raise ValueError(
            f"tubelet_size={tubelet_size}, patch_size={patch_size}: a token has {3 * per_colour} values, but the "
            f"Triton kernels sum at most {2**15} without overflow; choose smaller tubelets"
        )
    sizes = {"M": num_masked, "T": num_frames, "H": height, "W": width}
    cut = {"TUBELET": tubelet_size, "PATCH": patch_size, "BLOCK_S": triton.next_power_of_2(per_colour)}
    return {**sizes, **cut, "TARGET": target, **choose(LAUNCH, per_colour)}


def patch_targets(
    video_BCTHW: Tensor, masked_ids_BM: Tensor, tubelet_size: int, patch_size: int, target: str, dtype: torch.dtype
) -> Tensor:
    """Return the targets (B, M, P) in ``dtype``, fp16, bf16 or fp32, values ordered (t, h, w, c).

    Arithmetic fp32, rounded once; the loss sees the same fp32 numbers. Deterministic.
    """
    batch_size, num_masked = masked_ids_BM.shape
    out_BMP = video_BCTHW.new_empty((batch_size, num_masked, 3 * tubelet_size * patch_size**2), dtype=dtype)
    if out_BMP.numel():
        _targets_kernel[(batch_size * num_masked,)](
            video_BCTHW.contiguous(),
            masked_ids_BM.contiguous(),
            out_BMP,
            **_settings(video_BCTHW, num_masked, tubelet_size, patch_size, target),
        )
    return out_BMP


def masked_patch_loss(
    prediction_BMP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    """Return the error of each masked token (B, M) in fp32; predictions fp16, bf16 or fp32. Deterministic."""
    batch_size, num_masked = masked_ids_BM.shape
    error_BM = prediction_BMP.new_empty((batch_size, num_masked), dtype=torch.float32)
    if error_BM.numel():
        _forward_kernel[(batch_size * num_masked,)](
            prediction_BMP.contiguous(),
            video_BCTHW.contiguous(),
            masked_ids_BM.contiguous(),
            error_BM,
            ERROR=error,
            **_settings(video_BCTHW, num_masked, tubelet_size, patch_size, target),
        )
    return error_BM


def masked_patch_loss_backward(
    grad_BM: Tensor,
    prediction_BMP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    """Return the prediction's gradient (B, M, P) in its dtype; arithmetic fp32, rounded once. Deterministic."""
    batch_size, num_masked = masked_ids_BM.shape
    grad_prediction_BMP = prediction_BMP.new_empty(prediction_BMP.shape)
    if grad_prediction_BMP.numel():
        _backward_kernel[(batch_size * num_masked,)](
            grad_BM.contiguous(),
            prediction_BMP.contiguous(),
            video_BCTHW.contiguous(),
            masked_ids_BM.contiguous(),
            grad_prediction_BMP,
            ERROR=error,
            **_settings(video_BCTHW, num_masked, tubelet_size, patch_size, target),
        )
    return grad_prediction_BMP


def patch_loss_step(
    prediction_RP: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    first_row: int,
    tubelet_size: int,
    patch_size: int,
    target: str,
    error: str,
) -> Tensor:
    """Turn predictions, fp16, bf16 or fp32, into slopes in place, and return the rows' errors (R,) in fp32.

    Row i is the masked token ``first_row`` + i of the batch. Arithmetic fp32, rounded once. Deterministic.
    """
    error_R = prediction_RP.new_empty((prediction_RP.shape[0],), dtype=torch.float32)
    if error_R.numel():
        in_order_RP = prediction_RP.contiguous()
        _step_kernel[(error_R.numel(),)](
            in_order_RP,
            video_BCTHW.contiguous(),
            masked_ids_BM.contiguous(),
            error_R,
            first_row,
            ERROR=error,
            **_settings(video_BCTHW, masked_ids_BM.shape[1], tubelet_size, patch_size, target),
        )
        if in_order_RP is not prediction_RP:
            prediction_RP.copy_(in_order_RP)
    return error_R
