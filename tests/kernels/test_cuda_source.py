"""csrc/*.cu compiled for GPUs that are not here, held to the committed table of its resources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.kernels.compiled_cuda import ARCHITECTURES, NVCC, committed, compile_all, run_nvcc, setup_module

pytestmark = pytest.mark.skipif(NVCC is None, reason="no CUDA compiler (nvcc on the path)")


def test_kernels_compile_without_spills_into_what_the_table_says() -> None:
    """``python -m tests.kernels.compiled_cuda`` writes the table again when a kernel changes."""
    compiled, table = list(compile_all()), committed()
    assert {row["arch"] for row in compiled} == {f"sm_{arch}" for arch in ARCHITECTURES}
    assert [row for row in compiled if row["stack_bytes"] != "0" or row["spilled_bytes"] != "0"] == []
    assert [(row["kernel"], row["arch"]) for row in compiled] == [(row["kernel"], row["arch"]) for row in table]
    # Another compiler allocates registers otherwise, and still must not spill.
    if compiled[0]["nvcc"] == table[0]["nvcc"]:
        assert compiled == table


def test_noise_is_rounded_at_every_step(tmp_path: Path) -> None:
    """Each operation on floats says how it rounds, so that the assembler contracts none either; none is an fma."""
    flags_of_setup = setup_module().NVCC_FLAGS
    source = tmp_path / "noise.cu"
    source.write_text(
        '#include "gumbel.h"\n'
        "__global__ void draw(uint64_t seed, float* out) {\n"
        "  out[threadIdx.x] = adamae::gumbel(adamae::philox(seed, threadIdx.x).word[0]);\n"
        "}\n"
    )

    def operations(flags: list[str]) -> set[str]:
        ptx = tmp_path / "noise.ptx"
        run_nvcc(*flags, "-ptx", "-arch=compute_90", f"-I{REPOSITORY / 'csrc'}", str(source), "-o", str(ptx))
        return set(re.findall(r"\b((?:fma|mad|mul|add|sub|div)\.(?:\w+\.)*f32)", ptx.read_text()))

    assert operations(flags_of_setup) == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}
    assert "fma.rn.f32" in operations([flag for flag in flags_of_setup if flag != "-fmad=false"])
