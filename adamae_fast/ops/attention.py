"""Softmax attention over all tokens, through whichever back end fits the inputs.

    out[b, n, h] = Σ_m softmax_m(q[b, n, h] · k[b, m, h] / sqrt(d)) v[b, m, h]

Each back end (``attention_backends.py``) says why it cannot take given inputs, if it cannot; "auto" takes the first of
:data:`PREFERENCES` that can and logs its choice.

Letters: B clips, N tokens, H heads, d channels of a head.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from adamae_fast.ops.attention_backends import BACKENDS, AttentionProblem, mismatches, problem_of
from adamae_fast.ops.registry import describe, names_wrong_types

_logger = logging.getLogger("adamae_fast")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One row: which back ends to try, in order, for some GPUs and shapes."""

    generations: tuple[str, ...]
    """What :func:`generation` may say."""

    tokens_from: int = 0
    """The smallest N."""

    head_dim_to: int | None = None
    """The largest d; any if None."""

    order: tuple[str, ...]

    def fits(self, problem: AttentionProblem) -> bool:
        """Whether the row is meant for ``problem``."""
        is_narrow = self.head_dim_to is None or problem.head_dim <= self.head_dim_to
        return generation(problem.device) in self.generations and problem.num_tokens >= self.tokens_from and is_narrow


PREFERENCES = (
    # Sampler (1568, 96) and decoder (1568, 64). No row for a GPU is measured yet; the order is a guess: that cuDNN is
    # fastest for long sequences on Hopper and PyTorch's flash for short ones, with 512 somewhere between 78 and 1568;
    # that Blackwell is another Hopper and Ada another Ampere. flash_attn_2 stands before sdpa_flash as the newer build
    # of one kernel, and xformers behind the kernels that it would itself choose from.
    Preference(
        generations=("hopper",),
        tokens_from=512,
        head_dim_to=128,
        order=("sdpa_cudnn", "flash_attn_3", "flash_attn_2", "sdpa_flash", "sdpa_efficient", "xformers"),
    ),
    Preference(
        generations=("blackwell",),
        tokens_from=512,
        head_dim_to=128,
        order=("sdpa_cudnn", "flash_attn_2", "sdpa_flash", "sdpa_efficient", "xformers"),
    ),
    Preference(
        generations=("ampere", "ada"),
        tokens_from=512,
        order=("flash_attn_2", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "xformers"),
    ),
    # Encoder (78, 64), and heads wider than the first rows speak of: PyTorch's own flash, called with the least Python.
    Preference(
        generations=("ampere", "ada", "hopper", "blackwell"),
        order=("sdpa_flash", "flash_attn_2", "sdpa_efficient", "sdpa_cudnn", "flash_attn_3", "xformers"),
    ),
    # Measured against the reference: bench/LOG.md.
    Preference(generations=("cpu",), order=("sdpa",)),
)
"""The first row that fits decides. PyTorch's own choice ("sdpa") and, last, the reference follow each row."""

_LAST = ("sdpa", "reference")


def generation(device: torch.device) -> str:
    """Return the kind of hardware: cpu, ampere, ada, hopper, blackwell (of data centres), or other."""
    if device.type != "cuda":
        return "cpu" if device.type == "cpu" else "other"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "ada" if minor == 9 else "ampere"
    return {9: "hopper", 10: "blackwell"}.get(major, "other")


def preferred(problem: AttentionProblem) -> tuple[str, ...]:
    """Return the names of the back ends that "auto" tries, in order."""
    row = next((row.order for row in PREFERENCES if row.fits(problem)), ())
    return tuple(dict.fromkeys((*row, *_LAST)))


@functools.cache
def choose_attention(problem: AttentionProblem, backend: str = "auto") -> tuple[str | None, str]:
    """Return the name of the back end that will run, or None, and why the ones before it cannot.

    The answer is kept for each problem and back end. "auto" logs its choice, as a warning where it comes down to the
    reference, the only one that stores N × N.
    """
    refusals: list[str] = []
    for name in preferred(problem) if backend == "auto" else (backend,):
        reasons = BACKENDS[name].reasons(problem)
        if not reasons:
            if backend == "auto":
                _log_choice(problem, name, refusals)
            return name, ". ".join(refusals)
        refusals.append(f"{name}: {'; '.join(reasons)}")
    return None, ". ".join(refusals)


def _log_choice(problem: AttentionProblem, name: str, refusals: list[str]) -> None:
    level, why = logging.DEBUG, ""
    if name == "reference":
        level, why = logging.WARNING, f", which stores N × N for each head, because of {'. '.join(refusals)}"
    _logger.log(level, "attention of %s: %s%s", problem, name, why)


def _choose(
    device: torch.device, dtype: torch.dtype, num_tokens: int, head_dim: int, needs_grad: bool, backend: str
) -> tuple[str | None, str]:
    return choose_attention(AttentionProblem(device, dtype, num_tokens, head_dim, needs_grad), backend)


# While a graph is compiled it runs once, as it is, and its answer becomes a constant of the graph. This is all that
# torch.compiler.assume_constant_result does, but for importing the whole compiler.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@names_wrong_types
def attention(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor, *, backend: str = "auto") -> Tensor:
    """Return softmax(q · kᵀ / sqrt(d)) · v for each head, (B, N, H, d) in the inputs' dtype; no mask, no dropout.

    Inputs are (B, N, H, d) of any strides, floating point. Where autocast is on, the result has its dtype, except that
    "reference" keeps the inputs'. ``backend`` is "auto" or a name in :data:`BACKENDS`; a name never falls back to
    another back end. "auto" follows :data:`PREFERENCES` and logs its choice once for each :class:`AttentionProblem`.
    Differentiable in all three; whether runs repeat bit by bit is the back end's property ("reference" does).

    Raises ValueError if shapes differ, ``backend`` is unknown, or it (for "auto": every back end) cannot take the
    inputs; the message gives each reason.
    """
    if q_BNHd.dim() != 4 or not q_BNHd.shape == k_BNHd.shape == v_BNHd.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q_BNHd, k_BNHd, v_BNHd))
        raise ValueError(f"q, k, v have shapes {shapes}; pass three tensors of one shape (B, N, heads, d)")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose auto or one of {', '.join(BACKENDS)}")
    reasons = mismatches(q_BNHd, k_BNHd, v_BNHd)
    if reasons:
        name, refusals = None, "; ".join(reasons)
    else:
        p = problem_of(q_BNHd, k_BNHd, v_BNHd)
        name, refusals = _choose(p.device, p.dtype, p.num_tokens, p.head_dim, p.needs_grad, backend)
    if name is None:
        forced = backend != "auto" and not reasons
        remedy = "choose auto" if forced else "pass floating-point tensors of one dtype on one device"
        raise ValueError(f"no attention back end takes q of {describe(q_BNHd)}. {refusals}; {remedy}")
    return BACKENDS[name].run(q_BNHd, k_BNHd, v_BNHd)
