"""A pre-trained model, a classifier, and seven lines of labelled videos, one of them unreadable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.labelled_videos import write_classifier, write_manifest, write_recipe
from tests.train.test_finetune import write_pretrained

LABELS = [0, 1, 2, 0, 1, 2, 0]
BROKEN = 5


@dataclass(frozen=True)
class Featured:
    pretrained: Path
    classifier: Path
    manifest: Path


@pytest.fixture(scope="session")
def featured(tmp_path_factory, tiny_videos):
    folder = tmp_path_factory.mktemp("featured")
    broken = folder / "broken.mp4"
    broken.write_text("no video")
    videos = [*tiny_videos, broken, tiny_videos[0]]  # the same path in two lines is two videos
    manifest = write_manifest(folder / "videos.txt", videos, LABELS)
    pretrained = write_pretrained(folder / "pretrained")
    write_classifier(folder / "classifier", write_recipe(folder / "recipe.yaml", manifest, manifest))
    return Featured(pretrained, folder / "classifier", manifest)
