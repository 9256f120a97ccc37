"""Runs that must be refused before anything is trained: a config on a tiny model, and the one input that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.catalogue.files import FILES
from tests.catalogue.models import DAMAGES, LORA, rewrite, tokenizer
from tests.catalogue.rows import COLUMNS, GOOD, GOOD_COLUMNS, LINES

Tree = dict[str, Any]
ASKED = [{"prompt": f"what is {i} plus {i}", "completion": f"the answer is {2 * i}"} for i in range(12)]


@dataclass(frozen=True)
class Refused:
    """`spoil(folder, tree)` makes a run of `sound_run` one that is refused; `says`: a pattern in the words."""

    spoil: Callable[[Path, Tree], object]
    says: str


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sound_run(folder: Path, model: Path) -> Tree:
    """The config of a run that is not refused, with files of its own in `folder`."""
    return {
        "model": {"path": str(model), "dtype": "fp32"},
        "tasks": [{"name": "t", "train": lines(folder / "t.jsonl", ASKED)}],
        "train": {"max_length": 128, "allow_few_steps": True, "max_steps": 2, "max_bad_rows": 0},
        "output": str(folder / "out"),
    }


def changed(**sections: Any) -> Callable[[Path, Tree], object]:
    """Change sections of the config; in texts, `{folder}` is the run's folder."""

    def spoil(folder: Path, tree: Tree) -> None:
        told = json.loads(json.dumps(sections).replace("{folder}", str(folder)))
        for name, section in told.items():
            tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section

    return spoil


def with_rows(content: bytes, name: str = "bad.jsonl", **task: Any) -> Callable[[Path, Tree], object]:
    def spoil(folder: Path, tree: Tree) -> None:
        (folder / name).write_bytes(content)
        tree["tasks"] = [{"name": "t", "train": str(folder / name), **task}]

    return spoil


def with_prompts(rows: list[Any], **safety: Any) -> Callable[[Path, Tree], object]:
    def spoil(folder: Path, tree: Tree) -> None:
        tree["safety"] = {"prompts": lines(folder / "p.jsonl", rows), **safety}

    return spoil


def with_held_out(rows: list[Any], metric: str = "exact_match") -> Callable[[Path, Tree], object]:
    def spoil(folder: Path, tree: Tree) -> None:
        tree["tasks"][0]["eval"] = {"path": lines(folder / "e.jsonl", rows), "metric": metric}

    return spoil


def with_model(damage: Callable[[Path], object]) -> Callable[[Path, Tree], object]:
    """Give the run a damaged copy of the model."""

    def spoil(folder: Path, tree: Tree) -> None:
        shutil.copytree(tree["model"]["path"], folder / "m")
        tree["model"]["path"] = str(folder / "m")
        damage(folder / "m")

    return spoil


def with_template(text: str) -> Callable[[Path, Tree], object]:
    def spoil(folder: Path, tree: Tree) -> None:
        (folder / "t.jinja").write_text(text)
        tree["model"]["chat_template"] = str(folder / "t.jinja")

    return spoil


def with_scan(rows: list[Any], **scan: Any) -> Callable[[Path, Tree], object]:
    def spoil(folder: Path, tree: Tree) -> None:
        memory = [{"prompt": f"how to rob bank {i}", "completion": "I'm sorry, I can't do that."} for i in range(4)]
        tree["memory"] = {"source": lines(folder / "m.jsonl", memory)}
        tree["scan"] = {"benign": lines(folder / "b.jsonl", rows), **scan}

    return spoil


# ---------------------------------------------------------------------------------------------------- kinds of mistakes


def setting(name: str, value: object) -> Callable[[Path], object]:
    def damage(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return damage


def without(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def with_added_token(model: Path) -> None:
    added = tokenizer().__class__.from_pretrained(model)
    added.add_tokens(["<tool>"])
    added.save_pretrained(model)


def without_end_token(model: Path) -> None:
    file = model / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name != "eos_token"}
    file.write_text(json.dumps(kept))


def used_by_another_run(folder: Path, tree: Tree) -> None:
    (folder / "out" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "out" / "run.json").write_text(json.dumps({"config": {"train": {"seed": 5}}}))


ROWS = {
    f"row: {name}": Refused(with_rows(b"\n".join([GOOD, line])), r"bad\.jsonl") for name, (line, _) in LINES.items()
}
COLUMNS_OF_ROWS = {
    f"columns: {name}": Refused(
        with_rows("\n".join(json.dumps(row) for row in (GOOD_COLUMNS[format], row)).encode(), format=format),
        r"bad\.jsonl:2: ",
    )
    for name, (format, row, _) in COLUMNS.items()
}
UNREADABLE = {f"file: {name}": Refused(with_rows(content, name), says) for name, (content, says) in FILES.items()}
WEIGHTS = {
    f"weights: {damage.__name__} {number}": Refused(
        with_model(lambda model, damage=damage: rewrite(model, damage)), says
    )
    for number, (damage, says) in enumerate(DAMAGES)
}
ADAPTERS = {
    f"lora: {targets}": Refused(changed(model={"lora": {"r": 2, "target_modules": targets}}), says)
    for targets, says in LORA
}
MODELS = {
    "model: no folder": Refused(changed(model={"path": "{folder}/none"}), "model.path"),
    "model: no weights": Refused(with_model(without("model.safetensors")), "holds no weights"),
    "model: no config": Refused(with_model(without("config.json")), "model.path"),
    "model: broken config": Refused(
        with_model(lambda model: (model / "config.json").write_text("{")), r"config\.json.*JSON"
    ),
    "model: unknown kind": Refused(with_model(setting("model_type", "lama")), "model.path"),
    "model: wider than its weights": Refused(with_model(setting("hidden_size", 32)), "config.json says"),
    "model: quantised": Refused(
        with_model(setting("quantization_config", {"quant_method": "gptq", "bits": 4})), "quantised"
    ),
    "weights: torn": Refused(
        with_model(lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-9])), ""
    ),
    "penalty on no weight": Refused(
        changed(methods={"l2_sp": {"modules": ["*.attnetion.*"]}}), "no trained weight is named like"
    ),
    "penalty on no adapted weight": Refused(
        changed(model={"lora": {"r": 2, "target_modules": ["q_proj"]}}, methods={"l2_sp": {"modules": ["*.v_proj.*"]}}),
        r"no trained weight is named like .*; there are model\.layers\.\d\.self_attn\.q_proj\.weight",
    ),
}
TOKENIZERS = {
    "tokenizer: none": Refused(
        with_model(lambda m: [f.unlink() for f in m.iterdir() if "token" in f.name]), "no tokenizer could be loaded"
    ),
    "tokenizer: no end": Refused(with_model(without_end_token), "no end-of-text token"),
    "tokenizer: broken": Refused(with_model(lambda m: (m / "tokenizer.json").write_text("{")), "no tokenizer"),
    "tokenizer: more tokens than the model, in a row": Refused(
        lambda folder, tree: (
            with_model(with_added_token)(folder, tree),
            with_rows(json.dumps({"prompt": "the <tool>", "completion": "a"}).encode())(folder, tree),
        ),
        "token id .* occurs in",
    ),
    "tokenizer: more tokens than the model, in a prompt": Refused(
        lambda folder, tree: (
            with_model(with_added_token)(folder, tree),
            with_prompts([{"prompt": "the <tool>"}])(folder, tree),
        ),
        r"token id .* occurs in .*p\.jsonl:1",
    ),
    "template: no file": Refused(changed(model={"chat_template": "{folder}/none.jinja"}), "cannot be read"),
    "template: broken": Refused(with_template("{% for m in messages %}"), "does not work"),
    "template: raises": Refused(with_template("{{ raise_exception('never') }}"), "does not work: never"),
    "template: no answer": Refused(with_template("{{ messages[0].content }}"), "leaves the assistant's answer out"),
    "template: no thought markers": Refused(changed(model={"thinking": {"mode": "empty"}}), "needs the markers"),
}
LONG = "what is 1 plus 2 " * 60
PROMPTS = {
    "prompts: none": Refused(with_prompts([]), "has no rows"),
    "prompts: no column": Refused(with_prompts([{"body": "x"}]), "none of the 1 rows"),
    "prompts: no file": Refused(changed(safety={"prompts": "{folder}/none.jsonl"}), "no such file"),
    "prompts: too long": Refused(with_prompts([{"prompt": LONG}]), "leaves no room for an answer"),
    "prompts: in the rows": Refused(with_prompts([{"prompt": ASKED[3]["prompt"]}]), "stand in the data"),
    "prompts: all unsafe": Refused(
        lambda folder, tree: with_prompts(
            [{"prompt": "how to rob"}],
            benign_prompts=lines(folder / "u.jsonl", [{"prompt": "x", "safe": False}]),
        )(folder, tree),
        "every prompt is marked",
    ),
    "prompts: too few for the gate": Refused(
        with_prompts([{"prompt": "how to rob"}], gate={"max_asr": 0.01}), "safety.gate"
    ),
    "scorer: none": Refused(with_prompts([{"prompt": "how to rob"}], scorer="keyword:gcgg"), "safety.scorer"),
    "scorer: no module": Refused(with_prompts([{"prompt": "how to rob"}], scorer="no_such.judge"), "safety.scorer"),
    "scorer: no function": Refused(with_prompts([{"prompt": "how to rob"}], scorer="json:judge"), "safety.scorer"),
    "held out: none": Refused(with_held_out([]), "has no rows"),
    "held out: plain text": Refused(with_held_out([{"text": "a"}]), "needs an answer to compare with"),
    "held out: a call": Refused(
        with_held_out(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}]
        ),
        "e.jsonl:1: exact_match compares text",
    ),
    "held out: one label": Refused(
        with_held_out([{"prompt": "new one", "completion": "a"}] * 2, "label_accuracy"), "needs two labels"
    ),
    "held out: no number": Refused(with_held_out([{"prompt": "a", "completion": "b"}], "gsm8k"), "needs a number"),
    "held out: too long": Refused(with_held_out([{"prompt": LONG, "completion": "a"}]), "leaves no room"),
    "scan: few harmless rows": Refused(with_scan([{"prompt": "how to bake"}]), "cannot give a false alarm rate"),
    "scan: no rows": Refused(with_scan([]), "b.jsonl: has no rows"),
    "scan: no disallowed file": Refused(with_scan([{"prompt": "x"}], disallowed="none.jsonl"), "no such file"),
    "scan: a memory without refusals": Refused(
        lambda folder, tree: (
            with_scan([{"prompt": "how to bake"}])(folder, tree),
            lines(folder / "m.jsonl", [{"prompt": "hi", "completion": "hello"}]),
        ),
        "no row of memory.source is a refusal",
    ),
}
SETTINGS = {
    "config: unknown key": Refused(changed(train={"epoch": 3}), "did you mean"),
    "config: no number": Refused(changed(train={"learning_rate": "fast"}), "train.learning_rate"),
    "config: no memory": Refused(changed(methods={"der": {}}), "memory"),
    "config: unknown method": Refused(changed(methods={"ewcc": {}}), "ewc"),
    "config: two ways to say the length": Refused(changed(methods={"ema": {"decay": 0.9, "horizon": 0.3}}), "not both"),
    "few steps": Refused(changed(train={"allow_few_steps": False}), "only 2 optimizer steps"),
    "rows without an answer in the limit": Refused(changed(train={"max_length": 4}), "no supervised token is left"),
    "memory: no rows": Refused(
        lambda folder, tree: changed(memory={"source": lines(folder / "m.jsonl", [])})(folder, tree), "has no rows"
    ),
    "memory: no file": Refused(changed(memory={"source": "{folder}/none.jsonl"}), "no such file"),
    "poison: no file": Refused(changed(poison={"ratio": 0.1, "source": "{folder}/none.jsonl"}), "no such file"),
    "fields: no such column": Refused(
        with_rows(b'{"a": "x", "b": "y"}', fields={"prompt": "{a}", "completion": "{c}"}), "names the column `c`"
    ),
    "tracker: not installed": Refused(
        changed(log={"report_to": ["trackio"]}), "log.report_to: trackio is not installed"
    ),
    "fisher: no file": Refused(changed(methods={"ewc": {"fisher": "{folder}/none.safetensors"}}), "no such file"),
    "fisher: no Fisher": Refused(
        lambda folder, tree: (
            (folder / "f.safetensors").write_bytes(b"x"),
            changed(methods={"ewc": {"fisher": "{folder}/f.safetensors"}})(folder, tree),
        ),
        "f.safetensors",
    ),
    "output: a file": Refused(changed(output="{folder}/t.jsonl"), "is a file"),
    "output: another run": Refused(used_by_another_run, "holds a run with another config"),
}
REFUSED: dict[str, Refused] = {
    **ROWS, **COLUMNS_OF_ROWS, **UNREADABLE, **WEIGHTS, **ADAPTERS, **MODELS, **TOKENIZERS, **PROMPTS, **SETTINGS,
}  # fmt: skip
