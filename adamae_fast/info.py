"""What is available on this machine, and why the rest is not."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamae_fast.data import nvdec
from adamae_fast.data.dali import CPU_CODECS, DALI_INSTALL, dali_is_installed
from adamae_fast.device import describe_device
from adamae_fast.ops import library, triton_kernels
from adamae_fast.ops.attention_backends import BACKENDS, PACKAGES, AttentionProblem, reason_missing
from adamae_fast.train.apex import missing_parts
from adamae_fast.version import __version__


@dataclass(frozen=True)
class Backend:
    """One optional part: whether it can be used here, its version, and the reason where it cannot."""

    name: str
    purpose: str
    available: bool
    detail: str


def collect() -> tuple[dict[str, object], list[Backend]]:
    """Return versions and device, and every optional back end with its state."""
    versions: dict[str, object] = {
        "adamae_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "device": _device(),
        "cpu_cores": os.cpu_count(),
    }
    return versions, _backends()


def print_info(*, as_json: bool) -> None:
    """Print :func:`collect` as a table, or as one JSON object."""
    versions, backends = collect()
    if as_json:
        print(json.dumps({**versions, "backends": [asdict(backend) for backend in backends]}))
        return
    console = Console()
    grid = Table(show_header=False, box=None)
    for key, value in versions.items():
        grid.add_row(key, str(value))
    console.print(grid)
    table = Table("back end", "for", "", "version, or why it is not used")
    for backend in backends:
        mark = "[green]yes" if backend.available else "[yellow]no"
        table.add_row(backend.name, backend.purpose, mark, escape(backend.detail))
    console.print(table)


def _device() -> str:
    if not torch.cuda.is_available():
        return describe_device(torch.device("cpu"))
    properties = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} × {properties.name}, {properties.total_memory / 2**30:.0f} GiB each"


def _backends() -> list[Backend]:
    return [
        _library("cpp", "operations on the CPU", library.PATH, library.reason_missing, _LOST_CPP),
        _library(
            "cuda", "operations on the GPU in CUDA C++", library.PATH_CUDA, library.reason_missing_cuda, _LOST_CUDA
        ),
        # PyAV before decord, whose old codec libraries the whole process sees: PyAV must not pick them up.
        _package("av", "PyAV: lists, decodes and writes videos"),
        _package("decord", "data.decoder=decord"),
        _package("transformers", "conversion to and from its VideoMAE folders"),
        _triton(),
        *(_attention(name) for name in PACKAGES),
        _apex(),
        _dali(),
        _nvdec(),
    ]


_LOST_CPP = "the operations run as plain PyTorch references, slower and with more memory"
_LOST_CUDA = "impl='cuda' cannot be asked for"


def _library(name: str, purpose: str, path: Path, reason: str | None, lost: str) -> Backend:
    """What setup.py built, or what is lost without it."""
    detail = f"{reason}. Until then {lost}" if reason else f"built for torch {library.built_for(path)}"
    return Backend(name, purpose, reason is None, detail)


def _package(module: str, purpose: str) -> Backend:
    """Import a package to see whether it really works."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = f"not installed: pip install {module}"
        return Backend(module, purpose, False, missing if error.name == module else f"not usable: {error}")
    except Exception as error:  # a broken binary raises anything, and this command exists to say what
        return Backend(module, purpose, False, f"not usable: {type(error).__name__}: {error}")
    version = getattr(sys.modules[module], "__version__", None) or importlib.metadata.version(module)
    return Backend(module, purpose, True, version)


def _triton() -> Backend:
    """The kernels for CUDA tensors, which replace the references there by themselves."""
    reason = triton_kernels.reason_missing()
    if reason is None and not torch.cuda.is_available():
        reason = f"{importlib.metadata.version('triton')} is installed, but there is no CUDA device"
    return Backend("triton", "operations on the GPU", reason is None, reason or importlib.metadata.version("triton"))


def _attention(name: str) -> Backend:
    """An optional package for attention: whether it could be used in bf16 on this machine's first device."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    problem = AttentionProblem(device, torch.bfloat16, num_tokens=1568, head_dim=64, needs_grad=True)
    reasons = BACKENDS[name].reasons(problem)
    if reasons and not reason_missing(name):
        reasons.insert(0, f"{PACKAGES[name].version()} is installed")
    return Backend(name, "attention", not reasons, "; ".join(reasons) or PACKAGES[name].version())


def _apex() -> Backend:
    """NVIDIA apex, part by part: its optimizer and its LayerNorm are built separately."""
    parts = ("FusedAdam", "FusedLayerNorm")
    missing = missing_parts()
    details = [f"{part} not usable: {missing[part]}" if part in missing else f"{part} usable" for part in parts]
    return Backend("apex", "fused optimizer and LayerNorm, if asked for", len(missing) < len(parts), "; ".join(details))


def _dali() -> Backend:
    """DALI, and what it would decode with."""
    name, purpose = "nvidia.dali", "video decoding and crops on the GPU, if asked for"
    if not dali_is_installed():
        return Backend(name, purpose, False, f"not installed: {DALI_INSTALL}")
    package = _package(name, purpose)
    if not package.available:
        return package
    return Backend(name, purpose, True, f"{package.detail}; without a GPU it decodes {', '.join(CPU_CODECS)}")


def _nvdec() -> Backend:
    """The GPU's video decoder, which the driver brings."""
    reason = nvdec.reason_missing()
    if reason is None and not torch.cuda.is_available():
        reason = f"{nvdec.LIBRARY} is there, but there is no CUDA device"
    codecs = "" if reason else ", ".join(nvdec.decodable(torch.device("cuda", torch.cuda.current_device())))
    return Backend("nvdec", "decodes for DALI on the GPU", reason is None, reason or codecs)
