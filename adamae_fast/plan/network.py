"""What the processes of a run send each other, and how much of it hides behind the step: a *model*.

W processes; a parameter tensor of S bytes. A ring all-reduce makes each process send 2 (W − 1) / W · S bytes, an
all-gather or a reduce-scatter half of that. All of a node's adapters work at once, so a ring over several nodes runs at
the slower of NVLink and what a node sends to the others. Latency is left out.

* **DDP**: one all-reduce of the fp32 gradients for each update, in buckets, behind the last backward; the last bucket
  (:data:`BUCKET`) has nothing left to hide behind.
* **FSDP2**: for each forward pass an all-gather of the parameters before the forward and one before the backward, and a
  reduce-scatter of the gradients; the first block's all-gather and the last one's reduce-scatter are exposed.
"""

from __future__ import annotations

from dataclasses import dataclass

from adamae_fast.plan.hardware import FORWARD_SHARE, NETWORK_SHARE, Gpu

BUCKET = 25 * 2**20
"""Bytes of one bucket of DDP."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one process sends for one update."""

    gather_bytes: float
    """Of parameters; nothing with DDP."""
    reduce_bytes: float
    """Of gradients."""
    seconds: float
    """Alone on the links."""
    exposed_seconds: float
    """In which the GPU computes nothing."""

    @property
    def sent_bytes(self) -> float:
        """All."""
        return self.gather_bytes + self.reduce_bytes


def ring_rate(gpu: Gpu, num_nodes: int, node_network_gbit: float | None) -> float:
    """Bytes a second that each process of a ring sends."""
    if num_nodes == 1:
        return gpu.link
    between = gpu.network if node_network_gbit is None else NETWORK_SHARE * node_network_gbit * 1e9 / 8
    return min(gpu.link, between)


def ddp_traffic(num_processes: int, gradient_bytes: float, rate: float, pass_seconds: float) -> Traffic:
    """Of an update whose last forward and backward takes ``pass_seconds``."""
    share = 2 * (num_processes - 1) / num_processes
    seconds = share * gradient_bytes / rate
    last = share * min(BUCKET, gradient_bytes) / rate
    exposed = max(last, seconds - (1 - FORWARD_SHARE) * pass_seconds)
    return Traffic(gather_bytes=0.0, reduce_bytes=share * gradient_bytes, seconds=seconds, exposed_seconds=exposed)


def fsdp_traffic(
    num_processes: int,
    parameter_bytes: float,
    gradient_bytes: float,
    largest_share: float,
    rate: float,
    pass_seconds: float,
    num_passes: int,
) -> Traffic:
    """Of an update of ``num_passes`` passes; ``largest_share`` of the parameters is the largest group's."""
    share = (num_processes - 1) / num_processes
    gather, reduce = share * parameter_bytes, share * gradient_bytes
    first, last = gather * largest_share / rate, reduce * largest_share / rate
    forward, backward = FORWARD_SHARE * pass_seconds, (1 - FORWARD_SHARE) * pass_seconds
    exposed = max(first, gather / rate - forward) + max(last, (gather + reduce) / rate - backward)
    return Traffic(
        gather_bytes=2 * num_passes * gather,
        reduce_bytes=num_passes * reduce,
        seconds=num_passes * (2 * gather + reduce) / rate,
        exposed_seconds=num_passes * exposed,
    )
