"""What ``python -m bench.ablation`` carries out: rows, presets, and one row with one seed, trained and measured.

Rows are those of the paper's Table 1 (``bench/table1.py``), one without pre-training, and those of part (g). What each
figure means is said in ``bench/ablation.py``.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from adamae_fast.config import (
    LossConfig,
    MaskConfig,
    ModelConfig,
    PretrainConfig,
    SamplerConfig,
    load_config,
    load_run_config,
)
from adamae_fast.config_features import FeatureDataConfig, ProbeConfig
from adamae_fast.config_finetune import FinetuneConfig, ValConfig
from adamae_fast.data.actions import ACTIONS
from adamae_fast.data.manifest import read_manifest
from adamae_fast.data.synthetic import read_boxes
from adamae_fast.errors import RunStoppedError
from adamae_fast.features.probe import probe
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.model.sizes import SIZES
from adamae_fast.plan import work
from adamae_fast.report.adaptivity import box_coverage, drawn_figure, sampler_logits
from adamae_fast.report.visualize import read_center_clip
from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train.finetune import finetune
from adamae_fast.train.pretrain import pretrain
from bench import conditions, table1
from bench.trainings import DIRECTIONS, digest_of, seconds_of, train_once

PRETRAINING = conditions.ROOT / "configs" / "actions.yaml"
FINETUNING = conditions.ROOT / "configs" / "finetune_actions.yaml"

DEPTH = 4
"""Blocks of the decoder, where a row says nothing else: the paper's."""

NO_PRETRAINING = table1.Case("no pre-training", "scratch", math.nan)


def _small_data(name: str, **changes: Any) -> table1.Case:
    return table1.Case("(g) sampler on little data", name, math.nan, **changes)


SMALL_DATA = (
    _small_data("defaults"),
    _small_data("learning rate × 3", sampler_lr_scale=3.0),
    _small_data("tokens detached", model=ModelConfig(sampler=SamplerConfig(detach_tokens=True))),
    _small_data("no dropout", model=ModelConfig(sampler=SamplerConfig(dropout=0.0))),
    _small_data("normalised jointly", loss=LossConfig(target="mae_st")),
    _small_data("baseline 0.9", loss=LossConfig(sampling_baseline=0.9)),
    _small_data("baseline 0.98, rate × 3", loss=LossConfig(sampling_baseline=0.98), sampler_lr_scale=3.0),
    _small_data(
        "baseline 0.98, rate × 3, 2 × 384",
        model=ModelConfig(sampler=SamplerConfig(width=384, depth=2)),
        loss=LossConfig(sampling_baseline=0.98),
        sampler_lr_scale=3.0,
    ),
)
"""What might make the sampler learn faster or look harder: not in the paper."""

ROWS = (*table1.CASES, NO_PRETRAINING, *SMALL_DATA)

CROP = {"data.crop": "random_resized", "data.random_resized_scale": (0.6, 1.0)}
"""Milder than the recipes', whose videos are learned more slowly."""

NUM_BOXED = 320
"""Videos of the adaptivity figure."""

REPEATS = 8
"""Masks drawn for each of them."""


@dataclass(frozen=True)
class Preset:
    """How much is spent on each run."""

    device: str
    size: str
    attention: str
    """Which one computes it: of so few tokens the plain formula is the fastest on a CPU."""
    classes: Sequence[str]
    """Of the action set; no part of a run sees videos of others."""
    base_lr: float
    """Of pre-training, for 256 clips."""
    finetune_lr: float
    """Of fine-tuning, for 256 clips."""
    detail: float
    """Of the scenes."""
    num_videos: int
    num_val: int
    pretrain_steps: int
    finetune_steps: int
    probe_videos: int
    """Training videos whose features the probe sees."""
    passes: int
    """Through the training videos from one validation to the next; it only watches."""
    frame_size: int
    batch_size: int
    cache_gib: float
    """For decoded videos, in each process."""


PRESETS = {
    "cpu": Preset(
        device="cpu", size="pico", attention="reference", classes=DIRECTIONS, base_lr=2.4e-2, finetune_lr=1.6e-2,
        detail=0.0, num_videos=1720, num_val=320, pretrain_steps=780, finetune_steps=340, probe_videos=600, passes=20,
        frame_size=32, batch_size=32, cache_gib=1.0,
    ),
    "gpu": Preset(
        device="cuda", size="nano", attention="auto", classes=ACTIONS, base_lr=6e-3, finetune_lr=4e-3, detail=1.0,
        num_videos=14000, num_val=1400, pretrain_steps=1500, finetune_steps=800, probe_videos=7000, passes=20,
        frame_size=64, batch_size=128, cache_gib=8.0,
    ),
    "quick": Preset(
        device="cpu", size="pico", attention="reference", classes=ACTIONS, base_lr=2.4e-2, finetune_lr=1.6e-2,
        detail=0.0, num_videos=28, num_val=14, pretrain_steps=2, finetune_steps=2, probe_videos=14, passes=1,
        frame_size=32, batch_size=4, cache_gib=0.1,
    ),
}  # fmt: skip
"""gpu is to take nine minutes for each part of the table on an H200: by arithmetic from the time of a step, it has not
been run yet. quick is for tests: its figures mean nothing."""


@cache
def pretraining_recipe() -> PretrainConfig:
    """What the rows change."""
    return load_config(PRETRAINING)


@cache
def finetuning_recipe() -> FinetuneConfig:
    """What the preset changes."""
    return load_run_config(FINETUNING, FinetuneConfig)


def changed(config: Any) -> dict[str, Any]:
    """What is not a default of its class, and says more than where and how often a run writes."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            value = changed(value)
        if value not in ({}, field.default) and field.name not in ("output_dir", "log", "checkpoint", "num_workers"):
            found[field.name] = value
    return found


@dataclass(frozen=True)
class Job:
    """One row with one seed."""

    case: table1.Case
    seed: int
    preset: Preset
    work: Path
    videos: Path
    """What :func:`prepare` made."""

    @property
    def is_scratch(self) -> bool:
        """Whether there is no pre-training; told by name, since a job that went to another process has a copy."""
        return self.case.part == NO_PRETRAINING.part

    @cached_property
    def settings(self) -> str:
        """What decides its figures, but for the seed and the defaults of all configurations, in eight letters.

        So a new key, which by default changes nothing, leaves it as it is.
        """
        defaults = {
            f"{group}.{key}": value
            for group, config in (("model.sampler", SamplerConfig()), ("mask", MaskConfig()), ("loss", LossConfig()))
            for key, value in asdict(config).items()
        }
        overrides = {key: value for key, value in self.overrides().items() if (key, value) not in defaults.items()}
        recipes = [changed(recipe) for recipe in (pretraining_recipe(), finetuning_recipe(), ProbeConfig())]
        return digest_of([asdict(self.preset), recipes, overrides, self.finetune_overrides(), NUM_BOXED, REPEATS])

    @property
    def folder(self) -> Path:
        """Of its trainings. Rows that are the same configuration share it."""
        name = "scratch" if self.is_scratch else f"{self.case.mask.strategy}-{self.case.mask.ratio:g}"
        return self.work / f"{name}-{self.settings}" / f"seed{self.seed}"

    @property
    def row(self) -> Path:
        """Its figures, once it is done."""
        return self.folder / "row.json"

    def overrides(self) -> dict[str, object]:
        """What its pre-training has in place of the recipe's keys."""
        preset, case = self.preset, self.case
        sampler = case.model.sampler
        if sampler.width is not None:
            own, papers = (SIZES[size].encoder.width for size in (preset.size, ModelConfig().size))
            sampler = replace(sampler, width=sampler.width * own // papers)
        overrides: dict[str, object] = {
            "model.size": preset.size,
            "model.frame_size": preset.frame_size,
            "model.attention.encoder": preset.attention,
            "model.attention.decoder": preset.attention,
            "model.decoder.depth": case.model.decoder.depth or DEPTH,
            **{f"model.sampler.{key}": value for key, value in asdict(sampler).items()},
            **{f"mask.{key}": value for key, value in asdict(case.mask).items()},
            **{f"loss.{key}": value for key, value in asdict(case.loss).items()},
            "optim.base_lr": preset.base_lr,
            "optim.sampler_lr_scale": case.sampler_lr_scale,
            "data.cache_gib": preset.cache_gib,
            **CROP,
            "train.batch_size": preset.batch_size,
            "log.every": 40,
            "train.steps": max(1, round(case.share * preset.pretrain_steps)),
        }
        if case.mask.strategy == "adaptive" and sampler.kind == "attention":
            overrides["model.attention.sampler"] = preset.attention
        if self.is_scratch:  # a step that changes nothing leaves a checkpoint of the first weights to probe
            overrides |= {"optim.base_lr": 1e-12, "optim.min_lr": 0.0, "train.steps": 1}
        return overrides

    def finetune_overrides(self) -> dict[str, object]:
        """What its fine-tuning has in place of the recipe's keys."""
        return {
            "model.size": self.preset.size,
            "model.frame_size": self.preset.frame_size,
            "model.attention.encoder": self.preset.attention,
            "data.cache_gib": self.preset.cache_gib,
            **CROP,
            "optim.base_lr": self.preset.finetune_lr,
            "train.batch_size": self.preset.batch_size,
            "train.steps": self.preset.finetune_steps,
        }


def run(job: Job) -> dict[str, Any]:
    """Pre-train, fine-tune, probe, measure: what is not done yet."""
    if job.row.is_file():
        return dict(json.loads(job.row.read_text()))
    torch.set_num_threads(1)
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("a") as log:
        console = Console(file=log, width=120)
        pretrained = pretrain_once(job, console)
        finetune_once(job, pretrained, console)
        probed = probe_once(job, pretrained, console)
    row = {**figures_of(job, pretrained), "probe": probed, "top1": last_top1(job.folder / "finetune")}
    parts = {part: round(seconds_of(job.folder / part), 1) for part in ("pretrain", "finetune", "probe")}
    row["curves"] = {
        key: [[line["step"], round(line[key], 5)] for line in read_json_lines(RunFolder(folder).metrics) if key in line]
        for folder, key in ((pretrained, "loss_reconstruction"), (pretrained, "motion_lift"))
    }
    tuned = read_json_lines(RunFolder(job.folder / "finetune").metrics)
    row["curves"]["finetune_loss"] = [[line["step"], round(line["loss"], 5)] for line in tuned]
    version = conditions.version()
    row |= {"seconds": parts, "commit": version["commit"] + (" with changes" if version["dirty"] == "yes" else "")}
    unfinished = job.row.with_suffix(".tmp")
    unfinished.write_text(json.dumps(row))
    unfinished.replace(job.row)
    return row


def pretrain_once(job: Job, console: Console) -> Path:
    """The run's folder."""
    folder = job.folder / "pretrain"
    overrides = {
        **job.overrides(),
        "output_dir": folder,
        "data.manifest": job.videos / "train.txt",
        "data.num_workers": 0,
        "train.device": job.preset.device,
        "seed": job.seed,
        "checkpoint.every": 10**9,
        "log.tensorboard": False,
    }
    train_once(folder, lambda: pretrain(load_config(PRETRAINING, overrides), console))
    return folder


def finetune_once(job: Job, pretrained: Path, console: Console) -> None:
    """From the encoder of ``pretrained``."""
    folder = job.folder / "finetune"
    overrides: dict[str, object] = {
        **job.finetune_overrides(),
        "output_dir": folder,
        "data.manifest": job.videos / "train-passes.txt",
        "val.manifest": job.videos / "val.txt",
        "data.num_workers": 0,
        "train.device": job.preset.device,
        "seed": job.seed,
        "checkpoint.every": 10**9,
        "log.tensorboard": False,
    }
    if not job.is_scratch:
        overrides["init"] = pretrained
    train_once(folder, lambda: finetune(load_run_config(FINETUNING, FinetuneConfig, overrides), console))


def last_top1(folder: Path) -> float:
    """Accuracy after the last step."""
    return float(read_json_lines(RunFolder(folder).validation)[-1]["top1"])


def probe_once(job: Job, pretrained: Path, console: Console) -> float:
    """Accuracy of the best linear head."""
    folder = job.folder / "probe"
    videos = job.videos
    options = ProbeConfig(
        output_dir=str(folder),
        data=FeatureDataConfig(manifest=str(videos / "probe.txt"), num_workers=0),
        val=ValConfig(manifest=str(videos / "val.txt")),
        device=job.preset.device,
        seed=job.seed,
    )
    start = time.perf_counter()
    results = probe(str(pretrained), options, console)
    if results is None:
        raise RunStoppedError("stopped while it probed; the same command goes on")
    with (folder / "seconds.jsonl").open("a") as file:
        file.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
    return float(results["top1"])  # type: ignore[arg-type]


def figures_of(job: Job, pretrained: Path) -> dict[str, Any]:
    """What is measured on the pre-trained model itself, and what follows from its configuration."""
    config = load_config(RunFolder(pretrained).config)
    model = AdaMAE.from_pretrained(pretrained).to(job.preset.device).eval()
    lines = read_json_lines(RunFolder(pretrained).metrics)[-3:]
    boxed = read_boxed(job.videos / "val.txt", config, model)
    adaptivity, entropy = adaptivity_of(model, config, boxed)
    untrained = None
    if model.sampler is not None:
        torch.manual_seed(config.seed)
        fresh = AdaMAE(config.model, config.mask, config.loss).to(job.preset.device)
        untrained = adaptivity_of(fresh, config, boxed)[0]
    return {
        "visible": model.num_visible,
        "tokens": model.grid.num_tokens,
        "adaptivity": adaptivity,
        "untrained": untrained,
        "error_adaptivity": error_adaptivity(model, config, boxed),
        "entropy": entropy,
        "clamped": None if model.sampler is None else statistics.fmean(line["clamped_share"] for line in lines),
        "error": statistics.fmean(line["loss_reconstruction"] for line in lines),
        "kept_bytes": work.kept_bytes(config.model, config.mask, "none").total(),
        "kept_bytes_vitb": work.kept_bytes(job.case.model, job.case.mask, "none").total(),
    }


@dataclass(frozen=True)
class Boxed:
    """Centre clips of videos whose moving things are known."""

    videos_BCTHW: torch.Tensor
    coverage_BN: NDArray[np.float64]
    """Share of each token that they cover."""


def read_boxed(manifest: Path, config: PretrainConfig, model: AdaMAE) -> Boxed:
    """The first :data:`NUM_BOXED` of ``manifest``."""
    clips, coverages = [], []
    for entry in read_manifest(str(manifest))[:NUM_BOXED]:
        boxes_TO4 = read_boxes(entry.path)
        assert boxes_TO4 is not None
        clip = read_center_clip(entry, config)
        clips.append(clip.video_CTHW)
        coverages.append(box_coverage(boxes_TO4, clip.frame_ids, clip.crop, model.grid))
    return Boxed(torch.stack(clips), np.stack(coverages))


def draw_seeds(count: int, config: PretrainConfig) -> torch.Tensor:
    """Of :data:`REPEATS` masks for each clip, others with another seed of the run; on the CPU, so on every device."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randint(2**63 - 1, (REPEATS, count), generator=generator)


def adaptivity_of(model: AdaMAE, config: PretrainConfig, boxed: Boxed) -> tuple[float, float | None]:
    """Of masks as they are drawn; and the mean entropy of p over ln N."""
    logits_BN, entropy = None, None
    if model.sampler is not None:
        logits_BN = sampler_logits(model, boxed.videos_BCTHW, 64).cpu()
        log_p_BN = logits_BN.double().log_softmax(1)
        entropy = float(-(log_p_BN.exp() * log_p_BN).sum(1).mean() / math.log(model.grid.num_tokens))
    seeds_RB = draw_seeds(len(boxed.coverage_BN), config)
    ratio = model.mask_config.ratio
    return drawn_figure(model.strategy, model.grid, ratio, boxed.coverage_BN, seeds_RB, logits_BN)["value"], entropy


@torch.no_grad()
def error_adaptivity(model: AdaMAE, config: PretrainConfig, boxed: Boxed) -> float:
    """(share of the masked tokens' error that lies on moving boxes) / (share of these tokens that does)."""
    device = next(model.parameters()).device
    error_on_boxes = error = on_boxes = count = 0.0
    seeds_B, coverage_BN = draw_seeds(len(boxed.coverage_BN), config)[0], torch.from_numpy(boxed.coverage_BN)
    for start in range(0, len(seeds_B), 64):
        batch = slice(start, start + 64)
        output = model(boxed.videos_BCTHW[batch].to(device), seeds=seeds_B[batch].to(device))
        error_BM, coverage_BM = output.error.double().cpu(), coverage_BN[batch].gather(1, output.decoded_ids.cpu())
        error_on_boxes += float((error_BM * coverage_BM).sum())
        error += float(error_BM.sum())
        on_boxes += float(coverage_BM.sum())
        count += coverage_BM.numel()
    return (error_on_boxes / error) / (on_boxes / count)
