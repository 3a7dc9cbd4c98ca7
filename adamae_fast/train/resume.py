"""Where a run goes on, and whether what it is asked to be now still fits what it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamae_fast.config import RunConfig, load_run_config
from adamae_fast.distributed.world import World
from adamae_fast.run_folder import CONFIG_FILE, RunFolder
from adamae_fast.train import checkpoint
from adamae_fast.train.metrics import keep_metrics_until
from adamae_fast.train.schedule import Schedule
from adamae_fast.train.step import BaseStepper

log = logging.getLogger("adamae_fast")


@dataclass(frozen=True, kw_only=True)
class KeyKinds:
    """What a changed key means for a checkpoint: lists of keys, or of what they begin with."""

    other_model: tuple[str, ...]
    """Keys that decide which weights there are, but for those that another list names more exactly."""

    other_experiment: tuple[str, ...]
    """Keys that make what follows another experiment than what came before."""

    harmless: tuple[str, ...]
    """Keys that change nothing about the clips, random numbers and updates to come."""

    worth_a_warning: tuple[str, ...]
    """Keys that change how numbers are rounded, or which ones dropout draws; so do keys that no list names."""

    def kind_of(self, key: str) -> tuple[str, ...]:
        """Return the list whose entry fits ``key`` best: the longest one that it starts with."""
        kinds = (self.other_model, self.other_experiment, self.harmless, self.worth_a_warning)
        fitting = [(len(entry), kind) for kind in kinds for entry in kind if key.startswith(entry)]
        return max(fitting, default=(0, self.worth_a_warning))[1]


def _refuse_lost_origin(config: RunConfig, run: RunFolder) -> None:
    """Refuse to begin with random weights what was begun from another run's checkpoint and has none of its own yet."""
    if config.resume == "auto" and run.config.exists():
        origin = load_run_config(run.config, type(config)).resume
        if origin not in ("auto", "none"):
            raise ValueError(
                f"output_dir={config.output_dir!r} was begun with --resume {origin} and has no checkpoint of its own "
                "yet; give that --resume again"
            )


def _refuse_other_run(
    run: RunFolder, folder: Path, changed: Mapping[str, tuple[object, object]], keys: KeyKinds
) -> None:
    """Refuse to continue a checkpoint as another model, or, in its own folder, as another experiment."""
    is_own = checkpoint.is_checkpoint_of(run, folder)
    refused = (keys.other_model, keys.other_experiment) if is_own else (keys.other_model,)
    for key, (then, now) in changed.items():
        if keys.kind_of(key) in refused:
            remedy = "choose another output_dir" if is_own else f"keep {key}={then!r} to continue it"
            if is_own and keys.kind_of(key) is not keys.other_model:
                remedy += f", with --resume {folder} if it is to go on from there"
            raise ValueError(f"{key}={now!r}, but {folder} was trained with {then!r}; {remedy}")


def resume_run(
    config: RunConfig,
    run: RunFolder,
    stepper: BaseStepper[Any],
    schedule: Schedule,
    num_videos: int,
    keys: KeyKinds,
    begin: Callable[[], None],
    world: World,
) -> int:
    """Restore what ``resume`` asks for, or call ``begin`` for a fresh run; return the number of steps done.

    Raises ValueError for a checkpoint that cannot be used, or that another model or experiment wrote.
    """
    folder = world.on_first(lambda: _find(config, run, schedule, keys))
    if folder is None:
        begin()
        return 0
    state = checkpoint.load_checkpoint(folder, stepper.model, stepper.optimizer, stepper.averaged)
    if state.loss_scale:
        stepper.scaler.load_state_dict(state.loss_scale)
    world.on_first(lambda: _tell_and_tidy(config, run, folder, state, num_videos, keys))
    return state.step


def _find(config: RunConfig, run: RunFolder, schedule: Schedule, keys: KeyKinds) -> Path | None:
    """The checkpoint to go on from, if any; the first process looks for all."""
    folder = checkpoint.find_resume_point(config.resume, run)
    if folder is None:
        _refuse_lost_origin(config, run)
        return None
    state = checkpoint.verify_checkpoint(folder)
    changed = checkpoint.differences(folder, config)
    _refuse_other_run(run, folder, changed, keys)
    then = load_run_config(folder / CONFIG_FILE, type(config)).train
    total_batch = state.total_batch or then.batch_size * then.accumulate
    if total_batch != schedule.total_batch and checkpoint.is_checkpoint_of(run, folder):
        raise ValueError(
            f"train.batch_size={config.train.batch_size!r} × train.accumulate={config.train.accumulate} × processes = "
            f"{schedule.total_batch} clips a step, but {folder} was trained with {total_batch}; choose a product of "
            f"{total_batch}, or another output_dir, with --resume {folder} if it is to go on from there"
        )
    if state.step > schedule.total_steps:
        raise ValueError(
            f"{folder} stands at step {state.step}, but this run ends at step {schedule.total_steps}; raise "
            "train.steps or train.epochs, or choose another output_dir"
        )
    return folder


def _tell_and_tidy(
    config: RunConfig, run: RunFolder, folder: Path, state: checkpoint.RunState, num_videos: int, keys: KeyKinds
) -> None:
    """Say what has changed since the checkpoint, and put away what came after it."""
    for key, (then, now) in checkpoint.differences(folder, config).items():
        if keys.kind_of(key) is not keys.harmless:
            log.warning("%s was %r in %s and is %r now", key, then, folder, now)
    if state.num_videos != num_videos:
        log.warning("%s was written with %d videos, not %d: other clips follow", folder, state.num_videos, num_videos)
    for path in checkpoint.set_aside_newer(run, state.step):
        log.warning("a newer checkpoint was set aside as %s", path)
    keep_metrics_until(run.metrics, state.step)
    keep_metrics_until(run.validation, state.step)
    log.info("continuing from %s", folder)
