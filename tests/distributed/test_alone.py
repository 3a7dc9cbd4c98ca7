"""What can be told of several processes with one: refused combinations, merged figures, words, finite values."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from adamae_fast.config import DataConfig, ModelConfig, OptimConfig, PretrainConfig, TrainConfig
from adamae_fast.config_distributed import DistributedConfig, check_world, distributed_without_effect
from adamae_fast.data.quarantine import BadVideo, DataStoppedError
from adamae_fast.distributed import world as world_module
from adamae_fast.distributed.world import MEETING, PATIENCE, World, joined
from adamae_fast.errors import RunStoppedError
from adamae_fast.train.finite import FiniteGuard, NonFiniteError
from adamae_fast.train.metrics import ProgressLine, over_processes
from adamae_fast.train.words import Word, tell_all

FSDP2 = DistributedConfig(mode="fsdp2")


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"distributed": FSDP2, "train": TrainConfig(precision="fp16")}, r"train\.precision='fp16': .*fsdp2.*bf16"),
        (
            {"distributed": FSDP2, "optim": OptimConfig(implementation="apex")},
            r"optim\.implementation='apex': .*fsdp2.*choose torch",
        ),
        (
            {"distributed": FSDP2, "model": ModelConfig(layer_norm="apex")},
            r"model\.layer_norm='apex': .*fsdp2.*choose torch",
        ),
        (
            {"distributed": DistributedConfig(timeout=30), "data": DataConfig(timeout=60)},
            r"distributed\.timeout=30: choose more than data\.timeout=60",
        ),
    ],
)
def test_what_cannot_work_together_is_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        PretrainConfig(**groups)


def test_a_timeout_is_positive():
    with pytest.raises(ValueError, match=r"distributed\.timeout=0: choose a positive"):
        DistributedConfig(timeout=0)


@pytest.mark.parametrize(("given", "expected"), [(None, (MEETING, PATIENCE)), (30.0, (30.0, 30.0))])
def test_processes_that_share_a_list_wait_for_the_slowest(monkeypatch, given, expected):
    """One may be done long before another one: only at the start, and where a run says so, is that an error."""
    waits = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(world_module, "fresh_store", lambda world, timeout: waits.append(timeout))
    begun = lambda *arguments, timeout, **others: waits.append(timeout.total_seconds())  # noqa: E731
    monkeypatch.setattr(torch.distributed, "init_process_group", begun)
    words = "distributed.timeout" if given else "the same command does the rest"
    with pytest.raises(RunStoppedError, match=words), joined("cpu", "device", given):
        raise RuntimeError("gloo: connection closed by peer")
    assert tuple(waits) == expected
    assert PATIENCE > 10 * MEETING


def test_a_recorded_step_is_of_one_process():
    config = PretrainConfig(train=TrainConfig(cuda_graph=True))
    check_world(config, 1)
    with pytest.raises(ValueError, match=r"train\.cuda_graph=True: 2 processes .*choose false"):
        check_world(config, 2)


def test_several_processes_wait_longer_than_one_may_read():
    config = PretrainConfig(data=DataConfig(timeout=900))
    check_world(config, 1)
    with pytest.raises(ValueError, match=r"distributed\.timeout=300\.0: choose more than data\.timeout=900"):
        check_world(config, 2)


def test_what_one_process_does_not_heed_is_told():
    config = PretrainConfig(distributed=DistributedConfig(mode="fsdp2", gradient_compression="bf16"))
    told = distributed_without_effect(config, 1)
    assert [message.split(" has no effect")[0] for message in told] == [
        "distributed.mode",
        "distributed.gradient_compression",
    ]
    assert distributed_without_effect(config, 2) == []
    assert distributed_without_effect(PretrainConfig(), 1) == []


def test_one_process_joins_nothing():
    with joined("cpu", "train.device", 10) as (world, device):
        assert (world, device) == (World(), torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def lap(wait_share, forward_seconds, **others):
    return {"data_wait_share": wait_share, "seconds_per_step": 2.0, "forward_seconds": forward_seconds, **others}


def test_figures_of_processes_are_merged_and_the_slowest_is_named():
    laps = [
        lap(0.1, 4.0, memory_bytes=5, batches_ready=3.0),
        lap(0.5, 4.0, memory_bytes=7, batches_ready=1.0, dali_share=0.5),
        lap(0.1, 5.0, memory_bytes=6, batches_ready=2.0),
    ]
    found = over_processes(laps, 10)
    assert "forward_seconds" not in found
    assert (found["memory_bytes"], found["batches_ready"], found["data_wait_share"]) == (7, 1, 0.5)
    assert (found["seconds_per_step"], found["dali_share"]) == (2, 0.5)
    # Of its own, a step takes 0.2 + 0.4, 1 + 0.4 and 0.2 + 0.5 seconds.
    assert found["slowest_rank"] == 1
    assert found["slowest_rank_share"] == pytest.approx((1.4 - 0.7) / 2)
    alone = over_processes(laps[:1], 10)
    assert "slowest_rank" not in alone
    assert alone["data_wait_share"] == 0.1


def test_the_progress_line_names_a_slow_rank():
    console = Console(file=io.StringIO(), width=300)
    figures = {"step": 5, "loss": 1.0, "clips_per_second": 2.0, "data_wait_share": 0.0, "quarantined": 0}
    figures |= {"batches_ready": 1.0, "seconds_per_step": 1.0, "slowest_rank": 3, "slowest_rank_share": 0.25}
    with ProgressLine(console, 0, 5) as progress:
        progress.report(figures)
    assert "waits for rank 3 25%" in console.file.getvalue()


def test_one_process_tells_itself():
    bad, error = [BadVideo("a.mp4", "torn")], DataStoppedError("a worker died")
    assert tell_all(World(), Word([], None, [])) == Word([], None, [])
    word = tell_all(World(), Word(["SIGTERM"], error, bad))
    assert (word.signals, word.bad) == (["SIGTERM"], bad)
    assert word.error is error


def test_where_no_loss_is_at_fault_the_common_values_are_told():
    """An infinite gradient is of all processes together: their losses are finite."""
    guard = FiniteGuard(("loss", "grad_norm"), torch.device("cpu"), World(), num_common=1)
    values = torch.tensor([1.0, float("inf")])
    guard.observe(torch.tensor(4), values)
    with pytest.raises(NonFiniteError, match=r"step 5: .*\(of all together, loss=1, grad_norm=inf\)"):
        guard.check()
