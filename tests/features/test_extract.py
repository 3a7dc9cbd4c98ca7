"""Extracted features: the numbers of a plain loop, whole shards or none, the same bytes however often it was cut."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adamae_fast import AdaMAE, VideoClassifier, open_encoder
from adamae_fast.cli import main
from adamae_fast.config import load_config
from adamae_fast.config_features import ExtractConfig, FeatureDataConfig, FeatureViewsConfig
from adamae_fast.config_finetune import LabelledDataConfig, ViewsConfig
from adamae_fast.data.labelled import view_batches
from adamae_fast.data.manifest import read_manifest
from adamae_fast.data.quarantine import TooManyBadVideosError
from adamae_fast.errors import RunStoppedError
from adamae_fast.features import extract as extracting
from adamae_fast.features import store
from adamae_fast.features.extract import extract
from adamae_fast.features.store import FeatureFolder, FeaturesError
from adamae_fast.interop.convert import convert
from tests.features.conftest import BROKEN, LABELS
from tests.processes import run_together
from tests.train.labelled_videos import write_manifest
from tests.train.test_finetune import write_pretrained

READABLE = [i for i in range(len(LABELS)) if i != BROKEN]
SMALL = {"batch_size": 2, "shard_videos": 3, "device": "cpu"}  # shards of 4 and 3 videos


def options(featured, output_dir, **others):
    data = {"manifest": str(featured.manifest), "max_bad_share": 0.5, "num_workers": 0, **others.pop("data", {})}
    return ExtractConfig(output_dir=str(output_dir), data=FeatureDataConfig(**data), **{**SMALL, **others})


def run(checkpoint, featured, output_dir, **others):
    extract(str(checkpoint), options(featured, output_dir, **others), Console(quiet=True))
    return FeatureFolder(output_dir)


def clips(featured, index, temporal=1, spatial=1):
    """All views of one video, by the loader alone."""
    config = LabelledDataConfig(stride=4, num_workers=0)
    views, entry = ViewsConfig(temporal=temporal, spatial=spatial), read_manifest(str(featured.manifest))[index]
    (batch,) = view_batches([entry], config, views, num_frames=4, frame_size=32, batch_size=temporal * spatial)
    return batch.video


def by_hand(model, video):
    """Tokens of a pre-trained model: everything is visible."""
    with torch.no_grad():
        return model.encoder(model.tokenizer(video) + model.positions_ND)


@pytest.fixture(scope="session")
def pooled(featured, tmp_path_factory):
    return run(featured.pretrained, featured, tmp_path_factory.mktemp("extracted") / "pooled")


def test_features_are_those_of_a_plain_loop(featured, pooled, tmp_path):
    model = AdaMAE.from_pretrained(featured.pretrained).eval()
    everything = run(featured.pretrained, featured, tmp_path / "all", tokens="all", dtype="fp32")
    assert pooled.shape == (128,)
    assert everything.shape == (model.grid.num_tokens, 128)
    for row, index in enumerate(READABLE):
        (tokens_ND,) = by_hand(model, clips(featured, index))
        torch.testing.assert_close(everything.read([row])[0], tokens_ND, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled.read([row])[0], tokens_ND.mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(everything.read([4, 0]), everything.read()[[4, 0]])
    distances = torch.cdist(pooled.read(), pooled.read())
    assert sorted(map(tuple, (distances < 1e-3).nonzero().tolist())) == sorted(
        [*((i, i) for i in range(6)), (0, 5), (5, 0)]  # the first and the last row show the same video
    )


def test_views_are_averaged_or_follow_each_other(featured, tmp_path):
    model = AdaMAE.from_pretrained(featured.pretrained).eval()
    views = {"views": FeatureViewsConfig(temporal=2, spatial=3), "batch_size": 4}  # a video has more views than a batch
    mean = run(featured.pretrained, featured, tmp_path / "mean", **views)
    joined = run(featured.pretrained, featured, tmp_path / "joined", tokens="all", **views)
    tokens_SND = by_hand(model, clips(featured, 1, 2, 3))
    torch.testing.assert_close(mean.read([1])[0], tokens_SND.mean((0, 1)), rtol=1e-5, atol=1e-5)
    assert joined.shape == (6 * model.grid.num_tokens, 128)
    torch.testing.assert_close(joined.read([1])[0], tokens_SND.flatten(0, 1), rtol=2e-3, atol=2e-3)  # kept as fp16


def test_features_of_a_classifier_are_what_its_head_sees(featured, tmp_path):
    model = VideoClassifier.from_pretrained(featured.classifier).eval()
    settings = {"sampling": "dense", "stride": 4}
    features = run(featured.classifier, featured, tmp_path / "out", data=settings).read()
    with torch.no_grad():
        logits = torch.cat([model(clips(featured, index)) for index in READABLE])
        torch.testing.assert_close(model.head(features), logits, rtol=1e-5, atol=1e-5)
    from_run = run(featured.classifier, featured, tmp_path / "as_trained")
    assert from_run.header["settings"]["data.sampling"] == "segments"  # as it was fine-tuned


@pytest.mark.parametrize("layout", ["adamae", "videomae", "transformers"])
def test_any_layout_gives_the_same_features(featured, pooled, tmp_path, layout):
    other = tmp_path / ("folder" if layout == "transformers" else "file.pth")
    convert(str(featured.pretrained), str(other), layout)
    told = {} if layout == "transformers" else {"num_frames": 4, "frame_size": 32}
    found = run(other, featured, tmp_path / "out", **told)
    assert torch.equal(found.read(), pooled.read())
    assert found.header["settings"]["weights_sha256"] == pooled.header["settings"]["weights_sha256"]


def test_an_encoder_alone_is_enough(featured, tmp_path):
    convert(str(featured.pretrained), str(tmp_path / "whole.pth"), "videomae")
    tensors = torch.load(tmp_path / "whole.pth", weights_only=True)["model"]
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    video = clips(featured, 0)
    found = open_encoder(tmp_path / "encoder.pth", 4, 32)(video)
    torch.testing.assert_close(found, by_hand(AdaMAE.from_pretrained(featured.pretrained).eval(), video))
    del encoder["encoder.norm.weight"]
    torch.save({"model": encoder}, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=r"missing: encoder\.norm\.weight"):
        open_encoder(tmp_path / "damaged.pth", 4, 32)


def test_rows_say_which_video_they_are_of_and_nothing_takes_an_unreadable_ones_place(featured, pooled):
    entries = read_manifest(str(featured.manifest))
    assert pooled.ids == READABLE
    assert pooled.paths == [entries[i].path for i in READABLE]
    assert pooled.labels == [LABELS[i] for i in READABLE]
    (bad,) = pooled.header["unreadable"]
    assert (bad["id"], bad["path"]) == (BROKEN, entries[BROKEN].path)
    assert [video.path for video in pooled.unreadable] == [entries[BROKEN].path]
    assert pooled.header["num_videos"] == 7
    assert set(pooled.header["versions"]) == {"adamae-fast", "torch"}


def test_npz_holds_the_same_and_numpy_reads_it(featured, pooled, tmp_path):
    found = run(featured.pretrained, featured, tmp_path / "out", format="npz")
    assert torch.equal(found.read(), pooled.read())
    assert torch.equal(found.read([5, 1]), pooled.read([5, 1]))
    assert (found.ids, found.labels, found.paths) == (pooled.ids, pooled.labels, pooled.paths)
    with np.load(tmp_path / "out" / "shard-00001.npz") as arrays:
        assert arrays["ids"].tolist() == [4, 6]
        assert arrays["labels"].tolist() == [1, 0]
        assert json.loads(str(arrays["videos"]))["unreadable"][0]["id"] == BROKEN


def test_videos_without_labels(featured, tiny_videos, tmp_path):
    manifest = tmp_path / "videos.txt"
    manifest.write_text("".join(f"{video}\n" for video in tiny_videos))
    found = run(featured.pretrained, featured, tmp_path / "out", data={"manifest": str(manifest)})
    assert found.labels == [None] * 5
    assert load_file(tmp_path / "out" / "shard-00001.safetensors")["labels"].tolist() == [-1]


DYING = """
import os, signal, sys
from adamae_fast.cli import main
from adamae_fast.features import store
write = store.write_tensors_file
def die_in_the_second(tensors, path, metadata):
    if "00001" in path.name:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, path, metadata)
store.write_tensors_file = die_in_the_second
main(sys.argv[1:])
"""


def as_command(featured, output_dir, **others):
    told = {"batch_size": 2, "shard_videos": 3, "device": "cpu", "data.num_workers": 0, "data.max_bad_share": 0.5}
    words = [f"--{key}={value}" for key, value in {**told, "output_dir": output_dir, **others}.items()]
    return ["extract", str(featured.pretrained), f"--data.manifest={featured.manifest}", *words]


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def test_a_killed_run_is_seen_and_goes_on_to_the_same_bytes(featured, pooled, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    command = [sys.executable, "-c", DYING, *as_command(featured, folder)]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(
        FeaturesError,
        match=r"not finished: 1 of 2 shards .* goes on with the rest and keeps these: adamae-fast extract",
    ):
        FeatureFolder(folder)
    before = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    shown = []
    view = extracting.show_views

    def listed(*arguments, numbers, **others):
        shown.extend(numbers)
        return view(*arguments, numbers=numbers, **others)

    monkeypatch.setattr(extracting, "show_views", listed)
    # The command that the index names is the one that goes on.
    words = json.loads((folder / "features.json").read_text())["command"].split()
    assert words[0] == "adamae-fast"
    assert main([*words[1:], f"--output_dir={folder}", "--data.max_bad_share=0.5", "--data.num_workers=0"]) == 0
    assert shown == [4, 5, 6]
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == before
    assert shard_bytes(folder) == shard_bytes(pooled.path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in pooled.path.iterdir())
    FeatureFolder(folder)


def test_two_processes_write_the_bytes_of_one(featured, pooled, tmp_path):
    outputs = run_together(as_command(featured, tmp_path / "out"))
    assert shard_bytes(tmp_path / "out") == shard_bytes(pooled.path)
    assert json.loads(outputs[0].splitlines()[-1])["num_readable"] == 6
    assert not outputs[1].strip()


def test_a_stop_signal_leaves_whole_shards(featured, pooled, tmp_path, monkeypatch):
    def a_signal_in_the_third_batch(*arguments, **others):
        for number, shown in enumerate(view(*arguments, **others)):
            yield shown
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    view = extracting.show_views
    monkeypatch.setattr(extracting, "show_views", a_signal_in_the_third_batch)
    console = Console(record=True, file=io.StringIO(), width=200)
    summary = extract(str(featured.pretrained), options(featured, tmp_path / "out"), console)
    assert summary["stopped_by"] == "SIGTERM"
    assert "the same command goes on" in console.export_text()
    assert list(shard_bytes(tmp_path / "out")) == ["shard-00000.safetensors"]
    monkeypatch.undo()
    run(featured.pretrained, featured, tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == shard_bytes(pooled.path)


def test_another_experiment_in_the_same_folder_is_refused(featured, pooled, tiny_videos, tmp_path):
    before = shard_bytes(pooled.path)

    def refused(words, checkpoint=featured.pretrained, **others):
        with pytest.raises(FeaturesError, match=words):
            extract(str(checkpoint), options(featured, pooled.path, **others), Console(quiet=True))

    other = write_pretrained(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "encoder.norm.bias": weights["encoder.norm.bias"] + 1}, other / "model.safetensors")
    refused(r"was made with checkpoint=\S+pretrained \(.*now it is \S+other \(.*choose another folder", other)
    manifest = write_manifest(tmp_path / "videos.txt", tiny_videos, [0, 1, 2, 0, 1])
    refused(r"was made with data\.manifest=\S+ \(.*now it is \S+videos\.txt \(", data={"manifest": str(manifest)})
    refused(r"made with tokens=pooled, now it is all; .*the same tokens", tokens="all")
    refused(r"made with views\.temporal=1, now it is 2", views=FeatureViewsConfig(temporal=2))
    refused(r"made with data\.stride=4, now it is 1", data={"stride": 1})
    assert shard_bytes(pooled.path) == before


def test_folders_that_cannot_be_read(pooled, tmp_path):
    with pytest.raises(FeaturesError, match=r"no features\.json"):
        FeatureFolder(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(pooled.path, folder)
    shard = folder / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(FeaturesError, match=r"shard-00001\.safetensors: damaged .*remove it, and extract again"):
        FeatureFolder(folder)
    shard.unlink()
    remedy = r"bring the others back, or make them again.*: adamae-fast extract .* --output_dir=.*copy"
    with pytest.raises(FeaturesError, match=f"1 of 2 shards are there; {remedy}"):
        FeatureFolder(folder)
    index = json.loads((folder / "features.json").read_text())
    for found in ({}, {key: index[key] for key in ("format", "version")}):
        (folder / "features.json").write_text(json.dumps(found))
        with pytest.raises(FeaturesError, match="not the index of features"):
            FeatureFolder(folder)


def test_shards_of_another_extraction_are_refused(pooled, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pooled.path, folder)
    shard = folder / "shard-00001.safetensors"
    wrong = {**load_file(shard), "features": torch.zeros(2, 3)}
    with safe_open(shard, "pt") as file:
        save_file(wrong, shard, file.metadata())
    with pytest.raises(FeaturesError, match=r"shard-00001\.safetensors: features of shape \(3,\), not \(128,\)"):
        FeatureFolder(folder).read()
    shutil.copy(folder / "shard-00000.safetensors", shard)
    with pytest.raises(FeaturesError, match=r"shard-00001\.safetensors: damaged \(it should have videos 4 to 6 of"):
        FeatureFolder(folder)


@pytest.mark.parametrize("damage", ["cut short", "empty", "another bit"])
def test_damaged_npz_shards_are_named(featured, tmp_path, damage):
    features = run(featured.pretrained, featured, tmp_path, format="npz")
    shard = tmp_path / "shard-00001.npz"
    content = bytearray(shard.read_bytes())
    content[content.index(features.read([4]).numpy().tobytes())] ^= 1
    shard.write_bytes({"cut short": content[:-8], "empty": b"", "another bit": content}[damage])
    with pytest.raises(FeaturesError, match=r"shard-00001\.npz: damaged .*remove it, and extract again"):
        features.read() if damage == "another bit" else FeatureFolder(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_full_disk_costs_the_shard_that_did_not_fit(featured, pooled, tmp_path, monkeypatch, kind):
    def half(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_tensors_file", lambda tensors, path, metadata: half(path))
        patch.setattr(np, "savez", lambda file, **arrays: half(Path(file.name)))
        with pytest.raises(RunStoppedError, match=r"shard-00000\.\w+ cannot be written .*No space .*the same command"):
            run(featured.pretrained, featured, tmp_path / "out", format=kind)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "features.json"]
    assert torch.equal(run(featured.pretrained, featured, tmp_path / "out", format=kind).read(), pooled.read())


def test_a_lost_shard_is_made_again(featured, pooled, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pooled.path, folder)
    (folder / "shard-00000.safetensors").unlink()
    index = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps({**index, "num_readable": 7, "unreadable": []}))
    found = run(featured.pretrained, featured, folder)
    assert shard_bytes(folder) == shard_bytes(pooled.path)
    assert found.header == index  # it says what is in the shards now


def test_what_a_user_may_get_wrong(featured, tmp_path):
    def refused(words, checkpoint=featured.pretrained, **others):
        with pytest.raises(ValueError, match=words):
            run(checkpoint, featured, tmp_path / "out", **others)
        assert not (tmp_path / "out").exists()

    refused("does not exist", tmp_path / "nowhere")
    refused(r"frame_size=30.*multiple of model\.patch_size=16", frame_size=30)
    refused("num_frames=0: choose", num_frames=0)
    refused(r"data\.manifest is required", data={"manifest": ""})
    convert(str(featured.pretrained), str(tmp_path / "ours.pth"), "videomae")
    tensors = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    tensors["encoder.patch_embed.proj.weight"] = torch.zeros(100, 3, 2, 16, 16)
    torch.save({"model": tensors}, tmp_path / "odd.pth")
    refused("encoder width 100, encoder depth 4.* is none of the known sizes", tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="output_dir is required"):
        extract(str(featured.pretrained), ExtractConfig(), Console(quiet=True))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.yaml").write_text("model: nano")  # such as a run's folder
    for path, words in ((tmp_path / "notes", "already holds something"), (tmp_path / "ours.pth", "is a file")):
        with pytest.raises(FeaturesError, match=f"{words}.* folder"):
            run(featured.pretrained, featured, path)
    assert [path.name for path in (tmp_path / "notes").iterdir() if not path.name.startswith(".")] == ["config.yaml"]


def test_too_many_unreadable_videos_are_an_error_that_keeps_the_others(featured, tmp_path):
    with pytest.raises(TooManyBadVideosError, match="1 of 7 videos"):
        run(featured.pretrained, featured, tmp_path / "out", data={"max_bad_share": 0.1})
    assert len(FeatureFolder(tmp_path / "out")) == 6


def test_features_that_are_not_finite_name_the_video(featured, tmp_path):
    loud = write_pretrained(tmp_path / "loud")
    weights = load_file(loud / "model.safetensors")
    save_file({**weights, "encoder.norm.weight": weights["encoder.norm.weight"] * 1e6}, loud / "model.safetensors")
    first = read_manifest(str(featured.manifest))[0].path
    with pytest.raises(RunStoppedError, match=rf"features that are not finite, the first being {first}"):
        run(loud, featured, tmp_path / "out", dtype="fp16")
    assert load_config(loud / "config.yaml").model.size == "nano"  # as fp32 they are
    run(loud, featured, tmp_path / "exact")
