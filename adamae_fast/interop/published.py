"""Published AdaMAE and VideoMAE checkpoints: pickled .pth files with the weights under ``model``.

Pre-training files of the two differ only in the sampler's tensors, which VideoMAE does not have. Beside the weights the
files hold the optimizer, the loss scaler and an ``argparse.Namespace``; none of it is used, but a pickle can only be
read as a whole.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar as numpy_scalar
from torch import Tensor

from adamae_fast.config import LossConfig, MaskConfig
from adamae_fast.interop.infer import DEFAULT_CLIP, infer_model
from adamae_fast.interop.keys import (
    NO_SAMPLER_MASK,
    Checkpoint,
    Names,
    classifier_shapes,
    parameter_shapes,
    published_classifier_names,
    published_names,
    read_tensors,
    write_tensors,
)
from adamae_fast.model.positions import sinusoid_table
from adamae_fast.model.sizes import SIZES

ALLOWED_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,  # "args"
    # The published training loop stores the learning rate as an element of a numpy array; numpy renamed the module.
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
]
"""All that a file may name beside the tensors and containers that ``torch.load(weights_only=True)`` itself allows."""

FINE_TUNING_PREFIXES = ("patch_embed.", "blocks.", "fc_norm.", "head.")

POSITION_TABLES = {"pos_embed", "encoder.pos_embed", "decoder.pos_embed"}
"""Names under which a file may store a table of positions; the published ones store none."""


def load_pth(path: Path) -> dict[str, Tensor]:
    """Return the tensors under ``model`` (``module`` in DeepSpeed's files) of a .pth file, running nothing in it.

    Raises ValueError for a file that is no checkpoint, and for one whose pickle names any class or function outside
    :data:`ALLOWED_GLOBALS`.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails with whatever the reader stumbles over
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise ValueError(
                f"{path}: cannot be read as a .pth checkpoint; damaged? ({type(error).__name__})"
            ) from error
        raise ValueError(
            f"{path}: refused, because its pickle asks for {named[1]}. Only tensors and plain values are read, since "
            'a pickle can run code. If you trust the file, save its tensors anew: torch.save({"model": state_dict}, …)'
        ) from error
    found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
    key = next((k for k in ("model", "module") if isinstance(content, dict) and isinstance(content.get(k), dict)), None)
    if key is None:
        raise ValueError(f"{path}: no weights under 'model'; the file holds {found}")
    strangers = [str(name) for name, value in content[key].items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(f"{path}: these entries of {key!r} are no tensors: {', '.join(strangers)}")
    return dict(content[key])


def read_pth(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a .pth file whose names a layout knows, and notes on what was changed for that.

    Raises ValueError as :func:`load_pth`, and for positions that were learned.
    """
    tensors = load_pth(path)
    notes = []
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        notes.append("every name began with DDP's 'module.', which was removed")
    for name in POSITION_TABLES & tensors.keys():
        table = tensors.pop(name)
        if table.ndim != 3 or not torch.allclose(table[0].float(), sinusoid_table(*table.shape[1:]), atol=1e-6):
            raise ValueError(
                f"{path}: {name} {tuple(table.shape)} is not the fixed table of sines, which is computed here; models "
                "with learned positions cannot be read"
            )
        notes.append(f"{name} is the table of sines, which is computed here: left out")
    return tensors, tuple(notes)


def layout_of(tensors: Mapping[str, Tensor]) -> Names:
    """Return the names of fine-tuning files if these tensors have them, else those of pre-training files."""
    is_tuned = any(name.startswith(FINE_TUNING_PREFIXES) for name in tensors)
    return published_classifier_names if is_tuned else published_names


def read_published(path: Path, num_frames: int | None = None, frame_size: int | None = None) -> Checkpoint:
    """Read an AdaMAE file (it has ``encoder.pos_embed_probs``), a VideoMAE file, or a fine-tuning file of either.

    ``num_frames`` and ``frame_size`` describe the clips where the file cannot. Raises ValueError for sizes that are not
    known, and for missing, unknown or mis-shaped tensors.
    """
    tensors, read_notes = read_pth(path)
    notes, names = list(read_notes), layout_of(tensors)
    is_classifier = names is published_classifier_names
    if is_classifier and "head.weight" not in tensors:
        raise ValueError(f"{path}: no tensor head.weight, so this is no whole fine-tuning checkpoint")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    has_sampler = any(name.startswith(("encoder.pos_embed_probs", "encoder.get_token_probs.")) for name in shapes)
    positions = shapes.get("encoder.pos_embed_probs", ())
    if has_sampler and len(positions) != 3:
        raise ValueError(
            f"{path}: encoder.pos_embed_probs has shape {positions or 'none, it is missing'}; expected (1, N, D)"
        )
    model = infer_model(
        shapes,
        names,
        str(path),
        num_tokens=positions[1] if has_sampler else None,
        num_frames=num_frames,
        frame_size=frame_size,
    )
    if not has_sampler and None in (num_frames, frame_size):
        notes.append(
            f"the file does not tell the size of its clips; took {model.num_frames} frames of {model.frame_size}×"
            f"{model.frame_size} (the published models have {DEFAULT_CLIP[0]} of {DEFAULT_CLIP[1]}); "
            "--num_frames and --frame_size tell others"
        )
    mask = MaskConfig() if has_sampler else NO_SAMPLER_MASK
    wanted = classifier_shapes(model, len(tensors["head.weight"])) if is_classifier else parameter_shapes(model, mask)
    state = read_tensors(tensors, names, wanted, str(path))
    return Checkpoint(model=model, mask=mask, loss=LossConfig(), state=state, notes=tuple(notes))


def write_published(path: Path, checkpoint: Checkpoint) -> None:
    """Write the AdaMAE file of a model with a sampler, the VideoMAE file of one without: ``{"model": …, "epoch": 0}``.

    A classifier's is the same in both projects.

    Raises ValueError for a sampler that is not the published one (one attention block at the encoder's width).
    """
    sampler = checkpoint.model.sampler
    width = SIZES[checkpoint.model.size].encoder.width
    if checkpoint.has_sampler and (sampler.kind, sampler.depth, sampler.width or width) != ("attention", 1, width):
        raise ValueError(
            f"model.sampler={sampler}: AdaMAE's files only hold a sampler of one attention block at the encoder's "
            f"width ({width}); --to videomae leaves the sampler out"
        )
    names = published_names if checkpoint.num_classes is None else published_classifier_names
    torch.save({"model": write_tensors(checkpoint.state, names), "epoch": 0}, path)
