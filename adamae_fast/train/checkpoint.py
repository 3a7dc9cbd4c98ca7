"""Checkpoints that survive kill -9: written beside, checked by sum, renamed into place; nothing is ever unpickled.

``step_00000100/`` holds ``model.safetensors`` (weights), ``optimizer.safetensors`` (moments by parameter name),
``state.json`` (step, number of videos, loss scale, size and CRC of every file) and ``config.yaml``. Data position,
learning rate and random numbers are functions of the configuration and the step. Where a moving average of the weights
is kept, ``model.safetensors`` holds that, and ``trained.safetensors`` the weights that training goes on with.

Several processes write the moments as shards, ``optimizer/*.safetensors``, by torch.distributed.checkpoint; all else is
the same, and any number of processes continues from either kind, to the bit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from adamae_fast.config import RunConfig, load_run_config, save_config
from adamae_fast.device import make_current
from adamae_fast.distributed.processes import (
    every_process_says,
    first_process_does,
    is_spread,
    num_processes,
    process_index,
)
from adamae_fast.run_folder import CONFIG_FILE, MODEL_FILE, RunFolder, checkpoint_step
from adamae_fast.tensor_file import write_tensors_file
from adamae_fast.train.optim import export_state, import_state

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager

OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_FOLDER = "optimizer"
TRAINED_FILE = "trained.safetensors"
STATE_FILE = "state.json"
_UNFINISHED = ".unfinished_"

_Files = dict[str, dict[str, Tensor]]
"""What a checkpoint's files hold, by their names."""

log = logging.getLogger("adamae_fast")


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


class CheckpointSaver:
    """Writes the checkpoints of a run, each complete or not at all, and drops the oldest beyond ``checkpoint.keep``.

    The checkpoint of the run's best validation is never dropped. With ``checkpoint.asynchronous``, :meth:`save` returns
    once the tensors are copied to host memory; a thread writes, and only then does the checkpoint get its name. At most
    one is under way: the next :meth:`save`, and the end of the ``with`` block, wait for it and raise what went wrong.

    Several processes call each method together.
    """

    def __init__(self, run: RunFolder, config: RunConfig) -> None:
        self._run = run
        self._config = config
        self._under_way: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._stager: DefaultStager | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if kind is None:
                raise
            log.error("%s", failure)  # the error that ends the run is the one to raise
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._stager is not None:
                self._stager.close()

    def wait(self) -> None:
        """Wait until the checkpoint that is under way, if any, is complete. Raises OSError if it cannot be."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: RunState,
        averaged: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Save weights, moments and ``state``; return the folder that the checkpoint has, or will have.

        ``averaged`` is a moving average of the weights, under their names.

        Raises OSError in every process where one could not write, also where that was the checkpoint before this one.
        The checkpoints before it are kept.
        """
        self.wait()
        target = self._run.checkpoint(state.step)
        draft = self._run.checkpoints / f"{_UNFINISHED}{target.name}"
        files = {MODEL_FILE: {name: p.detach().contiguous() for name, p in model.state_dict().items()}}
        if averaged is not None:
            files[TRAINED_FILE] = files[MODEL_FILE]
            files[MODEL_FILE] = files[MODEL_FILE] | {name: average.contiguous() for name, average in averaged.items()}
        files[OPTIMIZER_FILE] = _optimizer_tensors(model, optimizer)

        first_process_does(partial(_begin, self._run, draft))
        complete = partial(_complete, self._run, self._config, state, draft, self._run.best_checkpoint())
        write: Callable[[_Files], None] = partial(_write_whole, draft, complete=complete)
        if is_spread():
            from adamae_fast.train.sharded_checkpoint import own_share, write_shards

            if self._group is None:
                # The thread's own: the training talks over the other one. A new group would wait for half an hour.
                patience = timedelta(seconds=self._config.distributed.timeout)
                self._group = dist.new_group(backend="gloo", timeout=patience)
            names = {file: list(tensors) for file, tensors in files.items()}
            folder = draft / OPTIMIZER_FOLDER
            write = partial(write_shards, folder, names=names, complete=complete, group=self._group)
            files = own_share(files)
        if self._config.checkpoint.asynchronous:
            self._under_way = self._write_beside(draft, write, files, next(model.parameters()).device)
        else:
            _write(draft, write, files)
        return target

    def _write_beside(
        self, draft: Path, write: Callable[[_Files], None], files: _Files, device: torch.device
    ) -> Future[None]:
        if self._stager is None or self._thread is None:
            from adamae_fast.train.sharded_checkpoint import build_stager

            self._stager = build_stager(device.type == "cuda")
            # A new thread would look at the first GPU, whichever is this process's.
            self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=make_current, initargs=(device,))
        return self._thread.submit(_write, draft, write, cast(_Files, self._stager.stage(files)))


def save_checkpoint(
    run: RunFolder,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    averaged: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write one checkpoint to its end, as :class:`CheckpointSaver` does. Returns its folder."""
    with CheckpointSaver(run, config) as saver:
        return saver.save(model, optimizer, state, averaged)


def remove_unfinished(run: RunFolder) -> None:
    """Remove what is left of checkpoints that were not written to their end."""
    for leftover in run.checkpoints.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)


def _begin(run: RunFolder, draft: Path) -> None:
    remove_unfinished(run)
    draft.mkdir(parents=True)


def _write(draft: Path, write: Callable[[_Files], None], files: _Files) -> None:
    try:
        write(files)
    except (OSError, SafetensorError) as error:
        if process_index() == 0:
            shutil.rmtree(draft, ignore_errors=True)  # its space may be what is missing
        step = draft.name.removeprefix(_UNFINISHED)
        failure = OSError(f"{draft.with_name(step)} could not be written ({error}); the checkpoints before it are kept")
        failure.errno = getattr(error, "errno", None)
        raise failure from error


def _write_whole(draft: Path, files: _Files, complete: Callable[[], None]) -> None:
    for name, tensors in files.items():
        write_tensors_file(tensors, draft / name)
    complete()


def _complete(run: RunFolder, config: RunConfig, state: RunState, draft: Path, best: Path | None) -> None:
    """Add configuration and sums to what is written, give it its name, and drop the oldest but for the ``best``."""
    save_config(config, draft / CONFIG_FILE)
    paths = sorted(path for path in draft.rglob("*") if path.is_file())
    fields = {**asdict(state), "files": {path.relative_to(draft).as_posix(): _fingerprint(path) for path in paths}}
    (draft / STATE_FILE).write_text(json.dumps({**fields, "crc32": _fields_crc(fields)}, indent=1))

    for path in (*draft.rglob("*"), draft):
        _flush_to_disk(path)
    draft.rename(run.checkpoint(state.step))
    _flush_to_disk(run.checkpoints)
    for old in run.list_checkpoints()[: -config.checkpoint.keep]:
        if old != best:
            # Renamed first: half a checkpoint must not be listed as one.
            shutil.rmtree(old.rename(old.with_name(f"{_UNFINISHED}{old.name}")))


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averaged: Mapping[str, Tensor] | None = None
) -> RunState:
    """Restore weights and moments, and the moving average into ``averaged`` where one is kept.

    An average that the checkpoint does not have begins with the weights. Several processes call this together, and
    share the work of :func:`verify_checkpoint`; each takes its part of what the model has in parts.

    Raises CheckpointError, in all of them, for a damaged or unfitting checkpoint.
    """
    state = _verify_together(folder)
    own = model.state_dict()
    weights = load_file(folder / MODEL_FILE)
    trained = load_file(folder / TRAINED_FILE) if (folder / TRAINED_FILE).exists() else weights
    try:
        model.load_state_dict({name: _split_like(value, own.get(name)) for name, value in trained.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit this configuration's model: {error}") from error
    for name, average in (averaged or {}).items():
        average.copy_(_split_like(weights[name], average))
    _restore_optimizer(_read_moments(folder, model), model, optimizer)
    return state


def verify_checkpoint(folder: Path) -> RunState:
    """Compare every file with the size and sum that were recorded when it was written; return where the run stood.

    Raises CheckpointError that names the file, and the newest sound checkpoint before this one.
    """
    state, damage = _examine(folder, first=0, stride=1)
    if state is None:
        raise CheckpointError(f"{folder} is damaged ({damage}). {_remedy(folder)}")
    return state


def _verify_together(folder: Path) -> RunState:
    state, damage = _examine(folder, process_index(), num_processes())
    found = [other for other in every_process_says(damage) if other is not None]
    if state is None or found:
        raise CheckpointError(f"{folder} is damaged ({found[0]}). {first_process_does(lambda: _remedy(folder))}")
    return state


def _examine(folder: Path, first: int, stride: int) -> tuple[RunState, None] | tuple[None, str]:
    """Look at every ``stride``-th file; return where the run stood, or what is wrong."""
    try:
        fields = json.loads((folder / STATE_FILE).read_text())
        if fields.pop("crc32") != _fields_crc(fields):
            raise CheckpointError(f"{STATE_FILE} was changed after it was written")
        for name, fingerprint in sorted(fields.pop("files").items())[first::stride]:
            found = _fingerprint(folder / name)
            if found != fingerprint:
                raise CheckpointError(f"{name} has {found}, but was written with {fingerprint}")
        return RunState(**fields), None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        return None, str(error)


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


def _read_moments(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    if (folder / OPTIMIZER_FILE).exists():
        tensors = load_file(folder / OPTIMIZER_FILE)
        return {name: _split_like(value, parameters.get(name.rpartition(".")[0])) for name, value in tensors.items()}
    from adamae_fast.train.sharded_checkpoint import read_moments

    return read_moments(folder / OPTIMIZER_FOLDER, parameters)


def _split_like(value: Tensor, like: Tensor | None) -> Tensor:
    """Return this process's part of ``value``, where ``like`` is its part of a tensor of that shape."""
    if like is None or like.shape != value.shape or not is_spread():
        return value
    from adamae_fast.train.sharded_checkpoint import split_like

    return split_like(value, like)


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
