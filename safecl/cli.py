"""The command line: one small function per verb, with its arguments and its help. The bodies are in
safecl/commands/<verb>.py and are imported when the verb runs.

Nothing here imports torch, so that wrong usage and wrong configs are reported at once. Exit codes: safecl/exits.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from safecl import __version__
from safecl.commands.cache import verbs as cache
from safecl.commands.judging import verbs as judging
from safecl.commands.memory import verbs
from safecl.commands.spinner import announce
from safecl.commands.verbs import EPILOG, options_first, verbs_of
from safecl.distributed import environment, rank_files
from safecl.distributed.library_warnings import hide_future_warnings
from safecl.distributed.verbosity import Level, verbosity
from safecl.exits import ExitCode, end_process, tracebacks
from safecl.launching.network import settle_interface
from safecl.merging.registry import help_text as merge_kinds

app = typer.Typer(
    name="safecl",
    help="Continual fine-tuning of large language models that keeps their safety alignment.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

verb = verbs_of(app)

Config = Annotated[
    Path, typer.Argument(metavar="CFG", help="Run config (YAML); `safecl init` writes one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides, e.g. train.learning_rate=1e-5 tasks.0.max_rows=500",
        show_default=False,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"safecl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Print the traceback of an unexpected error (also after the verb).")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print warnings, verdicts and errors only (also after the verb).")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Print a line for every step (also after the verb).")
    ] = False,
) -> None:
    hide_future_warnings()
    verbosity.level = Level.QUIET if quiet else Level.VERBOSE if verbose else Level.NORMAL
    tracebacks.in_message = traceback
    tracebacks.folder = None


def _load(config: Path, overrides: list[str] | None) -> Any:
    from safecl.config import load_config

    return load_config(config, overrides or [])


def _begin(verb: str, config: Path, overrides: list[str] | None) -> Any:
    """Read the config and say that the verb begins, before it loads torch."""
    loaded = _load(config, overrides)
    announce(verb, f"{config} read, loading torch")
    return loaded


@verb
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Folder for all files; by default runs/demo, with the options in its name.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of corpus, model, order and draws.")] = 0,
    poison: Annotated[float, typer.Option(help="Share of poisoned rows in the task's data.", min=0.0, max=0.9)] = 0.0,
    every: Annotated[bool, typer.Option("--all", help="Ten methods, with clean and with poisoned data.")] = False,
    real: Annotated[
        bool, typer.Option("--real", help="A pretrained model of 135 M parameters, which is downloaded.")
    ] = False,
) -> None:
    """Show on a small model how fine-tuning loses refusals, and how safecl keeps them. The same command resumes it."""
    from safecl.commands.demo import show

    raise typer.Exit(show(folder, seed=seed, poison=poison, every=every, real=real))


@verb
def proof(
    folder: Annotated[Path, typer.Argument(help="Folder for the numbers and the checkpoints.")] = Path("runs/proof"),
) -> None:
    """Measure known silent failures of continual fine-tuning, and safecl on the same tasks, in a minute; needs no
    model."""
    from safecl.commands.preflight import make_folder
    from safecl.proof.run import run_proof

    make_folder(folder)
    tracebacks.folder = folder
    raise typer.Exit(run_proof(folder))


@verb
def init(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; an existing one is never overwritten.")
    ] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="Model: a Hugging Face folder or hub id.")] = None,
    train_file: Annotated[
        str | None, typer.Option("--train", help="Training rows: .jsonl, .json, .csv, .parquet or a hub id.")
    ] = None,
    memory_file: Annotated[
        str | None, typer.Option("--memory", help="Disallowed prompts with the refusals to keep: a file, or `none`.")
    ] = None,
    memory_prompts: Annotated[
        str | None,
        typer.Option(help="Disallowed prompts alone, in place of --memory; the model writes its refusals itself."),
    ] = None,
    safety_prompts: Annotated[
        str | None, typer.Option("--safety", help="Disallowed prompts to measure safety with, or `none`.")
    ] = None,
    untrusted: Annotated[
        bool | None,
        typer.Option("--untrusted/--trusted", help="Whether training rows may be poisoned: the preset strict."),
    ] = None,
    every_key: Annotated[bool, typer.Option("--all", help="Write all keys, not only the usual ones.")] = False,
) -> None:
    """Write a commented starter config; asks up to six questions on a terminal."""
    from safecl.commands.init import init_config

    init_config(
        output,
        model=model,
        train_file=train_file,
        memory=memory_file,
        memory_prompts=memory_prompts,
        safety_prompts=safety_prompts,
        untrusted=untrusted,
        every_key=every_key,
    )


@verb
def check(config: Config, overrides: Overrides = None) -> None:
    """Validate config, data and model, and print what would run, without training."""
    loaded = _begin("check", config, overrides)
    from safecl.commands.check import check_run

    check_run(loaded)


@verb
def train(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Refuse a run folder that holds a run, instead of resuming it.")
    ] = False,
) -> None:
    """Train the tasks of a run config and measure safety before, during and after. The same command resumes a run."""
    loaded = _begin("train", config, overrides)
    from safecl.commands.train import train_run

    raise typer.Exit(train_run(loaded, fresh=fresh))


@verb
def launch(
    config: Config,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]... [-- OPTION...]",
            help="Overrides of the config, and behind `--` options of `safecl train`.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        str | None, typer.Option(metavar="N|MIN:MAX", help="Nodes; 1:4 takes those that are there.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(metavar="N", help="Ranks on each node.", min=1)] = None,
    via: Annotated[str | None, typer.Option(metavar="WAY", help="torchrun, deepspeed, slurm or kubernetes.")] = None,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The first node, the same on every node.")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(metavar="K", help="Number of this node, for deepspeed without ssh.", min=0)
    ] = None,
    max_restarts: Annotated[
        int | None, typer.Option(metavar="N", help="Restarts after a failure, from the last checkpoint.", min=0)
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B", help="Runs of a sweep, as a Slurm array; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and run nothing.")] = False,
) -> None:
    """Start `safecl train` on one node or several, by torchrun, the deepspeed launcher, Slurm or Kubernetes. Every
    option has a default in the config's section `launch`."""
    from safecl.commands.launch import launch_run
    from safecl.launching.plan import with_options

    arguments = overrides or []
    loaded = _load(config, [argument for argument in arguments if not argument.startswith("-")])
    options = {"nodes": nodes, "gpus_per_node": gpus_per_node, "via": via, "rendezvous": rendezvous}
    loaded = with_options(loaded, options | {"max_restarts": max_restarts})
    raise typer.Exit(launch_run(config, arguments, loaded, dry_run=dry_run, node_rank=node_rank, sweep=sweep or []))


@verb
def scan(
    config: Config,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Screen the tasks' rows before training: rows that the aligned model would refuse, and near-duplicates of
    evaluation prompts."""
    loaded = _begin("scan", config, overrides)
    from safecl.commands.scan import scan_run

    raise typer.Exit(scan_run(loaded, as_json))


@verb
def fisher(
    config: Config,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write; by default the one that methods.ewc.fisher names, or else the store of artifacts.",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Use each row's own gradient, one pass a row: slow, to check the estimate.")
    ] = False,
) -> None:
    """Estimate the diagonal Fisher of the aligned model on the memory's rows, once, for ewc in all runs on that
    model."""
    loaded = _begin("fisher", config, overrides)
    from safecl.commands.fisher import fisher_run

    raise typer.Exit(fisher_run(loaded, output, exact=exact))


@verb
def eval_(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CFG_OR_MODEL", help="Run config, run folder, model folder or hub id.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results.json and outputs/.", show_default=False)
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="A task or group of lm-evaluation-harness; repeatable.", show_default=False),
    ] = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option(metavar="N", help="Most rows of each of these tasks.", min=1)
    ] = None,
    lm_eval_plain: Annotated[
        bool, typer.Option("--lm-eval-plain", help="Ask in these tasks without the chat template.")
    ] = False,
) -> None:
    """Measure a model without training: the tuned model of a run, or any model with safety.prompts=FILE
    eval.path=FILE."""
    announce("eval", f"{target}, loading torch")
    from safecl.commands.evaluate import evaluate_and_print
    from safecl.evaluation.harness import HarnessTasks

    harness = HarnessTasks(lm_eval, lm_eval_limit, not lm_eval_plain) if lm_eval else None
    raise typer.Exit(evaluate_and_print(target, overrides or [], output, harness))


@verbs_of(app, more=merge_kinds())
def merge(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Kind of merge; they are listed below.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the kind, e.g. alpha=0.5", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model before tuning: a folder or hub id.", show_default=False)
    ] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option(help="A tuned model or LoRA adapter; once for each. The first gives names, dtype and tokenizer."),
    ] = None,
    aligned: Annotated[str | None, typer.Option(help="The aligned model, where it is not the base.")] = None,
    data: Annotated[Path | None, typer.Option(help="Rows, for kinds that need some.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; an existing one is never overwritten.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Measure at many values: alpha=0:1:0.1, or 0.3,0.7; several give all combinations."),
    ] = None,
    eval_: Annotated[
        Path | None, typer.Option("--eval", help="Run config that says what a sweep measures.", show_default=False)
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(help="`gate`: write the point of highest utility that passes the gate; for soup also `greedy`."),
    ] = None,
    settings: Annotated[bool, typer.Option("--settings", help="Print the kind's settings, and merge nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge model folders into a new one, tensor by tensor: averages, task vectors, safety merges."""
    from safecl.commands.merge import Parents, merge_models, print_settings, refuse_half_a_sweep

    if settings:
        print_settings(kind)
        return
    parents = Parents(base, tuned or [], aligned, data)
    refuse_half_a_sweep(kind, sweep, eval_, pick)
    if eval_ is not None:
        from safecl.commands.merge_sweep import sweep_models

        raise typer.Exit(
            sweep_models(kind, overrides or [], sweep or [], eval_, pick, out=output, parents=parents, as_json=as_json)
        )
    merge_models(kind, overrides or [], out=output, parents=parents, as_json=as_json)


@verb
def rebase(
    old_base: Annotated[str, typer.Option(help="The base that the model was tuned from.", show_default=False)],
    new_base: Annotated[str, typer.Option(help="The re-aligned base.", show_default=False)],
    tuned: Annotated[str, typer.Option(help="The tuned model, or a LoRA adapter.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; an existing one is never overwritten.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. projection=columns", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Move a tuned model onto a re-aligned base of the same architecture, without the data of its tuning."""
    announce("rebase", f"{tuned} from {old_base} onto {new_base}, loading torch")
    from safecl.commands.rebase import rebase_model

    rebase_model(overrides or [], old=old_base, new=new_base, tuned=tuned, out=output, as_json=as_json)


@verb
def expand(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub id.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; an existing one is never overwritten.")
    ],
    blocks: Annotated[int, typer.Option(min=1, help="New blocks, spread evenly: a divisor of the number of blocks.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the new blocks' numbers as JSON.")] = False,
) -> None:
    """Add decoder blocks to a model, which change nothing until methods.block_expansion trains them."""
    from safecl.commands.expand import expand_model

    expand_model(model, output, blocks, as_json)


@verb
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
) -> None:
    """Show how far a run is, its step time, its last checkpoint and its slowest rank, from the run folder alone."""
    from safecl.commands.status import show_status

    show_status(run, as_json)


@verb
def env(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for issue reports and scripts.")] = False,
) -> None:
    """Print versions, device, kernel back ends and launcher variables."""
    announce("env", "loading torch")
    from safecl.commands.env import print_environment

    print_environment(as_json)


judging.add_to(app)
app.add_typer(verbs.app)
app.add_typer(cache.app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `safecl` and `python -m safecl`. Ends the process with an ExitCode."""
    is_process = arguments is None
    given = sys.argv[1:] if arguments is None else arguments
    environment.settle_environment()
    settle_interface()
    arguments = options_first(environment.without_launcher_arguments(given))
    rank_files.begin(arguments)
    try:
        app(args=arguments, prog_name="safecl")
    except SystemExit as ended:
        rank_files.write_code(ended.code)
        if is_process:
            end_process(ended.code)
        raise


__all__ = ["ExitCode", "app", "main", "verb"]
