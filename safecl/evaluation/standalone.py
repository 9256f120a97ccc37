"""Evaluation without training: of a run config's model, of a run folder, or of any model folder with given prompts.

evaluate_target accepts

    run.yaml        measures what the run measures, on its model/ (or model-failed/) if it exists, else on the model
                    that it starts from
    runs/gsm8k      does the same for a finished run's folder
    path/to/model   measures a Hugging Face folder or hub id with prompts from overrides: safety.prompts=advbench.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.config import (
    ConfigError,
    EvalConfig,
    GateConfig,
    ModelConfig,
    RunConfig,
    SafetyConfig,
    apply_overrides,
    load_config,
    validate_tree,
)
from safecl.evaluation.answers.folders import check_is_model, is_model, name_of
from safecl.evaluation.gates.folders import aligned_records
from safecl.evaluation.gates.gate import judge_gate
from safecl.evaluation.harness import HarnessTasks, check_harness, facts_of, measure_harness
from safecl.evaluation.questions import Questions, questions_of, read_held_out, read_safety_prompts
from safecl.evaluation.records import Privacy
from safecl.evaluation.results.checks import GateResult
from safecl.storage.model_folder import tuned_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from safecl.evaluation.results.moment import Evaluation

TASK_OF_FOLDER = "eval"


HashOfModel = Callable[[str], str]


@dataclass(frozen=True)
class StandaloneResult:
    """The evaluation, the gate's verdict where the config has a gate, the folder with the results, and notes on prompts
    that the chat template does not write as they are. facts: when, on which weights and with what it was measured."""

    model: str
    evaluation: Evaluation
    gate: GateResult | None
    folder: Path
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def evaluate_target(
    target: str | Path,
    overrides: Iterable[str] = (),
    *,
    output: str | Path | None = None,
    hash_of: HashOfModel | None = None,
    harness: HarnessTasks | None = None,
) -> StandaloneResult:
    """Measure a target, as `safecl eval` does.

    Args: `target`: a run config (.yaml), a run folder, a model folder or a hub id; `overrides`: as in `load_config`,
    for a model also `eval.path=..., eval.metric=...` for a task of its own; `output`: folder for outputs/ and
    results.json (default: `eval/` in the run folder, `runs/eval-<name>` for a model); `hash_of`: hashes the model's
    weights for results.json; `harness`: tasks of lm-evaluation-harness. Several ranks (torchrun) share the prompts.
    A folder that holds evaluations keeps them: the new one is added.
    Raises: ConfigError where something is missing or does not fit, before the model is loaded.
    """
    target, overrides = Path(target), list(overrides)
    if target.suffix in (".yaml", ".yml"):
        config = load_config(target, overrides)
        tuned = tuned_model(config.output)
        chosen = any(override.startswith("model.path=") for override in overrides)
        return evaluate_config(
            config,
            model=tuned if not chosen and tuned is not None and is_model(tuned) else None,
            output=output,
            hash_of=hash_of,
            harness=harness,
        )
    if (target / "config.yaml").is_file():
        tuned = tuned_model(target)
        if tuned is None or not is_model(tuned):
            hint = f"`safecl eval {target / 'config.yaml'}` measures the model it starts from"
            raise ConfigError(f"{target}: this run has no model/ yet; {hint}")
        return evaluate_config(
            load_config(target / "config.yaml", overrides),
            model=tuned,
            output=output or target / "eval",
            hash_of=hash_of,
            harness=harness,
        )
    return _evaluate_model_with_overrides(str(target), overrides, output, hash_of, harness)


def evaluate_config(
    config: RunConfig,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    hash_of: HashOfModel | None = None,
    harness: HarnessTasks | None = None,
) -> StandaloneResult:
    """Measure what a run config measures, on `model` (default: `model.path`). Refuses prompts from its training
    data."""
    check_is_model(model or config.model.path)
    settings = config.model.model_copy(update={"path": str(model or config.model.path)})
    folder = Path(output or Path(config.output) / "eval")
    questions, privacy = questions_of(config), config.privacy.examples
    run = Path(config.output)
    return _measure(settings, config.model.dtype, questions, privacy, folder, hash_of, harness, run)


def evaluate_folder(
    model: str | Path,
    *,
    safety: SafetyConfig | None = None,
    tasks: Mapping[str, EvalConfig] | None = None,
    privacy: Privacy = "full",
    output: str | Path | None = None,
    dtype: str = "auto",
    settings: ModelConfig | None = None,
    hash_of: HashOfModel | None = None,
    harness: HarnessTasks | None = None,
) -> StandaloneResult:
    """Measure any Hugging Face model folder or hub id.

    Args: `tasks`: by name; `dtype`: auto (as saved), bf16 or fp32; `settings`: tokenizer, chat template and attention
    that replace the folder's own. Raises: ConfigError.
    """
    check_is_model(model)
    read = [(name, config, read_held_out(safety, config, None)) for name, config in (tasks or {}).items()]
    questions = Questions(safety, *read_safety_prompts(safety), read)
    settings = (settings or ModelConfig(path=str(model))).model_copy(update={"path": str(model)})
    folder = Path(output or Path("runs") / f"eval-{name_of(model)}")
    return _measure(settings, dtype, questions, privacy, folder, hash_of, harness)


def _evaluate_model_with_overrides(
    model: str,
    overrides: list[str],
    output: str | Path | None,
    hash_of: HashOfModel | None,
    harness: HarnessTasks | None,
) -> StandaloneResult:
    """Measure a model folder, which has no config: make one from the overrides, with a task that is never trained."""
    of_task = [f"tasks.0.{override}" if override.startswith("eval.") else override for override in overrides]
    tree = {"model": {"path": model}, "tasks": [{"name": TASK_OF_FOLDER, "train": "-"}], "output": "runs"}
    try:
        config = validate_tree(apply_overrides(tree, of_task), "safecl eval")
    except ConfigError as error:
        raise ConfigError(str(error).replace("tasks.0.eval", "eval")) from None
    own_dtype = any(override.startswith("model.dtype=") for override in overrides)
    return evaluate_folder(
        model,
        safety=config.safety,
        tasks={TASK_OF_FOLDER: config.tasks[0].eval} if config.tasks[0].eval else None,
        privacy=config.privacy.examples,
        output=output,
        dtype=config.model.dtype if own_dtype else "auto",
        settings=config.model,
        hash_of=hash_of,
        harness=harness,
    )


# -------------------------------------------------------------------------------------------------------------- measure


def _measure(
    settings: ModelConfig,
    dtype: str,
    questions: Questions,
    privacy: Privacy,
    folder: Path,
    hash_of: HashOfModel | None,
    harness: HarnessTasks | None,
    run: Path | None = None,
) -> StandaloneResult:
    """run: folder of the run that the model is of, whose aligned model limits on a rise compare with."""
    if not questions and harness is None:
        raise ConfigError(_nothing_to_measure(settings.path))
    if harness is not None:
        check_harness(harness)
    from safecl.data import load_tokenizer
    from safecl.data.templates.thinking import check_thinking
    from safecl.data.templates.written import notes_on_prompts
    from safecl.distributed import collectives
    from safecl.evaluation.results.added import add_results, earlier_results, free_name
    from safecl.evaluation.results.moment import Evaluation

    name = name_of(settings.path)
    when = free_name(name, earlier_results(folder))
    tokenizer = load_tokenizer(settings)
    check_thinking(tokenizer)
    rows = [row for _, _, rows in questions.tasks for row in rows]
    notes = notes_on_prompts(tokenizer, [*questions.prompts, *questions.benign], rows, privacy)
    of_harness = measure_harness(settings, dtype, harness) if harness is not None else {}
    with collectives.process_group():
        found = _ask(settings, dtype, questions, tokenizer, folder, when) if questions else Evaluation(when, 0)
        found = replace(found, tasks=found.tasks | of_harness)
        gate = _judge(found, questions.safety.gate if questions.safety else None, run)
        facts: dict[str, Any] = {}
        if collectives.rank() == 0:
            facts = _facts(settings, questions, tokenizer, hash_of, harness)
            found = add_results(folder, name, found, gate.to_dict() if gate else None, facts, privacy)
    return StandaloneResult(settings.path, found, gate, folder, tuple(notes), facts)


def _judge(found: Evaluation, gate: GateConfig | None, run: Path | None) -> GateResult | None:
    if gate is None or found.safety is None:
        return None
    reference = aligned_records(run, found.safety.outputs) if gate.is_relative and run is not None else None
    return judge_gate(gate, found, reference)


def _ask(
    settings: ModelConfig,
    dtype: str,
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    when: str,
) -> Evaluation:
    """Load the model and put the questions to it, or to a server of its weights."""
    from safecl.distributed.watchdog import watched
    from safecl.evaluation.answers.model import HFEvalModel
    from safecl.evaluation.serving.models import answered_by_vllm
    from safecl.evaluation.serving.server import VLLM_LOG, vllm_program

    server = questions.safety.vllm if questions.safety is not None and questions.safety.backend == "vllm" else None
    if server is not None:
        vllm_program()
    with watched(folder, "evaluation"):
        model = HFEvalModel.load(
            settings.path,
            dtype=dtype,
            attention=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            device=None if server is None else "cpu",  # the GPU is the server's
        )
        log = folder / VLLM_LOG
        served = nullcontext(model) if server is None else answered_by_vllm(model, settings.path, server, log)
        with served as answering:
            return questions.measure(answering, tokenizer, when=when)


def _facts(
    settings: ModelConfig,
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    hash_of: HashOfModel | None,
    harness: HarnessTasks | None,
) -> dict[str, Any]:
    """Return when, on which weights and with what was measured, as results.json has it; no text of rows."""
    import torch
    import transformers

    import safecl
    from safecl.evaluation.provenance import measured_with, now

    digest = hash_of(settings.path) if hash_of is not None else None
    with_harness = {"lm_eval": facts_of(harness)} if harness is not None else {}
    return {
        "safecl": safecl.__version__,
        "finished": now(),
        "model": settings.path,
        "provenance": {
            "model": {"folder": name_of(settings.path), "xxh3_128": digest},
            "measured_with": measured_with(tokenizer, settings, questions.safety, questions.prompts, questions.benign),
            "versions": {module.__name__: str(module.__version__) for module in (safecl, torch, transformers)},
            **with_harness,
        },
    }


def _nothing_to_measure(path: str) -> str:
    task = "a task, eval.path=FILE eval.metric=exact_match, or --lm-eval TASK"
    what_helps = f"disallowed prompts, safety.prompts=FILE, or {task}"
    is_hub_id = "" if Path(path).exists() else f"{path} is no folder here, so it is taken for a hub id, and there is "
    return f"{is_hub_id}nothing to measure: give {what_helps}"
