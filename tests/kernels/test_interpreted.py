"""Every Triton kernel on the CPU, through Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

# Tests of the operations that hold for any implementation and have few programs, because each takes milliseconds here.
OPERATIONS = (
    "contract or closed_form or clamped_tokens or lose_no_digits or l1_has_no_slope or variants_normalise"
    " or ties_go or fp32 or split_tokens_sorts or spreads_over or never_drawn"
)


def interpret(*arguments: str) -> None:
    """Run pytest with the Triton kernels in place of the C++ operations."""
    triton = pytest.importorskip("triton")
    environment = {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "ADAMAE_TESTED_TRITON": triton.__version__,
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.kernels.interpreter", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr


def test_kernels_keep_their_contracts() -> None:
    files = ["sampling_loss", "masked_patch_loss", "head_patch_loss", "assemble_decoder", "sample_visible"]
    interpret("tests/kernels/contract.py", *(f"tests/ops/test_{name}.py" for name in files), "-k", OPERATIONS)


def test_kernels_are_what_the_dispatcher_compiler_and_autograd_expect() -> None:
    """Without the tests of many programs: the contract has odd shapes of its own."""
    interpret("tests/ops/test_registry.py", "-k", "cpp and not threads and not odd_shapes")


def test_kernels_train_a_miniature() -> None:
    interpret("tests/convergence", "-k", "kernels_train and normalized")
