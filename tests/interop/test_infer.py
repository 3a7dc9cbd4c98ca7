"""Clip sizes from token counts."""

import pytest

from adamae_fast.interop.infer import infer_clip


@pytest.mark.parametrize(
    ("num_tokens", "patch", "given", "expected"),
    [
        (1568, 16, (None, None), (16, 224)),  # the published one, though 64 frames of 112 fit too
        (1568, 16, (64, None), (64, 112)),
        (1568, 16, (None, 112), (64, 112)),
        (None, 16, (None, None), (16, 224)),
        (None, 16, (8, None), (8, 224)),
        (None, 16, (None, 112), (16, 112)),
        (36, 16, (None, None), (8, 48)),
        (784, 16, (None, 224), (8, 224)),
        (3136, 16, (32, None), (32, 224)),
        (2048, 14, (None, None), (16, 224)),
        (6 * 9, 16, (12, None), (12, 48)),
        (6 * 9, 16, (None, 48), (12, 48)),
        (64, 8, (8, 32), (8, 32)),
    ],
)
def test_clip(num_tokens, patch, given, expected):
    assert infer_clip(num_tokens, 2, patch, *given, "file") == expected


@pytest.mark.parametrize(
    ("num_tokens", "given", "message"),
    [
        (784, (None, None), "8 frames of 224×224 or 32 frames of 112×112"),
        (1567, (None, None), "1567 tokens.*no such clip"),
        (256, (None, None), "8 frames of 128×128 or 32 frames of 64×64"),
        (1568, (None, 240), "--frame_size=240 come from no such clip"),
        (1568, (16, 256), "--num_frames=16, --frame_size=256 come from no such clip"),
        (1568, (15, None), "no such clip"),
        (1568, (None, 8), "no such clip"),
        (1568, (None, 225), "no such clip"),
    ],
)
def test_what_does_not_fit_is_an_error(num_tokens, given, message):
    with pytest.raises(ValueError, match=message):
        infer_clip(num_tokens, 2, 16, *given, "file")
