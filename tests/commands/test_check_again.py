"""A second check of a model, in a process of its own, leaves the code of models alone and prints the same page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.commands.processes import ROOT

LEFT_ALONE = (
    "transformers.models",
    "transformers.configuration_utils",
    "transformers.modeling_utils",
    "transformers.models.llama.configuration_llama",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
    "torch.distributed.tensor",
    "sympy",
)
WATCHED = f"""
import atexit, json, sys
import safecl.cli
atexit.register(lambda: print(json.dumps([name for name in {LEFT_ALONE} if name in sys.modules])))
safecl.cli.main()
"""
SIZE = re.compile(r"([\d.]+) (MB|GB)")


def check(path: Path, cache: Path) -> tuple[list[str], list[str]]:
    """Check a config. Return the lines that it prints, and those of LEFT_ALONE that it has imported."""
    import os

    environment = os.environ | {"SAFECL_CACHE": str(cache)}
    command = [sys.executable, "-c", WATCHED, "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    return lines, json.loads(imported)


def sizes(text: str) -> list[float]:
    return [float(number) * {"MB": 1, "GB": 1000}[unit] for number, unit in SIZE.findall(text)]


def test_a_second_check_imports_no_code_of_models_and_prints_the_same_page(task_config, tmp_path):
    path = task_config()
    (first, imported), (again, imported_again) = (check(path, tmp_path / "cache") for _ in range(2))
    assert imported and imported_again == []
    assert [SIZE.sub("", line) for line in first] == [SIZE.sub("", line) for line in again]
    program = re.compile("program and libraries ([^,]*)")
    assert program.search("\n".join(first)), "the page tells what the process takes"
    for before, after in zip(first, again, strict=True):
        if not program.search(before) and "takes" not in before:
            assert before == after
        for one, other in zip(sizes(before), sizes(after), strict=True):
            assert abs(one - other) <= 0.1 * one + 0.1, (before, after)
