"""What the published training code does in place of each operation: the same sequence of PyTorch calls, eager.

Written from a description of that code, as the arm that every speed-up is quoted against. Position tables and the
constants of the normalisation, which it builds anew in every step, are given ready-made here.

Letters: B clips, C channels, T frames, H, W pixels, N tokens, K visible, M masked, D, E widths, P pixels a token,
S pixels of one channel of a token. Masks are True where a token is masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical


def _normalize(video_BCTHW: Tensor, mean_C111: Tensor, std_C111: Tensor) -> Tensor:
    return (video_BCTHW.float() / 255 - mean_C111) / std_C111


def _cut(x_BCTHW: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """(B, T', H', W', C, t, h, w): tokens, then what is inside a token."""
    cut = x_BCTHW.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size)).unflatten(2, (-1, tubelet_size))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7)


def patchify(
    video_BCTHW: Tensor,
    mean_C111: Tensor,
    std_C111: Tensor,
    tubelet_size: int,
    patch_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Normalise the whole clip in fp32, then rearrange it."""
    normalized = _normalize(video_BCTHW, mean_C111, std_C111).to(dtype)
    return _cut(normalized, tubelet_size, patch_size).flatten(4).flatten(1, 3)


def embed_tubelets(
    video_BCTHW: Tensor, weight_DCthw: Tensor, bias_D: Tensor, mean_C111: Tensor, std_C111: Tensor
) -> Tensor:
    """Normalise the whole clip in fp32, then a strided 3-D convolution."""
    normalized = _normalize(video_BCTHW, mean_C111, std_C111).to(weight_DCthw.dtype)
    return F.conv3d(normalized, weight_DCthw, bias_D, stride=weight_DCthw.shape[2:]).flatten(2).transpose(1, 2)


def boolean_mask(visible_ids_BK: Tensor, num_tokens: int) -> Tensor:
    """True where a token is masked."""
    ones = torch.ones((visible_ids_BK.shape[0], num_tokens), device=visible_ids_BK.device)
    return ones.scatter_(-1, visible_ids_BK, 0.0).to(torch.bool)


def split_tokens(visible_ids_BK: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """A mask of ones with zeros scattered into it; boolean indexing brings ids into ascending order."""
    mask_BN = boolean_mask(visible_ids_BK, num_tokens)
    ids_BN = torch.arange(num_tokens, device=mask_BN.device).expand(mask_BN.shape[0], -1)
    return ids_BN[~mask_BN].reshape(len(mask_BN), -1), ids_BN[mask_BN].reshape(len(mask_BN), -1)


def sample_visible(logits_BN: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Draw without replacement from the softmax, then split."""
    visible_ids_BK = torch.multinomial(logits_BN.softmax(-1), num_visible, replacement=False)
    return split_tokens(visible_ids_BK, logits_BN.shape[1])


def gather_tokens(tokens_BND: Tensor, positions_ND: Tensor, mask_BN: Tensor) -> Tensor:
    """Positions added to all tokens; boolean indexing takes the visible ones."""
    batch_size, _, width = tokens_BND.shape
    positioned_BND = tokens_BND + positions_ND.expand(batch_size, -1, -1)
    return positioned_BND[~mask_BN].reshape(batch_size, -1, width)


def assemble_decoder(visible_BKE: Tensor, mask_token_E: Tensor, positions_NE: Tensor, mask_BN: Tensor) -> Tensor:
    """Positions of all clips, split by boolean indexing; one concatenation."""
    batch_size, _, width = visible_BKE.shape
    positions_BNE = positions_NE.expand(batch_size, -1, -1)
    visible_positions_BKE = positions_BNE[~mask_BN].reshape(batch_size, -1, width)
    masked_positions_BME = positions_BNE[mask_BN].reshape(batch_size, -1, width)
    return torch.cat([visible_BKE + visible_positions_BKE, mask_token_E + masked_positions_BME], dim=1)


def all_patch_targets(
    normalized_BCTHW: Tensor, mean_C111: Tensor, std_C111: Tensor, tubelet_size: int, patch_size: int
) -> Tensor:
    """Undo the normalisation of the whole clip, then normalise every token."""
    pixels_BCTHW = normalized_BCTHW * std_C111 + mean_C111
    tokens_BNSC = _cut(pixels_BCTHW, tubelet_size, patch_size).movedim(4, -1).flatten(4, 6).flatten(1, 3)
    mean_BN1C = tokens_BNSC.mean(dim=2, keepdim=True)
    deviation_BN1C = tokens_BNSC.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6
    return ((tokens_BNSC - mean_BN1C) / deviation_BN1C).flatten(2)


@torch.no_grad()
def patch_targets(
    normalized_BCTHW: Tensor,
    mask_BN: Tensor,
    mean_C111: Tensor,
    std_C111: Tensor,
    tubelet_size: int,
    patch_size: int,
) -> Tensor:
    """Labels of all tokens, of which the masked ones are taken."""
    labels_BNP = all_patch_targets(normalized_BCTHW, mean_C111, std_C111, tubelet_size, patch_size)
    return labels_BNP[mask_BN].reshape(len(mask_BN), -1, labels_BNP.shape[2])


def masked_patch_loss(
    prediction_BMP: Tensor,
    normalized_BCTHW: Tensor,
    mask_BN: Tensor,
    mean_C111: Tensor,
    std_C111: Tensor,
    tubelet_size: int,
    patch_size: int,
) -> Tensor:
    """Labels as above, which every step builds, then the squared error of each token."""
    labels_BMP = patch_targets(normalized_BCTHW, mask_BN, mean_C111, std_C111, tubelet_size, patch_size)
    return F.mse_loss(prediction_BMP.float(), labels_BMP, reduction="none").mean(dim=-1)


def head_patch_loss(
    hidden_BME: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor,
    normalized_BCTHW: Tensor,
    mask_BN: Tensor,
    mean_C111: Tensor,
    std_C111: Tensor,
    tubelet_size: int,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """The decoder's head, then the error of each token; its mean is trained, the error itself goes to the sampler."""
    sizes = (tubelet_size, patch_size)
    prediction_BMP = F.linear(hidden_BME, weight_PE, bias_P)
    error_BM = masked_patch_loss(prediction_BMP, normalized_BCTHW, mask_BN, mean_C111, std_C111, *sizes)
    return error_BM.mean(), error_BM.detach()


def sampling_loss(logits_BN: Tensor, mask_BN: Tensor, error_BM: Tensor) -> Tensor:
    """A loop over the clips, with a categorical distribution for each."""
    probabilities_BN = logits_BN.softmax(-1)
    losses = []
    for p_N, mask_N, error_M in zip(probabilities_BN, mask_BN, error_BM, strict=True):
        log_p_M = Categorical(probs=p_N).log_prob(torch.argwhere(mask_N).squeeze(1))
        losses.append(-(log_p_M * error_M.detach()).mean())
    return torch.stack(losses).mean()
