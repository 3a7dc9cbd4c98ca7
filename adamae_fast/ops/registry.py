"""How an operation meets PyTorch's dispatcher, and the argument checks that several operations share.

The dispatcher is the registry of back ends. Python defines each schema once and registers a reference that runs
anywhere (``CompositeExplicitAutograd``) and a fake for tracing; a compiled library may add the ``CPU`` or ``CUDA`` key
of the same schema later and is then preferred by the dispatcher itself.

Who checks what: the public functions check shapes, dtypes and devices at once, on every device and while tracing. The
*values* of ids are checked by the implementations, because only they see real numbers: the references do it for ids
on the CPU, while on CUDA reading a value back would stall the stream, so that a check there belongs in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload

NAMESPACE = "adamae_fast"
"""Every operation is ``torch.ops.adamae_fast.<name>``."""

_library = torch.library.Library(NAMESPACE, "DEF")


def register(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Define an operation, register what runs it where nothing faster is registered, and return it, bound once.

    ``reference`` must return fresh contiguous tensors for inputs of any strides, as kernels do; ``fake`` says their
    shapes and dtypes.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return cast(OpOverload, getattr(getattr(torch.ops, NAMESPACE), name).default)


def register_autograd(operation: OpOverload, function: type[torch.autograd.Function]) -> None:
    """Let ``function`` stand for ``operation`` where gradients are recorded.

    Its forward must call ``operation`` again inside ``torch._C._AutoDispatchBelowAutograd()``. This is about half the
    overhead per call of ``torch.library.register_autograd``.
    """
    _library.impl(operation._schema.name.partition("::")[2], function.apply, "Autograd")


def registered_names() -> list[str]:
    """Names of all operations of this project that the dispatcher knows, sorted."""
    prefix = f"{NAMESPACE}::"
    return sorted(n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums run: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``tensor`` runs: autocast's where it is on (never for float64)."""
    device_type = tensor.device.type
    # The meta device has no autocast, and asking whether it is enabled there raises.
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled and tensor.dtype != torch.float64 else tensor.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A region in which products run in the dtype of their factors."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device, for error messages."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def check_floating(name: str, tensor: Tensor, shape: Sequence[int | None], letters: str) -> None:
    """Raise ValueError unless ``tensor`` is floating point and has ``shape`` (None: any size)."""
    fits = tensor.dim() == len(shape) and all(s is None or s == t for s, t in zip(shape, tensor.shape, strict=True))
    if not (fits and tensor.is_floating_point()):
        sizes = ", ".join(c if s is None else f"{c}={s}" for c, s in zip(letters, shape, strict=True))
        raise ValueError(f"{name} has {describe(tensor)}; pass a floating-point tensor of shape ({sizes})")


def check_ids(name: str, ids: Tensor, batch_size: int, device: torch.device) -> None:
    """Raise ValueError unless ``ids`` is int64 of shape (``batch_size``, any) on ``device``."""
    if ids.dim() != 2 or ids.shape[0] != batch_size or ids.dtype != torch.int64 or ids.device != device:
        raise ValueError(
            f"{name} has {describe(ids)}; pass int64 token ids with {batch_size} rows, one for each clip, on {device}"
        )


def check_same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` is on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; move it to {device}, where the other arguments are")


def check_id_range(name: str, ids: Tensor, num_tokens: int) -> None:
    """Raise ValueError if an id is outside 0 … ``num_tokens`` - 1. For references; looks at ids on the CPU only.

    It looks through numpy, so that a profile of a step shows no read-back that a GPU would have to wait for.
    """
    if ids.device.type == "cpu" and ids.numel():
        values = ids.numpy()
        low, high = values.min(), values.max()
        if low < 0 or high >= num_tokens:
            raise ValueError(f"{name} reaches from {low} to {high}; {num_tokens} tokens have ids 0 to {num_tokens - 1}")
