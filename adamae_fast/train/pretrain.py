"""Pre-training: from videos to checkpoints, metrics and a report."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from operator import attrgetter
from pathlib import Path

import torch
from rich.console import Console

from adamae_fast.config import PretrainConfig, load_config, save_config
from adamae_fast.data.dali import Suitability
from adamae_fast.data.loader import clip_batches
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.quarantine import DataStoppedError, Quarantine
from adamae_fast.device import describe_device, peak_memory_bytes, pick_device
from adamae_fast.run_folder import RunFolder
from adamae_fast.train import checkpoint
from adamae_fast.train.metrics import IntervalClock, MetricsLog, ProgressLine, keep_metrics_until
from adamae_fast.train.schedule import Schedule
from adamae_fast.train.stalls import LoadFigures, StallWatch
from adamae_fast.train.step import Stepper
from adamae_fast.train.summary import write_summary

log = logging.getLogger("adamae_fast")

OTHER_MODEL = ("model.", "mask.strategy")
"""Keys that decide which weights there are, but for those that another list names more exactly."""

OTHER_EXPERIMENT = (
    "seed", "mask.", "loss.", "optim.", "train.batch_size", "train.accumulate", "train.precision",
    "data.stride", "data.crop", "data.random_resized_scale", "data.flip", "data.repeat", "model.decoder.keep_ratio",
)  # fmt: skip
"""Keys that make what follows another experiment than what came before."""

HARMLESS = (
    "output_dir", "resume", "init_weights", "checkpoint.", "log.", "data.num_workers", "data.timeout",
    "model.attention.", "train.recompute", "train.cuda_graph",
)  # fmt: skip
"""Keys that change nothing about the clips, masks and updates to come."""

WORTH_A_WARNING = ("model.layer_norm", "optim.implementation", "train.compile")
"""Keys that change how numbers are rounded, or which ones dropout draws; so do keys that no list names."""

CHOICES = (
    "model.decoder.keep_ratio", "model.layer_norm", "optim.implementation",
    "train.recompute", "train.compile", "train.cuda_graph",
)  # fmt: skip
"""Keys of docs/speed.md, which are printed at the start where they are not at their defaults."""


def kind_of_key(key: str) -> tuple[str, ...]:
    """Return the list whose entry fits ``key`` best: the longest one that it starts with."""
    kinds = (OTHER_MODEL, OTHER_EXPERIMENT, HARMLESS, WORTH_A_WARNING)
    fitting = [(len(entry), kind) for kind in kinds for entry in kind if key.startswith(entry)]
    return max(fitting, default=(0, WORTH_A_WARNING))[1]


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
    if not config.data.manifest:
        raise ValueError("data.manifest is required: name an annotation file or a folder of videos")
    entries = read_manifest(config.data.manifest, config.data.root)
    schedule = Schedule.from_config(config, len(entries))
    run = RunFolder(config.output_dir)
    with run.lock(), stop_signals() as stop:
        stepper = Stepper(config, device)
        first_step = _resume(config, run, stepper, schedule, len(entries))
        step = first_step
        if first_step == schedule.total_steps:
            console.print(f"{run.path}: already finished at step {first_step}; only its report is drawn again")
        else:
            run.summary.unlink(missing_ok=True)  # of the part of the run before this one
            save_config(config, run.config)
            _print_setting(config, stepper, schedule, len(entries), console)
            step = _train(config, run, entries, schedule, stepper, first_step, console, stop)
        stopped_by = stop[0] if step < schedule.total_steps else None
        if stopped_by:
            command = "the same command" if config.resume == "auto" else "the same command with --resume auto"
            console.print(f"stopped by {stopped_by} after step {step}; {command} continues", soft_wrap=True)
        # Pictures are drawn clip by clip, in other shapes than the training's: not worth another compilation.
        with torch.compiler.set_stance("force_eager"):
            return write_summary(run, config, stepper.model, entries, step, schedule.total_steps, stopped_by, console)


def changed_choices(config: PretrainConfig) -> dict[str, object]:
    """Return those of :data:`CHOICES` that are not at their defaults, with their values."""
    values = {key: (attrgetter(key)(config), attrgetter(key)(PretrainConfig())) for key in CHOICES}
    return {key: value for key, (value, default) in values.items() if value != default}


def _print_setting(
    config: PretrainConfig, stepper: Stepper, schedule: Schedule, num_videos: int, console: Console
) -> None:
    model = stepper.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    visible, tokens = model.num_visible, model.grid.num_tokens
    facts = [
        ("run", f"{config.output_dir}, {num_videos} videos"),
        ("device", f"{describe_device(stepper.device)}, {config.train.precision}"),
        ("model", f"{config.model.size}, {parameters / 1e6:.1f} M parameters"),
        ("attention", ", ".join(f"{part} {name}" for part, name in stepper.attention_backends.items())),
        ("mask", f"{config.mask.strategy}: {visible} of {tokens} tokens visible ({1 - visible / tokens:.1%} masked)"),
        *schedule.describe(),
    ]
    chosen = ", ".join(f"{key}={value}" for key, value in changed_choices(config).items())
    if chosen:
        facts.append(("options", chosen))
    if config.data.decoder == "dali":
        facts.append(("decoder", Suitability(stepper.device).describe()))
    for name, fact in facts:
        console.print(f"{name:<14}{fact}", soft_wrap=True, highlight=False)


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
    clock, load, stalls = IntervalClock(stepper.device), LoadFigures(), StallWatch(config, stepper.device.type)
    step = saved = logged = first_step
    with (
        closing(batches),
        MetricsLog(run, first_step, tensorboard=config.log.tensorboard) as metrics_log,
        ProgressLine(console, first_step, schedule.total_steps) as progress,
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
            state = checkpoint.RunState(step=step, num_videos=len(entries), loss_scale=stepper.scaler.state_dict())
            checkpoint.save_checkpoint(run, config, stepper.model, stepper.optimizer, state)
            saved = step

        try:
            while step < schedule.total_steps:
                stepper.begin(step, schedule.learning_rate(step))
                for _ in range(accumulate):
                    if stop:
                        break
                    batch = clock.wait_for(lambda: next(batches))
                    quarantine.add(batch.bad)
                    load.add(batch)
                    stepper.accumulate(batch.video)
                if stop:  # the step under way is left out; it will be the first one after the resume
                    break
                stepper.finish(step)
                step += 1
                progress.advance(step)
                if step == 1 or step % config.log.every == 0:
                    report()
                if step % config.checkpoint.every == 0:
                    save()
            if step > logged:
                report()
            if step > saved:
                save()
        except DataStoppedError as error:
            try:
                if step > saved:
                    save()
            finally:
                quarantine.add(error.bad)
            raise
    return step


def _refuse_lost_origin(config: PretrainConfig, run: RunFolder) -> None:
    """Refuse to begin with random weights what was begun from another run's checkpoint and has none of its own yet."""
    if config.resume == "auto" and run.config.exists():
        origin = load_config(run.config).resume
        if origin not in ("auto", "none"):
            raise ValueError(
                f"output_dir={config.output_dir!r} was begun with --resume {origin} and has no checkpoint of its own "
                "yet; give that --resume again"
            )


def _refuse_other_run(
    config: PretrainConfig, run: RunFolder, folder: Path, changed: Mapping[str, tuple[object, object]]
) -> None:
    """Refuse to continue a checkpoint as another model, or, in its own folder, as another experiment."""
    is_own = checkpoint.is_checkpoint_of(run, folder)
    refused = (OTHER_MODEL, OTHER_EXPERIMENT) if is_own else (OTHER_MODEL,)
    for key, (then, now) in changed.items():
        if kind_of_key(key) in refused:
            remedy = "choose another output_dir" if is_own else f"keep {key}={then!r} to continue it"
            if is_own and kind_of_key(key) is not OTHER_MODEL:
                remedy += f", with --resume {folder} if it is to go on from there"
            raise ValueError(f"{key}={now!r}, but {folder} was trained with {then!r}; {remedy}")


def _resume(config: PretrainConfig, run: RunFolder, stepper: Stepper, schedule: Schedule, num_videos: int) -> int:
    """Restore what ``resume``, or for a fresh run ``init_weights``, asks for; return the number of steps done."""
    folder = checkpoint.find_resume_point(config.resume, run)
    if folder is None:
        _refuse_lost_origin(config, run)
        if config.init_weights is not None:
            stepper.model.load_weights(config.init_weights)
            log.info("starting from the weights of %s", config.init_weights)
        return 0
    checkpoint.verify_checkpoint(folder)
    changed = checkpoint.differences(folder, config)
    _refuse_other_run(config, run, folder, changed)
    state = checkpoint.load_checkpoint(folder, stepper.model, stepper.optimizer)
    if state.step > schedule.total_steps:
        raise ValueError(
            f"{folder} stands at step {state.step}, but this run ends at step {schedule.total_steps}; raise "
            "train.steps or train.epochs, or choose another output_dir"
        )
    if state.loss_scale:
        stepper.scaler.load_state_dict(state.loss_scale)
    for key, (then, now) in changed.items():
        if kind_of_key(key) is not HARMLESS:
            log.warning("%s was %r in %s and is %r now", key, then, folder, now)
    if state.num_videos != num_videos:
        log.warning("%s was written with %d videos, not %d: other clips follow", folder, state.num_videos, num_videos)
    for path in checkpoint.set_aside_newer(run, state.step):
        log.warning("a newer checkpoint was set aside as %s", path)
    keep_metrics_until(run.metrics, state.step)
    log.info("continuing from %s", folder)
    return state.step


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Yield a list that receives the name of the first SIGTERM or SIGINT; a second one ends the process as usual.

    Only the main thread may watch signals; elsewhere the list stays empty.
    """
    received: list[str] = []
    watched = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    # What the parent process chose to ignore, as nohup does, stays ignored.
    previous = {n: h for n in watched if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for number in previous:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        restore()
