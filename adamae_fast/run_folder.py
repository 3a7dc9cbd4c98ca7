"""The layout of a run's folder, in one place.

``config.yaml``, ``metrics.jsonl``, ``quarantine.jsonl``, ``summary.json``, ``report.html``, ``tensorboard/`` and
``checkpoints/step_00000100/`` with ``model.safetensors``, ``optimizer.safetensors``, ``state.json``, ``config.yaml``.
Several processes write the folder ``optimizer/`` in place of that file.
Fine-tuning adds ``validation.jsonl``, ``quarantine_val.jsonl`` and, by ``adamae-fast evaluate``, ``evaluation/``.
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"
LOCK_ATTEMPTS = 20
"""Tenths of a second to wait for the lock: data workers of a killed run hold it until they notice."""

log = logging.getLogger("adamae_fast")

_CHECKPOINT_NAME = re.compile(r"step_(\d{8,})")


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG_FILE
        self.metrics = self.path / "metrics.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.quarantine_val = self.path / "quarantine_val.jsonl"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and keep other processes from writing to it. Raises ValueError if one already does.

        A file system without locks is used without one, with a warning.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            for attempt in range(LOCK_ATTEMPTS):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if attempt == LOCK_ATTEMPTS - 1:
                        raise ValueError(
                            f"output_dir={str(self.path)!r}: another process is writing this run; stop it, or choose "
                            "another output_dir"
                        ) from error
                    time.sleep(0.1)
                except OSError as error:
                    log.warning("%s cannot be locked (%s): start no second process on this run", self.path, error)
                    break
            yield

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step_{step:08d}"

    def list_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first. Folders still being written have other names and are not listed."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if _CHECKPOINT_NAME.fullmatch(path.name)]
        return sorted(found, key=checkpoint_step)

    def quarantined_paths(self) -> set[str]:
        """Paths of the videos in ``quarantine.jsonl``."""
        return {line["path"] for line in read_json_lines(self.quarantine)}

    def best_validation(self) -> dict[str, Any] | None:
        """The line of ``validation.jsonl`` with the highest top1, the first of equal ones; None if there is none."""
        lines = [line for line in read_json_lines(self.validation) if line["top1"] is not None]
        return max(lines, key=lambda line: line["top1"], default=None)

    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the highest top1 in validation; None if the run has no validation, or not that one."""
        best = self.best_validation()
        folder = None if best is None else self.checkpoint(best["step"])
        return folder if folder is not None and folder.is_dir() else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file; none if there is no file. A last line cut off by a stopped run is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def checkpoint_step(path: Path) -> int:
    """Return the step that a checkpoint folder's name states."""
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: not a checkpoint folder; expected a name such as step_00000100")
    return int(match[1])


def find_weights(path: str | Path) -> tuple[Path, Path]:
    """Return weights and configuration of a checkpoint folder, or of a run's: its best checkpoint in validation, else
    its newest one.
    """
    folder = Path(path)
    if not (folder / MODEL_FILE).is_file():
        run = RunFolder(folder)
        checkpoints = run.list_checkpoints()
        if not checkpoints:
            raise ValueError(
                f"{str(path)!r} holds no {MODEL_FILE} and no checkpoints; give a run's folder or one of its checkpoints"
                " (files of other projects: adamae-fast convert)"
            )
        folder = run.best_checkpoint() or checkpoints[-1]
    return folder / MODEL_FILE, folder / CONFIG_FILE
