"""Runs of one method on a small task whose rows conflict with the memory's: uninterrupted, and stopped and resumed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.methods import scenes
from tests.training import resume_scenes

STEPS = 4

FISHER = {"sign_batches": 4, "rows_per_batch": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "ewc": {"strength": 0.5, **FISHER},
    "antibody": {"temperature": 0.2},
    "constrained_sft": {"beta": 0.5},
    "im": {"weight": 2.0, "labels": ["a", "b", "c"]},
    "ldifs": {"weight": 30.0, "layers": 2, "outputs": "recorded"},
    "lwf": {"weight": 10.0},
    "l2_sp": {"strength": 1.0, "rules": [{"importance": "highest", "factor": 3.0}]},
    "online_ewc": {"strength": 0.5, **FISHER},
    "psmt": FISHER,
    "refresh": {"delta": 0.02, "sigma": 0.5, "fisher_weight": 0.1, **FISHER},
    "lisa": {"cycle": 2, "share": 0.5},
    "ogpsa": {"every": 2},
    "spag": {"tau": None, "eta": 0.025},
    "vaccine": {"rho": 20.0},
    "safe_anchor": {"rank": 2, "samples": 4, "renew": 2},
    "corrective_replay": {"steps": 2, "every": 1, "limit": 1.01, "mix": 0.5},
    "safety_layers": {"layers": [1]},
    "i_lora": {"decay": 0.9, "weight": 0.05},
    "temporal_ensemble": {"decay": 0.7, "first_decay": 0.3},
    "block_expansion": {"blocks": [1]},
    "booster": {"harmful": "harmful.jsonl", "alpha": 0.3},
    "vaa": {"harmful": "harmful.jsonl", "alpha": 0.5, "eta": 2.0, "rho": 0.3},
    "rep_noise": {"harmful": "harmful.jsonl", "beta": 2.0, "alpha": 2.0},
    "t_vaccine": {"harmful": "harmful.jsonl", "rho": 20.0, "layers": 1, "every": 2, "renew": 2},
    "asft": {"base": "base", "strength": 20.0},
    "bds": {"rate": 60.0},
    "gradient_norm": {"keep": [0.0, 0.5]},
    "star": {"scores": "scores.jsonl"},
    "toss": {"degraded": "4", "utility": "5", "discard": 0.4},
    "hierarchical": {"strength": 2.0, "steps": 2, "length": 0.2},
    "k_fpf": {"k": 2, "steps": 2},
    "segment_rates": {"rules": [{"modules": "attention", "factor": 0.0}, {"importance": "highest", "factor": 0.3}]},
    "swat": {"warmup": 0.5},
    "sbr": {"weight": 2.0, "prompts": 3, "pool": 8},
    "lookahead": {"tokens": 1, "connector": " 11 "},
    "sdft": {"answers": "answers.jsonl"},
}
"""Settings of methods whose defaults are too large for a run of a few steps, or too weak to be seen in it."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "agem": {"step": {"project": "step"}},
    "safe_anchor": {"step": SETTINGS["safe_anchor"] | {"project": "step"}},
    "mudman": {"step": {"mask": "step"}},
    "ema": {
        "slow": {"write_back": "slow", "decay": 0.5, "every": 2},
        "anchor": {"write_back": "anchor", "decay": 0.3, "every": 2},
    },
    "lwf": {
        "outputs": {"form": "output", "weight": 10.0},
        "online": {"weight": 10.0, "outputs": "online"},
    },
    "im": {"marginal": SETTINGS["im"] | {"reading": "marginal"}},
}
"""Further settings of methods that take another way through the engine, by method and a word for them."""

WITH_LORA: dict[str, dict[str, Any]] = {
    "k_fpf": SETTINGS["k_fpf"] | {"modules": ["*.o_proj.*"]},
    "refresh": SETTINGS["refresh"] | {"fisher_weight": 0.0},
}
"""Settings with which methods take adapters that refuse them otherwise. `ewc` needs a file there; test_ewc_lora.py has
it."""

REQUIRED: dict[str, dict[str, Any]] = {
    **{name: {"harmful": "harmful.jsonl"} for name in ("booster", "rep_noise", "t_vaccine", "vaa")},
    "asft": {"base": "base"},
    "sdft": {"answers": "answers.jsonl"},
    "toss": {"degraded": "degraded", "utility": "utility"},
}
"""Settings without which a method's config is refused."""

ALIGNMENT = {"tasks": [{"name": "t", "train": "unused", "role": "align"}]}
SECTIONS: dict[str, dict[str, Any]] = dict.fromkeys(("vaccine", "t_vaccine", "booster", "rep_noise", "vaa"), ALIGNMENT)
"""Sections of the run config that a method needs besides a memory, by method."""


def settings_of(method: str, with_lora: bool, variant: str | None = None) -> dict[str, Any]:
    """The settings of a method, or of a variant of it, in a run of a few steps."""
    own = SETTINGS.get(method, {}) if variant is None else VARIANTS[method][variant]
    return WITH_LORA.get(method, own) if with_lora else own


def config_of(method: str | None, folder: str, variant: str | None = None, **changes: Any):
    """The config of a run with this method alone, or with those of `changes`; plain fine-tuning for None."""
    from tests.engine.scenes import run_config

    settings = dict(settings_of(method or "", "lora" in changes.get("model", {}), variant))
    for key in {"base", "answers", "scores"} & settings.keys():
        settings[key] = f"{folder}/{settings[key]}"
    sections: dict[str, Any] = {
        "methods": {method: settings} if method is not None else {},
        "memory": {"source": "unused", "replay_ratio": 0.5, "teacher": {"k": 8}},
        "train": {"tokens_per_batch": 96, "tokens_per_microbatch": 32, "max_length": 32, "max_steps": STEPS},
        "artifacts": {"folder": f"{folder}/artifacts"},
        "model": {"path": f"{folder}/aligned"},
    }
    changes["model"] = sections["model"] | changes.get("model", {})
    return run_config(folder, **(sections | SECTIONS.get(method or "", {}) | changes))


def cut_of(method: str, layout: str) -> int:
    """The step after which a run is stopped: any, and always the same for a method in a layout."""
    return 1 + zlib.crc32(f"{method} {layout}".encode()) % (STEPS - 1)


@contextmanager
def opened(config, folder: str) -> Iterator[tuple[Any, Any, Any]]:
    """(run, task, saver) of a run that has not begun."""
    from safecl.distributed import collectives
    from safecl.engine.model.structure import prepare_for_training
    from safecl.planning.plans import RunPlan
    from safecl.training.identity import base_of, identity_of
    from safecl.training.resume import RunSaver

    task_rows, memory_rows = scenes.conflicting_datasets()
    for settings in config.methods.values():
        if settings.rewrites:
            task_rows = rewritten(task_rows, settings)
        if settings.scores_file is not None and collectives.rank() == 0:
            write_scores(settings.scores_file, len(task_rows))
        if settings.online_teacher == "aligned":
            scenes.save_on_first_rank(scenes.undecided_model(), config.model.path)
    if any(settings.needs_base_model for settings in config.methods.values()):
        scenes.save_on_first_rank(scenes.other_model("3"), f"{folder}/base")
    model = prepare_for_training(scenes.undecided_model(), config.model)
    run, (task,) = scenes.make_run(config, model, [task_rows])
    run.row_scores.open_model = scenes.random_model
    run.harmful = {"harmful.jsonl": scenes.harmful_dataset()}
    identity = identity_of(RunPlan(config, None, [task], run.methods, memory_rows, run.harmful))
    saver = RunSaver(run, Path(folder), identity, base_of(config, "undecided"))
    try:
        yield run, task, saver
    finally:
        run.close()
        saver.close()
        if run.memory is not None:
            run.memory.buffer.close()


def write_scores(path: str, num_rows: int) -> None:
    """Write a guard's scores: numbers, and lists of two."""
    lines = [{"guard": n % 3 / 2 if n % 2 else [1.0, n % 5 / 4]} for n in range(num_rows)]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def rewritten(rows, settings):
    """The rows as a method rewrites them, each token being a word of their text."""
    from safecl.distributed import collectives

    def words(ids) -> str:
        return " ".join(map(str, ids))

    texts = [(words(row.input_ids[:-2]), words(row.input_ids[-2:])) for row in rows.rows(range(len(rows)))]
    if settings.answers_file is not None and collectives.rank() == 0:
        lines = [json.dumps({"question": q, "answer": a, "rewritten": "7 8" if q < "5" else None}) for q, a in texts]
        Path(settings.answers_file).write_text("\n".join(lines))
    collectives.barrier()
    found = []
    for question, answer in texts:
        pair = settings.rewrite(question, answer, lambda text, count: " ".join(text.split()[:count]))
        prompt, target = ([int(word) for word in text.split()] for text in pair)
        found.append(([*prompt, *target], [False] * len(prompt) + [True] * len(target)))
    return scenes.dataset_of(found, 100)


def begin(run, task, saver) -> None:
    from safecl.training.replay_memory import fill_memory

    config, (_, memory_rows) = run.config, scenes.conflicting_datasets()
    run.memory = fill_memory(
        run.engine,
        memory_rows,
        config.memory,
        seed=config.train.seed,
        source="test",
        with_teacher=config.needs_teacher,
        folder=saver.memory_folder,
    )
    run.begin_task(task, active=task.config.role != "align")


def train(
    method: str | None, folder: str, cut: int | None = None, variant: str | None = None, **changes
) -> dict[str, Any]:
    """Train the method for all steps of the task, and end the task.

    cut: the step after which the run is saved. It is resumed from there in a new engine, and what differs from the
    uninterrupted run is listed.
    """
    config = config_of(method, folder, variant, **changes)
    with opened(config, folder) as (run, task, saver):
        begin(run, task, saver)
        start = resume_scenes.whole_state(run)["weights"]
        log = go_on(run, task, saver, cut)
        found = {"start": start, "state": resume_scenes.whole_state(run), "losses": log}
        whole = everything_of(run, log)
    if cut is not None:
        with opened(config, folder) as (run, task, saver):
            assert saver.resume(lambda message: None, [task]) is not None and run.step == cut
            resumed = everything_of(run, [*log[:cut], *go_on(run, task, saver)])
        found["differences"] = [key for key in whole if resumed.get(key) != whole[key]]
    return found


def go_on(run, task, saver, cut: int | None = None) -> list[dict[str, float]]:
    log = []
    while run.step < STEPS:
        log.append(run.train_step(task).totals())
        if run.step == cut:
            saver.save(resume_scenes._progress(), b"[]", keep=1)
            assert saver.settle().problem is None
    run.end_task()
    return log


def everything_of(run, log: list[dict[str, float]]) -> dict[str, Any]:
    from safecl.training.resume import state_of

    return resume_scenes.digests(run) | {"losses": log, "state": state_of(run)}
