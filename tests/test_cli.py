import json
import subprocess
import sys

import pytest

from adamae_fast import VideoClassifier, __version__
from adamae_fast.cli import COMMANDS, main
from adamae_fast.config import load_config
from tests.conftest import REPOSITORY


def test_module_and_version():
    finished = subprocess.run([sys.executable, "-m", "adamae_fast", "--version"], capture_output=True, text=True)
    assert finished.stdout.split() == ["adamae-fast", __version__]


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*name.split(), "--help"])
    assert f"adamae-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "name a measurement, such as adamae-fast bench step:"), (["stpe"], "there is no measurement 'stpe'")],
)
def test_bench_lists_its_measurements_where_none_is_named(words, message, capsys):
    assert main(["bench", *words]) == 2
    text = capsys.readouterr().err
    assert message in text
    listed = [line.split()[0] for line in text.splitlines()[1:]]
    files = (REPOSITORY / "bench").glob("*.py")
    assert sorted(listed) == sorted(f.stem for f in files if "def main(" in f.read_text())


def test_unknown_command_is_an_error(capsys):
    assert main(["pretain"]) == 2
    assert "there is no command 'pretain'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mask.ratio", "2"], "mask.ratio=2.0"),
        (["--mask.ratoi", "0.9"], "unrecognized arguments: --mask.ratoi 0.9; did you mean --mask.ratio?"),
        (["--train.step", "20"], "unrecognized arguments: --train.step 20; did you mean --train.steps?"),
        (["--manifest", "videos.txt"], "did you mean --data.manifest?"),
        (["--data.manifest", "nowhere.txt"], "nowhere.txt"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--train.device", "tpu"], "train.device='tpu'"),
        (["--mask.strategy", "foo"], "pretrain: mask.strategy=foo: choose adaptive, random, tube or frame"),
        (["--optim.betas", "[1,2,3]"], "optim.betas=[1, 2, 3]: choose a list of 2 values"),
        (["--train.steps", "many"], "train.steps=many: choose a whole number, or null"),
        (["--data.flip", "3"], "data.flip=3: choose true or false"),
        (["--mask", "foo"], "mask=foo: this is a group of keys; set one of them"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(arguments, words, capsys, tmp_path):
    assert main(["pretrain", "--output_dir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_recipe_with_a_wrong_value_names_file_key_value_and_choices(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mask: {strategy: foo}\nmodel: {size: giant}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: mask\.strategy=foo: choose adaptive, random, tube or frame"):
        load_config(recipe)
    with pytest.raises(
        ValueError, match=r"recipe\.yaml: model\.size=giant: choose pico, nano, small, base, large or huge"
    ):
        VideoClassifier.from_config(recipe, num_classes=2)


def test_info_says_what_is_missing_and_why(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["adamae_fast"] == __version__
    backends = {backend["name"]: backend for backend in facts["backends"]}
    assert {"decord", "av", "triton", "flash_attn_2", "flash_attn_3", "xformers", "apex", "nvidia.dali"} <= set(
        backends
    )
    assert all(backend["detail"] for backend in backends.values())
    assert backends["av"]["available"]
    assert "CUDA" in backends["flash_attn_3"]["detail"] or backends["flash_attn_3"]["available"]


def test_info_table_names_every_back_end(capsys):
    assert main(["info"]) == 0
    assert "flash_attn" in capsys.readouterr().out
