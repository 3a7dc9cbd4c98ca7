"""transformers' VideoMAEForVideoClassification is an independent implementation of the classifier."""

import pytest
import torch
from safetensors.torch import load_file

from adamae_fast import VideoClassifier, load_encoder
from adamae_fast.config import LossConfig, ModelConfig
from adamae_fast.interop.convert import convert
from adamae_fast.interop.huggingface import transformers_config
from adamae_fast.interop.keys import classifier_shapes, transformers_names
from tests.parity.test_transformers_videomae import max_difference

transformers = pytest.importorskip("transformers")

TINY = ModelConfig(size="nano", num_frames=8, frame_size=32, patch_size=8)
K = 7
INSIDE = {".q_bias": ".query.bias", ".v_bias": ".value.bias"}
"""What transformers calls the biases inside its model."""


def build_theirs(**changes):
    """Return their model for the nano size with every parameter random, biases and norms included."""
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**(transformers_config(TINY, LossConfig(), K) | changes))
    model = transformers.VideoMAEForVideoClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def pixels_of(video_BCTHW):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((video_BCTHW / 255 - mean) / std).transpose(1, 2)


def clip(num_frames=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, num_frames, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def theirs():
    return build_theirs()


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    theirs.save_pretrained(folder / "theirs")
    convert(str(folder / "theirs"), str(folder / "ours"), "adamae-fast")
    return folder


def test_logits_agree(theirs, folders):
    """Their fc_norm ignores ``layer_norm_eps`` and has 1e-5; ours and VideoMAE's own have 1e-6: that is within 1e-5."""
    with torch.no_grad():
        expected = theirs(pixels_of(clip())).logits
        logits = VideoClassifier.from_pretrained(folders / "ours").eval()(clip())
    assert expected.shape == logits.shape == (2, K)
    assert expected.abs().max() > 1
    assert (expected[0] - expected[1]).abs().max() > 0.01
    assert max_difference(logits, expected) < 1e-5


def test_gradients_agree(folders):
    theirs = build_theirs()
    theirs.fc_norm.eps = 1e-6
    ours = VideoClassifier.from_pretrained(folders / "ours", drop_path=0.0)
    labels = torch.tensor([3, 0])
    theirs(pixels_of(clip()), labels=labels).loss.backward()
    torch.nn.functional.cross_entropy(ours(clip()), labels).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        names = transformers_names(name)
        for old, new in INSIDE.items():
            names = tuple(n.replace(old, new) for n in names)
        expected = torch.cat([gradients[n].grad for n in names]).reshape(parameter.shape)
        assert max_difference(parameter.grad, expected) < 1e-5 * max(1, expected.abs().max().item()), name


@pytest.mark.parametrize("num_frames", [4, 12])
def test_logits_agree_at_other_frame_counts(theirs, folders, num_frames):
    other = build_theirs(num_frames=num_frames)
    other.load_state_dict(theirs.state_dict())
    ours = VideoClassifier.from_pretrained(folders / "ours", **{"model.num_frames": num_frames}).eval()
    with torch.no_grad():
        expected = other(pixels_of(clip(num_frames))).logits
        assert max_difference(ours(clip(num_frames)), expected) < 1e-5


def test_their_folder_is_a_starting_point(theirs, folders):
    model = VideoClassifier(TINY, K)
    keys = load_encoder(model, folders / "theirs")
    assert (keys.missing, keys.left_over) == ((), ())
    with torch.no_grad():
        assert max_difference(model.eval()(clip()), theirs(pixels_of(clip())).logits) < 1e-5


def test_converted_folder_loads_with_no_key_left_over(tmp_path, theirs, folders):
    convert(str(folders / "ours"), str(tmp_path / "back"), "transformers")
    again, report = transformers.VideoMAEForVideoClassification.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert {key: len(values) for key, values in report.items() if values} == {}
    assert again.config.num_labels == K
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels_of(clip())).logits, theirs(pixels_of(clip())).logits)


def test_round_trip_is_bit_exact(tmp_path, folders):
    convert(str(folders / "theirs"), str(tmp_path / "b.pth"), "videomae")
    convert(str(tmp_path / "b.pth"), str(tmp_path / "c"), "transformers", num_frames=8, frame_size=32)
    before, after = (load_file(path / "model.safetensors") for path in (folders / "theirs", tmp_path / "c"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("size", ["small", "base", "large", "huge"])
def test_every_size_has_the_names_and_shapes_of_their_model(size):
    model = ModelConfig(size=size, num_frames=2, frame_size=32)
    config = transformers.VideoMAEConfig(**transformers_config(model, LossConfig(), 174))
    with torch.device("meta"):
        network = transformers.VideoMAEForVideoClassification(config)
    expected = {name: tuple(p.shape) for name, p in network.named_parameters()}
    ours = {}
    for name, shape in classifier_shapes(model, 174).items():
        names = [
            n.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias") for n in transformers_names(name)
        ]
        ours |= dict.fromkeys(names, (shape[0] // len(names), *shape[1:]))
    assert ours == expected
