"""The model of a step's time against hand arithmetic, against its figures on paper, and as a function."""

import dataclasses
import math

import pytest

from adamae_fast.config import DecoderConfig, MaskConfig, ModelConfig, SamplerConfig
from adamae_fast.plan import hardware, network, work
from adamae_fast.plan.hardware import CAUTIOUS, GPUS

BASE = work.sizes_of(ModelConfig(), MaskConfig())
PARAMETERS = 102_501_505


def step_ms(gpu, batch_size, **options):
    parts = hardware.pass_parts(GPUS[gpu], BASE, batch_size, **options)
    assumptions = {"assumptions": options["assumptions"]} if "assumptions" in options else {}
    return 1e3 * (sum(parts.values()) + hardware.update_seconds(GPUS[gpu], PARAMETERS, **assumptions))


# From the roofline that the project was designed with, before there was code.
@pytest.mark.parametrize(
    ("gpu", "expected"), {"a100": (27.1, 51.5, 99.0), "h100": (10.9, 20.3, 39.2), "h200": (9.6, 18.0, 34.9)}.items()
)
def test_steps_of_the_papers_model_are_those_of_the_design(gpu, expected):
    assert [step_ms(gpu, batch) for batch in (16, 32, 64)] == pytest.approx(expected, abs=0.05)


def test_parts_are_those_of_the_design():
    parts = {name: 1e3 * seconds for name, seconds in hardware.pass_parts(GPUS["h100"], BASE, 16).items()}
    expected = {"tokenizer": 0.20, "head": 0.15, "linear layers": 1.71 + 1.21 + 1.82, "attention": 3.30}
    expected |= {"again": 0.0, "elementwise": 1.39, "clips": 0.10}
    assert parts == pytest.approx(expected, abs=0.01)
    assert 1e3 * hardware.update_seconds(GPUS["h100"], PARAMETERS) == pytest.approx(1.03, abs=0.005)


def test_a_product_by_hand():
    gpu = dataclasses.replace(GPUS["h100"], product=1e12, copy=1e15, multiprocessors=4)
    # 256 × 512: four tiles of 256 × 128 are one whole wave, nothing is padded.
    assert hardware.product_seconds(gpu, 256, 100, 512) == pytest.approx(2 * 256 * 100 * 512 / 1e12)
    # One row more: 8 tiles of 256 × 128, two waves, half of them padding; 12 of 128 × 128, three whole waves.
    best = max(257 / 512, 0.92 * 257 / 384, 0.75 * 257 / 384, 0.55 * 257 / 320)
    assert hardware.product_seconds(gpu, 257, 100, 512) == pytest.approx(2 * 257 * 100 * 512 / 1e12 / best)
    slow_memory = dataclasses.replace(gpu, copy=1e6)
    expected = 2 * (256 * 100 + 100 * 512 + 256 * 512) / 1e6
    assert hardware.product_seconds(slow_memory, 256, 100, 512) == pytest.approx(expected)


def test_no_product_is_faster_than_its_operations():
    for m, k, n in ((1, 768, 768), (1248, 768, 3072), (25088, 384, 1536), (100_000, 768, 768)):
        for gpu in GPUS.values():
            assert hardware.product_seconds(gpu, m, k, n) >= 2 * m * k * n / gpu.product


@pytest.mark.parametrize("gpu", GPUS)
def test_a_step_stays_below_the_peak_and_takes_longer_with_more_to_do(gpu):
    flops = work.step_flops(ModelConfig(), MaskConfig())
    assert 32 * flops / (1e-3 * step_ms(gpu, 32)) < GPUS[gpu].peak
    assert step_ms(gpu, 16) < step_ms(gpu, 32) < step_ms(gpu, 64)
    assert step_ms(gpu, 32) < step_ms(gpu, 32, assumptions=CAUTIOUS)
    assert step_ms(gpu, 32) == step_ms(gpu, 32, recompute="pointwise") < step_ms(gpu, 32, recompute="fc1")
    assert step_ms(gpu, 32, recompute="fc1") < step_ms(gpu, 32, recompute="block")


def test_every_part_of_the_model_counts():
    def seconds(model=None, mask=None):
        sizes = work.sizes_of(model or ModelConfig(), mask or MaskConfig())
        return sum(hardware.pass_parts(GPUS["h100"], sizes, 16).values())

    usual = seconds()
    assert seconds(mask=MaskConfig(strategy="tube", ratio=0.9)) < usual  # no sampler
    assert seconds(ModelConfig(decoder=DecoderConfig(keep_ratio=0.5))) < usual
    assert seconds(ModelConfig(decoder=DecoderConfig(depth=8))) > usual
    assert seconds(ModelConfig(sampler=SamplerConfig(kind="mlp"))) < usual
    assert seconds(ModelConfig(sampler=SamplerConfig(width=384))) < usual
    assert seconds(mask=MaskConfig(ratio=0.8)) > usual
    assert seconds(ModelConfig(size="large")) > 1.5 * usual


def test_devices_are_known_by_their_names():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H200": "h200", "Tesla T4": None}
    assert {name: hardware.gpu_named(name) for name in names} == names


def test_gradients_of_ddp_by_hand():
    traffic = network.ddp_traffic(64, 4 * PARAMETERS, rate=320e9, pass_seconds=0.0193)
    assert traffic.sent_bytes == pytest.approx(2 * 63 / 64 * 4 * 102_501_505)
    assert traffic.seconds == pytest.approx(0.807199e9 / 320e9, rel=1e-4)
    assert traffic.exposed_seconds == pytest.approx(2 * 63 / 64 * 25 * 2**20 / 320e9)  # the last bucket
    slow = network.ddp_traffic(64, 4 * PARAMETERS, rate=1e9, pass_seconds=0.0193)
    assert slow.exposed_seconds == pytest.approx(0.807199 - 2 / 3 * 0.0193, rel=1e-4)
    alone = network.ddp_traffic(1, 4 * PARAMETERS, rate=320e9, pass_seconds=0.0193)
    assert (alone.sent_bytes, alone.seconds, alone.exposed_seconds) == (0, 0, 0)


def test_a_ring_is_as_fast_as_its_slowest_link():
    a100 = GPUS["a100"]
    assert network.ring_rate(a100, 1, None) == a100.link
    assert network.ring_rate(a100, 2, None) == a100.network == 0.8 * 200e9
    assert network.ring_rate(a100, 2, 100) == 0.8 * 12.5e9
    assert network.ring_rate(a100, 2, 1e6) == a100.link
    assert network.ring_rate(a100, 1, 100) == a100.link
    assert all(math.isfinite(x) for gpu in GPUS.values() for x in dataclasses.astuple(gpu))
