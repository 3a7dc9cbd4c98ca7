"""The decoder's input, and its gradients with a mask-token sum that always adds in the same order.

    out[b, k]     = visible[b, k] + positions[visible_ids[b, k]]
    out[b, K + m] = mask_token    + positions[masked_ids[b, m]]
    grad_visible[b, k] = grad[b, k],      grad_mask_token = Σ over b, m of grad[b, K + m]

A program of the backward walks CHUNK rows of the gradient: it copies the visible ones and sums the masked ones into one
fp32 row of its own. A second launch adds those rows. Chunks depend on shapes only, so results repeat bit by bit.
Row numbers are 32-bit, and what they are divided by is a constant of the compiled kernel, which is faster; offsets are
64-bit.

Bytes, with e of an element: forward B·(K + N)·E·e + 8·B·N, positions read once a clip at worst; backward
B·(N + K)·E·e, the minimum, and twice the partial sums, 8 / (CHUNK·e) of the gradient's size.

An id that is out of range or not above the one before it in its clip makes its row NaN and reads nothing, so that it
surfaces where the loss is checked and not as a read-back in every step.

Letters: B clips, N tokens, K visible, M masked, E decoder width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamae_kernels.ids import load_ids
from adamae_kernels.launch import Table, choose

LAUNCH: Table = (
    (512, {"ROWS": 8, "num_warps": 4}),
    (1024, {"ROWS": 4, "num_warps": 4}),
    (4096, {"ROWS": 1, "num_warps": 4}),
)
"""By E. Rows that a program handles at a time, which give every thread several loads in flight."""

CHUNK = 64
"""Rows of one program of the backward: some hundred programs at the paper's shapes, partial sums a few percent."""

_REDUCE_COLUMNS = 16
_REDUCE_ROWS = 128


@triton.jit
def _forward_kernel(
    visible,
    mask_token,
    positions,
    visible_ids,
    masked_ids,
    out,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    E,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range_R = row_R < num_rows
    clip_R = (row_R // (K + M)).to(tl.int64)
    place_R = row_R % (K + M)
    is_visible_R = place_R < K
    visible_row_R = clip_R * K + place_R
    pointer_R = tl.where(is_visible_R, visible_ids + visible_row_R, masked_ids + clip_R * M + place_R - K)
    id_R, valid_R = load_ids(pointer_R, tl.where(is_visible_R, place_R, place_R - K), N, in_range_R)

    offset_E = tl.arange(0, BLOCK_E)
    in_row_E = offset_E < E
    store_RE = in_range_R[:, None] & in_row_E[None, :]
    mask_token_E = tl.load(mask_token + offset_E, mask=in_row_E, other=0.0).to(tl.float32)
    visible_RE = tl.load(
        visible + visible_row_R[:, None] * E + offset_E[None, :], mask=store_RE & is_visible_R[:, None], other=0.0
    ).to(tl.float32)
    position_RE = tl.load(
        positions + id_R[:, None] * E + offset_E[None, :], mask=store_RE & valid_R[:, None], other=float("nan")
    ).to(tl.float32)
    out_RE = tl.where(is_visible_R[:, None], visible_RE, mask_token_E[None, :]) + position_RE
    tl.store(out + row_R.to(tl.int64)[:, None] * E + offset_E[None, :], out_RE.to(out.dtype.element_ty), mask=store_RE)


@triton.jit
def _backward_kernel(
    grad,
    grad_visible,
    partial,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    E,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    program = tl.program_id(0)
    offset_E = tl.arange(0, BLOCK_E)
    in_row_E = offset_E < E
    sum_RE = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for start in range(0, CHUNK, ROWS):
        row_R = program * CHUNK + start + tl.arange(0, ROWS)
        load_RE = (row_R < num_rows)[:, None] & in_row_E[None, :]
        grad_RE = tl.load(grad + row_R.to(tl.int64)[:, None] * E + offset_E[None, :], mask=load_RE, other=0.0)
        place_R = row_R % N
        is_visible_R = place_R < K
        visible_row_R = (row_R // N).to(tl.int64) * K + place_R
        tl.store(
            grad_visible + visible_row_R[:, None] * E + offset_E[None, :],
            grad_RE,
            mask=load_RE & is_visible_R[:, None],
        )
        sum_RE += tl.where(is_visible_R[:, None], 0.0, grad_RE.to(tl.float32))
    tl.store(partial + program.to(tl.int64) * E + offset_E, tl.sum(sum_RE, 0), mask=in_row_E)


@triton.jit
def _reduce_kernel(partial, grad_mask_token, num_partial, E, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offset_E = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_row_E = offset_E < E
    sum_RE = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_partial, ROWS):
        row_R = start + tl.arange(0, ROWS)
        load_RE = (row_R < num_partial)[:, None] & in_row_E[None, :]
        sum_RE += tl.load(partial + row_R.to(tl.int64)[:, None] * E + offset_E[None, :], mask=load_RE, other=0.0)
    sum_E = tl.sum(sum_RE, 0)
    tl.store(grad_mask_token + offset_E, sum_E.to(grad_mask_token.dtype.element_ty), mask=in_row_E)


def assemble_decoder(
    visible_BKE: Tensor, mask_token_E: Tensor, positions_NE: Tensor, visible_ids_BK: Tensor, masked_ids_BM: Tensor
) -> Tensor:
    """Return the decoder's input (B, K + M, E) in ``visible_BKE``'s dtype.

    Values of any of fp16, bf16 and fp32, ids int64; sums are fp32, rounded once. Deterministic.
    """
    (batch_size, num_visible, width), num_masked = visible_BKE.shape, masked_ids_BM.shape[1]
    out_BNE = visible_BKE.new_empty((batch_size, num_visible + num_masked, width))
    settings = choose(LAUNCH, width)
    num_rows = batch_size * (num_visible + num_masked)
    if out_BNE.numel():
        _forward_kernel[(triton.cdiv(num_rows, settings["ROWS"]),)](
            visible_BKE.contiguous(),
            mask_token_E.contiguous(),
            positions_NE.contiguous(),
            visible_ids_BK.contiguous(),
            masked_ids_BM.contiguous(),
            out_BNE,
            num_rows,
            positions_NE.shape[0],
            num_visible,
            num_masked,
            width,
            BLOCK_E=triton.next_power_of_2(width),
            **settings,
        )
    return out_BNE


def assemble_decoder_backward(
    grad_BNE: Tensor, num_visible: int, mask_token_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the visible tokens (B, K, E), copied, and of the mask token (E,), summed in fp32.

    The mask token's is rounded once to ``mask_token_dtype``. Deterministic.
    """
    batch_size, num_tokens, width = grad_BNE.shape
    grad_visible_BKE = grad_BNE.new_empty((batch_size, num_visible, width))
    grad_mask_token_E = grad_BNE.new_empty((width,), dtype=mask_token_dtype)
    settings = choose(LAUNCH, width)
    num_rows = batch_size * num_tokens
    if not num_rows:
        return grad_visible_BKE, grad_mask_token_E.zero_()
    num_partial = triton.cdiv(num_rows, CHUNK)
    partial = grad_BNE.new_empty((num_partial, width), dtype=torch.float32)
    if width:
        _backward_kernel[(num_partial,)](
            grad_BNE.contiguous(),
            grad_visible_BKE,
            partial,
            num_rows,
            num_tokens,
            num_visible,
            width,
            CHUNK=CHUNK,
            BLOCK_E=triton.next_power_of_2(width),
            **settings,
        )
        _reduce_kernel[(triton.cdiv(width, _REDUCE_COLUMNS),)](
            partial, grad_mask_token_E, num_partial, width, ROWS=_REDUCE_ROWS, COLUMNS=_REDUCE_COLUMNS
        )
    return grad_visible_BKE, grad_mask_token_E
