"""What each process of a run keeps of weights, gradients and moments, and what it fetches, by ``distributed.mode``.

* **ddp**: 16 bytes a parameter (fp32 weight, gradient, two moments), and 2 for its cast where products are of 16 bits.
* **fsdp2**: 16 bytes for each parameter of its share. A tensor is cut along its first dimension into pieces of
  ⌈rows / processes⌉ rows, so the first process has most: a tensor of one row, such as the sampler's positions, is its
  alone. Meanwhile whole: two blocks in 16 bits with their gradients and what these are reduced from, and everything
  outside the blocks in fp32 with its gradients. With several passes before an update, the gradients of all parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from adamae_fast.config import PretrainConfig
from adamae_fast.interop.keys import parameter_shapes

FP32, HALF = 4, 2

STATES = 4 * FP32
"""Bytes a parameter: weight, gradient and two moments of AdamW."""

_BLOCK = re.compile(r"(\w+\.blocks\.\d+)\.")


@dataclass(frozen=True)
class Parameters:
    """Of a model, by what FSDP2 fetches together."""

    shapes: tuple[tuple[int, ...], ...]
    total: int
    in_blocks: int
    largest_block: int

    @property
    def outside(self) -> int:
        """Of the blocks."""
        return self.total - self.in_blocks

    @classmethod
    def of(cls, config: PretrainConfig) -> Parameters:
        """Count them."""
        shapes = parameter_shapes(config.model, config.mask)
        blocks: dict[str, int] = {}
        for name, shape in shapes.items():
            if block := _BLOCK.match(name):
                blocks[block[1]] = blocks.get(block[1], 0) + math.prod(shape)
        total = sum(map(math.prod, shapes.values()))
        return cls(tuple(shapes.values()), total, sum(blocks.values()), max(blocks.values()))


def share_of(shapes: Iterable[tuple[int, ...]], num_processes: int, rank: int) -> int:
    """Numbers of all tensors that process ``rank`` keeps with FSDP2."""
    total = 0
    for shape in shapes:
        piece = math.ceil(shape[0] / num_processes)
        total += min(max(shape[0] - rank * piece, 0), piece) * math.prod(shape[1:])
    return total


def state_bytes(config: PretrainConfig, parameters: Parameters, num_processes: int, rank: int) -> int:
    """Weights, gradients and moments that process ``rank`` keeps between two steps."""
    if config.distributed.mode == "fsdp2" and num_processes > 1:
        return STATES * share_of(parameters.shapes, num_processes, rank)
    return STATES * parameters.total


def passing_bytes(config: PretrainConfig, parameters: Parameters, num_processes: int) -> int:
    """What a step needs beside :func:`state_bytes` for parameters: casts, or what is fetched and sent."""
    if config.distributed.mode == "ddp" or num_processes == 1:
        return HALF * parameters.total
    blocks = 2 * (HALF + HALF + FP32) * parameters.largest_block
    gradients_of_all = FP32 * parameters.total * (config.train.accumulate > 1)
    return blocks + 2 * FP32 * parameters.outside + gradients_of_all


def gathered_bytes(config: PretrainConfig, parameters: Parameters) -> tuple[int, int]:
    """Bytes of the parameters that a pass of FSDP2 fetches before its forward, and before its backward."""
    block = HALF if config.train.precision == "bf16" else FP32
    in_blocks = block * parameters.in_blocks
    return in_blocks + FP32 * parameters.outside, in_blocks


def gradient_bytes(config: PretrainConfig, parameters: Parameters) -> int:
    """Of all gradients, as they travel once for each step."""
    return (HALF if config.distributed.gradient_compression == "bf16" else FP32) * parameters.total
