"""Each operation is tested in each of its implementations."""

from collections.abc import Iterator

import pytest

from adamae_fast.ops import library
from adamae_fast.testing import prefer

needs_cpp = pytest.mark.skipif(library.reason_missing is not None, reason=f"C++ operations: {library.reason_missing}")


@pytest.fixture(params=["reference", pytest.param("cpp", marks=needs_cpp)])
def impl(request: pytest.FixtureRequest) -> str:
    """ "reference", then "cpp": skipped, with the reason, where the library is not built."""
    return request.param


@pytest.fixture
def each_impl(impl: str) -> Iterator[None]:
    """The public functions called without ``impl`` run each implementation in turn."""
    with prefer("reference" if impl == "reference" else "auto"):
        yield
