"""What the processes of a run agree on. In a run of one process, these functions need no process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_spread() -> bool:
    """Whether several processes train together."""
    return num_processes() > 1


def num_processes() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this one is: 0 is the one that writes what the others do not."""
    return dist.get_rank() if is_spread() else 0


def first_process_does(action: Callable[[], T]) -> T:
    """Return the result of ``action``, which the first process runs, in all of them; an error is raised in all.

    Every process must call it. The result travels between processes, so it should be small.
    """
    if not is_spread():
        return action()
    outcome: list[T | Exception | None] = [None]
    if process_index() == 0:
        try:
            outcome = [action()]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    result = outcome[0]
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[return-value]


def every_process_says(value: T) -> list[T]:
    """Return the values of all processes, in their order. Every process must call it."""
    if not is_spread():
        return [value]
    values: list[T] = [value] * num_processes()
    dist.all_gather_object(values, value)
    return values
