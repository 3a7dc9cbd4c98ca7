"""A pytest plugin: for the rest of the process the Triton kernels are the CPU's implementation, and memory is poisoned.

Load it with ``-p tests.kernels.interpreter`` and ``TRITON_INTERPRET=1``; then every test of the operations is one of
the kernels. fp64, in which the kernels do not sum, goes to the reference.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import triton
from adamae_kernels import LAUNCHERS

from adamae_fast.ops import triton_kernels
from adamae_fast.ops.registry import NAMESPACE

assert os.environ["TRITON_INTERPRET"] == "1", "set before Triton is imported"
assert os.environ["ADAMAE_TESTED_TRITON"] == triton.__version__, f"{triton.__file__} is another Triton"

# Memory that torch hands out holds NaN (the largest number, for ids), so that an element never written shows.
torch.use_deterministic_algorithms(True)
assert torch.zeros(()).new_empty(3).isnan().all()

_library = torch.library.Library(NAMESPACE, "IMPL")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Once the test modules have imported the operations, and with them their schemas."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiled C++ operations give way here, and torch says so
        for name in LAUNCHERS:
            reference = getattr(getattr(torch.ops, NAMESPACE), name).reference
            _library.impl(name, triton_kernels.or_reference(name, reference), "CPU", allow_override=True)
