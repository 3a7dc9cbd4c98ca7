"""Whole models in plain PyTorch with our parameter names, so that one state dict fits all arms of ``bench.step``.

:class:`PublishedLike` keeps the tensors that the published code keeps; :class:`Tuned` is the best plain PyTorch known.
So do, and are, the two classifiers of fine-tuning.

Letters: B clips, C channels, T frames, H, W pixels, N tokens, K visible, M masked, D encoder width, E decoder width,
P pixels a token, h heads, d channels of a head, K classes of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

from adamae_fast.config import MaskConfig, ModelConfig
from adamae_fast.grid import NUM_CHANNELS
from adamae_fast.masking import STRATEGIES
from adamae_fast.model.positions import sinusoid_table
from adamae_fast.model.sampler import NUM_HEADS
from adamae_fast.model.sizes import SIZES
from adamae_fast.ops.patchify import IMAGENET_MEAN, IMAGENET_STD
from adamae_fast.ops.registry import autocast_dtype
from adamae_fast.plan.work import grid_of
from bench import published, tuned

SAMPLING_WEIGHT = 1e-4
"""Of the sampling loss in the total."""

HOST = torch.device("cpu")
"""Where position tables are made, on whichever device the layers are: the published code's copy in each step is part of
what is measured. :class:`Tuned` and :class:`TunedClassifier` take theirs along when they are moved."""


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, *, qv_bias: bool, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x_BND, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1))
        q_BhNd, k_BhNd, v_BhNd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out_BhNd = F.scaled_dot_product_attention(q_BhNd, k_BhNd, v_BhNd)
        else:
            scores_BhNN = (q_BhNd * q_BhNd.shape[3] ** -0.5) @ k_BhNd.transpose(2, 3)
            out_BhNd = scores_BhNN.softmax(dim=-1) @ v_BhNd
        return self.proj(out_BhNd.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class _Block(nn.Module):
    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        fused: bool,
        qv_bias: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = _Attention(width, num_heads, qv_bias=qv_bias, fused=fused)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = _Mlp(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.dropout(self.attention(self.norm1(x_BND)))
        return x_BND + self.dropout(self.mlp(self.norm2(x_BND)))


class _Sampler(nn.Module):
    def __init__(self, model: ModelConfig, num_tokens: int, token_width: int, *, fused: bool) -> None:
        super().__init__()
        config = model.sampler
        self.positions = nn.Parameter(torch.zeros(1, num_tokens, token_width))
        if config.kind == "mlp":
            width = token_width
            self.hidden = nn.Linear(token_width, token_width)
        else:
            width = config.width or token_width
            if width != token_width:
                self.projection = nn.Linear(token_width, width)
            self.blocks = nn.Sequential(
                *(
                    _Block(width, NUM_HEADS, fused=fused, qv_bias=False, dropout=config.dropout, norm_eps=1e-5)
                    for _ in range(config.depth)
                )
            )
        self.head = nn.Linear(width, 1)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        x_BND = tokens_BND + self.positions
        for name in ("hidden", "projection", "blocks"):
            if hasattr(self, name):
                x_BND = getattr(self, name)(x_BND)
        return self.head(x_BND).flatten(1)


class _Stack(nn.Module):
    head: nn.Linear  # of the decoder alone

    def __init__(self, width: int, depth: int, num_heads: int, *, fused: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(width, num_heads, fused=fused) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)


class _Network(nn.Module):
    """Layers and tables of both models."""

    positions_ND: Tensor
    positions_NE: Tensor
    fused: bool

    def __init__(self, model: ModelConfig, mask: MaskConfig) -> None:
        super().__init__()
        self.grid = grid_of(model)
        self.sizes = (model.tubelet_size, model.patch_size)
        self.ratio, self.strategy = mask.ratio, STRATEGIES[mask.strategy]
        self.num_visible = self.strategy.num_visible(self.grid, mask.ratio)
        encoder, decoder = SIZES[model.size].encoder, SIZES[model.size].decoder
        num_tokens, patch = self.grid.num_tokens, model.patch_size
        self.tokenizer = nn.Conv3d(NUM_CHANNELS, encoder.width, (model.tubelet_size, patch, patch))
        self.sampler = None
        if self.strategy.needs_logits:
            self.sampler = _Sampler(model, num_tokens, encoder.width, fused=self.fused)
        self.encoder = _Stack(encoder.width, encoder.depth, encoder.num_heads, fused=self.fused)
        self.projection = nn.Linear(encoder.width, decoder.width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(decoder.width))
        depth = model.decoder.depth or decoder.depth
        self.decoder = _Stack(decoder.width, depth, decoder.num_heads, fused=self.fused)
        self.decoder.add_module("head", nn.Linear(decoder.width, self.grid.pixels_per_token))
        with HOST:
            self.register_buffer("positions_ND", sinusoid_table(num_tokens, encoder.width), persistent=False)
            self.register_buffer("positions_NE", sinusoid_table(num_tokens, decoder.width), persistent=False)

    def draw_uniform_ids(self, batch_size: int, device: torch.device) -> Tensor:
        """Visible ids (B, K) of a strategy without a sampler."""
        seeds_B = torch.randint(-(2**62), 2**62, (batch_size,), device=device)
        return self.strategy(self.grid, self.ratio, seeds_B, None).visible_ids_BK


class PublishedLike(_Network):
    """The published code's sequence of operations, written anew: for machines without a checkout of that code.

    Float video, a strided convolution, attention that keeps its N × N softmax, boolean masks, labels of the whole clip,
    a loop over the clips in the sampling loss. Position tables stay on the host and are copied in every step.
    """

    fused = False

    def __init__(self, model: ModelConfig, mask: MaskConfig) -> None:
        super().__init__(model, mask)
        self._tables = (self.positions_ND, self.positions_NE)
        del self.positions_ND, self.positions_NE

    @torch.no_grad()
    def labels(self, normalized_BCTHW: Tensor) -> Tensor:
        """Normalised pixels (B, N, P) of all tokens, visible ones among them."""
        constants = (torch.as_tensor(x).to(normalized_BCTHW.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
        mean_C111, std_C111 = (x[:, None, None, None] for x in constants)
        return published.all_patch_targets(normalized_BCTHW, mean_C111, std_C111, *self.sizes)

    def forward(self, normalized_BCTHW: Tensor, labels_BNP: Tensor, visible_ids: Tensor | None = None) -> Tensor:
        """Return the loss."""
        device, batch_size = normalized_BCTHW.device, normalized_BCTHW.shape[0]
        convolved = F.conv3d(
            normalized_BCTHW, self.tokenizer.weight, self.tokenizer.bias, stride=self.tokenizer.kernel_size
        )
        tokens_BND = convolved.flatten(2).transpose(1, 2)
        probabilities_BN = None
        if self.sampler is not None:
            probabilities_BN = torch.nan_to_num(self.sampler(tokens_BND)).softmax(dim=-1)
        if visible_ids is None:
            if probabilities_BN is not None:
                visible_ids = torch.multinomial(probabilities_BN, self.num_visible, replacement=False)
            else:
                visible_ids = self.draw_uniform_ids(batch_size, device)
        mask_BN = published.boolean_mask(visible_ids, self.grid.num_tokens)

        positions_ND, positions_NE = (table.to(device).clone() for table in self._tables)
        visible_BKD = published.gather_tokens(tokens_BND, positions_ND.to(tokens_BND.dtype), mask_BN)
        features_BKE = self.projection(self.encoder.norm(self.encoder.blocks(visible_BKD)))
        tokens_BNE = published.assemble_decoder(features_BKE, self.mask_token, positions_NE, mask_BN)
        hidden_BME = self.decoder.blocks(tokens_BNE)[:, self.num_visible :]
        prediction_BMP = self.decoder.head(self.decoder.norm(hidden_BME))

        labels_BMP = labels_BNP[mask_BN].reshape(batch_size, -1, labels_BNP.shape[2])
        error_BM = F.mse_loss(prediction_BMP, labels_BMP, reduction="none").mean(dim=-1)
        if probabilities_BN is None:
            return error_BM.mean()
        losses_B = torch.zeros(batch_size, device=device)
        for i in range(batch_size):
            log_p_N = Categorical(probs=probabilities_BN[i]).log_prob(torch.arange(self.grid.num_tokens).to(device))
            losses_B[i] = -(log_p_N[mask_BN[i]] * error_BM[i].detach()).mean()
        return error_BM.mean() + SAMPLING_WEIGHT * losses_B.mean()


class Tuned(_Network):
    """The same mathematics as an expert writes it: fused attention, index gathers, uint8 clips, no loop, no wait."""

    fused = True
    gather: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(tuned.gather_tokens)

    def forward(self, video_BCTHW: Tensor, visible_ids: Tensor | None = None) -> Tensor:
        """Return the loss of uint8 clips."""
        weight_DP = self.tokenizer.weight.flatten(1)
        patches_BNP = tuned.patchify(video_BCTHW, *self.sizes, autocast_dtype(weight_DP))
        tokens_BND = F.linear(patches_BNP, weight_DP, self.tokenizer.bias)
        logits_BN = None
        if self.sampler is not None:
            logits_BN = self.sampler(tokens_BND).float()
        if visible_ids is None:
            if logits_BN is not None:
                p_BN = logits_BN.detach().softmax(-1)
                visible_ids = (
                    (p_BN / torch.empty_like(p_BN).exponential_()).topk(self.num_visible, sorted=False).indices
                )
            else:
                visible_ids = self.draw_uniform_ids(video_BCTHW.shape[0], video_BCTHW.device)
        visible_ids_BK, masked_ids_BM, _ = tuned.split_tokens(visible_ids, self.grid.num_tokens)

        positions_ND = self.positions_ND.to(tokens_BND.dtype)
        visible_BKD = self.gather(tokens_BND, visible_ids_BK, positions_ND)
        features_BKE = self.projection(self.encoder.norm(self.encoder.blocks(visible_BKD)))
        dtype = features_BKE.dtype
        tokens_BNE = tuned.assemble_decoder(
            features_BKE, self.mask_token.to(dtype), self.positions_NE.to(dtype), visible_ids_BK, masked_ids_BM
        )
        hidden_BME = self.decoder.norm(self.decoder.blocks(tokens_BNE)[:, self.num_visible :])
        head = self.decoder.head
        loss, error_BM = tuned.head_patch_loss(
            hidden_BME, head.weight, head.bias, video_BCTHW, masked_ids_BM, *self.sizes
        )
        if logits_BN is None:
            return loss
        return loss + SAMPLING_WEIGHT * tuned.sampling_loss(logits_BN, masked_ids_BM, error_BM)


class _DropPath(nn.Dropout):
    """Leaves out a branch for a share ``p`` of the clips, as timm does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        keep = 1 - self.p
        return x * x.new_empty((len(x), *[1] * (x.ndim - 1))).bernoulli_(keep).div_(keep)


class _Classifier(nn.Module):
    """Layers and tables of both classifiers."""

    positions_ND: Tensor
    fused: bool

    def __init__(self, model: ModelConfig, num_classes: int, drop_path: float) -> None:
        super().__init__()
        size = SIZES[model.size].encoder
        num_tokens = grid_of(model).num_tokens
        self.sizes = (model.tubelet_size, model.patch_size)
        self.tokenizer = nn.Conv3d(NUM_CHANNELS, size.width, (model.tubelet_size, model.patch_size, model.patch_size))
        blocks = [_Block(size.width, size.num_heads, fused=self.fused) for _ in range(size.depth)]
        for block, rate in zip(blocks, torch.linspace(0, drop_path, size.depth, device=HOST).tolist(), strict=True):
            block.dropout = _DropPath(rate)
        self.encoder = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
        self.fc_norm = nn.LayerNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, num_classes)
        with HOST:
            self.register_buffer("positions_ND", sinusoid_table(num_tokens, size.width), persistent=False)

    def logits(self, tokens_BND: Tensor) -> Tensor:
        """(B, K) of tokens with their positions."""
        return self.head(self.fc_norm(self.encoder["blocks"](tokens_BND).mean(1)))


class PublishedLikeClassifier(_Classifier):
    """The published fine-tuning's sequence of operations, written anew.

    Float video, a strided convolution, attention that keeps its N × N softmax, positions copied from the host in every
    step, soft cross-entropy spelled out.
    """

    fused = False

    def __init__(self, model: ModelConfig, num_classes: int, drop_path: float) -> None:
        super().__init__(model, num_classes, drop_path)
        self._table = self.positions_ND
        del self.positions_ND

    def forward(self, normalized_BCTHW: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the loss."""
        convolved = F.conv3d(
            normalized_BCTHW, self.tokenizer.weight, self.tokenizer.bias, stride=self.tokenizer.kernel_size
        )
        tokens_BND = convolved.flatten(2).transpose(1, 2)
        positions_BND = self._table.expand(len(tokens_BND), -1, -1)
        tokens_BND = tokens_BND + positions_BND.type_as(tokens_BND).to(tokens_BND.device).clone()
        return torch.sum(-targets_BK * F.log_softmax(self.logits(tokens_BND), dim=-1), dim=-1).mean()


class TunedClassifier(_Classifier):
    """The same mathematics as an expert writes it: fused attention, uint8 clips, one product for the tubelets."""

    fused = True

    def forward(self, video_BCTHW: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the loss of uint8 clips."""
        weight_DP = self.tokenizer.weight.flatten(1)
        patches_BNP = tuned.patchify(video_BCTHW, *self.sizes, autocast_dtype(weight_DP))
        tokens_BND = F.linear(patches_BNP, weight_DP, self.tokenizer.bias)
        return F.cross_entropy(self.logits(tokens_BND + self.positions_ND.to(tokens_BND.dtype)), targets_BK)
