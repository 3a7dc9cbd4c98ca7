from pathlib import Path
from typing import get_args

import pytest

from adamae_fast.config import AttentionName, PretrainConfig, load_config, load_run_config, save_config
from adamae_fast.config_finetune import (
    AugmentConfig,
    EvaluateConfig,
    EvaluateDataConfig,
    EvaluateViewsConfig,
    FinetuneConfig,
)
from adamae_fast.ops.attention_backends import BACKENDS

CONFIGS = Path(__file__).parents[1] / "configs"
FINETUNE_RECIPES = sorted(CONFIGS.glob("finetune_*.yaml"))
RECIPES = sorted(set(CONFIGS.glob("*.yaml")) - set(FINETUNE_RECIPES))


def test_saved_config_reads_back_equal(tmp_path):
    config = load_config(RECIPES[0], {"mask.ratio": 0.8, "model.sampler.width": 64, "optim.clip_grad_norm": 1.5})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe):
    assert isinstance(load_config(recipe), PretrainConfig)


@pytest.mark.parametrize("recipe", FINETUNE_RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_fine_tuning_is_valid_and_wholly_used(recipe, tmp_path):
    config = load_run_config(recipe, FinetuneConfig)
    assert config.without_effect() == []
    save_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml", FinetuneConfig) == config


@pytest.mark.parametrize(
    ("name", "base_lr", "epochs", "flip", "sampling", "views"),
    [("ssv2", 5e-4, 50, False, "segments", (2, 3)), ("k400", 1e-3, 100, True, "dense", (5, 3))],
)
def test_recipes_of_table_6(name, base_lr, epochs, flip, sampling, views):
    config = load_run_config(CONFIGS / f"finetune_{name}_vitb.yaml", FinetuneConfig)
    assert (config.optim.base_lr, config.optim.layer_decay, config.optim.betas) == (base_lr, 0.75, (0.9, 0.999))
    assert (config.optim.weight_decay, config.optim.warmup_epochs, config.train.epochs) == (0.05, 5, epochs)
    assert (config.data.flip, config.data.sampling, config.data.stride) == (flip, sampling, 4)
    assert (config.views.temporal, config.views.spatial) == views
    assert config.augment == AugmentConfig(
        layers=4, magnitude=7, erase=0.25, mixup=0.8, cutmix=1.0, switch=0.5, label_smoothing=0.1
    )
    assert (config.classifier.drop_path, config.model.size) == (0.1, "base")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data.repeat": 3}, r"data\.repeat=3: choose a divisor of train\.batch_size=16"),
        ({"train.ema_decay": 1.0}, r"train\.ema_decay=1\.0: .*between 0 and 1"),
        ({"classifier.drop_path": 1.0}, r"classifier\.drop_path=1\.0: .*\[0, 1\)"),
        ({"classifier.num_classes": 0}, r"classifier\.num_classes=0: choose at least 1"),
        ({"mask.ratio": 0.9}, "mask"),
    ],
)
def test_bad_values_of_fine_tuning(overrides, words):
    with pytest.raises(ValueError, match=words):
        load_run_config(CONFIGS / "finetune_k400_vitb.yaml", FinetuneConfig, overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"data.sampling": "segments"}, []),
        ({"data.sampling": "segments", "data.stride": 2}, ["data.stride"]),
        ({"resume": "runs/other"}, ["init"]),
        ({"model.decoder.depth": 2, "model.attention.sampler": "sdpa"}, ["model.decoder", "model.attention.sampler"]),
        ({"augment.layers": 0, "augment.magnitude": 9}, ["augment.magnitude"]),
        ({"augment.mixup": 0, "augment.switch": 1.0}, ["augment.switch"]),
        ({"train.batch_size": 1, "data.repeat": 1}, ["augment.mixup and augment.cutmix"]),
    ],
)
def test_what_has_no_effect_on_fine_tuning_is_told(overrides, told):
    messages = load_run_config(CONFIGS / "finetune_k400_vitb.yaml", FinetuneConfig, overrides).without_effect()
    assert [message.split(" has no")[0].split(" have no")[0] for message in messages] == told


def test_evaluation_takes_what_it_is_not_told_from_the_run():
    trained = load_run_config(CONFIGS / "finetune_ssv2_vitb.yaml", FinetuneConfig, {"val.root": "videos"})
    config = EvaluateConfig().applied_to(trained)
    assert (config.data.manifest, config.data.root) == ("data/ssv2_val_prepared", "videos")
    assert (config.data.sampling, config.views, config.train) == ("segments", trained.views, trained.train)
    options = EvaluateConfig(
        data=EvaluateDataConfig(manifest="test.csv", stride=2), views=EvaluateViewsConfig(spatial=1), batch_size=3
    )
    config = options.applied_to(trained)
    assert (config.data.manifest, config.data.root, config.data.stride) == ("test.csv", None, 2)
    assert (config.views.temporal, config.views.spatial, config.train.batch_size) == (2, 1, 3)


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
        ("loss.sampling_baseline", 1.0, r"loss\.sampling_baseline=1\.0: choose 0 \(the paper's\) or a share below 1"),
        ("optim.sampler_lr_scale", 0.0, r"optim\.sampler_lr_scale=0\.0: choose a positive factor"),
        ("data.cache_gib", -1.0, r"data\.cache_gib=-1\.0: choose 0"),
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
