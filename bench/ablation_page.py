"""``python -m bench.ablation_page``: docs/ablation.md and its picture from the committed CSV of ``bench.ablation``.

No figure of the page is typed by hand, and no finding: what stands in words follows from the figures.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import conditions, plots, table1
from bench.ablation import NO_PRETRAINING, ROWS, SMALL_DATA, read_csv
from bench.report import RESULTS, caption, table
from bench.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = conditions.ROOT / "docs" / "ablation.md"
PICTURE = conditions.ROOT / "docs" / "ablation.png"
CURVES = conditions.ROOT / "docs" / "ablation_curves.png"

DEFAULT, RANDOM, TUBE, FRAME = "adaptive 95 %", "random 90 %", "tube 90 %", "frame 87.5 %"
"""Rows of part (a) that the findings compare."""

ADAPTIVITY = 2.0
"""At least this is wanted of the default's adaptivity figure."""

RANDOM_RANGE = (0.95, 1.05)
"""And this of random masks."""

COLUMNS = (
    "case", "visible of tokens", "fine-tuned, %", "probe, %", "adaptivity", "entropy of p", "error", "kept, MB a clip",
    "ViT-B kept, MB a clip", "pre-training, s", "paper, %",
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
        return cls(path.stem, read_csv(path), json.loads(path.with_suffix(".json").read_text()))

    def of(self, part: str, case: str) -> list[Row]:
        """Its seeds."""
        return [row for row in self.rows if (row["part"], row["case"]) == (part, case)]

    def spread(self, part: str, case: str, key: str) -> Spread | None:
        """Of a figure; None where the row has none, or was not measured."""
        values = [float(row[key]) for row in self.of(part, case) if row[key]]
        return Spread.of(values) if values else None

    def seconds(self, part: str, case: str) -> Spread | None:
        """Of pre-training."""
        rows = self.about["rows"]
        values = [row["pretrain"] for row in rows if (row["part"], row["case"]) == (part, case)]
        return Spread.of(values) if values else None


def shown(spread: Spread | None, scale: float = 1.0, digits: int = 1) -> str:
    """A cell."""
    return "–" if spread is None else spread.shown(scale, digits)


def part_table(study: Study, part: str, cases: Iterable[table1.Case]) -> list[str]:
    """One part of the table; the paper's default in bold."""
    lines = []
    for case in cases:
        rows = study.of(part, case.name)
        paper = "–" if math.isnan(case.paper_top1) else f"{case.paper_top1:g}"
        if not rows:
            lines.append((case.name, *["not measured"] * (len(COLUMNS) - 2), paper))
            continue
        is_default = settings_of(case) == DEFAULTS
        first = rows[0]

        def spread(key: str, scale: float = 1.0, digits: int = 1, name: str = case.name) -> str:
            return shown(study.spread(part, name, key), scale, digits)

        is_scratch = part == NO_PRETRAINING.part
        seconds = study.seconds(part, case.name)
        lines.append(
            (
                f"**{case.name}**" if is_default else case.name,
                "–" if is_scratch else f"{first['visible']} of {first['tokens']}",
                spread("top1", 100),
                spread("probe", 100),
                spread("adaptivity", digits=2),
                spread("entropy", digits=2),
                "–" if is_scratch else spread("error", digits=3),
                "–" if is_scratch else f"{int(first['kept_bytes']) / 1e6:.2f}",
                "–" if is_scratch else f"{int(first['kept_bytes_vitb']) / 1e6:.0f}",
                "–" if is_scratch or seconds is None else f"{seconds.mean:.0f}",
                paper,
            )
        )
    return table(COLUMNS, lines)


_DEFAULT_CASE = next(case for case in table1.CASES if case.name == DEFAULT)


def settings_of(case: table1.Case) -> tuple[object, ...]:
    """What its runs are decided by, beside the budget."""
    return case.model, case.mask, case.loss, case.share, case.sampler_lr_scale


DEFAULTS = settings_of(_DEFAULT_CASE)


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
                lines.append(f"* **Adaptive 95 % against {other}, {name}.** {compare(mine, theirs)}.")
    accuracies = {case: spread for case in (DEFAULT, RANDOM, TUBE, FRAME) if (spread := get(case, "top1"))}
    if FRAME in accuracies:
        worst = min(accuracies, key=lambda case: accuracies[case].mean)
        lines.append(
            f"* **Frame masking** is {'the worst' if worst == FRAME else f'not the worst, {worst} is'} of the four by "
            f"fine-tuned accuracy ({accuracies[FRAME].shown(100)} %)."
        )
    scratch = study.spread(NO_PRETRAINING.part, NO_PRETRAINING.name, "top1")
    best = accuracies.get(DEFAULT)
    if scratch and best:
        lines.append(f"* **Against no pre-training**, fine-tuned: {compare(best, scratch, 'without')}.")
    kept = {case: int(study.of(part, case)[0]["kept_bytes_vitb"]) / 1e6 for case in accuracies}
    if DEFAULT in kept and RANDOM in kept:
        less = kept[DEFAULT] < kept[RANDOM]
        lines.append(
            f"* **Memory.** Of ViT-B, a clip keeps {kept[DEFAULT]:.0f} MB for the backward with adaptive masks at "
            f"95 %, {kept[RANDOM]:.0f} MB with random ones at 90 %: {'less' if less else 'more'}. At the size of this "
            "study the sampler, which sees all tokens, weighs more than the encoder, which sees few."
        )
    return [*lines, *small_data_findings(study), ""]


def small_data_findings(study: Study) -> list[str]:
    """What made the sampler look harder, and whether that helped."""
    part = SMALL_DATA[0].part
    figures = {}
    for case in SMALL_DATA:
        adaptivity, top1 = (study.spread(part, case.name, key) for key in ("adaptivity", "top1"))
        if adaptivity and top1:
            figures[case.name] = adaptivity, top1
    papers = SMALL_DATA[0].name
    if papers not in figures or len(figures) == 1:
        return []
    sharpest = max(figures, key=lambda name: figures[name][0].mean)
    best = max(figures, key=lambda name: figures[name][1].mean)
    highest, best_top1 = figures[sharpest][0], figures[best][1]
    lines = [
        f"* **The sampler on little data.** Of part (g), *{sharpest}* has the highest adaptivity, "
        f"{highest.shown(digits=2)} (at least {ADAPTIVITY:g}: {met(highest.mean >= ADAPTIVITY)}). Without a baseline "
        "the sampling loss is at rest where p is proportional to the error of reconstruction; a baseline b in its "
        "place where it is proportional to what is above b times the mean."
    ]
    if best == papers:
        lines.append("* **No other setting** of part (g) has a better fine-tuned accuracy than the defaults.")
    else:
        gain = compare(best_top1, figures[papers][1])
        lines.append(f"* **Best setting for little data**, fine-tuned, against the defaults: *{best}*, {gain}.")
    return lines


def met(is_met: bool) -> str:
    """In words."""
    return "met" if is_met else "missed"


def compare(mine: Spread, theirs: Spread, other: str = "against") -> str:
    """In words, by the larger of the two deviations."""
    gap, deviation = mine.mean - theirs.mean, max(mine.std, theirs.std)
    verdict = (
        "better by more than a standard deviation" if gap > deviation
        else "worse by more than a standard deviation" if gap < -deviation
        else "equal within a standard deviation"
    )  # fmt: skip
    return f"{mine.shown(100)} % {other} {theirs.shown(100)} %: {verdict}"


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
        "The paper's Table 1 in miniature, on the [rendered action set](data.md#rendered-sets), whose classes differ "
        f"in motion alone. Of its fourteen classes {len(budget['classes'])}: {', '.join(budget['classes'])}; chance is "
        f"{1 / len(budget['classes']):.1%}. {budget['num_videos'] - budget['num_val']} videos for training, "
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
        f"{caption(about)} {len(runs)} runs of {sum(runs.values()) / 3600:.1f} hours in all, {about['processes']} at "
        "once.",
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
        f"![Error and adaptivity in pre-training, loss in fine-tuning]({CURVES.name})",
        "",
        "*Means over seeds. Errors under different masks do not compare. In the middle: how much more probability the "
        "sampler gives to what moves, on the clips of training. To the right: the loss of fine-tuning.*",
        "",
    ]
    for part, cases in parts().items():
        lines += [f"## {part}", "", *part_table(study, part, cases)]
    lines += [
        "**fine-tuned**: top-1 after the last step, on the centre clip. **probe**: top-1 of a linear head on frozen "
        "pooled features. **adaptivity**: how much more often visible tokens lie on what moves than tokens do. "
        "**entropy of p** over ln N: 1 is uniform. **error**: reconstruction error at the end of pre-training; masks "
        "differ in how hard "
        "they are, so it compares rows of one mask alone. **kept**: bytes kept for the backward, fp32, by calculation "
        "that tests compare with what is counted; of this model, and of the paper's ViT-B at 16 × 224². "
        "**pre-training, s**: by the clock, with other runs on the other cores; the first runs decode the videos for "
        "all.",
        "",
        "## Again",
        "",
        "```bash",
        "python -m bench.ablation --preset cpu   # the same CSV, bit for bit, on the same kind of machine",
        "python -m bench.ablation_page           # this page",
        "```",
        "",
        "`--part '(a)'` and `--only 'adaptive 95 %'` do a part; stopped at any moment, the same command goes on. "
        "`--preset gpu` spends more on each run; its length on a GPU is not measured.",
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
    names = [(part, case.name) for part, cases in shown_parts.items() for case in cases]
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colour: Callable[[str], str] = lambda name: plots.OURS if name == DEFAULT else plots.PLAIN  # noqa: E731
    for axes, key, scale, title in (
        (left, "top1", 100.0, "fine-tuned top-1, %; dotted: chance"),
        (right, "adaptivity", 1.0, "adaptivity; dotted: masks that look at nothing"),
    ):
        for i, (part, name) in enumerate(names):
            values = [float(row[key]) * scale for row in study.of(part, name) if row[key]]
            if values and not (key == "adaptivity" and part == NO_PRETRAINING.part):
                axes.barh(i, statistics.fmean(values), color=colour(name), height=0.7)
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
    left.set_yticks(range(len(names)), [f"{name}   {part[:3] if part[0] == '(' else ''}" for part, name in names])
    left.invert_yaxis()
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))  # type: ignore[union-attr, call-arg]
    plots._caption(figure, study.about)
    return figure


CURVE_ROWS = (
    ("(a) masking", DEFAULT),
    ("(a) masking", RANDOM),
    ("(a) masking", TUBE),
    ("(a) masking", FRAME),
    (SMALL_DATA[0].part, "baseline 0.9, rate × 3"),
    (NO_PRETRAINING.part, NO_PRETRAINING.name),
)


def curves(study: Study) -> Figure:
    """Adaptivity in pre-training and loss in fine-tuning, by step."""
    from matplotlib.figure import Figure

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
        for number, (part, name) in enumerate(CURVE_ROWS):
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


def write_page() -> None:
    """Write the page of the first study among the results."""
    found = sorted(RESULTS.glob("ablation_*.csv"))
    if not found:
        sys.exit(f"error: {RESULTS} holds no ablation_*.csv; run python -m bench.ablation first")
    study = Study.read(found[0])
    PAGE.write_text(page(study))
    picture(study).savefig(PICTURE, dpi=150, metadata={"Software": None})
    curves(study).savefig(CURVES, dpi=150, metadata={"Software": None})
    print("written:", *(path.relative_to(conditions.ROOT) for path in (PAGE, PICTURE, CURVES)))


if __name__ == "__main__":
    write_page()
