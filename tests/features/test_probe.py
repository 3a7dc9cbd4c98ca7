"""Probes end to end: accuracies add up, runs repeat to the bit, what is wrong is said before anything is computed."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from PIL import Image
from rich.console import Console

from adamae_fast.cli import main
from adamae_fast.config_features import FeatureDataConfig, HeadConfig, KnnConfig, ProbeConfig
from adamae_fast.config_finetune import ValConfig
from adamae_fast.data.quarantine import TooManyBadVideosError
from adamae_fast.errors import RunStoppedError
from adamae_fast.features import extract as extracting
from adamae_fast.features import probe as probing
from adamae_fast.features.probe import probe
from adamae_fast.features.store import FeatureFolder, FeaturesError
from tests.features.conftest import BROKEN, LABELS
from tests.processes import run_together
from tests.train.labelled_videos import write_manifest
from tests.train.test_finetune import write_pretrained


def options(featured, output_dir, **others):
    data = {"manifest": str(featured.manifest), "max_bad_share": 0.5, "num_workers": 0, **others.pop("data", {})}
    told = {"batch_size": 2, "device": "cpu", "val": ValConfig(manifest=str(featured.manifest)), **others}
    return ProbeConfig(output_dir=str(output_dir), data=FeatureDataConfig(**data), **told)


def run(featured, output_dir, checkpoint=None, **others):
    told = options(featured, output_dir, **others)
    return probe(str(checkpoint or featured.pretrained), told, Console(quiet=True))


HEADS = {"linear": {}, "attentive": {"head": HeadConfig(epochs=2)}, "knn": {"knn": KnnConfig(k=3)}}


@pytest.mark.parametrize("kind", HEADS)
def test_results_add_up_and_repeat_to_the_bit(featured, tmp_path, kind, monkeypatch):
    found = run(featured, tmp_path, probe=kind, **HEADS[kind])
    written = (tmp_path / "results.json").read_bytes()
    assert json.loads(written) == found
    assert (found["num_videos"], found["num_readable"], found["num_unreadable"]) == (7, 6, 1)
    assert (found["num_train"], found["num_unreadable_train"], found["probe"]) == (6, 1, kind)
    pairs = [(line["label"], line["predicted"]) for line in found["predictions"]]
    assert [label for label, _ in pairs] == [LABELS[i] for i in range(7) if i != BROKEN]
    assert found["top1"] == pytest.approx(sum(a == b for a, b in pairs) / 6)
    assert found["top5"] == 1
    with Image.open(tmp_path / "confusion_matrix.png") as picture:
        assert min(picture.size) > 200
    if kind != "knn":
        best = max(found["grid"], key=lambda line: line["top1"])
        assert (found["lr"], found["top1"]) == (best["lr"], best["top1"])
    again = tmp_path / "again"
    run(featured, again, probe=kind, **HEADS[kind])
    assert (again / "results.json").read_bytes() == written
    # What is extracted stays: the same again decodes nothing.
    monkeypatch.delattr(extracting, "show_views")
    run(featured, tmp_path, probe=kind, **HEADS[kind])
    assert (tmp_path / "results.json").read_bytes() == written


def test_a_linear_head_learns_its_own_videos(featured, tmp_path):
    """Five points in 128 dimensions can always be told apart."""
    assert run(featured, tmp_path)["top1"] == 1.0


def test_neighbours_are_those_of_the_stored_features(featured, tiny_videos, tmp_path):
    val = write_manifest(tmp_path / "val.txt", tiny_videos[1:4], [1, 2, 0])
    found = run(featured, tmp_path / "out", probe="knn", knn=KnnConfig(k=2), val=ValConfig(manifest=str(val)))
    train, queries = (FeatureFolder(tmp_path / "out" / "features" / f"{name}_pooled") for name in ("train", "val"))
    for line, query in zip(found["predictions"], queries.read(), strict=True):
        cosines = [float(query @ f / (query.norm() * f.norm())) for f in train.read()]
        votes = [0.0] * 3
        for row in sorted(range(6), key=lambda i: -cosines[i])[:2]:
            votes[train.labels[row]] += math.exp(cosines[row] / 0.07)
        assert line["predicted"] == votes.index(max(votes))
        assert line["scores"][0] == pytest.approx(max(votes) / sum(votes), rel=1e-3)
    assert found["top1"] == 1.0  # each video's nearest neighbour is itself


def test_the_command_with_a_recipe_on_two_processes(featured, tmp_path):
    alone = run(featured, tmp_path / "alone", probe="attentive", head=HeadConfig(epochs=1, lrs=(1e-3,)))
    recipe = {
        "probe": "attentive",
        "device": "cpu",
        "batch_size": 2,
        "data": {"manifest": str(featured.manifest), "max_bad_share": 0.5, "num_workers": 0},
        "val": {"manifest": str(featured.manifest)},
        "head": {"epochs": 1, "lrs": [1e-3]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["probe", str(featured.pretrained), "--config", str(tmp_path / "recipe.yaml")]
    outputs = run_together([*command, "--output-dir", str(tmp_path / "together")])
    found = json.loads((tmp_path / "together" / "results.json").read_text())
    assert found == alone
    assert json.loads(outputs[0].splitlines()[-1])["top1"] == found["top1"]
    assert not outputs[1].strip()


def test_what_stops_the_first_set_stops_the_second(featured, tmp_path, monkeypatch):
    """A signal to another process leaves this one without a word of its own."""
    begun = []
    monkeypatch.setattr(probing, "extract_features", lambda part, told, *rest: begun.append(told.output_dir))
    assert run(featured, tmp_path)["stopped_by"] == "a signal to another process"
    assert begun == [str(tmp_path / "features" / "train_pooled")]


def test_what_a_user_may_get_wrong(featured, tiny_videos, tmp_path, caplog):
    def refused(words, **others):
        with pytest.raises(ValueError, match=words):
            run(featured, tmp_path / "out", **others)
        assert not (tmp_path / "out").exists()

    outside = write_manifest(tmp_path / "outside.txt", tiny_videos[:1], [3])
    refused("has label 3, but there are 3 classes", val=ValConfig(manifest=str(outside)))
    unlabelled = tmp_path / "unlabelled.txt"
    unlabelled.write_text(f"{tiny_videos[0]}\n{tiny_videos[1]}\n")
    refused("unlabelled.txt: .* has no label", data={"manifest": str(unlabelled)})
    refused("unlabelled.txt: .* has no label", val=ValConfig(manifest=str(unlabelled)))
    refused(r"val\.manifest is required", val=ValConfig())
    refused(r"knn\.k=20: data\.manifest has only 7 videos; choose", probe="knn")
    refused(
        r"1 videos; a probe learns from at least 2",
        data={"manifest": str(write_manifest(outside, tiny_videos[:1], [0]))},
        val=ValConfig(manifest=str(outside)),
    )
    with pytest.raises(ValueError, match=r"knn\.k=7: data\.manifest has only 6 readable videos"):
        run(featured, tmp_path / "readable", probe="knn", knn=KnnConfig(k=7))
    run(featured, tmp_path / "warned", knn=KnnConfig(k=7))
    assert "knn has no effect: probe=linear" in caplog.text
    for wrong, words in (
        (lambda: KnnConfig(temperature=0), r"knn\.temperature=0"),
        (lambda: KnnConfig(k=0), r"knn\.k=0"),
        (lambda: HeadConfig(lrs=()), r"head\.lrs=\(\)"),
        (lambda: HeadConfig(batch_size=1), r"head\.batch_size=1.*BatchNorm"),
        (lambda: HeadConfig(epochs=0), r"head\.epochs=0"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def test_features_of_another_checkpoint_are_not_mixed_in(featured, tmp_path):
    run(featured, tmp_path / "out", probe="knn", knn=KnnConfig(k=1))
    other = write_pretrained(tmp_path / "other", patch_size=8)
    with pytest.raises(FeaturesError, match=r"train_pooled'.*made with checkpoint=\S+pretrained .*now it is \S+other"):
        run(featured, tmp_path / "out", other, probe="knn", knn=KnnConfig(k=1))


def test_too_many_unreadable_videos_are_an_error(featured, tiny_videos, tmp_path):
    with pytest.raises(TooManyBadVideosError, match="1 of 7 videos"):
        run(featured, tmp_path / "train", data={"max_bad_share": 0.1})
    train = write_manifest(tmp_path / "train.txt", tiny_videos, [0, 1, 2, 0, 1])
    with pytest.raises(TooManyBadVideosError, match="1 of 7 videos"):
        run(featured, tmp_path / "val", data={"manifest": str(train), "max_bad_share": 0.1})
    assert json.loads((tmp_path / "val" / "results.json").read_text())["num_unreadable"] == 1


def test_heads_that_diverge_are_left_out(featured, tmp_path):
    found = run(featured, tmp_path / "out", head=HeadConfig(lrs=(1e38, 0.1), epochs=20))
    assert "top1" not in found["grid"][0]
    assert found["lr"] == 0.1
    with pytest.raises(RunStoppedError, match=r"head\.lrs=\[1e\+38\]: every head ended in values"):
        run(featured, tmp_path / "out", head=HeadConfig(lrs=(1e38,), epochs=20))


def test_the_command_explains_every_key(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["probe", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--head.lrs", "--knn.temperature", "BatchNorm without weights", "--config"):
        assert words in text
