"""The best plain PyTorch of each operation: index gathers, no loop, nothing that waits. torch.compile gets these.

Letters: B clips, C channels, T frames, H, W pixels, N tokens, K visible, M masked, D, E widths, P pixels a token,
S pixels of one channel of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adamae_fast.ops.patchify import IMAGENET_MEAN, IMAGENET_STD, tubelet_grid, tubelet_view
from adamae_fast.ops.sampling_loss import PROBABILITY_EPS


def patchify(video_BCTHW: Tensor, tubelet_size: int, patch_size: int, dtype: torch.dtype) -> Tensor:
    """One pass over the clip: a compiler makes one loop of it."""
    channels = tubelet_view(video_BCTHW, tubelet_size, patch_size).unbind(4)
    pixels = [(x.float() / 255 - m) / s for x, m, s in zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    return torch.stack(pixels, dim=4).to(dtype).flatten(4).flatten(1, 3)


def embed_tubelets(video_BCTHW: Tensor, weight_DCthw: Tensor, bias_D: Tensor) -> Tensor:
    """The convolution as a matrix product."""
    _, _, tubelet_size, patch_size, _ = weight_DCthw.shape
    return F.linear(
        patchify(video_BCTHW, tubelet_size, patch_size, weight_DCthw.dtype), weight_DCthw.flatten(1), bias_D
    )


def split_tokens(visible_ids_BK: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Running counts of visible tokens give every token its slot; on the CPU faster than a stable sort of the mask."""
    batch_size, num_visible = visible_ids_BK.shape
    token_N = torch.arange(num_tokens, device=visible_ids_BK.device)
    is_visible_BN = visible_ids_BK.new_zeros((batch_size, num_tokens)).scatter(1, visible_ids_BK, 1)
    count_BN = is_visible_BN.cumsum(1)
    slots_BN = torch.where(is_visible_BN > 0, count_BN - 1, num_visible + token_N - count_BN)
    order_BN = torch.empty_like(slots_BN).scatter(1, slots_BN, token_N.expand(batch_size, -1))
    return order_BN[:, :num_visible], order_BN[:, num_visible:], slots_BN


def sample_visible(logits_BN: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K largest of p / Exponential(1) are a draw without replacement."""
    p_BN = logits_BN.softmax(-1)
    visible_ids_BK = (p_BN / torch.empty_like(p_BN).exponential_()).topk(num_visible, sorted=False).indices
    return split_tokens(visible_ids_BK, logits_BN.shape[1])


def gather_tokens(tokens_BND: Tensor, ids_BK: Tensor, positions_ND: Tensor) -> Tensor:
    """Rows by index."""
    picked_BKD = tokens_BND.gather(1, ids_BK.unsqueeze(2).expand(-1, -1, tokens_BND.shape[2]))
    return picked_BKD + positions_ND[ids_BK]


def assemble_decoder(
    visible_BKE: Tensor, mask_token_E: Tensor, positions_NE: Tensor, visible_ids_BK: Tensor, masked_ids_BM: Tensor
) -> Tensor:
    """Rows by index, one concatenation."""
    return torch.cat([visible_BKE + positions_NE[visible_ids_BK], mask_token_E + positions_NE[masked_ids_BM]], dim=1)


def patch_targets(video_BCTHW: Tensor, masked_ids_BM: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """Targets of the masked tokens alone, from the bytes; a compiler makes twice as fast a loop of single channels."""
    _, rows, columns = tubelet_grid(video_BCTHW, tubelet_size, patch_size)
    clip_B1 = torch.arange(video_BCTHW.shape[0], device=video_BCTHW.device).unsqueeze(1)
    place_BM = (clip_B1, masked_ids_BM // (rows * columns), masked_ids_BM // columns % rows, masked_ids_BM % columns)
    targets = []
    for channel in tubelet_view(video_BCTHW, tubelet_size, patch_size).unbind(4):
        pixels_BMS = channel[place_BM].flatten(2).float() / 255
        variance_BM1, mean_BM1 = torch.var_mean(pixels_BMS, dim=2, keepdim=True)
        targets.append((pixels_BMS - mean_BM1) / (variance_BM1.sqrt() + 1e-6))
    return torch.stack(targets, dim=3).flatten(2)


def masked_patch_loss(
    prediction_BMP: Tensor, video_BCTHW: Tensor, masked_ids_BM: Tensor, tubelet_size: int, patch_size: int
) -> Tensor:
    """Targets of the masked tokens alone, then the squared error of each."""
    targets_BMP = patch_targets(video_BCTHW, masked_ids_BM, tubelet_size, patch_size)
    return (prediction_BMP.float() - targets_BMP).square().mean(dim=2)


def head_patch_loss(
    hidden_BME: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor,
    video_BCTHW: Tensor,
    masked_ids_BM: Tensor,
    tubelet_size: int,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """The head on all masked tokens, then the error of each."""
    prediction_BMP = F.linear(hidden_BME, weight_PE, bias_P)
    error_BM = masked_patch_loss(prediction_BMP, video_BCTHW, masked_ids_BM, tubelet_size, patch_size)
    return error_BM.mean(), error_BM.detach()


def sampling_loss(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor) -> Tensor:
    """All clips at once."""
    p_BM = logits_BN.float().softmax(-1).gather(1, masked_ids_BM)
    return -(p_BM.clamp(PROBABILITY_EPS, 1 - PROBABILITY_EPS).log() * error_BM).mean()
