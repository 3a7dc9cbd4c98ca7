"""The HTML report of a run: one file, no scripts, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from adamae_fast.report.adaptivity import AdaptivityResult
from adamae_fast.report.curves import adaptivity_bars, compact_number, line_chart, share_map
from adamae_fast.report.figures import LAST_LINES, finite, headline, series
from adamae_fast.run_folder import RunFolder, read_json_lines

CHARTS = (
    ("loss_reconstruction", "Reconstruction loss", "a"),
    ("loss_sampling", "Sampling loss", "b"),
    ("lr", "Learning rate", "c"),
    ("grad_norm", "Gradient norm", "c"),
    ("data_wait_share", "Share of time waiting for data", "b"),
    ("decode_seconds", "Seconds of decoding a clip", "b"),
    ("batches_ready", "Batches ready when one is asked for", "b"),
)
SAMPLER_CHARTS = (
    ("probability_entropy", "Entropy of the probabilities, in nats", "a"),
    ("probability_max", "Largest probability", "a"),
    ("error_lift", "Error lift", "b"),
    ("motion_lift", "Motion lift", "b"),
    ("sampler_grad_norm", "Gradient norm of the sampler", "c"),
    ("clamped_share", "Share of masked tokens without gradient", "c"),
)
MAX_QUARANTINE_ROWS = 200


@dataclass(frozen=True)
class VideoFigure:
    """The pictures of one video in the report."""

    name: str
    caption: str
    strip_png: bytes
    animation_gif: bytes


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    label: str
    value: str
    note: str
    unit: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture of a metric over the run."""

    title: str
    note: str
    svg: Markup


def write_page(
    path: str | Path,
    *,
    title: str,
    run: RunFolder | None = None,
    figures: Sequence[VideoFigure] = (),
    adaptivity: AdaptivityResult | None = None,
    facts: Sequence[tuple[str, str]] = (),
    unreadable: Sequence[tuple[str, str]] = (),
    num_tokens: int | None = None,
    alarms: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML file and return its path.

    Args:
        path: the file to write.
        title: heading, such as the run's name.
        run: the run whose metrics.jsonl, quarantine.jsonl and config.yaml are shown; what it lacks is left out.
        figures: pictures of videos, in order.
        adaptivity: result of ``measure_adaptivity``.
        facts: name and value of what the run ran on (device, precision, versions).
        unreadable: path and reason of videos that could not be pictured.
        num_tokens: N of the run's clips, which a uniform entropy is known from.
        alarms: what was wrong with the run's sampler, and when.

    All text is escaped; images are data URIs and curves inline SVG.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    metrics = read_json_lines(run.metrics) if run else []
    quarantine = read_json_lines(run.quarantine) if run else []
    config = run.config.read_text(encoding="utf-8") if run and run.config.is_file() else None
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = _data_uri
    html = environment.get_template("report.html").render(
        title=title,
        cards=_cards(metrics, len({line["path"] for line in quarantine}), adaptivity),
        charts=_charts(metrics, CHARTS),
        sampler_charts=_charts(metrics, SAMPLER_CHARTS, _references(num_tokens)),
        mask_charts=_mask_charts(metrics),
        alarms=alarms,
        adaptivity=adaptivity,
        adaptivity_svg=adaptivity_bars(adaptivity) if adaptivity else None,
        figures=figures,
        facts=facts,
        config=config,
        quarantine_columns=_columns(quarantine),
        quarantine=quarantine[:MAX_QUARANTINE_ROWS],
        quarantine_left_out=max(0, len(quarantine) - MAX_QUARANTINE_ROWS),
        unreadable=unreadable,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    # A file name need not be valid Unicode; what cannot be written shows as "?".
    temporary.write_text(html, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path


def _data_uri(content: bytes, kind: str) -> str:
    """An image inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _charts(
    metrics: Sequence[dict[str, Any]],
    kinds: Sequence[tuple[str, str, str]],
    references: Mapping[str, tuple[float, str]] | None = None,
) -> list[Chart]:
    """One chart for each known metric that has at least two finite values and is not always the same zero."""
    charts = []
    for key, title, colour in kinds:
        steps, values = series(metrics, key)
        if len(values) > 1 and any(values):
            reference = (references or {}).get(key)
            svg = line_chart(steps, values, label=title, colour=colour, smooth=key != "lr", reference=reference)
            charts.append(Chart(title, f"last {compact_number(values[-1])}", svg))
    return charts


def _references(num_tokens: int | None) -> dict[str, tuple[float, str]]:
    """What a sampler that looks at nothing would have, by metric."""
    references = {"error_lift": (1.0, "ignores the error"), "motion_lift": (1.0, "ignores motion")}
    if num_tokens is not None:
        references["probability_entropy"] = (math.log(num_tokens), "uniform")
    return references


def _mask_charts(metrics: Sequence[dict[str, Any]]) -> list[Chart]:
    """A map of where in time the visible tokens were, if at least two lines say so and a clip has several steps."""
    prefix = "visible_in_time/"
    num_slots = len({key for line in metrics for key in line if key.startswith(prefix)})
    steps, rows = [], []
    for line in metrics:
        shares = [value for slot in range(num_slots) if (value := finite(line, f"{prefix}{slot}")) is not None]
        if len(shares) == num_slots:
            steps.append(float(line["step"]))
            rows.append(shares)
    if num_slots < 2 or len(rows) < 2:
        return []
    title = "Visible tokens by their time in the clip"
    newest = f"last {min(rows[-1]) * 100:.0f} to {max(rows[-1]) * 100:.0f} %, evenly {100 / num_slots:.3g} %"
    return [Chart(title, newest, share_map(steps, rows, label=title))]


def _cards(metrics: Sequence[dict[str, Any]], num_quarantined: int, adaptivity: AdaptivityResult | None) -> list[Card]:
    """The headline figures that this run has."""
    cards = []
    run = headline(metrics)
    first, last, fall = run["loss_first"], run["loss_last"], run["loss_fall"]
    if first is not None and last is not None and fall is not None:
        change = f"{-fall * 100:+.0f} %".replace("-", "−")
        count = min(LAST_LINES, len(metrics))
        note = f"{compact_number(first)} → {compact_number(last)}, mean of the last {count} lines"
        cards.append(Card("Loss", change, note))
    if adaptivity:
        untrained, random = adaptivity["untrained"]["value"], adaptivity["random"]["value"]
        note = f"untrained {untrained:.2f}×, random masks {random:.2f}×"
        cards.append(Card("Adaptivity", f"{adaptivity['adaptive']['value']:.2f}×", note))
    if run["clips_per_second"] is not None:
        cards.append(Card("Speed", compact_number(run["clips_per_second"]), "mean over the run", "clips/s"))
    if run["data_wait_share"] is not None:
        note = "of the time, on average"
        if run["decode_seconds"] is not None:
            note += f"; decoding {run['decode_seconds'] * 1000:.0f} ms a clip"
        if run["batches_ready"] is not None:
            note += f", {run['batches_ready']:.1f} batches ready"
        cards.append(Card("Waiting for data", f"{run['data_wait_share'] * 100:.0f} %", note))
    _, memory = series(metrics, "memory_bytes")
    if memory:
        cards.append(Card("Peak memory", f"{max(memory) / 2**30:.1f}", "GPU, or this process on a CPU", "GiB"))
    if metrics:
        note = "unreadable videos left out" if num_quarantined else "every video could be read"
        cards.append(Card("Quarantined", str(num_quarantined), note))
    return cards


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Keys of all rows, path and reason first."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return sorted(keys, key=lambda key: ("path", "reason").index(key) if key in ("path", "reason") else 2)
