"""What the processes of a run send each other, and how much of it hides behind the step: a *model*.

W processes; a parameter tensor of S bytes. A ring all-reduce makes each process send 2 (W − 1) / W · S bytes, an
all-gather or a reduce-scatter half of that. All of a node's adapters work at once, so a ring over several nodes runs at
the slower of NVLink and what a node sends to the others. Latency is left out.

* **ddp**: one all-reduce of the gradients for each update, in buckets, behind the last backward; the last bucket
  (:data:`BUCKET`) has nothing left to hide behind.
* **fsdp2**: for each pass an all-gather of the parameters before the forward and one before the backward, and for each
  update one reduce-scatter of the gradients behind the last backward. What is fetched first and reduced last, a block's
  parameters, has nothing to hide behind.
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
    gathered: tuple[float, float],
    gradient_bytes: float,
    block_share: float,
    rate: float,
    pass_seconds: float,
    num_passes: int,
) -> Traffic:
    """Of an update of ``num_passes`` passes.

    Args:
        num_processes: W.
        gathered: bytes of the parameters that a pass fetches before its forward, and before its backward.
        gradient_bytes: of all gradients.
        block_share: part of the parameters that a block has.
        rate: see :func:`ring_rate`.
        pass_seconds: of one forward and backward.
        num_passes: forward passes before an update.
    """
    share = (num_processes - 1) / num_processes
    before_forward, before_backward = (share * x for x in gathered)
    reduced = share * gradient_bytes
    forward, backward = FORWARD_SHARE * pass_seconds, (1 - FORWARD_SHARE) * pass_seconds
    first = block_share * before_forward / rate
    waits = num_passes * max(first, before_forward / rate - forward)
    waits += (num_passes - 1) * max(0.0, before_backward / rate - backward)
    waits += max(block_share * reduced / rate, (before_backward + reduced) / rate - backward)
    fetched = num_passes * (before_forward + before_backward)
    return Traffic(
        gather_bytes=fetched, reduce_bytes=reduced, seconds=(fetched + reduced) / rate, exposed_seconds=waits
    )
