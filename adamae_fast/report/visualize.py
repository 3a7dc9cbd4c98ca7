"""Pictures and report of a checkpoint: reads videos, runs the model once on each, writes strips, GIFs and HTML."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from adamae_fast.config import PretrainConfig, load_config
from adamae_fast.data.clips import CropBox, View, apply_view, center_box, frame_ids
from adamae_fast.data.decode import VideoError, open_entry
from adamae_fast.data.manifest import Entry
from adamae_fast.data.synthetic import read_boxes
from adamae_fast.device import pick_device
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.adaptivity import AdaptivityResult, box_coverage, measure_adaptivity
from adamae_fast.report.html import VideoFigure, write_page
from adamae_fast.report.pictures import Panel, clip_panels, draw_strip, encode_gif, encode_png, strip_columns
from adamae_fast.report.sampler_alarms import sampler_alarms
from adamae_fast.run_folder import RunFolder, checkpoint_step, find_weights, read_json_lines
from adamae_fast.version import __version__

REPORT_CELL = 160
"""Largest side of a frame in the report's strips, in pixels; the strip's own file has full size."""


@dataclass(frozen=True)
class CenterClip:
    """The clip in the middle of a video: middle frames at the run's stride, largest centred square."""

    video_CTHW: torch.Tensor
    frame_ids: NDArray[np.int64]
    crop: CropBox
    num_video_frames: int


@dataclass(frozen=True)
class Report:
    """What :func:`write_report` wrote and found."""

    path: Path
    adaptivity: AdaptivityResult | None
    """None for a model without a sampler, or where no video has known boxes."""
    unreadable: list[VideoError]


def visualize(checkpoint: str, videos: list[str], out: str = "pictures", seed: int = 0, device: str = "auto") -> int:
    """Write a strip and a GIF for each video, and one HTML report with them and the run's curves.

    The centre clip of each video is masked and reconstructed once, in eval mode and fp32. A video's mask follows from
    the seed and its file's name, whatever other videos are given. Videos that have a file of boxes beside them also
    give the report's adaptivity figure. A video that cannot be read is named with its reason; the others are still
    done.

    Args:
        checkpoint: A checkpoint folder, or a run's folder, whose newest checkpoint is taken.
        videos: Video files.
        out: Folder to write; files of the same names are replaced.
        seed: Source of the masks.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.

    Returns:
        Exit status: 0, or 1 if a video could not be read.
    """
    weights_file, config_file = find_weights(checkpoint)
    folder = weights_file.resolve().parent
    run = RunFolder(folder.parent.parent)
    if folder in run.list_checkpoints():
        title = f"{run.path.name} · step {checkpoint_step(folder)}"
    else:
        run, title = RunFolder(folder), folder.name
    model = AdaMAE.from_pretrained(folder).to(pick_device(device))
    config = load_config(config_file)
    entries = [Entry(path, None) for path in videos]
    report = write_report(
        run, model, config, entries, title=title, path=Path(out) / "report.html", pictures=out, seed=seed
    )
    print(f"pictures of {len(videos) - len(report.unreadable)} of {len(videos)} videos in {out}; report: {report.path}")
    for error in report.unreadable:
        print(error, file=sys.stderr)
    if report.unreadable:
        print(f"{len(report.unreadable)} of {len(videos)} videos could not be read", file=sys.stderr)
    return 1 if report.unreadable else 0


def write_report(
    run: RunFolder,
    model: AdaMAE,
    config: PretrainConfig,
    videos: Sequence[Entry],
    *,
    boxed_videos: Sequence[Entry] = (),
    title: str = "",
    path: str | Path | None = None,
    pictures: str | Path | None = None,
    seed: int = 0,
) -> Report:
    """Picture ``videos``, measure adaptivity and write the self-contained HTML report of a run.

    Args:
        run: the folder whose metrics, quarantine and configuration are shown; what it lacks is left out.
        model: the trained model, on the device to be used; its mode is left as it was.
        config: the run's configuration; gives stride, decoder and target, and with its seed the untrained model.
        videos: those to be pictured.
        boxed_videos: more videos for the adaptivity figure, not pictured. Of all videos, those count whose boxes are
            known (``data.synthetic.read_boxes``).
        title: heading of the page; the run's folder name if empty.
        path: file to write; ``report.html`` in the run's folder if None.
        pictures: folder that also gets each video's strip (PNG) and GIF; none if None.
        seed: source of the masks.

    Videos that cannot be read are listed in the result and on the page. Raises ValueError for a broken file of boxes.
    """
    figures: list[VideoFigure] = []
    clips, coverages, unreadable = [], [], []
    names = file_names([entry.path for entry in videos])
    if pictures is not None:
        Path(pictures).mkdir(parents=True, exist_ok=True)
    for entry in dict.fromkeys([*videos, *boxed_videos]):
        video = entry.path
        try:
            clip = read_center_clip(entry, config)
        except VideoError as error:
            unreadable.append(error)
            continue
        boxes_TO4 = read_boxes(video)
        if boxes_TO4 is not None:
            clips.append(clip.video_CTHW)
            coverages.append(box_coverage(boxes_TO4, clip.frame_ids, clip.crop, model.grid))
        if video in names:
            panels = picture_clip(model, clip.video_CTHW, _mask_seed(seed, video))
            figure = _video_figure(model, video, clip, panels)
            figures.append(figure)
            if pictures is not None:
                (Path(pictures) / f"{names[video]}.png").write_bytes(encode_png(_strip(model, clip, panels, None)))
                (Path(pictures) / f"{names[video]}.gif").write_bytes(figure.animation_gif)

    adaptivity = None
    if model.sampler is not None and any(coverage.any() for coverage in coverages):
        untrained = _initial_model(config).to(next(model.parameters()).device)
        adaptivity = measure_adaptivity(model, untrained, torch.stack(clips), np.stack(coverages), seed=seed)
    page = write_page(
        path or run.report,
        title=title or run.path.resolve().name,
        run=run,
        figures=figures,
        adaptivity=adaptivity,
        facts=_facts(model, config),
        unreadable=[(error.path, error.reason) for error in unreadable],
        num_tokens=model.grid.num_tokens,
        alarms=[
            f"Step {alarm.step}: {alarm.message}."
            for alarm in sampler_alarms(read_json_lines(run.metrics), config, model)
        ],
    )
    return Report(page, adaptivity, unreadable)


def read_center_clip(entry: Entry, config: PretrainConfig) -> CenterClip:
    """Read the clip in the middle of a video, without any randomness. Raises VideoError."""
    file = open_entry(entry, config.data.decoder)
    try:
        ids = frame_ids(file.num_frames, config.model.num_frames, config.data.stride, None)
        frames_THWC = file.read(ids)
        crop = center_box(*frames_THWC.shape[1:3])
        video_CTHW = apply_view(frames_THWC, View(crop), config.model.frame_size)
        return CenterClip(video_CTHW, ids, crop, file.num_frames)
    finally:
        file.close()


def picture_clip(model: AdaMAE, video_CTHW: torch.Tensor, mask_seed: int) -> list[Panel]:
    """Run the model once on one clip, in eval mode, and draw its panels."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model(video_CTHW[None].to(device), seeds=torch.tensor([mask_seed], device=device))
    model.train(was_training)
    return clip_panels(
        video_CTHW,
        prediction_MP=output.prediction[0],
        error_M=output.error[0],
        visible_ids_K=output.visible_ids[0],
        masked_ids_M=output.masked_ids[0],
        logits_N=None if output.logits is None else output.logits[0],
        grid=model.grid,
        target=model.loss_config.target,
    )


def _mask_seed(seed: int, video: str) -> int:
    """Seed of one video's mask: independent of the other videos and of the folder that the video is in."""
    digest = hashlib.sha256(f"{seed} {Path(video).name}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], signed=True)


def _initial_model(config: PretrainConfig) -> AdaMAE:
    """The model with this configuration's random weights; torch's generator for the CPU is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return AdaMAE(config.model, config.mask, config.loss)


def _strip(model: AdaMAE, clip: CenterClip, panels: Sequence[Panel], max_cell: int | None) -> Image.Image:
    return draw_strip(panels, strip_columns(model.grid), frame_ids=clip.frame_ids.tolist(), max_cell=max_cell)


def _video_figure(model: AdaMAE, name: str, clip: CenterClip, panels: Sequence[Panel]) -> VideoFigure:
    first, last = clip.frame_ids[0], clip.frame_ids[-1]
    caption = (
        f"frames {first} to {last} of {clip.num_video_frames}"
        f" · {model.num_visible} of {model.grid.num_tokens} tokens visible"
    )
    return VideoFigure(name, caption, encode_png(_strip(model, clip, panels, REPORT_CELL)), encode_gif(panels))


def file_names(videos: Sequence[str]) -> dict[str, str]:
    """A file name without suffix for each video: its own, with a number where several videos share it."""
    names: dict[str, str] = {}
    for video in dict.fromkeys(videos):
        stem, number = Path(video).stem, 2
        name = stem
        while name in names.values():
            name, number = f"{stem}_{number}", number + 1
        names[video] = name
    return names


def _facts(model: AdaMAE, config: PretrainConfig) -> list[tuple[str, str]]:
    """What the run was, and what this report was made with."""
    device = next(model.parameters()).device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes, mask, train = config.model, config.mask, config.train
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    return [
        ("Model", f"{sizes.size}, {parameters / 1e6:.1f} M parameters"),
        (
            "Clip",
            f"{sizes.num_frames} frames of {sizes.frame_size} × {sizes.frame_size} pixels, stride {config.data.stride}",
        ),
        (
            "Mask",
            f"{mask.strategy}, ratio {mask.ratio:g}: {model.num_visible} of {model.grid.num_tokens} tokens visible",
        ),
        ("Training", f"{length}, batch {train.batch_size} × {train.accumulate}, {train.precision}, seed {config.seed}"),
        (
            "Made with",
            f"adamae-fast {__version__}, torch {torch.__version__}, Python {platform.python_version()},"
            f" {device} ({hardware})",
        ),
    ]
