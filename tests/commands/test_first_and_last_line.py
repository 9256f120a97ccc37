"""A verb says something before torch is loaded, and its process ends right after its last line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from safecl.commands.verbs import options_first

FIRST_LINE = """
import sys
from safecl.commands import spinner
from safecl import cli

def announce(verb, what):
    print(verb, what, sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
    sys.exit(0)

cli.announce = announce
cli.main(["check", *sys.argv[1:]])
"""
LAST_LINE = """
import atexit, threading, time
from safecl.exits import end_process

class Slow:
    def __del__(self):
        print("taken apart")

kept = Slow()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("last line")
end_process(3)
"""


def output_of(code: str, *arguments: str, **environ: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env=environ or None
    )
    return done.returncode, done.stdout.splitlines()


def test_the_first_line_comes_before_any_large_library_is_loaded(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: m}\ntasks: [{name: a, train: t.jsonl}]\noutput: runs/a\n")
    code, lines = output_of(FIRST_LINE, str(config))
    assert (code, lines) == (0, [f"check {config} read, loading torch []"])


def test_a_process_ends_with_what_is_registered_and_takes_nothing_apart():
    assert output_of(LAST_LINE) == (3, ["last line", "thread", "registered"])


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["train", "x.yaml", "--quiet"], ["--quiet", "train", "x.yaml"]),
        (["train", "-v", "x.yaml", "--traceback"], ["-v", "--traceback", "train", "x.yaml"]),
        (["launch", "x.yaml", "--", "--quiet"], ["launch", "x.yaml", "--", "--quiet"]),
    ],
)
def test_options_of_every_verb_may_stand_behind_it(given, parsed):
    assert options_first(given) == parsed
