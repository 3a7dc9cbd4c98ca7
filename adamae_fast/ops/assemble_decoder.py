"""Build the decoder's input: visible tokens first, then one mask token for every masked token (paper section 3.1).

    out[b, k]     = visible[b, k] + positions[visible_ids[b, k]]
    out[b, K + m] = mask_token    + positions[masked_ids[b, m]]

Tokens are not shuffled back to their places in the clip; their positions tell the decoder where they belong.

M is at most N − K: a decoder may be given a part of the masked tokens alone, and its input then has fewer rows.

Letters: B clips, N tokens, K visible, M masked, R = K + M rows, E decoder width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from adamae_fast.ops.gather_tokens import check_positions
from adamae_fast.ops.registry import (
    Impl,
    accumulate_dtype,
    check_ascending_ids,
    check_floating,
    check_ids,
    check_same_device,
    choose,
    describe,
    like,
    names_wrong_types,
    register,
    register_autograd,
)

_SCHEMA = (
    "assemble_decoder(Tensor visible, Tensor mask_token, Tensor positions, Tensor visible_ids, Tensor masked_ids)"
    " -> Tensor"
)
_BACKWARD_SCHEMA = (
    "assemble_decoder_backward(Tensor grad, SymInt num_visible, ScalarType mask_token_dtype) -> (Tensor, Tensor)"
)


def _reference(
    visible_BKE: Tensor, mask_token_E: Tensor, positions_NE: Tensor, visible_ids_BK: Tensor, masked_ids_BM: Tensor
) -> Tensor:
    check_ascending_ids("visible_ids", visible_ids_BK, positions_NE.shape[0])
    check_ascending_ids("masked_ids", masked_ids_BM, positions_NE.shape[0])
    compute = accumulate_dtype(visible_BKE.dtype)
    visible = visible_BKE.to(compute) + positions_NE[visible_ids_BK].to(compute)
    masked = mask_token_E.to(compute) + positions_NE[masked_ids_BM].to(compute)
    return torch.cat([visible, masked], dim=1).to(visible_BKE.dtype)


def _backward_reference(grad_BRE: Tensor, num_visible: int, mask_token_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(accumulate_dtype(grad_BRE.dtype), mask_token_dtype)
    grad_visible_BKE = grad_BRE[:, :num_visible].clone(memory_format=torch.contiguous_format)
    grad_mask_token_E = grad_BRE[:, num_visible:].sum((0, 1), dtype=compute)
    return grad_visible_BKE, grad_mask_token_E.to(mask_token_dtype)


def _fake(
    visible_BKE: Tensor, mask_token_E: Tensor, positions_NE: Tensor, visible_ids_BK: Tensor, masked_ids_BM: Tensor
) -> Tensor:
    batch_size, num_visible, width = visible_BKE.shape
    return visible_BKE.new_empty((batch_size, num_visible + masked_ids_BM.shape[1], width))


def _backward_fake(grad_BRE: Tensor, num_visible: int, mask_token_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch_size, _, width = grad_BRE.shape
    return grad_BRE.new_empty((batch_size, num_visible, width)), grad_BRE.new_empty((width,), dtype=mask_token_dtype)


_assemble_decoder = register(_SCHEMA, reference=_reference, fake=_fake)
_assemble_decoder_backward = register(_BACKWARD_SCHEMA, reference=_backward_reference, fake=_backward_fake)


class _AssembleDecoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        overload: OpOverload,
        visible_BKE: Tensor,
        mask_token_E: Tensor,
        positions_NE: Tensor,
        visible_ids_BK: Tensor,
        masked_ids_BM: Tensor,
    ) -> Tensor:
        ctx.backward_operation = like(overload, _assemble_decoder_backward)
        ctx.num_visible = visible_BKE.shape[1]
        ctx.mask_token_dtype = mask_token_E.dtype
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = overload(visible_BKE, mask_token_E, positions_NE, visible_ids_BK, masked_ids_BM)
            return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BRE: Tensor) -> tuple[None, Tensor, Tensor, None, None, None]:
        grad_visible_BKE, grad_mask_token_E = ctx.backward_operation(grad_BRE, ctx.num_visible, ctx.mask_token_dtype)
        return None, grad_visible_BKE, grad_mask_token_E, None, None, None


register_autograd(_assemble_decoder, _AssembleDecoder)


@names_wrong_types
def assemble_decoder(
    visible_BKE: Tensor,
    mask_token_E: Tensor,
    positions_NE: Tensor,
    visible_ids_BK: Tensor,
    masked_ids_BM: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return the decoder's input (B, K + M, E) in ``visible_BKE``'s dtype.

    ``mask_token_E`` and the fixed table ``positions_NE`` may be of another floating dtype (fp32 parameters under
    autocast); ids are int64, as :class:`~adamae_fast.ops.sample_visible.TokenSplit` gives them. Sums run in fp32 (fp64
    for fp64) and are rounded once, the mask token's gradient too. Gradients to ``visible_BKE`` and ``mask_token_E``,
    differentiable once. Deterministic.

    Raises ValueError if shapes, dtypes or devices disagree, K + M is more than N, the table requires a gradient,
    ``impl`` cannot run here, or, for ids on the CPU, one is out of range or does not ascend.
    """
    check_floating("visible", visible_BKE, (None, None, None), "BKE")
    batch_size, num_visible, width = visible_BKE.shape
    device = visible_BKE.device
    check_floating("mask_token", mask_token_E, (width,), "E")
    check_same_device("mask_token", mask_token_E, device)
    check_ids("visible_ids", visible_ids_BK, batch_size, device)
    check_ids("masked_ids", masked_ids_BM, batch_size, device)
    if visible_ids_BK.shape[1] != num_visible:
        raise ValueError(
            f"visible_ids has {describe(visible_ids_BK)}; pass the ids of the {num_visible} visible tokens of each clip"
        )
    check_positions(positions_NE, None, width, device)
    num_rows = num_visible + masked_ids_BM.shape[1]
    if num_rows > positions_NE.shape[0]:
        raise ValueError(
            f"positions has {describe(positions_NE)}; {num_visible} visible and {masked_ids_BM.shape[1]} masked tokens "
            f"need a table of at least {num_rows} tokens"
        )
    operation = choose(_assemble_decoder, impl, device)
    result: Tensor = operation(visible_BKE, mask_token_E, positions_NE, visible_ids_BK, masked_ids_BM)
    return result
