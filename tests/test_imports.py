"""The structure of the project: which part imports which, what an import costs, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "adamae_fast").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))

BASE = {
    "config",
    "config_distributed",
    "config_optim",
    "config_features",
    "config_finetune",
    "device",
    "errors",
    "grid",
    "parser_errors",
    "run_folder",
    "tensor_file",
    "version",
}
"""Modules that know nothing of any part."""

ALLOWED = {
    "ops": {"ops"},
    "masking": {"masking", "ops", "grid"},
    "model": {"model", "ops", "masking", *BASE},
    "data": {"data", *BASE},
    "distributed": {"distributed", "model", *BASE},
    "train": {"train", "distributed", "ops", "masking", "model", "interop", "data", "report", *BASE},
    "interop": {"interop", "model", *BASE},
    "features": {"features", "train", "distributed", "model", "interop", "data", "report", *BASE},
    "report": {"ops", "report", "model", "masking", "data", *BASE},
    "testing": {"ops"},
    **dict.fromkeys(BASE, BASE),
}
"""Parts of adamae_fast that each part may import; the rest (the package itself, cli, …) sits on top of them all."""

OPTIONAL = {
    "apex",
    "av",
    "decord",
    "flash_attn",
    "flash_attn_interface",
    "kornia",
    "matplotlib",
    "nvidia.dali",
    "tensorboard",
    "torch.utils.tensorboard",
    "transformers",
    "triton",
    "xformers",
}
"""Imported inside the functions that use them, never when a module is imported."""


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of everything imported anywhere in a file of ``package``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def without_functions(node: ast.AST) -> ast.AST:
    """The statements that run when the module is imported."""

    class Remove(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST | None:
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
            return None if lazy else self.generic_visit(node)

    return Remove().visit(node)


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def wrong_directions(source: str, part: str, package: str) -> list[str]:
    """Imports inside adamae_fast that ``ALLOWED`` does not name."""
    if part not in ALLOWED:
        return []
    allowed = {f"adamae_fast.{other}" for other in ALLOWED[part]}
    names = set(imported(ast.parse(source), package))
    return sorted(n for n in names if is_in(n, {"adamae_fast"}) and not is_in(n, allowed))


def eager_optional(source: str, package: str) -> list[str]:
    return sorted(n for n in imported(without_functions(ast.parse(source)), package) if is_in(n, OPTIONAL))


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run_python(code: str) -> set[str]:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("ops", "import adamae_fast.model.block", ["adamae_fast.model.block"]),
        ("ops", "def f():\n    from adamae_fast.train import loop", ["adamae_fast.train.loop"]),
        ("ops", "from ..data import clips", ["adamae_fast.data.clips"]),
        ("ops", "from .. import masking", ["adamae_fast.masking"]),
        ("ops", "from adamae_fast import AdaMAE", ["adamae_fast.AdaMAE"]),
        ("ops", "from .registry import register\nimport torch", []),
        ("model", "from adamae_fast.ops.attention import attention", []),
        ("data", "from adamae_fast.model import adamae", ["adamae_fast.model.adamae"]),
        ("grid", "from adamae_fast.ops import patchify", ["adamae_fast.ops.patchify"]),
    ],
)
def test_direction_rule_finds_what_it_forbids(part: str, source: str, wrong: list[str]) -> None:
    assert wrong_directions(source, part, f"adamae_fast.{part}") == wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import av", ["av"]),
        ("from torch.utils.tensorboard import SummaryWriter", ["torch.utils.tensorboard.SummaryWriter"]),
        ("from nvidia import dali", ["nvidia.dali"]),
        ("try:\n    import decord\nexcept ImportError:\n    pass", ["decord"]),
        ("class A:\n    import triton.language", ["triton.language"]),
        ("def f():\n    import av", []),
        ("if TYPE_CHECKING:\n    import av", []),
        ("import average", []),
    ],
)
def test_optional_rule_finds_what_it_forbids(source: str, wrong: list[str]) -> None:
    assert eager_optional(source, "adamae_fast.data") == wrong


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_downwards(path: Path) -> None:
    part = path.relative_to(ROOT / "adamae_fast").with_suffix("").parts[0]
    assert wrong_directions(path.read_text(), part, package_of(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert eager_optional(path.read_text(), package_of(path)) == []


def test_kernels_know_torch_and_triton_and_not_the_training_system() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "adamae_kernels"}
    for path in KERNELS:
        package = ".".join(path.relative_to(ROOT / "kernels").parent.parts)
        assert [n for n in imported(ast.parse(path.read_text()), package) if not is_in(n, allowed)] == [], path


def test_nothing_imports_the_measurements() -> None:
    for path in [*SOURCES, *KERNELS]:
        assert [n for n in imported(ast.parse(path.read_text()), package_of(path)) if is_in(n, {"bench"})] == [], path


def test_import_is_light() -> None:
    loaded = run_python("import adamae_fast, sys; print(*sys.modules)")
    assert "adamae_fast" in loaded
    by_torch = run_python("import torch, sys; print(*sys.modules)")
    assert sorted(name for name in loaded - by_torch if is_in(name, OPTIONAL)) == []


def test_every_module_imports_without_the_optional_packages() -> None:
    """None in sys.modules makes Python raise ImportError for that name."""
    modules = [
        ".".join([package_of(path), path.stem]) if path.stem != "__init__" else package_of(path)
        for path in SOURCES
        if path.stem != "__main__"
    ]
    blocked = sorted(OPTIONAL - {"triton", "torch.utils.tensorboard"})  # torch itself probes for triton
    run_python(
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    )


def test_no_file_is_longer_than_600_lines() -> None:
    folders = ("adamae_fast", "kernels", "csrc", "bench", "tests")
    files = [
        p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}
    ]
    assert len(files) > len(SOURCES)
    lengths = {relative(path): len(path.read_text().splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > 600} == {}
