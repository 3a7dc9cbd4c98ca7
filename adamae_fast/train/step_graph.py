"""A training step as one CUDA graph: recorded once, then launched as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

log = logging.getLogger("adamae_fast")

WARM_UP_STEPS = 3
"""Steps that run as usual before one is recorded. They are part of the training like all others. In them kernels are
compiled and loaded, libraries choose their algorithms, and the optimizer makes its moments."""


class StepGraph:
    """Calls ``step`` a few times, records the next call as a CUDA graph, and replays that from then on.

    ``step`` takes no arguments: what differs between two steps it reads from tensors that stay where they are, written
    before the call. It must not wait for the device. Recording runs nothing; the first replay is the recorded step.

    Random numbers of torch's own generator (dropout) are those of a step without a graph: seed and offset of the
    generator are inputs of each replay, and torch.manual_seed before the call sets them.

    Raises ValueError on a device without CUDA graphs.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"train.cuda_graph=True: the run computes on {device}, which has no CUDA graphs; choose "
                "train.cuda_graph=false or a CUDA device"
            )
        self._step = step
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._num_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Take one step."""
        if self._graph is None and self._num_steps < WARM_UP_STEPS:
            self._num_steps += 1
            # On the stream of the recording: what a library makes for a stream at its first use is there by then.
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._step()
            current.wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins the loader's batches allocates memory meanwhile, and may.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._step()
        log.info("the step is one CUDA graph now, which keeps %.2f GiB for itself", _pool_bytes(graph) / 2**30)
        return graph

    @property
    def pool_bytes(self) -> int:
        """Memory that belongs to the graph alone; 0 before it is recorded.

        A replay allocates nothing, so statistics of the allocator that were reset after the recording do not show it.
        """
        return _pool_bytes(self._graph) if self._graph else 0


def _pool_bytes(graph: torch.cuda.CUDAGraph) -> int:
    return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(graph.pool()))
