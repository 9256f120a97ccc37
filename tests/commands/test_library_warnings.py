"""No FutureWarning of a library reaches the user of a verb, or of a function that loads an adapter."""

from __future__ import annotations

import os
import warnings

Told = dict[str, list[str]]


def future_warnings(lines: list[list[str]], adapter: str, environment: dict[str, str]) -> tuple[Told, list[int]]:
    """By verb, the FutureWarnings that pass the filters; and the exit codes."""
    from safecl import cli
    from safecl.evaluation.answers.model import HFEvalModel

    os.environ |= environment
    told, codes = {}, []
    for arguments in lines:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            try:
                cli.main(arguments)
            except SystemExit as ended:
                codes.append(int(ended.code or 0))
        told[arguments[0]] = told.get(arguments[0], []) + _future(found)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        HFEvalModel.load(adapter)
    return told | {"HFEvalModel.load": _future(found)}, codes


def _future(found: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in found if issubclass(warning.category, FutureWarning)]


def test_no_future_warning_of_a_library_reaches_the_user(rank_pool, task_config, materials, tmp_path):
    small = {
        "memory": {"source": str(materials.folder / "data" / "memory.jsonl"), "max_rows": 4},
        "artifacts": {"folder": str(tmp_path / "artifacts")},
        "safety": {"max_prompts": 4, "benign_prompts": None, "every": "never"},
        "train": {"max_steps": 1},
    }
    full = tmp_path / "full.yaml"
    full.write_text(task_config(methods={"ewc": {"sign_batches": 2}}, **small).read_text())
    adapters = task_config(model={"lora": {"r": 2}}, methods={"der": {}}, **small)
    model = str(tmp_path / "out" / "model")
    told, codes = rank_pool(1).run(
        future_warnings,
        lines=[
            ["check", str(adapters)],
            ["train", str(adapters)],
            ["eval", str(adapters), f"model.path={model}", "model.lora=null", f"output={tmp_path / 'eval'}"],
            ["check", str(adapters), f"model.path={model}", "model.lora=null", f"output={tmp_path / 'again'}"],
            ["fisher", str(full)],
            ["memory", "cache", str(full)],
            ["scan", str(full), "scan={refusals: [I cannot help], refusal_tokens: 1}"],
        ],
        adapter=model,
        environment={"SAFECL_CACHE": str(tmp_path / "cache")},
    )[0]
    assert codes == [0] * 7
    assert not any(told.values()), told
