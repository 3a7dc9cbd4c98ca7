"""Every Triton kernel compiled for GPUs that are not here, held to the committed table of its resources."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from tests.kernels.compiled import ARCHITECTURES, committed, compile_all  # noqa: E402


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
