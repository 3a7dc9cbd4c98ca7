"""What a process tells the others, so that all go on, or end, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adamae_fast.data.quarantine import BadVideo, DataStoppedError
from adamae_fast.distributed.world import World
from adamae_fast.errors import RunStoppedError


@dataclass(frozen=True)
class Word:
    """What happened to one process, or to all together; most of the time, nothing."""

    signals: Sequence[str]
    """Names of signals that ask for the end."""

    error: RunStoppedError | None
    """Why it cannot go on."""

    bad: Sequence[BadVideo]
    """Videos found unreadable."""


def tell_all(world: World, mine: Word) -> Word:
    """Return what the processes have to tell together: the same on all, an error with the ranks that it comes from."""
    news = world.news(mine if mine.signals or mine.error or mine.bad else None)
    errors = {rank: word.error for rank, word in news.items() if word.error is not None}
    error = mine.error
    if errors and world.size > 1:
        is_of_data = any(isinstance(each, DataStoppedError) for each in errors.values())
        text = "; ".join(world.named(rank, each) for rank, each in errors.items())
        error = DataStoppedError(text) if is_of_data else RunStoppedError(text)
    return Word(
        signals=[name for word in news.values() for name in word.signals],
        error=error,
        bad=[video for word in news.values() for video in word.bad],
    )
