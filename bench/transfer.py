"""Does pre-training help? Fine-tuning from it against training from scratch: ``python -m bench.transfer``.

The action set (``adamae_fast/data/actions.py``) has fourteen classes of motion that no single frame tells; the videos
for validation share no look with those for training. Four of them, directions of motion, are to be told apart: all
fourteen are too much for so small a model in so few steps (bench/LOG.md). Arms, which differ in the encoder's first
weights alone:

* **scratch**: random weights;
* **demo**: the weights that ``make demo`` leaves (``--pretrained``, 300 steps on 48 other rendered videos, larger);
* **pretrained**: the demo's recipe on the training videos of all fourteen classes, without their labels
  (``configs/actions.yaml``).

Each arm is fine-tuned by one recipe (``configs/finetune_actions.yaml``), on the same videos, for as many steps.
A pre-trained arm has the learning rate of :data:`RATES` that is best on a seed of its own and on videos of their own
(of another seed), the higher one of equals. It is trained with each of :data:`SEEDS`; top-1 is that of the last step,
on the centre clip of each video. Scratch, which may learn too late for such a choice to mean anything, is trained with
each rate and each seed, and has the rate that is best in the end, in its favour.

Every part is a run in ``--work``, and is not done again: stopped at any moment, the same command goes on. On a CPU the
same command gives the same accuracies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adamae_fast.config import PretrainConfig, load_config, load_run_config
from adamae_fast.config_finetune import FinetuneConfig
from adamae_fast.data.actions import ACTIONS
from adamae_fast.run_folder import RunFolder, find_weights, read_json_lines
from adamae_fast.train.finetune import finetune
from adamae_fast.train.pretrain import pretrain
from bench import command, conditions
from bench.results import permutation_p
from bench.trainings import DIRECTIONS, action_videos, digest_of, is_done, seconds_of, train_once

ARMS = ("scratch", "pretrained", "demo")
SEEDS = tuple(range(6))
"""So many, since one seed's loss leaves that of chance by hundreds of steps sooner than another's."""

RATES = (8e-3, 1.6e-2)
"""Peak learning rates for 256 clips that are tried for each arm: 1e-3 and 2e-3 at 32 clips a step."""

PASSES = 3
"""Through the training videos from one validation to the next."""

TUNING_SEED = 100
"""Of the runs that choose the rates, and of the videos that judge them."""

PRETRAINING = conditions.ROOT / "configs" / "actions.yaml"
FINETUNING = conditions.ROOT / "configs" / "finetune_actions.yaml"

Overrides = Mapping[str, object]
Row = dict[str, Any]


class Study:
    """The folder of all runs, and how long they are."""

    def __init__(self, options: argparse.Namespace, say: command.Say, log: Console) -> None:
        self.work: Path = options.work
        self.pretrained: Path = options.pretrained
        self.quick: bool = options.quick
        self.steps: int = options.steps
        self.pretrain_steps: int = options.pretrain_steps
        self.say = say
        self.log = log

    def videos(self, seed: int, num_videos: int, val_share: float) -> Path:
        """A rendered set."""
        self.say(f"{num_videos} videos")
        return action_videos(self.work, num_videos, load_config(PRETRAINING), seed, val_share)

    def pretrain(self, videos: Path) -> Path:
        """The arm "pretrained"."""
        overrides: dict[str, object] = {
            "data.manifest": str(videos / "train.txt"),
            "train.steps": self.pretrain_steps,
            "train.device": "cpu",
            "log.tensorboard": False,
        }
        folder = self.folder("pretrained", load_config(PRETRAINING), overrides)
        self.run(folder, f"pre-training, {self.pretrain_steps} steps", overrides, of_classifier=False)
        return folder

    def folder(self, name: str, recipe: PretrainConfig | FinetuneConfig, overrides: Overrides) -> Path:
        """Of a run, named after all that decides its figures: another length, or other weights, is another run."""
        decides = dict(overrides)
        if "init" in decides:
            weights, _ = find_weights(str(decides["init"]))
            decides["init"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        return self.work / f"{name}-{digest_of([asdict(recipe), decides])}"

    def finetune(self, name: str, init: Path | None, rate: float, seed: int, train: Path, val: Path) -> Row:
        """One fine-tuning: its last accuracy, and the seconds that it took."""
        overrides: dict[str, object] = {
            "data.manifest": str(self.list_classes(train, "train", PASSES)),
            "data.root": str(train),
            "data.num_workers": 0,
            "data.cache_gib": 1.0,
            "val.manifest": str(self.list_classes(val, "val")),
            "val.root": str(val),
            "optim.base_lr": rate,
            "train.steps": self.steps,
            "train.device": "cpu",
            "seed": seed,
            "log.tensorboard": False,
        }
        if init is not None:
            overrides["init"] = str(init)
        folder = self.folder(name, load_run_config(FINETUNING, FinetuneConfig), overrides)
        seconds = self.run(folder, f"fine-tuning {name}, {self.steps} steps", overrides, of_classifier=True)
        last = read_json_lines(RunFolder(folder).validation)[-1]
        return {"rate": rate, "seed": seed, "top1": last["top1"], "top5": last["top5"], "seconds": seconds}

    def list_classes(self, videos: Path, part: str, passes: int = 1) -> Path:
        """A list of those videos of a part of the four directions, their places there being the labels.

        With several ``passes``, it has each video as many times: a run validates after each pass through its list.
        """
        wanted = {str(ACTIONS.index(name)): label for label, name in enumerate(DIRECTIONS)}
        lines = (line.split() for line in (videos / f"{part}.txt").read_text().splitlines())
        path = self.work / f"{videos.name}-{part}.txt"
        path.write_text("".join(f"{video} {wanted[label]}\n" for video, label in lines if label in wanted) * passes)
        return path

    def run(self, folder: Path, what: str, overrides: Overrides, *, of_classifier: bool) -> float:
        """Carry out one run, or what is left of it; return the seconds that all its sittings took."""
        overrides = {**overrides, "output_dir": folder}
        if not is_done(folder):
            self.say(what)

        def train() -> dict[str, object]:
            if of_classifier:
                return finetune(load_run_config(FINETUNING, FinetuneConfig, overrides), self.log)
            return pretrain(load_config(PRETRAINING, overrides), self.log)

        return train_once(folder, train)


def measure(study: Study) -> dict[str, Any]:
    """Rates, then seeds, for every arm."""
    num_videos, val_share, num_tuning = (28, 0.5, 14) if study.quick else (4200, 0.15, 280)
    seeds = SEEDS[:2] if study.quick else SEEDS
    videos = study.videos(0, num_videos, val_share)
    tuning = study.videos(TUNING_SEED, num_tuning + 1, num_tuning / (num_tuning + 1))
    pretrained = study.pretrain(videos)
    inits = {"scratch": None, "pretrained": pretrained, "demo": study.pretrained}
    grid: list[Row] = []
    for arm, init in inits.items():
        for rate in RATES if arm != "scratch" else ():
            name = f"rate-{arm}-{rate:g}"
            grid.append({"arm": arm, **study.finetune(name, init, rate, TUNING_SEED, videos, tuning)})
    rows = []
    for arm, init in inits.items():
        chosen = max(
            (row for row in grid if row["arm"] == arm), key=lambda row: (row["top1"], row["rate"]), default=None
        )
        tried = [chosen["rate"]] if chosen else RATES
        by_rate = {
            rate: [study.finetune(f"{arm}-{rate:g}-seed{seed}", init, rate, seed, videos, videos) for seed in seeds]
            for rate in tried
        }
        best = max(by_rate, key=lambda rate: (mean_top1(by_rate[rate]), rate))
        runs = by_rate[best]
        top1 = [run["top1"] for run in runs]
        rows.append(
            {
                "arm": arm,
                "rate": best,
                "top1": top1,
                "top1_mean": mean_top1(runs),
                "rates": {f"{rate:g}": mean_top1(of_rate) for rate, of_rate in by_rate.items()},
                "top1_std": statistics.stdev(top1),
                "top5_mean": statistics.mean(run["top5"] for run in runs),
                "steps": study.steps,
                "seconds": [run["seconds"] for run in runs],
            }
        )
    counts = {name: len(study.list_classes(videos, name).read_text().splitlines()) for name in ("train", "val")}
    recipe = load_run_config(FINETUNING, FinetuneConfig)
    return {
        "rows": rows,
        "grid": grid,
        "seeds": seeds,
        "classes": DIRECTIONS,
        "chance": 1 / len(DIRECTIONS),
        "videos": {**counts, "tuning": len(study.list_classes(tuning, "val").read_text().splitlines())},
        "steps": study.steps,
        "batch": recipe.train.batch_size,
        "model": f"{recipe.model.size}, {recipe.model.num_frames}×{recipe.model.frame_size}², {recipe.train.precision}",
        "pretraining": {
            "demo": json.loads(RunFolder(study.pretrained).summary.read_text())["steps"],
            "pretrained": study.pretrain_steps,
            "seconds": seconds_of(pretrained),
        },
        "p_against_scratch": {row["arm"]: permutation_p(row["top1"], rows[0]["top1"]) for row in rows[1:]},
    }


def mean_top1(runs: Sequence[Row]) -> float:
    """Over seeds."""
    return statistics.mean(run["top1"] for run in runs)


def show(result: dict[str, Any]) -> None:
    """A table on the screen."""
    table = Table("arm", "learning rate", "top-1", "of each seed", "seconds")
    for row in result["rows"]:
        spread = f"{row['top1_mean']:.1%} ± {row['top1_std']:.1%}"
        each = ", ".join(f"{value:.1%}" for value in row["top1"])
        table.add_row(row["arm"], f"{row['rate']:g}", spread, each, f"{statistics.mean(row['seconds']):.0f}")
    Console().print(table)
    better = ", ".join(f"{arm} p = {p:.2g}" for arm, p in result["p_against_scratch"].items())
    print(f"chance: {result['chance']:.1%}; better than scratch by chance, permutation test: {better}")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.transfer",
        description="Does pre-training help? Fine-tune from it and from scratch, with several seeds, on rendered "
        "videos. Stopped at any moment, the same command goes on. docs/results.md shows what came out.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="28 videos, 2 steps a run, for tests; writes results only with --out"
    )
    parser.add_argument("--out", type=Path, help="folder of the result file (default: bench/results)")
    parser.add_argument(
        "--pretrained", type=Path, default=Path("runs/demo"), help="the run of make demo (default: runs/demo)"
    )
    parser.add_argument("--work", type=Path, help="folder of all runs (default: runs/transfer, or runs/transfer-quick)")
    parser.add_argument("--steps", type=int, help="of each fine-tuning (default: 240)")
    parser.add_argument("--pretrain-steps", type=int, help="of the arm pretrained (default: 1200)")
    options = parser.parse_args(arguments)
    defaults = {"work": Path("runs/transfer-quick"), "steps": 2, "pretrain_steps": 2} if options.quick else {
        "work": Path("runs/transfer"), "steps": 240, "pretrain_steps": 1200
    }  # fmt: skip
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    for key in ("work", "out"):
        command.make_folder(f"--{key}", getattr(options, key))
    for key in ("steps", "pretrain_steps"):
        if getattr(options, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(options, key)}: choose at least 1")
    try:
        find_weights(options.pretrained)
    except (ValueError, OSError) as error:
        raise ValueError(f"--pretrained {options.pretrained}: {error}; make demo makes runs/demo") from error
    return options


def main(arguments: list[str] | None = None) -> int:
    """Render, pre-train, fine-tune, print, write."""
    options = options_of(arguments)
    taken = conditions.collect(torch.device("cpu"))
    num_parts = 3 + (len(ARMS) - 1) * len(RATES) + (len(ARMS) - 1 + len(RATES)) * len(SEEDS)
    with command.progress(num_parts) as (say, advance):

        def next_part(what: str) -> None:
            say(what)
            advance()

        options.work.mkdir(parents=True, exist_ok=True)
        with (options.work / "log.txt").open("a") as log:
            result = measure(Study(options, next_part, Console(file=log, width=120)))
    show(result)
    command.finish("transfer", {"conditions": taken, **result}, options)
    return 0


if __name__ == "__main__":
    command.run(main)
