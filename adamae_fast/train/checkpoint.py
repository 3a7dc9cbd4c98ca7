"""Checkpoints that survive kill -9: written beside, checked by sum, renamed into place; nothing is ever unpickled.

``step_00000100/`` holds ``model.safetensors`` (weights), ``optimizer.safetensors`` (moments by parameter name),
``state.json`` (step, number of videos, loss scale, size and CRC of every file) and ``config.yaml``. Data position,
learning rate and random numbers are functions of the configuration and the step. Where a moving average of the weights
is kept, ``model.safetensors`` holds that, and ``trained.safetensors`` the weights that training goes on with.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adamae_fast.config import RunConfig, load_run_config, save_config
from adamae_fast.run_folder import CONFIG_FILE, MODEL_FILE, RunFolder, checkpoint_step
from adamae_fast.tensor_file import write_tensors_file
from adamae_fast.train.optim import export_state, import_state

OPTIMIZER_FILE = "optimizer.safetensors"
TRAINED_FILE = "trained.safetensors"
STATE_FILE = "state.json"
_UNFINISHED = ".unfinished_"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands: everything that continues it exactly, besides weights and moments."""

    step: int
    """Optimizer steps done. Clips, learning rate and random numbers of the next step are functions of it."""

    num_videos: int
    """Length of the manifest; another length is another stream of clips."""

    loss_scale: dict[str, Any]
    """State of the fp16 loss scaler; empty for fp32 and bf16."""

    total_batch: int | None = None
    """Clips of a step on all processes; None in what was written when there was always one process."""


def save_checkpoint(
    run: RunFolder,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    averaged: dict[str, Tensor] | None = None,
    spared: Collection[Path] = (),
) -> Path:
    """Write a complete checkpoint or none, then drop the oldest beyond ``checkpoint.keep``. Returns its folder.

    ``averaged`` is a moving average of the weights, under their names. Checkpoints in ``spared`` are not dropped.
    """
    target = run.checkpoint(state.step)
    temporary = run.checkpoints / f"{_UNFINISHED}{target.name}"
    remove_unfinished(run)
    temporary.mkdir(parents=True)

    weights = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
    if averaged is not None:
        write_tensors_file(weights, temporary / TRAINED_FILE)
        weights = {**weights, **{name: average.contiguous() for name, average in averaged.items()}}
    write_tensors_file(weights, temporary / MODEL_FILE)
    write_tensors_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER_FILE)
    save_config(config, temporary / CONFIG_FILE)
    files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
    fields = {**asdict(state), "files": files}
    (temporary / STATE_FILE).write_text(json.dumps({**fields, "crc32": _fields_crc(fields)}, indent=1))

    for path in (*temporary.iterdir(), temporary):
        _flush_to_disk(path)
    temporary.rename(target)
    _flush_to_disk(run.checkpoints)
    for old in run.list_checkpoints()[: -config.checkpoint.keep]:
        if old not in spared:
            # Renamed first: half a checkpoint must not be listed as one.
            shutil.rmtree(old.rename(old.with_name(f"{_UNFINISHED}{old.name}")))
    return target


def remove_unfinished(run: RunFolder) -> None:
    """Remove what is left of checkpoints that were not written to their end."""
    for leftover in run.checkpoints.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averaged: dict[str, Tensor] | None = None
) -> RunState:
    """Restore weights and moments, and the moving average into ``averaged`` where one is kept.

    An average that the checkpoint does not have begins with the weights. Raises CheckpointError for a damaged or
    unfitting checkpoint.
    """
    state = verify_checkpoint(folder)
    trained = folder / TRAINED_FILE
    weights = load_file(folder / MODEL_FILE)
    try:
        model.load_state_dict(load_file(trained) if trained.exists() else weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit this configuration's model: {error}") from error
    for name, average in (averaged or {}).items():
        average.copy_(weights[name])
    _restore_optimizer(load_file(folder / OPTIMIZER_FILE), model, optimizer)
    return state


def verify_checkpoint(folder: Path) -> RunState:
    """Compare every file with the size and sum that were recorded when it was written; return where the run stood."""
    try:
        fields = json.loads((folder / STATE_FILE).read_text())
        if fields.pop("crc32") != _fields_crc(fields):
            raise CheckpointError(f"{STATE_FILE} was changed after it was written")
        for name, fingerprint in fields.pop("files").items():
            found = _fingerprint(folder / name)
            if found != fingerprint:
                raise CheckpointError(f"{name} has {found}, but was written with {fingerprint}")
        return RunState(**fields)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged ({error}). {_remedy(folder)}") from error


def find_resume_point(resume: str, run: RunFolder) -> Path | None:
    """Return the checkpoint that ``resume`` means, or None for a fresh start.

    Raises CheckpointError where a path is no checkpoint, or where this run would mix with another one in its folder.
    """
    checkpoints = run.list_checkpoints()
    if resume == "auto":
        return checkpoints[-1] if checkpoints else None
    folder = Path(resume)
    if resume != "none" and not folder.is_dir():
        raise CheckpointError(f"resume={resume!r}: no such folder; give a checkpoint, auto or none")
    if not (folder / STATE_FILE).exists() and RunFolder(folder).list_checkpoints():
        folder = RunFolder(folder).list_checkpoints()[-1]
    has_lines = run.metrics.exists() and run.metrics.stat().st_size > 0
    if not is_checkpoint_of(run, folder) and (checkpoints or (resume == "none" and has_lines)):
        raise CheckpointError(
            f"resume={resume!r}, but output_dir={str(run.path)!r} already holds another run; choose another "
            "output_dir, delete that one, or continue it with resume=auto"
        )
    return None if resume == "none" else folder


def is_checkpoint_of(run: RunFolder, folder: Path) -> bool:
    """Whether ``folder`` is one of the run's live checkpoints, not one that was set aside or another run's."""
    return folder.resolve() in [path.resolve() for path in run.list_checkpoints()]


def set_aside_newer(run: RunFolder, step: int) -> list[Path]:
    """Rename the run's checkpoints after ``step``: ``resume=auto`` must not return to the branch that was left.

    They are kept until somebody deletes them. The newest goes first, so that a kill halfway leaves no gap.
    """
    renamed = []
    for path in reversed(run.list_checkpoints()):
        if checkpoint_step(path) > step:
            names = (f"{path.name}.superseded_by_step_{step:08d}{suffix}" for suffix in _suffixes())
            renamed.append(path.rename(next(path.with_name(n) for n in names if not path.with_name(n).exists())))
    return renamed


def _suffixes() -> Iterator[str]:
    yield ""
    yield from (f"_{number}" for number in count(2))


def differences(folder: Path, config: RunConfig) -> dict[str, tuple[object, object]]:
    """Return the keys whose value differs between a checkpoint's configuration and this one: key → (then, now)."""
    then = _flatten(asdict(load_run_config(folder / CONFIG_FILE, type(config))))
    now = _flatten(asdict(config))
    return {key: (then[key], now[key]) for key in now if then[key] != now[key]}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    state = export_state(optimizer)
    for name, parameter in model.named_parameters():
        for key, value in state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value.detach().contiguous()
    return tensors


def _restore_optimizer(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        if parameter_name not in parameters:
            raise CheckpointError(f"{OPTIMIZER_FILE} holds {name!r}, which this configuration's model does not have")
        state.setdefault(parameters[parameter_name], {})[key] = value
    import_state(optimizer, state)


def _fingerprint(path: Path) -> dict[str, int]:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _fields_crc(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remedy(folder: Path) -> str:
    run = RunFolder(folder.resolve().parent.parent)
    for previous in reversed(
        [path for path in run.list_checkpoints() if checkpoint_step(path) < checkpoint_step(folder)]
    ):
        try:
            verify_checkpoint(previous)
        except CheckpointError:
            continue
        return f"The one before it is step {checkpoint_step(previous)}: continue from it with --resume {previous}"
    return "There is no earlier sound checkpoint beside it: start afresh in another output_dir"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
