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
        # A machine that gets a copy of the tree is told which commit it is.
        "commit": os.environ.get("ADAMAE_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "dirty": {"": "no", "unknown": "unknown"}.get(
            _git("status", "--porcelain", "--", ".", ":!bench/results"), "yes"
        ),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def device_name(device: torch.device) -> str:
    """The model of the processor, as it names itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else "cpu"


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
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def _git(*arguments: str) -> str:
    """What git says; "unknown" in a copy of the tree without its history."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
