"""A chat model behind an OpenAI-compatible endpoint as a judge: POST {endpoint}/chat/completions, temperature 0.

A request that fails with a status of 429 or 5xx, or does not arrive, is tried again with growing pauses. A refusal of
the endpoint itself (another status) is an error. Where the server's content filter stops a request or its reply, the
judge has no verdict on that answer, and the others are judged.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from safecl.config import ConfigError
from safecl.config.judges import ChatTemplate, JudgeConfig
from safecl.config.texts import visible
from safecl.distributed import progress
from safecl.evaluation.judges.verdict import Verdict, filled, verdict_in

SECONDS = 120
PAUSES = (1.0, 4.0, 16.0)
LONGEST_MESSAGE = 4000
FILTERED = "content_filter"
"""The code of an error, or the reason of a reply's end, by which servers tell that their content filter stopped it."""


class Endpoint:
    """A judge behind a server. Raises ConfigError where the key's variable is not set."""

    def __init__(self, config: JudgeConfig, version: dict[str, Any], pauses: Sequence[float] = PAUSES):
        self.config, self.version, self.pauses = config, version, pauses
        self.url = f"{str(config.endpoint).rstrip('/')}/chat/completions"
        self.key = os.environ.get(config.api_key_env) if config.api_key_env is not None else None
        if config.api_key_env is not None and not self.key:
            raise ConfigError(f"judge {config.title}: api_key_env: the variable {config.api_key_env} is not set")

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return a verdict per answer; `batch_size` requests are under way together."""
        verdicts = []
        with ThreadPoolExecutor(self.config.batch_size) as threads, progress.counted("verdicts", len(answers)) as made:
            for verdict in threads.map(self._one, prompts, answers):
                verdicts.append(verdict)
                made(1)
        return verdicts

    def _one(self, prompt: str, answer: str) -> Verdict:
        said = self._ask(prompt, answer)
        progress.beat()
        return Verdict(None, FILTERED) if said is None else verdict_in(said, self.config)

    def _messages(self, prompt: str, answer: str) -> list[dict[str, str]]:
        if self.config.template == ChatTemplate:
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return [{"role": "user", "content": filled(self.config.template, prompt, answer)}]

    def _ask(self, prompt: str, answer: str) -> str | None:
        """Return what the judge writes; None where the server's content filter stops it. Raises ConfigError."""
        body = {
            "model": self.config.model,
            "messages": self._messages(prompt, answer),
            "temperature": 0,
            "max_tokens": self.config.max_new_tokens,
        }
        for pause in (*self.pauses, None):
            try:
                choice = self._post(body)["choices"][0]
                if choice.get("finish_reason") == FILTERED:
                    return None
                return str(choice["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                code, why = _reason(error)
                if code == FILTERED:
                    return None
                problem = f"answers {error.code} {error.reason}{why}"
                if error.code != 429 and error.code < 500:
                    raise ConfigError(f"judge {self.config.title}: {self.url} {problem}") from None
            except (OSError, ValueError) as error:
                problem = f"cannot be asked: {error}"
            except (KeyError, IndexError, TypeError, AttributeError):
                raise ConfigError(
                    f"judge {self.config.title}: {self.url} gives no choices[0].message.content"
                ) from None
            if pause is not None:
                time.sleep(pause)
        raise ConfigError(f"judge {self.config.title}: {self.url} {problem}; the verdicts so far are kept")

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            return json.load(reply)


def _reason(error: urllib.error.HTTPError) -> tuple[str | None, str]:
    """Return the code of an error and the server's own message, as far as it gives them."""
    try:
        found = json.loads(error.read(LONGEST_MESSAGE))["error"]
        code, said = (found.get("code"), found["message"]) if isinstance(found, dict) else (None, found)
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""
    return code, f": {visible(str(said)).splitlines()[0]}" if said else ""
