"""transformers' VideoMAE is an independent implementation of the same network: converted weights must agree with it.

Shapes: B clips, C channels, T frames, H, W pixels, N tokens, K visible, P pixels of a token.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamae_fast.config import LossConfig, ModelConfig, load_config
from adamae_fast.interop.convert import convert
from adamae_fast.interop.huggingface import transformers_config
from adamae_fast.interop.keys import NO_SAMPLER_MASK, parameter_shapes, transformers_names
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.model.positions import sinusoid_table

transformers = pytest.importorskip("transformers")

TINY = ModelConfig(size="nano", num_frames=8, frame_size=32, patch_size=8)


def build_theirs(**changes):
    """Return their model for the nano size with every parameter random, biases and norms included.

    Their decoder's last norm ignores ``layer_norm_eps`` and has 1e-5; ours and VideoMAE's own have 1e-6. Set alike
    here, so that the tolerances below are rounding alone; test_converted_folder_… takes it as it is.
    """
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**(transformers_config(TINY, LossConfig()) | changes))
    model = transformers.VideoMAEForPreTraining(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    model.decoder.norm.eps = 1e-6
    return model


@pytest.fixture(scope="module")
def theirs():
    return build_theirs()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    theirs.save_pretrained(folder / "theirs")
    convert(str(folder / "theirs"), str(folder / "ours"), "adamae-fast")
    return AdaMAE.from_pretrained(folder / "ours").eval()


@pytest.fixture(scope="module")
def clip():
    """A uint8 clip, the visible ids of each row, and the same for transformers: normalised pixels and a mask."""
    generator = torch.Generator().manual_seed(1)
    video_BCTHW = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    visible_BK = torch.stack([torch.randperm(64, generator=generator)[:7].sort().values for _ in range(2)])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels_BTCHW = ((video_BCTHW / 255 - mean) / std).transpose(1, 2)
    masked_BN = torch.ones(2, 64, dtype=torch.bool).scatter(1, visible_BK, False)
    return video_BCTHW, visible_BK, pixels_BTCHW, masked_BN


def max_difference(one, other):
    return (one.double() - other.double()).abs().max().item()


def test_predictions_and_loss_agree(theirs, ours, clip):
    video, visible, pixels, masked = clip
    with torch.no_grad():
        expected, output = theirs(pixels, masked), ours(video, visible_ids=visible)
    assert expected.logits.abs().max() > 1
    assert max_difference(output.prediction, expected.logits) < 5e-6  # measured 1.4e-6
    assert output.loss.item() == pytest.approx(expected.loss.item(), abs=2e-6)
    assert output.logits is None
    assert torch.equal(output.masked_ids, torch.stack([row.nonzero()[:, 0] for row in masked]))


def test_gradients_agree(theirs, ours, clip):
    video, visible, pixels, masked = clip
    theirs.zero_grad()
    ours.zero_grad()
    theirs(pixels, masked).loss.backward()
    ours(video, visible_ids=visible).loss.backward()
    gradients = dict(theirs.named_parameters())
    inside = {".q_bias": ".query.bias", ".v_bias": ".value.bias"}
    for name, parameter in ours.named_parameters():
        names = transformers_names(name)
        for old, new in inside.items():
            names = tuple(n.replace(old, new) for n in names)
        expected = torch.cat([gradients[n].grad for n in names]).reshape(parameter.shape)
        assert max_difference(parameter.grad, expected) < 1e-5 * max(1, expected.abs().max().item()), name


def test_raw_pixel_target_agrees(clip, tmp_path):
    theirs = build_theirs(norm_pix_loss=False)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"), "adamae-fast")
    assert load_config(tmp_path / "ours/config.yaml").loss.target == "raw"
    video, visible, pixels, masked = clip
    with torch.no_grad():
        expected = theirs(pixels, masked).loss.item()
        assert AdaMAE.from_pretrained(tmp_path / "ours")(video, visible_ids=visible).loss.item() == pytest.approx(
            expected, abs=1e-5
        )


@pytest.mark.parametrize(("num_tokens", "width"), [(64, 128), (63, 60), (1568, 384)])
def test_position_tables_are_equal_bit_for_bit(num_tokens, width):
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

    assert torch.equal(sinusoid_table(num_tokens, width), get_sinusoid_encoding_table(num_tokens, width)[0])


def test_converted_folder_loads_with_no_key_left_over(tmp_path, clip):
    torch.manual_seed(2)
    ours = AdaMAE(TINY, NO_SAMPLER_MASK).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    save_own(ours, tmp_path / "ours")
    convert(str(tmp_path / "ours"), str(tmp_path / "theirs"), "transformers")
    theirs, report = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert {key: len(values) for key, values in report.items() if values} == {}
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys()
    video, visible, pixels, masked = clip
    with torch.no_grad():
        expected, output = theirs.eval()(pixels, masked), ours(video, visible_ids=visible)
    # Twice what the norm's other epsilon makes of it.
    assert max_difference(output.prediction, expected.logits) < 1e-5
    assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


def save_own(model, folder):
    """Write a checkpoint folder of a TINY model without a sampler."""
    from adamae_fast.config import PretrainConfig, save_config

    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    save_config(PretrainConfig(model=TINY, mask=NO_SAMPLER_MASK), folder / "config.yaml")


def test_round_trip_is_bit_exact(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "a")
    convert(str(tmp_path / "a"), str(tmp_path / "b.pth"), "videomae")
    convert(str(tmp_path / "b.pth"), str(tmp_path / "c"), "transformers", num_frames=8, frame_size=32)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in "ac")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_biases_under_their_newer_names_are_read(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "a")
    convert(str(tmp_path / "a"), str(tmp_path / "ours"), "adamae-fast")
    save_file(theirs.state_dict(), tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    assert "videomae.encoder.layer.0.attention.attention.query.bias" in load_file(tmp_path / "a/model.safetensors")
    convert(str(tmp_path / "a"), str(tmp_path / "again"), "adamae-fast")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["encoder.blocks.0.attention.q_bias"].count_nonzero() > 0


@pytest.mark.parametrize("size", ["small", "base", "large", "huge"])
def test_every_size_has_the_names_and_shapes_of_their_model(size):
    """Their model is built from our config.json without allocating it; few tokens, which no parameter depends on."""
    model = ModelConfig(size=size, num_frames=2, frame_size=32)
    config = transformers.VideoMAEConfig(**transformers_config(model, LossConfig()))
    with torch.device("meta"):
        network = transformers.VideoMAEForPreTraining(config)
    expected = {name: tuple(p.shape) for name, p in network.named_parameters()}
    ours = {}
    for name, shape in parameter_shapes(model, NO_SAMPLER_MASK).items():
        theirs = [
            n.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias") for n in transformers_names(name)
        ]
        shape = (1, 1, *shape) if name == "mask_token" else (shape[0] // len(theirs), *shape[1:])
        ours |= dict.fromkeys(theirs, shape)
    assert ours == expected
    if size == "base":
        assert sum(p.numel() for p in network.parameters()) == 86_227_200 + 7_983_744
