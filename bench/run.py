"""``python -m bench.run --device cpu``: measure the operations and write ``bench/results``.

Each operation's tests run first; if they are red, nothing of it is timed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from adamae_fast.device import make_current, pick_device
from adamae_fast.testing import OpShape
from bench import command, conditions, measure
from bench.registry import ENTRIES
from bench.results import COLUMNS, Row, by_operation, cells, json_line, judge, make_rows, markdown, write_csv
from bench.timing import QUICK, Plan, copy_roof

SHAPES = {
    "cpu": OpShape(batch_size=2, grid=(8, 14, 14), tubelet_size=2, patch_size=16, num_visible=78),
    "cuda": OpShape(batch_size=32, grid=(8, 14, 14), tubelet_size=2, patch_size=16, num_visible=78),
}
"""ViT-B on 16 frames of 224 × 224, 95 % masked; widths are the entries' own."""

TINY = OpShape(batch_size=2, grid=(8, 3, 3), tubelet_size=2, patch_size=16, num_visible=4)
"""For ``--quick``."""

PLANS = {"cpu": Plan(), "cuda": Plan(warm_up=10, rounds=10, block=2)}
"""On a GPU a time is the mean of several calls already."""

RESULTS = conditions.ROOT / "bench" / "results"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all runs; no file without --out")
    parser.add_argument("--operation", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="NAME")
    parser.add_argument("--missing", action="store_true", help="not what the CSV of this device and commit has already")
    parser.add_argument("--out", type=Path, help="folder of the CSV and its Markdown (default: bench/results)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return command.REFUSED if anything was refused, 1 if everything was."""
    options = parse_arguments(arguments)
    try:
        device = pick_device(options.device, key="--device")
        command.require_kernels(device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out if options.out or options.quick else RESULTS
    if options.quick and device.type == "cpu":
        measure.COMPILE_BACKEND = "aot_eager"  # the same graphs, without a minute of building
    taken = {**conditions.collect(device), "quick": "yes" if options.quick else ""}
    names = options.operation
    if options.missing and out is not None:
        before = measured_before(_path(out, taken), taken)
        names = [name for name in names if name not in before]
    rows, refused = _measure_all(names, device, out, taken, quick=options.quick)
    table = by_operation(rows)
    verdicts = judge(table, device.type)
    _print_table(rows, refused)
    if rows and float(rows[0]["load"]) > 1:
        print(f"warning: the load average was {rows[0]['load']} at the start; other work disturbs such figures")
    if out is not None and rows:
        print(f"written: {_path(out, taken)}")
    for verdict in verdicts:
        mark = "met   " if verdict.met else "missed"
        print(f"{mark} {verdict.operation} {verdict.mode}: {verdict.goal}, measured {verdict.measured:g}")
    print(json_line(rows, verdicts, refused))
    return 0 if not refused else command.REFUSED if rows else 1


def _path(out: Path, taken: Row) -> Path:
    return out / f"kernels_{conditions.slug(taken)}.csv"


def measured_before(path: Path, taken: Row) -> set[str]:
    """Operations that the CSV has of the same commit, of a tree that did not differ from it."""
    if not path.is_file() or taken["dirty"] == "yes" or taken["commit"] == "not told":
        return set()
    with path.open(newline="") as file:
        same = ("commit", "dirty", "quick")
        return {row["operation"] for row in csv.DictReader(file) if all(row.get(key) == taken[key] for key in same)}


def _write(path: Path, rows: list[Row]) -> None:
    path.with_suffix(".md").write_text(markdown(write_csv(path, rows)))


def _measure_all(
    names: list[str], device: torch.device, out: Path | None, taken: Row, *, quick: bool
) -> tuple[list[Row], dict[str, dict[str, str]]]:
    """Rows of all operations, and what was refused; each operation is on disk as soon as it is measured."""
    if device.type == "cuda":
        make_current(device)
        # Graphs are captured on a side stream only, and a backward runs on the stream of its forward.
        torch.cuda.set_stream(torch.cuda.Stream())
    rows: list[Row] = []
    refused: dict[str, dict[str, str]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("tests", total=len(names))
        gates = {name: measure.gates_of(name, device) for name in names}
        red = measure.red_gates(gate for name in names for gate in gates[name])
        progress.update(task, description="copy roof")
        roof = copy_roof(device, num_bytes=2**20) if quick else copy_roof(device)
        for name in names:
            if reasons := [red[gate] for gate in gates[name] if gate in red]:
                refused[name] = {"all": f"its tests are red ({'; '.join(reasons)})"}
                progress.advance(task)
                continue
            entry = ENTRIES[name]
            shape = replace(TINY if quick else SHAPES[device.type], width=entry.width)
            dtype = entry.cuda_dtype if device.type == "cuda" else torch.float32

            def say(what: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}")

            measured = measure.measure(entry, shape, dtype, device, QUICK if quick else PLANS[device.type], say)
            if measured.refused:
                refused[name] = measured.refused
            dtype_name = str(dtype).removeprefix("torch.")
            rows += make_rows(name, measured, shape, dtype_name, dtype.itemsize, roof, taken)
            if out is not None and rows:
                _write(_path(out, taken), rows)
            progress.advance(task)
    return rows, refused


def _print_table(rows: list[Row], refused: dict[str, dict[str, str]]) -> None:
    table = Table(*COLUMNS)
    for line in cells(rows):
        table.add_row(*line)
    for name, reasons in refused.items():
        for arm, reason in reasons.items():
            table.add_row(name, "", arm, escape(f"refused: {reason}"))
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
