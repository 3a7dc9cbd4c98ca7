"""Probes: what frozen features of a checkpoint say about the classes of a labelled set.

Shapes: V videos, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from adamae_fast.config_features import ExtractConfig, ProbeConfig, ProbeKind, Tokens
from adamae_fast.data.labelled import read_class_names, read_labels
from adamae_fast.distributed.world import joined
from adamae_fast.errors import RunStoppedError
from adamae_fast.features.extract import Source, extract_features, open_source, refuse_unreadable, report_stop
from adamae_fast.features.heads import RECIPES, AttentiveHead, LinearHead, score, train_heads
from adamae_fast.features.neighbours import nearest, vote
from adamae_fast.features.store import FeatureFolder
from adamae_fast.model.sizes import SIZES
from adamae_fast.train.evaluate import describe_results, print_results, write_results
from adamae_fast.train.predict import Predictions
from adamae_fast.train.signals import stop_signals
from adamae_fast.train.summary import print_facts

log = logging.getLogger("adamae_fast")

TOKENS: dict[ProbeKind, Tokens] = {"linear": "pooled", "attentive": "all", "knn": "pooled"}


def probe(checkpoint: str, options: ProbeConfig, console: Console) -> dict[str, object] | None:
    """Classify the videos of val.manifest by features of ``checkpoint`` and the labels of data.manifest.

    Writes and prints results as evaluate does, and returns what results.json holds. Features are kept in
    ``output_dir/features`` and taken from there by the next probe. Under torchrun the processes share their extraction;
    the first one does the rest, the others return None.

    Raises ValueError for a checkpoint, manifest or option that cannot be used, and RunStoppedError for more unreadable
    videos than data.max_bad_share allows, or where every head ends in values that are not finite.
    """
    for message in options.without_effect():
        log.warning(message)
    if not options.val.manifest:
        raise ValueError("val.manifest is required: name an annotation file with labels")
    source = open_source(checkpoint, options)
    labels, num_classes = read_labels(source.entries, options.data.manifest)
    val = source.with_manifest(options.val.manifest, options.val.root)
    val_labels, _ = read_labels(val.entries, options.val.manifest, num_classes)
    _require_enough(options, len(source.entries), "videos")
    output_dir, tokens = Path(options.output_dir), TOKENS[options.probe]
    folders = {name: output_dir / "features" / f"{name}_{tokens}" for name in ("train", "val")}
    with joined(options.device, "device") as (world, device), stop_signals() as stop:
        source.model.to(device)
        if world.is_first:
            facts = [("validation", f"{options.val.manifest}, {len(val.entries)} videos")]
            facts.append(("probe", f"{options.probe}, {num_classes} classes, results in {output_dir}"))
            print_facts([*source.describe(world.size), *facts], console)
        indices = []
        for name, part in (("train", source), ("val", val)):
            told = ExtractConfig(output_dir=str(folders[name]), tokens=tokens)
            indices.append(extract_features(part, told, world, console, stop))
            if indices[-1] is None:
                break  # on all processes: a signal to one of them does not let the others begin with the next set
        if not world.is_first:
            return None
        scored = None
        if None not in indices:
            refuse_unreadable(indices[0], source.config)  # type: ignore[arg-type]
            sets = [FeatureFolder(folders[name]) for name in ("train", "val")]
            train_labels = [labels[i] for i in sets[0].ids]
            _require_enough(options, len(sets[0]), "readable videos")
            scored = _score(options, source, sets, (train_labels, val_labels), num_classes, device, console, stop)
    if scored is None:
        return report_stop(options.output_dir, stop, console)
    results = {
        "checkpoint": str(source.checkpoint),
        "manifest": options.val.manifest,
        "train_manifest": options.data.manifest,
        "num_train": len(sets[0]),
        "num_unreadable_train": len(sets[0].unreadable),
        "views": {"temporal": options.views.temporal, "spatial": options.views.spatial},
        "probe": options.probe,
        **scored.facts,
        **describe_results(
            scored.predictions,
            val.entries,
            val_labels,
            "softmax",
            read_class_names(options.val.manifest, scored.predictions.scores_VK.shape[1]),
        ),
    }
    write_results(results, output_dir)
    print_results(results, output_dir, console)
    assert indices[1] is not None
    refuse_unreadable(indices[1], source.config)
    return results


@dataclass(frozen=True)
class _Scored:
    predictions: Predictions
    facts: dict[str, object]
    """What decided them."""


def _require_enough(options: ProbeConfig, num_videos: int, what: str) -> None:
    """A probe learns from at least 2 videos, and has as many neighbours as it asks for."""
    if options.probe == "knn" and options.knn.k > num_videos:
        raise ValueError(f"knn.k={options.knn.k}: data.manifest has only {num_videos} {what}; choose at most so many")
    if num_videos < 2:
        raise ValueError(
            f"data.manifest={options.data.manifest!r}: {num_videos} {what}; a probe learns from at least 2"
        )


def _score(
    options: ProbeConfig,
    source: Source,
    sets: Sequence[FeatureFolder],
    labels: tuple[Sequence[int], Sequence[int]],
    num_classes: int,
    device: torch.device,
    console: Console,
    stop: Sequence[str],
) -> _Scored | None:
    """Scores of the validation videos and how they came about; None once ``stop`` is not empty."""
    (train, val), (train_labels, val_labels) = sets, labels

    def predictions(scores_VK: Tensor) -> Predictions:
        return Predictions(ids_V=torch.tensor(val.ids, dtype=torch.int64), scores_VK=scores_VK, bad=val.unreadable)

    if options.probe == "knn":
        knn = options.knn
        similarities_Vk, rows_Vk = nearest(val.read().to(device), train.read().to(device), knn.k)
        scores_VK = vote(similarities_Vk, torch.tensor(train_labels)[rows_Vk], num_classes, knn.temperature)
        return _Scored(predictions(scores_VK), {"k": knn.k, "temperature": knn.temperature})
    recipe = RECIPES[options.probe]
    recipe = replace(recipe, lrs=options.head.lrs or recipe.lrs, epochs=options.head.epochs or recipe.epochs)
    width = train.shape[-1]
    build: Callable[[], nn.Module]
    read: Callable[[Sequence[int]], Tensor]
    read_val: Callable[[Sequence[int]], Tensor]
    if options.probe == "attentive":
        build = partial(AttentiveHead, width, num_classes, SIZES[source.model.config.size].encoder.num_heads)
        read, read_val = train.read, val.read
    else:
        build = partial(LinearHead, width, num_classes)
        read, read_val = (_in_memory(features, device) for features in sets)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"{len(recipe.lrs)} heads", total=recipe.epochs)
        heads = train_heads(
            build,
            read,
            train_labels,
            recipe,
            batch_size=options.head.batch_size,
            seed=options.seed,
            device=device,
            stop=stop,
            advance=lambda: progress.advance(task),
        )
    if heads is None:
        return None
    found = [predictions(score(head, read_val, len(val), num_classes, device)) for head in heads]
    finite = [bool(one.scores_VK.isfinite().all()) for one in found]
    accuracies = [one.accuracy(val_labels) if ok else {} for one, ok in zip(found, finite, strict=True)]
    if not any(finite):
        raise RunStoppedError(
            f"head.lrs={list(recipe.lrs)}: every head ended in values that are not finite; lower them"
        )
    # Of equally good heads the first; without readable videos (NaN) any that is finite.
    best = max(range(len(heads)), key=lambda i: (finite[i], accuracies[i].get("top1", 0.0)))
    grid = [{"lr": lr, **accuracy} for lr, accuracy in zip(recipe.lrs, accuracies, strict=True)]
    facts: dict[str, object] = {"epochs": recipe.epochs, "lr": recipe.lrs[best]}
    return _Scored(found[best], facts if not len(val) else {**facts, "grid": grid})


def _in_memory(features: FeatureFolder, device: torch.device) -> Callable[[Sequence[int]], Tensor]:
    """:meth:`FeatureFolder.read` without the disk."""
    features_VD = features.read().to(device)
    return lambda rows: features_VD[list(rows)]
