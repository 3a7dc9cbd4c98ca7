"""Pre-training: from videos to checkpoints, metrics and a report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import attrgetter

import torch
from rich.console import Console

from adamae_fast.config import PretrainConfig, save_config
from adamae_fast.config_distributed import distributed_without_effect
from adamae_fast.data.dali import Suitability
from adamae_fast.data.loader import clip_batches
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.quarantine import Quarantine
from adamae_fast.device import describe_device
from adamae_fast.distributed.parallelize import describe_sharing
from adamae_fast.distributed.world import World, joined
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.run_folder import RunFolder
from adamae_fast.train.loop import take_steps
from adamae_fast.train.resume import KeyKinds, resume_run
from adamae_fast.train.sampler_watch import SamplerWatch, read_boxed_clips
from adamae_fast.train.schedule import Schedule
from adamae_fast.train.signals import stop_signals
from adamae_fast.train.step import Stepper
from adamae_fast.train.summary import print_facts, print_stopped, write_summary

log = logging.getLogger("adamae_fast")

KEYS = KeyKinds(
    other_model=("model.", "mask.strategy"),
    other_experiment=(
        "seed", "mask.", "loss.", "optim.", "train.precision",
        "data.stride", "data.crop", "data.random_resized_scale", "data.flip", "data.repeat", "model.decoder.keep_ratio",
    ),
    harmless=(
        "output_dir", "resume", "init_weights", "checkpoint.", "log.", "data.num_workers", "data.timeout",
        "data.cache_gib", "distributed.timeout", "model.attention.", "train.recompute", "train.cuda_graph",
    ),
    worth_a_warning=(
        "model.layer_norm", "optim.implementation", "train.compile", "train.batch_size", "train.accumulate",
    ),
)  # fmt: skip
"""What a changed key means for a checkpoint."""

CHOICES = (
    "model.decoder.keep_ratio", "model.layer_norm", "optim.implementation",
    "train.recompute", "train.compile", "train.cuda_graph",
)  # fmt: skip
"""Keys of docs/speed.md, which are printed at the start where they are not at their defaults."""


def pretrain(config: PretrainConfig, console: Console) -> dict[str, object]:
    """Run, or continue, a pre-training run up to its last step or a stop signal; return what summary.json holds.

    Under torchrun the processes share each step; the first one writes, the others return ``stopped_by`` alone.

    Raises ValueError for a configuration, manifest or checkpoint that cannot be used, and RunStoppedError for too many
    unreadable videos (what was done is saved) or for a value that is not finite (the last checkpoint stands).
    """
    with joined(config.train.device, "train.device", config.distributed.timeout) as (world, device):
        return _pretrain(config, world, device, console if world.is_first else Console(quiet=True))


def _pretrain(config: PretrainConfig, world: World, device: torch.device, console: Console) -> dict[str, object]:
    if world.is_first:
        for message in (*config.without_effect(), *distributed_without_effect(config, world.size)):
            log.warning(message)
    if not config.data.manifest:
        raise ValueError("data.manifest is required: name an annotation file or a folder of videos")
    entries = read_manifest(config.data.manifest, config.data.root)
    schedule = Schedule.from_config(config, len(entries), world.size)
    run = RunFolder(config.output_dir)
    with world.held_by_first(run.lock()), stop_signals(patient=world.size > 1) as stop:
        stepper = Stepper(config, device, world)

        def begin() -> None:
            if config.init_weights is not None:
                model = AdaMAE(config.model, config.mask, config.loss)
                model.load_weights(config.init_weights)
                stepper.take_weights(model.state_dict())
                if world.is_first:
                    log.info("starting from the weights of %s", config.init_weights)

        first_step = resume_run(config, run, stepper, schedule, len(entries), KEYS, begin, world)
        step = first_step
        if first_step == schedule.total_steps:
            done = f"{run.path}: already finished at step {first_step}; only its report is drawn again"
            console.print(done, markup=False)
        else:
            if world.is_first:
                run.summary.unlink(missing_ok=True)  # of the part of the run before this one
                save_config(config, run.config)
            _print_setting(config, stepper, schedule, len(entries), console, world)
            step = _train(config, run, entries, schedule, stepper, first_step, console, stop, world)
        stopped_by = stop[0] if step < schedule.total_steps else None
        if not world.is_first:
            return {"stopped_by": stopped_by}
        if stopped_by:
            print_stopped(config, step, stopped_by, console)
        model = stepper.model
        if world.size > 1 and step == schedule.total_steps:  # the other processes do not wait for the pictures
            model = AdaMAE.from_pretrained(run.path).to(device)
        # Pictures are drawn clip by clip, in other shapes than the training's: not worth another compilation.
        with torch.compiler.set_stance("force_eager"):
            return write_summary(run, config, model, entries, step, schedule.total_steps, stopped_by, console)


def changed_choices(config: PretrainConfig) -> dict[str, object]:
    """Return those of :data:`CHOICES` that are not at their defaults, with their values."""
    values = {key: (attrgetter(key)(config), attrgetter(key)(PretrainConfig())) for key in CHOICES}
    return {key: value for key, (value, default) in values.items() if value != default}


def _print_setting(
    config: PretrainConfig, stepper: Stepper, schedule: Schedule, num_videos: int, console: Console, world: World
) -> None:
    model = stepper.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    visible, tokens = model.num_visible, model.grid.num_tokens
    facts = [
        ("run", f"{config.output_dir}, {num_videos} videos"),
        ("device", f"{describe_device(stepper.device)}, {config.train.precision}{describe_sharing(config, world)}"),
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
    print_facts(facts, console)


def _train(
    config: PretrainConfig,
    run: RunFolder,
    entries: Sequence[Entry],
    schedule: Schedule,
    stepper: Stepper,
    first_step: int,
    console: Console,
    stop: list[str],
    world: World,
) -> int:
    quarantine = Quarantine(run.quarantine, len(entries), config.data.max_bad_share, writes=world.is_first)
    accumulate = config.train.accumulate
    batches = clip_batches(
        config,
        entries,
        first_step * accumulate,
        schedule.total_steps * accumulate,
        stepper.device,
        quarantine.crashers,
        world.rank,
        world.size,
    )
    return take_steps(
        config,
        run,
        schedule,
        stepper,
        batches,
        quarantine,
        len(entries),
        first_step,
        console,
        stop,
        world,
        sampler_watch=_watch_sampler(config, run, entries, stepper.model, world),
    )


def _watch_sampler(
    config: PretrainConfig, run: RunFolder, entries: Sequence[Entry], model: AdaMAE, world: World
) -> SamplerWatch | None:
    """What looks at the sampler; None where there is none, and for all processes but the first."""
    if model.sampler is None or not world.is_first:
        return None
    clips = None
    # A process that has a share of the weights cannot call the model alone.
    if world.size == 1 or config.distributed.mode != "fsdp2":
        clips = read_boxed_clips(entries, config, model.grid, run.quarantined_paths())
    return SamplerWatch(config, model, clips)
