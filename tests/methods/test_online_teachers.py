"""Teachers that are asked in every step train what stored outputs of the same model train."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from safecl.config import ConfigError, validate_tree
from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import scenes, test_lwf
from tests.methods.test_lwf import HIDDEN, LORA, OUTPUT
from tests.methods.test_replay_methods import expected_derpp

STEPS = 6
ONLINE = {"memory": {"source": "unused", "replay_ratio": 0.25, "teacher": {"kind": "online", "k": 8}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return str(path)


def model_at(folder: str) -> dict:
    return {"path": folder, "dtype": "fp32", "gradient_checkpointing": False}


@pytest.mark.parametrize(
    ("form", "stage"), [(HIDDEN, 0), (HIDDEN | {"tokens": "supervised"}, 2), (HIDDEN, 3), (OUTPUT, 1), (OUTPUT, 3)]
)
def test_lwf_online_equals_a_frozen_copy(rank_pool, folder, tmp_path, form, stage):
    methods = {"lwf": form | {"outputs": "online"}}
    arguments = dict(
        model=model_at(folder), memory=None, methods=methods, deepspeed={"stage": stage}, output=str(tmp_path)
    )
    found = rank_pool(2).run(scenes.train, steps=STEPS, **arguments)[0]
    assert test_lwf.error(found, form) <= 1e-3
    terms = [losses["lwf"] for losses in found["losses"]]
    assert abs(terms[0]) < 1e-6 < min(terms[1:]), terms
    assert not (tmp_path / "teacher").exists()  # nothing is recorded


@pytest.mark.parametrize("teacher", ["streamed", "resident"])
def test_der_online_equals_stored_outputs(rank_pool, folder, teacher):
    start = {name: p.detach() for name, p in tiny_model().named_parameters()}
    methods = {"derpp": {"alpha": 2.0, "beta": 0.5}}
    arguments = dict(
        model=model_at(folder), methods=methods, deepspeed={"stage": 3}, teacher=teacher, train={"packing": "padded"}
    )
    found = rank_pool(2).run(scenes.train, steps=8, **arguments, **ONLINE)[0]["weights"]
    assert oracle.relative_distance(found, expected_derpp(2.0, 0.5, k=8), start) <= 1e-3


def test_the_thread_that_makes_a_step_ready_looks_at_no_parameter(rank_pool, folder):
    methods = {"derpp": {"alpha": 2.0, "beta": 0.5}, "lwf": OUTPUT | {"outputs": "online"}, "agem": {}}
    found = rank_pool(2).run(
        scenes.threads_that_look_at_parameters,
        steps=4,
        model=model_at(folder),
        methods=methods,
        deepspeed={"stage": 3},
        **ONLINE,
    )
    assert found == [{"MainThread"}] * 2


def lora_twice(folder: str) -> list[dict]:
    """DER with LoRA, its teacher asked in every step and stored."""
    found = []
    for kind in ("online", "topk"):
        memory = {"source": "unused", "replay_ratio": 0.25, "teacher": {"kind": kind, "k": 8}}
        torch.manual_seed(1)
        found.append(
            scenes.train(STEPS, model=LORA, methods={"der": {"alpha": 5.0}}, deepspeed={"stage": 3}, memory=memory)
        )
    return found


def test_der_online_with_lora_asks_the_model_with_its_adapters_off(rank_pool, folder):
    online, stored = rank_pool(2).run(lora_twice, folder=folder)[0]
    trained = {name: value for name, value in stored["weights"].items() if "lora_" in name}
    start = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in trained.items()}
    moved = {name: value for name, value in trained.items() if "lora_B" in name}
    assert (
        moved and oracle.relative_distance(online["weights"], moved, start) <= 1e-2
    )  # stored log-probabilities are fp16
    assert online["losses"][0]["replay"] == pytest.approx(0.0, abs=1e-6) and online["losses"][-1]["replay"] > 1e-4


def terms_of_a_sequence(
    folder: str, output: str, source: str, reload: bool = False
) -> tuple[list[float], list[str], bool]:
    """The LwF term at three steps of each of two tasks, what was said, and whether folders are left. reload: as a
    resumed run does, in the middle of each task."""
    from safecl.training import resume

    methods = {"lwf": {"weight": 1.0, "teacher": source, "outputs": "online"}, "ema": {"decay": 0.5}}
    config = run_config(
        tasks=scenes.SEQUENCE,
        memory=None,
        methods=methods,
        output=output,
        model=model_at(folder),
        deepspeed={"stage": 2},
    )
    run, tasks = scenes.make_run(config, tiny_model(), [random_dataset(60, seed=1), random_dataset(60, seed=4)])
    terms, said = [], []
    run.log = said.append
    for task in tasks:
        run.begin_task(task, active=True)
        terms += [run.train_step(task).totals()["lwf"] for _ in range(2)]
        if reload:
            resume.restore(run, resume.state_of(run), task)
        terms.append(run.train_step(task).totals()["lwf"])
        run.end_task()
    run.finish()
    return terms, said, any((Path(output) / "teacher").glob("*"))


def test_the_teacher_is_the_aligned_model_the_one_before_or_the_average(rank_pool, folder, tmp_path):
    found = {
        source: rank_pool(2).run(terms_of_a_sequence, folder=folder, output=str(tmp_path / source), source=source)[0]
        for source in ("aligned", "previous", "ema")
    }
    assert not any(left for *_, left in found.values())
    aligned, previous, ema = (found[source][0] for source in ("aligned", "previous", "ema"))
    assert aligned[0] < 1e-10 and aligned[3] > 1e-4
    assert previous[:3] == pytest.approx(aligned[:3], rel=1e-5) and previous[3] < 1e-10 < previous[4]
    assert ema[0] < 1e-10 and ema[3] < 1e-10 and 1e-6 < ema[2] < 0.9 * aligned[2]
    assert any("kept in" in line for line in found["previous"][1])


def outputs_of_the_average(temperature: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the average is asked to say of five rows, and the same by the plain model, log-probabilities of its k
    likeliest tokens."""
    from safecl.data import collate
    from safecl.engine.passes.distances import target_positions
    from safecl.engine.passes.step_rows import Question
    from safecl.engine.teachers.engine_teacher import EngineTeacher
    from safecl.engine.teachers.questions import TeacherBatch

    run, (task,) = scenes.make_run(
        run_config(memory=None, methods={"ema": {"decay": 0.5}}), tiny_model(), [random_dataset(60, seed=1)]
    )
    run.begin_task(task, active=True)  # the average is the start now
    found, expected, model = [], [], tiny_model().eval()
    for row in task.dataset.rows(range(5)):
        batch = collate([row], packed=True, pad_id=0)
        positions = torch.from_numpy(target_positions(batch, 0, row))
        asked = [(Question("topk", k=8, temperature=temperature), positions)]
        ((answer,),) = EngineTeacher(run.engine, average=True).answer(
            [TeacherBatch(batch.input_ids, batch.position_ids, asked)]
        )
        found.append(answer.log_probs.float())
        with torch.no_grad():
            expected.append(test_lwf.reference.log_probs(model, row, temperature).topk(8).values)
    return found, expected


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_average_answers_at_the_temperature_that_is_asked(rank_pool, temperature):
    for found, expected in rank_pool(2).run(outputs_of_the_average, temperature=temperature):
        assert oracle.relative_distance(dict(enumerate(found)), dict(enumerate(expected))) <= 1e-3


def test_a_resumed_run_asks_the_teacher_that_it_asked_before(rank_pool, folder, tmp_path):
    arguments = dict(folder=folder, source="previous")
    plain, resumed = (
        rank_pool(2).run(terms_of_a_sequence, output=str(tmp_path / str(reload)), reload=reload, **arguments)[0]
        for reload in (False, True)
    )
    assert resumed[0] == plain[0]
    assert len([line for line in resumed[1] if line.startswith("teacher: previous")]) == 4


def lose_the_teacher(folder: str, output: str) -> str:
    import shutil

    from safecl.engine.teachers.online import OnlineTeachers

    methods = {"lwf": {"teacher": "previous", "outputs": "online"}}
    config = run_config(tasks=scenes.SEQUENCE, memory=None, methods=methods, output=output, model=model_at(folder))
    run, tasks = scenes.make_run(config, tiny_model(), [random_dataset(60, seed=1), random_dataset(60, seed=4)])
    teachers = OnlineTeachers(config, run.engine, lambda message: None)
    teachers.begin_task("second")
    torch.distributed.barrier()
    shutil.rmtree(output, ignore_errors=True)
    teachers.resume("second")
    run.task, run.active_methods = tasks[1], run.methods
    try:
        teachers.ask(run.step_rows(tasks[1]))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_teacher_that_is_gone_is_told(rank_pool, folder, tmp_path):
    for said in rank_pool(2).run(lose_the_teacher, folder=folder, output=str(tmp_path / "run")):
        assert "model-before-second" in said and "start it anew" in said


def distances_to_another_model(folder: str, other: str) -> list[float]:
    methods = {"lwf": {"weight": 1.0, "teacher": other, "outputs": "online"}}
    config = run_config(memory=None, methods=methods, model=model_at(folder), deepspeed={"stage": 1})
    run, (task,) = scenes.make_run(config, tiny_model(), [random_dataset(60, seed=1)])
    run.begin_task(task, active=True)
    found = [run.train_step(task).totals()["lwf"]]
    run.close()
    return found


def test_any_folder_may_be_the_teacher(rank_pool, folder, tmp_path):
    other = tiny_model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    other.save_pretrained(tmp_path)
    (found,) = rank_pool(2).run(distances_to_another_model, folder=folder, other=str(tmp_path))[0]
    rows = test_lwf.task_rows(random_dataset(60, seed=1), 1)[0]
    expected = test_lwf.distance({"form": "hidden", "weight": 1.0}, tiny_model(), copy.deepcopy(other), rows)
    assert found == pytest.approx(float(expected.detach()), rel=1e-4)


def begin_with_a_wrong_teacher(folder: str, source: str, wrong: str = "layers") -> tuple[str, int]:
    """The message by which a teacher is refused whose streamed numbers are not the model's, and how many steps were
    made by then.

    wrong: the `layers`, or the `head`: logits have a softcap that a bf16 number's last digit hides.
    """
    from unittest import mock

    import transformers

    from safecl.engine.model.checks import check_head
    from safecl.engine.teachers.streamed import StreamedTeacher

    methods = {"lwf": {"weight": 1.0, "teacher": source, "outputs": "online"}}
    config = run_config(memory=None, methods=methods, model=model_at(folder), deepspeed={"stage": 2})
    run, (task,) = scenes.make_run(config, tiny_model(), [random_dataset(60, seed=1)])
    finish, forward = StreamedTeacher._finish, transformers.LlamaForCausalLM.forward

    def capped(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits = 30.0 * torch.tanh(output.logits / 30.0)
        return output

    layers = mock.patch.object(StreamedTeacher, "_finish", lambda *arguments: 1.5 * finish(*arguments))
    head = mock.patch.object(transformers.LlamaForCausalLM, "forward", capped)
    with layers if wrong == "layers" else head:
        check_head(run.engine.module)
        try:
            run.begin_task(task, active=True)
        except ConfigError as error:
            return str(error), run.global_step
    return "", run.global_step


def test_a_teacher_whose_streamed_numbers_are_wrong_is_refused_before_the_first_step(rank_pool, folder, tmp_path):
    """The run's own model against the live one, any other against itself as transformers runs it."""
    tiny_model().save_pretrained(tmp_path)
    for source, otherwise in (("aligned", "the method's outputs: recorded"), (str(tmp_path), "use another teacher")):
        for said, steps in rank_pool(2).run(begin_with_a_wrong_teacher, folder=folder, source=source):
            assert "cannot be streamed" in said and "logits differ by" in said and otherwise in said and steps == 0
        for said, steps in rank_pool(2).run(begin_with_a_wrong_teacher, folder=folder, source=source, wrong="head"):
            assert "more than a linear head" in said and otherwise in said and steps == 0


def test_an_architecture_that_cannot_be_streamed_is_refused_before_any_weight_is_loaded(tmp_path):
    """GPT-1 reshapes by what only its embeddings know; the message says what works."""
    import transformers

    from safecl.engine.teachers.checks import check_teachers

    settings = transformers.OpenAIGPTConfig(vocab_size=131, n_embd=32, n_head=4, n_layer=3)
    transformers.OpenAIGPTLMHeadModel(settings).save_pretrained(tmp_path)
    methods = {"lwf": {"outputs": "online"}}
    with pytest.raises(
        ConfigError,
        match=r"methods\.lwf\.teacher: this architecture cannot be streamed .*the method's outputs: recorded",
    ):
        check_teachers(run_config(memory=None, methods=methods, model=model_at(str(tmp_path))), None)
    check_teachers(run_config(memory=None, methods={"lwf": {}}, model=model_at(str(tmp_path))), None)


# -------------------------------------------------------------------------------------------------------------- configs

BASE = {
    "model": {"path": "m"},
    "tasks": [{"name": "a", "train": "t.jsonl"}],
    "memory": {"source": "r.jsonl"},
    "output": "runs/a",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"lwf": {"teacher": "ema"}}}, "teacher: ema needs outputs: online"),
        (
            {"methods": {"lwf": {"teacher": "ema", "outputs": "online"}}},
            "methods.lwf.teacher: ema is the average of the weights, and no method here keeps one; "
            "dema or ema or i_lora or psmt or temporal_ensemble does",
        ),
        (
            {"methods": {"lwf": {"teacher": "previous", "outputs": "online"}}, "model": {"path": "m", "lora": {}}},
            "previous cannot be an online teacher with model.lora",
        ),
        ({"memory": {"source": "r", "teacher": {"source": "elsewhere"}}}, "source: elsewhere needs kind: online"),
        ({"memory": {"source": "r", "teacher": {"kind": "onlin"}}}, "'topk' or 'online'"),
        ({"teacher": "gpu"}, "'streamed' or 'resident'"),
    ],
)
def test_teachers_that_cannot_be_are_refused_with_what_works(changes, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        validate_tree(BASE | changes, "run.yaml")


def test_only_teachers_that_somebody_asks_are_opened():
    tree = BASE | {"memory": {"source": "r", "teacher": {"kind": "online"}}}
    assert validate_tree(tree | {"methods": {"er": {}}}, "run.yaml").online_teachers == {}
    assert validate_tree(tree | {"methods": {"der": {}}}, "run.yaml").online_teachers == {
        "memory.teacher.source": "aligned"
    }
    assert validate_tree(BASE | {"methods": {"lwf": {}, "der": {}}}, "run.yaml").online_teachers == {}
