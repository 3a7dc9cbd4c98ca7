"""Installing without a compiler succeeds, and says what was lost; CUDA is built where torch and a toolkit allow it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LOST = "the operations run as plain PyTorch references"
NO_COMPILER = {"CXX": "no-such-compiler", "CC": "no-such-compiler"}
BUILD = ["setup.py", "build_ext", "--inplace"]

# setup.py in a process whose torch says that it is a build for CUDA, with the toolkit in toolkit/.
PRETEND_CUDA = """
import os, runpy, sys, torch
torch.version.cuda = "13.0"
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = os.path.abspath("toolkit")
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
# Keeps what it is told, and compiles an empty file in place of the source.
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "release 13.0, V13.0.88"; exit;;
  *--list-gpu-code*) printf "%s\\n" $KNOWN; exit;;
esac
echo "$*" >> toolkit/said
while [ "$1" != -o ]; do shift; done
exec cc -x c -fPIC -c /dev/null -o "$2"
"""


def copy_project(folder: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "adamae_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def run(folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "TORCH_CUDA_ARCH_LIST"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    copy_project(folder)
    return run(folder, BUILD, **{"ADAMAE_BUILD_CUDA": "0"} | environment)


def build_cuda(folder: Path, nvcc: str = NVCC, **environment: str) -> subprocess.CompletedProcess[str]:
    copy_project(folder)
    toolkit = folder / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    (toolkit / "bin" / "nvcc").write_text(nvcc)
    (toolkit / "bin" / "nvcc").chmod(0o755)
    for name in ("cudart", "c10_cuda", "torch_cuda"):
        library = str(toolkit / "lib64" / f"lib{name}.so")
        subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", library], check=True)
    known = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
    return run(folder, ["-c", PRETEND_CUDA], **{"ADAMAE_BUILD_CPP": "0", "KNOWN": known} | environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ADAMAE_BUILD_CPP": "0"}, "not built (ADAMAE_BUILD_CPP=0)"),
        (NO_COMPILER, "no-such-compiler"),
    ],
)
def test_install_succeeds_without_the_library(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    finished = build(tmp_path, **environment)
    assert finished.returncode == 0, finished.stderr
    assert message in finished.stderr
    assert LOST in finished.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_build_that_was_asked_for_may_not_fail(tmp_path: Path) -> None:
    finished = build(tmp_path, ADAMAE_BUILD_CPP="1", **NO_COMPILER)
    assert finished.returncode != 0


@pytest.mark.parametrize("name", ["CPP", "CUDA"])
def test_an_unknown_request_is_named(tmp_path: Path, name: str) -> None:
    finished = build(tmp_path, **{f"ADAMAE_BUILD_{name}": "yes"})
    assert finished.returncode != 0
    assert f"ADAMAE_BUILD_{name}=yes: choose 0, 1 or auto" in finished.stderr


@pytest.mark.parametrize("refused", [{"ADAMAE_BUILD_CPP": "0", "ADAMAE_BUILD_CUDA": "0"}, NO_COMPILER])
def test_a_library_that_is_not_built_leaves_no_older_one(refused: dict[str, str], tmp_path: Path) -> None:
    """It would be loaded all the same, while the build says that it is not there."""
    copy_project(tmp_path)
    for name in ("_C", "_CUDA"):
        (tmp_path / "adamae_fast" / f"{name}.abi3.so").touch()
    finished = run(tmp_path, BUILD, **{"ADAMAE_BUILD_CPP": "auto", "ADAMAE_BUILD_CUDA": "auto"} | refused)
    assert finished.returncode == 0, finished.stderr
    assert list((tmp_path / "adamae_fast").glob("*.so")) == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_cuda_without_a_torch_for_it_is_left_out_or_an_error(tmp_path: Path) -> None:
    missing = "a torch that is built for CUDA"
    finished = build(tmp_path, ADAMAE_BUILD_CPP="0", ADAMAE_BUILD_CUDA="auto")
    assert finished.returncode == 0, finished.stderr
    assert f"CUDA operations are not built (it needs {missing}): impl='cuda' cannot be asked for" in finished.stderr
    finished = run(tmp_path, BUILD, ADAMAE_BUILD_CPP="0", ADAMAE_BUILD_CUDA="1")
    assert finished.returncode != 0
    assert f"ADAMAE_BUILD_CUDA=1 needs {missing}, here is torch {torch.__version__}" in finished.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc)")
@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, {"sm_80", "sm_90", "sm_100", "compute_100"}),
        ({"KNOWN": "sm_75 sm_80 sm_86 sm_90"}, {"sm_80", "sm_90", "compute_90"}),  # of CUDA 12.4
        ({"TORCH_CUDA_ARCH_LIST": "9.0"}, {"sm_90"}),
    ],
)
def test_cuda_is_built_for_the_gpus_that_nvcc_knows_or_those_asked_for(
    tmp_path: Path, environment: dict[str, str], code: set[str]
) -> None:
    finished = build_cuda(tmp_path, **environment)
    assert finished.returncode == 0, finished.stderr
    assert "building CUDA operations with torch" in finished.stderr
    built_for = f"adamae_fast built for torch {torch.__version__.partition('+')[0]}\0"
    assert built_for.encode() in (tmp_path / "adamae_fast" / "_CUDA.abi3.so").read_bytes()
    calls = (tmp_path / "toolkit" / "said").read_text().splitlines()
    assert len(calls) == len(list((ROOT / "csrc").glob("*.cu")))
    for call in calls:
        assert {word.rpartition("code=")[2] for word in call.split() if "gencode" in word} == code
        assert "-fmad=false" in call.split()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc)")
@pytest.mark.parametrize(
    ("request_", "message"), [("auto", "CUDA operations are not built (CompileError"), ("1", "exit")]
)
def test_cuda_that_does_not_compile_is_left_out_or_an_error(tmp_path: Path, request_: str, message: str) -> None:
    finished = build_cuda(tmp_path, NVCC.replace("exec cc", "exit 3 #"), ADAMAE_BUILD_CUDA=request_)
    assert (finished.returncode != 0) == (request_ == "1")
    assert message in finished.stderr
    assert not list((tmp_path / "adamae_fast").glob("*.so"))
