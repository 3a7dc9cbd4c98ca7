"""``python -m bench.run --device cpu``: measure the operations and write ``bench/results``.

Each operation's tests run first; if they are red, nothing of it is timed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from adamae_fast.device import pick_device
from adamae_fast.testing import OpShape
from bench import conditions
from bench.measure import measure
from bench.registry import ENTRIES
from bench.results import COLUMNS, Row, by_operation, cells, json_line, judge, make_rows, markdown, write_csv
from bench.timing import QUICK, Plan, copy_roof

SHAPES = {
    "cpu": OpShape(batch_size=2, grid=(8, 14, 14), tubelet_size=2, patch_size=16, num_visible=78),
    "cuda": OpShape(batch_size=32, grid=(8, 14, 14), tubelet_size=2, patch_size=16, num_visible=78),
}
"""ViT-B on 16 frames of 224 × 224, 95 % masked; widths are the entries' own."""

RESULTS = conditions.ROOT / "bench" / "results"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="few repetitions, to see that all runs; writes no file")
    parser.add_argument("--operation", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="NAME")
    parser.add_argument("--out", type=Path, help="folder of the CSV and its Markdown (default: bench/results)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return 1 if anything was refused."""
    options = parse_arguments(arguments)
    try:
        device = pick_device(options.device, key="--device")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out if options.out or options.quick else RESULTS
    plan = QUICK if options.quick else Plan()
    rows, refused = _measure_all(options.operation, device, plan)
    table = by_operation(rows)
    verdicts = judge(table, device.type)
    _print_table(rows, refused)
    if rows and float(rows[0]["load"]) > 1:
        print(f"warning: the load average was {rows[0]['load']} at the start; other work disturbs such figures")
    if out is not None and rows:
        path = out / f"kernels_{conditions.slug(rows[0])}.csv"
        all_rows = write_csv(path, rows)
        path.with_suffix(".md").write_text(markdown(all_rows))
        print(f"written: {path}")
    for verdict in verdicts:
        mark = "met   " if verdict.met else "missed"
        print(f"{mark} {verdict.operation} {verdict.mode}: {verdict.goal}, measured {verdict.measured:g}")
    print(json_line(rows, verdicts, refused))
    return 1 if refused else 0


def _measure_all(names: list[str], device: torch.device, plan: Plan) -> tuple[list[Row], dict[str, dict[str, str]]]:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Graphs are captured on a side stream only, and a backward runs on the stream of its forward.
        torch.cuda.set_stream(torch.cuda.Stream())
    taken = conditions.collect(device)
    rows: list[Row] = []
    refused: dict[str, dict[str, str]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("copy roof", total=len(names))
        roof = copy_roof(device)
        for name in names:
            entry = ENTRIES[name]
            shape = replace(SHAPES[device.type], width=entry.width)
            dtype = entry.cuda_dtype if device.type == "cuda" else torch.float32

            def say(what: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}")

            measured = measure(entry, shape, dtype, device, plan, say)
            if measured.refused:
                refused[name] = measured.refused
            dtype_name = str(dtype).removeprefix("torch.")
            rows += make_rows(name, measured, shape, dtype_name, dtype.itemsize, roof, taken)
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
