"""Testing a fine-tuned classifier with several views of each video."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from adamae_fast.config import ModelConfig, load_config, load_run_config
from adamae_fast.config_finetune import EvaluateConfig, FinetuneConfig, LabelledDataConfig, Merge
from adamae_fast.data.labelled import read_class_names, read_labels
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.quarantine import BadVideo, TooManyBadVideosError
from adamae_fast.device import describe_device
from adamae_fast.distributed.world import joined
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.report.confusion import class_table, confusion_matrix, describe, describe_classes, draw_confusion
from adamae_fast.run_folder import CONFIG_FILE, MODEL_FILE, find_weights
from adamae_fast.tensor_file import read_tensors_file
from adamae_fast.train.predict import TOP, Predictions, gather_predictions, predict_views
from adamae_fast.train.summary import print_facts

log = logging.getLogger("adamae_fast")


def evaluate(checkpoint: str, options: EvaluateConfig, console: Console) -> dict[str, object] | None:
    """Test ``checkpoint`` on every video of a manifest, write results and print them; return what results.json holds.

    Under torchrun the processes share the videos; the first one writes and returns, the others return None.

    Raises ValueError for a checkpoint, manifest or option that cannot be used, and RunStoppedError for more unreadable
    videos than data.max_bad_share allows (results are written all the same) or for scores that are not finite.
    """
    folder = find_weights(checkpoint)[0].parent
    if "head.weight" not in read_tensors_file(folder / MODEL_FILE):
        raise ValueError(f"{folder} is no classifier; make one of it with adamae-fast finetune --init {folder}")
    model = VideoClassifier.from_pretrained(folder).eval()
    trained = trained_with(folder, model.config)
    if trained == FinetuneConfig(model=model.config):
        log.warning(
            "%s was not fine-tuned here: unless told otherwise, data.sampling=%s, data.stride=%d, %d × %d views",
            folder,
            trained.data.sampling,
            trained.data.stride,
            trained.views.temporal,
            trained.views.spatial,
        )
    config = options.applied_to(trained)
    if options.data.stride is not None and config.data.sampling == "segments":
        log.warning("data.stride has no effect: data.sampling=segments takes a frame of each part of the video")
    manifest = config.data.manifest
    if not manifest:
        raise ValueError("data.manifest is required: name an annotation file with labels")
    entries = read_manifest(manifest, config.data.root)
    labels, _ = read_labels(entries, manifest, model.num_classes)
    with joined(options.device, "device") as (world, device):
        views = config.views
        shared = f", {world.size} processes" if world.size > 1 else ""
        facts = [
            ("checkpoint", str(folder)),
            ("videos", f"{manifest}, {len(entries)} videos"),
            ("views", f"{views.temporal} × {views.spatial} views, mean of their {options.merge}"),
            ("device", f"{describe_device(device)}, {config.train.precision}{shared}"),
        ]
        if world.is_first:
            print_facts(facts, console)
        is_hidden = not world.is_first or not console.is_terminal
        with Progress(console=console, disable=is_hidden, transient=True) as progress:
            task = progress.add_task("videos", total=len(range(world.rank, len(entries), world.size)))
            mine = predict_views(
                model.to(device),
                entries,
                config,
                views,
                options.merge,
                device=device,
                rank=world.rank,
                world_size=world.size,
                advance=lambda num_videos: progress.advance(task, num_videos),
            )
        assert mine is not None  # nothing stops it
        found = gather_predictions(mine, len(entries), world)
    if not world.is_first:
        return None  # with too many bad videos, too: where one fails, torchrun ends the first, which has yet to write
    output_dir = Path(options.output_dir or _default_output(folder))
    results = {
        "checkpoint": str(folder),
        "manifest": manifest,
        "views": {"temporal": views.temporal, "spatial": views.spatial},
        "merge": options.merge,
        **describe_results(found, entries, labels, options.merge, read_class_names(manifest, model.num_classes)),
    }
    write_results(results, output_dir)
    print_results(results, output_dir, console)
    refuse_too_many(found.bad, len(entries), config.data.max_bad_share)
    return results


def describe_results(
    found: Predictions,
    entries: Sequence[Entry],
    labels: Sequence[int],
    merge: Merge,
    class_names: Sequence[str] | None = None,
) -> dict[str, object]:
    """Counts, accuracies, classes, confusion matrix, predictions and unreadable videos, ready for JSON.

    Accuracies are shares of the videos that could be read, null if there are none. A score is a probability; with
    merge="logits" that of the averaged logits.
    """
    num_classes = found.scores_VK.shape[1]
    ranking_VK = found.ranking()
    probability_VK = found.scores_VK if merge == "softmax" else found.scores_VK.softmax(1)
    ids = found.ids_V.tolist()
    matrix_KK = confusion_matrix([labels[i] for i in ids], ranking_VK[:, 0].tolist(), num_classes)
    predictions = [
        {
            "path": entries[i].path,
            "label": labels[i],
            "predicted": best[0],
            "best": best,
            "scores": [float(f"{scores[k]:.6g}") for k in best],
        }
        for i, best, scores in zip(ids, ranking_VK[:, :TOP].tolist(), probability_VK.tolist(), strict=True)
    ]
    return {
        "num_videos": len(entries),
        "num_readable": len(ids),
        "num_unreadable": len(found.bad),
        **(found.accuracy(labels) if ids else {"top1": None, f"top{TOP}": None}),
        "classes": describe_classes(matrix_KK, class_names),
        "confusion_matrix": matrix_KK.tolist(),
        "unreadable": [{"path": video.path, "reason": video.reason} for video in found.bad],
        "predictions": predictions,
    }


def trained_with(folder: Path, model: ModelConfig) -> FinetuneConfig:
    """How the checkpoint in ``folder``, whose model is ``model``, was shown videos: by its run, or the defaults.

    Of pre-training that is what it shares with fine-tuning: how videos are found and read, and the stride.
    """
    recipe = folder / CONFIG_FILE
    groups = yaml.safe_load(recipe.read_text()) if recipe.is_file() else {}
    if "classifier" in groups:
        return replace(load_run_config(recipe, FinetuneConfig), model=model)
    if "mask" not in groups:
        return FinetuneConfig(model=model)
    data = load_config(recipe).data
    kept = {key: getattr(data, key) for key in ("decoder", "stride", "num_workers", "timeout", "max_bad_share")}
    return FinetuneConfig(model=model, data=LabelledDataConfig(**kept))


def _default_output(folder: Path) -> Path:
    """evaluation/ in the folder of the run, or in that of a checkpoint that belongs to no run."""
    return (folder.parent.parent if folder.parent.name == "checkpoints" else folder) / "evaluation"


def write_results(results: dict[str, object], output_dir: Path) -> None:
    """Write results.json, with what :func:`describe_results` says in it, and confusion_matrix.png."""
    output_dir.mkdir(parents=True, exist_ok=True)
    temporary = output_dir / "results.tmp"
    temporary.write_text(json.dumps(results) + "\n")
    temporary.replace(output_dir / "results.json")
    matrix, classes = results["confusion_matrix"], results["classes"]
    assert isinstance(classes, list)
    names = [describe(row) for row in classes]
    draw_confusion(torch.tensor(matrix).numpy(), output_dir / "confusion_matrix.png", names)


def print_results(results: dict[str, object], output_dir: Path, console: Console) -> None:
    """Print the classes, what is unreadable, accuracies, files, and all but the long lists as one line of JSON."""
    classes, unreadable = results["classes"], results["unreadable"]
    assert isinstance(classes, list)
    assert isinstance(unreadable, list)
    if results["num_readable"]:
        console.print(class_table(classes))
    for video in unreadable:
        console.print(f"unreadable: {video['path']}: {video['reason']}", soft_wrap=True, highlight=False, markup=False)
    if results["num_readable"]:
        accuracies = f"top-1 {results['top1']:.2%}, top-{TOP} {results[f'top{TOP}']:.2%}"
        console.print(f"{'accuracy':<22}{accuracies} of {results['num_readable']} videos", highlight=False)
    for name in ("confusion_matrix.png", "results.json"):
        console.print(f"{name:<22}{output_dir / name}", soft_wrap=True, highlight=False, markup=False)
    lists = ("classes", "confusion_matrix", "unreadable", "predictions")
    console.out(json.dumps({name: value for name, value in results.items() if name not in lists}), highlight=False)


def refuse_too_many(bad: Sequence[BadVideo], num_videos: int, max_share: float) -> None:
    """Raise TooManyBadVideosError if more than ``max_share`` of a manifest's videos are ``bad``."""
    if len(bad) > max_share * num_videos:
        raise TooManyBadVideosError(
            f"{len(bad)} of {num_videos} videos ({len(bad) / num_videos:.1%}) are unreadable, more than "
            f"data.max_bad_share={max_share:g} allows; the results are those of the others, and name them. Repair "
            "them, or raise data.max_bad_share"
        )
