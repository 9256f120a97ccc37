"""`safecl fisher CFG`: estimates the diagonal Fisher of the aligned model on the memory's rows, once for all runs on
that model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safecl.commands.preflight import preflight, refuse_unwritable
from safecl.config import ConfigError, RunConfig
from safecl.distributed import environment
from safecl.exits import ExitCode


def fisher_run(config: RunConfig, output: Path | None, *, exact: bool) -> ExitCode:
    """Writes the Fisher file and says how to use it. Raises ConfigError for what can be said before the model is
    loaded."""
    environment.join_launcher()
    if config.memory is None:
        raise ConfigError("safecl fisher: needs `memory: {source: ...}`, the rows whose behaviour must be kept")
    if config.tasks[0].role == "align":
        raise ConfigError(
            "safecl fisher: model.path is aligned only by the first task (role: align); train that first, then name its model"
        )
    named = next(_named_files(config), None)
    path = output or (Path(named) if named is not None else None)
    # The file that the methods name is what this verb writes, so it need not be there.
    methods = {
        name: settings.model_copy(update={"fisher": None})
        for name, settings in config.methods.items()
        if hasattr(settings, "fisher")
    }
    config = config.model_copy(update={"methods": {**config.methods, **methods}})
    preflight(config)
    if path is not None:
        refuse_unwritable(path.parent)
    from safecl.commands.fisher_estimate import estimate_to_file

    estimate_to_file(config, path, exact=exact)
    return ExitCode.DONE


def _named_files(config: RunConfig) -> Iterator[str]:
    return (path for settings in config.methods.values() if (path := getattr(settings, "fisher", None)) is not None)
