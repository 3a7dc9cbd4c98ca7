"""The commands of docs/recipes.md, as they stand there, but for sizes that a test can wait for."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import torch
from safetensors.torch import save_file

from adamae_fast import AdaMAE
from adamae_fast.cli import COMMANDS, main
from adamae_fast.config import load_config, save_config
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "docs" / "recipes.md").read_text()
SMALLER = {
    "data synth": ["--num_videos=8", "--num_frames=16", "--width=64", "--height=64"],
    "probe": ["--head.epochs=20"],
    "finetune": ["--train.steps=2", "--train.batch_size=4", "--data.num_workers=0", "--log.tensorboard=false"],
}


def commands(section):
    (text,) = [part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE) if part.startswith(section)]
    (block, *_) = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line.rpartition("|| ")[2].partition("  #")[0] for line in block.splitlines()]


def test_from_labelled_videos_to_a_confusion_matrix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    save_config(load_config(REPOSITORY / "configs" / "demo.yaml"), demo / "config.yaml")
    torch.manual_seed(0)
    save_file(AdaMAE.from_config(REPOSITORY / "configs" / "demo.yaml").state_dict(), demo / "model.safetensors")
    ran = []
    for command in [*commands("From labelled videos"), *commands("Saliency"), *commands("Features, probes")]:
        words = shlex.split(command)
        assert words.pop(0) == "adamae-fast"
        name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
        assert main([*words, *SMALLER.get(name, [])]) == 0, capsys.readouterr().err
        ran.append(name)
    assert ran[:5] == ["data synth", "data synth", "data check", "finetune", "evaluate"]
    assert ran[5:] == ["saliency", "extract", "probe", "retrieve"]
    output_dir = Path("runs/demo-finetuned/evaluation")
    results = json.loads((output_dir / "results.json").read_text())
    assert (results["num_videos"], results["num_readable"], len(results["classes"])) == (8, 8, 8)
    assert (output_dir / "confusion_matrix.png").stat().st_size > 1000
    results = json.loads(Path("runs/demo-probe/results.json").read_text())
    assert (results["num_train"], results["num_videos"], results["probe"]) == (8, 8, "linear")
    assert len(Path("runs/demo-neighbours.jsonl").read_text().splitlines()) == 2
    assert len(list(Path("runs/demo-saliency").glob("*_saliency.mp4"))) == 2


def test_recipes_that_are_named_exist():
    for path in re.findall(r"configs/\w+\.yaml", TEXT):
        assert (REPOSITORY / path).is_file(), path
