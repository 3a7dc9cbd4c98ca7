"""How the kernels read token ids, and notice on the device which of them may not be used."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_ids(pointer, place, N, in_range):
    """Return the ids at ``pointer``, place ``place`` of their clips, and whether each may be used.

    It may if it is one of N tokens and above the id before it in its clip. Outside ``in_range`` it is a usable 0.
    """
    id_ = tl.load(pointer, mask=in_range, other=0)
    before = tl.load(pointer - 1, mask=in_range & (place > 0), other=-1)
    return id_, (id_ > tl.maximum(before, -1)) & (id_ < N)
