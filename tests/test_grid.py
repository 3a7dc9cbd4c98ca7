import pytest

from adamae_fast.grid import TokenGrid


def test_paper_grid():
    grid = TokenGrid(num_frames=16, frame_size=224, tubelet_size=2, patch_size=16)
    assert (grid.shape, grid.num_tokens, grid.pixels_per_token) == ((8, 14, 14), 1568, 1536)
    assert grid.video_shape == (3, 16, 224, 224)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((15, 32, 2, 16), "num_frames=15.*tubelet_size=2"), ((16, 30, 2, 16), "frame_size=30.*patch_size=16")],
)
def test_sizes_that_do_not_divide_are_named(sizes, words):
    names = ("num_frames", "frame_size", "tubelet_size", "patch_size")
    with pytest.raises(ValueError, match=words):
        TokenGrid(**dict(zip(names, sizes, strict=True)))
