"""What the README promises: its commands and files exist. ``test_examples.py`` runs its Python."""

import re
from pathlib import Path

import pytest

from adamae_fast.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_commands_exist():
    names = [re.match(r"adamae-fast ((data )?\w+)", line) for block in blocks("bash") for line in block.splitlines()]
    used = {match[1] for match in names if match}
    assert used
    assert used <= set(COMMANDS)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_linked_files_exist(link):
    assert (ROOT / link).exists()
