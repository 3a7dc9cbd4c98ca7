"""The training loop: batches, steps, metrics, checkpoints, and after each epoch what measures the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

from rich.console import Console

from adamae_fast.config import RunConfig
from adamae_fast.data.labelled import LabelledBatch
from adamae_fast.data.loader import Batch
from adamae_fast.data.quarantine import DataStoppedError, Quarantine
from adamae_fast.device import peak_memory_bytes
from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train import checkpoint
from adamae_fast.train.metrics import IntervalClock, MetricsLog, ProgressLine
from adamae_fast.train.schedule import Schedule
from adamae_fast.train.stalls import LoadFigures, StallWatch
from adamae_fast.train.step import BaseStepper

Validate = Callable[[], dict[str, float] | None]
"""Measures the model as it is and returns top1 and the like; None if a stop signal came first."""


def take_steps(
    config: RunConfig,
    run: RunFolder,
    schedule: Schedule,
    stepper: BaseStepper[Any],
    batches: Generator[Batch | LabelledBatch, None, None],
    quarantine: Quarantine,
    num_videos: int,
    first_step: int,
    console: Console,
    stop: Sequence[str],
    validate: Validate | None = None,
) -> int:
    """Take steps until the run ends or ``stop`` holds a signal's name; return how many are done in all.

    With ``validate``, each epoch ends with a checkpoint and a line of validation.jsonl. A run that was stopped between
    the two begins with that line. The checkpoint of the best line is kept.
    """
    clock, load, stalls = IntervalClock(stepper.device), LoadFigures(), StallWatch(config, stepper.device.type)
    step = saved = logged = first_step
    with (
        closing(batches),
        MetricsLog(run, first_step, tensorboard=config.log.tensorboard) as metrics_log,
        ProgressLine(console, first_step, schedule.total_steps) as progress,
        checkpoint.CheckpointSaver(run, config) as saver,
    ):

        def report() -> None:
            nonlocal logged
            metrics = {
                "step": step,
                **stepper.read_figures(),
                **clock.lap(step - logged, schedule.total_batch),
                **load.lap(),
                "lr": schedule.learning_rate(step - 1),
                "epoch": step / schedule.steps_per_epoch,
                "memory_bytes": peak_memory_bytes(stepper.device),
                "quarantined": quarantine.count,
            }
            metrics_log.write(metrics)
            progress.report(metrics)
            stalls.observe(step - logged, metrics)
            logged = step

        def save() -> None:
            nonlocal saved
            stepper.check()
            state = checkpoint.RunState(step=step, num_videos=num_videos, loss_scale=stepper.scaler.state_dict())
            saver.save(stepper.model, stepper.optimizer, state, stepper.averaged)
            saved = step

        def catch_up() -> None:
            if step > logged:
                report()
            if step > saved:
                save()

        def end_epoch() -> None:
            if validate is None or not schedule.ends_epoch(step) or is_validated(run, step):
                return
            catch_up()
            figures = validate()
            if figures is not None:
                metrics_log.write_validation({"step": step, "epoch": step / schedule.steps_per_epoch, **figures})
            clock.restart()

        try:
            end_epoch()
            while step < schedule.total_steps:
                stepper.begin(step, schedule.learning_rate(step))
                for _ in range(config.train.accumulate):
                    if stop:
                        break
                    batch = clock.wait_for(lambda: next(batches))
                    quarantine.add(batch.bad)
                    load.add(batch)
                    stepper.take(batch)
                if stop:  # the step under way is left out; it will be the first one after the resume
                    break
                stepper.finish(step)
                step += 1
                progress.advance(step)
                if step == 1 or step % config.log.every == 0:
                    report()
                if step % config.checkpoint.every == 0:
                    save()
                end_epoch()
            catch_up()
        except DataStoppedError as error:
            try:
                if step > saved:
                    save()
            finally:
                quarantine.add(error.bad)
            raise
    return step


def is_validated(run: RunFolder, step: int) -> bool:
    """Whether validation.jsonl has a line for ``step``."""
    return any(line["step"] == step for line in read_json_lines(run.validation))
