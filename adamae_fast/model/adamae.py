"""AdaMAE: masked auto-encoding of video with learned masks (paper Figure 2, Algorithm 2).

Shapes: B clips, C channels, T frames, H, W pixels, N tokens, K visible, M = N − K masked, D encoder width, E decoder
width, P pixels of a token. Tokens are ordered time, row, column; visible and masked ids are ascending.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from adamae_fast.config import LossConfig, MaskConfig, ModelConfig, Recompute, load_config
from adamae_fast.grid import TokenGrid
from adamae_fast.masking import STRATEGIES
from adamae_fast.masking.protocol import draw_uniform
from adamae_fast.model.block import chosen_backend, set_recompute
from adamae_fast.model.decoder import Decoder
from adamae_fast.model.encoder import Encoder
from adamae_fast.model.positions import sinusoid_table
from adamae_fast.model.sampler import build_sampler
from adamae_fast.model.sizes import SIZES
from adamae_fast.model.tokenizer import Tokenizer
from adamae_fast.ops.assemble_decoder import assemble_decoder
from adamae_fast.ops.gather_tokens import gather_tokens
from adamae_fast.ops.head_patch_loss import head_patch_loss
from adamae_fast.ops.masked_patch_loss import masked_patch_loss
from adamae_fast.ops.sample_visible import TokenSplit, check_seeds, split_tokens
from adamae_fast.ops.sampling_loss import sampling_loss
from adamae_fast.run_folder import find_weights
from adamae_fast.tensor_file import fill, read_tensors_file

_BUILDS = ("model", "mask", "loss")
"""Groups of a recipe that decide which model there is."""

_AFTERWARDS = {
    "train.recompute": "call set_recompute() of the model",
    "train.compile": "call adamae_fast.train.compile.compile_blocks(model)",
    "train.precision": "call the model within torch.autocast",
    "train.device": "call to() of the model",
    "model.layer_norm": "call adamae_fast.train.apex.use_apex_layer_norm(model)",
}
"""How to get, with a model that is built, what these keys do in pre-training."""

_DECODED = 0x243F6A8885A308D3
"""Changes a clip's seed where the tokens to be decoded are drawn, so that they do not depend on the mask's noise."""


@dataclass(frozen=True)
class AdaMAEOutput:
    """What one forward pass of :class:`AdaMAE` returns, on the model's device; losses are fp32 scalars.

    Shapes: B clips, N tokens, of which K are visible and M masked, P pixels of a token. In training mode with
    ``model.decoder.keep_ratio`` below 1, M counts the tokens in ``decoded_ids``, which may be fewer than those in
    ``masked_ids``. ``loss.backward()`` gives every parameter its gradient; error, ids and statistics are constants.
    """

    loss: Tensor
    """loss_reconstruction + loss.sampling_weight · loss_sampling."""

    loss_reconstruction: Tensor
    """Mean of ``error`` (equation 4)."""

    loss_sampling: Tensor
    """REINFORCE loss of the sampler (equation 5, with log-probabilities); zero without a sampler."""

    prediction: Tensor | None
    """(B, M, P): pixels of the masked tokens in the units of loss.target; None in training mode, where it never exists
    as a whole: the loss is fused with the layer that makes it."""

    error: Tensor
    """(B, M) fp32: error of each token in ``decoded_ids``, mean over its pixels; a constant in training mode."""

    logits: Tensor | None
    """(B, N) of the sampler, whose softmax is the probability map; None for strategies without a sampler."""

    logit_statistics: Tensor | None
    """(B, 3): largest logit, log Σ exp and entropy of the softmax in nats, NaN where a logit is not finite; None where
    no mask was drawn from logits."""

    visible_ids: Tensor
    """(B, K) int64, ascending."""

    masked_ids: Tensor
    """(B, M) int64, ascending."""

    decoded_ids: Tensor
    """The masked tokens that were decoded and compared, ascending: all of them, or in training a random share
    model.decoder.keep_ratio of each clip's."""


class AdaMAE(nn.Module):
    """The network of pre-training (paper Figure 2, Algorithm 2).

        X = tokenizer(video)                                            B clips of N tokens, width D
        p = softmax(sampler(X)); visible ~ K of N without replacement from p, the other M = N - K are masked
        prediction = head(decoder(projection(encoder(X[visible] + positions)), mask tokens + positions))
        error = mean over a token's P pixels of (prediction - target)²        (or of the absolute value)
        loss = mean(error) + loss.sampling_weight · -mean(log p[masked] · error)      (equations 4, 5)

    With ``loss.sampling_baseline``, which the paper has not, the second error is max(0, error - baseline · its mean
    over the clip's decoded tokens): at rest p is proportional to it, so the sampler looks away from what is predicted
    well.

    The strategies random, tube and frame draw the visible tokens without a sampler; then there is none, ``sampler`` is
    None, and the second term is 0. Positions are tables of sines, which are computed and no weights.

    A call takes uint8 clips (B, 3, T, H, W) and returns an :class:`AdaMAEOutput`. Parameters are fp32; under
    ``torch.autocast`` matrix products run in its dtype, logits, their statistics and losses in fp32. With given seeds a
    call is deterministic on the CPU, but for dropout in the sampler, which torch's generator draws in training mode.

    Args:
        model: sizes of the clip and of the network.
        mask: strategy and ratio; the recipe's defaults if None.
        loss: error, target, weight and baseline of the sampling loss; likewise.

    Raises ValueError for sizes that do not divide, and for a ratio that leaves nothing visible or nothing masked.
    """

    positions_ND: Tensor
    decoder_positions_NE: Tensor

    def __init__(self, model: ModelConfig, mask: MaskConfig | None = None, loss: LossConfig | None = None) -> None:
        super().__init__()
        self.mask_config = mask or MaskConfig()
        self.loss_config = loss or LossConfig()
        self.grid = TokenGrid(
            num_frames=model.num_frames,
            frame_size=model.frame_size,
            tubelet_size=model.tubelet_size,
            patch_size=model.patch_size,
        )
        self.strategy = STRATEGIES[self.mask_config.strategy]
        self.num_visible = self.strategy.num_visible(self.grid, self.mask_config.ratio)

        size = SIZES[model.size]
        width, num_tokens = size.encoder.width, self.grid.num_tokens
        decoder_size = dataclasses.replace(size.decoder, depth=model.decoder.depth or size.decoder.depth)

        self.tokenizer = Tokenizer(self.grid, width)
        self.sampler = (
            build_sampler(model.sampler, num_tokens, width, model.attention.sampler)
            if self.strategy.needs_logits
            else None
        )
        self.detach_tokens = model.sampler.detach_tokens
        self.keep_ratio = model.decoder.keep_ratio
        self.encoder = Encoder(size.encoder, model.attention.encoder)
        self.projection = nn.Linear(width, decoder_size.width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(decoder_size.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder = Decoder(decoder_size, self.grid.pixels_per_token, model.attention.decoder)
        self.register_buffer("positions_ND", sinusoid_table(num_tokens, width), persistent=False)
        self.register_buffer("decoder_positions_NE", sinusoid_table(num_tokens, decoder_size.width), persistent=False)

    @classmethod
    def from_config(cls, path: str | Path, **overrides: object) -> Self:
        """Build the model that a recipe describes, with fresh weights: ``from_config(path, **{"mask.ratio": 0.9})``.

        Only ``model.``, ``mask.`` and ``loss.`` decide it. What else a recipe says acts in pre-training and is passed
        over, so that every recipe builds a plain model on the CPU; on the model itself it is to be had by

        * ``train.recompute``: :meth:`set_recompute`;
        * ``train.compile``: ``adamae_fast.train.compile.compile_blocks(model)``;
        * ``train.precision``: ``torch.autocast`` around the call; ``train.device``: ``model.to(device)``;
        * ``model.layer_norm=apex``: ``adamae_fast.train.apex.use_apex_layer_norm(model)``.

        Raises ValueError for a recipe that cannot be read, and for an override that would have no effect here.
        """
        config = load_config(path, overrides)
        for key, value in overrides.items():
            if key.partition(".")[0] not in _BUILDS or key == "model.layer_norm":
                remedy = _AFTERWARDS.get(key, "leave it out")
                raise ValueError(f"{key}={value!r} acts in pre-training and has no effect on from_config: {remedy}")
        return cls(config.model, config.mask, config.loss)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Load a checkpoint folder, or the newest checkpoint of a run's folder.

        Raises ValueError where the folder holds no checkpoint or the weights do not fit, as those of a classifier.
        Files of the published code, VideoMAE and transformers are first brought into this layout by
        ``adamae-fast convert``.
        """
        weights_file, recipe = find_weights(path)
        weights = read_tensors_file(weights_file)
        if "head.weight" in weights:
            raise ValueError(f"{weights_file.parent} is a classifier; load it with VideoClassifier.from_pretrained")
        model = cls.from_config(recipe)
        fill(model, weights, weights_file)
        return model

    def load_weights(self, path: str | Path) -> None:
        """Replace this model's weights by those of a checkpoint or run folder. Raises ValueError if they do not fit."""
        weights_file, _ = find_weights(path)
        fill(self, read_tensors_file(weights_file), weights_file)

    def attention_backends(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """Return the attention back end that training on ``device``, with products in ``dtype``, takes for each part.

        Raises ValueError that names the key and each reason if one that ``model.attention`` asks for cannot run there.
        """
        num_tokens = self.grid.num_tokens
        num_decoded = self._num_decoded(num_tokens - self.num_visible)
        tokens = {"encoder": self.num_visible, "sampler": num_tokens, "decoder": self.num_visible + num_decoded}
        chosen = {part: chosen_backend(part, getattr(self, part), n, device, dtype) for part, n in tokens.items()}
        return {part: name for part, name in chosen.items() if name is not None}

    def set_recompute(self, policy: Recompute) -> None:
        """Choose what the backward computes again instead of keeping it; weights and results stay what they are.

        The policies are those of :class:`~adamae_fast.model.block.Block`; a fresh model has "none". Raises ValueError
        for another name.
        """
        set_recompute(self, policy)

    def forward(self, video: Tensor, visible_ids: Tensor | None = None, seeds: Tensor | None = None) -> AdaMAEOutput:
        """Mask, encode, decode and compare.

        Args:
            video: uint8 (B, 3, T, H, W).
            visible_ids: forced visible ids (B, K) in any order; drawn by the masking strategy if None.
            seeds: int64 (B,), what each clip's mask and decoded tokens are drawn from; torch's own generator draws them
                if None.

        Raises ValueError for a video of another shape or dtype, for seeds that are not int64 (B,), for ids that are out
        of range or named twice, and for any of the three that is no tensor.
        """
        self._check_video(video)
        tokens_BND = self.tokenizer(video)
        logits_BN = None
        if self.sampler is not None:
            logits_BN = self.sampler(tokens_BND.detach() if self.detach_tokens else tokens_BND)
        if seeds is None:
            seeds = torch.randint(-(2**63), 2**63 - 1, (video.shape[0],), device=video.device)
        check_seeds(seeds, video.shape[0], video.device)
        split = self._split(video, logits_BN, visible_ids, seeds)
        decoded_ids_BM = self._choose_decoded(split.masked_ids_BM, seeds)

        visible_BKD = gather_tokens(tokens_BND, split.visible_ids_BK, split.slots_BN, self.positions_ND)
        features_BKE = self.projection(self.encoder(visible_BKD))
        decoder_input_BNE = assemble_decoder(
            features_BKE, self.mask_token, self.decoder_positions_NE, split.visible_ids_BK, decoded_ids_BM
        )
        hidden_BME = self.decoder(decoder_input_BNE, decoded_ids_BM.shape[1])
        loss_reconstruction, error_BM, prediction_BMP = self._compare(hidden_BME, video, decoded_ids_BM)
        loss = loss_reconstruction
        loss_sampling = torch.zeros_like(loss_reconstruction)
        if logits_BN is not None:
            loss_sampling = sampling_loss(logits_BN, decoded_ids_BM, self._error_for_sampler(error_BM.detach())).mean()
            loss = loss_reconstruction + self.loss_config.sampling_weight * loss_sampling
        return AdaMAEOutput(
            loss=loss,
            loss_reconstruction=loss_reconstruction,
            loss_sampling=loss_sampling,
            prediction=prediction_BMP,
            error=error_BM,
            logits=logits_BN,
            logit_statistics=split.statistics_B3,
            visible_ids=split.visible_ids_BK,
            masked_ids=split.masked_ids_BM,
            decoded_ids=decoded_ids_BM,
        )

    def _error_for_sampler(self, error_BM: Tensor) -> Tensor:
        """What p is to be proportional to: the error, or what is above the baseline."""
        baseline = self.loss_config.sampling_baseline
        if baseline == 0:
            return error_BM
        return (error_BM - baseline * error_BM.mean(1, keepdim=True)).clamp_min(0)

    def _choose_decoded(self, masked_ids_BM: Tensor, seeds_B: Tensor) -> Tensor:
        """The masked tokens to be decoded: in training a random share of each clip's, at least one.

        Each is as likely to be chosen as any other, so a mean over them has the mean over all as its expectation: the
        losses need no factor.
        """
        num_masked = masked_ids_BM.shape[1]
        num_decoded = self._num_decoded(num_masked)
        if not self.training or num_decoded == num_masked:
            return masked_ids_BM
        return masked_ids_BM.gather(1, draw_uniform(seeds_B ^ _DECODED, num_masked, num_decoded).visible_ids_BK)

    def _num_decoded(self, num_masked: int) -> int:
        return max(1, round(self.keep_ratio * num_masked))

    def _compare(self, hidden_BME: Tensor, video: Tensor, ids_BM: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean error, error of each masked token, and the prediction where it exists."""
        head = self.decoder.head
        settings: dict[str, Any] = {
            "tubelet_size": self.grid.tubelet_size,
            "patch_size": self.grid.patch_size,
            "target": self.loss_config.target,
            "error": self.loss_config.error,
        }
        if self.training:
            return *head_patch_loss(hidden_BME, head.weight, head.bias, video, ids_BM, **settings), None
        prediction_BMP = head(hidden_BME)
        error_BM = masked_patch_loss(prediction_BMP, video, ids_BM, **settings)
        return error_BM.mean(), error_BM, prediction_BMP

    def _split(self, video: Tensor, logits_BN: Tensor | None, visible_ids: Tensor | None, seeds: Tensor) -> TokenSplit:
        if visible_ids is not None:
            if not isinstance(visible_ids, Tensor):
                raise ValueError(f"visible_ids is a {type(visible_ids).__name__}; pass an int64 torch.Tensor (B, K)")
            if visible_ids.shape[0] != video.shape[0]:
                raise ValueError(
                    f"visible_ids has {visible_ids.shape[0]} rows for {video.shape[0]} clips; give one each"
                )
            if visible_ids.shape[1:] == (self.grid.num_tokens,):
                raise ValueError(
                    f"visible_ids names all {self.grid.num_tokens} tokens; leave at least one to be masked"
                )
            # On the CPU, where their values can be checked: forced ids are for tests and pictures, not for training.
            split = split_tokens(visible_ids.cpu(), self.grid.num_tokens)
            return TokenSplit(*(ids.to(video.device) for ids in split[:3]))
        return self.strategy(self.grid, self.mask_config.ratio, seeds, logits_BN)

    def _check_video(self, video: Tensor) -> None:
        if not isinstance(video, Tensor):
            raise ValueError(f"video is a {type(video).__name__}; pass a torch.Tensor; torch.as_tensor makes one")
        if video.dtype != torch.uint8:
            raise ValueError(f"video has dtype {video.dtype}; pass uint8 clips with values 0 to 255, not normalised")
        if video.ndim != 5 or tuple(video.shape[1:]) != self.grid.video_shape:
            raise ValueError(
                f"video has shape {tuple(video.shape)}; this model takes uint8 clips of shape "
                f"(B, {', '.join(map(str, self.grid.video_shape))}): resize the clip, or build the model with other "
                "model.num_frames and model.frame_size"
            )
