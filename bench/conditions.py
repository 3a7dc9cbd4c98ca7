"""Under which conditions figures were taken. No name of a host or of a person is recorded."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def collect(device: torch.device) -> dict[str, str]:
    """Return device, versions, commit, date and load, for every row of the results."""
    return {
        "device": device_name(device),
        "cores": str(torch.get_num_threads() if device.type == "cpu" else os.cpu_count()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
        "triton": _version("triton"),
        "driver": _driver() if device.type == "cuda" else "",
        "nvdec": nvdec() if device.type == "cuda" else "",
        **version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def version() -> dict[str, str]:
    """Commit, and whether the tree differs from it; a tree without git is told its commit in ADAMAE_COMMIT."""
    if told := os.environ.get("ADAMAE_COMMIT"):
        return {"commit": told, "dirty": "not told"}
    commit = git(ROOT, "rev-parse", "--short", "HEAD")
    if not commit:
        return {"commit": "not told", "dirty": "not told"}
    changed = git(ROOT, "status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": commit, "dirty": "yes" if changed else "no"}


def device_name(device: torch.device) -> str:
    """The model of the processor, as it names itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else "cpu"


def nvdec() -> str:
    """Whether the driver's video decoder can be loaded, by the dynamic linker's own list."""
    try:
        listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not told"
    found = [line.split("=>")[1].strip() for line in listed.splitlines() if "nvcuvid" in line and "=>" in line]
    return found[0] if found else "no libnvcuvid"


def slug(conditions: dict[str, str]) -> str:
    """The device as part of a file's name."""
    words = re.sub(r"\(.*?\)", "", f"{conditions['device']} {conditions['cores']} cores")
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    return _nvidia_smi("driver_version")


def architecture() -> str:
    """The compute capability of the first GPU, such as 9.0, asked without a CUDA context; nothing without a GPU."""
    try:
        return _nvidia_smi("compute_cap")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _nvidia_smi(what: str) -> str:
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def git(folder: Path, *arguments: str) -> str:
    """What git says in ``folder``; nothing where that is no repository of its own."""
    if not (folder / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
