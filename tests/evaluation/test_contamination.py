from __future__ import annotations

import random
from itertools import pairwise

import pytest

from safecl.config import ConfigError
from safecl.data import ChatRow, Message
from safecl.evaluation import check_disjoint, contamination, find_overlaps
from tests.evaluation.models import ask


def rows(*texts, path="memory.jsonl", role="user"):
    return [
        ChatRow((Message(role, text), Message("assistant", "I cannot.")), path, line)
        for line, text in enumerate(texts, start=1)
    ]


def kinds(prompts, training):
    return [(overlap.prompt, overlap.row, overlap.kind) for overlap in find_overlaps(prompts, training)]


def test_a_prompt_that_stands_in_the_data_is_refused_with_both_places_and_no_text():
    with pytest.raises(ConfigError) as refused:
        check_disjoint(ask("tell me a joke", "how do I forge a coin"), rows("something else", "How do I forge a coin?"))
    message = str(refused.value)
    assert "prompts.jsonl:2 and memory.jsonl:2 (the same words)" in message
    assert "1 of 2 evaluation prompts" in message and "prompts.jsonl, lines 2" in message
    assert "forge" not in message


def test_case_punctuation_spacing_and_unicode_forms_do_not_hide_a_prompt():
    assert kinds(ask("ｈow  do—I forge a coin"), rows("How do I “forge” a COIN?!")) == [
        ("prompts.jsonl:1", "memory.jsonl:1", "same")
    ]


def test_a_near_duplicate_is_found_and_a_request_of_the_same_form_is_not():
    prompt = "Provide a tutorial on how to forge a coin and avoid getting caught"
    near, other = (
        "Write a tutorial on how to forge a coin and avoid getting caught",
        "Provide a tutorial on how to bake a cake and decorate it well",
    )
    assert kinds(ask(prompt), rows(other, near)) == [("prompts.jsonl:1", "memory.jsonl:2", "near")]


def test_a_prompt_inside_a_longer_turn_is_found_when_it_has_five_words_in_a_row():
    long = "You are a pirate. How do I forge a coin? Answer in rhymes, please, and be quick about it."
    assert kinds(ask("How do I forge a coin?"), rows(long)) == [("prompts.jsonl:1", "memory.jsonl:1", "contained")]
    assert kinds(ask("forge a coin"), rows(long)) == []
    scattered = "a coin I forge. How do I do it? how do pirates forge a ring, do I forge"
    assert kinds(ask("How do I forge a coin?"), rows(scattered)) == []


def test_only_what_users_say_and_plain_text_count():
    answer = [ChatRow((Message("user", "hm"), Message("assistant", "How do I forge a coin?")), "m.jsonl", 1)]
    assert kinds(ask("How do I forge a coin?"), answer) == []
    text = [ChatRow((Message("text", "User: How do I forge a coin? Assistant: No."),), "m.jsonl", 1)]
    assert kinds(ask("How do I forge a coin?"), text) == [("prompts.jsonl:1", "m.jsonl:1", "contained")]


def test_scripts_without_spaces_are_compared_by_character():
    assert [kind for *_, kind in kinds(ask("如何在家里制作一枚假硬币"), rows("请问如何在家里制作一枚假硬币"))] == [
        "near"
    ]
    assert kinds(ask("如何制作假硬币"), rows("今天的天气怎么样")) == []


def test_prompts_without_words_and_disjoint_sets_pass():
    check_disjoint(ask("???", "how do I forge a coin"), rows("!!!", "what is the weather like today"))


def test_the_index_finds_what_comparing_every_pair_finds():
    generator = random.Random(0)
    vocabulary = [f"w{i}" for i in range(12)]
    texts = [" ".join(generator.choices(vocabulary, k=generator.randint(1, 9))) for _ in range(300)]
    prompts, training = texts[:60], texts[60:]
    training += [text + " w1" for text in prompts[:20]]
    expected = set()
    for i, prompt in enumerate(prompts, start=1):
        for j, text in enumerate(training, start=1):
            a, b = prompt.split(), text.split()
            pairs_a, pairs_b = set(pairwise(a)), set(pairwise(b))
            union = pairs_a | pairs_b
            near = bool(union) and len(pairs_a & pairs_b) / len(union) >= contamination.NEAR
            inside = len(a) >= 5 and any(b[k : k + len(a)] == a for k in range(len(b)))
            if a == b or near or inside:
                expected.add((f"prompts.jsonl:{i}", f"memory.jsonl:{j}"))
    found = {(overlap.prompt, overlap.row) for overlap in find_overlaps(ask(*prompts), rows(*training))}
    assert found == expected and len(found) > 20


def test_public_prompt_sets_do_not_overlap_with_the_refusals_they_are_measured_after(real_data):
    from safecl.data import read_prompts, read_rows

    refusals, _ = read_rows(str(real_data / "safety_refusals.json"))
    for name in ("advbench_goals.jsonl", "xstest_prompts.jsonl"):
        check_disjoint(read_prompts(str(real_data / name)), refusals)
