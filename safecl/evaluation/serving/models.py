"""Models whose answers come from a server. Everything else, such as likelihoods, comes from the model itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safecl.config import VllmConfig
from safecl.distributed import collectives, environment
from safecl.distributed.node import this_node
from safecl.evaluation.answers.generate import room_for_answer
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.serving.client import complete
from safecl.evaluation.serving.server import Address, ServerFailed, serving


class ServedModel:
    """An EvalModel whose `generate` asks a server; all else is the model's own."""

    def __init__(self, model: EvalModel, address: Address):
        self._model, self._address = model, address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_ids: Collection[int],
        batch_size: int,
        never: Sequence[int] = (),
        never_first: Sequence[int] = (),
    ) -> list[list[int]]:
        """Do what `generate_greedy` does. A collective call: where one rank fails, all raise ServerFailed."""
        rooms = [room_for_answer(self._model, prompt, max_new_tokens) for prompt in prompts]
        problem, answers = "", []
        try:
            answers = complete(
                self._address,
                prompts,
                rooms,
                eos_ids=eos_ids,
                batch_size=batch_size,
                never=never,
                never_first=never_first,
            )
        except ServerFailed as error:
            problem = str(error)
        problems = [each for each in self._model.gather([problem]) if each]
        if problems:
            raise ServerFailed(problems[0])
        return answers


@contextmanager
def answered_by_vllm(model: EvalModel, folder: str | Path, settings: VllmConfig, log: Path) -> Iterator[EvalModel]:
    """Serve `folder`, which holds the model's weights, and yield the model with the server's answers.

    A collective call. Rank 0 starts the server; where that fails, every rank raises ServerFailed.
    """
    single_node = len(this_node().ranks) == collectives.world_size()
    host = "127.0.0.1" if single_node else environment.master_address()
    served = serving(folder, settings, log, host)
    address = collectives.on_first_rank(served.__enter__, (ServerFailed, OSError), ServerFailed)
    try:
        yield ServedModel(model, address)
    finally:
        if collectives.rank() == 0:
            served.__exit__(None, None, None)
