"""Runs under torchrun, and what the tests do to their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adamae_fast.run_folder import RunFolder, read_json_lines
from tests.distributed.scenarios import write_recipe

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
PRETRAIN = ("-m", "adamae_fast", "pretrain")


def write_run(folder: Path, videos: Sequence[Path]) -> Path:
    """A recipe for all of the videos."""
    manifest = folder / "manifest.txt"
    manifest.write_text("".join(f"{path} 0\n" for path in videos))
    return write_recipe(folder / "recipe.yaml", manifest)


def options(recipe: Path, output_dir: Path, *others: str) -> list[str]:
    return ["--config", str(recipe), "--output_dir", str(output_dir), *others]


def run_alone(recipe: Path, output_dir: Path, *others: str) -> None:
    """The same in one process, to its end."""
    command = [sys.executable, *PRETRAIN, *options(recipe, output_dir, *others)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def torchrun(
    launch: Sequence[str], arguments: Sequence[str], log: Path, prefix: Sequence[str] = (), **environment: str
) -> subprocess.Popen[bytes]:
    """Start torchrun with ``launch`` of its own; what all processes print is added to ``log``."""
    # The suite may itself have been started with signals ignored, as in a shell's background.
    with log.open("ab") as file:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "torch.distributed.run", *launch, *PRETRAIN, *arguments],
            env={**ENVIRONMENT, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL),
        )


def workers(agent: subprocess.Popen[bytes]) -> dict[int, int]:
    """Rank → process id of the training processes that ``agent`` has at the moment."""
    found = {}
    for child in _children(agent.pid):
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = child
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_until(condition: Callable[[], Any], agent: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> Any:
    """Poll until ``condition`` holds, and return it. Fails with the log if the run ends before."""
    deadline, poll = time.monotonic() + seconds, threading.Event()
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if agent.poll() is not None:
            break
        poll.wait(0.02)
    raise AssertionError(f"status {agent.poll()}: {log.read_text()[-4000:]}")


def last_step(run: RunFolder) -> int:
    return max((line["step"] for line in read_json_lines(run.metrics)), default=0)


def assert_same_run(found: RunFolder, expected: RunFolder, *files: str) -> None:
    """Every figure of every step, and the last checkpoint's tensors, to the bit."""
    names = ("step", "loss", "loss_reconstruction", "loss_sampling", "grad_norm", "lr", "quarantined")
    curves = [
        [[line[name] for name in names] for line in read_json_lines(folder.metrics)] for folder in (found, expected)
    ]
    assert curves[0] == curves[1]
    for file in files or ("model.safetensors",):
        one, two = (load_file(folder.list_checkpoints()[-1] / file) for folder in (found, expected))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
