"""How much memory one call needs at its peak, beyond what was there before it."""

from __future__ import annotations

from itertools import accumulate

import torch

from bench.timing import Call


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Return the peak of tensors allocated during the call, results among them.

    On the CPU: the running sum of the profiler's memory events, which sees every tensor, those of the C++ operations
    and of compiled code among them, but no scratch that a library takes elsewhere (a few KB for each thread in our C++;
    oneDNN's buffers). On a GPU: the allocator's peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    profiler = profile.profiler
    assert profiler is not None
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)
