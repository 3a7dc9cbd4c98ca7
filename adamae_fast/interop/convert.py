"""``adamae-fast convert``: checkpoints between this project, AdaMAE, VideoMAE and transformers."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml

from adamae_fast.config import LossConfig, PretrainConfig, load_config, save_config
from adamae_fast.interop.huggingface import read_transformers, write_transformers
from adamae_fast.interop.keys import NO_SAMPLER_MASK, Checkpoint
from adamae_fast.interop.published import read_published, write_published
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.run_folder import CONFIG_FILE, MODEL_FILE, find_weights
from adamae_fast.tensor_file import read_tensors_file, write_tensors_file

LayoutName = Literal["adamae-fast", "adamae", "videomae", "transformers"]


def convert(
    input: str, output: str, to: LayoutName, num_frames: int | None = None, frame_size: int | None = None
) -> None:
    """Write a checkpoint in another project's layout, and print what was lost or assumed on the way.

    What INPUT is shows in the file itself: a pre-trained model or a classifier, and whose. A pre-trained model without
    a sampler gets tube masks of ratio 0.9, VideoMAE's; a layout without a place for the sampler drops it, and says so.

    Args:
        input: A checkpoint or run folder of adamae-fast, a published AdaMAE or VideoMAE file (.pth) of pre-training or
            fine-tuning, or a folder of transformers' VideoMAEForPreTraining or VideoMAEForVideoClassification.
        output: Where to write: a .pth file for adamae and videomae, a folder for adamae-fast and transformers. Must not
            exist.
        to: Layout to write.
        num_frames: Frames of the model's clips, where a .pth file does not tell.
        frame_size: Height and width of the model's clips, where a .pth file does not tell.

    Raises ValueError that lists what does not fit: nothing in INPUT is silently ignored, nothing is overwritten.
    """
    source, target = Path(input), Path(output)
    if to not in _WRITERS:
        raise ValueError(f"to={to!r}: choose one of {', '.join(_WRITERS)}")
    _require_free(target)
    found = detect_layout(source)
    for key, value in (("num_frames", num_frames), ("frame_size", frame_size)):
        if value is not None and value < 1:
            raise ValueError(f"{key}={value}: choose a positive number")
        if value is not None and found != "pth":
            raise ValueError(f"{key}={value}: the configuration in {input} tells the size of its clips; leave it out")
    kind: str = found
    if found == "pth":
        checkpoint = read_published(source, num_frames, frame_size)
        kind = "adamae" if checkpoint.has_sampler else "videomae"
        if checkpoint.num_classes is not None and to in ("adamae", "videomae"):
            kind = to  # fine-tuning files of the two are the same
    elif found == "transformers":
        checkpoint = read_transformers(source)
    else:
        checkpoint = read_own(source)
    if kind == to:
        raise ValueError(f"to={to!r}: {input} already has this layout; copy it, or choose another layout")

    before = f"{kind}, model.size={checkpoint.model.size}"
    if checkpoint.num_classes is not None:
        before += f", classifier of {checkpoint.num_classes} classes"
    before += f", {sum(tensor.numel() for tensor in checkpoint.state.values()):,} parameters"
    checkpoint = _fit(checkpoint, to)
    with _whole_or_not_at_all(target) as draft:
        _WRITERS[to](draft, checkpoint)
    for note in checkpoint.notes:
        print(f"note: {note}")
    print(f"{input} ({before}) → {output} ({to})")


def detect_layout(path: Path) -> Literal["adamae-fast", "pth", "transformers"]:
    """Return what kind of checkpoint lies at ``path``. Raises ValueError that says what would be recognised."""
    if path.is_file():
        return "pth"
    if (path / "config.json").is_file():
        return "transformers"
    if path.is_dir():
        return "adamae-fast"
    raise ValueError(
        f"input={str(path)!r} does not exist; give a checkpoint folder of adamae-fast, a .pth file of AdaMAE or "
        "VideoMAE, or a VideoMAE folder of transformers"
    )


def read_own(path: Path) -> Checkpoint:
    """Read a checkpoint folder of this project, or a run's best one, else its newest. Raises ValueError without one."""
    weights, recipe = find_weights(path)
    if "head.weight" in read_tensors_file(weights):
        classifier = VideoClassifier.from_pretrained(path)
        state = classifier.state_dict()
        return Checkpoint(model=classifier.config, mask=NO_SAMPLER_MASK, loss=LossConfig(), state=state)
    config = load_config(recipe)
    state = AdaMAE.from_pretrained(path).state_dict()
    return Checkpoint(model=config.model, mask=config.mask, loss=config.loss, state=state)


def write_own(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder that ``from_pretrained`` of :class:`AdaMAE` or :class:`VideoClassifier` loads."""
    folder.mkdir()
    recipe = folder / CONFIG_FILE
    if checkpoint.num_classes is None:
        save_config(PretrainConfig(model=checkpoint.model, mask=checkpoint.mask, loss=checkpoint.loss), recipe)
    else:
        recipe.write_text(yaml.safe_dump({"model": dataclasses.asdict(checkpoint.model)}, sort_keys=False))
    write_tensors_file(checkpoint.state, folder / MODEL_FILE)


_WRITERS = {
    "adamae-fast": write_own,
    "adamae": write_published,
    "videomae": write_published,
    "transformers": write_transformers,
}


def _fit(checkpoint: Checkpoint, to: LayoutName) -> Checkpoint:
    """Return the part of the model that the layout has a place for, with a note for each part it has not."""
    notes = list(checkpoint.notes)
    if to == "adamae" and checkpoint.num_classes is None and not checkpoint.has_sampler:
        raise ValueError("to='adamae': the input has no sampler, which AdaMAE's files need; choose --to videomae")
    if to in ("videomae", "transformers") and checkpoint.has_sampler:
        full, checkpoint = checkpoint, checkpoint.without_sampler()
        notes.append(f"{to} has no place for the sampler: {len(full.state) - len(checkpoint.state)} tensors dropped")
    kept = LossConfig(target="raw") if to == "transformers" and checkpoint.loss.target == "raw" else LossConfig()
    if to != "adamae-fast" and checkpoint.loss != kept:
        notes.append(f"{to} has no place for {checkpoint.loss}; it goes with {kept}")
    return dataclasses.replace(checkpoint, notes=tuple(notes))


def _require_free(target: Path) -> None:
    if os.path.lexists(target):
        raise ValueError(f"output={str(target)!r} exists; name another one or remove it")


@contextmanager
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """Yield a name beside ``target`` to write to; what is there at the end takes the target's name in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        draft = Path(folder) / target.name
        yield draft
        _require_free(target)
        draft.rename(target)
