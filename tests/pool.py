"""Ranks that stay: a launch costs seconds, so tests share one set of gloo processes per world size.

`pool.run(function, **arguments)` calls an importable function on every rank, inside one process group, and returns the
results by rank.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


class RankFailure(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """`world_size` processes in one gloo group.

    `forked`: from a server that has imported everything already, so that a pool costs little where many are needed.
    """

    def __init__(self, world_size: int, timeout: float = 240.0, forked: bool = False):
        context = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(["tests.preloaded"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.timeout = timeout
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world_size, port), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(self.timeout):
                self.close()
                raise RankFailure(f"rank {rank} gave no answer within {self.timeout:.0f} s" + "".join(failures))
            ok, value = pipe.recv()
            results.append(value)
            if not ok:
                failures.append(f"\n--- rank {rank}\n{value}")
        if failures:
            raise RankFailure("".join(failures))
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)


def _serve(pipe, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    import logging

    import torch

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from safecl.distributed.collectives import init_distributed

    init_distributed()
    gc.freeze()  # DeepSpeed's stage 3 collects garbage when it starts: a second, with everything that was imported
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(**arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        try:
            pipe.send(answer)
        except OSError:  # nobody waits for it
            return
