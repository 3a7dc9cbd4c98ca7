"""``python -m bench.ablation_page``: docs/ablation.md and its picture from the committed CSV of ``bench.ablation``.

No figure of the page is typed by hand, and no finding: what stands in words follows from the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamae_fast.data.actions import ACTIONS
from adamae_fast.plan import work
from bench import command, conditions, plots, table1
from bench.ablation import read_csv
from bench.ablation_runs import NO_PRETRAINING, ROWS, SMALL_DATA
from bench.report import README, RESULTS, caption, table, written_anew
from bench.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = conditions.ROOT / "docs" / "ablation.md"
PICTURE = conditions.ROOT / "docs" / "ablation.png"
CURVES = conditions.ROOT / "docs" / "ablation_curves.png"

MARKS = ("<!-- in short, written by python -m bench.ablation_page -->", "<!-- end of in short -->")
"""Around the verdict in the README."""

DEFAULT, RANDOM, TUBE, FRAME = "adaptive 95 %", "random 90 %", "tube 90 %", "frame 87.5 %"
"""Rows of part (a) that the findings compare."""

ADAPTIVITY = 2.0
"""At least this is wanted of the default's adaptivity figure."""

RANDOM_RANGE = (0.95, 1.05)
"""And this of random masks."""

HEADINGS = (
    "case", "masked", "fine-tuned, %", "probe, %", "adaptivity", "adaptivity of the error", "entropy of p", "error",
    "kept, MB a clip", "ViT-B kept, MB a clip", "pre-training, s", "paper, %",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; a single one has no deviation, which is told as 0."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def shown(self, scale: float = 1.0, digits: int = 1) -> str:
        """In a table."""
        spread = f"± {self.std * scale:.{digits}f}" if self.count > 1 else "(one seed)"
        return f"{self.mean * scale:.{digits}f} {spread}"


@dataclass(frozen=True)
class Study:
    """A CSV and what was written beside it."""

    name: str
    """Of both files, without the ending."""
    rows: list[Row]
    about: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Study:
        """The CSV at ``path`` and the JSON of the same name."""
        about = json.loads(path.with_suffix(".json").read_text())
        # Each run has a commit of its own; date and load are those of the last sitting, which wrote the file.
        commits = ", ".join(dict.fromkeys(row["commit"] for row in about["rows"]))
        about["conditions"] = {**about["conditions"], "commit": commits, "dirty": ""}
        return cls(path.stem, read_csv(path), about)

    def of(self, part: str, case: str) -> list[Row]:
        """Its seeds."""
        return [row for row in self.rows if (row["part"], row["case"]) == (part, case)]

    def spread(self, part: str, case: str, key: str) -> Spread | None:
        """Of a figure; None where the row has none, or was not measured."""
        values = [float(row[key]) for row in self.of(part, case) if row[key]]
        return Spread.of(values) if values else None

    def distinct(self, key: str) -> dict[str, Spread]:
        """A figure by configuration, which may stand in several parts of the table; without those not pre-trained."""
        names = {row["settings"]: (row["part"], row["case"]) for row in self.rows if row["part"] != NO_PRETRAINING.part}
        return {settings: spread for settings, name in names.items() if (spread := self.spread(*name, key))}

    def seconds(self, part: str, case: str) -> Spread | None:
        """Of pre-training."""
        rows = self.about["rows"]
        values = [row["pretrain"] for row in rows if (row["part"], row["case"]) == (part, case)]
        return Spread.of(values) if values else None


def shown(spread: Spread | None, scale: float = 1.0, digits: int = 1) -> str:
    """A cell."""
    return "–" if spread is None else spread.shown(scale, digits)


def part_table(study: Study, part: str, cases: Iterable[table1.Case]) -> list[str]:
    """One part of the table; the paper's default in bold. What is kept is left out where all rows keep the same."""
    lines = []
    for case in cases:
        rows = study.of(part, case.name)
        paper = "–" if math.isnan(case.paper_top1) else f"{case.paper_top1:.2f}"
        if not rows:
            lines.append((case.name, "not measured", *["–"] * (len(HEADINGS) - 3), paper))
            continue
        first = rows[0]

        def spread(key: str, scale: float = 1.0, digits: int = 1, name: str = case.name) -> str:
            return shown(study.spread(part, name, key), scale, digits)

        is_scratch = part == NO_PRETRAINING.part
        seconds = study.seconds(part, case.name)
        lines.append(
            (
                f"**{case.name}**" if is_default(case) else case.name,
                "–" if is_scratch else f"{masked(first):.1%}",
                spread("top1", 100),
                spread("probe", 100),
                spread("adaptivity", digits=2),
                "–" if is_scratch else spread("error_adaptivity", digits=2),
                spread("entropy", digits=2),
                "–" if is_scratch else spread("error", digits=3),
                "–" if is_scratch else f"{int(first['kept_bytes']) / 1e6:.2f}",
                "–" if is_scratch else f"{int(first['kept_bytes_vitb']) / 1e6:.0f}",
                "–" if is_scratch or seconds is None else f"{seconds.mean:.0f}",
                paper,
            )
        )
    columns = [
        column for column in zip(HEADINGS, *lines, strict=True)
        if "kept" not in column[0] or len({*column[1:]} - {"–"}) > 1
    ]  # fmt: skip
    headings, *rows_of_cells = zip(*columns, strict=True)
    return table(headings, rows_of_cells)


def masked(row: Row) -> float:
    """The share that is really masked of so few tokens, by the strategy's rule of rounding."""
    return 1 - int(row["visible"]) / int(row["tokens"])


_DEFAULT_CASE = next(case for case in table1.CASES if case.name == DEFAULT)


def is_default(case: table1.Case) -> bool:
    """Whether it is the paper's default under some name."""
    settings = [(x.model, x.mask, x.loss, x.share, x.sampler_lr_scale) for x in (case, _DEFAULT_CASE)]
    return settings[0] == settings[1] and case.part != NO_PRETRAINING.part


def findings(study: Study) -> list[str]:
    """What the paper claims, and what came out here."""
    part = "(a) masking"

    def get(case: str, key: str) -> Spread | None:
        return study.spread(part, case, key)

    lines = []
    ours, chance = get(DEFAULT, "adaptivity"), get(RANDOM, "adaptivity")
    if ours and chance:
        untrained = get(DEFAULT, "untrained")
        low, high = RANDOM_RANGE
        lines.append(
            f"* **Where the mask looks.** Adaptive masks at 95 % have an adaptivity of {ours.shown(digits=2)} "
            f"(at least {ADAPTIVITY:g} is wanted: {met(ours.mean >= ADAPTIVITY)}), those of the same sampler before "
            f"training {shown(untrained, digits=2)}, random masks {chance.shown(digits=2)} "
            f"({low:g} to {high:g} is wanted: {met(low <= chance.mean <= high)})."
        )
    for name, key in (("fine-tuned", "top1"), ("linear probe", "probe")):
        mine = get(DEFAULT, key)
        for other in (RANDOM, TUBE):
            theirs = get(other, key)
            if mine and theirs:
                lines.append(f"* **Adaptive 95 % against {other}, {name}:** {compare(mine, theirs)}.")
    accuracies = {case: spread for case in (DEFAULT, RANDOM, TUBE, FRAME) if (spread := get(case, "top1"))}
    if FRAME in accuracies:
        worst = min(accuracies, key=lambda case: accuracies[case].mean)
        lines.append(
            f"* **Frame masking**, fine-tuned, has {accuracies[FRAME].shown(100)} %; the worst of these four is "
            + ("this one" if worst == FRAME else f"{worst}, {accuracies[worst].shown(100)} %")
            + ". Of clips so short it leaves one step in time of "
            f"{round(1 / (1 - masked(study.of(part, FRAME)[0])))}: {masked(study.of(part, FRAME)[0]):.0%} are masked."
        )
    for name, key in (("Fine-tuned", "top1"), ("Linear probe", "probe")):
        scratch, best = study.spread(NO_PRETRAINING.part, NO_PRETRAINING.name, key), get(DEFAULT, key)
        if scratch and best:
            lines.append(f"* **{name}, adaptive 95 % against no pre-training:** {compare(best, scratch)}.")
    spreads = [spread.std for spread in study.distinct("top1").values() if spread.count > 1]
    if spreads:
        lines.append(
            f"* **How far seeds differ.** The standard deviation of fine-tuned accuracy is {100 * min(spreads):.1f} "
            f"to {100 * max(spreads):.1f} points, that of the median row {100 * statistics.median(spreads):.1f}: each "
            "loss stands still before it falls (the curves below), some seeds' later than others'. The order of rows "
            "that are closer means nothing."
        )
    if {DEFAULT, RANDOM} <= accuracies.keys():
        lines.append(memory_finding())
    return [*lines, ""]


def memory_finding() -> str:
    """Of ViT-B, by calculation: what adaptive masks save in the encoder and spend on the sampler."""
    cases = [next(case for case in table1.CASES if case.name == name) for name in (DEFAULT, RANDOM)]
    ours, theirs = (work.kept_bytes(case.model, case.mask, "none") for case in cases)
    less = ours.total() < theirs.total()

    def mb(kept: Counter[str], *keys: str) -> str:
        return f"{sum(kept[key] for key in keys or kept) / 1e6:.0f} MB"

    return (
        f"* **Memory.** Of ViT-B, a clip keeps {mb(ours)} for the backward with adaptive masks at 95 %, {mb(theirs)} "
        f"with random ones at 90 %: {'less' if less else 'more'}. The encoder keeps {mb(ours, 'encoder')} in place of "
        f"{mb(theirs, 'encoder')}, but the sampler, which sees all tokens, {mb(ours, 'sampler')}; the decoder "
        f"{mb(ours, 'decoder')} in either. The paper reports {cases[0].paper_gib:g} and {cases[1].paper_gib:g} GiB for "
        "16 clips, parameters and all."
    )


def reasons(study: Study) -> list[str]:
    """What the sampler's adaptivity depends on."""
    defaults = study.spread("(a) masking", DEFAULT, "adaptivity")
    error = study.spread("(a) masking", DEFAULT, "error_adaptivity")
    if not defaults or not error:
        return []
    lines = [
        "* **What it can learn.** The sampling loss is at rest where p is proportional to the error of reconstruction, "
        "so p need not look at what moves more than the error lies there. The error's own adaptivity is "
        f"{error.shown(digits=2)}, that of the masks {defaults.shown(digits=2)}. A baseline b "
        "(`loss.sampling_baseline`) leaves of each error what is above b times the clip's mean."
    ]
    part = SMALL_DATA[0].part
    changed = {case.name: spread for case in SMALL_DATA[1:] if (spread := study.spread(part, case.name, "adaptivity"))}
    if changed:
        each = "; ".join(f"*{name}* {spread.shown(digits=2)}" for name, spread in changed.items())
        lines.append(f"* **Other settings** {part[:3]}, adaptivity: {each}.")
    ratios = {
        case.name: spread
        for case in table1.CASES
        if case.part.startswith("(b)") and (spread := study.spread(case.part, case.name, "adaptivity"))
    }
    if ratios:
        each = "; ".join(f"*{name}* {spread.shown(digits=2)}" for name, spread in ratios.items())
        lines.append(f"* **Ratio** (b), adaptivity: {each}.")
    clamped = max(float(row["clamped"]) for row in study.rows if row["clamped"])
    lines.append(
        f"* **Clamp.** The largest share of masked tokens with a clamped p, at the end of any run, is {clamped:.2g}."
    )
    if best := best_on_little_data(study):
        adaptivity, top1 = (study.spread(part, best, key) for key in ("adaptivity", "top1"))
        papers = study.spread(part, SMALL_DATA[0].name, "top1")
        gap = adaptivity.mean - ADAPTIVITY if adaptivity else 0.0
        assert adaptivity
        assert top1
        assert papers
        beyond = "missed" if gap < 0 else "met" if gap >= adaptivity.std else "met, within a standard deviation"
        lines.append(
            f"* **Best setting for little data**, by adaptivity: *{best}*, {adaptivity.shown(digits=2)} (at least "
            f"{ADAPTIVITY:g}: {beyond}), the highest of {len(changed) + 1} rows, which flatters it. Fine-tuned, "
            f"{compare(top1, papers)} of the defaults, which are the paper's and stay."
        )
    return [*lines, ""]


def best_on_little_data(study: Study) -> str | None:
    """The row of part (g) with the highest adaptivity, of those with all seeds; None where there is but the first."""
    part = SMALL_DATA[0].part
    figures = {case.name: spread for case in SMALL_DATA if (spread := study.spread(part, case.name, "adaptivity"))}
    most = max((spread.count for spread in figures.values()), default=0)
    complete = {name: spread.mean for name, spread in figures.items() if spread.count == most}
    if len(complete) < 2 or SMALL_DATA[0].name not in complete:
        return None
    return max(complete, key=lambda name: complete[name])


def met(is_met: bool) -> str:
    """In words."""
    return "met" if is_met else "missed"


def relation(mine: Spread, theirs: Spread) -> str:
    """How one stands to the other, in units of the larger of the two deviations; empty if that cannot be told."""
    gap, deviation = mine.mean - theirs.mean, max(mine.std, theirs.std)
    if min(mine.count, theirs.count) < 2:
        return ""
    if abs(gap) <= deviation:
        return "within a standard deviation of"
    return f"more than a standard deviation {'above' if gap > 0 else 'below'}"


def compare(mine: Spread, theirs: Spread) -> str:
    """Two accuracies, in words."""
    shown = f"{mine.shown(100)} %", f"{theirs.shown(100)} %"
    how = relation(mine, theirs)
    return f"{shown[0]} is {how} {shown[1]}" if how else f"{shown[0]} and {shown[1]}, too few seeds to tell"


def verdict(study: Study) -> str:
    """The page's title, answered in two sentences; nothing without the figures for them."""
    part = "(a) masking"
    ours, chance = (study.spread(part, case, "adaptivity") for case in (DEFAULT, RANDOM))
    untrained = study.spread(part, DEFAULT, "untrained")
    mine, *others = (study.spread(part, case, "top1") for case in (DEFAULT, RANDOM, TUBE))
    if not ours or not chance or not untrained or not mine or min(ours.count, chance.count) < 2:
        return ""
    looks = "more often" if ours.mean - ours.std > chance.mean + chance.std else "no more often"
    told: list[tuple[str, str]] = []
    untold: list[tuple[str, str]] = []
    for name, theirs in zip((RANDOM, TUBE), others, strict=True):
        if theirs and (how := relation(mine, theirs)):
            (untold if how.startswith("within") else told).append((name, how))
    sentences = [
        f"Fine-tuned accuracy after adaptive masks at 95 % is {how} that after {name} ones." for name, how in told
    ]
    if untold:
        names = " and ".join(name for name, _ in untold)
        widest = max(spread.std for spread in (mine, *others) if spread)
        sentences.append(
            f"Fine-tuned accuracy after adaptive masks at 95 % cannot be told from that after {names} ones: the "
            f"seeds of a row have a standard deviation of up to {100 * widest:.0f} points."
        )
    return (
        f"**In short:** the tokens that the sampler leaves visible lie on what moves {looks} than random ones, "
        f"{ours.mean:.2f} times as often as tokens in general ({untrained.mean:.2f} before training). "
        + " ".join(sentences)
    )


def page(study: Study) -> str:
    """The text of docs/ablation.md."""
    budget, about = study.about["budget"], study.about
    seeds = sorted({row["seed"] for row in study.rows})
    # Rows that are the same configuration share a run.
    runs = {(row["run"], row["seed"]): row["pretrain"] + row["finetune"] + row["probe"] for row in about["rows"]}
    lines = [
        "<!-- generated by python -m bench.ablation_page -->",
        "",
        "# Does adaptive masking work here?",
        "",
        verdict(study),
        "",
        "The paper's Table 1 in miniature, on the [rendered action set](data.md#rendered-sets), whose classes differ "
        f"in motion alone. {len(budget['classes'])} of its {len(ACTIONS)} classes: {', '.join(budget['classes'])}; "
        f"chance is {1 / len(budget['classes']):.0%}. {budget['num_videos'] - budget['num_val']} videos for training, "
        f"{budget['num_val']} of other looks for validation, scenes of detail {budget['detail']:g}.",
        "",
        f"Each row: {budget['pretrain_steps']} steps of pre-training of the {budget['size']} model "
        f"({budget['batch_size']} clips of {about['num_frames']} × {budget['frame_size']}² a step), "
        f"{budget['finetune_steps']} steps of fine-tuning, "
        f"and a linear probe on frozen features of {budget['probe_videos']} videos; seeds {', '.join(seeds)}: mean ± "
        "standard deviation. "
        "It is a study of a tiny model for minutes: what holds here need not hold for ViT-B on SSv2, and the paper's "
        "figures stand beside these for their order alone.",
        "",
        f"{caption(about)} {len(runs)} runs of {sum(runs.values()) / 3600:.1f} hours in all, "
        f"{about['processes']} at once, in several sittings; date and load are those of the last one.",
        "",
        "![Fine-tuned accuracy and adaptivity of each row](ablation.png)",
        "",
        f"![A clip, the sampler's probabilities, and the masks of four strategies](../bench/results/{study.name}.png)",
        "",
        "*A clip of the validation part, which no run has seen: what the sampler of adaptive masks makes of it, and "
        "the tokens that each strategy leaves visible.*",
        "",
        "## What came out",
        "",
        *findings(study),
        "## Why",
        "",
        *reasons(study),
        f"![Error and adaptivity in pre-training, loss in fine-tuning]({CURVES.name})",
        "",
        "*Means over seeds. Errors under different masks do not compare. In the middle: how much more probability the "
        "sampler gives to what moves, on the clips of training. To the right: the loss of fine-tuning.*",
        "",
    ]
    lines += [
        "## The table",
        "",
        "**masked**: the share of the tokens, of which there are few, by each strategy's rule of rounding. "
        "**fine-tuned**: top-1 after the last step, on the centre clip. **probe**: top-1 of a linear head on frozen "
        "pooled features, the best of its learning rates by the same videos, so somewhat above chance by choice alone. "
        "**adaptivity**: how much more often visible tokens lie on what moves than tokens do. "
        "**adaptivity of the error**: how much more of the error of masked tokens does than of these tokens. "
        "**entropy of p** over ln N: 1 is uniform. **error**: reconstruction error at the end of pre-training; masks "
        "differ in how hard they are, and losses in their scale, so it compares rows of one mask and one loss. "
        "**kept**: bytes kept for the backward, fp32, by calculation that tests compare with what is counted; of this "
        "model, and of the paper's ViT-B at 16 × 224². **pre-training, s**: by the clock, with other runs on the other "
        "cores; the first runs decode the videos for all. **paper**: top-1 on SSv2 of ViT-B, fine-tuned.",
        "",
    ]
    for part, cases in parts().items():
        lines += [f"### {part}", "", *part_table(study, part, cases)]
    lines += [
        "## Again",
        "",
        "```bash",
        "python -m bench.ablation --preset cpu   # the same CSV, bit for bit, on the same kind of machine",
        "python -m bench.ablation_page           # this page; with two CSVs in bench/results, name one",
        "```",
        "",
        "The first one writes `bench/results/ablation_MACHINE.csv` and says so; the second one writes this page and "
        "the README's sentence from it. `--part a` and `--only 'adaptive 95 %'` do a part; stopped at any moment, the "
        "same command goes on. `--preset gpu` spends more on each run; its length on a GPU is not measured.",
    ]
    return "\n".join(lines) + "\n"


def parts() -> dict[str, list[table1.Case]]:
    """Rows by part."""
    found: dict[str, list[table1.Case]] = {}
    for case in ROWS:
        found.setdefault(case.part, []).append(case)
    return found


def picture(study: Study) -> Figure:
    """Fine-tuned accuracy and adaptivity of every row, a dot for each seed."""
    from matplotlib.figure import Figure

    shown_parts = {part: [c for c in cases if study.of(part, c.name)] for part, cases in parts().items()}
    names = [(part, case) for part, cases in shown_parts.items() for case in cases]
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, scale, title in (
        (left, "top1", 100.0, "fine-tuned top-1, %; dotted: chance"),
        (right, "adaptivity", 1.0, "adaptivity; dotted: masks that look at nothing"),
    ):
        for i, (part, case) in enumerate(names):
            values = [float(row[key]) * scale for row in study.of(part, case.name) if row[key]]
            if values and not (key == "adaptivity" and part == NO_PRETRAINING.part):
                colour = plots.OURS if is_default(case) else plots.PLAIN
                axes.barh(i, statistics.fmean(values), color=colour, height=0.7)
                axes.plot(values, [i] * len(values), "o", color="#333333", markersize=3)
        axes.axvline(
            100 / len(study.about["budget"]["classes"]) if key == "top1" else 1,
            color="#333333",
            linewidth=0.8,
            linestyle=":",
        )
        axes.set_xlabel(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    left.set_yticks(range(len(names)), [f"{case.name}   {part[:3] if part[0] == '(' else ''}" for part, case in names])
    left.set_ylim(len(names) - 0.4, -0.6)
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))  # type: ignore[union-attr, call-arg]
    plots._caption(figure, study.about)
    return figure


def curves(study: Study) -> Figure:
    """Adaptivity in pre-training and loss in fine-tuning, by step."""
    from matplotlib.figure import Figure

    rows = [("(a) masking", name) for name in (DEFAULT, RANDOM, TUBE, FRAME)]
    if best := best_on_little_data(study):
        rows.append((SMALL_DATA[0].part, best))
    rows.append((NO_PRETRAINING.part, NO_PRETRAINING.name))
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = (
        ("loss_reconstruction", "pre-training", "error of reconstruction", None),
        ("motion_lift", "pre-training", "adaptivity of p; dotted: uniform", 1.0),
        (
            "finetune_loss",
            "fine-tuning",
            "loss of fine-tuning; dotted: chance",
            math.log(len(study.about["budget"]["classes"])),
        ),
    )
    for axes, (key, training, title, level) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, (part, name) in enumerate(rows):
            runs = [row["curves"] for row in study.about["rows"] if (row["part"], row["case"]) == (part, name)]
            lines = [run[key] for run in runs if len(run[key]) > 2]
            if lines:
                values = [statistics.fmean(value for _, value in points) for points in zip(*lines, strict=True)]
                axes.plot([step for step, _ in lines[0]], values, label=name, color=f"C{number}")
        if level is not None:
            axes.axhline(level, color="#333333", linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"step of {training}", fontsize=9)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    figure.get_layout_engine().set(rect=(0, 0.07, 1, 0.93))  # type: ignore[union-attr, call-arg]
    plots._caption(figure, study.about)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Write page, pictures, and the README's verdict."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation_page",
        description="Write docs/ablation.md, its pictures, and the README's verdict, from what bench.ablation wrote.",
    )
    parser.add_argument("csv", type=Path, nargs="?", help="default: the only one in bench/results")
    path = parser.parse_args(arguments).csv
    found = [path] if path else sorted(RESULTS.glob("ablation_*.csv"))
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "no ablation_*.csv"
        raise ValueError(f"{RESULTS} holds {names}; name one CSV that python -m bench.ablation has written")
    if not (found[0].is_file() and found[0].with_suffix(".json").is_file()):
        raise ValueError(f"{found[0]}: no such CSV with its JSON beside it; python -m bench.ablation writes both")
    study = Study.read(found[0])
    PAGE.write_text(page(study))
    README.write_text(written_anew(README.read_text(), MARKS, verdict(study)))
    picture(study).savefig(PICTURE, dpi=150, metadata={"Software": None})
    curves(study).savefig(CURVES, dpi=150, metadata={"Software": None})
    print("written:", *(path.relative_to(conditions.ROOT) for path in (PAGE, README, PICTURE, CURVES)))

    return 0


if __name__ == "__main__":
    command.run(main)
