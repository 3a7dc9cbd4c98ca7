"""How tensors on CUDA devices reach the Triton kernels of ``adamae_kernels``, which are imported at the first call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_logger = logging.getLogger("adamae_fast")


@cache
def reason_missing() -> str | None:
    """Why the kernels cannot be used; None if they can. Imports Triton at the first call."""
    try:
        import adamae_kernels  # noqa: F401
    except ImportError as error:
        return f"Triton is not usable ({error}): pip install triton"
    return None


def only(name: str) -> Callable[..., Any]:
    """The kernel of operation ``name``. Called with fp64 or without Triton, it raises ValueError."""

    def run(*arguments: object) -> Any:
        reason = reason_missing()
        if reason or _is_fp64(arguments):
            raise ValueError(
                f"impl='triton' of {name} cannot run: "
                f"{reason or 'its kernels take fp16, bf16 and fp32, not fp64; convert the input, or pass impl=auto'}"
            )
        return _launch(name, arguments)

    return run


def or_reference(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of operation ``name``, or ``reference`` for fp64 and, with a warning, where Triton is missing."""

    def run(*arguments: object) -> Any:
        if _is_fp64(arguments):
            return reference(*arguments)
        if reason_missing():
            _warn_once()
            return reference(*arguments)
        return _launch(name, arguments)

    return run


def _launch(name: str, arguments: tuple[Any, ...]) -> Any:
    from adamae_kernels import LAUNCHERS

    # Triton launches on the current device, whatever the device of its arguments.
    with torch.cuda.device_of(arguments[0]):
        return LAUNCHERS[name](*arguments)


def _is_fp64(arguments: tuple[object, ...]) -> bool:
    """Whether a tensor among the arguments, or the dtype that they ask for, is fp64."""
    return torch.float64 in (x.dtype if isinstance(x, torch.Tensor) else x for x in arguments)


@cache
def _warn_once() -> None:
    _logger.warning("Triton kernels are not used, the slower references are: %s", reason_missing())
