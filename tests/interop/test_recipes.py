"""The Python of docs/recipes.md on checkpoints."""

import re
from pathlib import Path

import pytest

from adamae_fast.config import load_config
from adamae_fast.interop.convert import convert
from tests.interop.test_convert import make_folder

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "recipes.md").read_text().split("## Checkpoints that convert\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL))
def test_example_runs(example, tmp_path, monkeypatch, capsys):
    config = load_config(ROOT / "configs" / "demo.yaml")
    convert(str(make_folder(tmp_path / "own", config.model, config.mask)), str(tmp_path / "published.pth"), "adamae")
    monkeypatch.chdir(ROOT)
    exec(example.replace("published.pth", str(tmp_path / "published.pth")), {})
    assert "missing, so fresh: fc_norm (2), head (2)" in capsys.readouterr().out
