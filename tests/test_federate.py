"""The round loop with engines that are plain functions: what is averaged, what is refused, who is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

from fedmllm.algorithms.robust import Krum
from fedmllm.algorithms.scaffold import Scaffold
from fedmllm.algorithms.server_optimizers import FedAdam, FedAvg
from fedmllm.config.train import UpdateFilter
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.types import ClientFailure, ClientUpdate, Params, Round, Sent
from fedmllm.federation.rounds import Progress, cohorts, federate
from fedmllm.runs.costs import Totals

START: Params = {"a": torch.zeros(3)}
DROP = UpdateFilter(on_bad_update="drop_client", max_norm=10)


class Echo(FedAvg):
    """FedAvg whose clients return one extra tensor, shaped as the adapter."""

    name: str

    def returned_extra(self, sent: Sent) -> Params:
        return sent.start


ECHO = Echo(name="echo")


def update(client: int, value: float, num_examples: int = 1, loss: float = 0.5) -> ClientUpdate:
    return ClientUpdate(client, {"a": torch.full((3,), value)}, num_examples, {"loss": loss})


def steady(at: Round, sents: Mapping[int, Sent]) -> Iterator[ClientUpdate]:
    for client in sents:
        yield update(client, 0.01 * (client + at.number))


def rounds(
    engine, update_filter: UpdateFilter = DROP, num: int = 1, aggregator=None, begin: Progress | None = None
) -> list[Progress]:
    aggregator = aggregator or FedAvg()
    begin = begin or Progress(0, START, aggregator.init(START))
    return list(federate(begin, engine, aggregator, lambda _: [0, 1], num, update_filter))


def test_goes_on_from_any_round_to_the_same_bytes() -> None:
    whole = rounds(steady, num=5, aggregator=FedAdam())
    rest = rounds(steady, num=5, aggregator=FedAdam(), begin=whole[2])
    assert [p.round for p in rest] == [4, 5]
    assert torch.equal(whole[-1].params["a"], rest[-1].params["a"])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (update(1, float("nan")), "NaN or Inf"),
        (update(1, float("inf")), "NaN or Inf"),
        (update(1, 0.1, loss=float("nan")), "its loss is nan"),
        (update(1, 100.0), "norm of its delta"),
        (ClientUpdate(1, {"b": torch.zeros(3)}, 1, {"loss": 0.0}), "names or shapes differ"),
        (ClientUpdate(1, {"a": torch.zeros(4)}, 1, {"loss": 0.0}), "names or shapes differ"),
        (ClientFailure(1, "the site is on fire"), "on fire"),
        (ClientUpdate(1, {"a": torch.zeros(3).double()}, 1, {}), "the type of a is torch.float64"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 1, {}, extra={"a": torch.full((3,), float("nan"))}), "its extra"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 1, {}, extra={"b": torch.zeros(3)}), "extra tensor parameter names"),
        (
            ClientUpdate(1, {"a": torch.zeros(3)}, 1, {}, extra={"a": torch.zeros(3).half()}),
            "the type of extra tensor a",
        ),
        (ClientUpdate(1, {"a": torch.zeros(3)}, -1, {}), "its number of rows is -1"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 2**53, {}), "its number of rows is 9007199254740992"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 0.5, {}), "its number of rows is 0.5"),  # type: ignore[arg-type]
        (ClientUpdate(1, {"a": torch.zeros(3)}, 10**5000, {}), "its number of rows is a number of over 50 digits"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 1, {"loss": 10**400}), "its loss is a number of over 50 digits"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 1, {"num_tokens": -1}), "its num_tokens is -1"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 1, {"time_s": -0.5}), "its time_s is -0.5"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 1, {"time_s": 1e308}), r"its time_s is 1e\+308"),
        (ClientUpdate(1, {"a": torch.zeros(3)}, 1, {"loss": "low"}), "its loss is 'low'"),  # type: ignore[dict-item]
    ],
)
def test_a_bad_update_is_named_and_never_averaged(bad: ClientUpdate, reason: str) -> None:
    def engine(at: Round, sents: Mapping[int, Sent]) -> list:
        return [update(0, 2.0), bad]

    (after,) = rounds(engine, aggregator=ECHO)
    assert after.params["a"].tolist() == [2.0] * 3
    assert after.log["dropped"][0]["client"] == 1
    assert reason.replace("\\", "") in after.log["dropped"][0]["reason"]
    assert Totals().plus(after.log).num_rounds == 1  # the books can be kept
    with pytest.raises(FedmllmError, match=f"round 1, client 1: .*{reason}.*drop_client"):
        rounds(engine, UpdateFilter(max_norm=10), aggregator=ECHO)


def test_a_round_without_any_update_leaves_the_adapter_and_says_so() -> None:
    (after,) = rounds(lambda *_: [ClientFailure(0, "away"), update(1, 5.0, num_examples=0)])
    assert torch.equal(after.params["a"], START["a"])
    assert "stays as it was" in after.log["note"]


def test_krum_with_too_few_left_after_drops_leaves_the_adapter() -> None:
    def engine(at: Round, sents: Mapping[int, Sent]) -> Iterator[ClientUpdate]:
        for client in sents:
            yield update(client, float("nan") if client == 4 else 1.0)

    begin = Progress(0, START, {})
    progress = list(federate(begin, engine, Krum(), lambda _: [0, 1, 2, 3, 4], 2, DROP))
    for after in progress:
        assert torch.equal(after.params["a"], START["a"])
        assert after.log["note"] == "the global adapter stays as it was: krum needs 5 updates with rows; 4 came"


def test_a_round_without_clients_goes_by() -> None:
    def never(at: Round, sents: Mapping[int, Sent]) -> list[ClientUpdate]:
        raise AssertionError("no client may be asked")

    for aggregator in (FedAvg(), FedAdam(), Krum(), Scaffold()):
        begin = Progress(0, START, aggregator.init(START))
        (after,) = federate(begin, never, aggregator, lambda _: [0, 1], 1, UpdateFilter(), lambda round_, client: True)
        assert torch.equal(after.params["a"], START["a"])
        assert (after.log["dropped_out"], after.log["dropped"], after.log["up_bytes"]) == ([0, 1], [], 0)
        assert after.log["down_bytes"] > 0  # they received what was lost on them


def test_what_a_client_calls_itself_does_not_rename_it() -> None:
    lie = ClientUpdate(1, {"a": torch.zeros(3)}, 2, {"loss": 0.5, "client": 0, "norm": 9.0, "num_examples": 7})
    (after,) = rounds(lambda *_: [update(0, 1.0), lie])
    assert after.log["clients"][1] == {
        "client": 1,
        "num_examples": 2,
        "norm": 0.0,
        "loss": 0.5,
        "up_bytes": 12,
        "down_bytes": 12,
    }


def test_bytes_are_counted_as_sent() -> None:
    (after,) = rounds(steady)
    assert (after.log["up_bytes"], after.log["down_bytes"]) == (2 * 12, 2 * 12)


def test_published_cohorts() -> None:
    draw = cohorts("reference", range(10), 2, seed=5)
    assert [draw(t) for t in range(1, 7)] == [[6, 9], [1, 2], [0, 1], [3, 8], [3, 4], [4, 9]]  # protocol.md, section 1


def test_seeded_cohorts_depend_on_seed_and_round_alone() -> None:
    draw = cohorts("seeded", range(10), 3, seed=1)
    assert draw(4) == cohorts("seeded", range(10), 3, seed=1)(4)
    assert len({tuple(draw(t)) for t in range(30)}) > 10
    assert [draw(t) for t in range(9)] != [cohorts("seeded", range(10), 3, seed=2)(t) for t in range(9)]
    assert all(c in (2, 5, 7) for t in range(9) for c in cohorts("seeded", [2, 5, 7], 2, seed=0)(t))


def test_a_cohort_larger_than_the_federation_is_refused() -> None:
    with pytest.raises(ConfigError, match="cohort_size: got 4; only 3 clients hold rows"):
        cohorts("seeded", [0, 1, 2], 4, seed=0)
