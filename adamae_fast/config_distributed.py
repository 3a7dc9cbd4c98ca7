"""Knobs of a run on several processes, and what they cannot be combined with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adamae_fast.errors import require

if TYPE_CHECKING:
    from adamae_fast.config import RunConfig

Mode = Literal["ddp", "fsdp2"]
Compression = Literal["none", "bf16"]


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """What several processes share. torchrun starts them; the same command without it runs one, where none of this
    matters."""

    mode: Mode = "ddp"
    """ddp: each process has the whole model and optimizer; fsdp2: each keeps a share of every block's weights,
    gradients and moments, and fetches the rest for the time of a block (for large and huge)."""

    gradient_compression: Compression = "none"
    """bf16: gradients travel between the processes in half the bytes, rounded to bf16. Their sum is that of rounded
    numbers, too; with fsdp2 also what a process adds up over its micro-batches."""

    timeout: float = 300.0
    """Seconds after which a process that waits for another one gives up, and with it the run. What the first process
    does alone, such as writing a checkpoint, must be done in this time."""

    def __post_init__(self) -> None:
        require(self.timeout > 0, "distributed.timeout", self.timeout, "choose a positive number of seconds")


def check_distributed(config: RunConfig) -> None:
    """Raise ValueError for a combination that cannot work on any number of processes greater than one."""
    distributed = config.distributed
    if distributed == DistributedConfig():
        return  # nobody has asked for anything
    _check_timeout(config)
    if distributed.mode == "ddp":
        return
    cannot = "distributed.mode=fsdp2 cannot work with it"
    train = config.train
    require(
        train.precision != "fp16",
        "train.precision",
        train.precision,
        f"{cannot}: the loss scaler does not know gradients in shares; choose bf16 or fp32, or distributed.mode=ddp",
    )
    require(
        config.optim.implementation == "torch",
        "optim.implementation",
        config.optim.implementation,
        f"{cannot}: apex does not know weights in shares; choose torch, or distributed.mode=ddp",
    )
    require(
        config.model.layer_norm == "torch",
        "model.layer_norm",
        config.model.layer_norm,
        f"{cannot}: apex does not know weights in shares; choose torch, or distributed.mode=ddp",
    )


def _check_timeout(config: RunConfig) -> None:
    timeout, data = config.distributed.timeout, config.data
    require(
        timeout > data.timeout or data.num_workers == 0,
        "distributed.timeout",
        timeout,
        f"choose more than data.timeout={data.timeout:g}, which one process may spend on a video while the "
        "others wait for it",
    )


def check_world(config: RunConfig, size: int) -> None:
    """Raise ValueError for what ``size`` processes cannot do and one could."""
    if size > 1:
        _check_timeout(config)  # also where it was data.timeout that was set
    require(
        size == 1 or not config.train.cuda_graph,
        "train.cuda_graph",
        config.train.cuda_graph,
        f"{size} processes cannot work with it: a recorded step does not exchange gradients; choose false",
    )


def distributed_without_effect(config: RunConfig, size: int) -> list[str]:
    """Return a sentence for each option of the group that was set but does nothing with ``size`` processes."""
    if size > 1:
        return []
    default = DistributedConfig()
    return [
        f"distributed.{key} has no effect: there is one process (start several with torchrun)"
        for key in ("mode", "gradient_compression", "timeout")
        if getattr(config.distributed, key) != getattr(default, key)
    ]
