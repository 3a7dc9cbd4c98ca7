"""Pictures of the report: one PNG for each result file of a command that has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]

PUBLISHED, PLAIN, OURS = "#9a9a9a", "#5b8db8", "#d1622b"
"""Colours of the baselines and of ours."""


def _colour(arm: str) -> str:
    return OURS if arm.startswith("ours") else PUBLISHED if arm.startswith("published") else PLAIN


def _caption(figure: Figure, result: Result) -> None:
    taken = result["conditions"]
    words = [taken["device"], f"torch {taken['torch']}", f"commit {taken['commit']}", taken["date"]]
    words.append(f"load {taken['load']} at the start")
    if result.get("quick"):
        words.append("QUICK RUN OF A TINY MODEL")
    figure.text(0.01, 0.01, ", ".join(words), fontsize=7.5, color="#555555")


def _bars(axes: Axes, names: list[str], values: list[float], texts: list[str], ends: list[float]) -> None:
    """Horizontal bars with a text behind the end of each, or of what is drawn over it."""
    axes.barh(range(len(names)), values, color=[_colour(name) for name in names], height=0.7)
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        axes.text(end, i, f" {text}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlim(0, 1.3 * max(ends))
    axes.spines[["top", "right"]].set_visible(False)


def step(result: Result) -> Figure:
    """Time and memory of every arm, a row of axes for each batch size."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in result["rows"]})
    gpu = any("allocated_bytes" in row for row in result["rows"])
    height = sum(0.9 + 0.28 * sum(row["batch"] == batch for row in result["rows"]) for batch in batches)
    figure = Figure(figsize=(9.5, height + 0.5), layout="constrained")
    grid = figure.subplots(len(batches), 2, squeeze=False)
    for (left, right), batch in zip(grid, batches, strict=True):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        names = [row["arm"] for row in rows]
        middle = [row["ms"] for row in rows]
        digits = 0 if min(middle) > 100 else 1
        faster = result["speedup"].get(str(batch), {})
        ratios = [f"  ({faster[name]:.2f}×)" if faster else "" for name in names]
        texts = [f"{ms:.{digits}f}{ratio}" for ms, ratio in zip(middle, ratios, strict=True)]
        _bars(left, names, middle, texts, [row["ms_p80"] for row in rows])
        spread = [[m - row["ms_p20"] for m, row in zip(middle, rows, strict=True)]]
        spread.append([row["ms_p80"] - m for m, row in zip(middle, rows, strict=True)])
        left.errorbar(middle, range(len(rows)), xerr=spread, fmt="none", ecolor="#333333", elinewidth=0.8)
        against = f"  (× {result['speedup_over']})" if faster else ""
        left.set_xlabel(f"batch {batch}: ms a step, median, 20 % to 80 %{against}", fontsize=9)
        key, scale, unit = ("allocated_bytes", 1e9, "allocated peak, GB") if gpu else (
            "saved_bytes_per_clip", 1e6, "kept for the backward, MB a clip"
        )  # fmt: skip
        kept = [row[key] / scale for row in rows]
        digits = 2 if min(kept) < 10 else 0
        _bars(right, names, kept, [f"{value:.{digits}f}" for value in kept], kept)
        right.set_xlabel(f"batch {batch}: {unit}", fontsize=9)
        right.set_yticks([])
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr, call-arg]
    _caption(figure, result)
    return figure


def memory(result: Result) -> Figure:
    """The paper's table: a group of bars for each case."""
    from matplotlib.figure import Figure

    gpu = "allocated" in result["what"]
    scale = 2**30 if gpu else 1e6
    rows = result["rows"]
    arms = ["published", *(key for key in rows[0] if key.startswith("ours-"))]
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(arms)
    shades = [PUBLISHED, "#d1622b", "#e39a6f", "#f0c9b2", "#f8e4d9"]
    for i, arm in enumerate(arms):
        values = [row[arm] / scale if isinstance(row[arm], int) else 0 for row in rows]
        axes.bar(
            [x + (i - (len(arms) - 1) / 2) * width for x in range(len(rows))], values, width, color=shades[i], label=arm
        )
    if gpu:
        baseline = [x - (len(arms) - 1) / 2 * width for x in range(len(rows))]
        axes.plot(baseline, [row["paper_gib"] for row in rows], "k_", markersize=12, label="paper")
    axes.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=40, ha="right", fontsize=8)
    axes.set_ylabel("allocated peak at batch 16, GiB" if gpu else "kept for the backward, MB a clip")
    parts = [row["part"] for row in rows]
    for part in dict.fromkeys(parts):
        first = parts.index(part)
        last = len(parts) - 1 - parts[::-1].index(part)
        axes.text((first + last) / 2, 1.01, part, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
        if first:
            axes.axvline(first - 0.5, color="#cccccc", linewidth=0.8)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=6, loc="outside upper center")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr, call-arg]
    _caption(figure, result)
    return figure


def throughput(result: Result) -> Figure:
    """Clips a second: bars of one batch size, or lines over batch size, a style for each arm and place of the clips."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "refused" not in row]
    lines: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        lines.setdefault((f"{row['strategy']} {row['ratio']:g}", row["arm"], row["clips"]), []).append(row)
    batches = sorted({row["batch"] for row in rows})
    has_arms = len({arm for _, arm, _ in lines}) > 1
    names = [
        ", ".join([mask, *([arm] if has_arms else []), *([f"{clips} clips"] if clips != "device" else [])])
        for mask, arm, clips in lines
    ]
    figure = Figure(figsize=(6.5, 4 if len(batches) > 1 else 1.2 + 0.28 * len(lines)), layout="constrained")
    axes = figure.subplots()
    if len(batches) == 1:
        values = [line[0]["clips_per_s"] for line in lines.values()]
        texts = [f"{value:.{0 if value > 100 else 1 if value > 10 else 2}f}" for value in values]
        _bars(axes, names, values, texts, values)
        for patch, (_, arm, _) in zip(axes.patches, lines, strict=True):
            patch.set_facecolor(_colour(arm))
        axes.set_xlabel(f"clips a second at batch {batches[0]}", fontsize=9)
    else:
        colours = {mask: f"C{i}" for i, mask in enumerate(dict.fromkeys(mask for mask, _, _ in lines))}
        kinds = list(dict.fromkeys((arm, clips) for _, arm, clips in lines))
        styles = ("o-", "o--", "s:", "s-.", "^-", "^--")
        for name, ((mask, arm, clips), line) in zip(names, lines.items(), strict=True):
            x, y = ([row[key] for row in line] for key in ("batch", "clips_per_s"))
            style = styles[kinds.index((arm, clips)) % len(styles)]
            axes.plot(x, y, style, color=colours[mask], label=name, markersize=4, linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(0)
        axes.set_xlabel("batch, clips")
        axes.set_ylabel("clips a second")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=2, loc="outside upper center")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr, call-arg]
    _caption(figure, result)
    return figure


def data(result: Result) -> Figure:
    """Clips a second of one process, for each set of videos; prepared files in full colour."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(row["data"] for row in result["rows"]))
    rows_of = {name: [r for r in result["rows"] if r["data"] == name and not r["workers"]] for name in sets}
    height = 1.1 + 0.24 * max(map(len, rows_of.values()))
    figure = Figure(figsize=(5.2 * len(sets), height), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(sets), squeeze=False)[0], rows_of.items(), strict=True):
        names = [
            row["arm"] + (f", {row['repeat']} crops" if row["repeat"] > 1 else "") + f", {row['files']}" for row in rows
        ]
        values = [row["clips_per_s"] for row in rows]
        _bars(axes, names, values, [f"{value:.0f}" for value in values], values)
        for patch, row in zip(axes.patches, rows, strict=True):
            patch.set_alpha(1.0 if row["files"] == "prepared" else 0.6)
        axes.set_xlabel(f"{name}: clips a second, one process, one thread", fontsize=9)
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr, call-arg]
    _caption(figure, result)
    return figure


def transfer(result: Result) -> Figure:
    """Accuracy of each arm: the mean as a bar, each seed as a dot, chance as a line."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(6.5, 1.3 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    means = [100 * row["top1_mean"] for row in rows]
    texts = [f"  {mean:.1f} ± {100 * row['top1_std']:.1f} %" for mean, row in zip(means, rows, strict=True)]
    ends = [100 * max(row["top1"]) for row in rows]
    _bars(axes, [row["arm"] for row in rows], means, texts, ends)
    for i, row in enumerate(rows):
        axes.patches[i].set_facecolor(PUBLISHED if row["arm"] == "scratch" else OURS)
        axes.plot([100 * value for value in row["top1"]], [i] * len(row["top1"]), "o", color="#333333", markersize=4)
    axes.axvline(100 * result["chance"], color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"top-1 after {result['steps']} steps of fine-tuning, %; dots: seeds; dotted: chance", fontsize=9)
    figure.get_layout_engine().set(rect=(0, 0.07, 1, 0.93))  # type: ignore[union-attr, call-arg]
    _caption(figure, result)
    return figure


PICTURES = {
    "step": step,
    "finetune_step": step,
    "memory": memory,
    "throughput": throughput,
    "data": data,
    "transfer": transfer,
}


def draw(found: dict[str, list[Result]], folder: Path) -> list[Path]:
    """Write a PNG beside the page for every result that has a picture; return their paths."""
    written: list[Path] = []
    for name, make in PICTURES.items():
        for result in found.get(name, []):
            path = folder / f"{result['file']}.png"
            folder.mkdir(exist_ok=True)
            make(result).savefig(path, dpi=150, metadata={"Software": None})
            written.append(path)
    return written
