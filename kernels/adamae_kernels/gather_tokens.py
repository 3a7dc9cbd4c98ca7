"""Visible tokens with their positions added, and the way back, one launch each.

    out[b, k] = tokens[b, ids[b, k]] + positions[ids[b, k]]
    grad_tokens[b, n] = grad[b, slots[b, n]] if slots[b, n] < K else 0

A program holds a few whole rows. The backward walks the result, not the gradient: every row is written once, zeros
included, without atomics or a fill before. Row numbers are 32-bit, and what they are divided by is a constant of the
compiled kernel, which is faster; offsets are 64-bit.

Bytes, with e of an element: forward B·K·(2·D·e + 8) and the positions, read once a clip at worst; backward
B·(N + K)·D·e + 8·B·N. Both are the minimum.

An id that is out of range or not above the one before it in its clip makes its row NaN and reads nothing, so that it
surfaces where the loss is checked and not as a read-back in every step.

Letters: B clips, N tokens, K visible, D encoder width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adamae_kernels.ids import load_ids
from adamae_kernels.launch import Table, choose

LAUNCH: Table = ((1024, {"ROWS": 4, "num_warps": 4}), (4096, {"ROWS": 1, "num_warps": 4}))
"""By D. Rows of one program, which together give every thread several loads in flight."""


@triton.jit
def _forward_kernel(
    tokens, ids, positions, out, num_rows, N, K: tl.constexpr, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range_R = row_R < num_rows
    id_R, valid_R = load_ids(ids + row_R, row_R % K, N, in_range_R)
    offset_D = tl.arange(0, BLOCK_D)
    store_RD = in_range_R[:, None] & (offset_D < D)[None, :]
    load_RD = store_RD & valid_R[:, None]
    token_R = (row_R // K).to(tl.int64) * N + id_R
    token_RD = tl.load(tokens + token_R[:, None] * D + offset_D[None, :], mask=load_RD, other=0.0).to(tl.float32)
    position_RD = tl.load(positions + id_R[:, None] * D + offset_D[None, :], mask=load_RD, other=float("nan")).to(
        tl.float32
    )
    out_RD = token_RD + position_RD
    tl.store(out + row_R.to(tl.int64)[:, None] * D + offset_D[None, :], out_RD.to(out.dtype.element_ty), mask=store_RD)


@triton.jit
def _backward_kernel(
    grad, slots, grad_tokens, num_rows, N: tl.constexpr, K, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range_R = row_R < num_rows
    slot_R = tl.load(slots + row_R, mask=in_range_R, other=0)
    visible_R = (slot_R >= 0) & (slot_R < K)
    offset_D = tl.arange(0, BLOCK_D)
    store_RD = in_range_R[:, None] & (offset_D < D)[None, :]
    grad_R = (row_R // N).to(tl.int64) * K + slot_R
    grad_RD = tl.load(grad + grad_R[:, None] * D + offset_D[None, :], mask=store_RD & visible_R[:, None], other=0.0)
    tl.store(grad_tokens + row_R.to(tl.int64)[:, None] * D + offset_D[None, :], grad_RD, mask=store_RD)


def gather_tokens(tokens_BND: Tensor, ids_BK: Tensor, slots_BN: Tensor, positions_ND: Tensor) -> Tensor:
    """Return tokens ``ids_BK`` plus their positions, (B, K, D) in the tokens' dtype; the slots are for the backward.

    Tokens and positions fp16, bf16 or fp32, ids int64; the sum is fp32, rounded once. Deterministic.
    """
    (batch_size, num_tokens, width), num_visible = tokens_BND.shape, ids_BK.shape[1]
    out_BKD = tokens_BND.new_empty((batch_size, num_visible, width))
    settings = choose(LAUNCH, width)
    num_rows = batch_size * num_visible
    if out_BKD.numel():
        _forward_kernel[(triton.cdiv(num_rows, settings["ROWS"]),)](
            tokens_BND.contiguous(),
            ids_BK.contiguous(),
            positions_ND.contiguous(),
            out_BKD,
            num_rows,
            num_tokens,
            num_visible,
            width,
            BLOCK_D=triton.next_power_of_2(width),
            **settings,
        )
    return out_BKD


def gather_tokens_backward(grad_BKD: Tensor, slots_BN: Tensor) -> Tensor:
    """Return the tokens' gradient (B, N, D) in the dtype of ``grad_BKD``: its rows, moved, and zeros. Deterministic."""
    (batch_size, num_visible, width), num_tokens = grad_BKD.shape, slots_BN.shape[1]
    grad_tokens_BND = grad_BKD.new_empty((batch_size, num_tokens, width))
    settings = choose(LAUNCH, width)
    num_rows = batch_size * num_tokens
    if grad_tokens_BND.numel():
        _backward_kernel[(triton.cdiv(num_rows, settings["ROWS"]),)](
            grad_BKD.contiguous(),
            slots_BN.contiguous(),
            grad_tokens_BND,
            num_rows,
            num_tokens,
            num_visible,
            width,
            BLOCK_D=triton.next_power_of_2(width),
            **settings,
        )
    return grad_tokens_BND
