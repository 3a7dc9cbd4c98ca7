"""Every Triton kernel compiled for GPUs that are not here, held to the committed table of its resources."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from adamae_kernels import LAUNCHERS  # noqa: E402

from adamae_fast.testing import OpShape  # noqa: E402
from tests.kernels.compiled import ARCHITECTURES, calls, committed, compile_all, compile_for, record  # noqa: E402


def test_kernels_compile_without_spills_into_what_the_table_says() -> None:
    """``python -m tests.kernels.compiled`` writes the table again when a kernel changes."""
    compiled, table = list(compile_all()), committed()
    # Spilled registers lie on the stack.
    assert [row for row in compiled if row["stack_bytes"] != "0"] == []
    assert {row["arch"] for row in compiled} == {f"sm_{arch}" for arch in ARCHITECTURES}

    def keys(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
        return [(row["kernel"], row["dtype"], row["arch"]) for row in rows]

    assert keys(compiled) == keys(table)
    # Another Triton allocates registers otherwise, and still must not spill.
    if all(row["triton"] == triton.__version__ for row in table):
        assert compiled == table


@pytest.mark.parametrize(
    "shape",
    [
        OpShape(batch_size=2, grid=(2, 2, 2), patch_size=4, num_visible=7, width=32),  # one masked token
        OpShape(batch_size=2, grid=(2, 2, 2), patch_size=4, num_visible=1, width=32),
        OpShape(batch_size=1, grid=(2, 2, 2), patch_size=4, num_visible=3, width=1),
        OpShape(batch_size=1, grid=(1, 1, 2), patch_size=1, tubelet_size=2, num_visible=1, width=8),
    ],
    ids=lambda shape: f"K{shape.num_visible}-M{shape.num_masked}-D{shape.width}",
)
def test_kernels_compile_where_a_size_is_one(shape: OpShape) -> None:
    """The compiler makes a size of 1 a constant, which has no methods; the interpreter does not."""
    for name, arguments in calls(torch.float32, shape, shape.width).items():
        for kernel, given, settings in record(LAUNCHERS[name], arguments):
            assert compile_for(90, kernel, given, settings).asm["cubin"]
