"""Compiles csrc/*.cu for GPUs that are not here, with the flags of setup.py, and reads what the kernels take.

``python -m tests.kernels.compiled_cuda`` writes the table that the tests hold the kernels to.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from tests.conftest import REPOSITORY

NVCC = shutil.which("nvcc")
SOURCES = sorted((REPOSITORY / "csrc").glob("*.cu"))
ARCHITECTURES = (80, 90)
TABLE = Path(__file__).with_name("resources_cuda.csv")
COLUMNS = ("kernel", "arch", "registers", "shared_bytes", "stack_bytes", "spilled_bytes", "nvcc")


def setup_module() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("build_of_csrc", REPOSITORY / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_nvcc(*arguments: str) -> str:
    """What nvcc says; AssertionError if it fails."""
    finished = subprocess.run([str(NVCC), *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def nvcc_version() -> str:
    """Such as 13.0."""
    return re.search(r"release ([\d.]+)", run_nvcc("--version"))[1]


def compile_all() -> Iterator[dict[str, str]]:
    """Rows of the table, one for each kernel and architecture. Any build of torch brings the headers."""
    build, version = setup_module(), nvcc_version()
    code = [flag for flag in build.gpu_code(NVCC) if any(flag.endswith(f"code=sm_{arch}") for arch in ARCHITECTURES)]
    includes = ["-isystem", str(Path(torch.__file__).parent / "include")]
    rows = []
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            target = ["-c", str(source), "-o", str(Path(folder) / "object.o")]
            said = run_nvcc(*build.NVCC_FLAGS, *code, "--threads=2", "-Xptxas=-v", *includes, *target)
        for entry, arch, text in re.findall(r"entry function '(\w+)' for '(\w+)'\n(.*?\n.*?\n.*)\n?", said):
            # Of the mangled name, what tells the instances of the template apart: type and tokens of a thread.
            tokens_of_thread = re.search(r"Li(\d+)E", entry)[1]
            name = f"{source.stem}<{_type(entry)}, {tokens_of_thread}>"
            stack, stores, loads = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
            ).groups()
            used = re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", text)
            values = (name, arch, used[1], used[2] or "0", stack, str(int(stores) + int(loads)), version)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    yield from sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def _type(entry: str) -> str:
    return "bfloat16" if "BFloat16" in entry else "float16" if "Half" in entry else "float32"


def committed() -> list[dict[str, str]]:
    """The table as it is in the repository."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    table = list(compile_all())
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
