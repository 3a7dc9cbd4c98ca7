import pytest
import torch
import torch.nn.functional as F

from adamae_fast import AdaMAE
from adamae_fast.config import (
    AttentionConfig,
    DecoderConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    PretrainConfig,
    SamplerConfig,
    save_config,
)
from adamae_fast.model import block
from adamae_fast.model.positions import sinusoid_table
from adamae_fast.ops.attention import attention

TINY = {"size": "nano", "num_frames": 4, "frame_size": 32, "tubelet_size": 2, "patch_size": 8}  # 32 tokens


def build(mask=None, loss=None, seed=0, **model):
    torch.manual_seed(seed)
    return AdaMAE(ModelConfig(**{**TINY, **model}), MaskConfig(ratio=0.75, **(mask or {})), LossConfig(**(loss or {})))


def video(batch_size=2, frames=4, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch_size, 3, frames, size, size), dtype=torch.uint8, generator=generator)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = AdaMAE(ModelConfig())
    assert count(model) == 102_501_505
    assert count(model.tokenizer, model.encoder) == 86_227_200
    assert count(model.sampler) == 8_290_561
    assert count(model.projection, model.decoder) + model.mask_token.numel() == 7_983_744


@pytest.mark.parametrize("size", ["pico", "small", "base", "large", "huge"])
def test_every_size_builds(size):
    with torch.device("meta"):
        model = AdaMAE(ModelConfig(size=size))
    width = {"pico": 64, "small": 384, "base": 768, "large": 1024, "huge": 1280}[size]
    assert model.tokenizer.weight.shape == (width, 3, 2, 16, 16)
    assert model.decoder.head.weight.shape == (1536, width // 2)


def test_output_shapes_and_total():
    model = build(loss={"sampling_weight": 0.5})
    output = model(video())
    assert output.prediction is None
    assert output.error.shape == output.masked_ids.shape == (2, 24)
    assert output.logits.shape == (2, 32)
    assert output.visible_ids.shape == (2, 8)
    torch.testing.assert_close(output.loss_reconstruction, output.error.mean())
    torch.testing.assert_close(output.loss, output.loss_reconstruction + 0.5 * output.loss_sampling)


@pytest.mark.parametrize("baseline", [0.0, 0.5, 0.9])
def test_the_sampler_rests_where_p_is_the_error_above_the_baseline(baseline):
    """Equation 5 in fp64, and its gradient: p_j · Σw − w_j with w = max(0, r − b · mean r) / M."""
    model, ids = build(loss={"sampling_baseline": baseline}, sampler=SamplerConfig(dropout=0.0)), torch.arange(0, 32, 4)
    output = model(video(), ids.expand(2, -1))
    error_BM = output.error.double()
    taught_BM = torch.stack([(row - baseline * row.mean()).clamp(min=0) for row in error_BM])
    log_p_BM = output.logits.double().log_softmax(1).gather(1, output.masked_ids)
    torch.testing.assert_close(output.loss_sampling.double(), -(taught_BM * log_p_BM).mean(), atol=1e-6, rtol=1e-6)
    (found_BN,) = torch.autograd.grad(output.loss_sampling, output.logits)
    w_BN = torch.zeros_like(found_BN, dtype=torch.float64).scatter(1, output.masked_ids, taught_BM / taught_BM.numel())
    expected_BN = output.logits.double().softmax(1) * w_BN.sum(1, keepdim=True) - w_BN
    torch.testing.assert_close(found_BN.double(), expected_BN, atol=1e-8, rtol=1e-4)


def test_training_and_eval_mode_give_the_same_loss_and_gradients():
    """With the prediction and without it."""
    model, ids = build(sampler=SamplerConfig(dropout=0.0)), torch.arange(0, 32, 4).expand(2, -1)
    outputs = [model.train(mode)(video(), ids) for mode in (True, False)]
    gradients = [torch.autograd.grad(output.loss, tuple(model.parameters())) for output in outputs]
    assert outputs[0].prediction is None
    assert outputs[1].prediction.shape == (2, 24, 384)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(outputs[0].error, outputs[1].error)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_tokenizer_equals_the_strided_convolution():
    model, clip = build(), video()
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (clip.double() / 255 - mean) / std
    expected = F.conv3d(pixels, model.tokenizer.weight.double(), model.tokenizer.bias.double(), stride=(2, 8, 8))
    torch.testing.assert_close(model.tokenizer(clip).double(), expected.flatten(2).mT, atol=1e-5, rtol=1e-5)


def test_positions_are_the_interleaved_sinusoid():
    table = sinusoid_table(7, 6).double()
    for position in range(7):
        for pair in range(3):
            angle = torch.tensor(position / 10000 ** (2 * pair / 6), dtype=torch.float64)
            assert abs(table[position, 2 * pair] - angle.sin()) < 1e-7
            assert abs(table[position, 2 * pair + 1] - angle.cos()) < 1e-7


def test_positions_are_not_in_the_state_dict():
    assert not [key for key in build().state_dict() if key in ("positions_ND", "decoder_positions_NE")]


@pytest.mark.parametrize(("detach", "tokenizer_learns"), [(False, True), (True, False)])
def test_sampling_loss_reaches_sampler_and_tokenizer_only(detach, tokenizer_learns):
    model = build(sampler=SamplerConfig(detach_tokens=detach, dropout=0.0))
    model(video()).loss_sampling.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == ({"sampler", "tokenizer"} if tokenizer_learns else {"sampler"})
    assert model.sampler.positions.grad.any()


def test_reconstruction_loss_reaches_everything_but_the_sampler():
    model = build()
    model(video()).loss_reconstruction.backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached != name.startswith("sampler"), name


@pytest.mark.parametrize("strategy", ["random", "tube", "frame"])
def test_other_strategies_have_no_sampler(strategy):
    model = build(mask={"strategy": strategy})
    output = model(video())
    assert model.sampler is None
    assert output.logits is None
    assert output.loss_sampling == 0
    assert output.loss == output.loss_reconstruction


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(kind="mlp"),
        SamplerConfig(width=64),
        SamplerConfig(width=128),
        SamplerConfig(width=64, depth=2),
    ],
    ids=["mlp", "depth 1, half width", "depth 1, full width", "depth 2, half width"],
)
def test_sampler_variants_of_table_1f(sampler):
    model = build(sampler=sampler)
    output = model(video())
    output.loss.backward()
    assert output.logits.isfinite().all()
    # The head's bias shifts all logits alike, which changes no probability: its gradient is 0 up to rounding.
    gradients = {name: p.grad for name, p in model.sampler.named_parameters()}
    assert gradients.pop("head.bias").abs().max() < 1e-6
    assert all(grad is not None and grad.any() for grad in gradients.values())


def test_mlp_sampler_sees_each_token_alone():
    model, clip = build(sampler=SamplerConfig(kind="mlp")).eval(), video(1)
    changed = clip.clone()
    changed[:, :, :2, :8, :8] = 255 - changed[:, :, :2, :8, :8]  # the first token's pixels
    with torch.no_grad():
        moved = model(clip).logits != model(changed).logits
    assert moved.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("error", ["mse", "l1"])
@pytest.mark.parametrize("target", ["normalized", "raw", "mae_st"])
def test_losses_of_table_1d(error, target):
    output = build(loss={"error": error, "target": target})(video())
    assert output.loss.isfinite()
    assert output.error.min() > 0


@pytest.mark.parametrize("depth", [1, 3])
def test_decoder_depth(depth):
    assert len(build(decoder=DecoderConfig(depth=depth)).decoder.blocks) == depth


@pytest.mark.parametrize(
    ("frames", "size", "tubelet", "patch"), [(2, 32, 2, 16), (6, 24, 3, 8), (8, 40, 1, 8), (4, 16, 4, 4)]
)
def test_any_size_that_divides(frames, size, tubelet, patch):
    model = build(num_frames=frames, frame_size=size, tubelet_size=tubelet, patch_size=patch)
    assert model(video(1, frames, size)).loss.isfinite()
    output = model.eval()(video(1, frames, size))
    assert output.logits.shape[1] == (frames // tubelet) * (size // patch) ** 2
    assert output.prediction.shape[2] == 3 * tubelet * patch**2


def test_forced_ids_are_used_and_repeat_exactly():
    model = build().eval()
    ids = torch.tensor([[0, 5, 31], [2, 3, 4]])
    first, second = model(video(), visible_ids=ids), model(video(), visible_ids=ids)
    assert torch.equal(first.visible_ids, ids)
    assert torch.equal(first.prediction, second.prediction)
    assert first.masked_ids.shape == (2, 29)


def test_prediction_depends_on_visible_pixels_only():
    model = build(mask={"strategy": "random"}).eval()
    ids = torch.tensor([[0, 1, 2, 3]])  # the first row of the first tubelet: its upper 8 pixel rows
    clip = video(1)
    changed = clip.clone()
    changed[:, :, 2:] = 255 - changed[:, :, 2:]
    with torch.no_grad():
        assert torch.equal(model(clip, ids).prediction, model(changed, ids).prediction)
        changed[:, :, 0, 0, 0] ^= 255
        assert not torch.equal(model(clip, ids).prediction, model(changed, ids).prediction)


def test_sampling_is_random_in_eval_mode_and_follows_the_seeds():
    model, clip = build().eval(), video()
    with torch.no_grad():
        draws = [model(clip, seeds=torch.tensor([seed, 5])).visible_ids for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert torch.equal(draws[0][1], draws[2][1])


def test_probabilities_start_away_from_uniform_and_dropout_acts_in_training():
    model, clip = build(), video()
    ids = torch.arange(8).expand(2, -1)
    assert model(clip, ids).logits.std() > 0.01
    assert not torch.equal(model(clip, ids).logits, model(clip, ids).logits)
    model.eval()
    assert torch.equal(model(clip, ids).logits, model(clip, ids).logits)


def test_initial_values():
    model = build()
    for module in (model.encoder, model.decoder, model.sampler):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name
    assert not model.sampler.positions.any()
    assert 0 < model.mask_token.abs().max() <= 0.02
    fan_in, fan_out = 128, 512
    bound = (6 / (fan_in + fan_out)) ** 0.5
    assert 0.99 * bound < model.encoder.blocks[0].mlp.fc1.weight.abs().max() <= bound


def test_epsilons_and_biases_follow_the_published_model():
    model = build()
    assert {m.eps for m in model.sampler.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    for part in (model.encoder, model.decoder):
        assert {m.eps for m in part.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert model.sampler.blocks[0].attention.q_bias is None
    assert model.sampler.blocks[0].attention.num_heads == 8
    assert model.encoder.blocks[0].attention.v_bias is not None
    assert model.projection.bias is None


@pytest.mark.parametrize(
    "clip",
    [video(1, 4, 24), video(1, 6, 32), video(1)[0]],
    ids=["frame size", "frame count", "no batch"],
)
def test_unfitting_video_is_refused_with_both_shapes(clip):
    with pytest.raises(ValueError, match=r"video has shape.*uint8 clips of shape \(B, 3, 4, 32, 32\)"):
        build()(clip)


@pytest.mark.parametrize("wrong", [{"seeds": 3}, {"seeds": [1, 2]}, {"visible_ids": [[0, 1]]}, {"video": [0]}])
def test_what_is_no_tensor_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} is a {type(value).__name__}; pass "):
        build()(**{"video": video(), **wrong})


def test_float_video_is_refused():
    with pytest.raises(ValueError, match=r"dtype torch\.float32; pass uint8"):
        build()(video(1).float())


def test_all_tokens_visible_is_refused():
    with pytest.raises(ValueError, match="visible_ids names all 32 tokens"):
        build()(video(1), torch.arange(32)[None])


def test_one_row_of_ids_for_each_clip():
    with pytest.raises(ValueError, match="visible_ids"):
        build()(video(2), torch.tensor([[0, 1]]))


def test_from_config_builds_what_the_recipe_says(tmp_path):
    save_config(PretrainConfig(model=ModelConfig(**TINY)), tmp_path / "recipe.yaml")
    model = AdaMAE.from_config(tmp_path / "recipe.yaml", **{"mask.ratio": 0.5, "mask.strategy": "tube"})
    assert model.num_visible == 16
    assert model.sampler is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.recompute", "block", r"train\.recompute='block' acts in pre-training .*: call set_recompute\(\)"),
        ("train.compile", True, r"train\.compile=True acts .*compile_blocks\(model\)$"),
        ("model.layer_norm", "apex", r"model\.layer_norm='apex' acts .*use_apex_layer_norm\(model\)$"),
        ("optim.base_lr", 1e-3, r"optim\.base_lr=0\.001 acts in pre-training .*: leave it out$"),
    ],
)
def test_from_config_refuses_what_builds_no_model(key, value, words, tmp_path):
    save_config(PretrainConfig(model=ModelConfig(**TINY)), tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match=words):
        AdaMAE.from_config(tmp_path / "recipe.yaml", **{key: value})


def test_bf16_autocast_stays_close_to_fp32():
    model = build(sampler=SamplerConfig(dropout=0.0))
    ids = torch.arange(0, 32, 4).expand(2, -1)
    exact = model(video(), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(video(), ids)
    rounded.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.02, atol=0)


def test_each_part_computes_attention_with_the_back_end_that_was_asked_for(monkeypatch):
    asked = []

    def record(q, k, v, *, backend):
        asked.append((q.shape[1], q.shape[3], backend))
        return attention(q, k, v, backend=backend)

    monkeypatch.setattr(block, "attention", record)
    model = build(attention=AttentionConfig(encoder="sdpa_flash", sampler="reference", decoder="sdpa"))
    model(video())
    # nano: sampler 128 / 8, encoder 128 / 4 with 4 blocks, decoder 64 / 2 with 2 blocks; 8 of 32 tokens are visible
    assert asked == [(32, 16, "reference"), *[(8, 32, "sdpa_flash")] * 4, *[(32, 32, "sdpa")] * 2]
    asked.clear()
    model.eval()(video())
    assert {backend for *_, backend in asked} == {"auto"}


def test_names_the_back_ends_of_training_or_why_one_cannot_run():
    cpu = torch.device("cpu")
    model = build(attention=AttentionConfig(sampler="reference"))
    assert model.attention_backends(cpu, torch.bfloat16) == {
        "encoder": "sdpa",
        "sampler": "reference",
        "decoder": "sdpa",
    }
    without_sampler = build(mask={"strategy": "tube"})
    assert set(without_sampler.attention_backends(cpu, torch.float32)) == {"encoder", "decoder"}
    with_mlp = build(sampler=SamplerConfig(kind="mlp"))
    assert set(with_mlp.attention_backends(cpu, torch.float32)) == {"encoder", "decoder"}
    model = build(attention=AttentionConfig(decoder="sdpa_efficient"))
    words = (
        r"model\.attention\.decoder='sdpa_efficient' cannot take 32 tokens of 32 channels a head, torch\.float32, cpu: "
        r"sdpa_efficient: it takes CUDA tensors, these are on cpu; choose auto"
    )
    with pytest.raises(ValueError, match=words):
        model.attention_backends(cpu, torch.float32)


def test_a_model_of_a_forced_back_end_still_draws_pictures_where_that_cannot_run():
    model = build(attention=AttentionConfig(decoder="flash_attn_3"))
    assert model.eval()(video()).prediction.isfinite().all()
    with pytest.raises(ValueError, match=r"flash_attn_3: .*CUDA"):
        model.train()(video())
