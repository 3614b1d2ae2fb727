"""Messages over Flower: any reply gives an update or a reason. No server is started here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmllm.algorithms.server_optimizers import FedAvg
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import ClientFailure, ClientUpdate, Round
from fedmllm.flower.messages import LONGEST_METRICS, Packed, ask, read_update, refusal, unpack, update_content
from fedmllm.flower.wire import ABOUT, ADAPTER_KEY, FLAT, LONGEST_WORDS, RAW, legible

AT = Round(1, 0, 1, (0, 1, 2), 3)
PARAMS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1.5])}


def reply(content: RecordDict) -> SimpleNamespace:
    return SimpleNamespace(has_error=lambda: False, content=content)


# ---- the wire


def test_an_adapter_is_one_float32_array_in_manifest_order_and_comes_back_as_it_was():
    content = Packed(PARAMS).content({})
    assert np.frombuffer(content[ADAPTER_KEY][FLAT].data, "<f4").tolist() == [1.5, 0, 1, 2, 3, 4, 5]  # "a" before "b"
    assert len(content[ADAPTER_KEY]) == 1
    back = unpack(content, PARAMS)
    assert list(back) == ["b", "a"]
    assert all(torch.equal(back[name], PARAMS[name]) for name in PARAMS)


def test_other_names_or_shapes_are_refused_by_the_manifest():
    with pytest.raises(FedmllmError, match=r"manifest: got .* names or shapes differ"):
        unpack(Packed({**PARAMS, "c": torch.zeros(1)}).content({}), PARAMS)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (Array("float32", (6,), RAW, bytes(24)), "shape (6,)"),
        (Array("float64", (7,), RAW, bytes(56)), "float64"),
        (Array("float32", (7, 1), RAW, bytes(28)), "shape (7, 1)"),
        (Array("float32", (10**15,), RAW, bytes(28)), "28 bytes for shape"),
        (Array("float32", (7,), RAW, bytes(27)), "27 bytes"),
        (Array(np.zeros(7, np.float32)), "numpy.ndarray"),  # a file format with a header that could claim anything
    ],
)
def test_an_array_that_does_not_fit_its_manifest_is_a_failure_of_that_client(array, says):
    content = update_content(ClientUpdate(3, PARAMS, 5, {"loss": 1.0}))
    content[ADAPTER_KEY] = ArrayRecord({FLAT: array})
    failure = read_update(3, reply(content), PARAMS)
    assert isinstance(failure, ClientFailure)
    assert says in failure.reason


def test_an_update_comes_back_with_its_rows_and_metrics():
    update = ClientUpdate(3, PARAMS, 5, {"loss": 1.0, "num_steps": 2})
    back = read_update(3, reply(update_content(update)), PARAMS)
    assert isinstance(back, ClientUpdate)
    assert (back.client, back.num_examples, dict(back.metrics)) == (3, 5, {"loss": 1.0, "num_steps": 2.0})
    assert all(torch.equal(back.delta[name], PARAMS[name]) for name in PARAMS)


def test_a_refusal_arrives_with_its_reason():
    assert read_update(1, reply(refusal("not today")), PARAMS) == ClientFailure(1, "not today")


def answer(metrics: str, num_examples: int = 5) -> ClientUpdate | ClientFailure:
    content = update_content(ClientUpdate(3, PARAMS, num_examples, {}))
    content[ABOUT]["metrics"] = metrics
    return read_update(3, reply(content), PARAMS)


def test_a_metric_cannot_pose_as_what_the_record_says_itself():
    assert dict(answer('{"client": 0, "norm": 0.1, "num_examples": 9, "loss": 1, "time_s": 2}').metrics) == {
        "loss": 1.0,
        "time_s": 2.0,
    }


@pytest.mark.parametrize(
    "metrics",
    ["[" * 10**5, '{"loss": 1' + "0" * 400 + "}", '{"loss": "x"}', '{"loss": ' + " " * LONGEST_METRICS + "1}", "[1]"],
)
def test_metrics_that_cannot_be_read_are_a_failure_of_that_client(metrics):
    assert "its reply cannot be read" in answer(metrics).reason


def test_reasons_of_others_are_one_printable_line():
    reason = read_update(1, reply(refusal("not\n\x1b[2Jtoday" + "!" * 10**6)), PARAMS).reason
    assert reason.startswith("not  [2Jtoday!!!")
    assert len(reason) == LONGEST_WORDS + 4
    assert legible("Universitätsklinikum") == "Universitätsklinikum"


words = st.one_of(st.text(max_size=20), st.integers(-(2**63), 2**63 - 1), st.floats(), st.binary(max_size=20))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine is slow
@given(st.dictionaries(st.sampled_from(["manifest", "num_examples", "metrics", "refused", "x"]), words), st.binary())
def test_nothing_in_a_reply_can_raise(about, data):
    content = RecordDict({ABOUT: ConfigRecord(about)})
    content[ADAPTER_KEY] = ArrayRecord({FLAT: Array("float32", (3,), RAW, data)})
    assert isinstance(read_update(0, reply(content), PARAMS), ClientFailure)


class Silent:
    """A grid without any reply."""

    def push_messages(self, messages):
        return [f"m{i}" for i in range(len(messages))]

    def pull_messages(self, ids):
        return []


def test_asking_ends_when_time_is_up_and_when_a_site_is_lost():
    messages = {4: object(), 7: object()}
    answers = dict(ask(Silent(), messages, 0.2, 0.01, lambda: {7: "gone"}))
    assert answers == {4: "no reply within 0.2 s", 7: "gone"}


def test_an_empty_cohort_gives_an_empty_reply():
    assert list(ask(Silent(), {}, 1.0, 0.01, dict)) == []


def test_aggregation_does_not_depend_on_who_answers_first():
    updates = [ClientUpdate(k, {"a": torch.tensor([0.1 * k + 0.3])}, k + 1, {}) for k in range(3)]
    start = {"a": torch.zeros(1)}
    params, _ = FedAvg().apply(start, {}, AT, updates)
    with pytest.raises(FedmllmError, match="ascending client order"):
        FedAvg().apply(start, {}, AT, updates[::-1])
    assert float(params["a"]) == pytest.approx((0.3 * 1 + 0.4 * 2 + 0.5 * 3) / 6)
