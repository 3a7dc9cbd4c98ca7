import copy

import numpy as np
import pytest
import torch

from adamae_fast.config import MaskConfig, ModelConfig, SamplerConfig
from adamae_fast.data.clips import CropBox
from adamae_fast.grid import TokenGrid
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.adaptivity import adaptivity_figure, box_coverage, measure_adaptivity, sampler_logits

GRID = TokenGrid(num_frames=4, frame_size=32, tubelet_size=2, patch_size=8)


def painted_coverage(boxes_TO4, frame_ids, crop, scale):
    """Paint boxes into masks of single pixels of the enlarged clip and average over tokens."""
    side = GRID.frame_size * scale
    x = crop.left + (np.arange(side) + 0.5) * crop.width / side
    y = crop.top + (np.arange(side) + 0.5) * crop.height / side
    masks = np.zeros((GRID.num_frames, side, side))
    for t, frame in enumerate(frame_ids):
        for left, top, right, bottom in boxes_TO4[frame]:
            inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
            masks[t][inside] = 1
    t, h, w = GRID.shape
    return masks.reshape(t, GRID.tubelet_size, h, side // h, w, side // w).mean(axis=(1, 3, 5)).flatten()


def test_coverage_equals_painted_masks_where_boxes_end_on_pixels():
    rng = np.random.default_rng(0)
    corners = rng.integers(-10, 90, (9, 3, 2, 2))
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    # The crop is 64 pixels wide: two to each pixel of the clip, so painting at twice the size is exact.
    crop, frame_ids = CropBox(top=4, left=6, height=64, width=64), np.array([0, 3, 6, 8])
    coverage = box_coverage(boxes, frame_ids, crop, GRID)
    assert coverage.shape == (GRID.num_tokens,)
    assert 0.1 < coverage.mean() < 0.9
    np.testing.assert_allclose(coverage, painted_coverage(boxes, frame_ids, crop, scale=2), atol=1e-12)


def test_coverage_of_fractional_boxes_and_oblong_crops_is_near_painted_masks():
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 100, (4, 2, 2, 2))
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    crop = CropBox(top=7, left=11, height=54, width=77)
    coverage = box_coverage(boxes, np.arange(4), crop, GRID)
    np.testing.assert_allclose(coverage, painted_coverage(boxes, np.arange(4), crop, scale=32), atol=0.01)


def test_coverage_counts_overlap_once_and_empty_boxes_not_at_all():
    once = np.tile(np.array([[0.0, 0, 16, 16]]), (4, 1, 1))
    twice = np.tile(np.array([[0.0, 0, 16, 16], [0, 0, 16, 16], [20, 20, 20, 30]]), (4, 1, 1))
    crop = CropBox(top=0, left=0, height=32, width=32)
    np.testing.assert_array_equal(
        box_coverage(twice, np.arange(4), crop, GRID), box_coverage(once, np.arange(4), crop, GRID)
    )
    np.testing.assert_array_equal(box_coverage(once, np.arange(4), crop, GRID).reshape(GRID.shape)[:, :2, :2], 1)
    assert box_coverage(once, np.arange(4), crop, GRID).mean() == 0.25
    assert box_coverage(np.zeros((4, 0, 4)), np.arange(4), crop, GRID).sum() == 0


@pytest.mark.parametrize(
    ("frame_ids", "message"), [([0, 1], "frame_ids has 2"), ([0, 1, 2, 9], "from 0 to 9, but boxes_TO4 has 4 frames")]
)
def test_coverage_names_what_does_not_fit(frame_ids, message):
    with pytest.raises(ValueError, match=message):
        box_coverage(np.zeros((4, 1, 4)), np.array(frame_ids), CropBox(top=0, left=0, height=8, width=8), GRID)


def test_ids_on_boxes_alone_give_the_inverse_of_the_share():
    coverage = np.zeros((2, 20))
    coverage[0, :5] = coverage[1, 10:15] = 1
    assert adaptivity_figure(coverage, np.array([[[0, 2, 4], [10, 11, 14]]]))["value"] == pytest.approx(1 / 0.25)
    assert adaptivity_figure(coverage, np.array([[[5, 6, 7], [0, 1, 2]]]))["value"] == 0


def test_clips_without_boxes_are_left_out_and_none_at_all_is_an_error():
    coverage = np.zeros((3, 20))
    coverage[0, :5] = coverage[2, :10] = 1
    ids = np.array([[[0, 1], [3, 4], [9, 10]]])
    assert adaptivity_figure(coverage, ids) == adaptivity_figure(coverage[[0, 2]], ids[:, [0, 2]])
    with pytest.raises(ValueError, match="none of the 1 clips"):
        adaptivity_figure(coverage[1:2], ids[:, 1:2])


def test_uniform_ids_give_one_within_their_standard_error_and_the_error_is_honest():
    rng = np.random.default_rng(0)
    coverage = rng.uniform(0, 1, (30, 64)) ** 4
    values, errors = [], []
    for _ in range(200):
        ids = np.stack([rng.permutation(64)[:6] for _ in range(30)])[None]
        figure = adaptivity_figure(coverage, ids)
        values.append(figure["value"])
        errors.append(figure["standard_error"])
    spread = np.std(values)
    assert abs(np.mean(values) - 1) < 4 * spread / np.sqrt(200)
    assert np.mean(errors) == pytest.approx(spread, rel=0.2)


def test_single_clip_has_no_standard_error():
    assert adaptivity_figure(np.eye(1, 10), np.array([[[0, 1]]])) == {
        "value": pytest.approx(5.0),
        "standard_error": None,
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = ModelConfig(size="nano", num_frames=4, frame_size=32, patch_size=8)
    return AdaMAE(sizes, MaskConfig(strategy="adaptive", ratio=0.75))


def test_measure_finds_the_sampler_that_looks_at_the_boxes(model):
    videos = torch.randint(0, 256, (3, *GRID.video_shape), dtype=torch.uint8)
    coverage = np.zeros((3, GRID.num_tokens))
    coverage[:, 8:16] = 1  # 8 of 32 tokens, as many as are visible

    class Biased(torch.nn.Module):
        def forward(self, tokens_BND):
            logits_BN = torch.full(tokens_BND.shape[:2], -50.0)
            logits_BN[:, 8:16] = 50.0
            return logits_BN

    trained = copy.deepcopy(model).train()
    trained.sampler = Biased()
    result = measure_adaptivity(trained, model, videos, coverage, seed=1, repeats=16, batch_size=2)
    again = measure_adaptivity(trained, model, videos, coverage, seed=1, repeats=16, batch_size=3)
    swapped = measure_adaptivity(model, trained, videos, coverage, seed=1, repeats=16)
    assert trained.training
    assert result == again
    assert (swapped["adaptive"], swapped["untrained"]) == (result["untrained"], result["adaptive"])
    assert result["adaptive"] == {"value": pytest.approx(4.0), "standard_error": pytest.approx(0, abs=1e-9)}
    assert result["random"]["value"] == pytest.approx(1.0, abs=0.35)
    assert 0 < result["untrained"]["value"] < 3
    assert (result["num_clips"], result["repeats"], result["box_share"]) == (3, 16, 0.25)


def test_logits_are_those_of_the_whole_model_in_eval_mode():
    torch.manual_seed(0)
    sizes = ModelConfig(
        size="nano", num_frames=4, frame_size=32, patch_size=8, sampler=SamplerConfig(dropout=0.5, detach_tokens=False)
    )
    model = AdaMAE(sizes, MaskConfig(strategy="adaptive", ratio=0.75))
    videos = torch.randint(0, 256, (3, *GRID.video_shape), dtype=torch.uint8)
    logits_BN = sampler_logits(model.train(), videos, batch_size=2)
    assert model.training
    assert not logits_BN.requires_grad
    with torch.no_grad():
        assert torch.allclose(logits_BN, model.eval()(videos).logits, atol=1e-5)


def test_measure_refuses_models_without_a_sampler():
    model = AdaMAE(
        ModelConfig(size="nano", num_frames=4, frame_size=32, patch_size=8), MaskConfig(strategy="tube", ratio=0.75)
    )
    with pytest.raises(ValueError, match=r"mask\.strategy='tube'"):
        measure_adaptivity(
            model, model, torch.zeros((1, *GRID.video_shape), dtype=torch.uint8), np.ones((1, GRID.num_tokens))
        )
