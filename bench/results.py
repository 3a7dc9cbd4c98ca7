"""Rows of results: CSV in git, judged against the goals, one line of JSON, and Markdown, which is never typed."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adamae_fast.testing import OpShape
from bench.measure import Measured, ours
from bench.registry import ENTRIES, NOT_SLOWER, Entry, Goal

Row = dict[str, str]
"""One line of the CSV."""


def permutation_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How likely a mean as far above the other one is, were it chance which figure belongs to whom.

    The exact one-sided permutation test: over all ways to deal the figures out, the share whose difference of means is
    at least the one that was found.
    """
    pooled = [*ours, *theirs]
    found = sum(ours)
    sums = [sum(deal) for deal in itertools.combinations(pooled, len(ours))]
    return sum(total >= found - 1e-9 for total in sums) / len(sums)


def describe_shape(shape: OpShape) -> str:
    """All sizes in one word."""
    grid = "x".join(map(str, shape.grid))
    return f"B{shape.batch_size}-N{grid}-K{shape.num_visible}-D{shape.width}-P{shape.pixels_per_token}"


def minimal_bytes(entry: Entry, shape: OpShape, element_size: int, mode: str) -> int:
    """What the mode must read and write at least."""
    forward = entry.forward_bytes(shape, element_size)
    if mode == "forward" or entry.backward_bytes is None:
        return forward
    backward = entry.backward_bytes(shape, element_size)
    return backward if mode == "backward" else forward + backward


def roof_share(num_bytes: int, seconds: float, roof: float) -> float:
    """Least traffic over time, as a share of ``roof`` bytes a second."""
    return num_bytes / seconds / roof


def make_rows(
    name: str, measured: Measured, shape: OpShape, dtype: str, element_size: int, roof: float, conditions: Row
) -> list[Row]:
    """One row for each arm and mode."""
    rows = []
    for (arm, mode), figure in measured.figures.items():
        timing = figure.timing
        num_bytes = minimal_bytes(ENTRIES[name], shape, element_size, mode)
        rows.append(
            {
                "operation": name,
                "impl": arm,
                "mode": mode,
                "shape": describe_shape(shape),
                "dtype": dtype,
                "median_us": f"{timing.median * 1e6:.2f}",
                "p20_us": f"{timing.p20 * 1e6:.2f}",
                "p80_us": f"{timing.p80 * 1e6:.2f}",
                "calls": str(timing.num_calls),
                "timing": timing.how,
                "peak_bytes": str(figure.peak_bytes),
                "minimal_bytes": str(num_bytes),
                "roof_share": f"{roof_share(num_bytes, timing.median, roof):.3f}",
                "roof_gb_s": f"{roof / 1e9:.1f}",
                **conditions,
            }
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One goal against what was measured."""

    operation: str
    mode: str
    goal: str
    measured: float
    met: bool


Table = Mapping[str, Mapping[str, Mapping[str, Row]]]
"""operation → mode → arm → row."""


def by_operation(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """The rows as a :data:`Table`."""
    table: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        table.setdefault(row["operation"], {}).setdefault(row["mode"], {})[row["impl"]] = row
    return table


def speedup(arms: Mapping[str, Row], over: str) -> float | None:
    """How many times as fast ours is; None where either was not measured."""
    if over not in arms or not has_ours(arms):
        return None
    return float(arms[over]["median_us"]) / float(arms[ours(arms)]["median_us"])


def has_ours(arms: Mapping[str, Row]) -> bool:
    """Whether an arm beside the two baselines and the reference was measured."""
    return bool(set(arms) - {"published", "compiled", "reference"})


def judge(table: Table, device_type: str) -> list[Verdict]:
    """Every goal of the measured operations on this kind of device."""
    verdicts = []
    for name, modes in table.items():
        goals = [goal for goal in ENTRIES[name].goals if goal.device == device_type]
        if device_type == "cpu":
            goals.append(Goal(device="cpu", mode=ENTRIES[name].modes[-1], compiled=NOT_SLOWER))
        for goal in goals:
            verdicts += _judge(name, goal, modes.get(goal.mode, {}))
    return verdicts


def _judge(name: str, goal: Goal, arms: Mapping[str, Row]) -> list[Verdict]:
    """A goal whose arms were not measured has no verdict."""
    if not has_ours(arms):
        return []
    mine = arms[ours(arms)]
    verdicts = []

    def add(text: str, wanted: float | None, measured: float | None, *, at_least: bool = True) -> None:
        if wanted is not None and measured is not None:
            met = measured >= wanted if at_least else measured <= wanted
            sign = "≥" if at_least else "≤"
            verdicts.append(
                Verdict(
                    operation=name,
                    mode=goal.mode,
                    goal=f"{text} {sign} {wanted:.3g}",
                    measured=round(measured, 3),
                    met=met,
                )
            )

    add("× published", goal.published, speedup(arms, "published"))
    add("× torch.compile", goal.compiled, speedup(arms, "compiled"))
    if "published" in arms and int(arms["published"]["peak_bytes"]):
        own, theirs = int(mine["peak_bytes"]), int(arms["published"]["peak_bytes"])
        add("memory / published", goal.memory, own / theirs, at_least=False)
        add("bytes saved", goal.saved_bytes, theirs - own)
    add("share of copy roof", goal.roof, float(mine["roof_share"]))
    add("µs", goal.microseconds, float(mine["median_us"]), at_least=False)
    return verdicts


def json_line(rows: list[Row], verdicts: list[Verdict], refused: Mapping[str, Mapping[str, str]]) -> str:
    """Figures, ratios, goals and refusals in one line."""
    figures: dict[str, object] = {}
    for name, modes in by_operation(rows).items():
        figures[name] = {
            mode: {
                "median_us": {arm: float(row["median_us"]) for arm, row in arms.items()},
                "peak_bytes": {arm: int(row["peak_bytes"]) for arm, row in arms.items()},
                "ours": ours(arms) if has_ours(arms) else None,
                **{f"x_{over}": x and round(x, 3) for over in ("published", "compiled") for x in [speedup(arms, over)]},
            }
            for mode, arms in modes.items()
        }
    common = ("device", "cores", "torch", "commit", "dirty", "date", "load", "roof_gb_s")
    return json.dumps(
        {
            "conditions": {key: rows[0][key] for key in common} if rows else {},
            "operations": figures,
            "goals": {
                "met": sum(v.met for v in verdicts),
                "missed": sum(not v.met for v in verdicts),
                "each": [asdict(v) for v in verdicts],
            },
            "refused": refused,
        },
        separators=(",", ":"),
        ensure_ascii=False,
    )


def write_csv(path: Path, rows: list[Row]) -> list[Row]:
    """Write the rows, beside those of operations that were not measured now; return all of them."""
    measured_now = {row["operation"] for row in rows}
    if path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["operation"] not in measured_now] + rows
    order = list(ENTRIES)
    rows = sorted((row for row in rows if row["operation"] in order), key=lambda row: order.index(row["operation"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        columns = dict.fromkeys(key for row in rows for key in row)  # rows of earlier runs may lack some
        writer = csv.DictWriter(file, list(columns), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return rows


COLUMNS = (
    *("operation", "mode", "impl", "median µs [p20, p80]", "timed in"),
    *("× published", "× compiled", "peak MB", "of roof"),
)


def cells(rows: list[Row]) -> list[tuple[str, ...]]:
    """What a table shows of each row, on a screen and in Markdown."""
    table = by_operation(rows)
    out = []
    for row in rows:
        arms, median = table[row["operation"]][row["mode"]], float(row["median_us"])
        ratios = [f"{float(arms[o]['median_us']) / median:.2f}" if o in arms else "" for o in ("published", "compiled")]
        spread = f"{median:.1f} [{float(row['p20_us']):.1f}, {float(row['p80_us']):.1f}]"
        peak = f"{int(row['peak_bytes']) / 1e6:.2f}"
        share = f"{float(row['roof_share']):.1%}"
        out.append((row["operation"], row["mode"], row["impl"], spread, row["timing"], *ratios, peak, share))
    return out


def conditions_of(rows: list[Row]) -> str:
    """Under which conditions the rows were taken, in one line; several values where they differ."""
    versions = ("torch", "cuda", "cudnn", "triton", "driver")
    keys = ("device", "cores", *versions, "commit", "dirty", "date", "load", "roof_gb_s")
    values = {key: ", ".join(sorted({row[key] for row in rows if row.get(key)})) for key in keys}
    return "; ".join(f"{key} {value}" for key, value in values.items() if value)


def markdown(rows: list[Row]) -> str:
    """The results as a table, with the conditions they were taken under."""
    lines = ["<!-- generated by python -m bench.run -->", "", f"{conditions_of(rows)}."]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(line) + " |" for line in cells(rows)]
    return "\n".join(lines) + "\n"
