"""Files made to hurt: models, tokenizers, templates, adapters, rows and configs. Each case writes them beside a sound
model and sound rows, and says which verb reads them and how it must end.

Code in a file would make the file `EXECUTED`. What lies outside of the folders holds `SECRET`. Texts that a user sees
hold `ESCAPES` and `MARKUP`.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXECUTED = "executed"
SECRET = "SECRET-outside-of-the-folder"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
DEEP = 100_000


@dataclass
class Place:
    """A folder of one case: a copy of the model, rows, and something outside that nobody may read."""

    folder: Path
    tree: dict[str, Any]
    """The run config, which a case may change."""
    raw: bytes | None = None
    """The config file's bytes, where they are not the tree's."""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    def edit(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file of the model."""
        file = self.model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def write(self, name: str, content: str | bytes) -> Path:
        file = self.model / name
        file.unlink(missing_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def rows(self, content: str | bytes, name: str = "rows.jsonl") -> None:
        (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        self.tree["tasks"][0]["train"] = str(self.folder / name)

    def template(self, text: str) -> None:
        self.write("chat_template.jinja", text)


@dataclass
class Case:
    make: Callable[[Place], None]
    code: int | None = 2
    """0, 2, or None for either: what the file reaches for is then empty."""
    words: tuple[str, ...] = ()
    """Words of the message."""
    arguments: list[str] = field(default_factory=list)


CASES: dict[str, Case] = {}


def case(code: int = 2, *words: str, arguments: tuple[str, ...] = ()):
    def add(make: Callable[[Place], None]) -> Callable[[Place], None]:
        CASES[make.__name__] = Case(make, code, words, list(arguments))
        return make

    return add


class Pickled:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, (f"touch {EXECUTED}",)


# ------------------------------------------------------------------------------------------ weights: places and headers


def index_of(place: Place, target: str) -> None:
    tensors = json.loads(header(place.model / "model.safetensors"))
    (place.model / "model.safetensors").unlink()
    names = [name for name in tensors if name != "__metadata__"]
    place.write("model.safetensors.index.json", json.dumps({"weight_map": dict.fromkeys(names, target)}))


def header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]


def reheader(place: Place, change: Callable[[dict], object]) -> None:
    """Change the header of the weights; the data stay."""
    file = place.model / "model.safetensors"
    old = header(file)
    entries = json.loads(old)
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + file.read_bytes()[8 + len(old) :])


def first(entries: dict) -> dict:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


@case(2, "outside of the folder")
def index_with_a_path_upwards(place):
    shutil.copy(place.model / "model.safetensors", place.outside / "model.safetensors")
    index_of(place, "../outside/model.safetensors")


@case(2, "outside of the folder")
def index_with_an_absolute_path(place):
    shutil.copy(place.model / "model.safetensors", place.outside / "model.safetensors")
    index_of(place, str(place.outside / "model.safetensors"))


@case(2, "outside of the folder")
def weights_that_are_a_link(place):
    shutil.move(place.model / "model.safetensors", place.outside / "model.safetensors")
    (place.model / "model.safetensors").symlink_to(place.outside / "model.safetensors")


@case(2, "outside of the folder")
def index_into_a_linked_folder(place):
    shutil.copy(place.model / "model.safetensors", place.outside / "model.safetensors")
    (place.model / "sub").symlink_to(place.outside)
    index_of(place, "sub/model.safetensors")


@case(2, "outside of the folder")
def settings_that_are_a_link(place):
    shutil.move(place.model / "config.json", place.outside / "config.json")
    (place.model / "config.json").symlink_to(place.outside / "config.json")


@case(2, "outside of the folder")
def tokenizer_that_is_a_link(place):
    shutil.move(place.model / "tokenizer.json", place.outside / "tokenizer.json")
    (place.model / "tokenizer.json").symlink_to(place.outside / "tokenizer.json")


@case(2, "not a plain file")
def weights_that_are_a_pipe(place):
    (place.model / "model.safetensors").unlink()
    os.mkfifo(place.model / "model.safetensors")


@case(2, "not a plain file")
def settings_that_are_a_pipe(place):
    (place.model / "config.json").unlink()
    os.mkfifo(place.model / "config.json")


@case(2)
def index_with_a_nul_in_a_name(place):
    index_of(place, "a\0b.safetensors")


@case(2, "not an index")
def index_of_lists(place):
    index_of(place, "x")
    place.write("model.safetensors.index.json", json.dumps({"weight_map": {"a": [1], "b": {"c": 2}}}))


@case(2, "index.json", "nested")
def index_that_is_deep(place):
    index_of(place, "x")
    place.write("model.safetensors.index.json", '{"weight_map": ' + "[" * DEEP)


@case(2, "overlap")
def header_with_overlapping_tensors(place):
    def change(entries):
        one, two = [e for n, e in entries.items() if n != "__metadata__"][:2]
        two["data_offsets"], two["shape"], two["dtype"] = one["data_offsets"], one["shape"], one["dtype"]

    reheader(place, change)


@case(2, "sizes must be whole numbers")
def header_with_negative_offsets(place):
    reheader(place, lambda entries: first(entries).update(data_offsets=[-8, 8], shape=[4]))


@case(2, "bytes for")
def header_with_an_absurd_shape(place):
    reheader(place, lambda entries: first(entries).update(shape=[10**12, 10**12, 10**12]))


@case(2, "its header would be")
def header_of_an_absurd_length(place):
    file = place.model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])


@case(2, "cannot be read")
def header_that_is_deep(place):
    text = b"[" * DEEP
    place.write("model.safetensors", struct.pack("<Q", len(text)) + text)


@case(2, "pickle")
def weights_that_are_a_pickle(place):
    (place.model / "model.safetensors").unlink()
    place.write("pytorch_model.bin", pickle.dumps({"a": Pickled()}))


@case(2, "pickle")
def weights_that_are_a_zip_with_a_pickle(place):
    (place.model / "model.safetensors").unlink()
    with zipfile.ZipFile(place.model / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"a": Pickled()}))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")


@case(2, "outside of the folder")
def bin_index_with_a_path_upwards(place):
    (place.model / "model.safetensors").unlink()
    (place.outside / "x.bin").write_bytes(pickle.dumps({"a": Pickled()}))
    place.write("pytorch_model.bin.index.json", json.dumps({"weight_map": {"a": "../outside/x.bin"}}))


# ------------------------------------------------------------------------------------------------------------- settings


@case(2, "config.json", "nested")
def settings_that_are_deep(place):
    place.write("config.json", '{"a":' * DEEP)


@case(2, "num_hidden_layers", "1,000,000")
def settings_with_a_million_layers(place):
    place.edit("config.json", num_hidden_layers=10**6)


@case(2, "vocab_size")
def settings_with_an_absurd_vocabulary(place):
    place.edit("config.json", vocab_size=10**12)


@case(2, "hidden_size")
def settings_with_a_negative_size(place):
    place.edit("config.json", hidden_size=-64)


@case(2, "num_attention_heads")
def settings_with_text_for_a_number(place):
    place.edit("config.json", num_attention_heads="many")


@case(2)
def settings_with_no_heads(place):
    place.edit("config.json", num_attention_heads=0)


@case(2)
def settings_with_a_number_of_many_digits(place):
    place.write(
        "config.json", (place.model / "config.json").read_text().replace("{", '{"x": ' + "9" * 100_000 + ",", 1)
    )


@case(2, "trust_remote_code")
def settings_with_code(place):
    place.edit("config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil")
    place.write("evil.py", f"open({EXECUTED!r}, 'w')\n")


@case(2, "trust_remote_code")
def settings_with_code_of_another_repository(place):
    place.edit("config.json", auto_map={"AutoConfig": "some/repo--evil.C"}, model_type="evil")


@case(2, "model.path")
def settings_of_no_model_type_with_escapes(place):
    place.edit("config.json", model_type=ESCAPES, architectures=[ESCAPES])


@case(2, "generation_config.json", "nested")
def generation_settings_that_are_deep(place):
    place.write("generation_config.json", '{"a":' * DEEP)


# --------------------------------------------------------------------------------------------- tokenizers and templates


@case(2, "nested")
def tokenizer_that_is_deep(place):
    place.write("tokenizer.json", '{"model":' * DEEP)


@case(0)
def tokenizer_of_an_imported_class(place):
    place.edit("tokenizer_config.json", tokenizer_class="os.system")


@case(2, "trust_remote_code")
def tokenizer_with_code(place):
    place.edit(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="EvilTokenizer"
    )
    place.write("evil.py", f"open({EXECUTED!r}, 'w')\n")


@case(2)
def tokenizer_with_absurd_ids(place):
    tokenizer = json.loads((place.model / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["id"] = 10**12
    place.write("tokenizer.json", json.dumps(tokenizer))


@case(2, "tokenizer", "too long")
def tokenizer_whose_normaliser_grows_text(place):
    tokenizer = json.loads((place.model / "tokenizer.json").read_text())
    grow = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [grow] * 10}
    place.write("tokenizer.json", json.dumps(tokenizer))


@case(2, "chat template", "too long")
def template_of_nested_loops(place):
    loop = "".join(f"{{% for a{i} in range(9999) %}}" for i in range(4))
    place.template(loop + "{{ messages[0].content }}" + "{% endfor %}" * 4)


@case(2, "chat template")
def template_of_powers(place):
    place.template("{% set x = 9 ** (9 ** 9) %}" + TEMPLATE)


@case(2, "chat template")
def template_that_takes_all_memory(place):
    place.template("{% set x = 'a' * 10000000000 %}{% set y = x * 10 %}" + TEMPLATE)


@case(2, "chat template")
def template_that_formats_wide(place):
    place.template("{{ '%09999999999d' | format(1) }}" + TEMPLATE)


TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ESCAPES_FROM_THE_SANDBOX = (
    "{{ cycler.__init__.__globals__.os.popen('touch executed').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append.__self__.__class__.__base__ }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('executed', 'w') }}",
    "{{ ('a' | attr('__class__')) }}",
    "{{ raise_exception.__globals__['os'].system('touch executed') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ '{0.__class__}' .format(messages) }}",
    "{{ '{0.__init__.__globals__}' | format(lipsum) }}{{ lipsum.__globals__ }}",
)
for _number, _text in enumerate(ESCAPES_FROM_THE_SANDBOX):
    CASES[f"template_that_reaches_for_python_{_number}"] = Case(
        lambda place, text=_text: place.template(text + TEMPLATE), None, ("chat template",)
    )


@case(2, "chat template")
def template_that_includes_a_file(place):
    (place.outside / "x").write_text(SECRET)
    place.template("{% include '../outside/x' %}" + TEMPLATE)


@case(2, "chat template")
def template_that_calls_itself(place):
    place.template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}" + TEMPLATE)


@case(2, "chat template")
def template_that_raises_escapes(place):
    place.template("{{ raise_exception('" + ESCAPES + MARKUP + "') }}")


@case(2, "chat template")
def template_that_is_deep(place):
    place.template("{% if 1 %}" * 5000 + TEMPLATE + "{% endif %}" * 5000)


# ---------------------------------------------------------------------------------------------------- adapters and GGUF


def adapter(place: Place, **settings: Any) -> Path:
    folder = place.folder / "adapter"
    folder.mkdir()
    base = {"base_model_name_or_path": str(place.model), "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(base | settings))
    place.tree["model"]["path"] = str(folder)
    place.tree["model"]["tokenizer"] = str(place.model)
    return folder


@case(2, "adapter")
def adapter_that_is_a_pickle(place):
    (adapter(place) / "adapter_model.bin").write_bytes(pickle.dumps({"a": Pickled()}))


@case(2, "adapter")
def adapter_of_itself(place):
    folder = adapter(place)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))


@case(2, "adapter_config.json")
def adapter_that_is_deep(place):
    (adapter(place) / "adapter_config.json").write_text("[" * DEEP)


@case(2, "adapter")
def adapter_of_an_unknown_kind(place):
    folder = adapter(place, peft_type=ESCAPES)
    shutil.copy(place.model / "model.safetensors", folder / "adapter_model.safetensors")


@case(2, "outside of the folder")
def adapter_whose_weights_are_a_link(place):
    shutil.copy(place.model / "model.safetensors", place.outside / "adapter_model.safetensors")
    (adapter(place) / "adapter_model.safetensors").symlink_to(place.outside / "adapter_model.safetensors")


@case(2, "gguf")
def gguf_with_absurd_counts(place):
    (place.folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + b"\0" * 64)
    place.tree["model"]["path"] = str(place.folder / "model.gguf")


# ----------------------------------------------------------------------------------------------------------------- rows


ROW = {"prompt": "Is it good?", "completion": "Yes, it is."}


def lines(*rows: dict, count: int = 40) -> str:
    return "".join(json.dumps(row) + "\n" for row in [*rows, *(ROW | {"prompt": f"Is it {n}?"} for n in range(count))])


@case(2, "rows.jsonl.gz")
def rows_that_are_a_bomb(place):
    place.rows(gzip.compress(b"\0" * 300_000_000, 9), "rows.jsonl.gz")


@case(2, "rows.jsonl")
def rows_that_are_deep(place):
    place.rows('{"prompt": ' + "[" * DEEP + "\n")


@case(2, "rows.jsonl")
def rows_with_a_number_of_many_digits(place):
    place.rows('{"prompt": ' + "9" * 100_000 + "}\n")


@case(2, "rows.parquet")
def rows_in_a_broken_parquet_file(place):
    place.rows(b"PAR1" + b"\xff" * 64 + struct.pack("<I", 2**31 - 1) + b"PAR1", "rows.parquet")


@case(2, "outside of the folder")
def rows_in_a_dataset_folder_with_a_path_upwards(place):
    folder = place.folder / "rows"
    folder.mkdir()
    (place.outside / "x.arrow").write_text(SECRET)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "../outside/x.arrow"}], "_split": "train"})
    )
    (folder / "dataset_info.json").write_text("{}")
    place.tree["tasks"][0]["train"] = str(folder)


@case(2, "rows")
def rows_in_a_folder_with_a_script(place):
    folder = place.folder / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({EXECUTED!r}, 'w')\n")
    place.tree["tasks"][0]["train"] = str(folder)


@case(2, "not a regular file")
def rows_that_are_a_pipe(place):
    os.mkfifo(place.folder / "rows.jsonl")
    place.tree["tasks"][0]["train"] = str(place.folder / "rows.jsonl")


@case(0)
def rows_with_escapes_and_markup(place):
    text = ESCAPES + MARKUP
    place.rows(lines({"prompt": text, "completion": text}, count=60))
    place.tree["tasks"][0]["name"] = "task"


@case(2, "rows.csv")
def rows_of_one_endless_field(place):
    place.rows(b'prompt,completion\n"' + b"a" * 30_000_000, "rows.csv")


# -------------------------------------------------------------------------------------------------------------- configs


def config_case(name: str, raw: str | bytes, *words: str, code: int = 2) -> None:
    def make(place: Place) -> None:
        place.raw = raw.encode() if isinstance(raw, str) else raw

    CASES[name] = Case(make, code, words)


config_case("config_with_a_python_tag", f"model: !!python/object/apply:os.system ['touch {EXECUTED}']\n", "YAML")
config_case("config_with_a_python_name", "model: !!python/name:os.system\n", "YAML")
_BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
config_case("config_with_an_entity_bomb", _BOMB, "aliases")
config_case("config_with_a_merge_bomb", _BOMB.replace("[", "[{<<: ", 1).replace("]", "}]", 1))
config_case("config_that_contains_itself", "model: &m {path: *m}\ntasks: *m\noutput: x\n")
config_case("config_that_is_deep", "a: " + "[" * DEEP, "nested")
config_case("config_that_is_deep_in_mappings", "{a: " * DEEP, "nested")
config_case("config_with_a_number_of_many_digits", "train: {seed: " + "9" * 100_000 + "}\n", "digits")
config_case("config_with_a_number_in_base_60", "train: {seed: " + ":".join(["59"] * 50_000) + "}\n")
config_case("config_of_ten_megabytes", "# " + "a" * 10_000_000 + "\n", "bytes long")
config_case("config_with_control_characters", b"model: {path: '\x1b[2J'}\n", "YAML")
config_case("config_with_escaped_control_characters", 'model: {path: "' + "\\e]0;owned\\a\\u202E" + '"}\nzz: 1\n')
config_case("config_that_is_no_text", bytes(range(128, 256)), "UTF-8")


def changed(name: str, change: Callable[[dict], object], *words: str, code: int = 2) -> None:
    CASES[name] = Case(lambda place: change(place.tree) and None, code, words)


changed("path_of_no_user", lambda tree: tree["model"].update(path="~nouser/x"), "~nouser")
changed("path_of_5000_characters", lambda tree: tree["model"].update(path="a" * 5000), "model.path")
changed("path_with_a_nul", lambda tree: tree["model"].update(path="a\0b"), "model.path")
changed("rows_of_no_user", lambda tree: tree["tasks"][0].update(train="~nouser/x.jsonl"), "~nouser")
changed("rows_of_5000_characters", lambda tree: tree["tasks"][0].update(train="a" * 5000 + ".jsonl"), "tasks.0.train")
changed("rows_with_a_nul", lambda tree: tree["tasks"][0].update(train="a\0b.jsonl"), "tasks.0.train")
changed("output_of_no_user", lambda tree: tree.update(output="~nouser/x"), "output")
changed("output_of_5000_characters", lambda tree: tree.update(output="a" * 5000), "output")
changed("output_with_a_nul", lambda tree: tree.update(output="a\0b"), "output")
changed("learning_rate_that_no_float32_holds", lambda tree: tree["train"].update(learning_rate=1e39), "learning_rate")
changed("name_with_escapes", lambda tree: tree["tasks"][0].update(name=ESCAPES + MARKUP), "tasks.0.name")
