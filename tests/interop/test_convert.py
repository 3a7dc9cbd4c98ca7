"""The command: folders and files on disk, from every layout to every other."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adamae_fast.config import (
    DecoderConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    PretrainConfig,
    SamplerConfig,
    load_config,
    save_config,
)
from adamae_fast.interop.convert import convert
from adamae_fast.interop.keys import parameter_shapes
from adamae_fast.model.adamae import AdaMAE

TINY = ModelConfig(size="nano", num_frames=8, frame_size=24, patch_size=8)
ADAPTIVE, TUBE = MaskConfig(), MaskConfig(strategy="tube", ratio=0.9)
SUFFIX = {"adamae-fast": "", "adamae": ".pth", "videomae": ".pth", "transformers": ""}


def make_folder(path, model=TINY, mask=ADAPTIVE, loss=None, seed=0):
    """Write a checkpoint folder with random weights."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(model, mask)
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, path / "model.safetensors")
    save_config(PretrainConfig(model=model, mask=mask, loss=loss or LossConfig()), path / "config.yaml")
    return path


def run(source, target, to, **options):
    convert(str(source), str(target), to, **options)
    return target


def assert_same_weights(one, other, without=()):
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    left = {name: tensor for name, tensor in left.items() if not name.startswith(tuple(without))}
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("chain", "mask"),
    [
        (["adamae", "adamae-fast"], ADAPTIVE),
        (["videomae", "adamae-fast"], TUBE),
        (["transformers", "adamae-fast"], TUBE),
        (["videomae", "transformers", "videomae", "adamae-fast"], TUBE),
    ],
)
def test_round_trips_are_bit_exact(tmp_path, chain, mask):
    model = ModelConfig(
        size="nano", num_frames=16, frame_size=24, patch_size=8, tubelet_size=4, decoder=DecoderConfig(depth=3)
    )
    start = path = make_folder(tmp_path / "start", model, mask)
    for step, to in enumerate(chain):
        clip = {"num_frames": 16, "frame_size": 24} if path.suffix == ".pth" else {}
        path = run(path, tmp_path / f"{step}{SUFFIX[to]}", to, **clip)
    assert_same_weights(start, path)
    assert load_config(path / "config.yaml") == load_config(start / "config.yaml")
    AdaMAE.from_pretrained(path)


@pytest.mark.parametrize("to", ["videomae", "transformers"])
def test_sampler_is_dropped_where_it_has_no_place_and_this_is_said(tmp_path, capsys, to):
    start = make_folder(tmp_path / "start")
    middle = run(start, tmp_path / f"middle{SUFFIX[to]}", to)
    said = capsys.readouterr().out
    assert f"{to} has no place for the sampler: 14 tensors dropped" in said
    clip = {"num_frames": 8, "frame_size": 24} if to == "videomae" else {}
    end = run(middle, tmp_path / "end", "adamae-fast", **clip)
    assert_same_weights(start, end, without=["sampler."])
    config = load_config(end / "config.yaml")
    assert (config.model, config.mask) == (TINY, TUBE)
    assert "tensors dropped" not in capsys.readouterr().out


def test_model_without_sampler_does_not_become_adamae(tmp_path):
    start = make_folder(tmp_path / "start", mask=MaskConfig(strategy="random"))
    with pytest.raises(ValueError, match=r"no sampler.*--to videomae"):
        run(start, tmp_path / "out.pth", "adamae")
    assert sorted(os.listdir(tmp_path)) == ["start"]


def test_run_folder_gives_its_newest_checkpoint(tmp_path):
    make_folder(tmp_path / "run/checkpoints/step_00000001", seed=1)
    newest = make_folder(tmp_path / "run/checkpoints/step_00000002", seed=2)
    run(tmp_path / "run", tmp_path / "out.pth", "adamae")
    assert_same_weights(newest, run(tmp_path / "out.pth", tmp_path / "end", "adamae-fast"))


def test_loss_settings_that_do_not_travel_are_named(tmp_path, capsys):
    raw = make_folder(tmp_path / "raw", mask=TUBE, loss=LossConfig(target="raw"))
    run(raw, tmp_path / "raw_hf", "transformers")
    assert "note" not in capsys.readouterr().out
    assert json.loads((tmp_path / "raw_hf/config.json").read_text())["norm_pix_loss"] is False
    assert load_config(run(tmp_path / "raw_hf", tmp_path / "back", "adamae-fast") / "config.yaml").loss.target == "raw"
    capsys.readouterr()
    run(raw, tmp_path / "raw.pth", "videomae")
    assert "note: videomae has no place for LossConfig(error='mse', target='raw'" in capsys.readouterr().out
    absolute = make_folder(tmp_path / "l1", mask=TUBE, loss=LossConfig(error="l1", target="mae_st"))
    run(absolute, tmp_path / "l1_hf", "transformers")
    assert "note: transformers has no place for LossConfig(error='l1', target='mae_st'" in capsys.readouterr().out


@pytest.mark.parametrize("existing", ["file", "folder", "dangling link"])
def test_nothing_is_overwritten(tmp_path, existing):
    start, target = make_folder(tmp_path / "start"), tmp_path / "out"
    match existing:
        case "file":
            target.write_text("mine")
        case "folder":
            target.mkdir()
        case "dangling link":
            target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exists; name another"):
        run(start, target, "adamae")
    assert not target.is_file() or target.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def half_written(_, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    start = make_folder(tmp_path / "start")
    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        run(start, tmp_path / "out.pth", "adamae")
    assert os.listdir(tmp_path) == ["start"]


def test_output_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    start, target, save = make_folder(tmp_path / "start"), tmp_path / "out.pth", torch.save

    def race(content, path):
        save(content, path)
        target.write_text("mine")

    monkeypatch.setattr(torch, "save", race)
    with pytest.raises(ValueError, match="exists"):
        run(start, target, "adamae")
    assert target.read_text() == "mine"


def test_misused_options(tmp_path):
    start = make_folder(tmp_path / "start")
    with pytest.raises(ValueError, match=r"frame_size=24: the configuration .* leave it out"):
        run(start, tmp_path / "out.pth", "adamae", frame_size=24)
    run(start, tmp_path / "a.pth", "adamae")
    with pytest.raises(ValueError, match="num_frames=0: choose a positive number"):
        run(tmp_path / "a.pth", tmp_path / "b", "adamae-fast", num_frames=0)
    with pytest.raises(ValueError, match="already has this layout"):
        run(tmp_path / "a.pth", tmp_path / "b.pth", "adamae")
    with pytest.raises(ValueError, match="already has this layout"):
        run(start, tmp_path / "b", "adamae-fast")
    with pytest.raises(ValueError, match="choose one of adamae-fast, adamae, videomae, transformers"):
        run(start, tmp_path / "b", "mae-st")
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path / "nothing", tmp_path / "b", "adamae-fast")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoints"):
        run(tmp_path / "empty", tmp_path / "b", "adamae")
    assert not (tmp_path / "b").exists()


def test_own_folder_whose_weights_do_not_fit(tmp_path):
    start = make_folder(tmp_path / "start")
    save_config(PretrainConfig(model=TINY, mask=TUBE), start / "config.yaml")
    with pytest.raises(ValueError, match=r"(?s)do not fit.*sampler\.positions"):
        run(start, tmp_path / "out.pth", "videomae")


def test_wide_sampler_is_dropped_with_its_settings(tmp_path):
    model = ModelConfig(size="nano", num_frames=8, frame_size=24, patch_size=8, sampler=SamplerConfig(width=64))
    start = make_folder(tmp_path / "start", model)
    with pytest.raises(ValueError, match="one attention block at the encoder's width"):
        run(start, tmp_path / "a.pth", "adamae")
    run(start, tmp_path / "v.pth", "videomae")
    end = run(tmp_path / "v.pth", tmp_path / "end", "adamae-fast", num_frames=8, frame_size=24)
    assert load_config(end / "config.yaml").model == TINY


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    run(make_folder(folder / "start", mask=TUBE), folder / "hf", "transformers")
    return folder


@pytest.fixture
def hf_folder(converted, tmp_path):
    return shutil.copytree(converted / "hf", tmp_path / "hf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "vit"}, "model_type='vit'"),
        ({"num_attention_heads": 8}, "num_attention_heads=8, expected 4"),
        ({"decoder_num_attention_heads": 4}, "decoder_num_attention_heads=4, expected 2"),
        ({"hidden_act": "relu", "qv_bias": False}, "hidden_act='relu', expected 'gelu'; qv_bias=False, expected True"),
        ({"image_size": [24, 40]}, r"image_size=\[24, 40\]"),
        ({"image_size": 36}, "model.frame_size=36"),
        ({"num_frames": "8"}, "num_frames='8'"),
        ({"patch_size": 16}, "patch_size=16, expected 8"),
        ({"intermediate_size": 99}, "intermediate_size=99, expected 512"),
    ],
)
def test_transformers_settings_that_this_model_does_not_have(tmp_path, hf_folder, values, message):
    change_config(hf_folder, **values)
    with pytest.raises(ValueError, match=message):
        run(hf_folder, tmp_path / "out", "adamae-fast")


def test_transformers_folder_states_what_its_classes_default_to_otherwise(hf_folder):
    config = json.loads((hf_folder / "config.json").read_text())
    assert (config["layer_norm_eps"], config["use_mean_pooling"], config["norm_pix_loss"]) == (1e-6, False, True)
    assert config["decoder_intermediate_size"] == 4 * config["decoder_hidden_size"] == 256
    with safe_open(hf_folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


def test_transformers_settings_that_may_differ(tmp_path, converted, hf_folder, capsys):
    """As on the hub: pairs for sizes, the default epsilon of the configuration class, more fields than are needed."""
    change_config(hf_folder, image_size=[24, 24], layer_norm_eps=1e-12, initializer_range=0.02, dtype="float32")
    end = run(hf_folder, tmp_path / "out", "adamae-fast")
    assert "layer_norm_eps=1e-12" in capsys.readouterr().out
    assert_same_weights(converted / "start", end)


def test_transformers_folders_that_cannot_be_read(tmp_path, hf_folder):
    weights = hf_folder / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"classifier.weight": torch.zeros(2, 128)}, weights)
    with pytest.raises(ValueError, match="use_mean_pooling=False, expected True"):
        run(hf_folder, tmp_path / "out", "adamae-fast")
    del tensors["videomae.encoder.layer.1.attention.attention.q_bias"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"missing: videomae\.encoder\.layer\.1\.attention\.attention\.q_bias"):
        run(hf_folder, tmp_path / "out", "adamae-fast")
    weights.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        run(hf_folder, tmp_path / "out", "adamae-fast")
    weights.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors; save the model as one file"):
        run(hf_folder, tmp_path / "out", "adamae-fast")
    (hf_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        run(hf_folder, tmp_path / "out", "adamae-fast")
