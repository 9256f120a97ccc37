"""A tokenizer whose class is remembered is the one that AutoTokenizer gives, and takes no settings of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from safecl.config import ModelConfig
from safecl.data import load_tokenizer
from safecl.data.prepare import tokenizer_key
from safecl.storage import model_records
from safecl.storage.model_records import ModelRecords
from tests.data.tokenizers import CHATML, LLAMA2, TEXT, byte_level, metaspace

FAMILIES = [
    ("llama", "LlamaTokenizer", metaspace),
    ("llama", "LlamaTokenizerFast", byte_level),
    ("llama", "PreTrainedTokenizerFast", byte_level),
    ("llama", None, metaspace),
    ("mistral", "LlamaTokenizer", metaspace),
    ("qwen2", "Qwen2Tokenizer", byte_level),
    ("gpt2", "GPT2Tokenizer", byte_level),
    ("gpt2", None, byte_level),
    ("gemma", "GemmaTokenizer", metaspace),
    ("phi3", "LlamaTokenizerFast", metaspace),
    (None, "PreTrainedTokenizerFast", byte_level),
    (None, "GPT2TokenizerFast", byte_level),
]


def save(folder: Path, family: str | None, name: str | None, made) -> Path:
    made(LLAMA2 if made is metaspace else CHATML).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    found = json.loads(settings.read_text())
    found.pop("tokenizer_class", None)
    settings.write_text(json.dumps(found if name is None else found | {"tokenizer_class": name}))
    if family is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


def facts(tokenizer) -> dict:
    texts = [*TEXT, "<|im_start|>user\nHi<|im_end|>", "</s> é 中 \t x", ""]
    return {
        "class": type(tokenizer),
        "vocabulary": tokenizer.get_vocab(),
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special": tokenizer.special_tokens_map,
        "added": repr(tokenizer.added_tokens_decoder),
        "template": tokenizer.chat_template,
        "settings": repr(sorted(tokenizer.init_kwargs.items())),
        "length": tokenizer.model_max_length,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "plain ids": [tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts],
        "key": tokenizer_key(tokenizer),
    }


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The folders whose class AutoTokenizer was asked for."""
    folders, choose = [], transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda source, **options: folders.append(source) or choose(source, **options),
    )
    return folders


@pytest.mark.parametrize(("family", "name", "made"), FAMILIES)
def test_the_remembered_class_gives_the_same_tokenizer(tmp_path, asked, family, name, made):
    folder, records = save(tmp_path / "model", family, name, made), ModelRecords(tmp_path / "store")
    model = ModelConfig(path=str(folder))
    first, again = load_tokenizer(model, records=records), load_tokenizer(model, records=records)
    assert asked == [str(folder)]
    assert facts(first) == facts(again) == facts(load_tokenizer(model))


def test_a_changed_file_or_package_lets_the_library_choose_again(tmp_path, asked, monkeypatch):
    folder, records = save(tmp_path / "model", "gpt2", "GPT2Tokenizer", byte_level), ModelRecords(tmp_path / "store")

    def chosen() -> tuple[str, bool]:
        asked.clear()
        return type(load_tokenizer(ModelConfig(path=str(folder)), records=records)).__name__, bool(asked)

    assert chosen() == ("GPT2Tokenizer", True) and chosen() == ("GPT2Tokenizer", False)
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("GPT2Tokenizer", "PreTrainedTokenizerFast"))
    assert chosen() == ("TokenizersBackend", True) and chosen() == ("TokenizersBackend", False)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert chosen()[1] and not chosen()[1]
    monkeypatch.setattr(model_records, "package_versions", lambda: ["another"])
    assert chosen()[1] and not chosen()[1]


@pytest.mark.parametrize(
    "place",
    [
        ["tests.data.tokenizers", "SlowTokenizer"],
        ["transformers.tokenization_utils_tokenizers", "json"],
        ["transformers.tokenization_utils_tokenizers", "nowhere"],
        ["transformers.nowhere", "TokenizersBackend"],
        ["transformers.configuration_utils", "PreTrainedConfig"],
        ["os", "system"],
        [1, 2],
        "text",
        {},
    ],
)
def test_a_record_that_names_no_tokenizer_of_the_library_is_ignored(tmp_path, asked, place):
    folder, records = save(tmp_path / "model", "llama", None, byte_level), ModelRecords(tmp_path / "store")
    basis = model_records.tokenizer_basis(str(folder))
    records.keep(f"tokenizer class {folder}", basis, place)
    load_tokenizer(ModelConfig(path=str(folder)), records=records)
    assert asked == [str(folder)]
    assert records.find(f"tokenizer class {folder}", basis)[1] == "TokenizersBackend"


def test_code_that_is_trusted_is_asked_each_time(tmp_path, asked):
    folder, records = save(tmp_path / "model", "llama", None, byte_level), ModelRecords(tmp_path / "store")
    for _ in range(2):
        load_tokenizer(ModelConfig(path=str(folder), trust_remote_code=True), records=records)
    assert len(asked) == 2 and not (tmp_path / "store").exists()


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(tmp_path, asked):
    base, records = save(tmp_path / "base", "llama", None, byte_level), ModelRecords(tmp_path / "store")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    first, again = (load_tokenizer(ModelConfig(path=str(adapter)), records=records) for _ in range(2))
    assert asked == [str(base)] and facts(first) == facts(again)
    settings = base / "tokenizer_config.json"
    settings.write_text(settings.read_text() + " ")
    load_tokenizer(ModelConfig(path=str(adapter)), records=records)
    assert len(asked) == 2


def test_a_gguf_file_is_read_each_time(tmp_path, monkeypatch):
    """AutoTokenizer is replaced: the package that reads such a file is not needed here."""
    asked: list[dict] = []
    chosen = lambda source, **options: asked.append(options) or byte_level()  # noqa: E731
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", chosen)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for _ in range(2):
        load_tokenizer(ModelConfig(path=str(tmp_path / "m.gguf")), records=ModelRecords(tmp_path / "store"))
    assert asked == [{"trust_remote_code": False, "gguf_file": "m.gguf"}] * 2 and not (tmp_path / "store").exists()
