"""Published .pth files, rebuilt here from the documented layout and not through the key map under test."""

import argparse
import os
import zipfile

import numpy as np
import pytest
import torch

from adamae_fast.config import DecoderConfig, LossConfig, MaskConfig, ModelConfig, SamplerConfig
from adamae_fast.interop.keys import Checkpoint
from adamae_fast.interop.published import load_pth, read_published, write_published

D, E, N, P = 128, 64, 36, 384  # nano; 8 frames of 24×24 in tubelets of 2×8×8: no other clip gives 36 tokens
CLIP = {"num_frames": 8, "frame_size": 24}


def block(prefix: str, width: int, qv_bias: bool = True) -> dict[str, torch.Tensor]:
    shapes = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    if qv_bias:
        shapes |= {"attn.q_bias": (width,), "attn.v_bias": (width,)}
    return {f"{prefix}.{name}": torch.randn(shape) for name, shape in shapes.items()}


def pretrained(sampler: bool, decoder_depth: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a nano-sized file, as the published code names and shapes them."""
    tensors = {
        "mask_token": torch.randn(1, 1, E),
        "encoder_to_decoder.weight": torch.randn(E, D),
        "encoder.patch_embed.proj.weight": torch.randn(D, 3, 2, 8, 8),
        "encoder.patch_embed.proj.bias": torch.randn(D),
        "encoder.norm.weight": torch.randn(D),
        "encoder.norm.bias": torch.randn(D),
        "decoder.norm.weight": torch.randn(E),
        "decoder.norm.bias": torch.randn(E),
        "decoder.head.weight": torch.randn(P, E),
        "decoder.head.bias": torch.randn(P),
    }
    for i in range(4):
        tensors |= block(f"encoder.blocks.{i}", D)
    for i in range(decoder_depth):
        tensors |= block(f"decoder.blocks.{i}", E)
    if sampler:
        tensors["encoder.pos_embed_probs"] = torch.randn(1, N, D)
        tensors |= block("encoder.get_token_probs.0", D, qv_bias=False)
        tensors |= {
            "encoder.get_token_probs.1.weight": torch.randn(1, D),
            "encoder.get_token_probs.1.bias": torch.randn(1),
        }
    return tensors


def save(path, tensors, **more):
    torch.save({"model": tensors, "epoch": 799, **more}, path)
    return path


def test_adamae_file_with_everything_the_training_loop_saves(tmp_path):
    """Optimizer with numpy learning rates, scaler and pickled args do not stand in the way; every weight arrives."""
    theirs = pretrained(sampler=True)
    lr = np.linspace(0, 1, 3)[1] * 1.0
    assert type(lr) is np.float64
    path = save(
        tmp_path / "adamae.pth",
        theirs,
        optimizer={
            "state": {0: {"step": 3, "exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": lr, "betas": (0.9, 0.95)}],
        },
        scaler={"scale": 65536.0, "_growth_tracker": 7},
        args=argparse.Namespace(mask_ratio=0.95, opt_betas=[0.9, 0.95], window_size=(8, 14, 14), resume=None),
    )
    checkpoint = read_published(path)
    assert checkpoint.model == ModelConfig(size="nano", num_frames=8, frame_size=24, patch_size=8)
    assert checkpoint.mask == MaskConfig(strategy="adaptive", ratio=0.95)
    assert checkpoint.notes == ()
    ours = checkpoint.state
    assert len(ours) == len(theirs)
    pairs = {
        "tokenizer.weight": "encoder.patch_embed.proj.weight",
        "tokenizer.bias": "encoder.patch_embed.proj.bias",
        "sampler.positions": "encoder.pos_embed_probs",
        "sampler.blocks.0.attention.qkv.weight": "encoder.get_token_probs.0.attn.qkv.weight",
        "sampler.blocks.0.norm2.bias": "encoder.get_token_probs.0.norm2.bias",
        "sampler.head.weight": "encoder.get_token_probs.1.weight",
        "sampler.head.bias": "encoder.get_token_probs.1.bias",
        "encoder.blocks.3.attention.q_bias": "encoder.blocks.3.attn.q_bias",
        "encoder.blocks.0.attention.v_bias": "encoder.blocks.0.attn.v_bias",
        "encoder.blocks.1.attention.proj.weight": "encoder.blocks.1.attn.proj.weight",
        "encoder.blocks.2.mlp.fc1.weight": "encoder.blocks.2.mlp.fc1.weight",
        "encoder.norm.bias": "encoder.norm.bias",
        "projection.weight": "encoder_to_decoder.weight",
        "decoder.blocks.1.mlp.fc2.bias": "decoder.blocks.1.mlp.fc2.bias",
        "decoder.norm.weight": "decoder.norm.weight",
        "decoder.head.weight": "decoder.head.weight",
    }
    for mine, other in pairs.items():
        assert torch.equal(ours[mine], theirs[other]), mine
    assert torch.equal(ours["mask_token"], theirs["mask_token"].flatten())
    assert sorted(t.double().sum() for t in ours.values()) == sorted(t.double().sum() for t in theirs.values())


def test_numpy_scalars_of_numpy_1_are_read(tmp_path):
    """Published files were written when numpy kept its scalars in numpy.core; numpy 2 renamed that to numpy._core."""
    new = save(tmp_path / "new.pth", {"x": torch.arange(3)}, lr=np.float64(0.25))
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core" in content
                content = content.replace(b"numpy._core", b"numpy.core")
            target.writestr(name, content)
    assert load_pth(old)["x"].tolist() == [0, 1, 2]


class Payload:
    """A pickle of this creates a file when it is opened without protection."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "model", "optimizer"])
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, place, zipped):
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    payload = Payload(os.mkdir, str(trace))
    content = {"model": pretrained(sampler=True), "epoch": 1, "args": argparse.Namespace()}
    match place:
        case "args":
            content["args"] = argparse.Namespace(device=payload)
        case "model":
            content["model"]["mask_token"] = payload
        case "optimizer":
            content["optimizer"] = payload
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused, because its pickle asks for (posix|nt)\.mkdir"):
        read_published(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the payload was live: only the refusal kept it from running


@pytest.mark.parametrize("function", [eval, getattr, open])
def test_builtin_functions_are_refused(tmp_path, function):
    torch.save({"model": {}, "args": Payload(function, str(tmp_path / "trace"), "w")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="refused"):
        load_pth(tmp_path / "evil.pth")
    assert not (tmp_path / "trace").exists()


def test_the_allow_list_is_gone_after_reading(tmp_path):
    path = save(tmp_path / "x.pth", {"x": torch.zeros(1)}, args=argparse.Namespace())
    load_pth(path)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == ["argparse.Namespace"]


def test_videomae_file_gets_tube_masks_and_an_assumed_clip(tmp_path):
    path = save(tmp_path / "videomae.pth", pretrained(sampler=False, decoder_depth=3))
    assumed = read_published(path)
    assert (assumed.model.num_frames, assumed.model.frame_size) == (16, 224)
    assert "--num_frames" in assumed.notes[0]
    told = read_published(path, **CLIP)
    assert told.model == ModelConfig(patch_size=8, size="nano", decoder=DecoderConfig(depth=3), **CLIP)
    assert told.mask == MaskConfig(strategy="tube", ratio=0.9)
    assert told.notes == ()
    assert not any(name.startswith("sampler.") for name in told.state)


def test_ddp_prefix_and_deepspeed_top_level(tmp_path):
    tensors = pretrained(sampler=True)
    plain = read_published(save(tmp_path / "plain.pth", tensors))
    torch.save({"module": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "ddp.pth")
    wrapped = read_published(tmp_path / "ddp.pth")
    assert "module." in wrapped.notes[0]
    assert wrapped.state.keys() == plain.state.keys()
    assert all(torch.equal(wrapped.state[name], plain.state[name]) for name in plain.state)


def test_half_precision_is_widened(tmp_path):
    tensors = pretrained(sampler=True)
    state = read_published(save(tmp_path / "half.pth", {k: v.half() for k, v in tensors.items()})).state
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert torch.equal(state["encoder.norm.bias"], tensors["encoder.norm.bias"].half().float())


def test_faults_are_listed_all_at_once(tmp_path):
    tensors = pretrained(sampler=True)
    del tensors["encoder.blocks.2.attn.q_bias"]
    tensors["encoder.blocks.2.attn.k_bias"] = torch.zeros(D)
    tensors["decoder.norm.bias"] = torch.zeros(E + 1)
    tensors["encoder.norm.bias"] = torch.zeros(D, dtype=torch.int64)
    with pytest.raises(ValueError, match="4 tensors do not fit") as caught:
        read_published(save(tmp_path / "bad.pth", tensors))
    message = str(caught.value)
    assert f"missing: encoder.blocks.2.attn.q_bias ({D},)" in message
    assert f"unknown: encoder.blocks.2.attn.k_bias ({D},)" in message
    assert f"shape: decoder.norm.bias ({E + 1},), expected ({E},)" in message
    assert "dtype: encoder.norm.bias torch.int64" in message


def test_long_lists_are_cut(tmp_path):
    tensors = pretrained(sampler=True) | {f"extra.{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(ValueError, match=r"50 tensors do not fit[\s\S]*and 30 more"):
        read_published(save(tmp_path / "bad.pth", tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {"patch_embed.proj.weight": t["encoder.norm.bias"], "head.bias": t["encoder.norm.bias"]},
            r"no tensor head\.weight",
        ),
        (lambda t: {k: v for k, v in t.items() if k != "encoder_to_decoder.weight"}, "no tensor encoder_to_decoder"),
        (lambda t: {k: v for k, v in t.items() if k != "encoder.pos_embed_probs"}, "pos_embed_probs.*missing"),
        (lambda t: {k: v for k, v in t.items() if ".blocks.3." not in k}, "encoder depth 3.*none of the known sizes"),
        (lambda t: t | {"encoder.patch_embed.proj.weight": torch.zeros(D, 1, 2, 8, 8)}, r"\(128, 1, 2, 8, 8\)"),
        (lambda t: t | {"encoder.pos_embed_probs": torch.zeros(1, 62, D)}, "62 tokens.*--num_frames"),
        (lambda t: {k: v for k, v in t.items() if "blocks.1." not in k}, "missing: encoder.blocks.1.norm1.weight"),
        (lambda t: t | {"mask_token": 3}, "no tensors: mask_token"),
        (lambda t: {}, "no tensor encoder.patch_embed.proj.weight"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, change, message):
    path = save(tmp_path / "other.pth", change(pretrained(sampler=True)))
    with pytest.raises(ValueError, match=message):
        read_published(path)


def test_files_that_are_no_checkpoints(tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"no weights under 'model'; the file holds \['epoch', 'state_dict'\]"):
        load_pth(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="holds list"):
        load_pth(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pth(tmp_path / "c.pth")
    whole = save(tmp_path / "d.pth", pretrained(sampler=True)).read_bytes()
    (tmp_path / "d.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_pth(tmp_path / "d.pth")
    (tmp_path / "e.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pth(tmp_path / "e.pth")


def test_damaged_pickles_are_value_errors(tmp_path):
    """A file that breaks the reader in some other way than a forbidden global still gets a message with its name."""
    whole = save(tmp_path / "whole.pth", {"x": torch.zeros(1)}, lr=np.float64(0.5))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "damaged.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"latin1", b"latinX"))
    with pytest.raises(ValueError, match=r"damaged\.pth: cannot be read"):
        load_pth(tmp_path / "damaged.pth")


def test_written_file_equals_the_published_layout(tmp_path):
    theirs = pretrained(sampler=True)
    write_published(tmp_path / "out.pth", read_published(save(tmp_path / "in.pth", theirs)))
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert content.keys() == {"model", "epoch"}
    assert content["model"].keys() == theirs.keys()
    assert all(torch.equal(content["model"][name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("sampler", [SamplerConfig(kind="mlp"), SamplerConfig(depth=2), SamplerConfig(width=64)])
def test_other_samplers_have_no_place_in_adamae_files(tmp_path, sampler):
    checkpoint = Checkpoint(
        model=ModelConfig(size="nano", sampler=sampler), mask=MaskConfig(), loss=LossConfig(), state={}
    )
    with pytest.raises(ValueError, match="--to videomae"):
        write_published(tmp_path / "out.pth", checkpoint)
    assert not (tmp_path / "out.pth").exists()
