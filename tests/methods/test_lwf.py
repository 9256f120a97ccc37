"""LwF trains the same numbers as plain PyTorch with a frozen copy of the model, whatever its teacher is made of."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_replay_methods import task_rows

STEPS = 6
HIDDEN = {"form": "hidden", "weight": 3.0}
OUTPUT = {"form": "output", "weight": 5.0, "k": 8, "temperature": 2.0}
LORA = {
    "path": "unused",
    "dtype": "fp32",
    "gradient_checkpointing": False,
    "lora": {"r": 3, "alpha": 6.0, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}
CHECKPOINTED = LORA | {"gradient_checkpointing": True}
LORA_ON_HEAD = LORA | {"lora": LORA["lora"] | {"target_modules": ["v_proj", "lm_head"]}}


def distance(form: dict, student, teacher, rows) -> torch.Tensor:
    """The term by its formula, over the rows of a step."""
    if form["form"] == "hidden":
        parts = []
        for row in rows:
            with torch.no_grad():
                said = reference.hidden_states(teacher, row)
            square = (reference.hidden_states(student, row) - said).square().mean(-1)
            parts.append(
                square
                if form.get("tokens", "all") == "all"
                else square[:-1][torch.from_numpy(row.loss_mask[1:].copy())]
            )
        return form["weight"] * torch.cat(parts).mean()
    with torch.no_grad():
        said = [reference.log_probs(teacher, row, form["temperature"]) for row in rows]
    now = [reference.log_probs(student, row, form["temperature"]) for row in rows]
    k = form["k"] if form["k"] else said[0].shape[-1]
    return (
        form["weight"] * torch.cat([reference.topk_kl(t, s, k) for t, s in zip(said, now, strict=True)]).mean().float()
    )


@functools.cache
def expected(form: tuple, model: str = "full"):
    """(start, end) by name; the teacher is the model without its adapters, or a copy of the start."""
    form = dict(form)
    student = tiny_model()
    teacher = copy.deepcopy(student)
    if model != "full":
        student = scenes.with_adapters(student, run_config(model={"lora": LORA, "head": LORA_ON_HEAD}[model]))
    inner = student if model == "full" else student.get_base_model()
    start = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
    steps = task_rows(random_dataset(60, seed=1), STEPS)
    losses = [
        lambda rows=rows: reference.mean_nll(inner, rows) + distance(form, inner, teacher, rows) for rows in steps
    ]
    return start, reference.train(student, losses)


def error(found: dict, form: dict, model: str = "full") -> float:
    start, end = expected(tuple(sorted(form.items())), model)
    return oracle.relative_distance({name: found["weights"][name] for name in end}, end, start)


@pytest.mark.parametrize(
    ("form", "stage"),
    [(HIDDEN, 2), (HIDDEN, 3), (HIDDEN | {"tokens": "supervised"}, 0), *((OUTPUT, stage) for stage in (0, 1, 2, 3))],
)
def test_lwf_with_recorded_outputs_equals_a_frozen_copy(rank_pool, tmp_path, form, stage):
    arguments = dict(steps=STEPS, memory=None, methods={"lwf": form}, deepspeed={"stage": stage}, output=str(tmp_path))
    found = rank_pool(2).run(scenes.train, **arguments)[0]
    assert error(found, form) <= 1e-3
    assert error(found, form | {"weight": 0.0}) > 1e-2  # the term matters here
    terms = [losses["lwf"] for losses in found["losses"]]
    assert abs(terms[0]) < 1e-6 < min(terms[1:]), terms
    assert not any((tmp_path / "teacher").iterdir())


@pytest.mark.parametrize(
    ("form", "model", "stage"),
    [(HIDDEN, CHECKPOINTED, 3), (OUTPUT, LORA, 2), (OUTPUT, LORA_ON_HEAD, 2), (HIDDEN, LORA_ON_HEAD, 2)],
)
def test_lwf_with_lora_takes_the_model_without_adapters_as_teacher(rank_pool, tmp_path, form, model, stage):
    arguments = dict(
        steps=STEPS, memory=None, methods={"lwf": form}, deepspeed={"stage": stage}, model=model, output=str(tmp_path)
    )
    found = rank_pool(2).run(scenes.train, **arguments)[0]
    on_head = model is LORA_ON_HEAD
    assert found["fused"] is not on_head
    # A live teacher knows its whole vocabulary, so nothing is cut at k.
    assert error(found, form | ({"k": 0} if form is OUTPUT else {}), "head" if on_head else "lora") <= 1e-3
    assert not (tmp_path / "teacher").exists()


def test_padded_rows_have_the_same_hidden_distance(rank_pool, tmp_path):
    train = {"packing": "padded"}
    found = rank_pool(2).run(
        scenes.train, steps=STEPS, memory=None, methods={"lwf": HIDDEN}, train=train, output=str(tmp_path)
    )[0]
    assert error(found, HIDDEN) <= 1e-3


def with_dropout():
    """The tiny model with dropout in its attention, while it trains."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


def recorded_of_a_model_with_dropout(folder: str) -> tuple[list[torch.Tensor], bool]:
    from pathlib import Path

    from safecl.engine.teachers.recorded import record_outputs
    from safecl.methods.terms import TaskTerm

    run, (task,) = scenes.make_run(run_config(memory=None), with_dropout(), [random_dataset(20, seed=1)])
    run.engine.deepspeed.train()
    recorded = record_outputs(run.engine, task.dataset, TaskTerm("lwf", 1.0, "hidden", tokens="all"), Path(folder))
    return [recorded.load(index) for index in range(20)], run.engine.module.training


def test_a_recorded_teacher_has_no_dropout_and_the_student_has_it_again_afterwards(rank_pool, tmp_path):
    found, training = rank_pool(2).run(recorded_of_a_model_with_dropout, folder=str(tmp_path / "teacher"))[0]
    data, model = random_dataset(20, seed=1), tiny_model().eval()
    with torch.no_grad():
        expected = {str(i): reference.hidden_states(model, data.row(i)) for i in range(20)}
        dropped = {str(i): reference.hidden_states(with_dropout().train(), data.row(i)) for i in range(20)}
    assert oracle.relative_distance(dict(zip(expected, found, strict=True)), expected) <= 1e-5
    assert oracle.relative_distance(dropped, expected) > 1e-2 and training


def test_the_model_with_its_adapters_off_has_no_dropout_either():
    from safecl.engine.model.language_model import LanguageModel

    row = random_dataset(20, seed=1).row(3)
    student = LanguageModel(scenes.with_adapters(with_dropout(), run_config(model=LORA))).train()
    hidden = student._reference(reference.ids_of(row), torch.arange(len(row))[None]).hidden
    with torch.no_grad():
        expected = reference.hidden_states(tiny_model().eval(), row)
    assert oracle.relative_distance({"h": hidden}, {"h": expected}) <= 1e-5
    assert student.training and student.model.training


# ------------------------------------------------------------------------------------------------------- recorded files


def record_and_read(folder: str, form: dict, bf16: bool = False):
    """Whether every rank reads, of every row, what the engine says of it; and the bytes on the disk."""
    from pathlib import Path

    from safecl.engine.teachers.outputs import outputs_of_rows
    from safecl.engine.teachers.recorded import open_recorded, record_outputs
    from safecl.methods.distillation.lwf import Config, Method

    model = {"path": "unused", "dtype": "bf16" if bf16 else "fp32", "gradient_checkpointing": False}
    config = run_config(memory=None, model=model, deepspeed={"stage": 3})
    run, (task,) = scenes.make_run(
        config, tiny_model(dtype=torch.bfloat16 if bf16 else torch.float32), [random_dataset(60, seed=1)]
    )
    (term,) = Method("lwf", Config(**form)).task_terms()
    written = record_outputs(run.engine, task.dataset, term, Path(folder))
    again = open_recorded(run.engine, task.dataset, term, Path(folder))
    settings = {"tokens": "all"} if form["form"] == "hidden" else {"k": 8, "temperature": 2.0}
    own = dict(outputs_of_rows(run.engine, task.dataset, "hidden" if form["form"] == "hidden" else "topk", **settings))
    equal = []
    for index, output in own.items():
        read = again.load(index)
        if form["form"] == "hidden":
            equal.append(torch.equal(read, output["hidden"]))
        else:
            equal.append(
                (read.indices == output["indices"].numpy()).all()
                and (read.log_tail == output["log_tail"].numpy()).all()
            )
    size = sum(path.stat().st_size for path in Path(folder).glob("rank-*.bin"))
    return (
        len(own),
        all(equal),
        written.num_bytes,
        size,
        int(task.dataset.lengths.sum()),
        int(task.dataset.num_targets.sum()),
    )


@pytest.mark.parametrize(("form", "bf16"), [(HIDDEN, False), (HIDDEN, True), (OUTPUT, False)])
def test_recorded_outputs_are_read_back_exactly_and_have_the_documented_size(rank_pool, tmp_path, form, bf16):
    ranks = rank_pool(2).run(record_and_read, folder=str(tmp_path / "teacher"), form=form, bf16=bf16)
    assert sum(count for count, *_ in ranks) == 60
    for _, equal, num_bytes, on_disk, num_tokens, num_targets in ranks:
        assert equal
        per_token = 32 * (2 if bf16 else 4) if form is HIDDEN else 6 * 8 + 4
        assert num_bytes == on_disk == per_token * (num_tokens if form is HIDDEN else num_targets)


def refuse_to_record(folder: str) -> str:
    import shutil
    from pathlib import Path
    from unittest import mock

    from safecl.config import ConfigError
    from safecl.engine.teachers.recorded import open_recorded, record_outputs
    from safecl.methods.terms import TaskTerm

    run, (task,) = scenes.make_run(run_config(memory=None), tiny_model(), [random_dataset(60, seed=1)])
    term = TaskTerm("lwf", 1.0, "hidden")
    messages = []
    with mock.patch.object(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100)):
        try:
            record_outputs(run.engine, task.dataset, term, Path(folder) / "a")
        except ConfigError as error:
            messages.append(str(error))
    try:
        open_recorded(run.engine, task.dataset, term, Path(folder) / "b")
    except ConfigError as error:
        messages.append(str(error))
    return messages


def test_a_full_disk_and_a_missing_recording_are_told_before_training(rank_pool, tmp_path):
    full, missing = rank_pool(2).run(refuse_to_record, folder=str(tmp_path))[0]
    assert "GiB are free" in full and "form: output" in full
    assert "start it anew" in missing
