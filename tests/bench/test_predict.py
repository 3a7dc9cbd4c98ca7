"""Predictions of bytes and arithmetic against saved-tensor accounting and a count of the operations that ran."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adamae_fast.config import DecoderConfig, MaskConfig, ModelConfig, SamplerConfig
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.plan import work
from bench import arms, predict, saved
from bench.models import Tuned

CPU = torch.device("cpu")
NANO = ModelConfig(size="nano", num_frames=4, frame_size=64)
CASES = {
    "default": (NANO, MaskConfig(ratio=0.8)),
    "deep decoder, other ratio": (dataclasses.replace(NANO, decoder=DecoderConfig(depth=3)), MaskConfig(ratio=0.6)),
    "two narrow blocks": (dataclasses.replace(NANO, sampler=SamplerConfig(width=64, depth=2)), MaskConfig(ratio=0.9)),
    "mlp": (dataclasses.replace(NANO, sampler=SamplerConfig(kind="mlp")), MaskConfig(ratio=0.8)),
    "tube": (NANO, MaskConfig(strategy="tube", ratio=0.75)),
    "half of the masked tokens": (
        dataclasses.replace(NANO, decoder=DecoderConfig(keep_ratio=0.5)),
        MaskConfig(ratio=0.8),
    ),
    "frame": (NANO, MaskConfig(strategy="frame", ratio=0.5)),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
@pytest.mark.parametrize("recompute", work.BLOCK_ELEMENTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_bytes_are_those_that_hooks_count(case: str, recompute: str, precision: str) -> None:
    model_config, mask = CASES[case]
    model = AdaMAE(model_config, mask).train()
    model.set_recompute(recompute)
    video = saved.draw_video(model, 3)
    counted = saved.saved_bytes(model, lambda: saved.forward(model, video, precision))
    counted.pop(saved.CASTS, None)
    predicted = work.kept_bytes(model_config, mask, recompute, precision)
    once = work.kept_bytes_once(model_config, mask)
    assert counted.total() == 3 * predicted.total() + once
    if model.sampler is not None:  # without one, nothing tells where its part begins
        assert counted["encoder"] == 3 * predicted["encoder"]


@every_case
def test_kept_bytes_of_the_published_code(case: str) -> None:
    model_config, mask = CASES[case]
    setting = arms.Setting(model=model_config, mask=mask, batch_size=2, device=CPU)
    arm = arms.builders(setting, arms.plan_for(CPU, None))[0]["published-like-fp32"]()
    counted = saved.saved_bytes(arm.model, arm.keep).total() / 2
    assert counted == pytest.approx(predict.kept_bytes_published(model_config, mask), rel=1e-3)


@pytest.mark.parametrize("case", [name for name, (model, _) in CASES.items() if model.decoder.keep_ratio == 1])
def test_arithmetic_is_what_torch_counts(case: str) -> None:
    model_config, mask = CASES[case]
    network = Tuned(model_config, mask)
    video = torch.randint(0, 256, (1, 3, 4, 64, 64), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(video).backward()
    assert counter.get_total_flops() == pytest.approx(work.step_flops(model_config, mask), rel=1e-9)


def test_the_papers_model() -> None:
    assert work.step_flops(ModelConfig(), MaskConfig()) == pytest.approx(254.39e9, rel=1e-4)
    assert work.num_parameters(ModelConfig(), MaskConfig()) == 102_501_505
    half = ModelConfig(decoder=DecoderConfig(keep_ratio=0.5))
    assert work.step_flops(half, MaskConfig()) == pytest.approx(3 * 63.7e9 - 3.7e9, rel=1e-3)
