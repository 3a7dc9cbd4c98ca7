"""The sampling loss of a clip and its unit gradient: one program for each clip, one launch.

    loss[b] = - mean over masked i of  log clamp(p[b, i]) · error[b, i],      p = exp(logit - largest) / Σ
    gradient[b, j] = p_j · Σw - w_j,                     w_i = error_i / M where p_i is not clamped, else 0

Bytes, with e of a logit and f of an error: N·(e + 4) + M·(8 + f) + 4 a clip, which is the minimum, and M·(12 + e) in
the cache: masked logits are looked at again, ids have the one before them beside them, and masked tokens' gradients
are written over.

An id that is out of range or not above the one before it makes its clip's loss and gradient NaN and reads or writes
nothing, so that it surfaces where the loss is checked and not as a read-back in every step.

Letters: B clips, N tokens, M masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamae_kernels.exponential import exp_of_negative
from adamae_kernels.ids import load_ids
from adamae_kernels.launch import Table, choose

LAUNCH: Table = ((2048, {"num_warps": 8}), (8192, {"num_warps": 16}))
"""By N. A clip lies in the registers of one program; more warps only where a thread would hold too many logits."""

_EPS = tl.constexpr(1.1920929e-07)


@triton.jit
def _kernel(logits, ids, error, loss, gradient, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    clip = tl.program_id(0).to(tl.int64)
    logits += clip * N
    gradient += clip * N
    offset_N = tl.arange(0, BLOCK_N)
    in_range_N = offset_N < N
    logit_N = tl.load(logits + offset_N, mask=in_range_N, other=float("-inf")).to(tl.float32)
    largest = tl.max(logit_N, 0)
    exp_N = exp_of_negative(logit_N - largest)
    total = tl.sum(exp_N, 0)

    # Beyond M, the error is 0.
    offset_M = tl.arange(0, BLOCK_M)
    in_range_M = offset_M < M
    id_M, valid_M = load_ids(ids + clip * M + offset_M, offset_M, N, in_range_M)
    logit_M = tl.load(logits + id_M, mask=in_range_M & valid_M, other=float("-inf")).to(tl.float32)
    error_M = tl.load(error + clip * M + offset_M, mask=in_range_M, other=0.0).to(tl.float32)
    p_M = tl.where(valid_M, tl.div_rn(exp_of_negative(logit_M - largest), total), float("nan"))
    # Comparisons, not min and max: those would turn a NaN into a bound.
    clamped_M = tl.where(p_M < _EPS, _EPS, tl.where(p_M > 1 - _EPS, 1 - _EPS, p_M))
    tl.store(loss + clip, tl.div_rn(-tl.sum(tl.log(clamped_M) * error_M, 0), M * 1.0))

    is_clamped_M = (p_M < _EPS) | (p_M > 1 - _EPS)
    weight_M = tl.where(is_clamped_M, 0.0, error_M)
    # An invalid id's p is NaN and must reach the whole clip; a valid one adds exactly 0. Divided once, after the sum.
    sum_w = tl.div_rn(tl.sum(weight_M + tl.where(p_M == p_M, 0.0, float("nan")), 0), M * 1.0)
    tl.store(gradient + offset_N, tl.div_rn(exp_N, total) * sum_w, mask=in_range_N)
    # Other threads of this program wrote the masked tokens' p · Σw; only after all of them may w be taken off.
    tl.debug_barrier()
    tl.store(gradient + id_M, p_M * sum_w - tl.div_rn(weight_M, M * 1.0), mask=in_range_M & valid_M)


def sampling_loss(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) and its gradient to the logits (B, N), both fp32.

    Logits and error fp16, bf16 or fp32, ids int64; arithmetic fp32. Deterministic.
    """
    (batch_size, num_tokens), num_masked = logits_BN.shape, masked_ids_BM.shape[1]
    loss_B = logits_BN.new_empty((batch_size,), dtype=torch.float32)
    gradient_BN = logits_BN.new_empty((batch_size, num_tokens), dtype=torch.float32)
    if batch_size:
        _kernel[(batch_size,)](
            logits_BN.contiguous(),
            masked_ids_BM.contiguous(),
            error_BM.contiguous(),
            loss_B,
            gradient_BN,
            num_tokens,
            num_masked,
            BLOCK_N=triton.next_power_of_2(num_tokens),
            BLOCK_M=triton.next_power_of_2(num_masked),
            **choose(LAUNCH, num_tokens),
        )
    return loss_B, gradient_BN
