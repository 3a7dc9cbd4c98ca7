"""Noise, the K tokens of largest key, both lists of ids, the inverse map, statistics: one program a clip, one launch.

    key = logit + noise,      visible = the K largest keys, ties to the lower index
    statistics = largest logit, log Σ exp(logit), entropy of softmax(logits)

The noise is that of ``adamae_fast.ops.sample_visible``, bit for bit: each product, sum and quotient is rounded on its
own, which is why these kernels are compiled without fusing them.

Nothing is sorted. A key's bits, read as an integer in the order of the numbers, stay in registers; the K-th largest is
found two bits at a time, sixteen counts over the clip in all. One prefix sum of "above" and "equal" then gives every
token its place, and the ids come out in ascending order because places ascend with tokens.

Bytes: N logits read and 16·N written a clip, the minimum: the ids and the inverse map are int64.

``split_tokens`` does the same from a list of visible ids. An id that is out of range or named twice leaves fewer than K
visible tokens, and -1 in the places that are left over, which the kernels that use the ids turn into NaN.

Letters: B clips, N tokens, K visible, M masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamae_kernels.exponential import exp_of_negative
from adamae_kernels.launch import Table, choose

LAUNCH: Table = ((2048, {"num_warps": 8}), (8192, {"num_warps": 16}))
"""By N. A clip lies in the registers of one program; more warps only where a thread would hold too many keys."""


@triton.jit
def _twice_atanh(s):
    """2 · atanh(s) for |s| below 0.18, by its series."""
    z = s * s
    total = z * 0.11111111 + 0.14285715
    total = total * z + 0.2
    total = total * z + 0.33333334
    total = total * z + 1.0
    return 2.0 * s * total


@triton.jit
def _log(x):
    """The natural logarithm of positive normal fp32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the mantissa lies in [√½, √2)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32) * 0.6931472 + _twice_atanh(tl.div_rn(mantissa - 1.0, mantissa + 1.0))


@triton.jit
def _gumbel_noise(seed, BLOCK_N: tl.constexpr):
    """Noise of the tokens 0 … BLOCK_N - 1 of a clip: token n is word n % 4 of Philox's counter n // 4."""
    word0, word1, word2, word3 = tl.randint4x(seed, tl.arange(0, BLOCK_N // 4))
    bits = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (BLOCK_N,))
    r = (bits >> 1).to(tl.int32)
    v = (r.to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2⁻³¹
    u = ((0x7FFFFFFF - r).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 1 - v, with all its digits
    return -_log(tl.where(v < 0.25, _twice_atanh(tl.div_rn(v, 2.0 - v)), -_log(u)))


@triton.jit
def _write_split(num_visible_up_to_N, is_visible_N, offset_N, visible_ids, masked_ids, slots, N, K):
    """Store the split of this program's clip, given which tokens are visible and how many up to each one."""
    clip = tl.program_id(0).to(tl.int64)
    in_range = offset_N < N
    slot_N = tl.where(is_visible_N, num_visible_up_to_N - 1, K + offset_N - num_visible_up_to_N)
    id_N = offset_N.to(tl.int64)
    tl.store(slots + clip * N + offset_N, slot_N.to(tl.int64), mask=in_range)
    tl.store(visible_ids + clip * K + slot_N, id_N, mask=in_range & is_visible_N & (slot_N < K))
    tl.store(masked_ids + clip * (N - K) + slot_N - K, id_N, mask=in_range & (slot_N >= K) & (slot_N < N))


@triton.jit
def _sample_kernel(logits, seeds, visible_ids, masked_ids, slots, statistics, N, K, BLOCK_N: tl.constexpr):
    clip = tl.program_id(0).to(tl.int64)
    offset_N = tl.arange(0, BLOCK_N)
    in_range = offset_N < N
    logit_N = tl.load(logits + clip * N + offset_N, mask=in_range, other=0.0).to(tl.float32)
    key_N = logit_N + _gumbel_noise(tl.load(seeds + clip), BLOCK_N)
    # Both zeros are one number, and a NaN of any sign is above every number, as in torch.sort.
    bits_N = tl.where(key_N == 0, 0.0, key_N).to(tl.int32, bitcast=True)
    image_N = tl.where(key_N == key_N, bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)

    # The largest threshold that at least K keys reach, two bits at a time: its three candidates are counted in one sum.
    threshold = tl.full((), -(2**31), tl.int64)
    for step in tl.static_range(16):
        reached_N = (image_N >= (threshold + (1 << (30 - 2 * step))).to(tl.int32)).to(tl.int64)
        reached_N += (image_N >= (threshold + (2 << (30 - 2 * step))).to(tl.int32)).to(tl.int64) << 21
        reached_N += (image_N >= (threshold + (3 << (30 - 2 * step))).to(tl.int32)).to(tl.int64) << 42
        reached = tl.sum(tl.where(in_range, reached_N, 0), 0)
        digits = ((reached & 0x1FFFFF) >= K).to(tl.int64)
        digits += (((reached >> 21) & 0x1FFFFF) >= K).to(tl.int64) + ((reached >> 42) >= K).to(tl.int64)
        threshold += digits << (30 - 2 * step)

    above_N = in_range & (image_N > threshold.to(tl.int32))
    equal_N = in_range & (image_N == threshold.to(tl.int32))
    num_equal_visible = K - tl.sum(above_N.to(tl.int32), 0)
    up_to_N = tl.cumsum((above_N.to(tl.int64) << 32) + equal_N.to(tl.int64), 0)
    above_up_to_N = (up_to_N >> 32).to(tl.int32)
    equal_up_to_N = up_to_N.to(tl.int32)
    is_visible_N = above_N | (equal_N & (equal_up_to_N <= num_equal_visible))
    num_visible_up_to_N = above_up_to_N + tl.minimum(equal_up_to_N, num_equal_visible)
    _write_split(num_visible_up_to_N, is_visible_N, offset_N, visible_ids, masked_ids, slots, N, K)

    largest = tl.max(tl.where(in_range, logit_N, float("-inf")), 0)
    below_N = logit_N - largest
    weight_N = tl.where(in_range, exp_of_negative(below_N), 0.0)
    total = tl.sum(weight_N, 0)
    # A weight of 0 times a logit of minus infinity is NaN, as it should be.
    mean_below = tl.div_rn(tl.sum(tl.where(in_range, below_N * weight_N, 0.0), 0), total)
    tl.store(statistics + clip * 3, largest)
    tl.store(statistics + clip * 3 + 1, largest + tl.log(total))
    tl.store(statistics + clip * 3 + 2, tl.log(total) - mean_below)


@triton.jit
def _split_kernel(ids, visible_ids, masked_ids, slots, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    clip = tl.program_id(0).to(tl.int64)
    offset_N = tl.arange(0, BLOCK_N)
    in_range = offset_N < N
    offset_K = tl.arange(0, BLOCK_K)
    id_K = tl.load(ids + clip * K + offset_K, mask=offset_K < K, other=-1)
    # The clip's slots serve as marks first. Each barrier orders them among the threads of this program.
    mark = slots + clip * N
    tl.store(mark + offset_N, tl.zeros((BLOCK_N,), tl.int64), mask=in_range)
    tl.debug_barrier()
    tl.store(mark + id_K, tl.full((BLOCK_K,), 1, tl.int64), mask=(id_K >= 0) & (id_K < N))
    tl.debug_barrier()
    marked_N = tl.load(mark + offset_N, mask=in_range, other=0).to(tl.int32)
    tl.debug_barrier()
    num_marked = tl.sum(marked_N, 0)
    _write_split(tl.cumsum(marked_N, 0), marked_N == 1, offset_N, visible_ids, masked_ids, slots, N, K)
    left_over = (offset_K >= num_marked) & (offset_K < K)
    tl.store(visible_ids + clip * K + offset_K, tl.full((BLOCK_K,), -1, tl.int64), mask=left_over)


def _empty_split(like: Tensor, num_visible: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    visible, masked, slots = (
        like.new_empty((like.shape[0], size), dtype=torch.int64)
        for size in (num_visible, num_tokens - num_visible, num_tokens)
    )
    return visible, masked, slots


def sample_visible(logits_BN: Tensor, seeds_B: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return visible ids (B, K), masked ids (B, M), both ascending, slots (B, N), and statistics (B, 3) in fp32.

    Logits fp16, bf16 or fp32, seeds int64; keys are fp32 and N at most 2²¹ - 1. Deterministic.
    """
    batch_size, num_tokens = logits_BN.shape
    split = _empty_split(logits_BN, num_visible, num_tokens)
    statistics_B3 = logits_BN.new_empty((batch_size, 3), dtype=torch.float32)
    if batch_size:
        _sample_kernel[(batch_size,)](
            logits_BN.contiguous(),
            seeds_B.contiguous(),
            *split,
            statistics_B3,
            num_tokens,
            num_visible,
            BLOCK_N=max(4, triton.next_power_of_2(num_tokens)),
            enable_fp_fusion=False,
            **choose(LAUNCH, num_tokens),
        )
    return *split, statistics_B3


def split_tokens(visible_ids_BK: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the split in which ``visible_ids_BK`` (int64, any order) are visible, as :func:`sample_visible` does."""
    batch_size, num_visible = visible_ids_BK.shape
    split = _empty_split(visible_ids_BK, num_visible, num_tokens)
    if batch_size:
        _split_kernel[(batch_size,)](
            visible_ids_BK.contiguous(),
            *split,
            num_tokens,
            num_visible,
            BLOCK_N=triton.next_power_of_2(num_tokens),
            BLOCK_K=triton.next_power_of_2(num_visible),
            **choose(LAUNCH, num_tokens),
        )
    return split
