"""Draw the visible tokens of each clip, and list visible and masked ids (paper section 3.1, Categorical sampling).

    visible[b] = the K largest of logits[b, n] + noise[b, n],   noise ~ Gumbel(0, 1)

This equals drawing K distinct tokens one after another, each with probability proportional to p = softmax(logits) among
those left: the Gumbel-top-K identity. Noise is an argument, so nothing is ever drawn twice.

Letters: B clips, N tokens, K visible, M = N - K masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamae_fast.ops.registry import (
    Impl,
    accumulate_dtype,
    check_floating,
    check_id_range,
    check_ids,
    check_same_device,
    choose,
    describe,
    register,
)


class TokenSplit(NamedTuple):
    """Which tokens of each clip are visible and which are masked; all int64."""

    visible_ids_BK: Tensor
    """Ids of the visible tokens, ascending."""

    masked_ids_BM: Tensor
    """Ids of the masked tokens, ascending."""

    slots_BN: Tensor
    """slots[b, n] is the place of token n in concat(visible, masked): below K if visible, otherwise K or more."""


_SAMPLE_SCHEMA = "sample_visible(Tensor logits, Tensor noise, SymInt num_visible) -> (Tensor, Tensor, Tensor)"
_SPLIT_SCHEMA = "split_tokens(Tensor visible_ids, SymInt num_tokens) -> (Tensor, Tensor, Tensor)"


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


def _sample_reference(logits_BN: Tensor, noise_BN: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(torch.promote_types(logits_BN.dtype, noise_BN.dtype))
    keys_BN = logits_BN.to(dtype) + noise_BN.to(dtype)
    # A stable sort leaves equal keys in token order: ties go to the lower index.
    order_BN = keys_BN.sort(dim=1, descending=True, stable=True).indices
    return _split_reference(order_BN[:, :num_visible], logits_BN.shape[1])


def _fake_split(like: Tensor, num_visible: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    visible, masked, slots = (
        like.new_empty((like.shape[0], size), dtype=torch.int64)
        for size in (num_visible, num_tokens - num_visible, num_tokens)
    )
    return visible, masked, slots


def _sample_fake(logits_BN: Tensor, noise_BN: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_split(logits_BN, num_visible, logits_BN.shape[1])


def _split_fake(visible_ids_BK: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_split(visible_ids_BK, visible_ids_BK.shape[1], num_tokens)


_sample_visible = register(_SAMPLE_SCHEMA, reference=_sample_reference, fake=_sample_fake)
_split_tokens = register(_SPLIT_SCHEMA, reference=_split_reference, fake=_split_fake)


def sample_visible(logits_BN: Tensor, noise_BN: Tensor, num_visible: int, *, impl: Impl = "auto") -> TokenSplit:
    """Draw ``num_visible`` distinct tokens of each clip with p = softmax(logits), given Gumbel noise.

    Keys are fp32 (fp64 if an input is fp64); ties go to the lower index. Deterministic given the noise. Nothing waits
    for the device and there is no gradient. ``num_visible`` is 1 … N; at N nothing is masked. A logit that is not
    finite is the caller's to refuse: NaN sorts above every number here.

    Raises ValueError if shapes or devices disagree, an input is not floating point, ``num_visible`` is out of range or
    ``impl`` cannot run here.
    """
    check_floating("logits", logits_BN, (None, None), "BN")
    check_floating("noise", noise_BN, tuple(logits_BN.shape), "BN")
    check_same_device("noise", noise_BN, logits_BN.device)
    _check_num_visible(num_visible, logits_BN.shape[1])
    operation = choose(_sample_visible, impl, logits_BN.device)
    return TokenSplit(*operation(logits_BN.detach(), noise_BN.detach(), num_visible))


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


def _check_num_visible(num_visible: int, num_tokens: int) -> None:
    if not 1 <= num_visible <= num_tokens:
        raise ValueError(f"num_visible={num_visible}: choose 1 to {num_tokens}, the number of tokens")


def gumbel_noise(
    shape: Sequence[int], *, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensor:
    """Return fp32 Gumbel(0, 1) noise, -log(Exponential(1)), always finite.

    ``generator`` must live on ``device``; torch's global one is used if it is None. An exponential number that
    underflows to 0 counts as the smallest normal one, so noise stays below 88.
    """
    exponential = torch.empty(tuple(shape), dtype=torch.float32, device=device).exponential_(generator=generator)
    return exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_()
