"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("ADAMAE_FAIL_WITHOUT_CUDA") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_clips() -> Path:
    """Real videos beside the checkout, good and bad; not part of the project."""
    folder = REPOSITORY.parent / "shared" / "data" / "clips"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: the part of this test that reads real clips is skipped")
    return folder


@pytest.fixture(scope="session")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five rendered videos, H.264 and VP9, with their boxes beside them."""
    from adamae_fast.data.synthetic import synthesize

    folder = tmp_path_factory.mktemp("rendered") / "set"
    manifest = synthesize(str(folder), num_videos=5, num_frames=12, width=64, height=64)
    return [manifest.parent / line.split()[0] for line in manifest.read_text().splitlines()]
