"""Everything in ``bench/results`` as one page with pictures: ``python -m bench.report`` writes docs/results.md.

It also writes the README's headline table. Nothing of both is typed by hand: figures, conditions and commit come from
the result files, and what no file holds is "not measured".
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import conditions, plots
from bench.measure import ours
from bench.registry import ENTRIES
from bench.results import by_operation, conditions_of, has_ours, judge, permutation_p, speedup

RESULTS = conditions.ROOT / "bench" / "results"
PAGE = conditions.ROOT / "docs" / "results.md"

README = conditions.ROOT / "README.md"

MARKS = ("<!-- figures, written by python -m bench.report -->\n", "<!-- end of figures -->\n")
"""Around the headline in the README."""

HEADLINE = ("tuned", "tuned+compile", "ours-none", "ours-none+graph", "ours-fc1", "ours-fc1+graph")
"""Arms beside the baseline that the README shows."""

MISSING = "not measured"

QUICK = "**A quick run at tiny sizes: its figures mean nothing.**"

Result = dict[str, Any]

CPU_GOALS = (
    ("kept for the backward, recompute=none, at most 300 MB a clip", "ours-none", "saved_bytes_per_clip", 300e6),
    ("kept, recompute=pointwise, at most 190 MB a clip", "ours-pointwise", "saved_bytes_per_clip", 190e6),
    ("kept, recompute=fc1, at most 130 MB a clip", "ours-fc1", "saved_bytes_per_clip", 130e6),
    ("reads of a tensor's value by our step: none", "ours-none", "reads", 0),
)
"""Of the step on a CPU: what, arm, figure, largest value allowed."""

CPU_BATCH = 2
"""The clips of a step that they are about."""

CPU_SPEEDUP = 1.4
"""At least this many times as fast as the published code."""

GPU_GOALS: dict[tuple[str, ...], dict[str, dict[int, float]]] = {
    ("H100", "H200"): {
        "speed": {16: 2.8, 32: 3.0},
        "compiled": {32: 1.2},
        "memory": {16: 3.5, 32: 4.5},
        "mfu": {32: 0.3},
    },
    ("A100",): {"speed": {16: 2.5, 32: 2.5}, "memory": {16: 3.5, 32: 4.5}, "mfu": {32: 0.4}},
}
"""Of the step on a GPU, by words of its name: figure, and the least value at each batch size."""

CONDITIONS = (
    "device",
    "cores",
    "torch",
    "cuda",
    "cudnn",
    "triton",
    "driver",
    "nvdec",
    "commit",
    "dirty",
    "date",
    "load",
)


def read(folder: Path) -> dict[str, list[Result]]:
    """Result files by command; those of the kernels as rows under "kernels"."""
    found: dict[str, list[Result]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if "conditions" in result and "rows" in result:
            found.setdefault(result["command"], []).append({**result, "file": path.stem})
    for path in sorted(folder.glob("kernels_*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows:
            found.setdefault("kernels", []).append({"conditions": rows[0], "rows": rows, "file": path.stem})
    return found


def caption(result: Result) -> str:
    """Hardware, versions, commit, load, in one line."""
    taken = result["conditions"]
    words = "; ".join(f"{key} {taken[key]}" for key in CONDITIONS if taken.get(key))
    return f"{words}. {QUICK}" if result.get("quick") else f"{words}."


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(value: Any, scale: float = 1.0, digits: int = 1, unit: str = "") -> str:
    """A figure, or why there is none."""
    if isinstance(value, str):
        return value
    return MISSING if value is None else f"{value / scale:.{digits}f}{unit}"


def step_section(result: Result) -> list[str]:
    """Arms of a whole step, and on a CPU the goals."""
    gpu = any("allocated_bytes" in row for row in result["rows"])
    lines = [f"### {result['conditions']['device']}", "", caption(result), ""]
    lines += [f"Model: {result['model']}; {result['gflop_per_clip']} GFLOP a clip, forward and backward.", ""]
    memory = ("allocated GB", "reserved GB") if gpu else ("kept MB a clip", "peak of a step MB")
    columns = (
        "arm", "batch", "ms [p20, p80]", f"× {result['speedup_over']}", "CPU ms", "clips/s", "MFU", *memory,
        "reads", "reads by optimizer", "waits", "launches",
    )  # fmt: skip
    rows = []
    for row in result["rows"]:
        keys = ("allocated_bytes", "reserved_bytes") if gpu else ("saved_bytes_per_clip", "peak_extra_bytes")
        scale = 1e9 if gpu else 1e6
        rows.append(
            (
                row["arm"],
                str(row["batch"]),
                f"{row['ms']:.1f} [{row['ms_p20']:.1f}, {row['ms_p80']:.1f}]",
                number(result["speedup"].get(str(row["batch"]), {}).get(row["arm"]), digits=2),
                number(row["cpu_ms"]),
                number(row["clips_per_s"], digits=2),
                number(row["mfu"], 0.01, unit=" %") if gpu else "–",
                *(number(row.get(key), scale, 2 if gpu else 1) for key in keys),
                *(str(row[key]) for key in ("reads", "reads_by_optimizer", "waits", "launches")),
            )
        )
    lines += table(columns, rows)
    lines += [f"* {name}: {reason}" for name, reason in result["skipped"].items()]
    lines += ["", *what_ran(result["rows"])]
    if result["command"] == "step" and not result["quick"]:
        lines += ["", *(gpu_goals(result) if gpu else cpu_goals(result))]
    return [*lines, ""]


def what_ran(rows: list[Result]) -> list[str]:
    """Attention and implementation of the operations, arms with the same ones together."""
    arms: dict[str, list[str]] = {}
    for row in rows:
        calls = " and ".join(f"`{name.removeprefix('aten::')}` {n} times" for name, n in row["attention_ran"].items())
        operations = f"; operations in {row['operations']}" if "operations" in row else ""
        same = arms.setdefault(f"{calls or 'no fused attention'}{operations}", [])
        if row["arm"] not in same:
            same.append(row["arm"])
    return ["What ran, by the profile of one step:", "", *(f"* {', '.join(x)}: {what}" for what, x in arms.items())]


def cpu_goals(result: Result) -> list[str]:
    """What was promised for the step on a CPU, and what came out."""
    by_arm = {row["arm"]: row for row in result["rows"] if row["batch"] == CPU_BATCH}
    rows = []
    for text, arm, key, most in CPU_GOALS:
        value = by_arm.get(arm, {}).get(key)
        shown = MISSING if value is None else number(value, 1e6 if most else 1, 1 if most else 0)
        rows.append((text, shown, "–" if value is None else "yes" if value <= most else "no"))
    faster = result["speedup"].get(str(CPU_BATCH), {}).get("ours-none")
    against = result["speedup_over"] or "the published code"
    met = "–" if faster is None else "yes" if faster >= CPU_SPEEDUP else "no"
    rows.append((f"at least {CPU_SPEEDUP} times as fast as {against}", number(faster, digits=2), met))
    return table(("goal", "measured", "met"), rows)


def gpu_goals(result: Result) -> list[str]:
    """What was promised for the step on this kind of GPU, and what came out of each arm of ours in :data:`HEADLINE`."""
    device, base = result["conditions"]["device"], result["speedup_over"]
    goals = next((goals for names, goals in GPU_GOALS.items() if any(name in device for name in names)), None)
    if goals is None:
        return []
    texts = {
        "speed": f"times as fast as {base}",
        "compiled": "times as fast as tuned+compile",
        "memory": f"times less allocated than {base}",
        "mfu": "of the peak",
    }
    ours = [name for name in HEADLINE if name.startswith("ours")]
    rows = []
    for batch in sorted({row["batch"] for row in result["rows"]}):
        arms = {row["arm"]: row for row in result["rows"] if row["batch"] == batch}
        for key, by_batch in goals.items():
            if batch not in by_batch:
                continue
            least = by_batch[batch]
            values = [_figure(key, arms.get(name), arms, base) for name in ours]
            cells = [MISSING if x is None else f"{x:.2f}, {'met' if x >= least else 'missed'}" for x in values]
            rows.append((f"batch {batch}: at least {least:g} {texts[key]}", *cells))
        waits = [arms[name]["waits"] if name in arms else None for name in ours]
        cells = [MISSING if x is None else f"{x}, {'missed' if x else 'met'}" for x in waits]
        rows.append((f"batch {batch}: no wait of the host", *cells))
    return table(("goal", *ours), rows)


def _figure(key: str, row: Result | None, arms: Mapping[str, Result], base: str | None) -> float | None:
    """A figure of :data:`GPU_GOALS`; None where what it needs was not measured."""
    other = row if key == "mfu" else arms.get("tuned+compile" if key == "compiled" else base or "")
    if row is None or other is None:
        return None
    what = "allocated_bytes" if key == "memory" else "ms"
    value: float | None = row["mfu"] if key == "mfu" else other[what] / row[what]
    return value


def memory_section(result: Result) -> list[str]:
    """Table 1 of the paper."""
    scale, digits = (2**30, 2) if "allocated" in result["what"] else (1e6, 1)
    unit = "GiB" if "allocated" in result["what"] else "MB"
    ours = [key for key in result["rows"][0] if key.startswith("ours-")]
    lines = [f"### {result['conditions']['device']}", "", caption(result), "", f"Figures: {result['what']}.", ""]
    columns = ("Table 1", "case", "paper, GiB at batch 16", "arm", f"{unit}", *(f"{key}, {unit}" for key in ours))
    rows = [
        (
            row["part"],
            row["case"],
            f"{row['paper_gib']:.1f}",
            row["published_arm"],
            number(row["published"], scale, digits),
            *(number(row[key], scale, digits) for key in ours),
        )
        for row in result["rows"]
    ]
    lines += table(columns, rows)
    errors = [
        abs(row[f"predicted-{key.removeprefix('ours-')}"] / row[key] - 1)
        for row in result["rows"]
        for key in ours
        if isinstance(row[key], int)
    ]
    if errors:
        lines += [f"The predictor (`adamae_fast/plan/work.py`) is off from these by at most {max(errors):.2%}.", ""]
    if largest := result["largest_batch"]:
        found = ", ".join(f"{key} {value}" for key, value in largest.items() if key not in ("memory_gb", "how"))
        published = "" if "published" in largest else f"; published: {MISSING}"
        lines += [f"Largest batch in {largest['memory_gb']:g} GB ({largest['how']}): {found}{published}.", ""]
    return lines


def throughput_section(result: Result) -> list[str]:
    """Clips a second by strategy and batch."""
    lines = [f"### {result['conditions']['device']}", "", caption(result), ""]
    lines += ["At each batch size all masks and arms take turns.", ""]
    against = f"× {result['speedup_over']}"
    columns = ("mask", "batch", "clips from", "arm", "ms [p20, p80]", against, "CPU ms", "clips/s", "tokens/s", "MFU")
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        source = {"device": "the device", "pinned": "pinned host memory"}[row["clips"]]
        head = (f"{row['strategy']} {row['ratio']:g}", str(row["batch"]), source, row["arm"])
        if "refused" in row:
            rows.append((*head, row["refused"], *"–––––"))
            continue
        ms = f"{row['ms']:.1f} [{row['ms_p20']:.1f}, {row['ms_p80']:.1f}]"
        faster = "–" if row["speedup"] is None else f"{row['speedup']:.2f}"
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        rates = (f"{row['clips_per_s']:.2f}", f"{row['tokens_per_s']:.0f}", mfu)
        rows.append((*head, ms, faster, number(row["cpu_ms"]), *rates))
    return lines + table(columns, rows) + [f"* {case}: {reason}" for case, reason in result["skipped"].items()]


def profile_section(result: Result) -> list[str]:
    """Top operators of each profiled arm."""
    lines = [f"### {result['conditions']['device']}", "", caption(result), ""]
    for row in result["rows"]:
        counts = ", ".join(f"{key} {row[key]}" for key in ("operators", "reads", "waits", "launches"))
        lines += [f"{row['arm']}, batch {result['batch']}: {counts}.", ""]
        rows = [(f"`{x['operator']}`", f"{x['ms']:.1f}", str(x["calls"]), f"{x['share']:.1%}") for x in row["top"]]
        lines += table(("operator", "ms", "calls", "share of all"), rows)
    return lines


def kernels_section(result: Result) -> list[str]:
    """Each operation as a whole, and the goals; operations may have been measured at different times."""
    rows = result["rows"]
    lines = [f"### {result['conditions']['device']}", "", f"{conditions_of(rows)}.", ""]
    if any(row.get("quick") for row in rows):
        lines += [QUICK, ""]
    operations = by_operation(rows)
    cells = []
    for name, modes in operations.items():
        mode = ENTRIES[name].modes[-1]
        arms = modes.get(mode, {})
        if not has_ours(arms):
            continue
        mine = ours(arms)
        faster = [number(speedup(arms, over), digits=2) for over in ("published", "compiled")]
        peaks = [number(_peak(arms, arm), 1e6, 2) for arm in (mine, "published", "compiled")]
        cells.append((name, mode, mine, f"{float(arms[mine]['median_us']):.1f}", *faster, *peaks))
    columns = ("operation", "mode", "ours", "median µs", "× published", "× compiled")
    lines += table((*columns, "peak MB", "published, MB", "compiled, MB"), cells)
    verdicts = judge(operations, "cuda" if result["conditions"].get("driver") else "cpu")
    missed = [verdict for verdict in verdicts if not verdict.met]
    lines += [f"{len(verdicts) - len(missed)} of {len(verdicts)} goals are met.{' Missed:' if missed else ''}", ""]
    lines += [f"* {x.operation}, {x.mode}: {x.goal}, measured {x.measured:g}" for x in missed]
    return [*lines, "", "All modes and implementations: [kernels.md](kernels.md).", ""]


def _peak(arms: Mapping[str, Mapping[str, str]], arm: str) -> int | None:
    return int(arms[arm]["peak_bytes"]) if arm in arms else None


def data_section(result: Result) -> list[str]:
    """What the data path delivers."""
    lines = [f"### {result['conditions']['device']}", "", caption(result), ""]
    lines += [f"{result['videos']} videos of each set, rendered and encoded for this (`bench/videos.py`).", ""]
    columns = ("videos", "files", "arm", "crops", "workers", "clips/s", "decoded frames/s", "CPU ms a clip")
    lines += table(
        columns,
        [
            (
                *(str(row[key]) for key in ("data", "files", "arm", "repeat")),
                str(row["workers"] or "–"),
                f"{row['clips_per_s']:.1f}",
                f"{row['decoded_frames_per_s']:.0f}" if "decoded_frames_per_s" in row else "–",
                number(row.get("cpu_s_per_clip"), 1e-3) if "cpu_s_per_clip" in row else "–",
            )
            for row in result["rows"]
        ],
    )
    goals = [
        (goal["goal"], f"≥ {goal['least']:g}", f"{goal['measured']:.2f}", "yes" if goal["met"] else "no")
        for goal in result["goals"]
    ]
    lines += table(("ratio of clips a second, K400's shape", "goal", "measured", "met"), goals)
    for name, costs in result["prepared"].items():
        before, after = costs["original_bytes_per_video"] / 1e6, costs["prepared_bytes_per_video"] / 1e6
        seconds = f"{costs['seconds_per_video']:.2f} s a video"
        lines.append(f"* Preparing {name}: {seconds}, {before:.2f} MB before, {after:.2f} MB after.")
    if memory := result.get("memory"):
        first, last = memory["resident_mb"][0], memory["resident_mb"][-1]
        lines.append(f"* Opening {memory['opens']} files: resident memory went from {first:.0f} to {last:.0f} MB.")
    return [*lines, ""]


def real_decode_section(result: Result) -> list[str]:
    """Training on decoded videos against training on clips that are there."""
    lines = [f"### {result['conditions']['device']}", "", caption(result), ""]
    columns = ("arm", "batch", "decoder", "workers", "crops", "decoded, clips/s", "on the device, clips/s", "share")
    rows = [
        (
            *(str(row[key]) for key in ("arm", "batch", "decoder", "workers", "repeat")),
            *(f"{row[key]:.2f}" for key in ("decoded_clips_per_s", "resident_clips_per_s")),
            f"{row['share']:.1%}",
        )
        for row in result["rows"]
    ]
    return lines + table(columns, rows)


def transfer_section(result: Result) -> list[str]:
    """Fine-tuning from pre-training against training from scratch."""
    lines = [f"### {result['conditions']['device']}", "", caption(result), ""]
    videos, pretraining = result["videos"], result["pretraining"]
    lines += [
        f"{result['model']}; {', '.join(result['classes'])}: {videos['train']} rendered videos for training, "
        f"{videos['val']} of other looks for validation, chance {result['chance']:.1%}. Every fine-tuning: "
        f"{result['steps']} steps of {result['batch']} clips. Pre-training: demo {pretraining['demo']} steps on other "
        "videos; pretrained, "
        f"{pretraining['pretrained']} by the same recipe on training videos of all fourteen classes, without labels "
        f"({pretraining['seconds']:.0f} s).",
        "",
    ]
    scratch = next(row["top1"] for row in result["rows"] if row["arm"] == "scratch")
    rows = [
        (
            row["arm"],
            f"{row['rate']:g}",
            f"{row['top1_mean']:.1%} ± {row['top1_std']:.1%}",
            ", ".join(f"{value:.1%}" for value in row["top1"]),
            "–" if row["arm"] == "scratch" else f"{permutation_p(row['top1'], scratch):.2g}",
        )
        for row in result["rows"]
    ]
    columns = (
        "arm",
        "base rate",
        "top-1",
        "each seed",
        "p",
    )
    lines += table(columns, rows)
    lines += [
        "p: how likely a mean so far above scratch's is by chance, by an exact permutation test over seeds: one-sided, "
        "each arm for itself.",
        "",
    ]
    tried = ", ".join(f"{row['arm']} {row['rate']:g}: {row['top1']:.1%}" for row in result["grid"])
    lines += [f"Rates tried, on another seed and other videos for validation: {tried}.", ""]
    for row in result["rows"]:
        if len(row["rates"]) > 1:
            means = ", ".join(f"{rate}: {mean:.1%}" for rate, mean in row["rates"].items())
            lines += [f"{row['arm']} with each rate, means over seeds: {means}.", ""]
    return lines


def scaling_section(result: Result) -> list[str]:
    """Two processes against one on a CPU."""
    lines = [f"### {result['conditions']['device']}", "", caption(result), ""]
    lines += [
        f"**A smoke figure**: processes of {result['threads_per_process']} core each on one machine, gloo, no network, "
        "clips in memory. It says nothing about GPUs. *overlapped*: DDP as in training; *after*: gradients are "
        "exchanged in one piece after the backward; *none*: not at all (`bench/scaling.py`).",
        "",
    ]
    rows = [
        (
            *(str(row[key]) for key in ("model", "processes", "arm", "batch")),
            f"{row['ms']:.1f} [{row['ms_p20']:.1f}, {row['ms_p80']:.1f}]",
            *(f"{row[key]:.2f}" for key in ("steps_per_s", "clips_per_s")),
        )
        for row in result["rows"]
    ]
    lines += table(("model", "processes", "arm", "clips of each", "ms [p20, p80]", "steps/s", "clips/s"), rows)
    figures = [
        (
            f"{row['model']}, {row['processes']} processes",
            f"{row['efficiency']:.1%}",
            f"{row['waiting']:.1%}",
            "within the noise" if row["hidden"] is None else f"{row['hidden']:.1%}",
        )
        for row in result["figures"]
    ]
    columns = ("", "efficiency: alone / overlapped", "of a step, waiting for the exchange", "of the exchange, hidden")
    return lines + table(columns, figures)


SECTIONS = {
    "step": ("A training step", step_section),
    "finetune_step": ("A fine-tuning step", step_section),
    "memory": ("Memory: Table 1 of the paper", memory_section),
    "throughput": ("Throughput by batch and mask", throughput_section),
    "data": ("What the data path delivers", data_section),
    "real_decode": ("Training on decoded videos", real_decode_section),
    "profile": ("Where a step spends its time", profile_section),
    "transfer": ("Fine-tuning after pre-training", transfer_section),
    "scaling": ("Two processes on one CPU", scaling_section),
    "kernels": ("Single operations", kernels_section),
}

EXPLAINED = """\
Arms: **published**, the authors' code from a checkout, its own loop and optimizer; **published-like**, an independent
stand-in of the same operations that keeps the same tensors; **tuned**, plain PyTorch with fused attention, index
gathers, vectorised losses and fused AdamW; **ours** with what `train.recompute` computes again. Every arm gave the loss
and the gradients of the reference in fp32 before it was timed. In fine-tuning, **published** is the authors' model in a
loop like theirs, and *ours-none@NAME* is ours with that attention back end in place of what it takes by itself. Ratios
are taken inside one run. *Reads* are calls of
`item`, `nonzero`, `is_nonzero`, `_local_scalar_dense` in a step outside the optimizer; torch's fused AdamW on the CPU
reads its own step counters, which lie in host memory. *CPU ms*: of all threads of the process in a step; where
they wait for a GPU, that counts. Arms of the data path: `bench/data.py`; of fine-tuning: `bench/transfer.py`.
"""


def not_measured(results: list[Result]) -> str:
    """The kinds of device that none of the results is of; nothing where there is none."""
    measured = {"GPU" if result["conditions"].get("driver") else "CPU" for result in results}
    missing = [f"on a {device}" for device in ("GPU", "CPU") if device not in measured]
    if len(missing) == 2:
        return f"measured neither {' nor '.join(missing)}"
    return f"{MISSING} {missing[0]}" if missing else ""


def headline(found: dict[str, list[Result]]) -> str:
    """The README's table: a training step of the baseline and of the arms of :data:`HEADLINE`."""
    lines: list[str] = []
    results = [result for result in found.get("step", []) if not result["quick"]]
    for result in results:
        gpu = bool(result["conditions"].get("driver"))
        base = result["speedup_over"]
        memory = "allocated peak, GB" if gpu else "kept for the backward, MB a clip"
        key, scale = ("allocated_bytes", 1e9) if gpu else ("saved_bytes_per_clip", 1e6)
        rows = [
            (
                row["arm"],
                str(row["batch"]),
                f"{row['ms']:.{1 if gpu else 0}f}",
                number(result["speedup"][str(row["batch"])].get(row["arm"]), digits=2),
                number(row[key], scale, 2 if gpu else 0),
            )
            for row in result["rows"]
            if row["arm"] in (base, *HEADLINE)
        ]
        lines += table(("a training step", "batch", "ms", f"× {base}", memory), rows)
        lines += [f"{result['model']}. {caption(result)}", ""]
    if results:
        lines += ["What the arms are, and all other figures: [docs/results.md](docs/results.md).", ""]
    if missing := not_measured(results):
        lines.append(f"A whole training step is {missing} yet.")
    return "\n".join(lines).rstrip() + "\n"


def written_anew(text: str, marks: tuple[str, str], between: str) -> str:
    """The text with what is between its marks replaced."""
    assert all(mark in text for mark in marks)
    before, _, rest = text.partition(marks[0])
    after = rest.partition(marks[1])[2]
    return f"{before}{marks[0]}\n{between}\n{marks[1]}{after}"


def pictures_of(found: dict[str, list[Result]]) -> dict[str, list[str]]:
    """Paths of the pictures, seen from the page."""
    return {name: [f"results/{x['file']}.png" for x in found[name]] for name in plots.PICTURES if name in found}


def page(found: dict[str, list[Result]]) -> str:
    """The whole Markdown text."""
    pictures = pictures_of(found)
    lines = ["<!-- generated by python -m bench.report; do not edit -->", "", "# Results", "", EXPLAINED]
    for name, (title, section) in SECTIONS.items():
        lines += [f"## {title}", ""]
        results = found.get(name, [])
        for result in results:
            lines += section(result)
        lines += [f"![{title}]({picture})\n" for picture in pictures.get(name, [])]
        if missing := not_measured(results):
            lines += [f"This is {missing} yet.", ""]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown file to write")
    parser.add_argument("--quick", action="store_true", help="accepted like everywhere; a report is always quick")
    options = parser.parse_args(arguments)
    found = read(options.results)
    print(f"{sum(map(len, found.values()))} result files in {options.results}")
    options.page.parent.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(found, options.page.parent / "results")
    options.page.write_text(page(found))
    if options.page == PAGE:
        README.write_text(written_anew(README.read_text(), MARKS, headline(found)))
    files = [str(path) for path in pictures]
    print(f"written: {options.page}")
    summary = {
        "command": "report",
        "results": {name: len(results) for name, results in found.items()},
        "page": str(options.page),
        "pictures": files,
    }
    print(json.dumps(summary, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
