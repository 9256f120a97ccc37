"""The plan of a run as lines of text, for `safecl check` and the start of a run."""

from __future__ import annotations

from safecl.config import LossMean
from safecl.config.run import harmful_sources
from safecl.engine.teachers.checks import teacher_lines
from safecl.planning.plans import RunPlan, TaskPlan


def describe_plan(plan: RunPlan) -> list[tuple[str, str]]:
    """Return (label, value) lines."""
    config = plan.config
    lines = [("model", f"{config.model.path}, {config.model.dtype}" + (", LoRA" if config.model.lora else ""))]
    for task in plan.tasks:
        lines += _task_lines(plan, task)
    if plan.memory is not None and config.memory is not None:
        rows = f"{len(plan.memory):,} rows, {int(plan.memory.lengths.sum()):,} tokens"
        memory = config.memory
        end = "" if memory.replay_ratio_end is None else f" to {memory.replay_ratio_end:g}"
        lines.append(("memory", f"{rows}, ratio {memory.replay_ratio:g}{end} per draw"))
    for name, path in harmful_sources(config).items():
        lines.append(("harmful rows", f"{len(plan.harmful[path]):,} of {path}, for {name}"))
    lines += teacher_lines(config, max(task.tokens_per_batch for task in plan.tasks))
    if (scan := config.scan) is not None:
        source = (
            f"by {scan.benign}"
            if scan.benign
            else "wanted, with a threshold estimated from the upload (with scan.benign they are bounded)"
        )
        lines.append(("scan", f"{scan.action}, {scan.false_alarm:.2%} false alarms {source}"))
    if plan.prompts and config.safety is not None:
        prompts = f"{len(plan.prompts)} disallowed, {len(plan.benign)} benign prompts"
        lines.append(("safety", f"{prompts}, every {config.safety.every}"))
    optimizer, weights = _place(config.deepspeed.offload.optimizer), _place(config.deepspeed.offload.parameters)
    lines.append(("ZeRO", f"stage {config.deepspeed.stage}, optimizer on {optimizer}, weights on {weights}"))
    return lines


def _task_lines(plan: RunPlan, task: TaskPlan) -> list[tuple[str, str]]:
    data, name = task.dataset, task.config.name
    rows = f"{len(data):,} rows" + (f" ({task.poisoned_rows:,} poisoned)" if task.poisoned_rows else "")
    targets, tokens = int(data.num_targets.sum()), int(data.lengths.sum())
    epochs = task.num_steps / task.order.steps_per_epoch
    lines = [
        (f"task {name}", f"{rows}, {tokens:,} tokens, {targets / max(tokens, 1):.0%} supervised"),
        ("  steps", f"{task.num_steps:,} of about {task.tokens_per_batch:,} tokens, {epochs:.4g} epochs"),
        *_loss_lines(plan.config.train.loss_mean, task),
    ]
    return lines + [(f"  {label}", text) for label, text in _method_lines(plan, task)]


def _loss_lines(mean: LossMean, task: TaskPlan) -> list[tuple[str, str]]:
    if mean == "tokens":
        return []
    capped = f"mean over tokens; rows with more than {task.median_targets:g} supervised ones are capped"
    return [("  loss", "mean over rows" if mean == "rows" else capped)]


def _method_lines(plan: RunPlan, task: TaskPlan) -> list[tuple[str, str]]:
    """The methods that act on a task."""
    num_steps, role = task.num_steps, task.config.role
    methods = {name: settings for name, settings in plan.config.methods.items() if settings.acts_on == role}
    if not methods:
        return [("method", "plain fine-tuning")] if role == "task" else []
    lines = []
    for name, settings in methods.items():
        values = ", ".join(f"{key} {_short(value)}" for key, value in settings if value is not None)
        if settings.keeps_average:
            decay, weight = settings.decay_for(num_steps), settings.weight_on_start(num_steps)
            kept = "an adaptive decay" if decay is None else f"decay {decay:.6g} leaves {weight:.1%} on the start"
            values += f"; {kept}"
        lines.append((name, values))
    return lines


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _place(offload: str) -> str:
    return "CPU" if offload == "cpu" else "device"
