"""The command line: ``adamae-fast <command>``, also ``python -m adamae_fast <command>``.

Each command is one function that fills a parser and one that runs; heavy imports wait until their command is chosen.
"""

from __future__ import annotations

import difflib
import logging
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from adamae_fast.config import PretrainConfig, add_fields, add_run_arguments, build_config
from adamae_fast.config_features import ExtractConfig, ProbeConfig, RetrieveConfig
from adamae_fast.config_finetune import EvaluateConfig, FinetuneConfig
from adamae_fast.errors import RunStoppedError, ToldByFirstError
from adamae_fast.parser_errors import in_plain_words, similar_option
from adamae_fast.version import __version__

_ANY_CHECKPOINT = """A run or checkpoint of ours, of pre-training or a classifier (of a run of finetune its best one), a
published AdaMAE or VideoMAE file, a transformers folder."""


@dataclass(frozen=True)
class Command:
    """One subcommand: what it is for, its arguments, and what it does. ``run`` returns the exit status."""

    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[ArgumentParser, Namespace], int]


def _info_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print one JSON object in place of the table.")


def _info(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.info import print_info

    print_info(as_json=arguments.json)
    return 0


def _pretrain_arguments(parser: ArgumentParser) -> None:
    add_run_arguments(parser, PretrainConfig)


def _pretrain(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.train.pretrain import pretrain

    return _status_of(pretrain(build_config(parser, arguments, PretrainConfig), Console()))


def _finetune_arguments(parser: ArgumentParser) -> None:
    add_run_arguments(parser, FinetuneConfig)


def _finetune(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.train.finetune import finetune

    return _status_of(finetune(build_config(parser, arguments, FinetuneConfig), Console()))


def _status_of(summary: Mapping[str, object]) -> int:
    """A job that its scheduler stops has ended well; a chain of commands that a person interrupts should not go on."""
    return 130 if summary.get("stopped_by") == "SIGINT" else 0


def _evaluate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=str, help="A run of finetune, whose best checkpoint is taken, or a checkpoint."
    )
    add_fields(parser, EvaluateConfig)


def _evaluate(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.train.evaluate import evaluate

    evaluate(arguments.checkpoint, build_config(parser, arguments, EvaluateConfig), Console())
    return 0


def _extract_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help=_ANY_CHECKPOINT)
    add_fields(parser, ExtractConfig)


def _extract(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.features.extract import extract

    summary = extract(arguments.checkpoint, build_config(parser, arguments, ExtractConfig), Console())
    return 0 if summary is None else _status_of(summary)


def _probe_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help=_ANY_CHECKPOINT)
    add_run_arguments(parser, ProbeConfig)


def _probe(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.features.probe import probe

    results = probe(arguments.checkpoint, build_config(parser, arguments, ProbeConfig), Console())
    return 0 if results is None else _status_of(results)


def _retrieve_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("target", type=str, help=f"{_ANY_CHECKPOINT} Or a folder that adamae-fast extract wrote.")
    parser.add_argument("queries", type=str, nargs="+", help="Video files.")
    add_fields(parser, RetrieveConfig)


def _retrieve(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.features.retrieve import retrieve

    options = build_config(parser, arguments, RetrieveConfig)
    summary = retrieve(arguments.target, arguments.queries, options, Console())
    if summary is None:
        return 0
    return _status_of(summary) or int(summary.get("unreadable", 0) > 0)


def _synth_arguments(parser: ArgumentParser) -> None:
    from adamae_fast.data.synthetic import synthesize

    parser.add_argument("out", type=str, help="Folder to write; must not exist yet.")
    parser.add_function_arguments(synthesize, skip={"out"})


def _synth(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.data.synthetic import synthesize

    print(synthesize(**arguments.as_dict()))
    return 0


def _check_arguments(parser: ArgumentParser) -> None:
    from adamae_fast.data.check import check_manifest

    parser.add_argument("manifest", type=str, help="An annotation file, a folder of videos, or a prepared folder.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object in place of the table.")
    parser.add_function_arguments(check_manifest, skip={"manifest", "json"})


def _check(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.data.check import check_manifest

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may see enough before the end
    return check_manifest(**arguments.as_dict())


def _prepare_arguments(parser: ArgumentParser) -> None:
    from adamae_fast.data.prepare import prepare

    parser.add_argument("manifest", type=str, help="An annotation file, or a folder of videos.")
    parser.add_argument("out", type=str, help="Folder to make, or to go on with.")
    parser.add_function_arguments(prepare, skip={"manifest", "out"})


def _prepare(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.data.prepare import prepare

    return prepare(**arguments.as_dict())


def _visualize_arguments(parser: ArgumentParser) -> None:
    from adamae_fast.report.visualize import visualize

    parser.add_argument("checkpoint", type=str, help="A checkpoint folder, or a run's folder.")
    parser.add_argument("videos", type=str, nargs="+", help="Video files.")
    parser.add_function_arguments(visualize, skip={"checkpoint", "videos"})


def _visualize(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.report.visualize import visualize

    return visualize(**arguments.as_dict())


def _saliency_arguments(parser: ArgumentParser) -> None:
    from adamae_fast.report.saliency import saliency

    parser.add_argument("checkpoint", type=str, help="A checkpoint folder, or a run's folder, with a sampler.")
    parser.add_argument("videos", type=str, nargs="+", help="Video files.")
    parser.add_argument("--side_by_side", action="store_true", help="The video as it is to the left of it.")
    parser.add_function_arguments(saliency, skip={"checkpoint", "videos", "side_by_side"})


def _saliency(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.report.saliency import saliency

    return saliency(**arguments.as_dict())


def _convert_arguments(parser: ArgumentParser) -> None:
    from adamae_fast.interop.convert import convert

    parser.add_argument("input", type=str, help="A checkpoint or run of ours, a .pth file, a transformers folder.")
    parser.add_argument("output", type=str, help="What to write; must not exist yet.")
    parser.add_function_arguments(convert, skip={"input", "output"})


def _convert(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.interop.convert import convert

    convert(**arguments.as_dict())
    return 0


def _plan_arguments(parser: ArgumentParser) -> None:
    from adamae_fast.plan.command import add_plan_arguments

    add_plan_arguments(parser)


def _plan(parser: ArgumentParser, arguments: Namespace) -> int:
    from adamae_fast.plan.command import run_plan

    return run_plan(parser, arguments)


_MEASUREMENTS = {
    "step": "a whole training step: time, memory, agreement with other implementations; --task finetune",
    "memory": "the memory column of the paper's Table 1",
    "throughput": "clips and tokens a second against batch size and masking strategy",
    "profile": "where a training step spends its time",
    "saved": "bytes kept for the backward by each --train.recompute",
    "data": "clips a second that decoders, prepared files and workers deliver",
    "real_decode": "training on decoded videos against training on clips that are on the device already",
    "data_memory": "memory of a process that opens thousands of videos",
    "transfer": "accuracy of fine-tuning after pre-training and from scratch, on rendered actions",
    "ablation": "the paper's Table 1 in miniature, on rendered actions: accuracy, probe, where masks look",
    "ablation_page": "no measurement: docs/ablation.md from what ablation wrote",
    "scaling": "two processes against one on the CPU: efficiency, and what of the exchange hides; a smoke figure",
    "run": "single operations against plain PyTorch and torch.compile",
    "gpu": "all of these on a GPU machine, resumed where they were cut off",
    "report": "no measurement: all results as one page, docs/results.md",
}
"""Modules of bench/ that are commands, and what each measures."""


def _measurements() -> str:
    return "\n".join(f"  {name:<14}{what}" for name, what in _MEASUREMENTS.items())


def _bench_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", type=str, help=f"{', '.join(_MEASUREMENTS)}; without a name: what each measures.")
    parser.add_argument("arguments", type=str, nargs="*", help="Its own; adamae-fast bench NAME --help lists them.")


def _bench(parser: ArgumentParser, arguments: Namespace) -> int:
    return _run_bench(arguments.name, arguments.arguments)


def _run_bench(name: str, arguments: Sequence[str]) -> int:
    """Run ``python -m bench.NAME``: measurements belong to a checkout, not to an installed package."""
    import subprocess
    from pathlib import Path

    root = Path(__file__).parents[1]
    if not (root / "bench" / "run.py").is_file():
        raise ValueError(f"bench {name}: measurements run in a checkout of the project; {root} is an installation")
    if name not in _MEASUREMENTS:
        raise ValueError(f"there is no measurement {name!r}; choose one of\n{_measurements()}")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"bench.{name}", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


COMMANDS = {
    "info": Command("What is available on this machine, and why not.", _info_arguments, _info),
    "data synth": Command("Render a small labelled set of videos with known motion.", _synth_arguments, _synth),
    "data check": Command("List a manifest's videos, and what is unreadable and why.", _check_arguments, _check),
    "data prepare": Command("Encode a manifest's videos once, so that reading is cheap.", _prepare_arguments, _prepare),
    "pretrain": Command("Pre-train with adaptive, random, tube or frame masking.", _pretrain_arguments, _pretrain),
    "finetune": Command("Train a classifier, from an encoder or from scratch.", _finetune_arguments, _finetune),
    "evaluate": Command("Test a classifier with several views of each video.", _evaluate_arguments, _evaluate),
    "extract": Command("Write frozen features of a manifest's videos.", _extract_arguments, _extract),
    "probe": Command("Classify by frozen features: linear, attentive, kNN.", _probe_arguments, _probe),
    "retrieve": Command("Find the nearest videos of a query, with a contact sheet.", _retrieve_arguments, _retrieve),
    "visualize": Command("Draw what a checkpoint sees, masks and predicts.", _visualize_arguments, _visualize),
    "saliency": Command("Lay the sampler's probability map over whole videos.", _saliency_arguments, _saliency),
    "convert": Command("Convert from and to published AdaMAE, VideoMAE, transformers.", _convert_arguments, _convert),
    "plan": Command("What a run takes on many GPUs, before it is paid for.", _plan_arguments, _plan),
    "bench": Command("Measure time and memory, in a checkout: adamae-fast bench step.", _bench_arguments, _bench),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a user's error is one line on stderr and status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=logging.INFO, handlers=[_StderrHandler()], format="%(levelname)s: %(message)s", force=True
    )
    if words == ["--version"]:
        print(f"adamae-fast {__version__}")
        return 0
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return _run(name, words[length:])
    return _usage(words)


def _run(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    parser = ArgumentParser(
        prog=f"adamae-fast {name}", description=command.summary, exit_on_error=False, allow_abbrev=False
    )
    try:
        if name == "bench" and not arguments:
            raise ValueError(f"name a measurement, such as adamae-fast bench step:\n{_measurements()}")
        if name == "bench" and not arguments[0].startswith("-"):
            return _run_bench(arguments[0], arguments[1:])  # options that follow are the measurement's
        command.add_arguments(parser)
        return command.run(parser, parser.parse_args([_underscored(argument) for argument in arguments]))
    except ToldByFirstError:
        return 2
    except (ArgumentError, ValueError, OSError, RunStoppedError) as error:
        if os.environ.get("ADAMAE_DEBUG"):
            raise
        hint = similar_option(error, parser._option_string_actions)
        message = f"adamae-fast {name}: {in_plain_words(error)}{hint}"
        Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


def _underscored(argument: str) -> str:
    """An option's name as Python spells it: --short-side is --short_side."""
    name, equals, value = argument.partition("=")
    return (f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name) + equals + value


def _usage(words: list[str]) -> int:
    wants_help = words in ([], ["data"]) or words[-1] in ("-h", "--help")
    console = Console(stderr=not wants_help)
    if not wants_help:
        asked = " ".join(words[: 2 if words[0] == "data" else 1])
        similar = difflib.get_close_matches(asked, COMMANDS, n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        console.print(f"adamae-fast: there is no command {asked!r}{hint}", style="red", markup=False)
    console.print("Masked pre-training on video with adaptive masking (AdaMAE).\n")
    console.print("usage: adamae-fast COMMAND [--help]\n", markup=False)
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        console.print(f"  {name:<{width}}  {command.summary}", highlight=False)
    console.print("\nIn names of options - and _ are the same: --output-dir is --output_dir.", highlight=False)
    return 0 if wants_help else 2


class _StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is at the moment, so that lines appear above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)
