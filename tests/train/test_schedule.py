import math

import numpy as np
import pytest

from adamae_fast.config import DataConfig, OptimConfig, PretrainConfig, TrainConfig
from adamae_fast.config_finetune import FinetuneConfig
from adamae_fast.train.schedule import Schedule


def schedule(num_videos=1000, *, data=None, optim=None, **train):
    config = PretrainConfig(
        data=DataConfig(**(data or {})), optim=OptimConfig(**(optim or {})), train=TrainConfig(**train)
    )
    return Schedule.from_config(config, num_videos)


def test_published_run_on_kinetics():
    # 64 GPUs × 32 clips are here 64 forward passes of 32: lr = 1.5e-4 · 2048 / 256.
    plan = schedule(240_000, batch_size=32, accumulate=64)
    assert plan.total_batch == 2048
    assert plan.peak_lr == pytest.approx(1.2e-3)
    assert plan.min_lr == pytest.approx(8e-5)
    assert plan.total_steps == math.ceil(800 * 240_000 / 2048)
    assert plan.warmup_steps == round(40 * 240_000 / 2048)


def test_table_equals_linspace_then_half_cosine():
    plan = schedule(100, batch_size=10, epochs=20, optim={"warmup_epochs": 4})
    warm, total = plan.warmup_steps, plan.total_steps
    assert (warm, total) == (40, 200)
    ramp = np.linspace(0, plan.peak_lr, warm)
    cosine = plan.min_lr + 0.5 * (plan.peak_lr - plan.min_lr) * (
        1 + np.cos(np.pi * np.arange(total - warm) / (total - warm))
    )
    expected = np.concatenate((ramp, cosine))
    np.testing.assert_allclose([plan.learning_rate(s) for s in range(total)], expected, rtol=1e-12)


@pytest.mark.parametrize("num_videos", [1, 7, 100, 101, 255])
def test_every_step_has_a_rate_for_any_number_of_videos(num_videos):
    plan = schedule(num_videos, batch_size=8, epochs=3, optim={"warmup_epochs": 1})
    rates = [plan.learning_rate(step) for step in range(plan.total_steps)]
    assert len(rates) == math.ceil(3 * num_videos / 8)
    assert all(0 <= rate <= plan.peak_lr for rate in rates)


def test_steps_replace_epochs_and_warmup_keeps_its_share():
    plan = schedule(100_000, steps=100)
    assert (plan.total_steps, plan.warmup_steps) == (100, 5)


def test_repeated_crops_count_in_the_batch_and_shorten_the_epoch():
    plan = schedule(100, batch_size=20, epochs=10, data={"repeat": 4}, optim={"warmup_epochs": 1})
    assert plan.total_batch == 20
    assert plan.steps_per_epoch == 20  # 100 videos × 4 crops / 20 clips


@pytest.mark.parametrize(("num_videos", "batch_size", "repeat"), [(10, 4, 1), (7, 4, 2), (3, 16, 1), (12, 4, 1)])
def test_an_epoch_ends_with_the_step_that_completes_it(num_videos, batch_size, repeat):
    epochs = 5
    plan = schedule(
        num_videos, batch_size=batch_size, epochs=epochs, data={"repeat": repeat}, optim={"warmup_epochs": 0}
    )
    clips = num_videos * repeat
    expected = {math.ceil(epoch * clips / batch_size) for epoch in range(1, epochs + 1)}
    assert {step for step in range(plan.total_steps + 1) if plan.ends_epoch(step)} == expected


def test_the_last_step_ends_an_epoch_that_is_not_complete():
    plan = schedule(10, batch_size=4, steps=4)
    assert [step for step in range(5) if plan.ends_epoch(step)] == [3, 4]


def test_fine_tuning_has_its_own_rates():
    plan = Schedule.from_config(FinetuneConfig(), 1600)
    assert (plan.total_batch, plan.total_steps, plan.warmup_steps) == (16, 10_000, 500)
    rates = [plan.learning_rate(step) for step in (0, 499, 500, 5250)]
    peak, low = 1e-3 * 16 / 256, 1e-6 * 16 / 256
    assert rates == pytest.approx([0, peak, peak, (peak + low) / 2])
