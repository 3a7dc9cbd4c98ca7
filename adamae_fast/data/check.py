"""``adamae-fast data check``: what is in a manifest's videos, and which of them are unreadable and why."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from json import dumps

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from adamae_fast.config import DecoderName
from adamae_fast.data.dali import Suitability
from adamae_fast.data.dataset import ReasonAgainst
from adamae_fast.data.decode import VideoError, open_entry, require_decoder
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.device import pick_device


@dataclass(frozen=True, kw_only=True)
class CheckedVideo:
    """One row; what could not be found out of an unreadable video is None."""

    path: str
    """Video file, or folder of images."""

    label: int | None = None
    """Its class; None where the manifest does not say."""

    codec: str | None = None
    """Name of its codec, or the images' extension."""

    width: int | None = None
    """Pixels of the upright picture."""

    height: int | None = None
    """Pixels of the upright picture."""

    frames: int | None = None
    """Frames that a clip can be drawn from."""

    fps: float | None = None
    """Average frames per second; None for images."""

    duration: float | None = None
    """Seconds; None for images."""

    decoder: str | None = None
    """What read it: decord, pyav or pillow; or dali, which would decode it here. With --decoder dali, also why not."""

    problem: str | None = None
    """Why it is unreadable; None if it is not."""


def check_manifest(manifest: str, root: str | None = None, decoder: DecoderName = "auto", json: bool = False) -> int:
    """Print a table of all videos of a manifest, or one JSON object, and say what is unreadable and why.

    Of each video the first, the middle and the last frame are decoded. Of prepared videos the checksums are compared.

    Args:
        manifest: an annotation file, a folder of videos, or a prepared folder.
        root: folder that relative paths start from; the manifest's own folder if null.
        decoder: auto: PyAV; pyav, decord: that one; dali: read as with auto, and say which videos DALI would decode on
            this machine, and why not the others.
        json: print {manifest, videos, readable, unreadable, rows} in place of the table.

    Returns:
        The exit status: 0, or 1 if anything is unreadable.

    Raises:
        ManifestError: the manifest itself cannot be read.
        ValueError: the decoder is not installed.
    """
    require_decoder(decoder)
    reason_against = Suitability(pick_device("auto")).reason_against if decoder == "dali" else None
    entries = list(dict.fromkeys(read_manifest(manifest, root, ("MANIFEST", "--root"))))
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        rows = [_check(entry, decoder, reason_against) for entry in progress.track(entries, description="checking")]
    num_unreadable = sum(row.problem is not None for row in rows)
    if json:
        totals = {"videos": len(rows), "readable": len(rows) - num_unreadable, "unreadable": num_unreadable}
        print(dumps({"manifest": manifest, **totals, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        _print_table(rows, num_unreadable)
    return int(num_unreadable > 0)


def _check(entry: Entry, decoder: DecoderName, reason_against: ReasonAgainst | None) -> CheckedVideo:
    row = CheckedVideo(path=entry.path, label=entry.label)
    try:
        with closing(open_entry(entry, decoder)) as video:
            frames, fps = video.num_frames, video.fps
            row = replace(row, codec=video.codec, frames=frames, fps=fps, duration=frames / fps if fps else None)
            for place in dict.fromkeys((0, frames // 2, frames - 1)):
                _, height, width, _ = video.read([place]).shape
                row = replace(row, height=height, width=width, decoder=video.decoder)
            if reason_against is not None:
                reason = reason_against(video)
                row = replace(row, decoder=f"{video.decoder}, not dali: {reason}" if reason else "dali")
    except VideoError as error:
        return replace(row, problem=error.reason)
    return row


def _print_table(rows: Sequence[CheckedVideo], num_unreadable: int) -> None:
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(row.path)) for row in rows])
    if folder == os.path.sep:  # nothing in common: whole paths, which can be copied
        folder = ""
    # Narrow, so that a line of prepared videos fits into 80 columns.
    table = Table(title=folder or None, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("file", overflow="fold")
    for name in ("label", "codec", "size", "frames", "fps", "duration", "decoder"):
        table.add_column(name, justify="left" if name in ("codec", "decoder") else "right")
    for row in rows:
        table.add_row(
            Text(_shown(row.path, folder)),
            "" if row.label is None else str(row.label),
            row.codec or "",
            f"{row.width}×{row.height}" if row.width else "",
            str(row.frames or ""),
            f"{row.fps:.2f}" if row.fps else "",
            f"{row.duration:.2f} s" if row.duration else "",
            "unreadable" if row.problem else row.decoder,
            style="red" if row.problem else "",
        )
    console = Console()
    console.print(table)
    for row in rows:
        if row.problem:
            console.print(Text(f"unreadable: {row.path}: {row.problem}", style="red"), soft_wrap=True)
    console.print(f"{len(rows)} video{'s' * (len(rows) != 1)}, {num_unreadable} unreadable", highlight=False)


def _shown(path: str, folder: str) -> str:
    """The path below ``folder``; of a prepared video the member alone, whose number is its own in the whole folder."""
    _, shard, member = path.rpartition(".tar:")
    if shard:
        return member
    return os.path.relpath(path, folder) if folder else path
