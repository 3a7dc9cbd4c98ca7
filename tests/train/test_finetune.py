"""Fine-tuning runs: what they leave, what a kill costs, and what they refuse."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from adamae_fast import AdaMAE, VideoClassifier
from adamae_fast.cli import main
from adamae_fast.config import MaskConfig, ModelConfig, PretrainConfig, load_run_config, save_config
from adamae_fast.config_finetune import FinetuneConfig
from adamae_fast.data.quarantine import TooManyBadVideosError
from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train import finetune as finetune_module
from adamae_fast.train.finetune import KEYS, finetune
from adamae_fast.train.finetune_step import FinetuneStepper
from tests.train.labelled_videos import MODEL, write_manifest, write_recipe

STEPS = 10
EPOCH_ENDS = [3, 5, 8, 10]  # 2.5 steps each
FILES = ("model.safetensors", "trained.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_videos):
    folder = tmp_path_factory.mktemp("recipe")
    manifest = write_manifest(folder / "train.txt", tiny_videos, [0, 1, 2, 0, 1])
    val = write_manifest(folder / "val.txt", tiny_videos[:3], [0, 1, 2])
    return write_recipe(folder / "recipe.yaml", manifest, val)


def run(recipe, output_dir, console=None, **overrides):
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    config = load_run_config(recipe, FinetuneConfig, {"output_dir": str(output_dir), **named})
    return finetune(config, console or Console(quiet=True))


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run") / "uninterrupted"
    console = Console(record=True, file=io.StringIO(), width=200)
    summary = run(recipe, output_dir, console, train__ema_decay=0.5)
    return output_dir, summary, console.export_text()


def test_what_a_run_leaves(uninterrupted):
    output_dir, summary, text = uninterrupted
    folder = RunFolder(output_dir)
    lines = read_json_lines(folder.validation)
    assert [line["step"] for line in lines] == EPOCH_ENDS
    assert all(line["videos"] == 3 and line["unreadable"] == 0 and line["top5"] == 1 for line in lines)
    assert all(line["top1"] in (0, 1 / 3, 2 / 3, 1) for line in lines)
    best = max(lines, key=lambda line: line["top1"])
    assert (summary["best_step"], summary["best_top1"]) == (best["step"], best["top1"])
    assert summary["best"] == str(folder.checkpoint(best["step"]))
    assert json.loads(folder.summary.read_text()) == summary
    assert summary["step"] == STEPS
    assert [line["step"] for line in read_json_lines(folder.metrics)] == list(range(1, STEPS + 1))
    assert {"loss", "lr", "grad_norm", "decode_seconds"} <= set(read_json_lines(folder.metrics)[0])
    assert "nano" in text
    assert "3 classes" in text
    assert load_run_config(folder.config, FinetuneConfig).classifier.num_classes == 3


def test_the_average_is_what_a_checkpoint_shows(uninterrupted):
    folder = RunFolder(uninterrupted[0]).checkpoint(STEPS)
    average, trained = (load_file(folder / name) for name in FILES[:2])
    assert not torch.equal(average["head.weight"], trained["head.weight"])
    loaded = VideoClassifier.from_pretrained(folder)
    assert all(torch.equal(p, average[name]) for name, p in loaded.named_parameters())


class KilledError(BaseException):
    """What nothing catches."""


def kill_at(monkeypatch, target, name, call):
    """Let the ``call``-th call of ``target.name`` be the last thing that a process does."""
    original = getattr(target, name)
    calls = 0

    def wrapped(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KilledError
        return original(*arguments, **options)

    monkeypatch.setattr(target, name, wrapped)


def test_a_run_killed_at_several_moments_equals_the_uninterrupted_one(recipe, uninterrupted, tmp_path, monkeypatch):
    moments = [
        (FinetuneStepper, "finish", 2),  # before the first checkpoint
        (FinetuneStepper, "take", 4),  # between two checkpoints
        (finetune_module, "predict_views", 1),  # between the checkpoint of an epoch and its validation
        (FinetuneStepper, "read_figures", 3),
    ]
    for moment in moments:
        with monkeypatch.context() as patched:
            kill_at(patched, *moment)
            with pytest.raises(KilledError):
                run(recipe, tmp_path, train__ema_decay=0.5)
    assert run(recipe, tmp_path, train__ema_decay=0.5)["step"] == STEPS
    expected, actual = RunFolder(uninterrupted[0]), RunFolder(tmp_path)
    for name in FILES:
        one, two = (folder.checkpoint(STEPS) / name for folder in (expected, actual))
        assert one.read_bytes() == two.read_bytes(), name
    assert actual.validation.read_text() == expected.validation.read_text()
    figures = [
        [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in read_json_lines(folder.metrics)]
        for folder in (expected, actual)
    ]
    assert figures[0] == figures[1]


def test_a_signal_in_a_validation_saves_and_the_resumed_run_begins_with_it(recipe, tmp_path, monkeypatch):
    original = finetune_module.predict_views

    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(finetune_module, "predict_views", signalled)
        summary = run(recipe, tmp_path, train__epochs=1.0, optim__warmup_epochs=0)
    assert (summary["step"], summary["stopped_by"]) == (3, "SIGTERM")
    folder = RunFolder(tmp_path)
    assert folder.list_checkpoints()[-1] == folder.checkpoint(3)
    assert not folder.validation.exists()
    summary = run(recipe, tmp_path, train__epochs=1.0, optim__warmup_epochs=0)
    assert (summary["step"], summary["stopped_by"]) == (3, None)
    assert [line["step"] for line in read_json_lines(folder.validation)] == [3]


def test_the_best_checkpoint_outlives_newer_ones(recipe, tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.9, 0.9, 0.1])
    monkeypatch.setattr(finetune_module, "_validate", lambda *_: {"top1": next(accuracies), "top5": 1.0})
    summary = run(recipe, tmp_path)
    folder = RunFolder(tmp_path)
    assert summary["best"] == str(folder.checkpoint(5))
    assert folder.list_checkpoints() == [folder.checkpoint(step) for step in (5, 8, 10)]


def write_pretrained(folder: Path, **model) -> Path:
    config = PretrainConfig(model=ModelConfig(**{**MODEL, **model}), mask=MaskConfig(ratio=0.5))
    folder.mkdir()
    torch.manual_seed(1)
    save_file(AdaMAE(config.model, config.mask).state_dict(), folder / "model.safetensors")
    save_config(config, folder / "config.yaml")
    return folder


def test_a_run_begins_with_a_pre_trained_encoder_and_says_what_it_took(recipe, tmp_path):
    start = write_pretrained(tmp_path / "pretrained", num_frames=8)  # positions are computed for the clip
    console = Console(record=True, file=io.StringIO(), width=400)
    nothing_learned = {"optim__base_lr": 1e-12, "optim__min_lr": 0.0, "optim__weight_decay": 0.0}
    run(recipe, tmp_path / "run", console, init=str(start), train__steps=1, train__ema_decay=0.5, **nothing_learned)
    text = console.export_text()
    assert "tensors used" in text
    assert "missing, so fresh: fc_norm (2), head (2)" in text
    assert "left over" in text
    weights = load_file(start / "model.safetensors")
    loaded = VideoClassifier.from_pretrained(tmp_path / "run")
    for name, p in loaded.named_parameters():
        if not name.startswith(("head.", "fc_norm.")):
            torch.testing.assert_close(p, weights[name], rtol=0, atol=1e-6)


def test_unreadable_validation_videos_are_counted_and_never_replaced(recipe, tiny_videos, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    val = write_manifest(tmp_path / "val.txt", [*tiny_videos[:3], broken], [0, 1, 2, 2])
    overrides = {"val__manifest": str(val), "train__steps": 1}
    console = Console(record=True, file=io.StringIO(), width=200)
    run(recipe, tmp_path / "lenient", console, data__max_bad_share=0.25, **overrides)
    assert "of 3 videos; 1 unreadable" in console.export_text()
    folder = RunFolder(tmp_path / "lenient")
    (line,) = read_json_lines(folder.validation)
    assert (line["videos"], line["unreadable"]) == (3, 1)
    assert [entry["path"] for entry in read_json_lines(folder.quarantine_val)] == [str(broken)]
    assert not folder.quarantine.exists()
    with pytest.raises(TooManyBadVideosError, match=r"1 of 4 videos .*max_bad_share=0\.2"):
        run(recipe, tmp_path / "strict", data__max_bad_share=0.2, **overrides)
    assert RunFolder(tmp_path / "strict").list_checkpoints() == [RunFolder(tmp_path / "strict").checkpoint(1)]


@pytest.mark.parametrize(
    ("labels", "val_labels", "words"),
    [
        ([0, 1, 2, 0, -1], [0, 1, 2], "has no label"),
        ([0, 1, 1, 0, 1], [0, 1, 2], "has label 2, but there are 2 classes"),
    ],
)
def test_bad_labels_are_refused_before_anything_is_written(recipe, tiny_videos, tmp_path, labels, val_labels, words):
    manifest = write_manifest(tmp_path / "train.txt", tiny_videos, labels)
    val = write_manifest(tmp_path / "val.txt", tiny_videos[:3], val_labels)
    with pytest.raises(ValueError, match=words):
        run(recipe, tmp_path / "run", data__manifest=str(manifest), val__manifest=str(val))
    assert not (tmp_path / "run").exists()


def test_a_manifest_that_is_not_named_is_asked_for(recipe, tmp_path):
    for key in ("data.manifest", "val.manifest"):
        with pytest.raises(ValueError, match=f"{key} is required"):
            run(recipe, tmp_path / "run", **{key: ""})


def test_a_start_of_another_size_is_refused(recipe, tmp_path):
    start = write_pretrained(tmp_path / "pretrained", patch_size=8)
    with pytest.raises(ValueError, match=r"model\.patch_size=16, but .* set model\.patch_size=8"):
        run(recipe, tmp_path / "run", init=str(start))
    assert not RunFolder(tmp_path / "run").config.exists()


def test_another_experiment_in_the_folder_of_a_run_is_refused(recipe, uninterrupted):
    for key, value in {"augment.mixup": 0.1, "optim.layer_decay": 0.5, "classifier.num_classes": 7}.items():
        with pytest.raises(ValueError, match=rf"{key}={value}, but .* was trained with"):
            run(recipe, uninterrupted[0], train__ema_decay=0.5, **{key: value})


def test_what_a_changed_key_means():
    assert KEYS.kind_of("classifier.num_classes") is KEYS.other_model
    assert KEYS.kind_of("classifier.drop_path") is KEYS.other_experiment
    assert KEYS.kind_of("views.temporal") is KEYS.harmless
    assert KEYS.kind_of("optim.sampler_lr_scale") is KEYS.kind_of("data.cache_gib") is KEYS.harmless
    assert KEYS.kind_of("train.epochs") is KEYS.worth_a_warning


def test_the_command_explains_every_key_and_tells_a_users_mistake(capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--augment.mixup", "--train.ema_decay", "--val.manifest", "Folder of the run", "Clips cut from each"):
        assert words in text
    assert main(["finetune", "--output_dir", str(tmp_path / "run")]) == 2
    assert "data.manifest is required" in capsys.readouterr().err
