"""csrc/*.cu compiled for GPUs that are not here, with the flags of setup.py; any build of torch brings the headers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.conftest import REPOSITORY

NVCC = shutil.which("nvcc")
SOURCES = sorted((REPOSITORY / "csrc").glob("*.cu"))
ARCHITECTURES = (80, 90)

pytestmark = pytest.mark.skipif(NVCC is None, reason="no CUDA compiler (nvcc on the path)")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("build_of_csrc", REPOSITORY / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_nvcc(*arguments: str) -> str:
    finished = subprocess.run([str(NVCC), *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_compile_without_spills(source: Path, build: ModuleType, tmp_path: Path) -> None:
    code = [flag for flag in build.GPU_CODE if any(flag.endswith(f"code=sm_{arch}") for arch in ARCHITECTURES)]
    includes = ["-isystem", str(Path(torch.__file__).parent / "include")]
    target = ["-c", str(source), "-o", str(tmp_path / "object.o")]
    said = run_nvcc(*build.NVCC_FLAGS, *code, "--threads=2", "-Xptxas=-v", *includes, *target)
    compiled = set(re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", said))
    assert {arch for _, arch in compiled} == {f"sm_{arch}" for arch in ARCHITECTURES}
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert frames == [("0", "0", "0")] * len(compiled)


def test_noise_is_rounded_at_every_step(build: ModuleType, tmp_path: Path) -> None:
    """Each operation on floats says how it rounds, so that the assembler contracts none either; none is an fma."""
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

    assert operations(build.NVCC_FLAGS) == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}
    assert "fma.rn.f32" in operations([flag for flag in build.NVCC_FLAGS if flag != "-fmad=false"])
