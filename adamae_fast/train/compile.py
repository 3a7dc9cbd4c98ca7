"""Compilation of the transformer blocks, where most of a step's work is."""

from __future__ import annotations

import torch
import torch._functorch.config
from torch import nn

from adamae_fast.model.block import Block


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Let torch.compile compile each block at its first call; names of weights stay what they are.

    Blocks of one kind (encoder, sampler, decoder) share their compiled code, so the time it takes does not grow with
    the depth. Shapes are taken as they are, and one block is one graph: what cannot be compiled is an error. Whatever a
    block's ``recompute`` lets the backward compute again is not kept in a compiled block either.
    """
    if any(module.recompute != "none" for module in model.modules() if isinstance(module, Block)):
        # The compiler merges equal computations by default: it would keep the first in place of the second.
        torch._functorch.config.cse = False
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True, dynamic=False, backend=backend)
