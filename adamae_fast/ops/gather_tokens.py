"""Take the visible tokens of each clip and add their positions (paper section 3.1, encoder input).

    out[b, k] = tokens[b, ids[b, k]] + positions[ids[b, k]]
    backward: grad_tokens[b, n] = grad[b, slots[b, n]] if slots[b, n] < K else 0

``slots`` is the inverse map of the split, so the backward writes every row once: no atomics, no zero fill.

Letters: B clips, N tokens, K visible, D encoder width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from adamae_fast.ops.registry import (
    Impl,
    accumulate_dtype,
    check_ascending_ids,
    check_floating,
    check_id_range,
    check_ids,
    check_same_device,
    choose,
    describe,
    like,
    names_wrong_types,
    register,
    register_autograd,
)

_SCHEMA = "gather_tokens(Tensor tokens, Tensor ids, Tensor slots, Tensor positions) -> Tensor"
_BACKWARD_SCHEMA = "gather_tokens_backward(Tensor grad, Tensor slots) -> Tensor"


def _reference(tokens_BND: Tensor, ids_BK: Tensor, slots_BN: Tensor, positions_ND: Tensor) -> Tensor:
    check_ascending_ids("ids", ids_BK, tokens_BND.shape[1])
    compute = accumulate_dtype(tokens_BND.dtype)
    picked_BKD = tokens_BND.gather(1, ids_BK.unsqueeze(2).expand(-1, -1, tokens_BND.shape[2]))
    return (picked_BKD.to(compute) + positions_ND[ids_BK].to(compute)).to(tokens_BND.dtype)


def _backward_reference(grad_BKD: Tensor, slots_BN: Tensor) -> Tensor:
    _, num_visible, width = grad_BKD.shape
    check_id_range("slots", slots_BN, slots_BN.shape[1])
    # Masked tokens read the last visible row, which the where then replaces by zero. A negative slot on a device, where
    # no value is looked at, reads the first one and comes to zero, too, as in the kernel.
    rows_BND = grad_BKD.gather(1, slots_BN.clamp(0, num_visible - 1).unsqueeze(2).expand(-1, -1, width))
    is_visible_BN = (slots_BN >= 0) & (slots_BN < num_visible)
    return torch.where(is_visible_BN.unsqueeze(2), rows_BND, 0).contiguous()


def _fake(tokens_BND: Tensor, ids_BK: Tensor, slots_BN: Tensor, positions_ND: Tensor) -> Tensor:
    return tokens_BND.new_empty((*ids_BK.shape, tokens_BND.shape[2]))


def _backward_fake(grad_BKD: Tensor, slots_BN: Tensor) -> Tensor:
    return grad_BKD.new_empty((*slots_BN.shape, grad_BKD.shape[2]))


_gather_tokens = register(_SCHEMA, reference=_reference, fake=_fake)
_gather_tokens_backward = register(_BACKWARD_SCHEMA, reference=_backward_reference, fake=_backward_fake)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, overload: OpOverload, tokens_BND: Tensor, ids_BK: Tensor, slots_BN: Tensor, positions_ND: Tensor
    ) -> Tensor:
        ctx.backward_operation = like(overload, _gather_tokens_backward)
        ctx.save_for_backward(slots_BN)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = overload(tokens_BND, ids_BK, slots_BN, positions_ND)
            return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BKD: Tensor) -> tuple[None, Tensor, None, None, None]:
        (slots_BN,) = ctx.saved_tensors
        return None, ctx.backward_operation(grad_BKD, slots_BN), None, None, None


register_autograd(_gather_tokens, _GatherTokens)


@names_wrong_types
def gather_tokens(
    tokens_BND: Tensor, ids_BK: Tensor, slots_BN: Tensor, positions_ND: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Return the tokens ``ids_BK`` with their positions added, (B, K, D), in the tokens' dtype.

    ``ids_BK`` and ``slots_BN`` (int64) come from one :class:`~adamae_fast.ops.sample_visible.TokenSplit`;
    ``positions_ND`` is a fixed table of any floating dtype. The sum runs in fp32 (fp64 for fp64 tokens) and is rounded
    once. Deterministic. Gradient to the tokens only, differentiable once.

    Raises ValueError if shapes, dtypes or devices disagree, the table requires a gradient, ``impl`` cannot run here,
    or, for ids on the CPU, one is out of range or does not ascend. Slots are read in the backward, which raises it for
    one that is not 0 … N - 1 on the CPU and takes it for a masked token's on other devices; it reads no other memory.
    """
    check_floating("tokens", tokens_BND, (None, None, None), "BND")
    batch_size, num_tokens, width = tokens_BND.shape
    check_ids("ids", ids_BK, batch_size, tokens_BND.device)
    check_ids("slots", slots_BN, batch_size, tokens_BND.device)
    if slots_BN.shape[1] != num_tokens:
        raise ValueError(f"slots has {describe(slots_BN)}; pass the slots of the same split, {num_tokens} to a clip")
    if not 1 <= ids_BK.shape[1] <= num_tokens:
        raise ValueError(f"ids has {describe(ids_BK)}; choose 1 to {num_tokens} tokens of each clip")
    check_positions(positions_ND, num_tokens, width, tokens_BND.device)
    result: Tensor = choose(_gather_tokens, impl, tokens_BND.device)(tokens_BND, ids_BK, slots_BN, positions_ND)
    return result


def check_positions(positions_ND: Tensor, num_tokens: int | None, width: int, device: torch.device) -> None:
    """Raise ValueError unless ``positions_ND`` is a fixed floating-point (N, D) table on ``device``; None: any N."""
    check_floating("positions", positions_ND, (num_tokens, width), "ND")
    check_same_device("positions", positions_ND, device)
    if positions_ND.requires_grad:
        raise ValueError("positions requires a gradient, but the table is fixed; add learned positions separately")
