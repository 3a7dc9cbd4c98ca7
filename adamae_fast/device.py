"""Where a run computes, and in which arithmetic."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from adamae_fast.config import Precision

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, key: str = "device") -> torch.device:
    """Return the device that ``name`` means: auto, cpu, cuda or cuda:N. Raises ValueError that names ``key``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{key}={name!r}: choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{key}={name!r}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{key}={name!r}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use; "
            "choose another, or cpu"
        )
    return device


def make_current(device: torch.device) -> None:
    """Let this be the device of CUDA calls that name none. One without a number is the current one already."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def describe_device(device: torch.device) -> str:
    """Return the device in words, and for a CPU why it is not a GPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if torch.cuda.is_available():
        return "cpu"
    return "cpu (this torch is built without CUDA)" if torch.version.cuda is None else "cpu (torch finds no GPU)"


def num_usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def arithmetic(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context in which the forward pass runs: autocast for bf16 and fp16, nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def product_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype in which :func:`arithmetic` lets matrix products run."""
    return _AUTOCAST.get(precision, torch.float32)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``. The host does not wait: a copy from pinned memory can be left alone."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Uploader:
    """Copies to ``device`` while that computes: a GPU copies in a stream of its own, beside the step under way.

    The loop runs ahead of the GPU, so that by the time of its step the batch is there. Elsewhere this is
    :func:`upload`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` on the device; what the current stream does from now on sees it. The host does not wait."""
        if self._stream is None or tensor.device.type != "cpu":
            return upload(tensor, self._device)
        with torch.cuda.stream(self._stream):
            copy = upload(tensor, self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        copy.record_stream(current)  # its memory belongs to the other stream, which must not use it again before
        return copy


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest allocation so far: of the GPU's allocator, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
