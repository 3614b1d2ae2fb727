"""A real federation on loopback: SuperLink, gate, three sites, TLS, keys. One for all that is asked of it here.

`scripts/flower_trial.py` does it harm, and takes its time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from flower_federation import NAMES, Federation, addresses, dropped, federation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="child processes end with their parent on Linux only"),
    pytest.mark.xdist_group("flower-sites"),
]


@pytest.fixture(scope="module")
def sites() -> Iterator[Federation]:
    with federation('name = "tiny"', rounds=2, train="max_steps = 1") as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def finished(sites: Federation) -> Federation:
    """Run `out` to its end, once for all tests that need a finished run."""
    assert sites.run("out")[-1]["event"] == "end", (sites.folder / "run-out.out").read_text()
    return sites


def test_three_sites_give_the_bytes_of_one_process_and_load_the_base_once(finished):
    sites = finished
    assert sites.digest("out") == sites.in_process()
    for name in NAMES:
        said = (sites.folder / f"{name}.out").read_text()
        assert said.count("base loaded 1 time(s)") == 2, said


def test_scaffold_over_sites_gives_the_bytes_of_one_process(sites):
    change = ("--set", 'aggregator="scaffold"')
    assert sites.run("scaffold", *change)[-1]["event"] == "end", (sites.folder / "run-scaffold.out").read_text()
    assert sites.digest("scaffold") == sites.in_process(*change)
    for name in NAMES:
        assert list((sites.folder / name / "site-state" / "clients").rglob("round-0002.safetensors"))


def test_each_site_gets_a_rank_that_it_allows(sites):
    events = sites.run("ranks", "--set", 'aggregator="fedilora"', "--set", "backbone.lora.r=12")
    assert events[-1]["event"] == "end", (sites.folder / "run-ranks.out").read_text()
    rounds = [event for event in events if event["event"] == "round"]
    assert [[client["rank"] for client in event["clients"]] for event in rounds] == [[8, 8, 8]] * 2  # the default limit


def test_with_masks_the_server_sees_the_mean_only_and_gives_the_same_adapter(finished):
    sites = finished
    events = sites.run("masked", "--set", 'engine.secure={drop_outs="recover"}')
    assert events[-1]["event"] == "end", (sites.folder / "run-masked.out").read_text()
    rounds = [event for event in events if event["event"] == "round"]
    assert [[entry["clients"] for entry in event["clients"]] for event in rounds] == [[[0, 1, 2]]] * 2
    assert rounds[0]["clients"][0]["num_examples"] == 36
    assert "3 updates, masked, in" in (sites.folder / "run-masked.out").read_text()
    for name in NAMES:
        said = (sites.folder / f"{name}.out").read_text()
        assert said.count("masked with 2 other sites") == 2
        assert [said.count(f"secure sum of run {events[0]['run_id']}: {op}") for op in ("key", "open")] == [1, 2]
    clear, masked = (
        load_file(sites.folder / out / "adapter" / "adapter_model.safetensors") for out in ("out", "masked")
    )
    assert (
        max(float((clear[name] - masked[name]).abs().max()) for name in clear) < 1e-4
    )  # AdamW amplifies the last bits


def test_a_finished_run_is_not_resumed_with_other_settings(finished):
    finished.run("out", "--resume", "--set", "seed=7")
    assert "cannot be resumed with other settings: seed was 0, is 7" in (finished.folder / "run-out.out").read_text()


def test_nothing_listens_on_or_reaches_another_address_than_loopback(sites):
    pids = {pid for name in sites.processes for pid in (sites.processes[name].pid, *sites.children(name, ""))}
    assert len(pids) >= 12  # server, SuperLink, executor, gate; and at each site the SuperNode and the trainer
    assert addresses(pids) == {"127.0.0.1"}


def test_what_a_site_does_not_allow_is_refused_and_the_reason_is_in_the_record(sites):
    changes = ("train.max_steps=0", "train.epochs=10", "engine.attempts=1")
    last = sites.run("refused", *(word for change in changes for word in ("--set", change)))[-1]
    assert last["event"] == "stopped"
    assert "refused by site north: more optimiser steps than allow.max_steps = 20" in last["reason"]


def test_an_update_beyond_the_limit_is_left_out_of_the_sum_and_named(sites):
    events = sites.run("screened", "--set", "update_filter.max_norm=1e-6", "--set", "num_rounds=1")
    said = dropped([event for event in events if event["event"] == "round"])
    assert len(said) == 3
    assert all("over update_filter.max_norm" in line for line in said)


def test_a_site_that_is_removed_is_disconnected_and_its_key_stays_revoked(sites):
    assert "has been removed" in sites.call("server", "remove", "server", "west")
    sites.until(lambda: "the SuperNode ended" in (sites.folder / "west.out").read_text(), 60)
    with pytest.raises(RuntimeError, match="site 'west' is not registered; registered: east, north"):
        sites.call("server", "remove", "server", "west")
    sites.until(lambda: "The key is not registered at the server" in (sites.folder / "west.out").read_text(), 60)
    with pytest.raises(RuntimeError, match=r"Make a new one at the site with `fedmllm site key SITE\.toml`"):
        sites.call("server", "add", "server", "west", "west/site.key.pub")
    sites.call("site", "key", "west/site.toml")
    assert "site west: node " in sites.call("server", "add", "server", "west", "west/site.key.pub")
