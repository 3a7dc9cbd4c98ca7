"""model.decoder.keep_ratio: training decodes a random part of the masked tokens."""

import math

import pytest
import torch

from adamae_fast.config import DecoderConfig, SamplerConfig
from adamae_fast.model import adamae
from adamae_fast.ops.masked_patch_loss import masked_patch_loss
from adamae_fast.ops.sampling_loss import sampling_loss
from tests.model.test_adamae import build, video

SEEDS = torch.tensor([3, -5])


def keeping(keep_ratio, **options):
    return build(decoder=DecoderConfig(keep_ratio=keep_ratio), **options)


@pytest.mark.parametrize("strategy", ["adaptive", "random", "tube", "frame"])
def test_training_decodes_a_part_of_what_it_would_have_masked_anyway(strategy):
    part, whole = (keeping(ratio, mask={"strategy": strategy})(video(), seeds=SEEDS) for ratio in (0.3, 1.0))
    assert torch.equal(part.visible_ids, whole.visible_ids)
    assert torch.equal(part.masked_ids, whole.masked_ids)
    assert torch.equal(whole.decoded_ids, whole.masked_ids)
    assert part.decoded_ids.shape == part.error.shape == (2, round(0.3 * whole.masked_ids.shape[1]))
    assert (part.decoded_ids.diff() > 0).all()
    for decoded, masked in zip(part.decoded_ids, part.masked_ids, strict=True):
        assert torch.isin(decoded, masked).all()
    part.loss.backward()


def test_the_same_seeds_choose_the_same_tokens_and_others_do_not():
    model = keeping(0.5, mask={"strategy": "random"})
    first, again, other = (model(video(), seeds=seeds).decoded_ids for seeds in (SEEDS, SEEDS, SEEDS + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_at_least_one_token_is_decoded():
    assert keeping(1e-9)(video()).decoded_ids.shape == (2, 1)


def test_forced_masks_are_decoded_in_part_too():
    model, visible_ids = keeping(0.5), torch.arange(10).expand(2, -1)
    assert model(video(), visible_ids=visible_ids, seeds=SEEDS).decoded_ids.shape == (2, 11)


def test_eval_mode_decodes_all():
    output = keeping(0.3).eval()(video())
    assert torch.equal(output.decoded_ids, output.masked_ids)
    assert output.prediction.shape[:2] == output.error.shape == (2, 24)


def test_losses_are_means_over_the_decoded_tokens_alone():
    """By hand: a decoder that is given these tokens and no others."""
    model = keeping(0.5, sampler=SamplerConfig(dropout=0.0))
    output = model(video(), seeds=SEEDS)
    rows = torch.arange(2)[:, None]
    tokens = model.tokenizer(video()) + model.positions_ND
    features = model.projection(model.encoder(tokens[rows, output.visible_ids]))
    shown = features + model.decoder_positions_NE[output.visible_ids]
    hidden = model.mask_token + model.decoder_positions_NE[output.decoded_ids]
    prediction = model.decoder.head(model.decoder(torch.cat((shown, hidden), dim=1), hidden.shape[1]))
    settings = {"tubelet_size": 2, "patch_size": 8, "target": "normalized", "error": "mse"}
    error = masked_patch_loss(prediction, video(), output.decoded_ids, **settings)
    torch.testing.assert_close(output.error, error)
    torch.testing.assert_close(output.loss_reconstruction, error.mean())
    log_p = output.logits.log_softmax(1).gather(1, output.decoded_ids)
    torch.testing.assert_close(output.loss_sampling, -(log_p * error).mean())


def test_sampling_loss_and_its_gradient_are_unbiased():
    """Of given errors: the mean over many choices is the value for all masked tokens, within five standard errors."""
    num_choices, num_tokens, num_masked = 20000, 12, 9
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, num_tokens, dtype=torch.float64, generator=generator)
    error = torch.rand(1, num_tokens, dtype=torch.float64, generator=generator)
    masked = torch.tensor([[0, 1, 2, 4, 5, 7, 8, 10, 11]])

    def loss_and_gradient(ids):
        leaf = logits.expand(len(ids), -1).clone().requires_grad_()
        loss = sampling_loss(leaf, ids, error.expand(len(ids), -1).gather(1, ids))
        loss.sum().backward()
        return torch.cat((loss.detach()[:, None], leaf.grad), dim=1)

    choices = keeping(0.4)._choose_decoded(masked.expand(num_choices, -1), torch.arange(num_choices))
    assert choices.shape[1] == round(0.4 * num_masked)
    estimates, truth = loss_and_gradient(choices), loss_and_gradient(masked)[0]
    standard_error = estimates.std(0) / math.sqrt(num_choices)
    assert (standard_error > 0).all()
    assert ((estimates.mean(0) - truth).abs() < 5 * standard_error).all()


def dependence(model, num_clips=20000):
    """Pearson's statistic of (visible token, decoded place) against independence; one of each in a clip."""
    seeds = torch.arange(num_clips)
    split = model.strategy(model.grid, 0.96, seeds, torch.zeros(num_clips, 32))
    assert split.visible_ids_BK.shape[1] == 1
    decoded = model._choose_decoded(split.masked_ids_BM, seeds)
    place = (split.masked_ids_BM == decoded).double().argmax(1)
    counts = (split.visible_ids_BK[:, 0] * 31 + place).bincount(minlength=32 * 31).view(32, 31)
    expected = num_clips / (32 * 31)
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_choice_does_not_depend_on_the_mask(monkeypatch):
    degrees = 32 * 31 - 1
    critical = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3  # at 1e-4
    model = keeping(1e-9)
    assert dependence(model) < critical
    monkeypatch.setattr(adamae, "_DECODED", 0)
    assert dependence(model) > critical
