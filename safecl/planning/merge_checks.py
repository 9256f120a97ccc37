"""Checks of merges at the end of tasks (`methods: {merge_back: ...}`)."""

from __future__ import annotations

from safecl.config import ConfigError, RunConfig
from safecl.config.base import MergeAtTheEnd
from safecl.merging.points import parse_sweeps
from safecl.merging.registry import kind_module, kinds, read_settings


def check_merges(config: RunConfig) -> None:
    """Raise ConfigError for a kind that cannot work on shards, settings that it does not have, or a choice without a
    gate or a task to measure."""
    for name, settings in config.methods.items():
        if (merge := settings.merge_at_the_end) is not None:
            _check(config, f"methods.{name}", merge)


def _check(config: RunConfig, key: str, merge: MergeAtTheEnd) -> None:
    if merge.kind not in (usable := usable_kinds()):
        kind_module(merge.kind)  # another message for a name that no merge has
        raise ConfigError(
            f"{key}.kind: {merge.kind} needs more than the aligned and the tuned weights, element by element; in a run "
            f"there are {', '.join(usable)}; `safecl merge {merge.kind}` works on folders"
        )
    for point in parse_sweeps(list(sweeps_of(merge))) if merge.pick else [{}]:
        try:
            read_settings(merge.kind, {**merge.settings, **point})
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    if merge.pick and (config.safety is None or config.safety.gate is None):
        raise ConfigError(f"{key}.pick: needs safety.gate, e.g. gate: {{max_asr: 0.05}}")
    if merge.pick and not any(task.eval is not None for task in config.tasks):
        raise ConfigError(f"{key}.pick: needs a task with `eval`: it takes the highest utility that passes the gate")


def usable_kinds() -> list[str]:
    """Return the merges that work on shards: those with a usual sweep."""
    return [name for name in kinds() if kind_module(name).Config.usual_sweep]


def sweeps_of(merge: MergeAtTheEnd) -> tuple[str, ...]:
    """Return the sweeps that a choice measures: the given ones, or the usual one of the kind."""
    return merge.sweep or (kind_module(merge.kind).Config.usual_sweep,)
