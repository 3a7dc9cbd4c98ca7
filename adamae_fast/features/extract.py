"""Frozen features of every video of a manifest, computed once, in shards that resume.

Shapes: B clips, V videos, S views of a video, N tokens, D width, X either (D,) or (N, D).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from adamae_fast.config_features import DEFAULT_DTYPES, ExtractConfig, FeatureConfig, Tokens
from adamae_fast.config_finetune import FinetuneConfig
from adamae_fast.data.manifest import Entry, digest_entries, read_manifest
from adamae_fast.data.quarantine import BadVideo
from adamae_fast.device import describe_device
from adamae_fast.distributed.world import World, joined
from adamae_fast.features.store import DTYPES, FeatureStore, ShardContent
from adamae_fast.interop.convert import detect_layout
from adamae_fast.interop.starting_point import open_encoder
from adamae_fast.model.video_encoder import VideoEncoder
from adamae_fast.run_folder import RunFolder, find_weights
from adamae_fast.train.evaluate import refuse_too_many, trained_with
from adamae_fast.train.predict import require_finite, show_views
from adamae_fast.train.signals import stop_signals
from adamae_fast.train.summary import print_facts
from adamae_fast.version import __version__

log = logging.getLogger("adamae_fast")


def extract(checkpoint: str, options: ExtractConfig, console: Console) -> dict[str, Any] | None:
    """Write the features of every video of a manifest, or go on with it; return what is printed as JSON.

    Under torchrun the processes share the videos; the first one returns it, the others return None.

    Raises ValueError for a checkpoint, manifest, folder or option that cannot be used, and RunStoppedError for more
    unreadable videos than data.max_bad_share allows (the features of the others are there) or for features that are
    not finite.
    """
    if not options.output_dir:
        raise ValueError("output_dir is required: name a folder for the features")
    source = open_source(checkpoint, options)
    with joined(options.device, "device") as (world, device), stop_signals() as stop:
        source.model.to(device)
        if world.is_first:
            print_facts([*source.describe(world.size), ("features", options.output_dir)], console)
        index = extract_features(source, options, world, console, stop)
    if not world.is_first:
        return None
    if index is None:
        return report_stop(options.output_dir, stop, console)
    for video in index["unreadable"]:
        line = f"unreadable: {video['path']}: {video['reason']}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    summary: dict[str, Any] = {"output_dir": options.output_dir, "stopped_by": None}
    summary |= {key: index[key] for key in ("num_videos", "num_readable", "num_labelled", "shape")}
    summary |= {"num_unreadable": len(index["unreadable"]), "dtype": index["settings"]["dtype"]}
    console.out(json.dumps(summary), highlight=False)
    refuse_unreadable(index, source.config)
    return summary


def report_stop(output_dir: str, stop: Sequence[str], console: Console) -> dict[str, Any]:
    """Say that a signal, to this process or another one, has stopped the command; return what is printed as JSON."""
    summary = {"output_dir": output_dir, "stopped_by": stop[0] if stop else "a signal to another process"}
    console.print(f"stopped by {summary['stopped_by']}; what is done stands, and the same command goes on")
    console.out(json.dumps(summary), highlight=False)
    return summary


@dataclass(frozen=True)
class Source:
    """A checkpoint, how it is shown videos, and which."""

    checkpoint: Path
    """The folder or file itself, where a run was named."""

    model: VideoEncoder
    weights_sha256: str
    config: FinetuneConfig
    entries: Sequence[Entry]

    def with_manifest(self, manifest: str, root: str | None) -> Self:
        """The same with the videos of another manifest. Raises ManifestError."""
        data = replace(self.config.data, manifest=manifest, root=root)
        return replace(self, entries=read_manifest(manifest, root), config=replace(self.config, data=data))

    def describe(self, world_size: int) -> list[tuple[str, str]]:
        """What the user is told first."""
        data, views, size = self.config.data, self.config.views, self.config.model
        device = next(self.model.parameters()).device
        shared = f", {world_size} processes" if world_size > 1 else ""
        frames = "a frame of each part" if data.sampling == "segments" else f"stride {data.stride}"
        return [
            ("checkpoint", f"{self.checkpoint}, {size.size}"),
            ("videos", f"{data.manifest}, {len(self.entries)} videos"),
            (
                "clips",
                f"{size.num_frames} frames of {size.frame_size} × {size.frame_size}, {data.sampling} ({frames}), "
                f"{views.temporal} × {views.spatial} views",
            ),
            ("device", f"{describe_device(device)}, {self.config.train.precision}{shared}"),
        ]


def open_source(checkpoint: str, options: FeatureConfig) -> Source:
    """Load an encoder and read the manifest. Raises ValueError for what cannot be used."""
    path = find_checkpoint(checkpoint)
    model = open_encoder(path, options.num_frames, options.frame_size)
    config = options.applied_to(trained_with(path, model.config))
    if options.data.stride is not None and config.data.sampling == "segments":
        log.warning("data.stride has no effect: data.sampling=segments takes a frame of each part of the video")
    if not config.data.manifest:
        raise ValueError("data.manifest is required: name an annotation file, or a folder of videos")
    entries = read_manifest(config.data.manifest, config.data.root)
    return Source(path, model, weights_checksum(model), config, entries)


def find_checkpoint(checkpoint: str) -> Path:
    """The best checkpoint of a fine-tuning run, else the newest of a run; what is no run, as it is."""
    path = Path(checkpoint)
    return find_weights(path)[0].parent if detect_layout(path) == "adamae-fast" else path


def weights_checksum(model: VideoEncoder) -> str:
    """SHA-256 of the weights that features depend on, whichever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("head."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def features_of(model: VideoEncoder, tokens: Tokens) -> Callable[[Tensor], Tensor]:
    """What is computed of a clip: its pooled features (B, D), or all tokens (B, N, D)."""
    return (lambda video: model.pool(model.features(video))) if tokens == "pooled" else model.features


def merge_features(features_BX: Tensor, tokens: Tokens, num_views: int) -> Tensor:
    """From the S views of each video to its features: their mean (V, D), or their tokens in order (V, S·N, D)."""
    features_VSX = features_BX.unflatten(0, (-1, num_views))
    return features_VSX.float().mean(1) if tokens == "pooled" else features_VSX.flatten(1, 2)


def extract_features(
    source: Source, options: ExtractConfig, world: World, console: Console, stop: Sequence[str]
) -> dict[str, Any] | None:
    """Make the missing shards of ``options.output_dir``, this process its share; return the index when all is there.

    ``source.model`` is on its device. Returns None where a signal, whose name is in ``stop``, came before, on any
    process.
    """
    store = _store(source, options)
    store.check()  # on every process, so that all refuse alike
    with world.held_by_first(RunFolder(store.folder).lock()):
        world.on_first(store.begin)
        missing = world.on_first(store.missing)
        if world.is_first and len(missing) < store.num_shards:
            log.info("%s: %d of %d shards are there", store.folder, store.num_shards - len(missing), store.num_shards)
        mine = missing[world.rank :: world.size]
        if not all(world.gather(_write_shards(store, mine, source, options, world.is_first, console, stop))):
            return None
        return world.on_first(store.finish)


def require_same(source: Source, options: ExtractConfig) -> None:
    """Raise FeaturesError unless the folder ``options.output_dir`` was made with this source and these options."""
    _store(source, options).check()


def refuse_unreadable(index: dict[str, Any], config: FinetuneConfig) -> None:
    """Raise TooManyBadVideosError if more videos of a finished index are unreadable than data.max_bad_share allows."""
    bad = [BadVideo(video["path"], video["reason"]) for video in index["unreadable"]]
    refuse_too_many(bad, index["num_videos"], config.data.max_bad_share)


def _store(source: Source, options: ExtractConfig) -> FeatureStore:
    config = source.config
    views, batch_size = config.views, config.train.batch_size
    num_views = views.temporal * views.spatial
    dtype = options.dtype or DEFAULT_DTYPES[options.tokens]
    per_batch = max(1, batch_size // num_views)
    settings = {
        "weights_sha256": source.weights_sha256,
        "entries_sha256": digest_entries(source.entries),
        "tokens": options.tokens,
        "dtype": dtype,
        "format": options.format,
        "num_frames": config.model.num_frames,
        "frame_size": config.model.frame_size,
        "data.sampling": config.data.sampling,
        "data.stride": None if config.data.sampling == "segments" else config.data.stride,
        "views.temporal": views.temporal,
        "views.spatial": views.spatial,
        "precision": config.train.precision,
        # Both decide which clips are computed together, and so the last bits. A shard is a whole number of batches.
        "batch_size": batch_size,
        "shard_videos": -(-options.shard_videos // per_batch) * per_batch,
    }
    width = source.model.tokenizer.weight.shape[0]
    # Whoever reads the index may be in another folder.
    paths = {
        "checkpoint": os.path.abspath(source.checkpoint),
        "data.manifest": os.path.abspath(os.path.expanduser(config.data.manifest)),
        "data.root": None if config.data.root is None else os.path.abspath(os.path.expanduser(config.data.root)),
    }
    told = {key: value for key, value in {**paths, **settings}.items() if not key.endswith("_sha256")}
    words = [f"--{key}={value}" for key, value in told.items() if value is not None and key != "checkpoint"]
    command = ["adamae-fast", "extract", os.path.abspath(source.checkpoint), *words]
    facts = {
        **paths,
        "command": shlex.join(command),
        "shape": [width] if options.tokens == "pooled" else [num_views * source.model.grid.num_tokens, width],
        "versions": {"adamae-fast": __version__, "torch": torch.__version__},
    }
    return FeatureStore(Path(options.output_dir), settings, facts, len(source.entries))


def _write_shards(
    store: FeatureStore,
    shards: Sequence[int],
    source: Source,
    options: ExtractConfig,
    shows_progress: bool,
    console: Console,
    stop: Sequence[str],
) -> bool:
    """Whether all of them were written before ``stop``."""
    entries, config = source.entries, source.config
    numbers = [i for shard in shards for i in store.range_of(shard)]
    if not numbers:
        return True
    num_views = config.views.temporal * config.views.spatial
    shown_views = show_views(
        features_of(source.model, options.tokens),
        entries,
        config,
        config.views,
        device=next(source.model.parameters()).device,
        numbers=numbers,
    )
    dtype = DTYPES[options.dtype or DEFAULT_DTYPES[options.tokens]]
    with (
        closing(shown_views),
        Progress(console=console, disable=not shows_progress or not console.is_terminal, transient=True) as progress,
    ):
        task = progress.add_task("videos", total=len(numbers))
        for shard in shards:
            waiting = len(store.range_of(shard))
            features = [torch.empty(0, *store.shape, dtype=dtype)]
            ids: list[int] = []
            bad: list[BadVideo] = []
            while waiting:
                if stop:
                    return False
                shown = next(shown_views)
                bad += shown.bad
                if shown.outputs_BX is not None:
                    features_VX = merge_features(shown.outputs_BX, options.tokens, num_views).to(dtype).cpu()
                    require_finite(features_VX, shown.ids_V, entries, "features")
                    features.append(features_VX)
                    ids += shown.ids_V.tolist()
                waiting -= len(shown.ids_V) + len(shown.bad)
                progress.advance(task, len(shown.ids_V) + len(shown.bad))
            store.write(shard, ShardContent(torch.cat(features), ids, bad), entries)
    return True
