import itertools
import math

import pytest
import torch
from torch import Tensor

from adamae_fast.ops.sample_visible import TokenSplit, gumbel_noise, sample_visible, split_tokens
from adamae_fast.testing import ODD_SHAPES, InputFactory, OpShape, scattered_in_memory

pytestmark = pytest.mark.usefixtures("each_impl")


def assert_is_split(split: TokenSplit, visible_ids: list[list[int]], num_tokens: int) -> None:
    """Everything that follows from the visible ids, spelled out in Python."""
    for x in split:
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
    logits, noise = factory.logits(), factory.noise()
    keys = logits.to(torch.float64 if dtype == torch.float64 else torch.float32) + noise
    expected = draw_one_after_another(keys, shape.num_visible)
    for layout in (torch.Tensor.contiguous, scattered_in_memory):
        split = sample_visible(layout(logits), layout(noise), shape.num_visible)
        assert_is_split(split, expected, shape.num_tokens)


def test_ties_go_to_the_lower_index() -> None:
    num_tokens = 1568  # enough tokens for a sort that is not stable to shuffle them
    keys = torch.randint(4, (3, num_tokens), generator=torch.Generator().manual_seed(0)).float()
    split = sample_visible(keys, torch.zeros_like(keys), 500)
    assert split.visible_ids_BK.tolist() == draw_one_after_another(keys, 500)


def test_fp64_keys_are_not_rounded_to_fp32() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0 + 1e-12, 0.5]], dtype=torch.float64)
    assert sample_visible(logits, torch.zeros(1, 4), 1).visible_ids_BK.tolist() == [[2]]


def test_keys_of_bf16_logits_are_fp32() -> None:
    noise = torch.tensor([[0.0, 1e-4, 0.0]])  # lost in a bf16 sum
    assert sample_visible(torch.full((1, 3), 100, dtype=torch.bfloat16), noise, 1).visible_ids_BK.tolist() == [[1]]


def test_passes_no_gradient() -> None:
    factory = InputFactory(OpShape())
    split = sample_visible(factory.logits().requires_grad_(), factory.noise(), 4)
    assert not any(x.requires_grad for x in split)


# Statistics. The critical value is Wilson and Hilferty's approximation of the chi-square quantile at 1e-4. Seeds are
# fixed, so the tests are deterministic, and each also shows that wrong noise is found out.


def chi_square_critical(degrees: int) -> float:
    upper_normal_quantile = 3.719  # of 1 - 1e-4
    term = 2 / (9 * degrees)
    return degrees * (1 - term + upper_normal_quantile * math.sqrt(term)) ** 3


def draw(p: Tensor, num_visible: int, noise: Tensor) -> Tensor:
    return sample_visible(p.log().expand(noise.shape), noise, num_visible).visible_ids_BK


def test_inclusion_frequencies_match_torch_multinomial() -> None:
    """Pearson's statistic is conservative here: drawing without replacement varies less than chi-square assumes."""
    num_tokens, num_visible, clips = 12, 4, 20000
    p = torch.linspace(0, 4, num_tokens).exp()
    p = p / p.sum()
    generator = torch.Generator().manual_seed(0)
    theirs = torch.multinomial(p.expand(clips, -1), num_visible, replacement=False, generator=generator).flatten()

    def statistic(noise: Tensor) -> float:
        a, b = (x.bincount(minlength=num_tokens) for x in (draw(p, num_visible, noise).flatten(), theirs))
        return float(((a - b) ** 2 / (a + b)).sum())

    gumbel = gumbel_noise((clips, num_tokens), device="cpu", generator=generator)
    normal = torch.randn((clips, num_tokens), generator=generator) * math.pi / math.sqrt(6)  # Gumbel's variance
    critical = chi_square_critical(num_tokens - 1)
    assert statistic(gumbel) < critical < statistic(normal)


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

    def statistic(noise: Tensor) -> float:
        codes = draw(p, num_visible, noise).double() @ torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
        observed = [int((codes == 100 * a + 10 * b + c).sum()) for a, b, c in sets]
        return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))

    generator = torch.Generator().manual_seed(0)
    gumbel = gumbel_noise((clips, len(p)), device="cpu", generator=generator)
    normal = torch.randn((clips, len(p)), generator=generator) * math.pi / math.sqrt(6)
    assert statistic(gumbel) < chi_square_critical(len(sets) - 1) < statistic(normal)


def test_gumbel_noise_has_gumbels_distribution() -> None:
    noise = gumbel_noise((200, 500), device="cpu", generator=torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float32
    x = torch.linspace(-1.5, 6, 16)
    cumulative = (noise.flatten() <= x[:, None]).double().mean(1)
    assert (cumulative - torch.exp(-torch.exp(-x.double()))).abs().max() < 1.95 / math.sqrt(noise.numel())  # at 1e-3


def test_gumbel_noise_follows_its_generator() -> None:
    first, second, third = (
        gumbel_noise((3, 5), device="cpu", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    torch.manual_seed(7)
    from_global = gumbel_noise((3, 5), device="cpu")
    torch.manual_seed(7)
    assert torch.equal(from_global, gumbel_noise((3, 5), device="cpu"))


def test_gumbel_noise_is_finite_even_where_the_exponential_underflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, generator=None: x.zero_())
    noise = gumbel_noise((4,), device="cpu")
    assert noise.isfinite().all()
    assert (noise < 88).all()


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


@pytest.mark.parametrize(
    ("logits", "noise", "num_visible", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 4), 2, r"noise has shape \(2, 4\).*\(B=2, N=5\)"),
        (torch.zeros(5), torch.zeros(5), 2, r"logits has shape \(5,\)"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5), 2, "logits has .*int64.*floating-point"),
        (torch.zeros(2, 5), torch.zeros(2, 5, device="meta"), 2, "noise is on meta; move it to cpu"),
        (torch.zeros(2, 5), torch.zeros(2, 5), 0, "num_visible=0: choose 1 to 5"),
        (torch.zeros(2, 5), torch.zeros(2, 5), 6, "num_visible=6: choose 1 to 5"),
    ],
)
def test_sample_visible_names_what_is_wrong(logits: Tensor, noise: Tensor, num_visible: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_visible(logits, noise, num_visible)


def test_a_number_of_tokens_beyond_memory_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        split_tokens(torch.zeros(4, 1, dtype=torch.int64), 2**62)
