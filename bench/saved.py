"""Bytes that one training step keeps for its backward, by recompute policy: ``python -m bench.saved``.

Two counts that must agree. *Saved*: what autograd and custom functions save, seen by saved-tensor hooks; each storage
once, the model's own tensors and the uint8 video left out; by part of the network. *Alive*: the profiler's running sum
of all memory events of the CPU from before the forward to its end, when the loss alone is held; it also sees
what hides in attributes, closures and caches, which no hook does. The peak is that of forward and backward, gradients
included. Casts of parameters under autocast do not grow with the batch and are counted on their own.

Seconds are CPU time of forward and backward, the least of all repetitions, policies in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from adamae_fast.config import MaskConfig, ModelConfig, Precision, Recompute
from adamae_fast.device import arithmetic
from adamae_fast.model.adamae import AdaMAE
from bench.peak import peak_extra_bytes

PARTS = ("tokenizer", "sampler", "encoder", "decoder")
"""A part reaches to the start of the next: the sampler's holds the split, the decoder's the loss."""

CASTS = "parameter casts"

_CONVERSIONS = {"ToCopyBackward0", "TBackward0", "ViewBackward0", "UnsafeViewBackward0"}

NANO = ModelConfig(size="nano", num_frames=4, frame_size=64)


def build(config: ModelConfig, ratio: float = 0.95) -> AdaMAE:
    """A model in training mode with fixed random weights."""
    torch.manual_seed(0)
    return AdaMAE(config, MaskConfig(ratio=ratio)).train()


def draw_video(model: AdaMAE, batch_size: int) -> Tensor:
    """Random clips."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, *model.grid.video_shape), dtype=torch.uint8, generator=generator)


def forward(model: AdaMAE, video: Tensor, precision: Precision) -> Tensor:
    """The loss, with the same masks and dropout at every call."""
    torch.manual_seed(0)
    seeds = torch.arange(len(video))
    with arithmetic(video.device, precision):
        return model(video, seeds=seeds).loss


def _is_cast_of_parameter(x: Tensor, parameters: set[int]) -> bool:
    """Whether views and conversions alone lead from a parameter to ``x``."""
    node = x.grad_fn
    while node is not None:
        if id(getattr(node, "variable", None)) in parameters:
            return True
        if node.name() not in _CONVERSIONS:
            return False
        node = node.next_functions[0][0]
    return False


def saved_bytes(model: nn.Module, call: Callable[[], object]) -> Counter[str]:
    """Bytes that autograd saves in ``call``, a forward pass of ``model``, by part; casts of parameters on their own."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    parameters = {id(p) for p in model.parameters()}
    kept: dict[int, tuple[str, int]] = {}
    part = PARTS[0]

    def enter(name: str, *_: object) -> None:
        nonlocal part
        part = name

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and x.dtype != torch.uint8:
            key = CASTS if _is_cast_of_parameter(x, parameters) else part
            kept.setdefault(storage.data_ptr(), (key, storage.nbytes()))
        return x.detach()  # x itself may be what is computed here: it and its graph would hold each other for ever

    modules = [(name, getattr(model, name, None)) for name in PARTS]
    handles = [m.register_forward_pre_hook(partial(enter, name)) for name, m in modules if m is not None]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = call()  # held, or storages would be freed and their addresses used again
    finally:
        for handle in handles:
            handle.remove()
    del loss
    total: Counter[str] = Counter()
    for key, num_bytes in kept.values():
        total[key] += num_bytes
    return total


def alive_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes allocated in ``call`` and not freed while its result is held; the CPU only."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss = call()
    del loss
    profiler = profile.profiler
    assert profiler is not None
    assert profiler.kineto_results is not None
    return sum(event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]")


def main() -> None:
    """Print a line for each policy, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recompute", nargs="+", choices=get_args(Recompute), default=get_args(Recompute))
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    parser.add_argument("--repeat", type=int, default=0, help="timed steps of each policy; 0: bytes only")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    arguments = parser.parse_args()
    model = build(NANO if arguments.quick else ModelConfig(size=arguments.size))
    video, precision = draw_video(model, arguments.batch), arguments.precision
    call = partial(forward, model, video, precision)

    def step() -> None:
        call().backward()

    call()  # what is built once
    print(f"{'MB a clip':<12}{'saved':>8}" + "".join(f"{p:>11}" for p in PARTS) + f"{'alive':>9}  {CASTS}   peak")
    rows: dict[str, dict[str, float]] = {}
    for policy in arguments.recompute:
        model.set_recompute(policy)
        saved = saved_bytes(model, call)
        casts = saved.pop(CASTS, 0)
        row = {"saved": saved.total(), **{p: saved[p] for p in PARTS}, "alive": alive_bytes(call) - casts, CASTS: casts}
        model.zero_grad(set_to_none=True)
        row["peak"] = peak_extra_bytes(step, video.device)
        rows[policy] = {key: round(value / arguments.batch / 1e6, 2) for key, value in row.items()}
        figures = rows[policy]
        print(
            f"{policy:<12}{figures['saved']:>8.1f}"
            + "".join(f"{figures[p]:>11.1f}" for p in PARTS)
            + f"{figures['alive']:>9.1f}{figures[CASTS]:>17.1f}{figures['peak']:>7.0f}",
            flush=True,
        )
    seconds: dict[str, list[float]] = {policy: [] for policy in arguments.recompute}
    for _ in range(arguments.repeat):
        for policy in arguments.recompute:
            model.set_recompute(policy)
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            step()
            seconds[policy].append(time.process_time() - start)
    for policy, spent in seconds.items():
        if spent:
            rows[policy]["cpu_seconds"] = round(min(spent), 4)
    setting = {"size": "quick" if arguments.quick else arguments.size, "batch": arguments.batch, "precision": precision}
    setting |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps({**setting, "mb_a_clip": rows}, separators=(",", ":")))


if __name__ == "__main__":
    main()
