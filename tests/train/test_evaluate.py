"""Testing a classifier: views and processes merged, counts exact, what cannot be read named."""

from __future__ import annotations

import io
import json
import math
import shutil

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from adamae_fast.cli import main
from adamae_fast.config import load_run_config
from adamae_fast.config_finetune import EvaluateConfig, EvaluateDataConfig, EvaluateViewsConfig, FinetuneConfig
from adamae_fast.data.labelled import read_class_names, view_batches
from adamae_fast.data.manifest import read_manifest
from adamae_fast.data.quarantine import TooManyBadVideosError
from adamae_fast.interop.convert import read_own
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.run_folder import RunFolder
from adamae_fast.train.evaluate import evaluate
from adamae_fast.train.predict import Predictions, join_predictions, merge_views, predict_views
from tests.processes import run_together
from tests.train.labelled_videos import write_classifier, write_manifest, write_recipe
from tests.train.test_finetune import write_pretrained

CPU = torch.device("cpu")
LABELS = [0, 1, 2, 0, 1, 2, 0]
BROKEN = 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_videos):
    """Folder of a checkpoint, its model, its recipe, and a manifest of seven lines, one of them unreadable."""
    folder = tmp_path_factory.mktemp("evaluated")
    broken = folder / "broken.mp4"
    broken.write_text("no video")
    videos = [*tiny_videos, broken, tiny_videos[0]]  # the same path in two lines is two videos
    manifest = write_manifest(folder / "test.txt", videos, LABELS)
    recipe = write_recipe(folder / "recipe.yaml", manifest, manifest)
    return folder / "checkpoint", write_classifier(folder / "checkpoint", recipe), recipe, manifest


def options(manifest, output_dir, **others):
    data = EvaluateDataConfig(manifest=str(manifest), max_bad_share=others.pop("max_bad_share", 0.5))
    return EvaluateConfig(output_dir=str(output_dir), data=data, **others)


def test_views_are_merged_as_by_hand():
    logits = [[1.0, 2.0, 0.0], [3.0, -1.0, 0.5], [0.0, 0.0, 4.0], [-2.0, 1.0, 1.0]]  # two videos of two views
    views = [[[math.exp(x) for x in row] for row in logits[i : i + 2]] for i in (0, 2)]
    expected = [[sum(row[k] / sum(row) for row in video) / 2 for k in range(3)] for video in views]
    torch.testing.assert_close(
        merge_views(torch.tensor(logits), 2, "softmax"), torch.tensor(expected, dtype=torch.float64)
    )
    means = [[2.0, 0.5, 0.25], [-1.0, 0.5, 2.5]]
    torch.testing.assert_close(merge_views(torch.tensor(logits), 2, "logits"), torch.tensor(means, dtype=torch.float64))


def test_softmax_and_logits_can_disagree():
    logits = torch.tensor([[9.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    assert merge_views(logits, 3, "logits").argmax() == 0
    assert merge_views(logits, 3, "softmax").argmax() == 1


def test_accuracy_counts_ties_for_the_smaller_class():
    scores = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0], [0.1] * 7, [0, 1, 2, 3, 4, 5, 6.0]], dtype=torch.float64)
    found = Predictions(ids_V=torch.tensor([0, 2, 3]), scores_VK=scores, bad=[])
    # Video 1 was not readable. Video 0: classes 0 and 1 tie, 0 is first; video 2: 4 is fifth; video 3: 1 is sixth.
    assert found.accuracy([0, 6, 4, 1]) == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}
    assert found.accuracy([1, 6, 5, 2]) == {"top1": 0, "top5": pytest.approx(2 / 3)}
    nothing = Predictions(ids_V=torch.empty(0, dtype=torch.int64), scores_VK=torch.empty(0, 3), bad=[])
    assert all(math.isnan(share) for share in nothing.accuracy([0]).values())


def predicted(trained, world_size, batch_size):
    _, model, recipe, manifest = trained
    config = load_run_config(recipe, FinetuneConfig, {"train.batch_size": batch_size})
    entries = read_manifest(str(manifest))
    parts = [
        predict_views(model, entries, config, config.views, device=CPU, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return join_predictions(parts, len(entries))


def test_scores_are_those_of_each_video_alone(trained):
    _, model, recipe, manifest = trained
    config = load_run_config(recipe, FinetuneConfig)
    entries = read_manifest(str(manifest))
    found = predicted(trained, 1, 2)  # six views of a video do not fit into one forward pass
    sizes = {"num_frames": 4, "frame_size": 32, "batch_size": 6}
    for index, scores in zip(found.ids_V.tolist(), found.scores_VK, strict=True):
        (batch,) = view_batches(entries[index : index + 1], config.data, config.views, **sizes)
        with torch.no_grad():
            expected = model(batch.video).double().softmax(1).mean(0)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert len({tuple(scores.tolist()) for scores in found.scores_VK}) > 2


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_any_number_of_processes_finds_the_same(trained, world_size):
    alone, together = predicted(trained, 1, 12), predicted(trained, world_size, 12)
    assert together.ids_V.tolist() == alone.ids_V.tolist() == [0, 1, 2, 3, 4, 6]
    assert [video.path for video in together.bad] == [video.path for video in alone.bad]
    assert torch.equal(together.ranking(), alone.ranking())
    assert together.accuracy(LABELS) == alone.accuracy(LABELS)
    # Other videos stand beside each one in its batch, which changes the rounding.
    torch.testing.assert_close(together.scores_VK, alone.scores_VK, rtol=1e-5, atol=2e-6)


@pytest.fixture(scope="module")
def results(trained, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("results")
    console = Console(record=True, file=io.StringIO(), width=300)
    found = evaluate(str(trained[0]), options(trained[3], output_dir), console)
    return output_dir, found, console.export_text()


def test_results_are_complete_and_add_up(results, trained):
    output_dir, found, text = results
    assert json.loads((output_dir / "results.json").read_text()) == found
    assert (found["num_videos"], found["num_readable"], found["num_unreadable"]) == (7, 6, 1)
    entries = read_manifest(str(trained[3]))
    assert [line["path"] for line in found["unreadable"]] == [entries[BROKEN].path]
    readable = [i for i in range(7) if i != BROKEN]
    assert [line["path"] for line in found["predictions"]] == [entries[i].path for i in readable]
    assert [line["label"] for line in found["predictions"]] == [LABELS[i] for i in readable]
    pairs = [(line["label"], line["predicted"]) for line in found["predictions"]]
    assert found["confusion_matrix"] == [[pairs.count((row, column)) for column in range(3)] for row in range(3)]
    assert found["top1"] == pytest.approx(sum(label == best for label, best in pairs) / 6)
    assert found["top5"] == 1
    for line in found["predictions"]:
        assert line["predicted"] == line["best"][0]
        assert sum(line["scores"]) == pytest.approx(1, abs=1e-4)
        assert line["scores"] == sorted(line["scores"], reverse=True)
    assert [row["videos"] for row in found["classes"]] == [3, 2, 1]
    with Image.open(output_dir / "confusion_matrix.png") as picture:
        assert min(picture.size) > 200
    for words in ("2 × 3 views, mean of their softmax", "most often taken for", f"unreadable: {entries[BROKEN].path}"):
        assert words in text


def test_logits_may_be_averaged(trained, tmp_path):
    found = evaluate(str(trained[0]), options(trained[3], tmp_path, merge="logits"), Console(quiet=True))
    assert found["merge"] == "logits"
    assert all(sum(line["scores"]) == pytest.approx(1, abs=1e-4) for line in found["predictions"])


def test_two_processes_write_the_same_results_as_one(results, trained, tmp_path):
    told = [f"--output-dir={tmp_path / 'out'}", f"--data.manifest={trained[3]}", "--data.max_bad_share=0.1"]
    # Only the first one says that too many are unreadable: torchrun ends all when one fails, and it has yet to write.
    outputs = run_together(["evaluate", str(trained[0]), *told], statuses=(2, 0))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("num_videos", "num_readable", "num_unreadable", "top1", "top5", "confusion_matrix", "unreadable"):
        assert found[name] == results[1][name], name
    assert [line["best"] for line in found["predictions"]] == [line["best"] for line in results[1]["predictions"]]
    assert "num_readable" in outputs[0].splitlines()[-1]
    assert not outputs[1].strip()


def test_too_many_unreadable_videos_are_an_error_that_keeps_the_results(trained, tmp_path):
    with pytest.raises(TooManyBadVideosError, match=r"1 of 7 videos \(14\.3%\) .*max_bad_share=0\.1"):
        evaluate(str(trained[0]), options(trained[3], tmp_path, max_bad_share=0.1), Console(quiet=True))
    assert json.loads((tmp_path / "results.json").read_text())["num_unreadable"] == 1


def test_what_a_user_may_get_wrong(trained, tiny_videos, tmp_path):
    folder, _, _, manifest = trained

    def refused(checkpoint, words, **others):
        with pytest.raises(ValueError, match=words):
            evaluate(str(checkpoint), EvaluateConfig(output_dir=str(tmp_path / "out"), **others), Console(quiet=True))
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "nowhere", "holds no model.safetensors")
    refused(write_pretrained(tmp_path / "pretrained"), r"is no classifier.*adamae-fast finetune")
    outside = write_manifest(tmp_path / "outside.txt", tiny_videos[:1], [3])
    refused(folder, "has label 3, but there are 3 classes", data=EvaluateDataConfig(manifest=str(outside)))
    unlabelled = tmp_path / "unlabelled.txt"
    unlabelled.write_text(f"{tiny_videos[0]}\n")
    refused(folder, "has no label", data=EvaluateDataConfig(manifest=str(unlabelled)))
    refused(folder, r"views\.temporal=0", views=EvaluateViewsConfig(temporal=0))
    refused(folder, r"device='tpu'", data=EvaluateDataConfig(manifest=str(manifest)), device="tpu")


def test_scores_that_are_not_finite_name_the_video(trained):
    _, model, recipe, manifest = trained
    broken = type(model)(model.config, model.num_classes).eval()
    with torch.no_grad():
        broken.head.bias.fill_(float("nan"))
    config = load_run_config(recipe, FinetuneConfig)
    entries = read_manifest(str(manifest))
    with pytest.raises(
        RuntimeError, match=rf"6 videos have scores that are not finite, the first being {entries[0].path}"
    ):
        predict_views(broken, entries, config, config.views, device=CPU)


def test_a_runs_best_checkpoint_is_tested(trained, tmp_path):
    _, _, recipe, manifest = trained
    run = RunFolder(tmp_path)
    for step in (2, 4):
        write_classifier(run.checkpoint(step), recipe)
    run.validation.write_text('{"step": 2, "top1": 0.5}\n{"step": 4, "top1": 0.25}\n')
    found = evaluate(str(tmp_path), EvaluateConfig(data=EvaluateDataConfig(max_bad_share=0.5)), Console(quiet=True))
    assert found["checkpoint"] == str(run.checkpoint(2))
    assert found["manifest"] == str(manifest)  # the run's own
    assert (tmp_path / "evaluation" / "results.json").is_file()


def test_classes_have_the_names_that_lie_beside_their_videos(trained, tmp_path, caplog):
    folder, _, _, manifest = trained
    beside = tmp_path / manifest.name
    beside.write_text(manifest.read_text())
    names = tmp_path / "labels.json"
    for text in ('["pull", "push", "lift"]', '{"lift": "2", "pull": "0", "push": "1"}'):
        names.write_text(text)
        found = evaluate(str(folder), options(beside, tmp_path / "out"), Console(quiet=True))
        assert [row["name"] for row in found["classes"]] == ["pull", "push", "lift"]
    for text in ('["pull"]', '["pull", "push", "lift", "turn"]', '{"pull": "zero"}', "3", "{"):
        names.write_text(text)
        caplog.clear()
        assert read_class_names(str(beside), 3) is None
        assert "labels.json does not name the 3 classes, so their numbers stand for them" in caplog.text


def test_python_and_conversion_take_the_best_checkpoint_too(trained, tmp_path):
    _, model, recipe, _ = trained
    run = RunFolder(tmp_path / "run")
    for step in (2, 4):
        write_classifier(run.checkpoint(step), recipe)
    newest = {**model.state_dict(), "head.bias": model.head.bias.detach() + 1}
    save_file(newest, run.checkpoint(4) / "model.safetensors")
    for best, folder in ((2, run.checkpoint(2)), (3, run.checkpoint(4))):  # step 3 was not kept
        run.validation.write_text(f'{{"step": {best}, "top1": 0.5}}\n{{"step": 4, "top1": 0.25}}\n')
        wanted = load_file(folder / "model.safetensors")["head.bias"]
        assert torch.equal(VideoClassifier.from_pretrained(run.path).head.bias, wanted)
        assert torch.equal(read_own(run.path).state["head.bias"], wanted)


def test_a_converted_classifier_is_tested_with_views_that_are_told(trained, tmp_path, caplog):
    folder, _, _, manifest = trained
    converted = tmp_path / "converted"
    shutil.copytree(folder, converted)
    config = yaml.safe_load((converted / "config.yaml").read_text())
    (converted / "config.yaml").write_text(yaml.safe_dump({"model": config["model"]}))
    told = options(manifest, tmp_path / "out", views=EvaluateViewsConfig(temporal=1, spatial=1), precision="fp32")
    found = evaluate(str(converted), told, Console(quiet=True))
    assert found["views"] == {"temporal": 1, "spatial": 1}
    assert "was not fine-tuned here" in caplog.text


def test_the_command_explains_every_key(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--views.temporal", "--merge", "Clips along time, evenly placed", "the run's val.manifest if null"):
        assert words in text
