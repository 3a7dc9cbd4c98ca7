"""Each operation is tested in each of its implementations."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._ops import OpOverload

from adamae_fast.ops import (
    assemble_decoder,
    gather_tokens,
    head_patch_loss,
    library,
    masked_patch_loss,
    patchify,
    registry,
    sample_visible,
    sampling_loss,
)

OPERATIONS = (
    assemble_decoder,
    gather_tokens,
    head_patch_loss,
    masked_patch_loss,
    patchify,
    sample_visible,
    sampling_loss,
)
needs_cpp = pytest.mark.skipif(library.reason_missing is not None, reason=f"C++ operations: {library.reason_missing}")


@pytest.fixture(params=["reference", pytest.param("cpp", marks=needs_cpp)])
def impl(request: pytest.FixtureRequest) -> str:
    """ "reference", then "cpp": skipped, with the reason, where the library is not built."""
    return request.param


@contextmanager
def prefer(impl: str) -> Iterator[None]:
    """The public functions called without ``impl`` run the reference, or with "auto" what the dispatcher prefers."""

    def choose(operation: OpOverload, asked: Any, device: torch.device) -> OpOverload:
        return registry.choose(operation, impl if asked == "auto" else asked, device)

    with ExitStack() as stack:
        for operation in OPERATIONS:
            stack.enter_context(patch.object(operation, "choose", choose))
        yield


@pytest.fixture
def each_impl(impl: str) -> Iterator[None]:
    """The public functions called without ``impl`` run each implementation in turn."""
    with prefer("reference" if impl == "reference" else "auto"):
        yield
