"""Installing without a compiler: it succeeds, and says what was lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOST = "the operations run as plain PyTorch references"


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "adamae_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ADAMAE_BUILD_CPP": "0"}, "not built (ADAMAE_BUILD_CPP=0)"),
        ({"CXX": "no-such-compiler", "CC": "no-such-compiler"}, "no-such-compiler"),
    ],
)
def test_install_succeeds_without_the_library(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    finished = build(tmp_path, **environment)
    assert finished.returncode == 0, finished.stderr
    assert message in finished.stderr
    assert LOST in finished.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_build_that_was_asked_for_may_not_fail(tmp_path: Path) -> None:
    finished = build(tmp_path, ADAMAE_BUILD_CPP="1", CXX="no-such-compiler", CC="no-such-compiler")
    assert finished.returncode != 0


def test_an_unknown_request_is_named(tmp_path: Path) -> None:
    finished = build(tmp_path, ADAMAE_BUILD_CPP="yes")
    assert finished.returncode != 0
    assert "ADAMAE_BUILD_CPP=yes: choose 0, 1 or auto" in finished.stderr
