"""Each operation is tested in each of its implementations."""

from collections.abc import Callable
from typing import Any

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


@pytest.fixture
def each_impl(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions called without ``impl`` run the reference, then what the dispatcher prefers."""

    def replacement(choose: Callable[..., OpOverload]) -> Callable[..., OpOverload]:
        def choose_tested(operation: OpOverload, asked: Any, device: torch.device) -> OpOverload:
            return choose(operation, "reference" if asked == "auto" and impl == "reference" else asked, device)

        return choose_tested

    for module in OPERATIONS:
        monkeypatch.setattr(module, "choose", replacement(module.choose))
