"""The training loop: batches, steps, metrics, checkpoints, and after each epoch what measures the model."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from typing import Any

from rich.console import Console

from adamae_fast.config import RunConfig
from adamae_fast.data.batch import Batch
from adamae_fast.data.labelled import LabelledBatch
from adamae_fast.data.quarantine import DataStoppedError, Quarantine, TooManyBadVideosError
from adamae_fast.device import peak_memory_bytes
from adamae_fast.distributed.world import World
from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train import checkpoint
from adamae_fast.train.full_disk import full_disk_told
from adamae_fast.train.metrics import IntervalClock, MetricsLog, ProgressLine, over_processes
from adamae_fast.train.sampler_watch import SamplerWatch
from adamae_fast.train.schedule import Schedule
from adamae_fast.train.stalls import LoadFigures, StallWatch
from adamae_fast.train.step import BaseStepper
from adamae_fast.train.words import Word, tell_all

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
    stop: list[str],
    world: World,
    validate: Validate | None = None,
    sampler_watch: SamplerWatch | None = None,
) -> int:
    """Take steps until the run ends or ``stop`` holds a signal's name; return how many are done in all.

    With ``validate``, each epoch ends with a checkpoint and a line of validation.jsonl. A run that was stopped between
    the two begins with that line. The checkpoint of the best line is kept. ``sampler_watch`` looks on at each
    report; of several processes, the first one alone has it.

    Of several processes, all take the same steps and stop after the same one: a signal, an unreadable video or an error
    of the data that one of them meets is known to all before the next micro-batch, and then ``stop`` holds the signal's
    name on all of them. The first one writes.
    """
    clock, load, stalls = IntervalClock(stepper.device), LoadFigures(), StallWatch(config, stepper.device.type)
    step = saved = logged = first_step
    metrics_log: MetricsLog | None = None
    progress: ProgressLine | None = None
    with ExitStack() as stack:
        stack.enter_context(closing(batches))
        saver = stack.enter_context(checkpoint.CheckpointSaver(run, config))
        if world.is_first:
            metrics_log = stack.enter_context(MetricsLog(run, first_step, tensorboard=config.log.tensorboard))
            progress = stack.enter_context(ProgressLine(console, first_step, schedule.total_steps))

        def report() -> None:
            nonlocal logged
            figures = stepper.read_figures()
            mine = {
                **clock.lap(step - logged, schedule.total_batch),
                **load.lap(),
                "memory_bytes": peak_memory_bytes(stepper.device),
            }
            metrics = {
                "step": step,
                **figures,
                **(sampler_watch.measure() if sampler_watch else {}),
                **over_processes(world.gather({**mine, "forward_seconds": stepper.forward_time.lap()}), step - logged),
                "lr": schedule.learning_rate(step - 1),
                "epoch": step / schedule.steps_per_epoch,
                "quarantined": quarantine.count,
            }
            if metrics_log and progress:
                metrics_log.write(metrics)
                progress.report(metrics)
                stalls.observe(step - logged, metrics)
                for alarm in sampler_watch.observe(metrics) if sampler_watch else ():
                    metrics_log.write_alarm(*alarm)
            logged = step

        def save() -> None:
            nonlocal saved
            stepper.check()
            state = checkpoint.RunState(
                step=step,
                num_videos=num_videos,
                loss_scale=stepper.scaler.state_dict(),
                total_batch=schedule.total_batch,
            )
            with full_disk_told(run, world):
                saver.save(stepper.model, stepper.optimizer, state, stepper.averaged)
            saved = step

        def catch_up() -> None:
            if step > logged:
                report()
            if step > saved:
                save()

        def end_epoch() -> None:
            if validate is None or not schedule.ends_epoch(step):
                return
            if world.on_first(lambda: is_validated(run, step)):
                return
            catch_up()
            figures = validate()
            if figures is not None and metrics_log:
                metrics_log.write_validation({"step": step, "epoch": step / schedule.steps_per_epoch, **figures})
            clock.restart()

        def next_batch() -> Batch | LabelledBatch | None:
            """The next micro-batch, once all processes have theirs; None once one of them was told to stop."""
            batch: Batch | LabelledBatch | None = None
            error: DataStoppedError | None = None
            signals = stop[:1]  # one may come at any moment
            if not signals:
                try:
                    batch = clock.wait_for(lambda: next(batches))
                except DataStoppedError as caught:
                    error = caught
            bad = error.bad if error else batch.bad if batch else ()
            word = tell_all(world, Word(signals, error, bad))
            if isinstance(word.error, DataStoppedError):
                word.error.bad = word.bad
                raise word.error
            quarantine.add(word.bad)
            if word.signals:
                stop[:] = word.signals[:1]
                return None
            return batch

        def wind_up(error: DataStoppedError) -> DataStoppedError:
            try:
                if step > saved:
                    save()
            finally:
                try:
                    quarantine.add(error.bad)
                except TooManyBadVideosError as too_many:
                    error = too_many
            return error

        failure: DataStoppedError | None = None
        try:
            end_epoch()
            while step < schedule.total_steps:
                stepper.begin(step, schedule.learning_rate(step))
                batch = None
                for _ in range(config.train.accumulate):
                    batch = next_batch()
                    if batch is None:
                        break
                    load.add(batch)
                    stepper.take(batch)
                if batch is None:  # the step under way is left out; it will be the first one after the resume
                    break
                stepper.finish(step)
                step += 1
                if progress:
                    progress.advance(step)
                if step == 1 or step % config.log.every == 0:
                    report()
                if step % config.checkpoint.every == 0:
                    save()
                end_epoch()
            catch_up()
            with full_disk_told(run, world):
                saver.wait()
        except DataStoppedError as error:
            failure = wind_up(error)
        if failure is not None:
            raise world.agreed(failure)
    return step


def is_validated(run: RunFolder, step: int) -> bool:
    """Whether validation.jsonl has a line for ``step``."""
    return any(line["step"] == step for line in read_json_lines(run.validation))
