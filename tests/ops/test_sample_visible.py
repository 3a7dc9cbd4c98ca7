import itertools
import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from adamae_fast.ops import sample_visible as module
from adamae_fast.ops.sample_visible import (
    NonFiniteLogitsError,
    TokenSplit,
    gumbel_noise,
    sample_visible,
    split_tokens,
)
from adamae_fast.testing import ODD_SHAPES, InputFactory, OpShape, scattered_in_memory

pytestmark = pytest.mark.usefixtures("each_impl")


def assert_is_split(split: TokenSplit, visible_ids: list[list[int]], num_tokens: int) -> None:
    """Everything that follows from the visible ids, spelled out in Python."""
    for x in split[:3]:
        assert x.dtype == torch.int64
    assert split.visible_ids_BK.tolist() == [sorted(ids) for ids in visible_ids]
    assert split.masked_ids_BM.tolist() == [sorted(set(range(num_tokens)) - set(ids)) for ids in visible_ids]
    for slots, *order in zip(*(x.tolist() for x in (split.slots_BN, *split[:2])), strict=True):
        joined = order[0] + order[1]
        assert [joined.index(n) for n in range(num_tokens)] == slots


def draw_one_after_another(keys: Tensor, num_visible: int) -> list[list[int]]:
    drawn = []
    for row in keys.tolist():
        left = list(range(len(row)))
        for _ in range(num_visible):
            left.remove(max(left, key=lambda n: (row[n], -n)))
        drawn.append([n for n in range(len(row)) if n not in left])
    return drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [OpShape(batch_size=8), *ODD_SHAPES])
def test_equals_a_sequential_draw_with_the_same_noise(shape: OpShape, dtype: torch.dtype) -> None:
    factory = InputFactory(shape, dtype=dtype)
    logits, seeds = factory.logits(), factory.seeds()
    keys = logits.to(torch.float64 if dtype == torch.float64 else torch.float32) + gumbel_noise(seeds, shape.num_tokens)
    expected = draw_one_after_another(keys, shape.num_visible)
    for layout in (torch.Tensor.contiguous, scattered_in_memory):
        split = sample_visible(layout(logits), layout(seeds), shape.num_visible)
        assert_is_split(split, expected, shape.num_tokens)


def test_ties_go_to_the_lower_index() -> None:
    num_tokens = 1568  # enough tokens for a sort that is not stable to shuffle them
    keys = torch.randint(1, 5, (3, num_tokens), generator=torch.Generator().manual_seed(0)) * 2.0**30  # noise is lost
    split = sample_visible(keys, torch.arange(3), 500)
    assert split.visible_ids_BK.tolist() == draw_one_after_another(keys, 500)


def test_fp64_keys_are_not_rounded_to_fp32() -> None:
    logits = torch.tensor([[2.0**60, 2.0**60 + 512]], dtype=torch.float64)
    assert sample_visible(logits, torch.zeros(1, dtype=torch.int64), 1).visible_ids_BK.tolist() == [[1]]


def test_keys_of_bf16_logits_are_fp32() -> None:
    seeds = torch.arange(4)
    keys = 100 + gumbel_noise(seeds, 200)
    expected = draw_one_after_another(keys, 100)
    assert expected != draw_one_after_another(keys.bfloat16(), 100)
    assert sample_visible(torch.full_like(keys, 100).bfloat16(), seeds, 100).visible_ids_BK.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_statistics_describe_the_distribution(dtype: torch.dtype) -> None:
    logits = 4 * InputFactory(OpShape(grid=(8, 14, 14)), dtype=dtype).logits()
    statistics = sample_visible(logits, torch.arange(2), 78).statistics_B3
    assert statistics.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    categorical = torch.distributions.Categorical(logits=logits.double())
    truth = torch.stack([logits.double().amax(1), logits.double().logsumexp(1), categorical.entropy()], dim=1)
    torch.testing.assert_close(statistics.double(), truth, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_refused(value: float) -> None:
    logits = torch.zeros(3, 70)
    logits[1, 66] = value
    with pytest.raises(NonFiniteLogitsError, match=f"logits of clip 1 hold {value} at token 66"):
        sample_visible(logits, torch.arange(3), 4)
    logits[1] = -math.inf
    with pytest.raises(NonFiniteLogitsError, match="logits of clip 1 hold -inf at token 0"):
        sample_visible(logits, torch.arange(3), 4)


def test_logits_whose_distance_overflows_are_refused() -> None:
    with pytest.raises(NonFiniteLogitsError, match=r"logits of clip 1 reach from -3e\+38 to 3e\+38"):
        sample_visible(torch.tensor([[0.0, 1.0], [3e38, -3e38]]), torch.arange(2), 1)


def test_a_clips_draw_depends_on_its_seed_alone() -> None:
    """Not on the batch it is in, nor on its place there."""
    logits, seeds = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)), torch.tensor([3, -1, 2**62, 3, 0])
    whole = sample_visible(logits, seeds, 20).visible_ids_BK
    for b in range(5):
        assert torch.equal(sample_visible(logits[b : b + 1], seeds[b : b + 1], 20).visible_ids_BK[0], whole[b])


def test_passes_no_gradient() -> None:
    factory = InputFactory(OpShape())
    split = sample_visible(factory.logits().requires_grad_(), factory.seeds(), 4)
    assert not any(x.requires_grad for x in split)


# Statistics. The critical value is Wilson and Hilferty's approximation of the chi-square quantile at 1e-4. Seeds are
# fixed, so the tests are deterministic, and each also shows that another distribution is found out.


def chi_square_critical(degrees: int) -> float:
    upper_normal_quantile = 3.719  # of 1 - 1e-4
    term = 2 / (9 * degrees)
    return degrees * (1 - term + upper_normal_quantile * math.sqrt(term)) ** 3


def draw(p: Tensor, num_visible: int, clips: int) -> Tensor:
    return sample_visible(p.log().float().expand(clips, -1), torch.arange(clips), num_visible).visible_ids_BK


def test_inclusion_frequencies_match_torch_multinomial() -> None:
    """Pearson's statistic is conservative here: drawing without replacement varies less than chi-square assumes."""
    num_tokens, num_visible, clips = 12, 4, 20000
    p = torch.linspace(0, 4, num_tokens).exp()
    generator = torch.Generator().manual_seed(0)
    theirs = torch.multinomial(p.expand(clips, -1), num_visible, replacement=False, generator=generator).flatten()

    def statistic(p: Tensor) -> float:
        a, b = (x.bincount(minlength=num_tokens) for x in (draw(p, num_visible, clips).flatten(), theirs))
        return float(((a - b) ** 2 / (a + b)).sum())

    assert statistic(p) < chi_square_critical(num_tokens - 1) < statistic(p**1.05)


def test_visible_sets_have_the_probability_of_a_sequential_draw() -> None:
    """Whole sets, against their exact probability: the sum over all orders of drawing one token after another."""
    p = torch.tensor([0.4, 0.25, 0.15, 0.12, 0.05, 0.03], dtype=torch.float64)
    num_visible, clips = 3, 20000
    sets = list(itertools.combinations(range(len(p)), num_visible))
    expected = []
    for ids in sets:
        probability = 0.0
        for order in itertools.permutations(ids):
            left, chance = 1.0, 1.0
            for n in order:
                chance *= float(p[n]) / left
                left -= float(p[n])
            probability += chance
        expected.append(clips * probability)
    assert sum(expected) == pytest.approx(clips)

    def statistic(p: Tensor) -> float:
        codes = draw(p, num_visible, clips).double() @ torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
        observed = [int((codes == 100 * a + 10 * b + c).sum()) for a, b, c in sets]
        return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))

    assert statistic(p) < chi_square_critical(len(sets) - 1) < statistic(p**1.05)


def test_gumbel_noise_has_gumbels_distribution_in_every_clip_and_place() -> None:
    noise = gumbel_noise(torch.arange(200), 500)
    assert noise.dtype == torch.float32
    x = torch.linspace(-1.5, 6, 16)
    truth = torch.exp(-torch.exp(-x.double()))
    within = 1.95  # Kolmogorov's quantile at 1e-3
    for values in (noise.flatten(), *noise[::50], *noise.T[::100]):
        cumulative = (values.flatten() <= x[:, None]).double().mean(1)
        assert (cumulative - truth).abs().max() < within / math.sqrt(values.numel())


def test_gumbel_noise_is_the_formula_on_the_bits_of_philox() -> None:
    """Known answers of Random123's Philox4x32-10 for the counters 0 and 1 and the key 0, then the formula in fp64."""
    bits = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    v = ((bits >> 1).double() + 0.5) / 2**31
    truth = -(-(1 - v).log()).log()
    noise = gumbel_noise(torch.zeros(1, dtype=torch.int64), 6)
    torch.testing.assert_close(noise[0, :4].double(), truth, rtol=0, atol=2e-6)
    assert not set(noise[0, 4:].tolist()) & set(noise[0, :4].tolist())


def test_the_logarithm_of_the_noise_is_right_everywhere() -> None:
    """The tails included: at most 2e-6 off, and finite for every word of random bits."""
    ends = torch.arange(5000)
    bits = torch.cat([torch.arange(0, 2**32, 65521), ends, 2**32 - 1 - ends])
    with patch.object(module, "_philox", lambda seeds, num_tokens: bits[None]):
        noise = gumbel_noise(torch.zeros(1, dtype=torch.int64), len(bits))[0].double()
    v = ((bits >> 1).double() + 0.5) / 2**31
    torch.testing.assert_close(noise, -(-torch.log1p(-v)).log(), rtol=0, atol=2e-6)
    assert noise.min() > -3.2
    assert noise.max() < 22.2


def test_split_tokens_sorts_and_completes() -> None:
    ids = [[5, 0, 3], [2, 1, 6]]
    assert_is_split(split_tokens(torch.tensor(ids), 7), ids, 7)
    assert_is_split(split_tokens(scattered_in_memory(torch.tensor(ids)), 7), ids, 7)
    everything = [[2, 0, 1]]
    assert_is_split(split_tokens(torch.tensor(everything), 3), everything, 3)


@pytest.mark.parametrize(
    ("ids", "num_tokens", "message"),
    [
        ([[0, 7]], 7, "visible_ids reaches from 0 to 7; 7 tokens have ids 0 to 6"),
        ([[-1, 2]], 7, "visible_ids reaches from -1"),
        ([[0, 1], [2, 2]], 7, "visible_ids names a token twice"),
        ([[0, 1, 2]], 2, "num_visible=3: choose 1 to 2"),
        ([[], []], 2, "num_visible=0"),
        ([0, 1], 2, r"visible_ids has shape \(2,\)"),
        ([[0.0, 1.0]], 2, "visible_ids has .*float32.*int64"),
    ],
)
def test_split_tokens_names_what_is_wrong(ids: list, num_tokens: int, message: str) -> None:
    tensor = torch.tensor(ids, dtype=None if torch.tensor(ids).numel() else torch.int64)
    with pytest.raises(ValueError, match=message):
        split_tokens(tensor, num_tokens)


SEEDS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "seeds", "num_visible", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64), 2, r"seeds has shape \(3,\).*pass 2 int64 seeds"),
        (torch.zeros(2, 5), torch.zeros(2), 2, r"seeds has .*float32.*pass 2 int64 seeds"),
        (torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64), 2, r"seeds has shape \(2, 1\)"),
        (torch.zeros(5), SEEDS, 2, r"logits has shape \(5,\)"),
        (torch.zeros(2, 5, dtype=torch.int64), SEEDS, 2, "logits has .*int64.*floating-point"),
        (torch.zeros(2, 5), SEEDS.to("meta"), 2, "seeds has .*meta.* on cpu"),
        (torch.zeros(2, 5), SEEDS, 0, "num_visible=0: choose 1 to 5"),
        (torch.zeros(2, 5), SEEDS, 6, "num_visible=6: choose 1 to 5"),
    ],
)
def test_sample_visible_names_what_is_wrong(logits: Tensor, seeds: Tensor, num_visible: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_visible(logits, seeds, num_visible)


def test_a_number_of_tokens_beyond_memory_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        split_tokens(torch.zeros(4, 1, dtype=torch.int64), 2**62)
