"""Every Python example of the README and of docs/ runs as it stands, in a folder that has what the pages speak of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adamae_fast import AdaMAE, VideoClassifier
from adamae_fast.cli import main
from adamae_fast.config import load_config, load_run_config, save_config
from adamae_fast.config_finetune import FinetuneConfig
from adamae_fast.interop.convert import convert
from tests.conftest import REPOSITORY
from tests.train.labelled_videos import write_manifest

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
EXAMPLES = {
    f"{page.name}-{number}": code
    for page in PAGES
    for number, code in enumerate(re.findall(r"```(?:python|py)\n(.*?)```", page.read_text(), flags=re.DOTALL), start=1)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_videos) -> Path:
    """Runs of the demo's recipes, with weights for which every layer counts, a published file, and features."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    demo = load_config(REPOSITORY / "configs" / "demo.yaml")
    finetune = load_run_config(REPOSITORY / "configs" / "finetune_demo.yaml", FinetuneConfig)
    torch.manual_seed(0)
    models = {
        "demo": (AdaMAE(demo.model, demo.mask, demo.loss), demo),
        "demo-finetuned": (VideoClassifier(finetune.model, num_classes=8), finetune),
    }
    for name, (model, config) in models.items():
        (folder / "runs" / name).mkdir(parents=True)
        state = {key: x + 0.02 * torch.randn_like(x) for key, x in model.state_dict().items()}
        save_file(state, folder / "runs" / name / "model.safetensors")
        save_config(config, folder / "runs" / name / "config.yaml")
    convert(str(folder / "runs" / "demo"), str(folder / "published.pth"), "adamae")
    videos = write_manifest(folder / "videos.txt", tiny_videos, [0, 1, 2, 0, 1])
    told = [f"--data.manifest={videos}", f"--output_dir={folder / 'runs' / 'demo-features'}", "--data.num_workers=0"]
    assert main(["extract", str(folder / "runs" / "demo"), *told]) == 0
    return folder


def test_the_pages_have_examples():
    assert {"README.md-1", "recipes.md-1", "python.md-1"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, folder, monkeypatch, capsys):
    if "from transformers" in EXAMPLES[name]:
        pytest.importorskip("transformers")
    monkeypatch.chdir(folder)
    exec(compile(EXAMPLES[name], name, "exec"), {})
    if name == "recipes.md-1":
        assert "missing, so fresh: fc_norm (2), head (2)" in capsys.readouterr().out
