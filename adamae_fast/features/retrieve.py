"""``adamae-fast retrieve``: which videos of a manifest look most like a query to a frozen encoder.

Shapes: Q queries, V videos, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from adamae_fast.config_features import ExtractConfig, FeatureViewsConfig, RetrieveConfig
from adamae_fast.config_finetune import ViewsConfig
from adamae_fast.data.labelled import view_batches
from adamae_fast.data.manifest import Entry
from adamae_fast.distributed.world import PATIENCE, joined
from adamae_fast.features.extract import (
    Source,
    extract_features,
    features_of,
    merge_features,
    open_source,
    refuse_unreadable,
    report_stop,
    require_same,
)
from adamae_fast.features.neighbours import nearest
from adamae_fast.features.store import FeatureFolder, is_feature_folder
from adamae_fast.report.neighbours import Strip, draw_neighbours
from adamae_fast.train.predict import require_finite, show_views
from adamae_fast.train.signals import stop_signals
from adamae_fast.train.summary import print_facts

CENTRE = ViewsConfig(temporal=1, spatial=1)


def retrieve(target: str, queries: Sequence[str], options: RetrieveConfig, console: Console) -> dict[str, Any] | None:
    """Find the nearest videos of each query; write the contact sheet and its JSON lines; return what is printed last.

    ``target`` is a checkpoint, and data.manifest is searched, or a folder that ``adamae-fast extract`` wrote. A query
    that is among the videos is not its own neighbour. Under torchrun the processes share the extraction; the first one
    does the rest, the others return None.

    Raises ValueError for a checkpoint, folder, manifest or option that cannot be used.
    """
    folder = FeatureFolder(target) if is_feature_folder(target) else None
    if folder is not None:
        told = _as_extracted(folder, options)
        source = open_source(folder.header["checkpoint"], told)
        require_same(source, told)
    else:
        told = ExtractConfig(output_dir=str(Path(options.out).with_suffix(".features")))
        source = open_source(target, options)
    num_videos = len(source.entries)
    if options.k > num_videos:
        raise ValueError(f"k={options.k}: there are only {num_videos} videos to choose from; choose at most so many")
    with joined(options.device, "device", PATIENCE) as (world, device), stop_signals() as stop:
        source.model.to(device)
        if world.is_first:
            print_facts([*source.describe(world.size), ("features", told.output_dir)], console)
        index = folder.header if folder else extract_features(source, told, world, console, stop)
    if not world.is_first:
        return None
    if index is None:
        return report_stop(told.output_dir, stop, console)
    if folder is None:
        refuse_unreadable(index, source.config)
        folder = FeatureFolder(told.output_dir)
    return _search(folder, source, queries, options, console)


def _as_extracted(features: FeatureFolder, options: RetrieveConfig) -> ExtractConfig:
    """The options that ``features`` were made with, and of ``options`` how videos are read and where."""
    header, default = features.header, RetrieveConfig()
    settings = header["settings"]
    given = {**vars(options), **{f"data.{key}": value for key, value in vars(options.data).items()}}
    usual = {**vars(default), **{f"data.{key}": value for key, value in vars(default.data).items()}}
    decided = ("data.manifest", "data.root", "data.sampling", "data.stride", "views", "precision", "batch_size")
    for key in (*decided, "num_frames", "frame_size"):
        if given[key] != usual[key]:
            raise ValueError(
                f"{key}={given[key]!r} has no effect: {features.path} was extracted with its own settings; leave it "
                "out, or name a checkpoint in place of the folder"
            )
    if not os.path.exists(header["checkpoint"]):
        raise ValueError(
            f"{features.path} was extracted with {header['checkpoint']}, which is not there any more; bring it back, "
            "since queries need the same weights"
        )
    if settings["tokens"] != "pooled":
        raise ValueError(f"{features.path} holds all tokens; videos are compared by pooled features: extract those")
    shared = {key: settings[key] for key in ("precision", "batch_size", "num_frames", "frame_size", "shard_videos")}
    stored = {key: settings[key] for key in ("tokens", "dtype", "format")}
    data = replace(
        options.data,
        manifest=header["data.manifest"],
        root=header["data.root"],
        sampling=settings["data.sampling"],
        stride=settings["data.stride"],
    )
    views = FeatureViewsConfig(temporal=settings["views.temporal"], spatial=settings["views.spatial"])
    return ExtractConfig(output_dir=str(features.path), data=data, views=views, **shared, **stored)


def _search(
    features: FeatureFolder, source: Source, queries: Sequence[str], options: RetrieveConfig, console: Console
) -> dict[str, Any]:
    asked = [Entry(path, None) for path in queries]
    found_QD, readable, reasons = _query_features(source, asked)
    device = found_QD.device
    places = {os.path.abspath(path): row for row, path in enumerate(features.paths)}
    # A query may be listed several times; that many more are looked up, and left out.
    names = [os.path.abspath(path) for path in features.paths]
    same = max((names.count(os.path.abspath(queries[i])) for i in readable), default=0)
    similarities_Qk, rows_Qk = nearest(found_QD, features.read().to(device), min(len(features), options.k + same))
    lines: list[dict[str, Any]] = [{"query": path, "neighbours": []} for path in queries]
    for i, similarities, rows in zip(readable, similarities_Qk.tolist(), rows_Qk.tolist(), strict=True):
        own = os.path.abspath(queries[i])
        others = [(s, row) for s, row in zip(similarities, rows, strict=True) if names[row] != own][: options.k]
        lines[i]["neighbours"] = [
            {
                "rank": rank,
                "id": features.ids[row],
                "path": features.paths[row],
                "label": features.labels[row],
                "similarity": float(f"{similarity:.6g}"),
            }
            for rank, (similarity, row) in enumerate(others, start=1)
        ]
        lines[i]["label"] = features.labels[places[own]] if own in places else None
    for i, reason in reasons.items():
        lines[i]["unreadable"] = reason
    _write(lines, asked, source, Path(options.out))
    return _print(lines, options, console)


def _query_features(source: Source, asked: Sequence[Entry]) -> tuple[Tensor, list[int], dict[int, str]]:
    """Pooled features (Q, D) of the queries that can be read, their places, and why the others cannot."""
    views = source.config.views
    device = next(source.model.parameters()).device
    found = [torch.empty(0, source.model.tokenizer.weight.shape[0], device=device)]
    readable: list[int] = []
    reasons: list[str] = []
    shown_views = show_views(features_of(source.model, "pooled"), asked, source.config, views, device=device)
    with closing(shown_views):
        for shown in shown_views:
            reasons += [video.reason for video in shown.bad]
            if shown.outputs_BX is not None:
                found.append(merge_features(shown.outputs_BX, "pooled", views.temporal * views.spatial))
                readable += shown.ids_V.tolist()
    found_QD = torch.cat(found)
    require_finite(found_QD, torch.tensor(readable), asked, "features")
    unreadable = sorted(set(range(len(asked))) - set(readable))
    return found_QD, readable, dict(zip(unreadable, reasons, strict=True))


def _read_frames(entries: Sequence[Entry], source: Source) -> list[np.ndarray | None]:
    """The centre clip of each video, uint8 (T, S, S, 3); None for one that cannot be read."""
    frames: list[np.ndarray | None] = [None] * len(entries)
    size = source.config.model
    batches = view_batches(
        entries, source.config.data, CENTRE, num_frames=size.num_frames, frame_size=size.frame_size, batch_size=8
    )
    with closing(batches):
        for batch in batches:
            for i, video_CTHW in zip(batch.ids.tolist(), batch.video, strict=True):
                frames[i] = video_CTHW.permute(1, 2, 3, 0).numpy()
    return frames


def _write(lines: Sequence[dict[str, Any]], asked: Sequence[Entry], source: Source, out: Path) -> None:
    """The sheet, and the lines beside it."""
    ids = [found["id"] for line in lines for found in line["neighbours"]]
    shown = list(dict.fromkeys(ids))
    frames = _read_frames([*asked, *(source.entries[i] for i in shown)], source)
    by_id = dict(zip(shown, frames[len(asked) :], strict=True))
    rows = [
        (
            Strip(line["query"], line.get("label"), frame),
            [Strip(n["path"], n["label"], by_id[n["id"]], n["similarity"]) for n in line["neighbours"]],
        )
        for line, frame in zip(lines, frames, strict=False)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_neighbours(rows).save(out)
    out.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _print(lines: Sequence[dict[str, Any]], options: RetrieveConfig, console: Console) -> dict[str, Any]:
    for line in lines:
        reason = f": unreadable: {line['unreadable']}" if "unreadable" in line else ""
        console.print(f"\n{line['query']}{reason}", soft_wrap=True, highlight=False, markup=False)
        for found in line["neighbours"]:
            label = "" if found["label"] is None else f"label {found['label']:<5}"
            text = f"  {found['rank']:>3}  {found['similarity']:.3f}  {label}{found['path']}"
            console.print(text, soft_wrap=True, highlight=False, markup=False)
    summary: dict[str, Any] = {"queries": len(lines), "unreadable": sum("unreadable" in line for line in lines)}
    summary |= {"sheet": options.out, "lines": str(Path(options.out).with_suffix(".jsonl"))}
    console.out(json.dumps(summary), highlight=False)
    return summary
