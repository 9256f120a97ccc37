"""The predicted time of a step as lines of text, for `safecl check` and the recipes."""

from __future__ import annotations

from collections.abc import Sequence

from safecl.config import RunConfig
from safecl.planning.costs.device_memory import plan_memory
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.step_time import DEVICES, Cluster, StepTime, step_time
from safecl.storage.sizes import format_bytes

REFERENCE = "H100"


def launched_ranks(config: RunConfig) -> tuple[int, int] | None:
    """Return (ranks, ranks per node) of the section `launch`; None where it does not say how many a node has."""
    if config.launch.gpus_per_node == "auto":
        return None
    return config.launch.node_range[1] * config.launch.gpus_per_node, config.launch.gpus_per_node


def prediction(
    shape: ModelShape, config: RunConfig, tokens_per_batch: int, teachers: Sequence[ModelShape] = ()
) -> list[tuple[str, str]]:
    """Return (label, value) lines: bytes and step time on the ranks of the section `launch`."""
    if (ranks := launched_ranks(config)) is None:
        return []
    plan = plan_memory(shape, config, *ranks, device="cuda", teachers=teachers)
    cluster = Cluster(DEVICES[REFERENCE], *ranks)
    time = step_time(shape, config, cluster, tokens_per_batch)
    host = f", {format_bytes(plan.host)} of host memory on each node" if plan.host else ""
    count = f"{ranks[0]} rank{'s' * (ranks[0] > 1)}"
    return [
        ("launched", f"{count}: about {format_bytes(plan.device)} on each device{host}"),
        ("  step", f"about {describe(time)} on {cluster.device.name}, by arithmetic, not measured"),
    ]


def describe(time: StepTime) -> str:
    """Return the seconds of a step and of its parts."""
    parts = {"passes": time.passes, "methods": time.methods, "exchange": time.exchange, "update": time.update}
    shown = ", ".join(f"{name} {seconds:.2g}" for name, seconds in parts.items() if seconds > 0)
    return f"{time.seconds:.2g} s a step of {time.tokens:,.0f} tokens ({shown})"
