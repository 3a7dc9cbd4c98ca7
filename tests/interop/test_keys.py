"""The key map against the numbers of the published base model, and as a bijection."""

import math

import pytest
import torch

from adamae_fast.config import LossConfig, MaskConfig, ModelConfig, SamplerConfig
from adamae_fast.interop.keys import (
    NO_SAMPLER_MASK,
    Checkpoint,
    parameter_shapes,
    published_names,
    read_tensors,
    transformers_names,
    write_tensors,
)

TINY = ModelConfig(size="nano", num_frames=8, frame_size=32, patch_size=8)


def test_parameter_counts_of_the_published_base_model():
    shapes = {
        published_names(name)[0]: math.prod(s) for name, s in parameter_shapes(ModelConfig(), MaskConfig()).items()
    }
    sampler = sum(n for name, n in shapes.items() if name.startswith(("encoder.get_token", "encoder.pos_embed")))
    encoder = sum(n for name, n in shapes.items() if name.startswith("encoder.")) - sampler
    assert encoder == 86_227_200
    assert sampler == 8_290_561  # 1,204,224 of them are the position table's
    assert sum(shapes.values()) - encoder - sampler == 7_983_744
    assert sum(shapes.values()) == 102_501_505


def random_state(mask: MaskConfig) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in parameter_shapes(TINY, mask).items()}


@pytest.mark.parametrize(
    ("names", "mask"),
    [(published_names, MaskConfig()), (published_names, NO_SAMPLER_MASK), (transformers_names, NO_SAMPLER_MASK)],
)
def test_reading_undoes_writing_bit_for_bit(names, mask):
    state = random_state(mask)
    tensors = write_tensors(state, names)
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in state.values())
    back = read_tensors(tensors, names, parameter_shapes(TINY, mask), "file")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_transformers_gets_q_k_v_in_this_order():
    state = random_state(NO_SAMPLER_MASK)
    tensors = write_tensors(state, transformers_names)
    for i, part in enumerate(("query", "key", "value")):
        piece = tensors[f"decoder.decoder_layers.1.attention.attention.{part}.weight"]
        assert torch.equal(piece, state["decoder.blocks.1.attention.qkv.weight"][64 * i : 64 * (i + 1)])
    assert tensors["mask_token"].shape == (1, 1, 64)


def test_copies_share_no_memory():
    state = random_state(NO_SAMPLER_MASK)
    tensors = write_tensors(state, transformers_names)
    tensors["encoder_to_decoder.weight"].zero_()
    tensors["videomae.encoder.layer.0.attention.attention.query.weight"].zero_()
    assert state["projection.weight"].count_nonzero() > 0
    assert state["encoder.blocks.0.attention.qkv.weight"][:128].count_nonzero() > 0


def test_without_sampler():
    wide = ModelConfig(size="nano", num_frames=8, frame_size=32, patch_size=8, sampler=SamplerConfig(width=64))
    state = {name: torch.zeros(shape) for name, shape in parameter_shapes(wide, MaskConfig()).items()}
    bare = Checkpoint(model=wide, mask=MaskConfig(), loss=LossConfig(), state=state).without_sampler()
    assert bare.model == TINY
    assert bare.mask == MaskConfig(strategy="tube", ratio=0.9)
    assert not bare.has_sampler
    assert bare.state.keys() == parameter_shapes(TINY, bare.mask).keys()
