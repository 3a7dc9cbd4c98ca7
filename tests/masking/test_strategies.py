import pytest
import torch

from adamae_fast.grid import TokenGrid
from adamae_fast.masking import STRATEGIES

PAPER = TokenGrid(num_frames=16, frame_size=224, tubelet_size=2, patch_size=16)
SMALL = TokenGrid(num_frames=8, frame_size=24, tubelet_size=2, patch_size=8)  # 4 × 3 × 3 = 36 tokens


def draw(name, ratio=0.75, batch_size=4, grid=SMALL, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, grid.num_tokens, generator=generator)
    seeds = torch.arange(batch_size) + 1000 * seed
    return STRATEGIES[name](grid, ratio, seeds, logits)


@pytest.mark.parametrize("name", ["adaptive", "random"])
@pytest.mark.parametrize(
    ("ratio", "visible"), [(0.98, 31), (0.95, 78), (0.90, 156), (0.85, 235), (0.80, 313), (0.75, 392), (0.5, 784)]
)
def test_visible_count_rounds_down_visible_tokens(name, ratio, visible):
    assert STRATEGIES[name].num_visible(PAPER, ratio) == visible


def test_tube_and_frame_count_masked_tokens():
    # 196 places of which int(0.9 · 196) = 176 are masked; 8 frames of which int(0.875 · 8) = 7 are.
    assert STRATEGIES["tube"].num_visible(PAPER, 0.9) == 8 * 20
    assert STRATEGIES["tube"].num_visible(PAPER, 0.75) == 8 * 49
    assert STRATEGIES["frame"].num_visible(PAPER, 0.875) == 196


@pytest.mark.parametrize("name", STRATEGIES)
def test_ids_partition_the_tokens_in_ascending_order(name):
    split = draw(name)
    num_visible = STRATEGIES[name].num_visible(SMALL, 0.75)
    assert split.visible_ids_BK.shape == (4, num_visible)
    assert (split.visible_ids_BK.diff() > 0).all()
    assert (split.masked_ids_BM.diff() > 0).all()
    both = torch.cat((split.visible_ids_BK, split.masked_ids_BM), dim=1)
    assert torch.equal(both.sort().values, torch.arange(36).expand(4, -1))
    assert torch.equal(both.gather(1, split.slots_BN), torch.arange(36).expand(4, -1))


@pytest.mark.parametrize("name", STRATEGIES)
def test_draws_follow_the_seeds_and_differ_between_clips(name):
    first, again, other = draw(name), draw(name), draw(name, seed=1)
    assert torch.equal(first.visible_ids_BK, again.visible_ids_BK)
    assert not torch.equal(first.visible_ids_BK, other.visible_ids_BK)
    assert not (first.visible_ids_BK == first.visible_ids_BK[:1]).all()


def test_tube_keeps_the_same_places_in_all_frames():
    visible = draw("tube").visible_ids_BK.view(4, 4, -1)
    places = visible - 9 * torch.arange(4)[None, :, None]
    assert torch.equal(places, places[:, :1].expand_as(places))


def test_frame_keeps_whole_frames():
    frames = draw("frame", ratio=0.5).visible_ids_BK.view(4, 2, 9) // 9
    assert torch.equal(frames, frames[..., :1].expand_as(frames))


def test_adaptive_prefers_likely_tokens():
    logits = torch.full((64, 36), -20.0)
    logits[:, 7] = 20.0
    split = STRATEGIES["adaptive"](SMALL, 0.75, torch.arange(64), logits)
    assert (split.visible_ids_BK == 7).any(1).all()


def test_adaptive_without_logits_is_refused():
    with pytest.raises(ValueError, match="logits_BN=None"):
        STRATEGIES["adaptive"](SMALL, 0.75, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(("name", "ratio"), [("adaptive", 0.999), ("random", 0.999), ("tube", 0.01), ("frame", 0.1)])
def test_ratios_that_leave_nothing_are_refused(name, ratio):
    with pytest.raises(ValueError, match=f"mask.ratio={ratio}.*{name}"):
        STRATEGIES[name].num_visible(SMALL, ratio)
