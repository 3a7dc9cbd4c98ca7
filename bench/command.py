"""What the whole-step commands share: their options, their settings, their result file and their last line."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from adamae_fast.config import MaskConfig, ModelConfig
from adamae_fast.device import make_current, pick_device
from adamae_fast.errors import RunStoppedError
from adamae_fast.ops import triton_kernels
from bench import conditions
from bench.arms import Setting
from bench.checkout import Checkout

RESULTS = conditions.ROOT / "bench" / "results"

TINY = (ModelConfig(size="nano", frame_size=48), MaskConfig(ratio=0.8))
"""For ``--quick``: seconds on any machine, and the 16 frames that the published code takes."""

BATCH = {"cpu": 2, "cuda": 32}
"""Clips of a step where ``--batch`` gives none."""

REFUSED = 3
"""Status of a command that has measured, though not every arm: of the others it says why. 1 is that of a crash."""

Say = Callable[[str], None]
"""Hears what is being done."""


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Options of every command."""
    options = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--quick", action="store_true", help="tiny shapes, few repetitions; writes no file of its own")
    options.add_argument("--out", type=Path, help="folder of the result file (default: bench/results)")
    options.add_argument("--published", type=Path, metavar="PATH", help="a checkout of the published code")
    return options


def setting_of(options: argparse.Namespace, batch_size: int | None = None) -> Setting:
    """The paper's model, or a tiny one with ``--quick``. Raises ValueError for a device that is not there."""
    device = pick_device(options.device, key="--device")
    require_kernels(device)
    make_current(device)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch {batch_size}: choose at least 1 clip")
    model, mask = TINY if options.quick else (ModelConfig(), MaskConfig())
    return Setting(model=model, mask=mask, batch_size=batch_size or BATCH[device.type], device=device)


def require_kernels(device: torch.device) -> None:
    """Raise ValueError where a GPU would run the references, which no figure of ours is to be of."""
    if device.type == "cuda" and (reason := triton_kernels.reason_missing()):
        raise ValueError(f"--device {device}: {reason}; in a checkout that is not installed, set PYTHONPATH=kernels")


def checkout_of(options: argparse.Namespace) -> Checkout | None:
    """The published code, where the user gives it. Raises ValueError where the folder is something else."""
    return Checkout.open(options.published) if options.published else None


@contextmanager
def progress(num_parts: int) -> Iterator[tuple[Say, Callable[[], None]]]:
    """A bar on stderr: say what is being done, advance by a part. Without a terminal: a line for each thing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: print(what, file=sys.stderr, flush=True), lambda: None
        return
    with Progress(console=console) as bar:
        task = bar.add_task("", total=num_parts)
        yield lambda what: bar.update(task, description=what), lambda: bar.advance(task)


def result_path(name: str, result: dict[str, Any], options: argparse.Namespace) -> Path | None:
    """The command's file for this machine; None for a quick run without ``--out``."""
    out = options.out or (None if options.quick else RESULTS)
    return out and out / f"{name}_{conditions.slug(result['conditions'])}.json"


def write(name: str, result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Write the result file, unless the run is a quick one without ``--out``; return what it holds."""
    result = {"command": name, "quick": options.quick, **result}
    path = result_path(name, result, options)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {path}")
    return result


def finish(name: str, result: dict[str, Any], options: argparse.Namespace, *, unprinted: str = "") -> None:
    """Write the result file; print the line that ends a command, without what its rows hold as ``unprinted``."""
    result = write(name, result, options)
    if float(result["conditions"]["load"]) > 1:
        print(f"warning: the load average was {result['conditions']['load']} at the start; other work disturbs figures")
    rows = [{key: value for key, value in row.items() if key != unprinted} for row in result["rows"]]
    print(json.dumps({**result, "rows": rows}, separators=(",", ":"), ensure_ascii=False))


def make_folder(key: str, folder: Path | None) -> None:
    """Make a folder for results before anything is measured. Raises ValueError if it cannot be written."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{key} {folder}: {error.strerror}; choose a folder that can be written") from error


def run(main: Callable[[list[str] | None], int]) -> None:
    """Run a command; a user's error is one line and status 2, what stopped it one line and status 1 (130: Ctrl-C)."""
    try:
        sys.exit(main(None))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStoppedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
