"""A set-up of many processes without them: what each keeps, what each sees, and what the plan says of both."""

import dataclasses
import json

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from adamae_fast.cli import main
from adamae_fast.config import DataConfig, MaskConfig, ModelConfig, PretrainConfig, TrainConfig
from adamae_fast.config_distributed import DistributedConfig
from adamae_fast.model.block import Block
from adamae_fast.plan import dry_run, network, shares
from adamae_fast.plan.calibration import calibration
from adamae_fast.plan.hardware import GPUS
from adamae_fast.plan.options import PlanOptions
from adamae_fast.plan.planner import make_plan
from adamae_fast.plan.shares import Parameters, share_of, state_bytes
from adamae_fast.train.compile import compile_blocks

NANO = ModelConfig(size="nano", num_frames=4, frame_size=64)


def recipe(mode="fsdp2", model=NANO, **train):
    return PretrainConfig(
        model=model,
        mask=MaskConfig(ratio=0.8),
        train=TrainConfig(**{"batch_size": 4, **train}),
        distributed=DistributedConfig(mode=mode),
    )


@pytest.mark.parametrize("rank", [0, 63])
def test_a_share_of_64_is_what_the_plan_says(rank):
    config = recipe(accumulate=3)
    found = dry_run.rehearse(config, rank, 64)
    share = share_of(Parameters.of(config).shapes, 64, rank)
    assert (found.weights, found.gradients, found.moments) == (4 * share, 4 * share, 8 * share)
    assert found.total == state_bytes(config, Parameters.of(config), 64, rank)
    assert not dist.is_initialized()


def test_replicas_keep_everything():
    config = recipe("ddp", accumulate=2, recompute="fc1")
    total = Parameters.of(config).total
    found = dry_run.rehearse(config, 5, 64)
    assert (found.weights, found.gradients, found.moments) == (4 * total, 4 * total, 8 * total)
    assert found.total == state_bytes(config, Parameters.of(config), 64, 5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_blocks_that_recompute_are_compiled_before_they_are_shared(mode, monkeypatch):
    """A back end that only traces sees a graph of each kind of block, and nothing else is kept."""
    plain = dry_run.rehearse(recipe(mode), 0, 64)
    traced = []

    def keep(graph, inputs):
        traced.append(graph)
        return graph.forward

    def compile_and_look(model, backend):
        assert backend == "eager"
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert {module.recompute for module in model.modules() if isinstance(module, Block)} == {"block"}
        compile_blocks(model, keep)

    monkeypatch.setattr(dry_run, "compile_blocks", compile_and_look)
    found = dry_run.rehearse(recipe(mode, recompute="block", compile=True), 0, 64)
    assert found == dataclasses.replace(plain, modelled_peak=found.modelled_peak)
    assert len(traced) >= 3  # encoder, sampler, decoder


def test_the_peak_beside_what_is_counted_is_the_plan_s():
    options = PlanOptions(gpu="h100", num_gpus=64, dataset="k400")
    config = recipe()
    first, last = (dry_run.rehearse(config, rank, 64) for rank in (0, 63))
    figure = make_plan(config, options, calibration()).figures["memory_bytes"]
    assert figure.basis == "modelled"
    assert first.modelled_peak == pytest.approx(1e9 * figure.value)
    assert first.modelled_peak - last.modelled_peak == pytest.approx(first.total - last.total)


def test_words_say_what_is_set_up():
    told = dry_run.describe(recipe(recompute="fc1", compile=True, accumulate=3), [0, 63], 64)
    assert "processes 0 and 63 of 64, recompute fc1 → compile" in told
    assert "→ fsdp2, and a step of 2 passes with one clip" in told
    assert "process 0 of 1, the plain model, and a step of 1 pass with one clip" in dry_run.describe(recipe(), [0], 1)


def test_shares_cover_every_number_once_and_the_first_process_has_most():
    parameters = Parameters.of(recipe(model=ModelConfig()))
    assert parameters.total == 102_501_505
    by_rank = [share_of(parameters.shapes, 64, rank) for rank in range(64)]
    assert sum(by_rank) == parameters.total
    assert by_rank == sorted(by_rank, reverse=True)
    # Tensors of one row stay whole: the sampler's positions (1568 × 768) and its last weights (768).
    assert by_rank[0] - by_rank[1] >= 1568 * 768 + 768
    assert share_of([(7, 2)], 4, 0) == 4  # rows of 2 in pieces of 2, 2, 2, 1
    assert [share_of([(7, 2)], 4, rank) for rank in range(5)] == [4, 4, 4, 2, 0]


def test_parameters_by_block():
    parameters = Parameters.of(recipe(model=ModelConfig()))
    block, narrow, of_sampler = (12 * d * d + 13 * d - without for d, without in ((768, 768), (384, 384), (768, 2304)))
    assert parameters.largest_block == block
    assert parameters.in_blocks == 12 * block + 4 * narrow + of_sampler


@pytest.mark.parametrize(("accumulate", "repeat"), [(1, 1), (3, 2)])
def test_every_place_is_seen_once(accumulate, repeat):
    config = dataclasses.replace(recipe(accumulate=accumulate), data=DataConfig(repeat=repeat))
    found = dry_run.walk(config, 64, 5000)
    assert found.num_places == found.num_steps * 64 * accumulate * 4 // repeat > 5000
    assert found.resumed_with == 32
    assert dry_run.walk(config, 3, 50).resumed_with is None


def test_the_rule_of_places():
    """Micro-batch a of step s on process r of W is number s · A · W + a · W + r of the stream."""
    config = recipe(accumulate=3)
    places = dry_run._places(config, 5, 8, 3).reshape(3, 8, 4)
    for a in range(3):
        for r in range(8):
            number = 5 * 3 * 8 + a * 8 + r
            assert places[a, r].tolist() == list(range(4 * number, 4 * number + 4))


def test_a_place_that_is_missed_or_seen_twice_is_found(monkeypatch):
    monkeypatch.setattr(dry_run, "batch_positions", lambda batch, **_: range(4 * batch, 4 * batch + 4))
    with pytest.raises(ValueError, match="8 processes: place 0 of the stream of videos is seen 8 times, not once"):
        dry_run.walk(recipe(), 8, 100)
    with pytest.raises(ValueError, match="place 1 of the stream of videos is seen 0 times"):
        dry_run._check(np.array([0, 2, 3, 3]), "somebody")


def test_the_command_tells_what_it_found(capsys):
    arguments = ["--gpu", "h100", "--num-gpus", "64", "--dataset", "k400", "--model.size", "nano", "--batch", "4"]
    assert main(["plan", *arguments, "--distributed.mode", "fsdp2", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["dry_run"]
    assert [process["rank"] for process in found["processes"]] == [0, 63]
    assert all(process["modelled_peak"] > process["weights"] for process in found["processes"])
    assert "processes 0 and 63 of 64" in found["rehearsed"]
    assert found["stream"]["num_places"] > 240_436
    assert main(["plan", *arguments, "--num-gpus", "1", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "counted after a step of 1 processes" in text
    assert "(modelled)" in text
    assert "set up: process 0 of 1, " in text
    assert "each is seen by exactly one process" in text


def test_sharing_takes_less_memory_and_more_traffic():
    options = PlanOptions(gpu="h100", num_gpus=64, dataset="k400")
    huge = ModelConfig(size="huge")
    whole, shared = (make_plan(recipe(mode, model=huge), options, calibration()) for mode in ("ddp", "fsdp2"))
    assert shared.value("memory_bytes") < whole.value("memory_bytes") - 10 * 0.67
    # Weights twice in 16 bits and gradients once in 32 are what an all-reduce sends: gradients twice in 32.
    assert shared.value("sent_bytes") == pytest.approx(whole.value("sent_bytes"))
    assert shared.value("largest_batch") > whole.value("largest_batch")


def test_traffic_of_shares_by_hand():
    config = recipe(model=ModelConfig(), accumulate=2)
    parameters = Parameters.of(config)
    before_forward, before_backward = shares.gathered_bytes(config, parameters)
    assert before_backward == 2 * parameters.in_blocks
    assert before_forward == before_backward + 4 * (102_501_505 - parameters.in_blocks)
    gradients = shares.gradient_bytes(config, parameters)
    assert gradients == 4 * 102_501_505
    rate, seconds = 1e9, 10.0
    found = network.fsdp_traffic(64, (before_forward, before_backward), gradients, 0.1, rate, seconds, 2)
    expected = 63 / 64 * (2 * (before_forward + before_backward) + gradients)
    assert found.sent_bytes == pytest.approx(expected)
    assert found.seconds == pytest.approx(expected / rate)
    # Passes of ten seconds hide all but what comes first and last.
    assert found.exposed_seconds == pytest.approx(63 / 64 * 0.1 * (2 * before_forward + gradients) / rate)
    slow = network.fsdp_traffic(64, (before_forward, before_backward), gradients, 0.1, rate, 0.0, 2)
    assert slow.exposed_seconds == pytest.approx(slow.seconds)
    half = dataclasses.replace(config, distributed=DistributedConfig(gradient_compression="bf16"))
    assert shares.gradient_bytes(half, parameters) == 2 * 102_501_505
    assert network.ring_rate(GPUS["h100"], 8, None) == 0.8 * 400e9
