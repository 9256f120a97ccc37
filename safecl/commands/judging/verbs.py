"""The verbs judge, gate, sweep, compare and report, with their arguments and their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safecl.commands.spinner import announce
from safecl.commands.verbs import verbs_of


def add_to(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for function in (judge, gate, compare, sweep, report):
        verbs_of(app)(function)


def judge(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run or of `safecl eval`.", show_default=False)
    ],
    judges: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="JUDGE",
            help="A recipe (llama-guard-3, wildguard, harmbench, shieldgemma, beaver-dam, openai), settings in YAML, "
            "or a file with them; repeatable, several form a panel.",
            show_default=False,
        ),
    ] = None,
    every_moment: Annotated[
        bool, typer.Option("--all", help="Judge every moment, not only the first and the last.")
    ] = False,
    category: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of the prompts with their risk category; by default that of the run's config.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Judge the kept answers by models: rates, agreement, disagreements. Asks again for no verdict that is there."""
    announce("judge", f"{run}, loading torch")
    from safecl.commands.judging.judge import judge_and_print

    judge_and_print(run, judges or [], every_moment=every_moment, category=category)


def gate(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="A [B] [KEY=VALUE]...",
            help="Folder of a run or of an evaluation; another one to compare with; limits, e.g. "
            "safety.gate.max_asr=0.1.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json-file", metavar="FILE", help="Write the verdict as JSON.", show_default=False)
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the verdict as JUnit XML.", show_default=False)
    ] = None,
) -> None:
    """Judge what was measured already: a run or an evaluation alone, or paired with another by prompt."""
    from safecl.commands.judging.gate import gate_folders

    raise typer.Exit(gate_folders(folders, as_json=as_json, json_file=json_file, junit=junit))


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a run, an evaluation or a model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    prompts: Annotated[
        Path | None, typer.Argument(metavar="[PROMPTS]", help="File of prompts to ask now.", show_default=False)
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Type prompts; both models answer.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Show all recorded answers, not only changed ones.")] = False,
    max_prompts: Annotated[int, typer.Option("--max", metavar="N", help="Most prompts to show.", min=1)] = 20,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.", min=1)] = 128,
) -> None:
    """Show the answers of two models side by side: recorded ones, to a file of prompts, or to what you type."""
    if live or prompts is not None:
        announce("compare", f"{a} and {b}, loading torch")
    from safecl.commands.judging.compare import compare_models

    compare_models(a, b, prompts, live=live, every=every, max_prompts=max_prompts, max_new_tokens=max_new_tokens)


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CFG", help="Run config that all runs share.", show_default=False)],
    axes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=A,B...",
            help="Settings to compare, e.g. methods=balanced,strict train.seed=0,1,2; all combinations are run.",
            show_default=False,
        ),
    ],
    ranks: Annotated[int, typer.Option(metavar="N", help="Ranks of each run.", min=1)] = 1,
    parallel: Annotated[int, typer.Option(metavar="P", help="Runs at a time.", min=1)] = 1,
    baseline: Annotated[
        str | None, typer.Option(metavar="CELL", help="Cell to test the others against; by default the first.")
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(metavar="OBJECTIVE", help='The winner, e.g. "max accuracy where asr.high <= 0.05".'),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the sweep; by default the config's output.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Make the table of what is finished; run nothing.")] = False,
) -> None:
    """Train a grid of settings and seeds, and put what they measured into one table. The same command resumes it."""
    announce("sweep", f"{config}, {' '.join(axes)}")
    from safecl.commands.judging.sweep import SweepOptions, sweep_runs

    options = SweepOptions(output, ranks, parallel, baseline, pick, table)
    raise typer.Exit(sweep_runs(config, axes, options))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Page to write; by default report.html in the run's folder, or here for several runs.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the page of one run again, or compare several runs in one page."""
    announce("report", " ".join(map(str, runs)))
    from safecl.commands.report import report_runs

    report_runs(runs, output)
