"""What the README promises: its Python runs, its commands and files exist."""

import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

from adamae_fast import AdaMAE
from adamae_fast.cli import COMMANDS
from adamae_fast.config import load_config, save_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_examples_run(tmp_path, monkeypatch):
    recipe = ROOT / "configs" / "demo.yaml"
    save_config(load_config(recipe), tmp_path / "config.yaml")
    save_file(AdaMAE.from_config(recipe).state_dict(), tmp_path / "model.safetensors")
    monkeypatch.chdir(ROOT)
    examples = blocks("python")
    assert examples
    for example in examples:
        exec(example.replace("runs/demo", str(tmp_path)), {})


def test_commands_exist():
    names = [re.match(r"adamae-fast ((data )?\w+)", line) for block in blocks("bash") for line in block.splitlines()]
    used = {match[1] for match in names if match}
    assert used
    assert used <= set(COMMANDS)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_linked_files_exist(link):
    assert (ROOT / link).exists()
