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
    """A stable sort of the mask puts visible tokens first, both kinds in ascending order."""
    batch_size, num_visible = visible_ids_BK.shape
    mask_BN = visible_ids_BK.new_ones((batch_size, num_tokens), dtype=torch.uint8).scatter(1, visible_ids_BK, 0)
    order_BN = mask_BN.argsort(dim=1, stable=True)
    slots_BN = torch.empty_like(order_BN).scatter(
        1, order_BN, torch.arange(num_tokens, device=order_BN.device).expand(batch_size, -1)
    )
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
    """Targets of the masked tokens alone, from the bytes."""
    _, rows, columns = tubelet_grid(video_BCTHW, tubelet_size, patch_size)
    clip_B1 = torch.arange(video_BCTHW.shape[0], device=video_BCTHW.device).unsqueeze(1)
    frame_BM, row_BM = masked_ids_BM // (rows * columns), masked_ids_BM // columns % rows
    view = tubelet_view(video_BCTHW, tubelet_size, patch_size).movedim(4, -1)
    pixels_BMSC = view[clip_B1, frame_BM, row_BM, masked_ids_BM % columns].flatten(2, 4).float() / 255
    variance_BM1C, mean_BM1C = torch.var_mean(pixels_BMSC, dim=2, keepdim=True)
    return ((pixels_BMSC - mean_BM1C) / (variance_BM1C.sqrt() + 1e-6)).flatten(2)


def masked_patch_loss(
    prediction_BMP: Tensor, video_BCTHW: Tensor, masked_ids_BM: Tensor, tubelet_size: int, patch_size: int
) -> Tensor:
    """Targets of the masked tokens alone, then the squared error of each."""
    targets_BMP = patch_targets(video_BCTHW, masked_ids_BM, tubelet_size, patch_size)
    return (prediction_BMP.float() - targets_BMP).square().mean(dim=2)


def sampling_loss(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor) -> Tensor:
    """All clips at once."""
    p_BM = logits_BN.float().softmax(-1).gather(1, masked_ids_BM)
    return -(p_BM.clamp(PROBABILITY_EPS, 1 - PROBABILITY_EPS).log() * error_BM).mean()
