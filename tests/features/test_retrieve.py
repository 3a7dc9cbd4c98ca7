"""Retrieval end to end: neighbours of the stored features, a sheet, and lines; no video is its own neighbour."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from adamae_fast.cli import main
from adamae_fast.config_features import FeatureDataConfig, FeatureViewsConfig, RetrieveConfig
from adamae_fast.features import extract as extracting
from adamae_fast.features.extract import extract
from adamae_fast.features.retrieve import retrieve
from adamae_fast.features.store import FeatureFolder, FeaturesError
from tests.features.conftest import BROKEN, LABELS
from tests.features.test_extract import options as extract_options
from tests.train.labelled_videos import write_manifest


def run(target, queries, out, featured=None, **others):
    data = {"num_workers": 0, "max_bad_share": 0.5}
    if featured is not None:
        data["manifest"] = str(featured.manifest)
        others.setdefault("batch_size", 2)
    told = RetrieveConfig(
        out=str(out), device="cpu", data=FeatureDataConfig(**data, **others.pop("data", {})), **others
    )
    console = Console(record=True, file=io.StringIO(), width=300)
    summary = retrieve(str(target), [str(path) for path in queries], told, console)
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()], summary, console


@pytest.fixture(scope="module")
def extracted(featured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "features"
    views = FeatureViewsConfig(temporal=2)
    extract(str(featured.pretrained), extract_options(featured, folder, views=views), Console(quiet=True))
    return FeatureFolder(folder)


def by_hand(features, query, own):
    """Rows by cosine similarity, highest first, without those of the query itself."""
    base = features.read()
    cosines = [float(query @ f / (query.norm() * f.norm())) for f in base]
    return [(row, cosines[row]) for row in sorted(range(len(base)), key=lambda i: -cosines[i]) if row not in own]


def test_neighbours_in_a_feature_folder(extracted, tiny_videos, tmp_path, monkeypatch):
    def read_only(*arguments):
        raise AssertionError("a finished folder is only read")

    monkeypatch.setattr(extracting, "extract_features", read_only)
    queries = [tiny_videos[1], tiny_videos[0]]
    lines, summary, console = run(extracted.path, queries, tmp_path / "sheet.png", k=3)
    stored = extracted.read()
    for line, query, own in zip(lines, (stored[1], stored[0]), ({1}, {0, 5}), strict=True):  # line 6 repeats video 0
        expected = by_hand(extracted, query, own)[:3]
        assert [n["id"] for n in line["neighbours"]] == [extracted.ids[row] for row, _ in expected]
        assert [n["path"] for n in line["neighbours"]] == [extracted.paths[row] for row, _ in expected]
        assert [n["label"] for n in line["neighbours"]] == [LABELS[extracted.ids[row]] for row, _ in expected]
        assert [n["similarity"] for n in line["neighbours"]] == pytest.approx([s for _, s in expected], abs=1e-4)
        assert [n["rank"] for n in line["neighbours"]] == [1, 2, 3]
    assert [line["query"] for line in lines] == [str(query) for query in queries]
    assert [line["label"] for line in lines] == [1, 0]
    assert (summary["queries"], summary["unreadable"]) == (2, 0)
    text = console.export_text()
    assert json.loads(text.splitlines()[-1]) == summary
    assert f"  1  {lines[0]['neighbours'][0]['similarity']:.3f}  label" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 290


def test_a_checkpoint_is_searched_by_features_that_stay(featured, tiny_videos, tmp_path, monkeypatch):
    out = tmp_path / "made" / "sheet.png"
    missing = tmp_path / "missing.mp4"
    lines, summary, _ = run(featured.pretrained, [missing, tiny_videos[2]], out, featured, k=7)
    assert "no such file" in lines[0]["unreadable"]
    assert lines[0]["neighbours"] == []
    assert len(lines[1]["neighbours"]) == 5  # seven lines, but one is unreadable and one the query itself
    assert BROKEN not in {n["id"] for n in lines[1]["neighbours"]}
    assert summary["unreadable"] == 1
    features = FeatureFolder(tmp_path / "made" / "sheet.features")
    expected = by_hand(features, features.read()[2], {2})
    assert [n["similarity"] for n in lines[1]["neighbours"]] == pytest.approx([s for _, s in expected], abs=1e-4)
    assert {n["id"] for n in lines[1]["neighbours"]} == {features.ids[row] for row, _ in expected}
    monkeypatch.delattr(extracting, "show_views")  # the features are there
    again, _, _ = run(featured.pretrained, [tiny_videos[2]], out, featured, k=7)
    assert again[0] == lines[1]


def test_the_command_says_what_could_not_be_read_by_its_status(extracted, tiny_videos, tmp_path, capsys):
    options = ["--k=1", f"--out={tmp_path / 'a.png'}", "--data.num_workers=0"]
    command = ["retrieve", str(extracted.path), str(tiny_videos[0]), *options]
    assert main(command) == 0
    assert main([*command[:2], str(tmp_path / "missing.mp4"), *options]) == 1
    assert main([*command, "--data.stride=2"]) == 2
    assert "data.stride=2 has no effect" in capsys.readouterr().err


def test_what_a_user_may_get_wrong(featured, extracted, tiny_videos, tmp_path):
    def refused(words, target=extracted.path, kind=ValueError, **others):
        with pytest.raises(kind, match=words):
            run(target, tiny_videos[:1], tmp_path / "sheet.png", **others)
        assert not (tmp_path / "sheet.png").exists()

    refused("k=8: there are only 7 videos", k=8)
    refused("k=0: choose", k=0)
    refused("views=.* has no effect: .* extracted with its own", views=FeatureViewsConfig(temporal=3))
    refused("data.manifest is required", featured.pretrained)
    with pytest.raises(ValueError, match=r"out='sheet\.jpg': choose a name that ends in \.png"):
        RetrieveConfig(out="sheet.jpg")
    tokens = tmp_path / "tokens"
    told = extract_options(featured, tokens, tokens="all")
    extract(str(featured.pretrained), told, Console(quiet=True))
    refused("holds all tokens; .*pooled", tokens)
    half = tmp_path / "half"
    shutil.copytree(extracted.path, half)
    (half / "shard-00000.safetensors").unlink()
    refused("2 of 3 shards are there", half, FeaturesError)


def test_a_checkpoint_or_manifest_that_has_changed_since_is_refused(featured, tiny_videos, tmp_path):
    manifest = write_manifest(tmp_path / "videos.txt", tiny_videos, [0, 1, 2, 0, 1])
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(featured.pretrained, checkpoint)
    told = extract_options(featured, tmp_path / "features", data={"manifest": str(manifest)})
    extract(str(checkpoint), told, Console(quiet=True))
    weights = load_file(checkpoint / "model.safetensors")
    save_file({**weights, "encoder.norm.bias": weights["encoder.norm.bias"] + 1}, checkpoint / "model.safetensors")
    with pytest.raises(FeaturesError, match="was made with checkpoint="):
        run(tmp_path / "features", tiny_videos[:1], tmp_path / "sheet.png", k=1)
    save_file(weights, checkpoint / "model.safetensors")
    write_manifest(manifest, tiny_videos[:4], [0, 1, 2, 0])
    with pytest.raises(FeaturesError, match=r"was made with data\.manifest="):
        run(tmp_path / "features", tiny_videos[:1], tmp_path / "sheet.png", k=1)


def test_a_feature_folder_is_searched_from_anywhere(featured, tiny_videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(featured.pretrained, "checkpoint")
    write_manifest(tmp_path / "videos.txt", tiny_videos, [0, 1, 2, 0, 1])
    extract("checkpoint", extract_options(featured, "features", data={"manifest": "videos.txt"}), Console(quiet=True))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    lines, _, _ = run("../features", tiny_videos[:1], tmp_path / "sheet.png", k=4)
    assert {n["id"] for n in lines[0]["neighbours"]} == {1, 2, 3, 4}
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"extracted with \S+/checkpoint, which is not there any more"):
        run("../features", tiny_videos[:1], tmp_path / "sheet.png", k=4)
