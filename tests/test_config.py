from pathlib import Path
from typing import get_args

import pytest

from adamae_fast.config import AttentionName, PretrainConfig, load_config, save_config
from adamae_fast.ops.attention_backends import BACKENDS

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_saved_config_reads_back_equal(tmp_path):
    config = load_config(RECIPES[0], {"mask.ratio": 0.8, "model.sampler.width": 64, "optim.clip_grad_norm": 1.5})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe):
    assert isinstance(load_config(recipe), PretrainConfig)


@pytest.mark.parametrize(("name", "stride", "flip"), [("ssv2", 2, False), ("k400", 4, True)])
def test_recipes_of_table_5(name, stride, flip):
    config = load_config(next(path for path in RECIPES if path.stem == f"pretrain_{name}_vitb"))
    assert config.optim.betas == (0.9, 0.95)
    assert (config.optim.base_lr, config.optim.weight_decay, config.optim.warmup_epochs) == (1.5e-4, 0.05, 40)
    assert (config.data.flip, config.data.crop, config.data.stride) == (flip, "multi_scale", stride)
    assert (config.model.size, config.mask.strategy, config.mask.ratio) == ("base", "adaptive", 0.95)
    assert (config.train.epochs, config.loss.sampling_weight) == (800, 1e-4)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mask.ratio", 1.0, r"mask\.ratio=1\.0.*between 0 and 1"),
        ("mask.strategy", "blocks", "mask.strategy"),
        ("model.frame_size", 30, r"model\.frame_size=30.*patch_size"),
        ("model.num_frames", 15, r"model\.num_frames=15.*tubelet_size"),
        ("model.sampler.width", 12, r"model\.sampler\.width=12.*multiple of 8"),
        ("data.repeat", 3, r"data\.repeat=3.*train\.batch_size"),
        ("checkpoint.keep", 1, r"checkpoint\.keep=1"),
        ("optim.warmup_epochs", 1e9, r"optim\.warmup_epochs=1000000000\.0.*train\.epochs"),
        ("train.steps", "ten", "train.steps"),
        ("model.decoder.keep_ratio", 0.0, r"model\.decoder\.keep_ratio=0\.0.*\(0, 1\]"),
        ("mask.ratoi", 0.9, "mask.ratoi"),
        ("model.attention.decoder", "flash", r"(?s)model\.attention\.decoder.*sdpa_cudnn"),
    ],
)
def test_bad_values_name_key_and_remedy(key, value, words):
    with pytest.raises(ValueError, match=words):
        load_config(RECIPES[0], {key: value})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.cuda_graph": True, "train.accumulate": 2}, r"train\.accumulate=2: .*cuda_graph.* one batch; choose 1"),
        ({"train.cuda_graph": True, "train.precision": "fp16"}, r"train\.precision='fp16': .*cuda_graph.*loss scaler"),
        ({"train.cuda_graph": True, "train.device": "cpu"}, r"train\.device='cpu': .*cuda_graph.*choose cuda"),
        (
            {"optim.implementation": "apex", "train.precision": "fp16"},
            r"optim\.implementation='apex': .*fp16.*once more",
        ),
        (
            {"model.layer_norm": "apex", "train.recompute": "fc1"},
            r"model\.layer_norm='apex': train\.recompute=fc1 .*again",
        ),
        (
            {"model.layer_norm": "apex", "train.compile": True},
            r"model\.layer_norm='apex': .*train\.compile.*cannot look",
        ),
    ],
)
def test_what_cannot_work_together_is_refused_with_a_reason(overrides, words):
    with pytest.raises(ValueError, match=words):
        load_config(RECIPES[0], overrides)


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_attention_names_are_the_back_ends():
    assert get_args(AttentionName) == ("auto", *BACKENDS)


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        ({}, 0),
        ({"model.attention.sampler": "sdpa"}, 0),
        ({"model.attention.sampler": "sdpa", "model.sampler.kind": "mlp"}, 1),
        ({"model.attention.sampler": "sdpa", "mask.strategy": "tube"}, 1),
        ({"model.attention.decoder": "sdpa", "mask.strategy": "tube"}, 0),
    ],
)
def test_attention_of_a_part_that_has_none_is_told(overrides, messages):
    told = load_config(RECIPES[0], overrides).without_effect()
    assert [message.startswith("model.attention.sampler has no effect: m") for message in told] == [True] * messages
