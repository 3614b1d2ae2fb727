"""Grades by an LLM judge, against a server on loopback that answers as OpenAI's chat completions do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.config.train import Grader
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.metrics import METRICS
from fedmllm.core.types import Example, Prediction
from fedmllm.runs import grading
from fedmllm.runs.grading import LlmJudge, filled_prompt, grade_of
from fedmllm.runs.predictions import read_predictions
from fedmllm.runs.result import load_run
from fedmllm.runs.run import run
from support.runs import TABLE

KEY = "sk-secret-1234"


class Endpoint(ThreadingHTTPServer):
    """Chat completions whose answers a test sets: `reply` is a text, a status, or raw bytes; `queue` goes first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: str | int | bytes = "7"
        self.queue: list[str | int | bytes] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        reply = self.server.queue.pop(0) if self.server.queue else self.server.reply
        content = b"refused " + (self.headers.get("Authorization") or "").encode()
        status = reply if isinstance(reply, int) else 200
        if isinstance(reply, str):
            content = json.dumps(
                {"id": "1", "choices": [{"message": {"role": "assistant", "content": reply}}]}
            ).encode()
        if isinstance(reply, bytes):
            content = reply
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"{self.server.url}/other")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(grading, "WAIT_S", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # an endpoint on this machine is reached without it
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answered(given: str | None, question: str = "Where?", raw: str = "") -> Prediction:
    return Prediction(Example(1, {}, question, (), "left lung", "rows.csv:2", {}), (), given, raw)


def graded(endpoint: Endpoint, folder: Path, *predictions: Prediction, **settings: Any) -> list[float | None]:
    found = LlmJudge(Grader(url=endpoint.url, model="m", **settings), folder / "grades.jsonl")(predictions)
    return [p.grade for p in found]


def test_open_answers_get_grades_and_each_prompt_is_asked_once(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.queue = ["10", "2.5 / 10", "It is quite good: 7"]
    closed = Prediction(Example(2, {}, "Left?", ("no", "yes"), "no", "rows.csv:3", {}), (0.0, -1.0), None)
    rows = [answered("left lung"), answered("the heart"), answered("lung {answer}"), answered("left lung"), closed]
    found = graded(endpoint, tmp_path, *rows, answered(None), answered(None, raw="left\nlung"))
    assert found == [1.0, 0.25, None, 1.0, None, 0.0, 0.7]
    assert len(endpoint.asked) == 4
    assert endpoint.asked[0]["model"] == "m"
    assert endpoint.asked[0]["temperature"] == 0
    prompt = endpoint.asked[2]["messages"][0]["content"]
    assert "Right answer: left lung\nGiven answer: lung {answer}\n" in prompt  # a row's text is not a template
    lines = [json.loads(line) for line in (tmp_path / "grades.jsonl").read_text().splitlines()]
    assert lines[2]["prompt"] == prompt
    assert lines[2]["reply"]["choices"][0]["message"]["content"] == "It is quite good: 7"
    assert graded(endpoint, tmp_path, *rows) == found[:5]
    assert len(endpoint.asked) == 4  # all of it was kept
    with (tmp_path / "grades.jsonl").open("a") as file:
        file.write('{"key": "half')
    assert graded(endpoint, tmp_path, answered("new")) == [0.7]
    assert len((tmp_path / "grades.jsonl").read_text().splitlines()) == 5
    (tmp_path / "grades.jsonl").write_text("[]\n")
    with pytest.raises(FedmllmError, match=r"grades\.jsonl:1: not a reply of an LLM judge"):
        graded(endpoint, tmp_path)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert graded(endpoint, tmp_path, answered("a")) == [0.7]
    with pytest.raises(ConfigError, match="key_variable: the environment has no MY_KEY"):
        graded(endpoint, tmp_path, answered("b"), key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", KEY)
    assert graded(endpoint, tmp_path, answered("b"), key_variable="MY_KEY") == [0.7]
    assert endpoint.keys == [None, f"Bearer {KEY}"]
    for status in (401, 302):
        endpoint.reply = status
        with pytest.raises(FedmllmError, match=f"no grade: status {status}") as error:
            graded(endpoint, tmp_path, answered("c"), key_variable="MY_KEY")
        assert KEY not in str(error.value)
    assert len(endpoint.asked) == 4  # neither is repeated, and a redirect is not followed
    assert KEY not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_failures_that_pass_are_repeated_and_others_end_the_run(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.queue = [503, 429, b"no json", "3"]
    assert graded(endpoint, tmp_path, answered("a")) == [0.3]
    endpoint.reply = 503
    with pytest.raises(FedmllmError, match="no grade: status 503"):
        graded(endpoint, tmp_path, answered("b"))
    assert len(endpoint.asked) == 2 * grading.ATTEMPTS
    endpoint.reply = b'{"choices": []}'
    with pytest.raises(FedmllmError, match="not a chat completion"):
        graded(endpoint, tmp_path, answered("c"))
    dead = Grader(url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(FedmllmError, match=r"http://127\.0\.0\.1:9/v1/chat/completions: no grade: .*refused"):
        LlmJudge(dead, tmp_path / "x.jsonl")([answered("a")])


@pytest.mark.parametrize(("reply", "value"), [("0", 0.0), (" 10/10.\n", 1.0), ("11", None), ("-1", None), ("", None)])
def test_a_grade_is_one_number_from_0_to_10(reply: str, value: float | None) -> None:
    assert grade_of(reply) == value


def test_settings_that_cannot_be_kept_are_refused() -> None:
    base = {"data": "synthetic-irony"}
    for grader, message in (
        ({"url": "ftp://x", "model": "m"}, "grader.url: got 'ftp://x'; give an address without key"),
        ({"url": "https://me:key@x/v1", "model": "m"}, "give an address without key"),
        ({"url": "http://x/v1", "model": "m", "key_variable": "K"}, "the key would travel in the clear"),
        ({"url": "http://x/v1", "model": "m", "prompt": "{question}?"}, "it must have {given}"),
        ({"url": "http://x/v1", "model": "m", "prompt": "{given} {image}"}, "it must have {given}"),
        ({"url": "http://x/v1", "model": "m", "key": "sk-1"}, "grader.key: unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            Experiment.parse({**base, "evaluate": {"grader": grader}})
    with pytest.raises(ConfigError, match=r"needs the table evaluate\.grader"):
        Experiment.parse({**base, "evaluate": {"metrics": ["graded"]}})
    with_judge = Experiment.parse({**base, "evaluate": {"grader": {"url": "http://x/v1", "model": "m"}}})
    assert with_judge.metrics()[-2:] == ("graded", "ungraded")
    assert "grader" not in Experiment.parse(base).identity()["evaluate"]  # run ids stay
    assert with_judge.run_id() != Experiment.parse(base).run_id()
    assert filled_prompt("{given} of {answer}", {"given": "{answer}", "answer": "b"}) == "{answer} of b"


def test_a_run_records_grades_and_its_report_needs_no_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"note {i}", "answer": "left lung" if i % 2 else "heart"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "table", "root": str(tmp_path), "train": "rows.jsonl", "test": "rows.jsonl", "question": "Where?"}
    data |= {"columns": {"id": "id", "text": "text", "answer": "answer"}}
    partition = {"name": "iid", "num_clients": 2}
    evaluate = {"grader": {"url": endpoint.url, "model": "m"}, "every": 1, "max_new_tokens": 2}
    table = {**TABLE, "data": data, "partition": partition, "num_rounds": 2, "evaluate": evaluate}
    result = run(Experiment.parse(table), tmp_path / "run")
    kept = list(read_predictions(result.folder / "predictions.jsonl.gz"))
    assert len(kept) == 2
    assert result.value("graded") == METRICS["graded"](kept[-1].predictions)
    assert result.value("ungraded") == 0
    assert {p.grade for one in kept for p in one.predictions} <= {0.0, 0.7}
    asked = len(endpoint.asked)
    assert (
        asked
        == len({json.dumps(body) for body in endpoint.asked})
        == len((result.folder / "grades.jsonl").read_text().splitlines())
    )
    endpoint.shutdown()
    endpoint.server_close()
    whole = load_run(result.folder).rows_by("shows", metric="graded")[0]
    assert whole["value"] == pytest.approx(result.value("graded"))
