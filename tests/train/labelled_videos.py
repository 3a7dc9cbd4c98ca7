"""Tiny labelled videos and classifiers, for the tests of fine-tuning and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from adamae_fast.config import ModelConfig, load_run_config, save_config
from adamae_fast.config_finetune import FinetuneConfig
from adamae_fast.model.classifier import VideoClassifier

MODEL = {"size": "nano", "num_frames": 4, "frame_size": 32, "patch_size": 16}
NUM_CLASSES = 3


def write_manifest(path: Path, videos: Sequence[Path], labels: Sequence[int]) -> Path:
    path.write_text("".join(f"{video} {label}\n" for video, label in zip(videos, labels, strict=True)))
    return path


def write_recipe(path: Path, manifest: Path, val: Path) -> Path:
    """5 videos in batches of 2: an epoch is 2.5 steps, saves fall into its middle."""
    recipe = {
        "model": MODEL,
        "data": {"manifest": str(manifest), "sampling": "segments", "num_workers": 0, "decoder": "pyav"},
        "val": {"manifest": str(val)},
        "views": {"temporal": 2, "spatial": 3},
        "augment": {"layers": 0},
        "optim": {"base_lr": 0.05, "min_lr": 0.01, "warmup_epochs": 1},
        "train": {"epochs": 4, "batch_size": 2, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every": 2},
        "log": {"every": 1, "tensorboard": False},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_classifier(folder: Path, recipe: Path) -> VideoClassifier:
    """A checkpoint whose classes differ by video."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    model = VideoClassifier(ModelConfig(**MODEL), NUM_CLASSES)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight, std=1.0)
    save_file(model.state_dict(), folder / "model.safetensors")
    save_config(load_run_config(recipe, FinetuneConfig), folder / "config.yaml")
    return model.eval()
