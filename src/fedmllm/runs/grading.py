"""Grades of open answers by an LLM judge.

An LLM judge is any endpoint with OpenAI's chat completions. Each prompt is asked once: prompts and raw replies are kept in a
file, which later evaluations and resumed runs read first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmllm.config.train import Grader
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.metrics import open_text
from fedmllm.core.storage import make_folder, writing
from fedmllm.core.types import Prediction

HIGHEST = 10.0  # of the scale that the prompt asks for
ATTEMPTS, WAIT_S = 4, 1.0  # at a request; the wait doubles
PASSING = (408, 409, 429, 500, 502, 503, 504)  # statuses after which a request is repeated
_GRADE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\.?\s*")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address would receive the key."""

    def redirect_request(self, *_: Any) -> None:
        return None


class LlmJudge:
    """Grades open answers; keeps every prompt and reply.

    Args:
        settings: The endpoint, its model and the prompt.
        file: JSON Lines of what was asked; made with the first reply.

    Raises:
        ConfigError: The environment lacks the variable with the key.
        FedmllmError: The file is damaged.
    """

    def __init__(self, settings: Grader, file: Path) -> None:
        self._settings, self._file = settings, file
        self._key = os.environ.get(settings.key_variable, "") if settings.key_variable else ""
        if settings.key_variable and not self._key:
            raise ConfigError(
                f"evaluate.grader.key_variable: the environment has no {settings.key_variable}; set it to the endpoint's key"
            )
        bypass = [urllib.request.ProxyHandler({})] if settings.is_local else []
        self._open = urllib.request.build_opener(_NoRedirect, *bypass).open
        self._replies = self._read()

    def __call__(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """Return the predictions with the grades of the open answers, 0..1; None if a reply is not a grade.

        Raises:
            FedmllmError: The endpoint cannot be reached, or refuses a request.
        """
        return [p if p.scores else replace(p, grade=self._grade(p)) for p in predictions]

    def _grade(self, prediction: Prediction) -> float | None:
        given = open_text(prediction) or prediction.raw
        if not given.strip():
            return 0.0  # nothing was answered, so nothing has to be asked
        parts = {"question": prediction.example.question, "answer": prediction.example.answer, "given": given}
        return grade_of(self._reply(filled_prompt(self._settings.prompt, parts)))

    def _reply(self, prompt: str) -> str:
        key = self._digest(prompt)
        if key not in self._replies:
            raw = self._ask(prompt)
            line = {
                "key": key,
                "url": self._settings.url,
                "model": self._settings.model,
                "prompt": prompt,
                "reply": raw,
            }
            with writing(self._file):
                make_folder(self._file.parent)
                with self._file.open("a", encoding="utf-8") as file:  # one write, so that processes can share a file
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._replies[key] = raw
        return self._text(self._replies[key])

    def _ask(self, prompt: str) -> dict[str, Any]:
        """The endpoint's whole reply. Repeats a request that failed for a reason that passes."""
        s = self._settings
        body = {"model": s.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        url = f"{s.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps({**body, "max_tokens": s.max_tokens}).encode(), headers)
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(WAIT_S * 2 ** (attempt - 1))
            try:
                with self._open(request, timeout=s.timeout_s) as response:
                    raw: dict[str, Any] = json.loads(response.read())
                self._text(raw)
                return raw
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code not in PASSING:
                    break
            except (OSError, ValueError) as error:  # no connection, a timeout, or a reply that is not JSON
                reason = str(error)
        raise FedmllmError(f"{url}: no grade: {reason.replace(self._key, '...') if self._key else reason}")

    def _text(self, raw: Mapping[str, Any]) -> str:
        try:
            return str(raw["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise FedmllmError(f"{self._settings.url}: not a chat completion: {json.dumps(raw)[:200]}") from None

    def _digest(self, prompt: str) -> str:
        asked = [self._settings.url, self._settings.model, self._settings.max_tokens, prompt]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _read(self) -> dict[str, dict[str, Any]]:
        """Replies of earlier evaluations; a half-written last line, left by a kill, is asked again."""
        if not self._file.is_file():
            return {}
        found: dict[str, dict[str, Any]] = {}
        with writing(self._file):
            content = self._file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                self._file.write_bytes(whole)
        for number, line in enumerate(whole.decode().splitlines(), start=1):
            try:
                table = json.loads(line)
                found[table["key"]] = table["reply"]
            except (ValueError, KeyError, TypeError):
                raise FedmllmError(f"{self._file}:{number}: not a reply of an LLM judge; delete the line") from None
        return found


def judge_of(grader: Grader | None, folder: Path) -> Callable[[Sequence[Prediction]], Sequence[Prediction]]:
    """Return what adds grades to predictions; without a grader they stay as they are.

    Args:
        grader: The settings.
        folder: Of the run, which keeps prompts and replies unless `grader.cache` names another one.
    """
    if grader is None:
        return lambda predictions: predictions
    return LlmJudge(grader, (Path(grader.cache).expanduser() if grader.cache else folder) / "grades.jsonl")


def filled_prompt(prompt: str, parts: Mapping[str, str]) -> str:
    """Return the prompt with its `{placeholders}` replaced once: braces in a row's text stay."""
    return re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], prompt)


def grade_of(reply: str) -> float | None:
    """Return the grade in a reply, 0..1; None if it is not one number from 0 to 10."""
    found = _GRADE.fullmatch(reply)
    value = float(found[1]) if found else HIGHEST + 1
    return value / HIGHEST if value <= HIGHEST else None
