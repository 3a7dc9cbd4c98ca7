"""Load the C++ operations, if they were built, and say why not if they cannot be used.

Loading registers their implementations for CPU tensors with the dispatcher; nothing else of Python changes.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

_logger = logging.getLogger("adamae_fast")

_BUILD_AGAIN = "build it again with `pip install --no-build-isolation .`"


def built_for(path: Path) -> str:
    """The torch version that the library at ``path`` was built for, read from the file without loading it."""
    found = re.search(rb"adamae_fast built for torch ([\w.+]+)", path.read_bytes())
    return found.group(1).decode() if found else "of unknown version"


def load(path: Path) -> str | None:
    """Load the library at ``path``; return None if its operations are used from now on, otherwise why not."""
    if not path.is_file():
        return f"not built; with a C++ compiler and without ADAMAE_BUILD_CPP=0, {_BUILD_AGAIN}"
    # On a processor without AVX2 the first call would end the process.
    if b"adamae_fast needs AVX2" in path.read_bytes() and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return f"built for processors with AVX2, and torch finds none here; {_BUILD_AGAIN} on this machine"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"built for torch {built_for(path)}, running is torch {torch.__version__}; {_BUILD_AGAIN} ({error})"
    return None


PATH = Path(__file__).parents[1] / "_C.abi3.so"
"""Where setup.py puts the library."""

reason_missing = load(PATH)
"""Why the C++ operations are not used; None if they are."""

reason_missing_cuda: str | None = "not built"

if reason_missing is not None and PATH.is_file():
    _logger.warning("C++ operations are not used, the slower references are: %s", reason_missing)
