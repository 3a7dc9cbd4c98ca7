"""What the loop gets from the data workers, whichever decoder they use.

Letters: B clips, T frames, S the clip's side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from adamae_fast.data.dataset import DecodeCost
from adamae_fast.data.quarantine import BadVideo


class Batch(NamedTuple):
    """What one forward pass sees."""

    video: Tensor
    """uint8 (B, 3, T, S, S); the crops of one video stand together."""

    bad: list[BadVideo]
    """Videos that were to be in this batch and could not be read."""

    decode: DecodeCost | None = None
    """Of all its videos; None where the decoder does not tell."""

    num_ready: int = 0
    """Batches that stood ready when this one was asked for."""

    shown: Sequence[int] = ()
    """Index of the manifest's entry that each clip shows."""

    num_by_dali: int = 0
    """Videos of it that DALI decoded."""

    fell_back: tuple[str, ...] = ()
    """With data.decoder=dali, why the other ones were not, a reason for each."""
