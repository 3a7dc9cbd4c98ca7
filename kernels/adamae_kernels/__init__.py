"""Triton kernels for the CUDA key of the operations that ``adamae_fast.ops`` defines: one file for each operation.

A launcher takes the arguments of its schema, of any strides, makes them contiguous, allocates the result and launches.
Inputs and results are fp16, bf16 or fp32 and sums run in fp32; fp64 is not for these kernels. Arguments are trusted to
have passed the checks of the public functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adamae_kernels.assemble_decoder import assemble_decoder, assemble_decoder_backward
from adamae_kernels.gather_tokens import gather_tokens, gather_tokens_backward
from adamae_kernels.masked_patch_loss import (
    masked_patch_loss,
    masked_patch_loss_backward,
    patch_loss_step,
    patch_targets,
)
from adamae_kernels.patchify import patchify
from adamae_kernels.sample_visible import sample_visible, split_tokens
from adamae_kernels.sampling_loss import sampling_loss

LAUNCHERS: Mapping[str, Callable[..., Any]] = {
    launcher.__name__: launcher
    for launcher in (
        assemble_decoder,
        assemble_decoder_backward,
        gather_tokens,
        gather_tokens_backward,
        masked_patch_loss,
        masked_patch_loss_backward,
        patch_loss_step,
        patch_targets,
        patchify,
        sample_visible,
        split_tokens,
        sampling_loss,
    )
}
"""Every launcher by the name of its operation."""
