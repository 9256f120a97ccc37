"""The verbs of `safecl memory`, which make, show, export, fill and check a replay memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safecl.commands.verbs import verbs_of
from safecl.config import ConfigError, MemoryConfig
from safecl.exits import ExitCode
from safecl.storage.model_folder import tuned_model

if TYPE_CHECKING:
    from safecl.replay import ReplayBuffer
    from safecl.terminal import Terminal

app = typer.Typer(
    name="memory",
    help="The replay memory: make one, cache the model's outputs, show it, export it, import rows, check it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

verb = verbs_of(app, "memory")

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a memory itself.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides, e.g. memory.teacher.k=32 deepspeed.stage=3", show_default=False
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer that turns ids into text; the run's own by default.", show_default=False)
]


def memory_folder(run: Path) -> Path:
    """Return the folder of a run's memory, or the folder itself. Raises ConfigError where neither holds a memory."""
    for folder in (run / "memory", run):
        if any(folder.glob("index-*.index")) or any(folder.glob("rows-*.segment")) or (folder / "cache.json").exists():
            return folder
    hint = "runs keep theirs in RUN/memory" if run.is_dir() else "there is no such folder"
    raise ConfigError(f"{run}: no memory here; {hint}")


def _console() -> Terminal:
    from safecl.terminal import Terminal

    return Terminal()


@verb
def show(
    run: Run,
    rows: Annotated[int, typer.Option(help="Print this many rows, evenly over the memory.", min=0)] = 0,
    tokenizer: Tokenizer = None,
) -> None:
    """Print what a memory holds: rows, tokens, bytes, categories, stored outputs."""
    from safecl.replay import ReplayBuffer

    buffer = ReplayBuffer.open(memory_folder(run))
    console = _console()
    for name, value in _facts(buffer):
        console.print(f"{name:<12} {value}")
    if len(buffer):
        console.print(_categories(buffer), soft_wrap=False)
    if rows and len(buffer):
        _print_rows(console, buffer, rows, _decoder(run, tokenizer, buffer))
    for problem in buffer.problems:
        console.print(f"damaged      {problem}", style="red")


def _facts(buffer: ReplayBuffer) -> list[tuple[str, str]]:
    table, config = buffer.table, buffer.config
    capacity = config.capacity if isinstance(config.capacity, str) else f"{config.capacity:,} rows"
    tokens, targets = int(table["length"].sum()), int(table["targets"].sum())
    on_disk = sum(path.stat().st_size for path in buffer.folder.glob("rows-*.segment"))
    facts = [
        ("folder", str(buffer.folder)),
        ("rows", f"{len(buffer):,} of {buffer.num_seen:,} seen; room for {capacity}, policy {config.policy}"),
        ("tokens", f"{tokens:,}, {targets:,} of them supervised"),
        ("outputs", _outputs(buffer)),
        ("bytes", f"{int(table['nbytes'].sum()):,} held, {on_disk:,} on the disk"),
        (
            "draws",
            f"{buffer.drawer.policy}, seed {buffer.seed}"
            + (f", rows rest {config.rest_steps} steps" if config.rest_steps else ""),
        ),
    ]
    kept_out = ", ".join(f"{count:,} {reason}" for reason, count in buffer.guard.kept_out.items())
    return facts + ([("kept out", kept_out)] if kept_out else [])


def _outputs(buffer: ReplayBuffer) -> str:
    from safecl.replay import ReplayError, SharedOutputs

    own = int((buffer.table["form"] != 0).sum())
    stored = f"{own:,} rows with stored outputs of the aligned model"
    if not isinstance(buffer.teacher_of, SharedOutputs):
        return stored
    try:
        shared = int((buffer.teacher_of.reader.has(buffer.table["row_id"]) & (buffer.table["form"] == 0)).sum())
    except (ConfigError, ReplayError) as error:
        return f"{stored}; {error}"
    return f"{shared + own:,} rows with outputs of the aligned model, {shared:,} of them in {buffer.teacher_of.cache}"


def _categories(buffer: ReplayBuffer) -> Any:
    import numpy as np
    from rich.table import Table

    from safecl.terminal import plain

    table = Table("source", "task", buffer.config.balance_by, "rows", "tokens", "mean loss")
    numbers, counts = np.unique(buffer.table["label"], return_counts=True)
    for number, count in sorted(zip(numbers.tolist(), counts.tolist(), strict=True), key=lambda item: -item[1])[:50]:
        chosen = buffer.table["label"] == number
        losses = buffer.table["score"][chosen]
        mean = f"{float(np.nanmean(losses)):.3f}" if not np.isnan(losses).all() else "-"
        names, tokens = map(plain, buffer.labels[number]), int(buffer.table["length"][chosen].sum())
        table.add_row(*names, f"{count:,}", f"{tokens:,}", mean)
    return table


def _print_rows(console: Terminal, buffer: ReplayBuffer, count: int, decode: Callable[[list[int]], str] | None) -> None:
    keys = buffer.keys()
    for key in (keys[i * len(keys) // count] for i in range(min(count, len(keys)))):
        row = buffer.get(key)
        ids = row.row.input_ids.tolist()
        console.print(
            f"\nrow {key}: {len(ids)} tokens, {row.row.num_targets} supervised, tags {dict(row.tags)}",
            style="bold",
        )
        console.print(decode(ids) if decode else " ".join(map(str, ids[:64])) + (" ..." if len(ids) > 64 else ""))


def _decoder(run: Path, tokenizer: str | None, buffer: ReplayBuffer) -> Callable[[list[int]], str] | None:
    """Return a function from ids to text, by the named or the run's own tokenizer. None without a tokenizer, or where
    the run's `privacy.examples` hides text."""
    if tokenizer is None:
        settings = run / "config.yaml"
        if settings.is_file():
            from safecl.config import parse_yaml

            privacy = (parse_yaml(settings.read_text(encoding="utf-8")) or {}).get("privacy") or {}
            if privacy.get("examples", "full") != "full":
                _console().print(f"ids only: this run has privacy.examples: {privacy['examples']}")
                return None
        model = tuned_model(run)
        if model is None or not (model / "tokenizer_config.json").is_file():
            return None
        tokenizer = str(model)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{tokenizer}: no tokenizer can be loaded from it: {str(error).splitlines()[0]}") from None
    return lambda ids: str(loaded.decode(ids, skip_special_tokens=False))


@verb
def export(
    run: Run,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="A .parquet or .arrow file.", show_default=False)],
    text: Annotated[bool, typer.Option(help="Add the rows as text, where there is a tokenizer.")] = True,
    tokenizer: Tokenizer = None,
) -> None:
    """Write all rows to a Parquet or Arrow file, stored outputs included."""
    from safecl.replay import ReplayBuffer
    from safecl.replay.exchange import export_rows

    buffer = ReplayBuffer.open(memory_folder(run))
    count = export_rows(buffer, output, _decoder(run, tokenizer, buffer) if text or tokenizer else None)
    _console().print(f"{count:,} rows in {output}")


@verb
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A .parquet or .arrow file with input_ids and loss_mask.", show_default=False
        ),
    ],
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Run folder or folder of a memory; made if it does not exist.", show_default=False
        ),
    ],
    capacity: Annotated[str, typer.Option(help="Size of a new memory: rows, or bytes like 2GB.")] = "20000",
    policy: Annotated[str, typer.Option(help="Policy of a new memory: reservoir, balanced or fifo.")] = "reservoir",
    seed: Annotated[int, typer.Option(help="Seed of a new memory: decides which rows stay and are drawn.")] = 0,
) -> None:
    """Insert the rows of a file into a memory."""
    from safecl.replay import ReplayBuffer
    from safecl.replay.exchange import read_table

    try:
        buffer = ReplayBuffer.open(memory_folder(run), mode="append")
    except ConfigError as error:
        if "no memory here" not in str(error):
            raise
        buffer = ReplayBuffer(_new_settings(source, capacity, policy), run / "memory", seed=seed)
    with buffer:
        try:
            report = buffer.insert(read_table(source))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
        turned_away = "".join(f"; {count:,} kept out: {reason}" for reason, count in report.kept_out.items())
        _console().print(f"{report.seen:,} rows read, {len(buffer):,} in {buffer.folder}{turned_away}")


def _new_settings(source: Path, capacity: str, policy: str) -> MemoryConfig:
    from pydantic import ValidationError

    rows_or_bytes = int(capacity) if capacity.isdigit() else capacity
    try:
        return MemoryConfig.model_validate({"source": str(source), "capacity": rows_or_bytes, "policy": policy})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from None


def _shared_problems(buffer: ReplayBuffer) -> list[str]:
    """Return what is wrong with the outputs that the memory shares with other runs; `--repair` does not change them."""
    from safecl.replay import ReplayError, SharedOutputs

    if not isinstance(buffer.teacher_of, SharedOutputs):
        return []
    try:
        return buffer.teacher_of.reader.verify()
    except (ConfigError, ReplayError) as error:
        return [str(error)]


@verb
def build(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The aligned model: a Hugging Face folder or hub id.", show_default=False),
    ],
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS", help="File of disallowed prompts; further columns become tags.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    benign: Annotated[
        str | None, typer.Option(help="File of benign prompts, whose answers are kept as well.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Copy the rows to this .jsonl file; they stay in the store.", show_default=False
        ),
    ] = None,
    max_prompts: Annotated[
        int | None, typer.Option(help="Prompts used of each file, taken evenly.", min=1, show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer; longer ones are left out.", min=1)] = 256,
    scorer: Annotated[
        str, typer.Option(help="Decides what a refusal is: keyword:gcg, keyword:wei, or a judge to import.")
    ] = "keyword:gcg",
    batch_size: Annotated[int, typer.Option(help="Prompts answered together on one rank.", min=1)] = 32,
) -> None:
    """Let the aligned model write the memory: refusals to disallowed prompts, answers to benign ones. Its outputs on
    them are cached.

    The same command resumes it.
    """
    from safecl.commands.memory.build import build_rows

    settings = {"scorer": scorer, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    build_rows(model, prompts, benign, output, max_prompts, settings, overrides or [])


@verb
def cache(
    config: Annotated[Path, typer.Argument(metavar="CFG", help="Run config (YAML) with a memory.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Store the aligned model's outputs on the memory's rows, so that no run has to compute them. The same command
    resumes it."""
    from safecl.config import load_config

    loaded = load_config(config, overrides or [])
    from safecl.commands.memory.cache import cache_run

    cache_run(loaded)


@verb
def rewrite(
    config: Annotated[Path, typer.Argument(metavar="CFG", help="Run config (YAML).", show_default=False)],
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File for a copy of the answers (JSONL); by default only the store has them."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that a rank generates together.")] = 32,
) -> None:
    """Let the aligned model put the answers of the tasks' rows in its own words, for self-distillation. The same
    command resumes it."""
    from safecl.config import load_config

    loaded = load_config(config, overrides or [])
    from safecl.commands.memory.rewrite import rewrite_rows

    rewrite_rows(loaded, output, max_new_tokens, batch_size)


@verb
def verify(
    run: Run, repair: Annotated[bool, typer.Option("--repair", help="Drop rows that cannot be read.")] = False
) -> None:
    """Read every byte of a memory or of a cache of teacher outputs, and name what is damaged; exit code 1 if anything
    is."""
    from safecl.replay import CacheReader, ReplayBuffer

    folder = memory_folder(run)
    if (folder / "cache.json").exists():
        reader = CacheReader(folder)
        problems, held = reader.verify(), f"outputs of {len(reader):,} rows"
    else:
        with ReplayBuffer.open(folder, mode="append" if repair else "read") as buffer:
            problems = buffer.verify(repair=repair) + _shared_problems(buffer)
            held = f"{len(buffer):,} rows"
    console = _console()
    for problem in problems:
        console.print(problem)
    console.print(
        f"{folder}: {held}, " + (f"{len(problems)} problems" if problems else "every byte as it was written"),
    )
    if problems and not repair:
        raise typer.Exit(ExitCode.FAILED)
