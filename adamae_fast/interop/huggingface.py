"""Folders of transformers' VideoMAE classes: config.json and model.safetensors. transformers itself is not needed.

``VideoMAEForPreTraining`` and ``VideoMAEForVideoClassification`` are the same networks as VideoMAE's, with one
difference of their own: the decoder's last LayerNorm and the classifier's ``fc_norm`` have epsilon 1e-5 instead of
1e-6, which no file says and which moves predictions by a few 1e-6.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adamae_fast.config import LossConfig, ModelConfig
from adamae_fast.grid import NUM_CHANNELS
from adamae_fast.interop.infer import DEFAULT_CLIP, infer_model
from adamae_fast.interop.keys import (
    NO_SAMPLER_MASK,
    Checkpoint,
    classifier_shapes,
    parameter_shapes,
    read_tensors,
    transformers_names,
    write_tensors,
)
from adamae_fast.model.block import MLP_RATIO
from adamae_fast.model.sizes import SIZES
from adamae_fast.tensor_file import write_tensors_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def transformers_config(model: ModelConfig, loss: LossConfig, num_classes: int | None = None) -> dict[str, Any]:
    """Return config.json for a pre-trained model, or for a classifier: the fields of transformers' VideoMAEConfig."""
    encoder, decoder = SIZES[model.size].encoder, SIZES[model.size].decoder
    fields: dict[str, Any] = {
        "architectures": ["VideoMAEForPreTraining"],
        "model_type": "videomae",
        "image_size": model.frame_size,
        "patch_size": model.patch_size,
        "num_channels": NUM_CHANNELS,
        "num_frames": model.num_frames,
        "tubelet_size": model.tubelet_size,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": MLP_RATIO * encoder.width,
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": model.decoder.depth or decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": MLP_RATIO * decoder.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "qv_bias": True,
        "use_mean_pooling": False,
        "norm_pix_loss": loss.target != "raw",
    }
    if num_classes is not None:
        names = [f"LABEL_{number}" for number in range(num_classes)]
        fields |= {
            "architectures": ["VideoMAEForVideoClassification"],
            "use_mean_pooling": True,
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
    return fields


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, with a size written as a pair made plain.

    Raises ValueError if it is no VideoMAE's or its clips are not of one whole number of frames and one square size.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "videomae":
        raise ValueError(f"{path}: model_type={kind!r}; only folders of transformers' 'videomae' can be converted")
    for key in ("image_size", "patch_size", "num_frames"):
        pair = config.get(key)
        if isinstance(pair, list) and len(pair) == 2 and pair[0] == pair[1]:
            config[key] = pair[0]
        if not isinstance(config.get(key, 1), int):
            raise ValueError(f"{path}: {key}={pair!r}; only one whole number can be converted (frames are square here)")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors. Raises ValueError if it is missing or damaged."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(
            f"{folder}: no {WEIGHTS_FILE}; save the model as one file with "
            "save_pretrained(folder, safe_serialization=True, max_shard_size='100GB')"
        )
    try:
        stored = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: damaged, or no safetensors file: {error}") from error
    # The first releases of transformers 5 saved the biases under the names that they have inside the model.
    return {
        name.replace(".query.bias", ".q_bias").replace(".value.bias", ".v_bias"): tensor
        for name, tensor in stored.items()
    }


def check_config(folder: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError that lists the settings in config.json whose value is another than ``expected``."""
    faults = [
        f"{key}={config[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if config.get(key, value) != value
    ]
    if faults:
        raise ValueError(f"{folder / CONFIG_FILE}: not this kind of model: {'; '.join(faults)}")


def read_transformers(folder: Path) -> Checkpoint:
    """Read what ``save_pretrained`` of VideoMAEForPreTraining or VideoMAEForVideoClassification wrote.

    By transformers 4 or 5. Raises ValueError for settings that this model does not have, and for missing, unknown or
    mis-shaped tensors.
    """
    config, tensors = read_config(folder), read_weights(folder)
    source = str(folder / WEIGHTS_FILE)
    model = infer_model(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        transformers_names,
        source,
        num_frames=config.get("num_frames", DEFAULT_CLIP[0]),
        frame_size=config.get("image_size", DEFAULT_CLIP[1]),
    )
    num_classes = len(tensors["classifier.weight"]) if "classifier.weight" in tensors else None
    loss = LossConfig()
    if num_classes is None and not config.get("norm_pix_loss", True):
        loss = LossConfig(target="raw")
    expected = transformers_config(model, loss, num_classes)
    # Dropout and epsilon change no tensor's meaning; everything else must agree with the tensors and with this model.
    lenient = ["architectures", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"]
    if num_classes is not None:
        lenient += [key for key in expected if key.startswith("decoder_")]
        lenient += ["norm_pix_loss", "id2label", "label2id"]
    check_config(folder, config, {key: value for key, value in expected.items() if key not in lenient})
    notes = []
    epsilon = config.get("layer_norm_eps", 1e-12)
    if epsilon != 1e-6:
        notes.append(f"config.json has layer_norm_eps={epsilon}; VideoMAE itself and the converted model use 1e-6")
    shapes = parameter_shapes(model, NO_SAMPLER_MASK)
    if num_classes is not None:
        shapes = classifier_shapes(model, num_classes)
        if config.get("id2label", expected["id2label"]) != expected["id2label"]:
            notes.append("config.json names the classes; the converted model knows their numbers only")
    state = read_tensors(tensors, transformers_names, shapes, source)
    return Checkpoint(model=model, mask=NO_SAMPLER_MASK, loss=loss, state=state, notes=tuple(notes))


def write_transformers(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder that ``from_pretrained`` of the fitting class of transformers loads. The model has no sampler."""
    folder.mkdir()
    config = transformers_config(checkpoint.model, checkpoint.loss, checkpoint.num_classes)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    # transformers 4 refuses weights whose metadata does not name the framework.
    tensors = write_tensors(checkpoint.state, transformers_names)
    write_tensors_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
