"""Pre-training: from videos to checkpoints, metrics and a report."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from rich.console import Console

from adamae_fast.config import PretrainConfig, save_config
from adamae_fast.data.loader import clip_batches
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.quarantine import DataStoppedError, Quarantine
from adamae_fast.device import peak_memory_bytes, pick_device
from adamae_fast.run_folder import RunFolder
from adamae_fast.train import checkpoint
from adamae_fast.train.metrics import IntervalClock, MetricsLog, ProgressLine
from adamae_fast.train.schedule import Schedule
from adamae_fast.train.step import Stepper
from adamae_fast.train.summary import write_summary

log = logging.getLogger("adamae_fast")


def pretrain(config: PretrainConfig, console: Console) -> dict[str, object]:
    """Run, or continue, a pre-training run up to its last step or a stop signal; return what summary.json holds.

    Raises ValueError for a configuration, manifest or checkpoint that cannot be used, and RunStoppedError for too many
    unreadable videos (what was done is saved) or for a value that is not finite (the last checkpoint stands).
    """
    for message in config.without_effect():
        log.warning(message)
    device = pick_device(config.train.device, "train.device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    entries = read_manifest(config.data.manifest, config.data.root)
    schedule = Schedule.from_config(config, len(entries))
    run = RunFolder(config.output_dir)
    with run.lock(), stop_signals() as stop:
        stepper = Stepper(config, device)
        first_step = _resume(config, run, stepper, schedule, len(entries))
        save_config(config, run.config)
        setting = f"{len(entries)} videos · {device}, {config.train.precision} · {schedule.describe()}"
        console.print(setting, soft_wrap=True)
        step = _train(config, run, entries, schedule, stepper, first_step, console, stop)
        if step < schedule.total_steps:
            console.print(f"stopped by {stop[0]} after step {step}; the same command continues", soft_wrap=True)
        return write_summary(run, config, stepper.model, entries, step, schedule.total_steps, console)


def _train(
    config: PretrainConfig,
    run: RunFolder,
    entries: Sequence[Entry],
    schedule: Schedule,
    stepper: Stepper,
    first_step: int,
    console: Console,
    stop: Sequence[str],
) -> int:
    """Take steps until the run ends or ``stop`` holds a signal's name; return how many are done in all."""
    accumulate = config.train.accumulate
    quarantine = Quarantine(run.quarantine, len(entries), config.data.max_bad_share)
    first_batch, num_batches = first_step * accumulate, schedule.total_steps * accumulate
    batches = clip_batches(config, entries, first_batch, num_batches, stepper.device, quarantine.crashers)
    clock = IntervalClock()
    step = saved = logged = first_step
    with (
        closing(batches),
        MetricsLog(run, first_step, tensorboard=config.log.tensorboard) as metrics_log,
        ProgressLine(console, first_step, schedule.total_steps) as progress,
    ):
        try:
            while step < schedule.total_steps and not stop:
                stepper.begin(step, schedule.learning_rate(step))
                for _ in range(accumulate):
                    batch = clock.wait_for(lambda: next(batches))
                    quarantine.add(batch.bad)
                    stepper.accumulate(batch.video)
                stepper.finish(step)
                step += 1
                progress.advance(step)

                ends = step == schedule.total_steps or bool(stop)
                if ends or step == 1 or step % config.log.every == 0:
                    metrics = {
                        "step": step,
                        **stepper.read_figures(),
                        **clock.lap(step - logged, schedule.total_batch),
                        "lr": schedule.learning_rate(step - 1),
                        "epoch": step / schedule.steps_per_epoch,
                        "memory_bytes": peak_memory_bytes(stepper.device),
                        "quarantined": quarantine.count,
                    }
                    metrics_log.write(metrics)
                    progress.report(metrics)
                    logged = step
                if ends or step % config.checkpoint.every == 0:
                    _save(run, config, stepper, step, len(entries))
                    saved = step
        except DataStoppedError as error:
            if step > saved:
                _save(run, config, stepper, step, len(entries))
            quarantine.add(error.bad)
            raise
    return step


def _save(run: RunFolder, config: PretrainConfig, stepper: Stepper, step: int, num_videos: int) -> None:
    stepper.check()
    state = checkpoint.RunState(step=step, num_videos=num_videos, loss_scale=stepper.scaler.state_dict())
    checkpoint.save_checkpoint(run, config, stepper.model, stepper.optimizer, state)


def _resume(config: PretrainConfig, run: RunFolder, stepper: Stepper, schedule: Schedule, num_videos: int) -> int:
    """Restore what ``resume``, or for a fresh run ``init_weights``, asks for; return the number of steps done."""
    folder = checkpoint.find_resume_point(config.resume, run)
    if folder is None:
        if config.init_weights is not None:
            stepper.model.load_weights(config.init_weights)
            log.info("starting from the weights of %s", config.init_weights)
        return 0
    state = checkpoint.load_checkpoint(folder, stepper.model, stepper.optimizer)
    if state.step > schedule.total_steps:
        raise ValueError(
            f"{folder} stands at step {state.step}, but this run ends at step {schedule.total_steps}; raise "
            "train.steps or train.epochs, or choose another output_dir"
        )
    if state.loss_scale:
        stepper.scaler.load_state_dict(state.loss_scale)
    for key, (then, now) in checkpoint.differences(folder, config).items():
        log.warning("%s was %r in %s and is %r now", key, then, folder, now)
    if state.num_videos != num_videos:
        log.warning("%s was written with %d videos, not %d: other clips follow", folder, state.num_videos, num_videos)
    for path in checkpoint.set_aside_newer(run, state.step):
        log.warning("a newer checkpoint was set aside as %s", path)
    log.info("continuing from %s", folder)
    return state.step


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Yield a list that receives the name of the first SIGTERM or SIGINT; a second one ends the process as usual.

    Only the main thread may watch signals; elsewhere the list stays empty.
    """
    received: list[str] = []
    watched = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.getsignal(number) for number in watched}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for number in watched:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        restore()
