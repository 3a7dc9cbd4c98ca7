import pytest

from adamae_fast import AdaMAE
from adamae_fast.config import ModelConfig, OptimConfig
from adamae_fast.config_finetune import FinetuneOptimConfig
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.train.optim import build_optimizer, layer_scale, set_learning_rate


@pytest.fixture(scope="module")
def model():
    return AdaMAE(ModelConfig(size="nano", num_frames=4, frame_size=64))


def by_parameter(optimizer, key):
    return {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}


def test_what_is_decayed(model):
    decay_of = by_parameter(build_optimizer(model, OptimConfig(weight_decay=0.05)), "weight_decay")
    names = dict(model.named_parameters())
    assert len(decay_of) == len(names)
    for name, parameter in names.items():
        is_free = name.endswith("bias") or "norm" in name or name == "mask_token"
        assert decay_of[id(parameter)] == (0.0 if is_free else 0.05), name
    assert decay_of[id(names["sampler.positions"])] == 0.05


def test_betas_and_one_rate_by_default(model):
    optimizer = build_optimizer(model, OptimConfig())
    set_learning_rate(optimizer, 0.25)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {float(group["lr"]) for group in optimizer.param_groups} == {0.25}


def test_layer_decay_shrinks_the_rate_towards_the_input(model):
    optimizer = build_optimizer(model, OptimConfig(layer_decay=0.75))
    set_learning_rate(optimizer, 2.0)
    rate_of = by_parameter(optimizer, "lr")
    # Walk back from the output: each of nano's 4 blocks costs one more factor, the tokenizer comes last.
    expected, rate = {}, 2.0
    for part in ("encoder.blocks.3.", "encoder.blocks.2.", "encoder.blocks.1.", "encoder.blocks.0.", "tokenizer."):
        rate *= 0.75
        expected[part] = rate
    for name, parameter in model.named_parameters():
        wanted = next((rate for part, rate in expected.items() if name.startswith(part)), 2.0)
        assert float(rate_of[id(parameter)]) == pytest.approx(wanted, rel=1e-7), name


def test_the_sampler_has_a_rate_of_its_own(model):
    optimizer = build_optimizer(model, OptimConfig(layer_decay=0.75, sampler_lr_scale=3.0))
    scale_of = by_parameter(optimizer, "lr_scale")
    for name, parameter in model.named_parameters():
        if name.startswith("sampler."):
            assert scale_of[id(parameter)] == 3.0, name
        else:
            assert scale_of[id(parameter)] == layer_scale(name, 4, 0.75), name


def test_scales_of_a_vit_b():
    names = ["tokenizer.weight", *(f"encoder.blocks.{k}.norm1.bias" for k in range(12)), "encoder.norm.weight"]
    assert [layer_scale(name, 12, 0.75) for name in names] == pytest.approx([0.75 ** (13 - i) for i in range(14)])


def test_layer_decay_of_a_classifier():
    """Walked back from the head, which, like fc_norm, keeps the whole rate."""
    classifier = VideoClassifier(ModelConfig(size="nano", num_frames=4, frame_size=64), num_classes=3)
    scale_of = by_parameter(build_optimizer(classifier, FinetuneOptimConfig()), "lr_scale")
    scales = {"head": 1.0, "fc_norm": 1.0}
    scales |= {f"encoder.blocks.{k}": 0.75 ** (4 - k) for k in range(4)}
    scales["tokenizer"] = 0.75**5
    for name, parameter in classifier.named_parameters():
        (scale,) = [scale for part, scale in scales.items() if name.startswith(f"{part}.")]
        assert scale_of[id(parameter)] == pytest.approx(scale, rel=1e-12), name
