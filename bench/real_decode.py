"""Training on decoded videos, as a share of training on clips that are there already: ``python -m bench.real_decode``.

The same step twice, in turns: on one batch that stays on the device, and on batches from the data workers, decoded from
videos in the shape of Kinetics-400 that ``data prepare`` wrote, four crops of each decoded range. With DALI where it is
installed and, for H.264, where there is a GPU; with PyAV otherwise.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from adamae_fast.config import DataConfig, DecoderName, PretrainConfig, TrainConfig
from adamae_fast.data.batch import Batch
from adamae_fast.data.dali import dali_is_installed
from adamae_fast.data.loader import clip_batches
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.device import Uploader, num_usable_cores
from bench import arms, command, conditions, videos
from bench.arms import Setting

REPEAT = 4

WARM_UP = 3
"""Steps before the first timed one."""

GOAL = 0.9
"""Least share of the rate with clips on the device that is aimed at, on a GPU."""


def config_of(setting: Setting, decoder: DecoderName, num_workers: int) -> PretrainConfig:
    """What the data workers are asked for."""
    return PretrainConfig(
        model=setting.model,
        data=DataConfig(stride=videos.K400.stride, decoder=decoder, repeat=REPEAT, num_workers=num_workers),
        train=TrainConfig(batch_size=setting.batch_size, steps=1),
    )


def decoder_for(device: torch.device) -> DecoderName:
    """DALI decodes H.264 on a GPU only."""
    return "dali" if device.type == "cuda" and dali_is_installed() else "auto"


def seconds_of(steps: Callable[[int], None], num_steps: int, device: torch.device) -> float:
    """Wall time of a number of steps, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    steps(num_steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    setting: Setting, arm_name: str, entries: Sequence[Entry], num_workers: int, num_steps: int, rounds: int
) -> dict[str, Any]:
    """Clips a second of both, over all rounds.

    While the clips on the device are timed there are no workers, which would take cores, and lay batches up that are
    then there for nothing. What they lay up while they start is used before the clock runs.
    """
    decoder, device = decoder_for(setting.device), setting.device
    config = config_of(setting, decoder, num_workers)
    arm = arms.builders(setting, arms.plan_for(device, None))[0][arm_name]()
    resident, upload = arm.clips, Uploader(device)
    ahead = 2 * num_workers + 2  # PyTorch lets each worker be two batches ahead; DALI has one under way
    seconds = {"resident": 0.0, "decoded": 0.0}

    def on_resident(count: int) -> None:
        arm.clips = resident
        for _ in range(count):
            arm.step()

    on_resident(WARM_UP)
    for number in range(rounds):
        seconds["resident"] += seconds_of(on_resident, num_steps, device)
        first, num_batches = number * (2 * ahead + num_steps), 2 * ahead + num_steps
        with closing(clip_batches(config, entries, first, first + num_batches, device)) as batches:

            def on_decoded(count: int, batches: Iterator[Batch] = batches) -> None:
                for _ in range(count):
                    arm.clips = upload(next(batches).video)
                    arm.step()

            on_decoded(ahead)
            seconds["decoded"] += seconds_of(on_decoded, num_steps, device)
    clips = setting.batch_size * num_steps * rounds
    rates = {f"{name}_clips_per_s": clips / value for name, value in seconds.items()}
    return {
        "arm": arm_name,
        "batch": setting.batch_size,
        "decoder": decoder,
        "workers": num_workers,
        "repeat": REPEAT,
        **rates,
        "share": seconds["resident"] / seconds["decoded"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Render, prepare, measure, print, write."""
    parser = command.parser("real_decode", __doc__)
    parser.add_argument("--arm", default="ours-none", help="an arm of bench.step")
    parser.add_argument("--batch", type=int, help="clips of a step, a multiple of four")
    parser.add_argument("--workers", type=int, default=num_usable_cores(), help="data workers")
    options = parser.parse_args(arguments)
    missing = [name for name in ("av", "jsonargparse") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: the clips are rendered and read with them; pip install them"
        )
    from adamae_fast.data.prepare import prepare

    setting = command.setting_of(options, options.batch)
    batch = max(REPEAT, setting.batch_size // REPEAT * REPEAT)
    setting = dataclasses.replace(setting, batch_size=batch)
    taken = conditions.collect(setting.device)
    num_videos, num_frames = (3, 60) if options.quick else (8, None)
    num_steps, rounds = (2, 2) if options.quick else (3, 3) if setting.device.type == "cpu" else (40, 3)
    with tempfile.TemporaryDirectory() as scratch, command.progress(2) as (say, advance):
        say(f"rendering and preparing {num_videos} videos")
        manifest = videos.write(videos.K400, Path(scratch) / "videos", num_videos, num_frames)
        prepare(str(manifest), f"{scratch}/prepared")
        advance()
        say(f"training steps on batches of {batch}, {options.workers} workers")
        entries = read_manifest(f"{scratch}/prepared")
        row = measure(setting, options.arm, entries, options.workers, num_steps, rounds)
        advance()
    decoded, resident = row["decoded_clips_per_s"], row["resident_clips_per_s"]
    print(f"{decoded:.1f} clips/s decoded, {resident:.1f} with clips on the device: {row['share']:.1%}")
    command.finish("real_decode", {"conditions": taken, "goal": GOAL, "rows": [row]}, options)
    return 0


if __name__ == "__main__":
    command.run(main)
