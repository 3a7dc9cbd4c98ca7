"""Fixed position tables of encoder and decoder."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoid_table(num_tokens: int, width: int) -> Tensor:
    """Return the 1-D sinusoid over the flattened token index, shape (N, width), float32, not learned.

    angle(n, j) = n / 10000^(2·⌊j/2⌋ / width), computed in float64; sine in even columns, cosine in odd ones. The
    paper's text speaks of a 3-D encoding; the published checkpoints (and VideoMAE's, bit for bit) use this one.
    """
    column = torch.arange(width, dtype=torch.float64)
    rate = torch.pow(10000.0, 2 * torch.div(column, 2, rounding_mode="floor") / width)
    angle_ND = torch.arange(num_tokens, dtype=torch.float64)[:, None] / rate
    table_ND = torch.where(column.long() % 2 == 0, angle_ND.sin(), angle_ND.cos())
    return table_ND.float()
