"""The verbs of `safecl cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safecl.commands.verbs import verbs_of

app = typer.Typer(
    name="cache",
    help="What safecl keeps between runs: prepared rows and artifacts of base models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

verb = verbs_of(app, "cache")


@verb
def ls(as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False) -> None:
    """List what is kept: kind, size, days since its last use, and whether it holds users' text."""
    from safecl.commands.cache.clean import list_cache

    list_cache(as_json)


@verb
def clean(
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Remove what holds text of this run's files: rows and artifacts.", show_default=False
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Remove what was not used for 30d, 12h, ...", show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove what holds text of a run's files, or what was not used for some time. A run that uses an entry goes on."""
    from safecl.commands.cache.clean import clean_cache

    clean_cache(run, older_than, every=every, dry_run=dry_run)
