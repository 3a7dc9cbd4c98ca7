"""Reads and writes safetensors files like any other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MAX_LISTED = 20
"""Tensors that a message names; the others are counted."""


def listed(faults: Sequence[str]) -> str:
    """The first faults, a line each, and how many more there are."""
    more = f"\n  and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    return "".join(f"\n  {fault}" for fault in faults[:MAX_LISTED]) + more


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Replace all weights of ``module``. Raises ValueError that names those that do not fit."""
    own = module.state_dict()
    faults = [
        f"shape: {name} {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    faults += [f"missing: {name} {tuple(tensor.shape)}" for name, tensor in own.items() if name not in tensors]
    faults += [f"unknown: {name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if name not in own]
    if faults:
        raise ValueError(
            f"{source}: {len(faults)} tensors do not fit the configured model; give it the sizes (model.*) and the "
            f"mask.strategy that are in config.yaml beside them, or other weights:{listed(faults)}"
        )
    module.load_state_dict(tensors)


def read_tensors_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises ValueError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); use another checkpoint") from error


def write_tensors_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Save tensors with the permissions that a new file has here; safetensors itself would keep others from reading.

    Raises OSError, as any other writing does, if the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)
