"""What a step of pre-training reports: its losses, where its visible tokens lie in time, and how the sampler does.

All of it is computed on the device, in shapes that stay the same and without a wait, so that a recorded step computes
it again at each replay. Every figure is a mean over the clips of a micro-batch: those of a step are means over its
micro-batches and processes.

Shapes: B clips, N tokens, K visible, M masked and decoded, S slots of the token grid in time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_fast.grid import TokenGrid
from adamae_fast.model.adamae import AdaMAE, AdaMAEOutput
from adamae_fast.ops.sampling_loss import PROBABILITY_EPS

LOSSES = ("loss", "loss_reconstruction", "loss_sampling")

OF_SAMPLER = ("probability_entropy", "probability_max", "error_lift", "clamped_share")
"""Only there where the mask is drawn from a sampler's probabilities p:

* probability_entropy: of p, in nats; ln N where p is uniform;
* probability_max: the largest p of a clip;
* error_lift: :func:`lift` of the errors by p, over the decoded tokens;
* clamped_share: share of the masked tokens with p below the sampling loss's eps, which gives them next to no gradient.
"""


def figure_names(model: AdaMAE) -> tuple[str, ...]:
    """Names of what :func:`describe_output` returns for ``model`` in training, in its order."""
    of_sampler = () if model.sampler is None else OF_SAMPLER
    return (*LOSSES, *of_sampler, *(f"visible_in_time/{slot}" for slot in range(model.grid.shape[0])))


@torch.no_grad()
def describe_output(output: AdaMAEOutput, grid: TokenGrid) -> Tensor:
    """Return the figures of one forward pass on its device, fp32; finite where logits and errors are."""
    figures = [output.loss, output.loss_reconstruction, output.loss_sampling]
    if output.logit_statistics is not None:
        assert output.logits is not None  # what the statistics are of
        largest_B, log_sum_exp_B, entropy_B = output.logit_statistics.unbind(1)
        p_BM = (output.logits.gather(1, output.masked_ids) - log_sum_exp_B[:, None]).exp()
        figures += [
            entropy_B.mean(),  # a logit of minus infinity leaves all losses finite, but not this
            (largest_B - log_sum_exp_B).exp().mean(),
            lift(output.logits.gather(1, output.decoded_ids), output.error).mean(),
            (p_BM < PROBABILITY_EPS).float().mean(),
        ]
    scalars = torch.stack([figure.detach().float() for figure in figures])
    return torch.cat((scalars, visible_in_time(output.visible_ids, grid)))


def lift(logits_BM: Tensor, values_BM: Tensor) -> Tensor:
    """Return by how much a clip's p favours large values, (B,): Σ_i p_i x_i / Σ_i p_i over the mean of x.

    p is the softmax of the logits of all tokens, of which these are some: what the others have cancels. 1 means that p
    ignores the values, 2 that they are on average twice as large where p looks. Values are not negative; a clip where
    all are 0 counts as 1.
    """
    mean_B = values_BM.mean(dim=1)
    # As a softmax over these tokens it stays a number even where all p lies on others.
    favoured_B = (logits_BM.softmax(dim=1) * values_BM).sum(dim=1)
    return torch.where(mean_B > 0, favoured_B / mean_B, torch.ones_like(mean_B))


def visible_in_time(visible_ids_BK: Tensor, grid: TokenGrid) -> Tensor:
    """Return the share of the visible tokens in each slot of the grid in time, (S,) fp32; they add up to 1."""
    slot_BK = visible_ids_BK // grid.tokens_per_frame
    slots_S = torch.arange(grid.shape[0], device=visible_ids_BK.device)
    return (slot_BK[:, :, None] == slots_S).float().mean(dim=(0, 1))
