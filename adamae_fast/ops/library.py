"""Load the C++ operations, if they were built, and say why not if they cannot be used.

Loading registers their implementations for CPU tensors with the dispatcher; nothing else of Python changes.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

_logger = logging.getLogger("adamae_fast")


def load(path: Path) -> str | None:
    """Load the library at ``path``; return None if its operations are used from now on, otherwise why not."""
    if not path.is_file():
        return "not built: install a C++ compiler and run `pip install .` again without ADAMAE_BUILD_CPP=0"
    # setup.py compiles for AVX2 on x86-64; on an older processor the first call would end the process.
    if b"needs AVX2" in path.read_bytes() and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "built for processors with AVX2, and torch finds none here: build it again on this machine"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        built_for = re.search(rb"adamae_fast built for torch ([\w.+]+)", path.read_bytes())
        version = built_for.group(1).decode() if built_for else "an unknown version"
        return f"built for torch {version}, running is {torch.__version__}: run `pip install .` again ({error})"
    return None


path = Path(__file__).parents[1] / "_C.abi3.so"
"""Where setup.py puts the library."""

reason_missing = load(path)
"""Why the C++ operations are not used; None if they are."""

if reason_missing is not None and path.is_file():
    _logger.warning("C++ operations: %s. The slower references run instead", reason_missing)
