"""Fine-tuning: from labelled videos, and mostly a pre-trained encoder, to a classifier."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from shlex import quote

import torch
from rich.console import Console

from adamae_fast.config import save_config
from adamae_fast.config_distributed import distributed_without_effect
from adamae_fast.config_finetune import FinetuneConfig, ViewsConfig
from adamae_fast.data.labelled import labelled_batches, read_labels
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.quarantine import DataStoppedError, Quarantine
from adamae_fast.device import describe_device
from adamae_fast.distributed.parallelize import describe_sharing
from adamae_fast.distributed.world import World, joined
from adamae_fast.errors import RunStoppedError
from adamae_fast.interop.starting_point import load_encoder
from adamae_fast.run_folder import RunFolder
from adamae_fast.train.finetune_step import FinetuneStepper, build_classifier
from adamae_fast.train.loop import is_validated, take_steps
from adamae_fast.train.predict import Predictions, gather_predictions, predict_views
from adamae_fast.train.resume import KeyKinds, resume_run
from adamae_fast.train.schedule import Schedule
from adamae_fast.train.signals import stop_signals
from adamae_fast.train.summary import print_facts, print_stopped, print_summary, summarize, write_summary_file
from adamae_fast.train.words import Word, tell_all

log = logging.getLogger("adamae_fast")

CENTRE = ViewsConfig(temporal=1, spatial=1)

KEYS = KeyKinds(
    other_model=("model.", "classifier.num_classes"),
    other_experiment=(
        "seed", "classifier.drop_path", "augment.", "optim.",
        "train.precision", "train.ema_decay",
        "data.sampling", "data.stride", "data.crop", "data.random_resized_scale", "data.flip", "data.repeat",
    ),
    harmless=(
        "output_dir", "resume", "init", "checkpoint.", "log.", "data.num_workers", "data.timeout", "views.",
        "data.cache_gib", "optim.sampler_lr_scale",
        "distributed.timeout", "model.attention.", "model.sampler.", "model.decoder.", "train.recompute",
        "train.cuda_graph",
    ),
    worth_a_warning=(
        "model.layer_norm", "optim.implementation", "train.compile", "train.batch_size", "train.accumulate",
    ),
)  # fmt: skip
"""What a changed key means for a checkpoint."""


@dataclass(frozen=True)
class LabelledVideos:
    """A manifest and the class of each of its videos."""

    entries: Sequence[Entry]
    labels: Sequence[int]


def finetune(config: FinetuneConfig, console: Console) -> dict[str, object]:
    """Run, or continue, a fine-tuning run up to its last step or a stop signal; return what summary.json holds.

    Raises ValueError for a configuration, manifest or checkpoint that cannot be used, and RunStoppedError for too many
    unreadable videos (what was done is saved) or for a value that is not finite (the last checkpoint stands).
    """
    with joined(config.train.device, "train.device", config.distributed.timeout) as (world, device):
        return _finetune(config, world, device, console if world.is_first else Console(quiet=True))


def _finetune(config: FinetuneConfig, world: World, device: torch.device, console: Console) -> dict[str, object]:
    if world.is_first:
        for message in (*config.without_effect(), *distributed_without_effect(config, world.size)):
            log.warning(message)
    videos, num_classes = _read("data.manifest", config.data.manifest, config.data.root, config.classifier.num_classes)
    val, _ = _read("val.manifest", config.val.manifest, config.val.root, num_classes)
    config = replace(config, classifier=replace(config.classifier, num_classes=num_classes))
    schedule = Schedule.from_config(config, len(videos.entries), world.size)
    run = RunFolder(config.output_dir)
    with world.held_by_first(run.lock()), stop_signals(patient=world.size > 1) as stop:
        stepper = FinetuneStepper(config, num_classes, device, world)

        def begin() -> None:
            if config.init is not None:
                model = build_classifier(config, num_classes)
                keys = load_encoder(model, config.init)
                stepper.take_weights(model.state_dict())
                print_facts([("init", f"{config.init}: {keys}")], console)
                stepper.restart_average()

        step = first_step = resume_run(config, run, stepper, schedule, len(videos.entries), KEYS, begin, world)

        def is_finished() -> bool:
            return step == schedule.total_steps and is_validated(run, step)

        if world.on_first(is_finished):
            console.print(f"{run.path}: already finished at step {first_step}", markup=False)
        else:
            if world.is_first:
                run.summary.unlink(missing_ok=True)  # of the part of the run before this one
                save_config(config, run.config)
            _print_setting(config, stepper, schedule, videos, val, console, world)
            step = _train(config, run, videos, val, schedule, stepper, first_step, console, stop, world)
        stopped_by = None if world.on_first(is_finished) else stop[0]
        if not world.is_first:
            return {"stopped_by": stopped_by}
        if stopped_by:
            print_stopped(config, step, stopped_by, console)
        return _write_summary(run, step, schedule.total_steps, stopped_by, console)


def _read(key: str, manifest: str, root: str | None, num_classes: int | None) -> tuple[LabelledVideos, int]:
    if not manifest:
        raise ValueError(f"{key} is required: name an annotation file with labels, or a folder that data prepare wrote")
    entries = read_manifest(manifest, root, (key, key.replace("manifest", "root")))
    labels, num_classes = read_labels(entries, manifest, num_classes)
    return LabelledVideos(entries, labels), num_classes


def _print_setting(
    config: FinetuneConfig,
    stepper: FinetuneStepper,
    schedule: Schedule,
    videos: LabelledVideos,
    val: LabelledVideos,
    console: Console,
    world: World,
) -> None:
    parameters = sum(parameter.numel() for parameter in stepper.model.parameters())
    print_facts(
        [
            ("run", f"{config.output_dir}, {len(videos.entries)} videos, {len(val.entries)} for validation"),
            ("device", f"{describe_device(stepper.device)}, {config.train.precision}{describe_sharing(config, world)}"),
            ("model", f"{config.model.size}, {parameters / 1e6:.1f} M parameters, {stepper.model.num_classes} classes"),
            ("attention", ", ".join(f"{part} {name}" for part, name in stepper.attention_backends.items())),
            *schedule.describe(),
        ],
        console,
    )


def _train(
    config: FinetuneConfig,
    run: RunFolder,
    videos: LabelledVideos,
    val: LabelledVideos,
    schedule: Schedule,
    stepper: FinetuneStepper,
    first_step: int,
    console: Console,
    stop: list[str],
    world: World,
) -> int:
    num_videos, accumulate = len(videos.entries), config.train.accumulate
    quarantine = Quarantine(run.quarantine, num_videos, config.data.max_bad_share, writes=world.is_first)
    batches = labelled_batches(
        videos.entries,
        videos.labels,
        config.data,
        num_frames=config.model.num_frames,
        frame_size=config.model.frame_size,
        seed=config.seed,
        batch_size=config.train.batch_size,
        start_batch=first_step * accumulate,
        num_batches=schedule.total_steps * accumulate,
        device=stepper.device,
        known_crashers=quarantine.crashers,
        rank=world.rank,
        world_size=world.size,
    )

    def validate() -> dict[str, float] | None:
        return _validate(config, run, val, stepper, console, stop, world)

    return take_steps(
        config, run, schedule, stepper, batches, quarantine, num_videos, first_step, console, stop, world, validate
    )


def _validate(
    config: FinetuneConfig,
    run: RunFolder,
    val: LabelledVideos,
    stepper: FinetuneStepper,
    console: Console,
    stop: list[str],
    world: World,
) -> dict[str, float] | None:
    """Accuracy on the centre clip of each validation video; None once a process was told to stop.

    The processes share the videos. Their errors and signals are known to all when all are done with theirs.
    """
    quarantine = Quarantine(run.quarantine_val, len(val.entries), config.data.max_bad_share, writes=world.is_first)
    mine: Predictions | None = None
    error: RunStoppedError | None = None
    try:
        with stepper.validated_model() as model:
            mine = predict_views(
                model,
                val.entries,
                config,
                CENTRE,
                device=stepper.device,
                rank=world.rank,
                world_size=world.size,
                known_crashers=quarantine.crashers,
                stop=stop,
            )
    except RunStoppedError as caught:
        error = caught
    bad = error.bad if isinstance(error, DataStoppedError) else mine.bad if mine else ()
    if isinstance(error, DataStoppedError):
        error.bad = ()  # not the training's
    word = tell_all(world, Word([] if mine or error else stop[:1], error, bad))
    quarantine.add(word.bad)
    if isinstance(word.error, DataStoppedError):
        raise word.error  # on all of them, to be told where the training's are
    if word.error is not None:
        raise world.agreed(word.error)
    if mine is None or word.signals:
        stop[:] = word.signals[:1]
        return None
    found = gather_predictions(mine, len(val.entries), world)
    figures = {**found.accuracy(val.labels), "videos": len(found.ids_V), "unreadable": len(found.bad)}
    accuracies = ", ".join(f"{name} {value:.2%}" for name, value in figures.items() if name.startswith("top"))
    unreadable = f"; {len(found.bad)} unreadable" if found.bad else ""
    console.print(f"validation: {accuracies} of {len(found.ids_V)} videos{unreadable}", highlight=False, soft_wrap=True)
    return figures


def _write_summary(
    run: RunFolder, step: int, total_steps: int, stopped_by: str | None, console: Console
) -> dict[str, object]:
    """Write summary.json; print where everything is and the figures as JSON."""
    summary = summarize(run, step, total_steps, stopped_by)
    best, best_checkpoint = run.best_validation(), run.best_checkpoint()
    if best is not None:
        summary |= {"best_step": best["step"], "best_top1": best["top1"], "best_top5": best["top5"]}
    summary["best"] = None if best_checkpoint is None else str(best_checkpoint)
    write_summary_file(run, summary)
    next_commands = [f"adamae-fast evaluate {quote(str(run.path))}"] if step == total_steps else []
    print_summary(summary, ("best", "metrics", "checkpoint"), console, next_commands)
    return summary
