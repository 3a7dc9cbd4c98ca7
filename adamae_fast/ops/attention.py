"""Softmax attention over all tokens, through whichever back end fits the inputs.

    out[b, n, h] = Σ_m softmax_m(q[b, n, h] · k[b, m, h] / sqrt(d)) v[b, m, h]

Each back end says why it cannot take given inputs, if it cannot; "auto" takes the first that can and logs its choice.

Letters: B clips, N tokens, H heads, d channels of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adamae_fast.ops.registry import accumulate_dtype, describe, without_autocast

_logger = logging.getLogger("adamae_fast")


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """One way to compute attention."""

    name: str
    """What ``attention(backend=...)`` calls it."""

    reasons_unsupported: Callable[[Tensor, Tensor, Tensor], list[str]]
    """Why it cannot take (q, k, v), each with the value that is in the way; empty if it can."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Computes the result of inputs that it supports; (B, N, H, d) in and out."""


def _reasons_any(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> list[str]:
    """What no back end can take."""
    reasons = []
    if not q_BNHd.is_floating_point():
        reasons.append(f"q is {q_BNHd.dtype}, attention needs a floating-point dtype")
    for name, tensor in (("k", k_BNHd), ("v", v_BNHd)):
        if tensor.dtype != q_BNHd.dtype:
            reasons.append(f"{name} is {tensor.dtype} but q is {q_BNHd.dtype}")
        if tensor.device != q_BNHd.device:
            reasons.append(f"{name} is on {tensor.device} but q is on {q_BNHd.device}")
    return reasons


def _sdpa(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> Tensor:
    """PyTorch's fused attention, which picks among its own kernels."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BNHd, k_BNHd, v_BNHd))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _reference(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> Tensor:
    """The formula in fp32 (fp64 for fp64), rounded once; keeps an N × N matrix for each head."""
    dtype = accumulate_dtype(q_BNHd.dtype)
    # Autocast would run the two products in half precision.
    with without_autocast(q_BNHd.device):
        q, k, v = (tensor.to(dtype).transpose(1, 2) for tensor in (q_BNHd, k_BNHd, v_BNHd))
        weights_BHNN = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3)
        return (weights_BHNN @ v).transpose(1, 2).to(q_BNHd.dtype)


BACKENDS = (
    AttentionBackend(name="sdpa", reasons_unsupported=_reasons_any, run=_sdpa),
    AttentionBackend(name="reference", reasons_unsupported=_reasons_any, run=_reference),
)
"""All back ends, the preferred one first."""

_logged: set[tuple[object, ...]] = set()


def _log_choice(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> None:
    if (device_type, dtype, head_dim) not in _logged:
        _logged.add((device_type, dtype, head_dim))
        _logger.debug("attention on %s, %s, head dim %d: %s", device_type, dtype, head_dim, name)


def attention(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor, *, backend: str = "auto") -> Tensor:
    """Return softmax(q · kᵀ / sqrt(d)) · v for each head, (B, N, H, d) in the inputs' dtype; no mask, no dropout.

    Inputs are (B, N, H, d) of any strides, floating point. ``backend`` is "auto" or a name in :data:`BACKENDS`; a name
    never falls back to another back end. "auto" logs its choice once for each device type, dtype and head dim.
    Differentiable in all three; whether runs repeat bit by bit is the back end's property ("reference" does).

    Raises ValueError if shapes differ, ``backend`` is unknown, or it (for "auto": every back end) cannot take the
    inputs; the message gives each reason.
    """
    if q_BNHd.dim() != 4 or not q_BNHd.shape == k_BNHd.shape == v_BNHd.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q_BNHd, k_BNHd, v_BNHd))
        raise ValueError(f"q, k, v have shapes {shapes}; pass three tensors of one shape (B, N, heads, d)")
    candidates = [candidate for candidate in BACKENDS if backend in ("auto", candidate.name)]
    if not candidates:
        raise ValueError(f"backend={backend!r}: choose auto or one of {', '.join(b.name for b in BACKENDS)}")
    refusals = []
    for candidate in candidates:
        reasons = candidate.reasons_unsupported(q_BNHd, k_BNHd, v_BNHd)
        if not reasons:
            # Logging would break a graph in two while it is compiled.
            if backend == "auto" and not torch.compiler.is_compiling():
                _log_choice(candidate.name, q_BNHd.device.type, q_BNHd.dtype, q_BNHd.shape[3])
            return candidate.run(q_BNHd, k_BNHd, v_BNHd)
        refusals.append(f"{candidate.name}: {'; '.join(reasons)}")
    raise ValueError(f"no attention back end takes q of {describe(q_BNHd)}. {'. '.join(refusals)}")
