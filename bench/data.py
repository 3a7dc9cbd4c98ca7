"""Clips a second that the data path delivers, by decoder, kind of file, repeat and workers: ``python -m bench.data``.

On videos rendered here in the shapes of Kinetics-400 and Something-Something V2 (``bench/videos.py``), as they are and
prepared by ``adamae-fast data prepare``. In one process on one thread, arms in turns, each round at new random places:

* **plain**: a loop of ``decord.VideoReader``, ``get_batch`` and one resize of the frames to the clip's size;
* **published-like**: a stand-in for the published loader's way, each frame a PIL image that is cropped and resized by
  itself, and the clip fp32, normalised, on the CPU;
* **ours**: what training reads, each decoder, with 1, 2 and 4 crops of each decoded range.

Then batches from worker processes, as many as training uses on as many cores: the published loader's way and ours. And
the memory of a process that opens many files.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from adamae_fast.config import DataConfig, DecoderName, ModelConfig, PretrainConfig, TrainConfig
from adamae_fast.data.clips import ClipPlan, plan_clip
from adamae_fast.data.dali import dali_is_installed
from adamae_fast.data.dataset import PretrainClips
from adamae_fast.data.decode import open_entry
from adamae_fast.data.loader import clip_batches
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.prepare import prepare
from bench import command, conditions, videos
from bench.data_memory import NUM_OPENS, resident_over_opens
from bench.timing import summarize

NUM_FRAMES, FRAME_SIZE, SEED = 16, 224, 0
"""Of the paper's clips."""

KEYINT = 16
"""Of the prepared files."""

REPEATS = (1, 2, 4)

_DEFAULT, _DECORD = ("original", "ours-pyav", 1), ("original", "ours-decord", 1)
_PUBLISHED = ("original", "published-like", 1)

GOALS = (
    ("prepared files over originals with a long GOP", ("prepared", "ours-pyav", 1), _DEFAULT, 0, 2.5),
    ("repeat 4 over repeat 1", ("original", "ours-pyav", 4), _DEFAULT, 0, 2.5),
    ("ours with decord over a plain loop of decord", _DECORD, ("original", "plain", 1), 0, 0.9),
    ("ours with decord over the published loader's way", _DECORD, _PUBLISHED, 0, 2.0),
    ("ours, which decodes with PyAV, over the published loader's way", _DEFAULT, _PUBLISHED, 0, 2.0),
    ("the same from two workers", _DEFAULT, _PUBLISHED, 2, 2.0),
)
"""What, arm, baseline (files, arm, repeat), workers, least ratio of clips a second, on K400's shape."""

Row = dict[str, Any]


def plan_of(film: videos.Film, num_frames: int, height: int, width: int, epoch: int, sample: int) -> ClipPlan:
    """The same places and crops for every arm."""
    config = DataConfig(stride=film.stride)
    size = {"num_frames": NUM_FRAMES, "frame_size": FRAME_SIZE}
    return plan_clip(config, SEED, epoch, sample, **size, total_frames=num_frames, height=height, width=width)


def read_plain(film: videos.Film, path: str, epoch: int, sample: int) -> Tensor:
    """What a user would write in four lines."""
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    ids = plan_of(film, len(reader), film.height, film.width, epoch, sample).frame_ids
    frames = torch.from_numpy(reader.get_batch(list(ids)).asnumpy()).permute(0, 3, 1, 2)
    return F.interpolate(frames, (FRAME_SIZE, FRAME_SIZE), mode="bilinear", antialias=True).transpose(0, 1)


MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


def read_like_published(film: videos.Film, path: str, epoch: int, sample: int) -> Tensor:
    """Frame by frame through PIL, then fp32."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    plan = plan_of(film, len(reader), film.height, film.width, epoch, sample)
    box = plan.views[0].box
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    images = [Image.fromarray(frame).convert("RGB") for frame in reader.get_batch(list(plan.frame_ids)).asnumpy()]
    images = [image.crop(corners).resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BILINEAR) for image in images]
    stacked = np.concatenate([np.asarray(image) for image in images], axis=2)
    clip = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
    clip = clip.view(NUM_FRAMES, 3, FRAME_SIZE, FRAME_SIZE)
    return clip.sub_(MEAN[:, None, None]).div_(STD[:, None, None]).transpose(0, 1)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to read one clip of each video."""

    files: str
    name: str
    repeat: int
    read_all: Callable[[int], object]
    """Read from every video, in the given epoch."""


def arms_of(film: videos.Film, entries: Mapping[str, Sequence[Entry]], decoders: Sequence[DecoderName]) -> list[Arm]:
    """Every arm on the originals ("original") and the prepared files ("prepared")."""
    originals = entries["original"]

    def all_by(read: Callable[[videos.Film, str, int, int], Tensor]) -> Callable[[int], object]:
        return lambda epoch: [read(film, entry.path, epoch, i) for i, entry in enumerate(originals)]

    def ours(files: str, decoder: DecoderName, repeat: int) -> Callable[[int], object]:
        config = DataConfig(stride=film.stride, decoder=decoder, repeat=repeat)
        clips = PretrainClips(entries[files], config, NUM_FRAMES, FRAME_SIZE, SEED)
        first = len(clips.entries)
        return lambda epoch: [clips[epoch * first + i].video for i in range(first)]

    arms = [Arm("original", "plain", 1, all_by(read_plain))]
    arms.append(Arm("original", "published-like", 1, all_by(read_like_published)))
    for files, decoder, repeat in itertools.product(entries, decoders, REPEATS):
        arms.append(Arm(files, f"ours-{decoder}", repeat, ours(files, decoder, repeat)))
    return arms


def frames_decoded(film: videos.Film, files: str, entries: Sequence[Entry], epoch: int) -> int:
    """Frames from the last key frame before one clip of each video to its end.

    decord makes pictures of them all; of H.264, ours with PyAV leaves out those that nobody needs.
    """
    keyint = KEYINT if files == "prepared" else film.keyint
    total = 0
    for i, entry in enumerate(entries):
        with closing(open_entry(entry, "pyav")) as video:
            ids = plan_of(film, video.num_frames, film.height, film.width, epoch, i).frame_ids
        # Where a whole group of pictures lies between two frames of the clip, a decoder may leave it out.
        total += ids[-1] - ids[0] // keyint * keyint + 1
    return total


def measure(
    film: videos.Film,
    entries: Mapping[str, Sequence[Entry]],
    decoders: Sequence[DecoderName],
    rounds: int,
    say: command.Say,
) -> list[Row]:
    """All arms in one process, in turns."""
    num_videos = len(entries["original"])
    arms = arms_of(film, entries, decoders)
    seconds: dict[int, list[float]] = {i: [] for i in range(len(arms))}
    cpu = dict.fromkeys(seconds, 0.0)
    for epoch in range(rounds + 1):
        say(f"{film.name}: one process, round {epoch} of {rounds}")
        for i, arm in enumerate(arms):
            wall, used = time.perf_counter(), time.process_time()
            arm.read_all(epoch)
            if epoch:  # the first one warms up
                seconds[i].append(time.perf_counter() - wall)
                cpu[i] += time.process_time() - used
    decoded = {
        files: sum(frames_decoded(film, files, of, epoch) for epoch in range(1, rounds + 1))
        for files, of in entries.items()
    }
    rows = []
    for i, arm in enumerate(arms):
        clips = arm.repeat * num_videos
        timing = summarize(seconds[i], "passes over all videos")
        rows.append({
            "data": film.name, "files": arm.files, "arm": arm.name, "repeat": arm.repeat, "workers": 0,
            "clips_per_s": clips * rounds / sum(seconds[i]),
            "decoded_frames_per_s": decoded[arm.files] / sum(seconds[i]),
            "cpu_s_per_clip": cpu[i] / (clips * rounds),
            "ms": timing.median / clips * 1e3, "ms_p20": timing.p20 / clips * 1e3, "ms_p80": timing.p80 / clips * 1e3,
        })  # fmt: skip
    return rows


def measure_workers(
    film: videos.Film,
    files: str,
    entries: Sequence[Entry],
    decoder: DecoderName,
    repeat: int,
    num_workers: int,
    num_batches: int,
) -> Row:
    """Batches of eight clips through the worker processes of training, the first ones not timed."""
    config = PretrainConfig(
        model=ModelConfig(num_frames=NUM_FRAMES, frame_size=FRAME_SIZE),
        data=DataConfig(stride=film.stride, decoder=decoder, repeat=repeat, num_workers=num_workers),
        train=TrainConfig(batch_size=BATCH, steps=1),
    )
    with closing(clip_batches(config, entries, 0, num_batches + warm_up_of(num_workers))) as batches:
        rate = clips_per_second(batches, num_batches, num_workers)
    return {
        "data": film.name, "files": files, "arm": f"ours-{decoder}", "repeat": repeat, "workers": num_workers,
        "clips_per_s": rate,
    }  # fmt: skip


class PublishedLike(Dataset[Tensor]):
    """Clips of :func:`read_like_published` for PyTorch's DataLoader, the published loader's frame."""

    def __init__(self, film: videos.Film, entries: Sequence[Entry], num_clips: int) -> None:
        self.film, self.entries, self.num_clips = film, entries, num_clips

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, position: int) -> Tensor:
        epoch, sample = divmod(position, len(self.entries))
        return read_like_published(self.film, self.entries[sample].path, epoch, sample)


def measure_published_workers(film: videos.Film, entries: Sequence[Entry], num_workers: int, num_batches: int) -> Row:
    """The same for the published loader's way."""
    clips = PublishedLike(film, entries, BATCH * (num_batches + warm_up_of(num_workers)))
    loader = DataLoader(clips, batch_size=BATCH, num_workers=num_workers)
    return {
        "data": film.name, "files": "original", "arm": "published-like", "repeat": 1, "workers": num_workers,
        "clips_per_s": clips_per_second(iter(loader), num_batches, num_workers),
    }  # fmt: skip


def warm_up_of(num_workers: int) -> int:
    """Batches that were decoded while the workers started."""
    return 1 + num_workers


def clips_per_second(batches: Iterator[object], num_batches: int, num_workers: int) -> float:
    """Of ``num_batches`` after those of the warm-up."""
    for _ in range(warm_up_of(num_workers)):
        next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return BATCH * num_batches / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """Render, prepare, measure, print, write."""
    options = options_of(arguments)
    taken = conditions.collect(torch.device("cpu"))
    torch.set_num_threads(1)  # as in a data worker
    num_videos, num_frames = (3, 60) if options.quick else (options.videos, None)
    rounds, num_batches = (2, 2) if options.quick else (options.rounds, 12)
    rows: list[Row] = []
    prepared: dict[str, Row] = {}
    films = (videos.K400, videos.SSV2)
    with tempfile.TemporaryDirectory() as scratch, command.progress(len(films) * 4) as (say, advance):
        for film in films:
            say(f"{film.name}: rendering {num_videos} videos")
            manifest = videos.write(film, Path(scratch) / film.name, num_videos, num_frames)
            advance()
            say(f"{film.name}: preparing them")
            out, used = Path(scratch) / f"{film.name}-prepared", time.perf_counter()
            prepare(str(manifest), str(out), keyint=KEYINT)
            prepared[film.name] = sizes(manifest, out, time.perf_counter() - used, num_videos)
            advance()
            entries = {"original": read_manifest(str(manifest)), "prepared": read_manifest(str(out))}
            rows += measure(film, entries, ("decord", "pyav"), rounds, say)
            advance()
            for workers in WORKERS:
                say(f"{film.name}: published-like, {workers} workers")
                rows.append(measure_published_workers(film, entries["original"], workers, num_batches))
            for files, decoder in worker_arms(film):
                for repeat, workers in itertools.product((1, 4), WORKERS):
                    say(f"{film.name}: {files}, {decoder}, repeat {repeat}, {workers} workers")
                    rows.append(measure_workers(film, files, entries[files], decoder, repeat, workers, num_batches))
            advance()
        say("memory over many opens")
        paths = [entry.path for entry in entries["original"]]
        looks = resident_over_opens(paths, "auto", 40 if options.quick else NUM_OPENS, every=20)
        memory = {
            "opens": looks[-1].num_opens,
            "resident_mb": [look.mib * 2**20 / 1e6 for look in (looks[0], looks[len(looks) // 2], looks[-1])],
        }
    goals = [] if options.quick else judge(rows)
    show(rows, goals)
    command.finish(
        "data",
        {
            "conditions": taken,
            "videos": num_videos,
            "prepared": prepared,
            "rows": rows,
            "goals": goals,
            "memory": memory,
        },
        options,
    )
    return 0


BATCH = 8
"""Clips of a batch, repeats counted."""

WORKERS = (1, 2)


def worker_arms(film: videos.Film) -> list[tuple[str, DecoderName]]:
    """Kinds of files and decoders; DALI where it is installed and decodes these videos without a GPU."""
    arms: list[tuple[str, DecoderName]] = [("original", "pyav"), ("prepared", "pyav")]
    if film.codec == "libvpx-vp9" and dali_is_installed():
        arms.append(("original", "dali"))
    return arms


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 short videos, 2 rounds; writes no file of its own")
    parser.add_argument("--out", type=Path, help="folder of the result file (default: bench/results)")
    parser.add_argument("--videos", type=int, default=8, help="videos of each data set")
    parser.add_argument("--rounds", type=int, default=8, help="timed passes over all videos of every arm")
    options = parser.parse_args(arguments)
    for key, least in (("videos", 1), ("rounds", 2)):
        if getattr(options, key) < least:
            raise ValueError(f"--{key} {getattr(options, key)}: choose at least {least}")
    return options


def sizes(manifest: Path, out: Path, seconds: float, num_videos: int) -> Row:
    """What preparing costs: seconds and bytes a video, before and after."""

    def total(folder: Path, pattern: str) -> int:
        return sum(path.stat().st_size for path in folder.glob(pattern))

    return {
        "seconds_per_video": seconds / num_videos,
        "original_bytes_per_video": total(manifest.parent, f"{manifest.parent.name}-*") / num_videos,
        "prepared_bytes_per_video": total(out, "*.tar") / num_videos,
    }


def judge(rows: Sequence[Row]) -> list[Row]:
    """Ratios of clips a second, and the least that was aimed at."""
    keys = ("data", "files", "arm", "repeat", "workers")
    speed = {tuple(row[key] for key in keys): row["clips_per_s"] for row in rows}
    goals = []
    for text, mine, theirs, workers, least in GOALS:
        ratio = speed[videos.K400.name, *mine, workers] / speed[videos.K400.name, *theirs, workers]
        goals.append({"goal": text, "least": least, "measured": ratio, "met": ratio >= least})
    return goals


def show(rows: Sequence[Row], goals: Sequence[Row]) -> None:
    """Tables on the screen."""
    table = Table("data", "files", "arm", "repeat", "workers", "clips/s", "decoded frames/s", "CPU ms a clip")
    for row in rows:
        frames = f"{row['decoded_frames_per_s']:.0f}" if "decoded_frames_per_s" in row else ""
        cpu = f"{1e3 * row['cpu_s_per_clip']:.1f}" if "cpu_s_per_clip" in row else ""
        names = (row["data"], row["files"], row["arm"], str(row["repeat"]), str(row["workers"]))
        table.add_row(*names, f"{row['clips_per_s']:.1f}", frames, cpu)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    for goal in goals:
        console.print(
            f"{goal['goal']}: {goal['measured']:.2f}, at least {goal['least']}: {'met' if goal['met'] else 'MISSED'}"
        )


if __name__ == "__main__":
    command.run(main)
