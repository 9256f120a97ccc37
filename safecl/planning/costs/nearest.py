"""The nearest setting that fits: changes to a config that does not, the smallest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from safecl.config import RunConfig, parse_bytes

SMALL_STAGING = "256MiB"


def nearest_that_fits(config: RunConfig, fits: Callable[[RunConfig], bool]) -> str | None:
    """Return the first changes that make the config fit, as they are written on the command line; None where none do.

    They cost more from step to step: a smaller staging of checkpoints, state in host memory, more sharding, smaller
    micro-batches; each step keeps the ones before.
    """
    changes: dict[str, str] = {}
    for name, value, tried in _steps(config):
        changes[name] = value
        config = tried
        if fits(config):
            return " ".join(f"{key}={value}" for key, value in changes.items())
    return None


def _steps(config: RunConfig) -> Iterator[tuple[str, str, RunConfig]]:
    """Yield (key, value, the config with all changes so far)."""
    if parse_bytes(config.checkpoint.staging) > parse_bytes(SMALL_STAGING):
        config = _changed(config, "checkpoint", staging=SMALL_STAGING)
        yield "checkpoint.staging", SMALL_STAGING, config
    for place in ("ema", "fisher"):
        if getattr(config.deepspeed.offload, place) == "none":
            config = _offloaded(config, place)
            yield f"deepspeed.offload.{place}", "cpu", config
    if config.deepspeed.stage < 3:
        config = _changed(config, "deepspeed", stage=3)
        yield "deepspeed.stage", "3", config
    for place in ("optimizer", "parameters"):
        if getattr(config.deepspeed.offload, place) == "none":
            config = _offloaded(config, place)
            yield f"deepspeed.offload.{place}", "cpu", config
    while (tokens := config.train.tokens_per_microbatch // 2) >= config.train.max_length:
        config = _changed(config, "train", tokens_per_microbatch=tokens)
        yield "train.tokens_per_microbatch", str(tokens), config


def _offloaded(config: RunConfig, place: str) -> RunConfig:
    offload = config.deepspeed.offload.model_copy(update={place: "cpu"})
    return _changed(config, "deepspeed", offload=offload)


def _changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
