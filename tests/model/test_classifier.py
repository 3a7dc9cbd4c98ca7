"""The classifier on its own: sizes, first values, drop path, input, positions, checkpoints of this project."""

import logging
import math
from typing import get_args

import pytest
import torch
import torch._functorch.config
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from adamae_fast import AdaMAE, VideoClassifier
from adamae_fast.config import (
    AttentionConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    Recompute,
    save_config,
)
from adamae_fast.interop.keys import classifier_shapes
from adamae_fast.model.block import Block
from adamae_fast.model.layers import DropPath
from adamae_fast.model.sizes import SIZES
from adamae_fast.train.compile import compile_blocks
from adamae_fast.train.optim import build_optimizer

TINY = ModelConfig(size="nano", num_frames=4, frame_size=24, patch_size=8)  # 18 tokens
CPU = torch.device("cpu")


def build(num_classes=5, drop_path=0.0, **changes):
    torch.manual_seed(0)
    return VideoClassifier(ModelConfig(**(vars(TINY) | changes)), num_classes, drop_path)


def randomize(model):
    """A fresh head is so small that its logits would agree with anything."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def video(batch_size=2, num_frames=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch_size, 3, num_frames, 24, 24), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_constructs(size):
    shapes = classifier_shapes(ModelConfig(size=size), 400)
    width, depth = SIZES[size].encoder.width, SIZES[size].encoder.depth
    assert shapes["head.weight"] == (400, width)
    assert {name for name in shapes if name.startswith(f"encoder.blocks.{depth}.")} == set()
    # Matrices: q, k, v, proj, 4 and 4 of the MLP. Vectors: q, v, proj, 4 + 1 of the MLP; 4 of norms.
    blocks = depth * (12 * width**2 + 12 * width)
    rest = width * 1536 + width + 2 * width + 400 * width + 400
    assert sum(map(math.prod, shapes.values())) == blocks + rest
    if size == "base":  # the paper's encoder, whose last LayerNorm became fc_norm, and the head
        assert blocks + rest == 86_227_200 + 400 * 769


def test_first_values_are_the_published_ones():
    model = VideoClassifier(ModelConfig(size="small", num_frames=2, frame_size=32), 300)
    state = model.state_dict()
    assert state["head.weight"].std().item() == pytest.approx(0.02 * 0.001, rel=0.02)
    for name, tensor in state.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight")))), name
        elif name.endswith("bias") and not name.startswith("tokenizer."):
            assert not tensor.any(), name
        elif name.startswith("encoder."):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.02), name
    bound = 1 / math.sqrt(3 * 2 * 16 * 16)  # Conv3d: uniform within ± 1 / √(fan in)
    assert 0.99 * bound < state["tokenizer.weight"].abs().max() <= bound


def test_tokens_blocks_mean_norm_head():
    model = randomize(build()).eval()
    pixels = (video().double() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1, 1)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    tokens = torch.nn.functional.conv3d(
        pixels, weights["tokenizer.weight"], weights["tokenizer.bias"], stride=(2, 8, 8)
    )
    tokens = tokens.flatten(2).transpose(1, 2) + model.positions_ND
    hidden = model.double().encoder.blocks(tokens)
    mean = hidden.sum(1) / 18
    centred = mean - mean.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed * weights["fc_norm.weight"] + weights["fc_norm.bias"]
    expected = normed @ weights["head.weight"].T + weights["head.bias"]
    logits = model.float()(video())
    assert logits.shape == (2, 5)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.features(video()).double(), hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floating_clips_are_pixels_in_0_to_1(dtype):
    model = randomize(build())
    expected = model(video())
    gradients = torch.autograd.grad(expected.square().sum(), tuple(model.parameters()))
    logits = model(video().to(dtype) / 255)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(
        torch.autograd.grad(logits.square().sum(), tuple(model.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_floating_clips_of_0_to_255_are_refused():
    model = build().eval()
    with pytest.raises(ValueError, match=r"floating and has values up to 2\d\d; pass uint8 clips, or floating ones in"):
        model(video().float())
    model(video().float() / 255 * 1.5)  # what some resampling overshoots by
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(video().float()))
    exported = torch.export.export(model, (video().float() / 255,))
    torch.testing.assert_close(exported.module()(video().float() / 255), model(video()))


def test_logits_are_fp32_under_autocast_and_close():
    model = randomize(build())
    exact = model(video())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        from_bytes, from_floats = model(video()), model(video() / 255)
        assert model.features(video()).dtype == torch.bfloat16
    assert from_bytes.dtype == from_floats.dtype == torch.float32
    for logits in (from_bytes, from_floats):
        torch.testing.assert_close(logits, exact, rtol=0, atol=0.05 * exact.abs().max().item())
    from_bytes.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (torch.zeros(2, 3, 4, 24, 24, dtype=torch.int64), "dtype torch.int64; pass uint8 clips, or floating ones"),
        (torch.zeros(2, 3, 8, 24, 24, dtype=torch.uint8), r"shape \(2, 3, 8, 24, 24\); .* \(B, 3, 4, 24, 24\)"),
        (torch.zeros(3, 4, 24, 24), r"shape \(3, 4, 24, 24\)"),
    ],
)
def test_other_clips_are_refused(clip, words):
    with pytest.raises(ValueError, match=words):
        build()(clip)


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match="num_classes=0: choose at least 1"):
        VideoClassifier(TINY, 0)
    with pytest.raises(ValueError, match=r"drop_path=1\.0: choose a probability"):
        VideoClassifier(TINY, 3, 1.0)
    with pytest.raises(ValueError, match="recompute='all'"):
        build().set_recompute("all")


def test_drop_path_grows_linearly_from_none_to_the_last_block():
    model = build(size="small", drop_path=0.22)
    rates = [getattr(block.drop_path, "keep", torch.ones(())).item() for block in model.encoder.blocks]
    assert rates == pytest.approx([1 - 0.02 * k for k in range(12)], abs=1e-6)
    assert "keep" not in {name.split(".")[-1] for name in model.state_dict()}


def test_drop_path_keeps_the_mean_and_treats_a_clip_as_a_whole():
    torch.manual_seed(0)
    rate, count = 0.3, 40_000
    layer = DropPath(rate)
    result = layer(torch.ones(count, 2, 3))
    assert torch.equal(result, result[:, :1, :1].expand_as(result))
    kept = 1 / (1 - rate)
    torch.testing.assert_close(result.unique(), torch.tensor([0.0, kept]))
    deviation = math.sqrt(rate / (1 - rate) / count)  # of the mean of count such numbers
    assert abs(result[:, 0, 0].double().mean().item() - 1) < 4 * deviation
    x = torch.randn(4, 2, 3)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("policy", get_args(Recompute))
def test_block_leaves_out_attention_and_mlp_of_a_clip(policy):
    """Each clip's result is one of four, and with 64 clips each of them happens."""
    torch.manual_seed(0)
    block = Block(32, 4, drop_path=0.5).double()
    block.recompute = policy
    x_BND = torch.randn(64, 3, 32, dtype=torch.float64)
    result = block(x_BND)
    with_attention = x_BND + 2 * block.attention(block.norm1(x_BND))
    choices = [y + share * block.mlp(block.norm2(y)) for y in (x_BND, with_attention) for share in (0, 2)]
    differences = torch.stack([(result - choice).abs().amax((1, 2)) for choice in choices])
    assert differences.min(0).values.max() < 1e-12
    assert set(differences.argmin(0).tolist()) == {0, 1, 2, 3}
    without_drop = x_BND + block.attention(block.norm1(x_BND))
    without_drop = without_drop + block.mlp(block.norm2(without_drop))
    torch.testing.assert_close(block.eval()(x_BND), without_drop)


@pytest.mark.parametrize("policy", get_args(Recompute)[1:])
def test_recomputation_changes_no_bit(policy):
    model = randomize(build(drop_path=0.4)).train()

    def gradients():
        torch.manual_seed(5)
        logits = model(video(6))
        return logits, torch.autograd.grad(logits.square().sum(), tuple(model.parameters()))

    kept, expected = gradients()
    model.set_recompute(policy)
    logits, actual = gradients()
    assert torch.equal(logits, kept)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# torch hides this one from its users, though not from a filter that makes errors of warnings.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_blocks_with_different_rates_share_compiled_code():
    """One graph for the block without drop path and one for all the others, not one for each rate."""
    torch._dynamo.reset()
    model = build(size="small", drop_path=0.2).train()
    counter = CompileCounterWithBackend("eager")
    compile_blocks(model, counter)
    model(video(2))
    torch._dynamo.reset()
    assert counter.frame_count == 2


def test_attention_back_end_of_training():
    assert build().attention_backends(CPU, torch.float32) == {"encoder": "sdpa"}
    model = build(attention=AttentionConfig(encoder="sdpa_cudnn"))
    with pytest.raises(
        ValueError, match=r"model\.attention\.encoder='sdpa_cudnn' cannot take 18 tokens of 32 channels"
    ):
        model.attention_backends(CPU, torch.float32)


def test_learning_rates_and_decay_of_a_classifier():
    model = build()
    groups = build_optimizer(model, OptimConfig(layer_decay=0.5, weight_decay=0.1)).param_groups
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        parts = ["tokenizer.", *(f"encoder.blocks.{k}." for k in range(4))]
        layer = next((i for i, part in enumerate(parts) if name.startswith(part)), 5)
        is_free = name.endswith("bias") or "norm" in name
        assert found[id(parameter)] == (0.5 ** (5 - layer), 0.0 if is_free else 0.1), name


def test_positions_of_longer_clips_begin_with_those_of_shorter_ones():
    short, long = build(), build(num_frames=12)
    assert torch.equal(long.positions_ND[:18], short.positions_ND)
    n, j = 53, 77  # the last token, an odd column
    expected = math.cos(n / 10000 ** (2 * (j // 2) / 128))
    assert long.positions_ND[n, j].item() == pytest.approx(expected, abs=1e-6)
    assert "positions_ND" not in long.state_dict()


def write_run(folder, network, model=TINY):
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    save_config(PretrainConfig(model=model), folder / "config.yaml")
    return folder


def test_from_config_takes_any_recipe(tmp_path):
    save_config(PretrainConfig(model=TINY), tmp_path / "recipe.yaml")
    model = VideoClassifier.from_config(
        tmp_path / "recipe.yaml", 7, **{"model.num_frames": 8, "model.attention.encoder": "reference"}
    )
    assert (model.num_classes, model.grid.num_frames, model.grid.patch_size) == (7, 8, 8)
    assert model.encoder.blocks[0].attention.backend == "reference"
    (tmp_path / "other.yaml").write_text("model:\n  size: small\nnum_classes: 9\noptim: {anything: 1}\n")
    assert VideoClassifier.from_config(tmp_path / "other.yaml", 2).config == ModelConfig(size="small")


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("model: {size: tiny}", {}, r"recipe\.yaml: [\s\S]*model\.size[\s\S]*tiny"),
        ("model: {width: 3}", {}, r"recipe\.yaml: .*width"),
        ("model: {frame_size: 30}", {}, r"recipe\.yaml: model\.frame_size=30"),
        ("model: {", {}, r"recipe\.yaml: "),
        ("just words", {}, r"recipe\.yaml: not a recipe"),
        ("{}", {"model.frame_size": "big"}, r"recipe\.yaml: [\s\S]*model\.frame_size[\s\S]*big"),
        ("{}", {"model.sampler.depth": 2}, r"model\.sampler\.depth=2 has no effect"),
        ("{}", {"mask.ratio": 0.5}, r"mask\.ratio=0\.5 has no effect"),
    ],
)
def test_from_config_names_what_is_wrong(tmp_path, text, overrides, words):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        VideoClassifier.from_config(tmp_path / "recipe.yaml", 3, **overrides)


def test_from_pretrained_gives_a_classifier_back(tmp_path):
    model = randomize(build())
    folder = write_run(tmp_path / "run", model)
    again = VideoClassifier.from_pretrained(folder).eval()
    assert torch.equal(again(video()), model.eval()(video()))
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        VideoClassifier.from_pretrained(folder)
    with pytest.raises(ValueError, match="holds no model"):
        VideoClassifier.from_pretrained(tmp_path)


def test_from_pretrained_starts_from_pre_training(tmp_path, caplog):
    torch.manual_seed(4)
    pretrained = AdaMAE(TINY, MaskConfig(ratio=0.5))
    folder = write_run(tmp_path / "run", pretrained)
    with pytest.raises(ValueError, match=r"no classifier; give num_classes"):
        VideoClassifier.from_pretrained(folder)
    with caplog.at_level(logging.INFO, "adamae_fast"):
        model = VideoClassifier.from_pretrained(folder, 3, **{"model.num_frames": 8}).eval()
    # 2 of the tokenizer, 13 of each block
    assert "54 tensors used; missing, so fresh: fc_norm (2), head (2); left over: " in caplog.text
    tokens = pretrained.tokenizer(video(num_frames=8)) + model.positions_ND
    torch.testing.assert_close(model.features(video(num_frames=8)), pretrained.encoder.blocks(tokens))
    assert model(video(num_frames=8)).shape == (2, 3)


def test_from_pretrained_with_as_many_classes_takes_the_head(tmp_path):
    model = randomize(build())
    folder = write_run(tmp_path / "run", model)
    assert torch.equal(VideoClassifier.from_pretrained(folder, 5).head.weight, model.head.weight)
    other = VideoClassifier.from_pretrained(folder, 4)
    assert other.head.weight.abs().max() < 1e-3
    assert torch.equal(other.fc_norm.weight, model.fc_norm.weight)


def test_whole_classifier_that_lacks_something_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", model := build())
    state = model.state_dict()
    del state["fc_norm.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the configured model[\s\S]*fc_norm\.bias"):
        VideoClassifier.from_pretrained(folder)
