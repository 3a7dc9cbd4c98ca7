import math

import pytest
import torch

from adamae_fast.config import LossConfig, MaskConfig, ModelConfig, OptimConfig, PretrainConfig, SamplerConfig
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.sampler_alarms import ADAM_EPS, sampler_alarms
from adamae_fast.train.optim import build_optimizer


def config_of(*, kind="attention", strategy="adaptive", sampling_weight=1e-4, clip=None, ratio=0.8):
    return PretrainConfig(
        model=ModelConfig(size="nano", num_frames=4, frame_size=64, sampler=SamplerConfig(kind=kind)),  # 32 tokens
        mask=MaskConfig(ratio=ratio, strategy=strategy),
        loss=LossConfig(sampling_weight=sampling_weight),
        optim=OptimConfig(clip_grad_norm=clip),
    )


def model_of(config):
    return AdaMAE(config.model, config.mask, config.loss)


GOOD = {"probability_entropy": 2.0, "clamped_share": 0.5, "sampler_grad_norm": 0.1, "grad_norm": 1.0}


def alarms(*changes, **options):
    """Name and step of each alarm, where every tenth step is logged with these changes of a healthy line."""
    config = config_of(**options)
    lines = [{"step": 10 * number, **GOOD, **change} for number, change in enumerate(changes, start=1)]
    return [(alarm.name, alarm.step) for alarm in sampler_alarms(lines, config, model_of(config))]


def vanishing_norm(config):
    """The norm at which each parameter of the sampler has a gradient of a tenth of AdamW's eps."""
    return 1e-9 * math.sqrt(sum(p.numel() for p in model_of(config).sampler.parameters()))


COLLAPSED = {"probability_entropy": math.log(5.99)}  # of 32 tokens 6 are drawn
CLAMPED = {"clamped_share": 0.51}
VANISHING = {"sampler_grad_norm": 0.99 * vanishing_norm(config_of())}


@pytest.mark.parametrize(("name", "bad"), [("collapsed", COLLAPSED), ("clamped", CLAMPED), ("vanishing", VANISHING)])
def test_three_reports_in_a_row_are_one_alarm(name, bad):
    assert alarms({}, bad, bad, bad, bad, {}, bad, bad, bad) == [(name, 40)]
    assert alarms(bad, bad, {}, bad, bad) == []
    (key,) = bad
    assert alarms(bad, bad, {key: None}, bad, bad) == []
    assert alarms(bad, bad, {key: float("inf")}, bad, bad) == []


def test_values_at_their_limits_are_no_alarm():
    at_limit = {"probability_entropy": math.log(6) + 1e-9, "sampler_grad_norm": 1.01 * vanishing_norm(config_of())}
    assert alarms(*[at_limit] * 5) == []


def test_many_visible_tokens_are_not_few_probable_ones():
    """Of 32 tokens 28 are drawn, which are more than any p but an even one lies on."""
    assert alarms(*[{"probability_entropy": math.log(8) + 1e-9}] * 3, ratio=0.1) == []
    assert alarms(*[{"probability_entropy": math.log(7.99)}] * 3, ratio=0.1) == [("collapsed", 30)]


def test_of_one_visible_token_a_sampler_can_collapse_too():
    assert alarms(*[{"probability_entropy": math.log(1.49)}] * 3, ratio=0.96) == [("collapsed", 30)]
    assert alarms(*[{"probability_entropy": math.log(1.51)}] * 3, ratio=0.96) == []


def test_alarms_come_in_the_order_of_their_steps():
    both = COLLAPSED | CLAMPED
    assert alarms(VANISHING | CLAMPED, VANISHING | both, VANISHING | both, COLLAPSED) == [
        ("clamped", 30),
        ("vanishing", 30),
        ("collapsed", 40),
    ]


def test_adamw_gets_the_clipped_gradient():
    norm = {"sampler_grad_norm": 5 * vanishing_norm(config_of()), "grad_norm": 1.0}
    assert alarms(*[norm] * 3, clip=0.1) == [("vanishing", 30)]
    assert alarms(*[norm] * 3, clip=0.5) == []
    assert alarms(*[norm | {"grad_norm": 0.05}] * 3, clip=0.1) == []


def test_there_is_none_without_a_sampler_that_is_to_learn():
    bad = COLLAPSED | CLAMPED | VANISHING
    assert alarms(*[bad] * 3, sampling_weight=0.0) == []
    assert alarms(*[bad] * 3, strategy="tube") == []
    assert alarms(*[{"loss": 1.0}] * 3, *[dict.fromkeys(GOOD)] * 3) == []


def test_lines_of_runs_before_these_figures_are_no_alarm():
    config = config_of()
    lines = [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in range(5)]
    assert sampler_alarms(lines, config, model_of(config)) == []


def test_messages_name_figure_value_and_knob():
    def messages(line, **options):
        config = config_of(**options)
        found = sampler_alarms([{"step": 1, **GOOD, **line}] * 3, config, model_of(config))
        return " ".join(alarm.message for alarm in found)

    collapsed = messages(COLLAPSED)
    assert "exp(probability_entropy)=5.99" in collapsed
    assert "is below 6 (the visible tokens of a clip, or a quarter of all)" in collapsed
    assert "lower optim.sampler_lr_scale=1 or raise model.sampler.dropout=0.1" in collapsed
    assert "clamped_share=0.51 of the masked tokens" in messages(CLAMPED)
    assert "dropout" not in messages(CLAMPED, kind="mlp")
    assert messages({"sampler_grad_norm": 0.0}).endswith("more than tenfold; raise loss.sampling_weight=0.0001")
    clipped = messages({"sampler_grad_norm": 1e-12}, clip=0.25)
    assert "sampler_grad_norm=1e-12" in clipped
    assert clipped.endswith("raise loss.sampling_weight=0.0001 or optim.clip_grad_norm=0.25")


def test_eps_is_the_optimizers():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimConfig())
    assert {group["eps"] for group in optimizer.param_groups} == {ADAM_EPS}
