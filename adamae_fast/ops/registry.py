"""How an operation meets PyTorch's dispatcher, and the argument checks that several operations share.

The dispatcher is the registry of back ends. Python defines each schema once and registers a reference that runs
anywhere (``CompositeExplicitAutograd``) and a fake for tracing. The C++ library adds the ``CPU`` key of the same
schema, the Triton kernels the ``CUDA`` key, and the dispatcher then prefers them by itself. Other overloads of an
operation hold one implementation alone, for those who ask for it by name, in the backward and in a compiled graph too:
``reference``, ``triton``, and ``cuda`` where there is CUDA C++.

Who checks what: the public functions check shapes, dtypes and devices at once, on every device and while tracing. The
*values* of ids are checked by the implementations, because only they see real numbers: the references do it for ids
on the CPU, while on CUDA reading a value back would stall the stream, so that a check there belongs in the kernel.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch._ops import OpOverload

from adamae_fast.ops import library, triton_kernels

_logger = logging.getLogger("adamae_fast")

Impl = Literal["auto", "triton", "cuda", "cpp", "reference"]
"""Which implementation runs: the dispatcher's choice (C++ on the CPU, Triton on CUDA devices), or the named one and no
other."""

NAMESPACE = "adamae_fast"
"""Every operation is ``torch.ops.adamae_fast.<name>``."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

_library = torch.library.Library(NAMESPACE, "DEF")
_overloads: dict[OpOverload, dict[str, OpOverload]] = {}
_reasons_no_cpp: dict[OpOverload, str] = {}
_logged: set[tuple[OpOverload, str]] = set()


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    composed: Callable[..., Any] | None = None,
    has_cuda: bool = False,
) -> OpOverload:
    """Define an operation, register what runs it where nothing faster is registered, and return it, bound once.

    ``reference`` must return fresh contiguous tensors for inputs of any strides, as kernels do; ``fake`` says their
    shapes and dtypes. ``composed`` runs in place of the reference unless that is asked for: the same formula through
    other operations, of which some may have a faster implementation; such an operation has no kernel of its own.
    ``has_cuda`` says that csrc/ has a version in CUDA C++.
    """
    name, _, arguments = schema.partition("(")
    kernels = (
        {} if composed else {"": triton_kernels.or_reference(name, reference), "triton": triton_kernels.only(name)}
    )
    names = ["", "reference", *(["triton"] if kernels else []), *(["cuda"] if has_cuda else [])]
    for overload in names:
        qualified = f"{name}.{overload}".removesuffix(".")
        _library.define(f"{qualified}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=_library)
        if overload in kernels:
            _library.impl(qualified, kernels[overload], "CUDA")
    _library.impl(name, composed or reference, "CompositeExplicitAutograd")
    _library.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    operation: OpOverload = packet.default
    _overloads[operation] = {overload: getattr(packet, overload or "default") for overload in names}
    has_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    _reasons_no_cpp[operation] = library.reason_missing or ("" if has_cpp else _NO_KERNEL.format("C++"))
    return operation


_NO_KERNEL = "it has no {} implementation of its own; pass impl='auto'"


def register_autograd(operation: OpOverload, function: type[torch.autograd.Function]) -> None:
    """Let ``function`` stand for ``operation`` where gradients are recorded.

    Its forward gets the overload that was called before the operation's own arguments, and must call it again inside
    ``torch._C._AutoDispatchBelowAutograd()``. This is about half the overhead per call of
    ``torch.library.register_autograd``.
    """
    for overload in _overloads[operation].values():
        _library.impl(overload, partial(function.apply, overload), "Autograd")


def like(overload: OpOverload, operation: OpOverload) -> OpOverload:
    """``operation`` as the implementation that ``overload`` is: a reference's backward is a reference, too."""
    return _overloads[operation][overload._overloadname.replace("default", "")]


def choose(operation: OpOverload, impl: Impl, device: torch.device) -> OpOverload:
    """Return the overload to call for ``impl``. Raises ValueError with the reason if it cannot run: none falls back."""
    if impl == "auto":
        # Logging would break a graph in two while it is compiled.
        if not torch.compiler.is_compiling():
            _log_choice(operation, device.type)
        return operation
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Impl))}")
    reason = _reason_unsupported(operation, impl, device)
    if reason:
        raise ValueError(f"impl={impl!r} of {operation} cannot run: {reason}")
    return _overloads[operation]["" if impl == "cpp" else impl]


def _reason_unsupported(operation: OpOverload, impl: Impl, device: torch.device) -> str | None:
    """Why the named implementation cannot run on ``device``; None or empty if it can."""
    if impl == "reference":
        return None
    # Whether there is one comes first: other tensors would not help where there is none.
    if impl == "cpp" and _reasons_no_cpp[operation]:
        return _reasons_no_cpp[operation]
    if impl != "cpp" and impl not in _overloads[operation]:
        return _NO_KERNEL.format("Triton" if impl == "triton" else "CUDA C++")
    wanted = "cpu" if impl == "cpp" else "cuda"
    if device.type != wanted:
        return f"it takes {wanted.upper()} tensors, these are on {device}; pass impl='auto'"
    if impl == "cpp":
        return None
    return triton_kernels.reason_missing() if impl == "triton" else library.reason_missing_cuda


def _log_choice(operation: OpOverload, device_type: str) -> None:
    if (operation, device_type) not in _logged:
        _logged.add((operation, device_type))
        choice = "reference"
        if device_type == "cpu" and not _reasons_no_cpp[operation]:
            choice = "cpp"
        if device_type == "cuda" and "triton" in _overloads[operation] and not triton_kernels.reason_missing():
            choice = "triton"
        _logger.debug("%s on %s: %s", operation, device_type, choice)


def registered_names() -> list[str]:
    """Names of all operations of this project that the dispatcher knows, sorted."""
    prefix = f"{NAMESPACE}::"
    names = [n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)]
    return sorted({name.partition(".")[0] for name in names})


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums run: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``tensor`` runs: autocast's where it is on (never for float64)."""
    device_type = tensor.device.type
    enabled = _has_autocast(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled and tensor.dtype != torch.float64 else tensor.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A region in which products run in the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


def _has_autocast(device_type: str) -> bool:
    """Whether autocast may be asked about: not for the meta device. torch.compile of 2.11 cannot trace torch's own."""
    return device_type != "meta"


def names_wrong_types(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a public function that fails say which argument has the wrong type, if one has: ValueError with the remedy.

    Types are looked at after a failure alone, so that calls with the right ones do not pay for it.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            message = None if torch.compiler.is_compiling() else _wrong_type(function, args, kwargs)
            if message is None:
                raise
            raise ValueError(message) from error

    return call


_REMEDIES: dict[object, tuple[Callable[[object], bool], str]] = {
    Tensor: (lambda x: isinstance(x, Tensor), "a torch.Tensor; torch.as_tensor makes one of lists and arrays"),
    int: (lambda x: hasattr(x, "__index__"), "an int"),
    str: (lambda x: isinstance(x, str), "a string"),
    torch.dtype: (lambda x: isinstance(x, torch.dtype), "a torch.dtype such as torch.float32"),
}
"""By annotation: whether a value fits, and what to pass. Choices are not here: their own checks list them."""


def _wrong_type(function: Callable[..., Any], args: Sequence[object], kwargs: Mapping[str, object]) -> str | None:
    """What is wrong with the first argument that is not what its annotation says; None where each is."""
    try:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # Python's own message names what is missing
        return None
    annotations = get_type_hints(function)
    for key, value in arguments.items():
        fits, remedy = _REMEDIES.get(annotations[key], (None, ""))
        if fits is not None and not fits(value):
            name = re.sub("_[A-Z][A-Za-z]*$", "", key)  # without the shape
            return f"{name} of {function.__name__} is a {type(value).__name__}; pass {remedy}"
    return None


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device, for error messages."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def check_floating(name: str, tensor: Tensor, shape: Sequence[int | None], letters: str) -> None:
    """Raise ValueError unless ``tensor`` is floating point and has ``shape`` (None: any size)."""
    fits = tensor.is_floating_point() and tensor.dim() == len(shape)
    if fits:
        # A plain loop: a generator costs a microsecond more, a tenth of what a small operation takes.
        for wanted, size in zip(shape, tensor.shape, strict=True):
            fits = fits and (wanted is None or wanted == size)
    if not fits:
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


def check_ascending_ids(name: str, ids: Tensor, num_tokens: int) -> None:
    """Raise ValueError as :func:`check_id_range` does, or if the ids of a clip do not ascend from each to the next."""
    check_id_range(name, ids, num_tokens)
    if ids.device.type == "cpu":
        values = ids.numpy()
        clips, places = (values[:, 1:] <= values[:, :-1]).nonzero()
        if clips.size:
            clip, place = clips[0], places[0] + 1
            raise ValueError(
                f"{name} of clip {clip} are not ascending: {values[clip, place]} at place {place} follows "
                f"{values[clip, place - 1]}; pass ids as TokenSplit has them, ascending and distinct"
            )
