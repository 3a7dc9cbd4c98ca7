"""Every Triton kernel on a GPU: the contract that the interpreter checks, compiled for what is there."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.gpu


def test_kernels_keep_their_contracts() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/contract.py"]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
