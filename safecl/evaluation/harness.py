"""Tasks of EleutherAI's lm-evaluation-harness, by name, on a saved model: the extra `eval`.

The harness loads the model itself, asks in its own prompts and scores by its own rules. Its standard errors become 95 %
normal intervals, value ± 1.96 stderr.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from safecl.config import ConfigError
from safecl.config.errors import install_extra
from safecl.config.model import ModelConfig
from safecl.evaluation.results.task import TaskResult
from safecl.evaluation.statistics.intervals import Mean, Rate
from safecl.storage.untrusted import library_error

PREFIX = "lm-eval "
"""Begins the names of these tasks in results."""
MAIN = ("acc_norm", "acc", "exact_match", "pass@1", "f1", "bleu", "rouge1", "word_perplexity")
"""Metrics that become a task's value, the first that it has; else its first metric."""
Z = 1.959963984540054


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks or groups of the harness. limit: rows of each, None for all; chat_template: whether prompts get the
    model's."""

    names: Sequence[str]
    limit: int | None = None
    chat_template: bool = True


def check_harness(tasks: HarnessTasks) -> None:
    """Raise ConfigError where the harness is not installed, has no such task, or there are several ranks."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"lm-eval {', '.join(tasks.names)}: the package lm-eval is not installed: {install_extra('eval')}"
        )
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError("lm-eval: runs in one process; start `safecl eval` without torchrun")
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if unknown := [name for name in tasks.names if not manager.match_tasks([name])]:
        raise ConfigError(f"lm-eval: no task or group is named {', '.join(unknown)}; `lm-eval ls tasks` lists them")


def measure_harness(settings: ModelConfig, dtype: str, tasks: HarnessTasks) -> dict[str, TaskResult]:
    """Measure a saved model on tasks of the harness. Raises ConfigError where a task cannot be loaded."""
    from lm_eval import simple_evaluate

    arguments = {
        "pretrained": settings.path,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}.get(dtype, "auto"),
        "trust_remote_code": settings.trust_remote_code,
        **({"tokenizer": settings.tokenizer} if settings.tokenizer is not None else {}),
    }
    try:
        found = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=list(tasks.names),
            limit=tasks.limit,
            batch_size="auto",
            apply_chat_template=tasks.chat_template,
            log_samples=False,
        )
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # tasks are loaded by code of many authors, mostly from the hub
        raise ConfigError(f"lm-eval {', '.join(tasks.names)}: {library_error(error)}") from None
    return {f"{PREFIX}{name}": result for name, result in results_of(found).items()}


def facts_of(tasks: HarnessTasks) -> dict[str, Any]:
    """Return what was asked of the harness, for results.json."""
    import lm_eval

    asked = {"tasks": list(tasks.names), "limit": tasks.limit, "chat_template": tasks.chat_template}
    return asked | {"version": getattr(lm_eval, "__version__", None)}


def results_of(found: Mapping[str, Any]) -> dict[str, TaskResult]:
    """Return the tasks and groups of the harness's results, each with its metrics."""
    results = {}
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        n = int(found.get("n-samples", {}).get(name, {}).get("effective", 0))
        metrics = {metric: _mean(values, metric, n) for metric in values if _is_metric(values, metric)}
        if not metrics:
            continue
        bare = {metric.partition(",")[0]: metric for metric in reversed(metrics)}
        main = next((bare[metric] for metric in MAIN if metric in bare), next(iter(metrics)))
        better = found.get("higher_is_better", {}).get(name, {}).get(main.partition(",")[0], True)
        details: dict[str, Rate | Mean] = {metric: mean for metric, mean in metrics.items() if metric != main}
        results[name] = TaskResult(name, main, metrics[main], better is not False, details)
    return results


def _is_metric(values: Mapping[str, Any], metric: str) -> bool:
    is_number = isinstance(values[metric], (int, float)) and not isinstance(values[metric], bool)
    return is_number and "," in metric and "_stderr" not in metric


def _mean(values: Mapping[str, Any], metric: str, n: int) -> Mean:
    """Return a metric with its interval, which is infinite where the harness gives no standard error."""
    name, comma, rule = metric.partition(",")
    error, value = values.get(f"{name}_stderr{comma}{rule}"), float(values[metric])
    half = Z * error if isinstance(error, (int, float)) and math.isfinite(error) else math.inf
    return Mean(n, 0, value, value - half, value + half)
