"""Every Triton kernel on a GPU: the contract that the interpreter checks, compiled for what is there."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adamae_fast.testing import OPERATION_INPUTS, InputFactory, OpShape
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.gpu


def test_kernels_keep_their_contracts() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/contract.py"]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr


@pytest.mark.parametrize("name", sorted(OPERATION_INPUTS))
def test_a_captured_call_computes_anew_at_each_replay(name: str) -> None:
    """From whatever its input tensors hold then."""
    operation = getattr(torch.ops.adamae_fast, name).default
    first, second = (OPERATION_INPUTS[name].make(InputFactory(OpShape(), device="cuda", seed=s))[0] for s in (0, 1))
    static = pytree.tree_map_only(Tensor, Tensor.clone, first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operation(*pytree.tree_map_only(Tensor, Tensor.clone, first))  # compiles, which capture forbids
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operation(*static)
    for arguments in (first, second):
        for held, given in zip(pytree.tree_leaves(static), pytree.tree_leaves(arguments), strict=True):
            if isinstance(held, Tensor):
                held.copy_(given)
        graph.replay()
        expected = operation(*pytree.tree_map_only(Tensor, Tensor.clone, arguments))
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)
