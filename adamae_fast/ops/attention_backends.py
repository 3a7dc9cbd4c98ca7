"""The ways to compute attention: why each cannot take given inputs, and how it is called.

What can be taken follows from an :class:`AttentionProblem`: nothing here looks at a tensor's values, and nothing waits
for a device. Only "reference" stores an N × N matrix; PyTorch's own "math" kernel, which would, is never allowed.

Letters: B clips, N tokens, H heads, d channels of a head.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adamae_fast.ops.registry import accumulate_dtype, autocast_dtype, without_autocast

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionProblem:
    """All that decides which back ends can run."""

    device: torch.device
    dtype: torch.dtype
    """In which the products run: autocast's where that is on."""
    num_tokens: int
    head_dim: int
    needs_grad: bool
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    """Whether PyTorch was told to use nothing whose runs differ."""

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens of {self.head_dim} channels a head, {self.dtype}, {self.device}"


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """One way to compute attention."""

    name: str
    """What ``attention(backend=...)`` calls it."""

    reasons: Callable[[AttentionProblem], list[str]]
    """Why it cannot solve a problem, each with the value that is in the way; empty if it can."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Computes the result of inputs that it supports; (B, N, H, d) in and out."""

    def reasons_unsupported(self, q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> list[str]:
        """Return why it cannot take these inputs, each with the value that is in the way; empty if it can."""
        return mismatches(q_BNHd, k_BNHd, v_BNHd) or self.reasons(problem_of(q_BNHd, k_BNHd, v_BNHd))


def problem_of(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> AttentionProblem:
    """What the inputs ask for."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BNHd, k_BNHd, v_BNHd))
    # N and d decide, so a compiled graph that keeps sizes open is settled on them by operator.index; B stays open.
    num_tokens, head_dim = operator.index(q_BNHd.shape[1]), operator.index(q_BNHd.shape[3])
    return AttentionProblem(q_BNHd.device, autocast_dtype(q_BNHd), num_tokens, head_dim, needs_grad)


def mismatches(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> list[str]:
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


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inputs as every fused kernel wants them: each token's channels side by side, in the dtype of the products.

    Views of one projection to q, k and v are so already and stay views. Given other strides PyTorch would fall back to
    its kernel that stores N × N, on the CPU too, even for a last dimension of size 1, which ``contiguous()`` skips.
    """
    dtype = autocast_dtype(tensors[0])
    cast = (x.to(dtype) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format) for x in cast)


# ---- limits that several share


def _reasons_cuda(
    problem: AttentionProblem,
    dtypes: tuple[torch.dtype, ...],
    lowest: tuple[int, int],
    highest: tuple[int, int] | None = None,
) -> list[str]:
    """``lowest`` and ``highest`` are compute capabilities, both included."""
    reasons = []
    if problem.device.type != "cuda":
        reasons.append(f"it takes CUDA tensors, these are on {problem.device}")
    else:
        has = torch.cuda.get_device_capability(problem.device)
        if has < lowest:
            reasons.append(f"it needs compute capability {_dotted(lowest)}, {problem.device} has {_dotted(has)}")
        if highest is not None and has > highest:
            reasons.append(f"it ends at compute capability {_dotted(highest)}, {problem.device} has {_dotted(has)}")
    if problem.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reasons.append(f"it takes {names}, these are {problem.dtype}")
    return reasons


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _reasons_head_dim(problem: AttentionProblem, multiple: int, largest: int | None) -> list[str]:
    reasons = []
    if problem.head_dim % multiple:
        reasons.append(f"the head width {problem.head_dim} is not a multiple of {multiple}")
    if largest is not None and problem.head_dim > largest:
        reasons.append(f"the head width {problem.head_dim} is above {largest}")
    return reasons


# ---- optional packages


@dataclass(frozen=True)
class Package:
    """Where an optional package keeps its attention, and how it is installed."""

    module: str
    function: str
    distribution: str
    install: str

    def version(self) -> str:
        """The installed version."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "of unknown version"


PACKAGES = {
    "flash_attn_3": Package(
        "flash_attn_interface",
        "flash_attn_func",
        "flash_attn_3",
        "build it from the folder hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    "flash_attn_2": Package(
        "flash_attn",
        "flash_attn_func",
        "flash_attn",
        "pip install flash-attn --no-build-isolation, which compiles it with nvcc",
    ),
    "xformers": Package(
        "xformers.ops", "memory_efficient_attention", "xformers", "pip install xformers==0.0.35 (later ones lack it)"
    ),
}
"""By the name of the back end."""


@functools.cache
def reason_missing(name: str) -> str | None:
    """Why the package of a back end cannot be used, or None. Looks once."""
    package = PACKAGES[name]
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        is_absent = error.name == package.module.partition(".")[0]
        return f"not installed: {package.install}" if is_absent else f"not usable: {error}"
    except Exception as error:  # a binary built for another torch raises anything
        return f"not usable: {type(error).__name__}: {error}"
    if not hasattr(module, package.function):
        return f"{package.distribution} {package.version()} has no {package.function}: {package.install}"
    return None


def _reasons_package(name: str) -> list[str]:
    reason = reason_missing(name)
    return [reason] if reason else []


def _reasons_flash_attn_3(problem: AttentionProblem) -> list[str]:
    reasons = [*_reasons_package("flash_attn_3"), *_reasons_cuda(problem, HALF, (9, 0), (9, 0))]
    return reasons + _reasons_head_dim(problem, 8, 256)


def _reasons_flash_attn_2(problem: AttentionProblem) -> list[str]:
    reasons = [*_reasons_package("flash_attn_2"), *_reasons_cuda(problem, HALF, (8, 0))]
    return reasons + _reasons_head_dim(problem, 8, 256)


def _reasons_xformers(problem: AttentionProblem) -> list[str]:
    reasons = _reasons_package("xformers")
    if problem.dtype == torch.float32:  # its one kernel for it ends at Hopper
        reasons += _reasons_cuda(problem, (torch.float32,), (8, 0), (9, 0))
        return reasons + _reasons_head_dim(problem, 4, None)
    return reasons + _reasons_cuda(problem, (*HALF, torch.float32), (8, 0)) + _reasons_head_dim(problem, 8, 256)


def _flash_attn_3(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    result = flash_attn_func(*_rows(q_BNHd, k_BNHd, v_BNHd))
    return result[0] if isinstance(result, tuple) else result  # its first versions also return the log-sum-exp


def _flash_attn_2(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*_rows(q_BNHd, k_BNHd, v_BNHd))


def _xformers(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*_rows(q_BNHd, k_BNHd, v_BNHd))


# ---- PyTorch's own kernels


def _torch_takes(kind: SDPBackend, problem: AttentionProblem) -> bool:
    """PyTorch's own word, which knows limits of its cuDNN and of its build that are not listed here."""
    can_use = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    }[kind]
    shape = (1, 1, problem.num_tokens, problem.head_dim)
    x = torch.empty(shape, device=problem.device, dtype=problem.dtype, requires_grad=problem.needs_grad)
    with torch.cuda.device(problem.device), sdpa_kernel(kind):
        return can_use(torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, False, False), False)


def _unless_torch_refuses(kind: SDPBackend, problem: AttentionProblem, reasons: list[str]) -> list[str]:
    if reasons or _torch_takes(kind, problem):
        return reasons
    function = {SDPBackend.CUDNN_ATTENTION: "cudnn", SDPBackend.FLASH_ATTENTION: "flash"}.get(kind, "efficient")
    return [
        f"torch.backends.cuda.can_use_{function}_attention of torch {torch.__version__} with cuDNN "
        f"{torch.backends.cudnn.version()} refuses {problem}"
    ]


def _reasons_sdpa_cudnn(problem: AttentionProblem) -> list[str]:
    reasons = _reasons_cuda(problem, HALF, (8, 0))
    if not torch.backends.cudnn.is_available():
        reasons.append(f"torch {torch.__version__} is built without cuDNN")
    if problem.num_tokens < 2:
        reasons.append(f"it takes 2 tokens or more, these are {problem.num_tokens}")
    reasons += _reasons_head_dim(problem, 8, 256)
    return _unless_torch_refuses(SDPBackend.CUDNN_ATTENTION, problem, reasons)


def _reasons_sdpa_flash(problem: AttentionProblem) -> list[str]:
    if problem.device.type == "cpu":
        return []  # the one fused kernel that PyTorch has there; it takes every floating-point dtype and width
    reasons = [*_reasons_cuda(problem, HALF, (8, 0)), *_reasons_head_dim(problem, 1, 256)]
    return _unless_torch_refuses(SDPBackend.FLASH_ATTENTION, problem, reasons)


def _reasons_sdpa_efficient(problem: AttentionProblem) -> list[str]:
    reasons = _reasons_cuda(problem, (*HALF, torch.float32), (8, 0))
    reasons += _reasons_head_dim(problem, 4 if problem.dtype == torch.float32 else 8, None)
    return _unless_torch_refuses(SDPBackend.EFFICIENT_ATTENTION, problem, reasons)


def _reasons_sdpa(problem: AttentionProblem) -> list[str]:
    """It needs one of the three that it may choose from."""
    if problem.device.type not in ("cpu", "cuda"):
        return [f"PyTorch has fused kernels for cpu and cuda, these are on {problem.device}"]
    reasons = []
    for name in ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient"):
        refusals = BACKENDS[name].reasons(problem)
        if not refusals:
            return []
        reasons.append(f"{name.removeprefix('sdpa_')}: {', '.join(refusals)}")
    return reasons


def _sdpa(kinds: list[SDPBackend]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PyTorch's attention through one of ``kinds``, whichever it prefers."""

    def run(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in _rows(q_BNHd, k_BNHd, v_BNHd))
        # Flags of the process, set for this call alone: no device work, and the backward needs none of them.
        with sdpa_kernel(kinds):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


# ---- the formula


def _reference(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor) -> Tensor:
    """The formula in fp32 (fp64 for fp64), rounded once; keeps an N × N matrix for each head."""
    dtype = accumulate_dtype(q_BNHd.dtype)
    # Autocast would run the two products in half precision.
    with without_autocast(q_BNHd.device):
        q, k, v = (tensor.to(dtype).transpose(1, 2) for tensor in (q_BNHd, k_BNHd, v_BNHd))
        weights_BHNN = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3)
        return (weights_BHNN @ v).transpose(1, 2).to(q_BNHd.dtype)


_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

BACKENDS = {
    backend.name: backend
    for backend in (
        AttentionBackend(name="flash_attn_3", reasons=_reasons_flash_attn_3, run=_flash_attn_3),
        AttentionBackend(name="flash_attn_2", reasons=_reasons_flash_attn_2, run=_flash_attn_2),
        AttentionBackend(name="xformers", reasons=_reasons_xformers, run=_xformers),
        AttentionBackend(name="sdpa_cudnn", reasons=_reasons_sdpa_cudnn, run=_sdpa([SDPBackend.CUDNN_ATTENTION])),
        AttentionBackend(name="sdpa_flash", reasons=_reasons_sdpa_flash, run=_sdpa([SDPBackend.FLASH_ATTENTION])),
        AttentionBackend(
            name="sdpa_efficient", reasons=_reasons_sdpa_efficient, run=_sdpa([SDPBackend.EFFICIENT_ATTENTION])
        ),
        AttentionBackend(name="sdpa", reasons=_reasons_sdpa, run=_sdpa(_FUSED)),
        AttentionBackend(name="reference", reasons=lambda problem: [], run=_reference),
    )
}
"""All back ends by name."""
