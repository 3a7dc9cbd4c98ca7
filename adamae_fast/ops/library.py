"""Load the operations in C++ and in CUDA C++, if they were built, and say why not if they cannot be used.

Loading registers their implementations with the dispatcher; nothing else of Python changes.
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


def load(path: Path, needed: str) -> str | None:
    """Load the library at ``path``; return None if its operations are used from now on, otherwise why not.

    ``needed`` says what its build takes.
    """
    if not path.is_file():
        return f"not built; with {needed}, {_BUILD_AGAIN}"
    # On a processor without AVX2 the first call would end the process.
    if b"adamae_fast needs AVX2" in path.read_bytes() and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return f"built for processors with AVX2, and torch finds none here; {_BUILD_AGAIN} on this machine"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"built for torch {built_for(path)}, running is torch {torch.__version__}; {_BUILD_AGAIN} ({error})"
    return None


PATH = Path(__file__).parents[1] / "_C.abi3.so"
"""Where setup.py puts the operations for the CPU."""

PATH_CUDA = PATH.with_name("_CUDA.abi3.so")
"""Where setup.py puts those in CUDA C++."""

reason_missing = load(PATH, "a C++ compiler and without ADAMAE_BUILD_CPP=0")
"""Why the C++ operations are not used; None if they are."""

reason_missing_cuda = load(PATH_CUDA, "a torch built for CUDA, the CUDA toolkit and without ADAMAE_BUILD_CUDA=0")
"""Why the operations in CUDA C++ cannot be asked for; None if they can."""

if reason_missing is not None and PATH.is_file():
    _logger.warning("C++ operations are not used, the slower references are: %s", reason_missing)
if reason_missing_cuda is not None and PATH_CUDA.is_file():
    _logger.warning("CUDA C++ operations cannot be asked for: %s", reason_missing_cuda)
