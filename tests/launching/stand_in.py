"""A stand-in for a launcher: it starts ranks that end as they are told, and ends with 1 where one does not end with 0.

    python stand_in.py launch WAY[,WAY...]     one rank each
    python stand_in.py rank WAY

Ways to end: a number is an exit code; `killed` is by SIGKILL, `wait` is with 75 after a signal, `stays` is not at all,
`is-stopped` neither, `failed-once` is 1 the first time and 0 from then on, `explains` is 2, and `saves` is
75, a while after the code is known.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safecl.distributed import rank_files


def launch(ways: list[str]) -> int:
    ranks = []
    for rank, way in enumerate(ways):
        env = os.environ | {"RANK": str(rank)}
        ranks.append(subprocess.Popen([sys.executable, __file__, "rank", way], env=env, start_new_session=True))
    if "stays" in ways or "is-stopped" in ways:  # this launcher loses a rank
        files = Path(os.environ[rank_files.FILES])
        while len(list(files.glob("*.pid"))) < len(ways):  # it loses them when they have begun
            time.sleep(0.05)
        return 1
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        print("the launcher's own traceback", flush=True)
    return int(any(codes))


def end(way: str) -> int:
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "failed-once":
        seen = Path(os.environ[rank_files.FILES]).parent / "seen"
        code = 0 if seen.exists() else 1
        seen.touch()
        return code
    if way == "is-stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if way in ("explains", "saves"):
        code = 2 if way == "explains" else 75
        rank_files.write_code(code)
        time.sleep(1.0)  # it waits for the report of another rank, or takes leave of its libraries
        return code
    if way in ("wait", "stays"):
        came = signal.sigtimedwait({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}, 60.0)
        Path(os.environ[rank_files.FILES], f"came-{os.environ['RANK']}").write_text(str(came.si_signo if came else 0))
        return 75
    return int(way)


if __name__ == "__main__":
    kind, way = sys.argv[1:]
    if kind == "launch":
        sys.exit(launch(way.split(",")))
    rank_files.begin(["train"])
    if way in ("wait", "stays"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    code = end(way)
    rank_files.write_code(code)
    sys.exit(code)
