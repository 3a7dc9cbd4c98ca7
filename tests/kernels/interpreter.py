"""A pytest plugin: for the rest of the process the Triton kernels are the CPU's implementation, and memory is poisoned.

Load it with ``-p tests.kernels.interpreter`` and ``TRITON_INTERPRET=1``; then every test of the operations is one of
the kernels. fp64, in which the kernels do not sum, goes to the reference.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import pytest
import torch
import triton
from adamae_kernels import LAUNCHERS

from adamae_fast.ops.registry import NAMESPACE

assert os.environ["TRITON_INTERPRET"] == "1", "set before Triton is imported"
assert os.environ["ADAMAE_TESTED_TRITON"] == triton.__version__, f"{triton.__file__} is another Triton"

# Memory that torch hands out holds NaN (the largest number, for ids), so that an element never written shows.
torch.use_deterministic_algorithms(True)
assert torch.zeros(()).new_empty(3).isnan().all()

_library = torch.library.Library(NAMESPACE, "IMPL")


def reference(name: str, *arguments: object) -> object:
    """What the operation gives where nothing but its reference is registered."""
    return getattr(getattr(torch.ops, NAMESPACE), name).reference(*arguments)


def _kernel_or_reference(name: str) -> Callable[..., object]:
    def run(*arguments: object) -> object:
        dtypes = (x.dtype if isinstance(x, torch.Tensor) else x for x in arguments)
        return reference(name, *arguments) if torch.float64 in dtypes else LAUNCHERS[name](*arguments)

    return run


def pytest_collection_finish(session: pytest.Session) -> None:
    """Once the test modules have imported the operations, and with them their schemas."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiled C++ operations give way here, and torch says so
        for name in LAUNCHERS:
            _library.impl(name, _kernel_or_reference(name), "CPU", allow_override=True)
