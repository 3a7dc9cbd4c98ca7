"""Draw the visible tokens of each clip, and list visible and masked ids (paper section 3.1, Categorical sampling).

    visible[b] = the K largest of logits[b, n] + noise[b, n],   noise ~ Gumbel(0, 1)

This equals drawing K distinct tokens one after another, each with probability proportional to p = softmax(logits) among
those left: the Gumbel-top-K identity.

Randomness is an argument, one seed for each clip: noise[b, n] = -log(E), E = -log(1 - v), where v in (0, 1) comes from
bits of Philox4x32-10 with key seeds[b] and counter n. So a clip's mask depends on its seed and on nothing else: not on
the rank or the place in a batch where it is drawn, and not on how often anything was drawn before. The logarithm is
made of single fp32 roundings, so that C++, Triton, CUDA and plain PyTorch draw the same bits.

Letters: B clips, N tokens, K visible, M = N - K masked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adamae_fast.ops.registry import (
    Impl,
    accumulate_dtype,
    check_floating,
    check_id_range,
    check_ids,
    choose,
    describe,
    names_wrong_types,
    register,
)


class NonFiniteLogitsError(ValueError):
    """A logit is NaN or infinite, so that there is no distribution to draw from."""


class TokenSplit(NamedTuple):
    """Which tokens of each clip are visible and which are masked; ids are int64."""

    visible_ids_BK: Tensor
    """Ids of the visible tokens, ascending."""

    masked_ids_BM: Tensor
    """Ids of the masked tokens, ascending."""

    slots_BN: Tensor
    """slots[b, n] is the place of token n in concat(visible, masked): below K if visible, otherwise K or more."""

    statistics_B3: Tensor | None = None
    """Of the logits drawn from: the largest, log Σ exp, and the entropy of their softmax in nats, which is NaN where a
    logit is not finite; fp32 (fp64 for fp64 logits). None for a split of given ids."""


_SAMPLE_SCHEMA = "sample_visible(Tensor logits, Tensor seeds, SymInt num_visible) -> (Tensor, Tensor, Tensor, Tensor)"
_SPLIT_SCHEMA = "split_tokens(Tensor visible_ids, SymInt num_tokens) -> (Tensor, Tensor, Tensor)"


def _philox(seeds_B: Tensor, num_tokens: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., 2011): 32 random bits for each token, as int64; token n is word n % 4 of n // 4."""
    low = 0xFFFFFFFF
    c0 = torch.arange(-(-num_tokens // 4), device=seeds_B.device).expand(seeds_B.shape[0], -1)
    c1 = c2 = c3 = torch.zeros_like(c0)
    key0, key1 = seeds_B[:, None] & low, seeds_B[:, None] >> 32 & low
    for _ in range(10):
        # int64 products wrap around and lose nothing of their 64 bits.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = product0 >> 32 & low, product1 >> 32 & low
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & low, high0 ^ c3 ^ key1, product0 & low
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return torch.stack((c0, c1, c2, c3), dim=2).flatten(1)[:, :num_tokens]


def _twice_atanh(s: Tensor) -> Tensor:
    """2 · atanh(s) for |s| below 0.18, by its series."""
    z = s * s
    total = z * 0.11111111 + 0.14285715
    for coefficient in (0.2, 0.33333334, 1.0):
        total = total * z + coefficient
    return 2 * s * total


def _log(x: Tensor) -> Tensor:
    """The natural logarithm of positive normal fp32 numbers."""
    bits = x.view(torch.int32)
    exponent = bits - 0x3F3504F3 >> 23  # so that the mantissa lies in [√½, √2)
    mantissa = (bits - (exponent << 23)).view(torch.float32)
    return exponent.float() * 0.6931472 + _twice_atanh((mantissa - 1) / (mantissa + 1))


def gumbel_noise(seeds_B: Tensor, num_tokens: int) -> Tensor:
    """Return the noise (B, N) in fp32 that :func:`sample_visible` adds to the logits, between -3.1 and 22.2.

    Gumbel(0, 1) to 31 bits; the formula is at the top of this file. ``seeds_B`` is int64.
    """
    r = _philox(seeds_B, num_tokens) >> 1
    v, u = ((x.float() + 0.5) * 2**-31 for x in (r, 0x7FFFFFFF - r))  # u = 1 - v, with all its digits
    return -_log(torch.where(v < 0.25, _twice_atanh(v / (2 - v)), -_log(u)))


def _split_reference(visible_ids_BK: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    check_id_range("visible_ids", visible_ids_BK, num_tokens)
    batch_size, num_visible = visible_ids_BK.shape
    on_device = visible_ids_BK.device
    is_visible_BN = torch.zeros((batch_size, num_tokens), dtype=torch.bool, device=on_device)
    is_visible_BN.scatter_(1, visible_ids_BK, True)
    if on_device.type == "cpu" and (is_visible_BN.numpy().sum(1) != num_visible).any():
        raise ValueError("visible_ids names a token twice in one clip; pass distinct ids")
    # A visible token's place is the number of visible tokens before it, a masked token's K plus the masked before it.
    token_N = torch.arange(num_tokens, device=on_device)
    num_visible_up_to_BN = is_visible_BN.cumsum(1)
    slots_BN = torch.where(is_visible_BN, num_visible_up_to_BN - 1, num_visible + token_N - num_visible_up_to_BN)
    order_BN = torch.empty_like(slots_BN).scatter_(1, slots_BN, token_N.expand(batch_size, -1))
    return order_BN[:, :num_visible].clone(), order_BN[:, num_visible:].clone(), slots_BN


def _statistics(logits_BN: Tensor) -> Tensor:
    largest_B1 = logits_BN.amax(dim=1, keepdim=True)
    below_BN = logits_BN - largest_B1
    weight_BN = below_BN.exp()
    sum_B1 = weight_BN.sum(dim=1, keepdim=True)
    # A weight of 0 times a logit of minus infinity is NaN, as it should be.
    entropy_B1 = sum_B1.log() - (below_BN * weight_BN).sum(dim=1, keepdim=True) / sum_B1
    return torch.cat([largest_B1, largest_B1 + sum_B1.log(), entropy_B1], dim=1)


def _sample_reference(logits_BN: Tensor, seeds_B: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens = logits_BN.shape[1]
    logits_BN = logits_BN.to(accumulate_dtype(logits_BN.dtype))
    keys_BN = logits_BN + gumbel_noise(seeds_B, num_tokens)
    # A stable sort leaves equal keys in token order: ties go to the lower index.
    order_BN = keys_BN.sort(dim=1, descending=True, stable=True).indices
    return *_split_reference(order_BN[:, :num_visible], num_tokens), _statistics(logits_BN)


def _fake_split(like: Tensor, num_visible: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    visible, masked, slots = (
        like.new_empty((like.shape[0], size), dtype=torch.int64)
        for size in (num_visible, num_tokens - num_visible, num_tokens)
    )
    return visible, masked, slots


def _sample_fake(logits_BN: Tensor, seeds_B: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics_B3 = logits_BN.new_empty((logits_BN.shape[0], 3), dtype=accumulate_dtype(logits_BN.dtype))
    return *_fake_split(logits_BN, num_visible, logits_BN.shape[1]), statistics_B3


def _split_fake(visible_ids_BK: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_split(visible_ids_BK, visible_ids_BK.shape[1], num_tokens)


_sample_visible = register(_SAMPLE_SCHEMA, reference=_sample_reference, fake=_sample_fake, has_cuda=True)
_split_tokens = register(_SPLIT_SCHEMA, reference=_split_reference, fake=_split_fake)


@names_wrong_types
def sample_visible(logits_BN: Tensor, seeds_B: Tensor, num_visible: int, *, impl: Impl = "auto") -> TokenSplit:
    """Draw ``num_visible`` distinct tokens of each clip with p = softmax(logits), and describe the logits.

    ``seeds_B`` (int64) decides each clip's noise (formula at the top of this file). Keys are fp32 (fp64 for fp64
    logits); ties go to the lower index. Deterministic given the seeds, whatever the implementation and the device: the
    ids are those of plain PyTorch. Nothing waits for the device and there is no gradient. ``num_visible`` is 1 … N; at
    N nothing is masked.

    Raises ValueError if shapes, dtypes or devices disagree, ``num_visible`` is out of range or ``impl`` cannot run
    here, and, on the CPU, NonFiniteLogitsError (also a ValueError) for a logit that is not finite. On a device that
    would have to be waited for, such a clip's entropy is NaN, for the caller to look at when it next waits.
    """
    check_floating("logits", logits_BN, (None, None), "BN")
    check_seeds(seeds_B, logits_BN.shape[0], logits_BN.device)
    _check_num_visible(num_visible, logits_BN.shape[1])
    operation = choose(_sample_visible, impl, logits_BN.device)
    split = TokenSplit(*operation(logits_BN.detach(), seeds_B, num_visible))
    has_numbers = type(split.statistics_B3) is Tensor and not torch.compiler.is_compiling()  # a fake tensor has none
    if logits_BN.device.type == "cpu" and has_numbers:
        _check_finite(logits_BN, split)
    return split


@names_wrong_types
def split_tokens(visible_ids_BK: Tensor, num_tokens: int, *, impl: Impl = "auto") -> TokenSplit:
    """Return the split in which exactly ``visible_ids_BK`` (int64, any order) are visible among ``num_tokens``.

    Raises ValueError if the ids are not int64 (B, K), K is not in 1 … N, ``impl`` cannot run here, or, for ids on the
    CPU, one is out of range or named twice.
    """
    if visible_ids_BK.dim() != 2:
        raise ValueError(f"visible_ids has {describe(visible_ids_BK)}; pass int64 token ids of shape (B, K)")
    check_ids("visible_ids", visible_ids_BK, visible_ids_BK.shape[0], visible_ids_BK.device)
    _check_num_visible(visible_ids_BK.shape[1], num_tokens)
    return TokenSplit(*choose(_split_tokens, impl, visible_ids_BK.device)(visible_ids_BK, num_tokens))


def check_seeds(seeds_B: Tensor, batch_size: int, device: torch.device) -> None:
    """Raise ValueError unless ``seeds_B`` is int64 (``batch_size``,) on ``device``."""
    if not isinstance(seeds_B, Tensor):
        raise ValueError(
            f"seeds is a {type(seeds_B).__name__}; pass a torch.Tensor of {batch_size} int64 seeds, one for each clip"
        )
    if tuple(seeds_B.shape) != (batch_size,) or seeds_B.dtype != torch.int64 or seeds_B.device != device:
        raise ValueError(
            f"seeds has {describe(seeds_B)}; pass {batch_size} int64 seeds, one for each clip, on {device}"
        )


def _check_num_visible(num_visible: int, num_tokens: int) -> None:
    if not 1 <= num_visible <= num_tokens:
        raise ValueError(f"num_visible={num_visible}: choose 1 to {num_tokens}, the number of tokens")


def _check_finite(logits_BN: Tensor, split: TokenSplit) -> None:
    assert split.statistics_B3 is not None
    entropy_B = split.statistics_B3[:, 2].numpy()
    if not np.isfinite(entropy_B).all():
        logits = logits_BN.detach().float().numpy()
        for clip, token in np.argwhere(~np.isfinite(logits)):
            raise NonFiniteLogitsError(
                f"logits of clip {clip} hold {logits[clip, token]} at token {token}; there is no probability to "
                "draw with: look for what made the network diverge"
            )
        clip = int(np.isfinite(entropy_B).argmin())
        raise NonFiniteLogitsError(
            f"logits of clip {clip} reach from {logits[clip].min():.3g} to {logits[clip].max():.3g}, too far apart for "
            "their softmax: look for what made the network diverge"
        )
