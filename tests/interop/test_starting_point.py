"""Classifiers in published files, rebuilt from the documented layout, and what fine-tuning takes of any file."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adamae_fast import AdaMAE, LoadedKeys, VideoClassifier, load_encoder
from adamae_fast.config import ModelConfig
from adamae_fast.interop.convert import convert
from adamae_fast.model.positions import sinusoid_table
from tests.interop.test_convert import ADAPTIVE, TUBE, make_folder
from tests.interop.test_published import Payload, block, pretrained, save

D, K = 128, 5
TINY = ModelConfig(size="nano", num_frames=8, frame_size=24, patch_size=8)
CLIP = {"num_frames": 8, "frame_size": 24}


def fine_tuned(num_classes=K):
    """The tensors of a nano-sized fine-tuning file, as the published code names and shapes them."""
    tensors = {
        "patch_embed.proj.weight": torch.randn(D, 3, 2, 8, 8),
        "patch_embed.proj.bias": torch.randn(D),
        "fc_norm.weight": torch.randn(D),
        "fc_norm.bias": torch.randn(D),
        "head.weight": torch.randn(num_classes, D),
        "head.bias": torch.randn(num_classes),
    }
    for i in range(4):
        tensors |= block(f"blocks.{i}", D)
    return tensors


def build(num_classes=K, model=TINY):
    torch.manual_seed(0)
    return VideoClassifier(model, num_classes)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fine_tuning_file_with_everything_the_training_loop_saves(tmp_path, capsys):
    theirs = fine_tuned()
    path = save(
        tmp_path / "tuned.pth",
        theirs,
        optimizer={"state": {0: {"step": 3}}, "param_groups": [{"lr": np.float64(0.25), "lr_scale": 0.1}]},
        scaler={"scale": 65536.0},
        args=argparse.Namespace(nb_classes=K, data_set="SSV2", opt_betas=None, drop_path=0.1),
        model_ema={"decay": 0.9999},
    )
    convert(str(path), str(tmp_path / "ours"), "adamae-fast", **CLIP)
    assert "classifier of 5 classes" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"ours is a classifier; load it with VideoClassifier\.from_pretrained"):
        AdaMAE.from_pretrained(tmp_path / "ours")
    model = VideoClassifier.from_pretrained(tmp_path / "ours")
    assert (model.config, model.num_classes) == (TINY, K)
    ours = model.state_dict()
    pairs = {
        "tokenizer.weight": "patch_embed.proj.weight",
        "tokenizer.bias": "patch_embed.proj.bias",
        "encoder.blocks.3.attention.q_bias": "blocks.3.attn.q_bias",
        "encoder.blocks.0.attention.qkv.weight": "blocks.0.attn.qkv.weight",
        "encoder.blocks.1.attention.proj.bias": "blocks.1.attn.proj.bias",
        "encoder.blocks.2.mlp.fc2.weight": "blocks.2.mlp.fc2.weight",
        "encoder.blocks.2.norm2.weight": "blocks.2.norm2.weight",
        "fc_norm.weight": "fc_norm.weight",
        "head.weight": "head.weight",
        "head.bias": "head.bias",
    }
    for mine, other in pairs.items():
        assert torch.equal(ours[mine], theirs[other]), mine
    assert sorted(t.double().sum() for t in ours.values()) == sorted(t.double().sum() for t in theirs.values())


@pytest.mark.parametrize("place", ["args", "optimizer"])
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, place):
    payload = Payload(os.mkdir, str(tmp_path / "trace"))
    path = save(tmp_path / "evil.pth", fine_tuned(), **{place: payload})
    for read in (
        lambda: convert(str(path), str(tmp_path / "out"), "adamae-fast", **CLIP),
        lambda: load_encoder(build(), path),
    ):
        with pytest.raises(ValueError, match=r"refused, because its pickle asks for \S*mkdir"):
            read()
    assert os.listdir(tmp_path) == ["evil.pth"]


@pytest.mark.parametrize("chain", [["adamae"], ["videomae"], ["transformers"], ["videomae", "transformers", "adamae"]])
def test_round_trips_are_bit_exact(tmp_path, chain):
    start = path = save(tmp_path / "start.pth", fine_tuned())
    for step, to in enumerate(["adamae-fast", *chain, "adamae-fast", "adamae"]):
        target = tmp_path / (f"{step}.pth" if to in ("adamae", "videomae") else f"{step}")
        convert(str(path), str(target), to, **(CLIP if path.suffix == ".pth" else {}))
        if to == "adamae-fast":
            assert VideoClassifier.from_pretrained(target).config == TINY
        path = target
    before, after = (torch.load(file, weights_only=True)["model"] for file in (start, path))
    assert_equal(before, after)


def test_same_layout_is_no_conversion(tmp_path):
    path = save(tmp_path / "a.pth", fine_tuned())
    for to in ("adamae", "videomae"):
        with pytest.raises(ValueError, match="already has this layout"):
            convert(str(path), str(tmp_path / "b.pth"), to, **CLIP)


def test_clip_of_a_file_is_assumed_and_said(tmp_path, capsys):
    tensors = fine_tuned()
    tensors["patch_embed.proj.weight"] = torch.randn(D, 3, 2, 16, 16)
    convert(str(save(tmp_path / "a.pth", tensors)), str(tmp_path / "b"), "adamae-fast")
    assert "took 16 frames of 224×224" in capsys.readouterr().out
    assert VideoClassifier.from_pretrained(tmp_path / "b").config == ModelConfig(size="nano")


def test_transformers_folder_of_a_classifier(tmp_path, capsys):
    path = save(tmp_path / "a.pth", fine_tuned())
    convert(str(path), str(tmp_path / "hf"), "transformers", **CLIP)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["VideoMAEForVideoClassification"]
    assert config["use_mean_pooling"] is True
    assert config["id2label"] == {str(k): f"LABEL_{k}" for k in range(K)}
    names = {"0": "push", "1": "pull", "2": "lift", "3": "drop", "4": "turn"}
    other = {"id2label": names, "decoder_num_hidden_layers": 9, "norm_pix_loss": False, "layer_norm_eps": 1e-12}
    (tmp_path / "hf/config.json").write_text(json.dumps(config | other))
    capsys.readouterr()
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), "adamae-fast")
    said = capsys.readouterr().out
    assert "names the classes" in said
    assert "layer_norm_eps=1e-12" in said
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"use_mean_pooling": False}))
    with pytest.raises(ValueError, match="use_mean_pooling=False, expected True"):
        convert(str(tmp_path / "hf"), str(tmp_path / "again"), "adamae-fast")


SOURCES = ["own", "adamae", "videomae", "transformers"]


def write_source(folder, kind, tuned):
    """A checkpoint in that layout, and the same one in ours: of pre-training, or fine-tuned."""
    own = folder / "own"
    if tuned:
        convert(str(save(folder / "start.pth", fine_tuned())), str(own), "adamae-fast", **CLIP)
    else:
        make_folder(own, TINY, ADAPTIVE if kind in ("own", "adamae") else TUBE)
    if kind == "own":
        return own, own
    path = folder / ("there" if kind == "transformers" else "there.pth")
    convert(str(own), str(path), kind)
    return path, own


@pytest.mark.parametrize("kind", SOURCES)
def test_start_from_pre_training(tmp_path, kind):
    path, own = write_source(tmp_path, kind, tuned=False)
    model = build()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys = load_encoder(model, path)
    truth, state = weights_of(own), model.state_dict()
    for name, tensor in state.items():
        expected = fresh if name.startswith(("fc_norm.", "head.")) else truth
        assert torch.equal(tensor, expected[name]), name
    assert keys.missing == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    stored = torch.load(path, weights_only=True)["model"] if path.is_file() else weights_of(path)
    assert sorted(keys.used + keys.left_over) == sorted(stored)
    attention, norm = {
        "own": ("encoder.blocks.0.attention.qkv.weight", "encoder.norm.bias"),
        "adamae": ("encoder.blocks.0.attn.qkv.weight", "encoder.norm.bias"),
        "videomae": ("encoder.blocks.0.attn.qkv.weight", "encoder.norm.bias"),
        "transformers": ("videomae.encoder.layer.0.attention.attention.query.weight", "videomae.layernorm.bias"),
    }[kind]
    assert attention in keys.used
    assert {norm, "mask_token", "decoder.norm.bias"} <= set(keys.left_over)
    sampler = {"own": "sampler.positions", "adamae": "encoder.pos_embed_probs"}
    assert kind not in sampler or sampler[kind] in keys.left_over
    assert f"{len(keys.used)} tensors used; missing, so fresh: fc_norm (2), head (2); left over: " in str(keys)


@pytest.mark.parametrize("kind", SOURCES)
def test_start_from_a_classifier(tmp_path, kind):
    path, own = write_source(tmp_path, kind, tuned=True)
    model, other = build(), build(num_classes=K + 1)
    keys = load_encoder(model, path)
    assert_equal(model.state_dict(), weights_of(own))
    assert (keys.missing, keys.left_over) == ((), ())
    assert str(keys).endswith("missing, so fresh: none; left over: none")
    keys = load_encoder(other, path)
    head = "classifier" if kind == "transformers" else "head"
    assert (keys.missing, set(keys.left_over)) == (("head.weight", "head.bias"), {f"{head}.weight", f"{head}.bias"})
    assert torch.equal(other.fc_norm.bias, model.fc_norm.bias)
    assert other.head.weight.abs().max() < 1e-3


def test_clips_may_differ(tmp_path):
    path = save(tmp_path / "a.pth", pretrained(sampler=True))
    longer = build(model=ModelConfig(size="nano", num_frames=16, frame_size=32, patch_size=8))
    assert len(load_encoder(longer, path).missing) == 4
    assert torch.equal(longer.positions_ND, sinusoid_table(8 * 4 * 4, D))


def change(tensors, **changes):
    return tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}


@pytest.mark.parametrize(
    ("model", "tensors", "words"),
    [
        (
            ModelConfig(size="small", num_frames=8, frame_size=24, patch_size=8),
            lambda: fine_tuned(),
            r"model\.size='small' has 12 blocks of width 384, but .*a\.pth has 4 of width 128: set model\.size=nano",
        ),
        (TINY, lambda: fine_tuned() | block("blocks.4", D), "has 5 of width 128: no model.size has that"),
        (
            ModelConfig(size="nano", num_frames=8, frame_size=32),
            lambda: fine_tuned(),
            r"model\.patch_size=16, but .* 2 frames of 8 × 8 pixels: set model\.patch_size=8",
        ),
        (
            ModelConfig(size="nano", num_frames=8, frame_size=24, patch_size=8, tubelet_size=4),
            lambda: fine_tuned(),
            r"model\.tubelet_size=4, but .*: set model\.tubelet_size=2",
        ),
        (
            TINY,
            lambda: {n: t for n, t in fine_tuned().items() if n != "blocks.1.attn.q_bias"},
            r"1 tensors do not fit this encoder:\n  missing: encoder\.blocks\.1\.attention\.q_bias \(128,\)",
        ),
        (
            TINY,
            lambda: change(fine_tuned(), fc_norm__bias=torch.zeros(9)),
            r"shape: fc_norm\.bias \(9,\), expected \(128,\)",
        ),
        (
            TINY,
            lambda: change(fine_tuned(), blocks__0__mlp__fc1__bias=torch.zeros(512, dtype=torch.int64)),
            r"dtype: encoder\.blocks\.0\.mlp\.fc1\.bias torch\.int64",
        ),
        (TINY, lambda: {"fc.weight": torch.zeros(3)}, "holds no video encoder"),
        (TINY, lambda: change(fine_tuned(), pos_embed=torch.randn(1, 36, D)), "pos_embed .* learned positions"),
        (TINY, lambda: change(pretrained(sampler=False), encoder__pos_embed=torch.randn(36, D)), "learned positions"),
    ],
)
def test_unfitting_files_are_named_and_change_nothing(tmp_path, model, tensors, words):
    classifier = build(model=model)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load_encoder(classifier, save(tmp_path / "a.pth", tensors()))
    assert_equal(classifier.state_dict(), before)


def test_stored_table_of_sines_is_no_hindrance(tmp_path):
    tensors = change(fine_tuned(), pos_embed=sinusoid_table(36, D)[None])
    keys = load_encoder(model := build(), save(tmp_path / "a.pth", tensors))
    assert keys.left_over == ()
    assert torch.equal(model.head.bias, tensors["head.bias"])
    convert(str(tmp_path / "a.pth"), str(tmp_path / "b"), "adamae-fast", **CLIP)


def test_encoder_without_a_head_starts_but_does_not_convert(tmp_path):
    tensors = {name: tensor for name, tensor in fine_tuned().items() if not name.startswith(("fc_norm", "head"))}
    path = save(tmp_path / "a.pth", tensors | {"norm.weight": torch.zeros(D), "norm.bias": torch.zeros(D)})
    assert load_encoder(build(), path).left_over == ("norm.weight", "norm.bias")
    with pytest.raises(ValueError, match=r"no tensor head\.weight"):
        convert(str(path), str(tmp_path / "b"), "adamae-fast", **CLIP)


def test_a_head_on_something_else_than_fc_norm_is_left_over(tmp_path):
    tensors = {name: tensor for name, tensor in fine_tuned().items() if not name.startswith("fc_norm")}
    path = save(tmp_path / "a.pth", tensors | {"norm.weight": torch.zeros(D), "norm.bias": torch.zeros(D)})
    keys = load_encoder(model := build(), path)
    assert set(keys.left_over) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert keys.missing == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert model.head.weight.abs().max() < 1e-3


def test_half_precision_is_widened_and_ddp_names_are_read(tmp_path):
    tensors = {f"module.{name}": tensor.half() for name, tensor in fine_tuned().items()}
    keys = load_encoder(model := build(), save(tmp_path / "a.pth", tensors))
    assert keys.missing == ()
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight.half(), tensors["module.head.weight"])


def test_transformers_encoder_with_other_heads_is_refused(tmp_path):
    path, _ = write_source(tmp_path, "transformers", tuned=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    with pytest.raises(ValueError, match="num_attention_heads=8, expected 4"):
        load_encoder(build(), path)
    small = build(model=ModelConfig(size="small", num_frames=8, frame_size=24, patch_size=8))
    with pytest.raises(ValueError, match=r"set model\.size=nano"):
        load_encoder(small, path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_encoder(build(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="no checkpoints"):
        load_encoder(build(), tmp_path)
    own = make_folder(tmp_path / "own", TINY, TUBE)
    tensors = weights_of(own)
    del tensors["encoder.blocks.2.norm1.weight"]
    save_file(tensors, own / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: encoder\.blocks\.2\.norm1\.weight"):
        load_encoder(build(), own)


def test_report_counts_by_the_first_part_of_the_name():
    keys = LoadedKeys(used=("a.b",), missing=(), left_over=("decoder.x", "encoder.norm.bias", "decoder.y"))
    assert str(keys) == "1 tensors used; missing, so fresh: none; left over: decoder (2), encoder (1)"
