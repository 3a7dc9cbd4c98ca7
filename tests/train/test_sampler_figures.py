"""Each figure against plain loops over clips and tokens, in fp64."""

import math

import pytest
import torch

from adamae_fast.ops.sampling_loss import PROBABILITY_EPS
from adamae_fast.train.sampler_figures import LOSSES, OF_SAMPLER, describe_output, figure_names, lift
from adamae_fast.train.step import mask_seeds
from tests.train.test_step import build, clips, run_step


def spread(stepper, factor):
    """With a factor of 5, let p reach from nearly 1 to below the clamp of the sampling loss."""
    with torch.no_grad():
        stepper.model.sampler.positions.normal_(generator=torch.Generator().manual_seed(0))
        stepper.model.sampler.head.weight.mul_(factor)


def half_easy(num_clips, seed=0):
    """Noise, but for the left half, which is black: its tokens have smaller errors."""
    video = clips(num_clips, seed)
    video[..., :16] = 0
    return video


def outputs_of(stepper):
    seen = []
    stepper.model.register_forward_hook(lambda module, arguments, output: seen.append(output))
    return seen


def truth(output, grid):
    """The figures of one forward pass."""
    shares = [0.0] * grid.shape[0]
    num_visible = output.visible_ids.numel()
    for ids in output.visible_ids.tolist():
        for token in ids:
            shares[token // (grid.shape[1] * grid.shape[2])] += 1 / num_visible
    figures = {f"visible_in_time/{slot}": share for slot, share in enumerate(shares)}
    figures |= {name: float(getattr(output, name).detach()) for name in LOSSES}
    if output.logits is None:
        return figures
    entropies, largest, lifts, clamped, num_masked = [], [], [], 0, 0
    for clip, logits in enumerate(output.logits.detach().double().tolist()):
        weights = [math.exp(logit - max(logits)) for logit in logits]
        p = [weight / sum(weights) for weight in weights]
        entropies.append(-sum(q * math.log(q) for q in p if q > 0))
        largest.append(max(p))
        decoded, errors = output.decoded_ids[clip].tolist(), output.error[clip].double().tolist()
        favoured = sum(p[i] * r for i, r in zip(decoded, errors, strict=True)) / sum(p[i] for i in decoded)
        lifts.append(favoured / (sum(errors) / len(errors)))
        masked = output.masked_ids[clip].tolist()
        clamped += sum(p[i] < PROBABILITY_EPS for i in masked)
        num_masked += len(masked)
    num_clips = len(lifts)
    values = (sum(entropies) / num_clips, sum(largest) / num_clips, sum(lifts) / num_clips, clamped / num_masked)
    return figures | dict(zip(OF_SAMPLER, values, strict=True))


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_figures_are_those_of_plain_loops(keep_ratio, factor):
    stepper = build(keep_ratio=keep_ratio)
    spread(stepper, factor)
    seen = outputs_of(stepper)
    figures = run_step(stepper, half_easy(16))
    (output,) = seen
    assert output.decoded_ids.shape == (16, 4 * keep_ratio)
    expected = truth(output, stepper.model.grid)
    assert {name: figures[name] for name in figure_names(stepper.model)} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (0.1 < figures["clamped_share"] < 1) == (factor == 5.0)
    assert figures["error_lift"] != pytest.approx(1, abs=0.05)


def test_figures_of_a_step_are_means_over_its_micro_batches():
    stepper = build(accumulate=2, keep_ratio=0.5)
    spread(stepper, 3.0)
    seen = outputs_of(stepper)
    figures = run_step(stepper, half_easy(4), half_easy(4, seed=1))
    one, two = (truth(output, stepper.model.grid) for output in seen)
    assert one["error_lift"] != two["error_lift"]
    for name in one:
        assert figures[name] == pytest.approx((one[name] + two[name]) / 2, rel=1e-5), name


@pytest.mark.parametrize("strategy", ["random", "tube", "frame"])
def test_strategies_without_a_sampler_report_their_masks_only(strategy):
    stepper = build(strategy=strategy)
    seen = outputs_of(stepper)
    figures = run_step(stepper, clips())
    assert set(figures) == {*LOSSES, "visible_in_time/0", "visible_in_time/1", "grad_norm"}
    assert figures["loss_sampling"] == 0
    expected = truth(seen[0], stepper.model.grid)
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["visible_in_time/0"] + figures["visible_in_time/1"] == pytest.approx(1)


def test_visible_tokens_of_one_moment_are_counted_there():
    stepper = build(strategy="frame")
    output = stepper.model(clips(2), visible_ids=torch.tensor([[4, 5], [6, 7]]))
    figures = dict(zip(figure_names(stepper.model), describe_output(output, stepper.model.grid).tolist(), strict=True))
    assert (figures["visible_in_time/0"], figures["visible_in_time/1"]) == (0, 1)


def test_lift_of_uniform_logits_is_one_and_of_a_certain_token_its_value_over_the_mean():
    values_BM = torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert lift(torch.full((3, 3), 7.0), values_BM).tolist() == pytest.approx([1, 1, 1])
    certain = torch.tensor([-1e4, -1e4, 0.0]).expand(3, 3)
    assert lift(certain, values_BM).tolist() == pytest.approx([2.5, 1, 1])


def test_figures_stay_numbers_where_all_probability_lies_on_visible_tokens():
    """Of masked tokens p is then 0 in fp32; a figure that is no number would stop the run."""
    stepper = build()
    seen = outputs_of(stepper)
    with torch.no_grad():
        stepper.model.sampler.positions.normal_(generator=torch.Generator().manual_seed(0))
        stepper.model.sampler.head.weight.mul_(1e6)
    figures = run_step(stepper, clips())
    assert all(map(math.isfinite, figures.values()))
    assert figures["clamped_share"] == 1
    p_BN = seen[0].logits.softmax(1)
    assert p_BN.gather(1, seen[0].masked_ids).sum() == 0


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-5), ("fp16", 0.05)])
def test_norm_of_the_samplers_gradients_is_unscaled_and_before_clipping(precision, rel):
    stepper, other = build(precision=precision, optim={"clip_grad_norm": 1e-6}), build()
    other.model.double()
    other.model(clips(), seeds=mask_seeds(0, 0, 0, 4)).loss.backward()
    gradients = [p.grad.flatten() for name, p in other.model.named_parameters() if name.startswith("sampler.")]
    expected = float(torch.cat(gradients).norm())
    figures = run_step(stepper, clips())
    assert figures["sampler_grad_norm"] == pytest.approx(expected, rel=rel)
    assert 0 < figures["sampler_grad_norm"] < figures["grad_norm"]
