"""Partitions and masks: what holds for every member, whatever the rows and the seed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.types import Example
from fedmllm.scenarios.assign import assign, shards_digest, show_only
from fedmllm.scenarios.masks import Aligned, Cross, Hybrid, Missing
from fedmllm.scenarios.partitions import ByColumn, Dirichlet, Iid
from support import rawsets

TWO = ("image", "text")
CAMERAS = ("CAM_FRONT", "CAM_BACK", "CAM_BACK_LEFT")


def row(number: int, label: str = "a", modalities: tuple[str, ...] = TWO, **columns: str) -> Example:
    fields = {m: "x" if m == "text" else (Path(f"{number}.png"),) for m in modalities}
    return Example(number, fields, "?", ("a", "b", "c"), label, f"f:{number}", {"set": "made-up", **columns})


examples_of_any_kind = st.lists(
    st.tuples(st.sampled_from("abc"), st.sets(st.sampled_from(TWO)), st.sampled_from(["ward 2", "ward 10", "home"])),
    min_size=1,
    max_size=60,
).map(lambda rows: [row(i, label, tuple(sorted(has)), ward=ward) for i, (label, has, ward) in enumerate(rows)])
partitions = st.one_of(
    st.builds(Dirichlet, alpha=st.floats(1e-3, 100), num_clients=st.integers(1, 20)),
    st.builds(Dirichlet, column=st.just("ward")),
    st.builds(Iid, num_clients=st.integers(1, 20)),
    st.just(ByColumn(column="ward")),
)
rates = st.floats(0, 1)
scenarios = st.one_of(
    st.just(Aligned()),
    st.builds(Missing, rate=rates, rates=st.dictionaries(st.sampled_from(TWO), rates)),
    st.builds(Hybrid, keep_rate=rates),
    st.just(Cross(num_image_clients=1)),
)


@settings(deadline=None)  # a machine may be busy
@given(examples_of_any_kind, partitions, scenarios, st.integers(0, 2**40))
def test_every_row_lands_on_exactly_one_client_and_shows_only_what_it_has(examples, partition, scenario, seed) -> None:
    shards = assign(examples, TWO, partition, scenario, seed)
    assert sorted(r for s in shards for r in s.rows) == list(range(len(examples)))
    assert [s.client for s in shards] == list(range(len(shards)))
    for shard in shards:
        assert len(shard.rows) == len(shard.visible)
        for r, visible in zip(shard.rows, shard.visible, strict=True):
            assert visible <= examples[r].fields.keys()
    again = assign(examples, TWO, partition, scenario, seed)
    assert again == shards
    assert shards_digest(again, examples) == shards_digest(shards, examples)


@settings(deadline=None)  # a machine may be busy
@given(st.integers(1, 80), st.integers(0, 2**40), rates, rates)
def test_missing_hides_each_modality_by_itself_and_a_higher_rate_hides_more(rows, seed, one, other) -> None:
    examples, iid = [row(i) for i in range(rows)], Iid(num_clients=3)
    low, high = (assign(examples, TWO, iid, Missing(rate=rate), seed) for rate in sorted((one, other)))
    assert all(b <= a for s, t in zip(low, high, strict=True) for a, b in zip(s.visible, t.visible, strict=True))
    none, every = (assign(examples, TWO, iid, Missing(rate=rate), seed) for rate in (1.0, 0.0))
    assert not any(v for s in none for v in s.visible)
    assert all(v == set(TWO) for s in every for v in s.visible)
    text_only = assign(examples, TWO, iid, Missing(rate=0.0, rates={"image": 1.0}), seed)
    assert all(v == {"text"} for s in text_only for v in s.visible)


def test_missing_rates_are_met_and_do_not_depend_on_the_partition() -> None:
    examples = [row(i) for i in range(4000)]
    scenario = Missing(rate=0.3, rates={"text": 0.1})
    masks = []
    for partition in (Iid(), Dirichlet()):
        shards = assign(examples, TWO, partition, scenario, 5)
        masks.append({r: v for s in shards for r, v in zip(s.rows, s.visible, strict=True)})
    assert masks[0] == masks[1]
    lost = {m: sum(m not in v for v in masks[0].values()) / 4000 for m in TWO}
    assert lost == pytest.approx({"image": 0.3, "text": 0.1}, abs=0.03)  # 4 standard errors


@settings(deadline=None)  # a machine may be busy
@given(st.integers(0, 10), st.integers(0, 2**40))
def test_cross_gives_each_client_one_modality(k, seed) -> None:
    shards = assign([row(i) for i in range(60)], TWO, Iid(num_clients=10), Cross(num_image_clients=k), seed)
    kinds = [set(s.visible) for s in shards]
    assert kinds.count({frozenset({"image"})}) == k
    assert kinds.count({frozenset({"text"})}) == 10 - k


@settings(deadline=None)  # a machine may be busy
@given(rates, st.integers(0, 2**40))
def test_hybrid_keeps_the_same_for_all_rows_of_a_client_or_draws_one_a_row(keep_rate, seed) -> None:
    shards = assign([row(i) for i in range(100)], TWO, Iid(), Hybrid(keep_rate=keep_rate), seed)
    for shard in shards:
        assert len(set(shard.visible)) == 1 or all(len(v) == 1 for v in shard.visible)
        assert all(shard.visible)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40))
def test_more_than_two_modalities(seed) -> None:
    examples = [row(i, modalities=CAMERAS) for i in range(40)]
    iid = Iid(num_clients=4)
    crossed = assign(examples, CAMERAS, iid, Cross(clients={"CAM_FRONT": 1, "CAM_BACK": 3}), seed)
    assert sorted(next(iter(s.visible[0])) for s in crossed) == ["CAM_BACK"] * 3 + ["CAM_FRONT"]
    front = assign(examples, CAMERAS, iid, Missing(rate=1.0, rates={"CAM_FRONT": 0.0}), seed)
    assert all(v == {"CAM_FRONT"} for s in front for v in s.visible)
    alone = assign(examples, CAMERAS, iid, Hybrid(keep_rate=0.0), seed)
    assert all(len(v) == 1 for s in alone for v in s.visible)


def test_seeds_differ() -> None:
    examples = [row(i, "abc"[i % 3]) for i in range(200)]
    digests = {shards_digest(assign(examples, TWO, Dirichlet(), Missing(), seed), examples) for seed in range(20)}
    assert len(digests) == 20


def test_digests_tell_rows_masks_and_clients_apart() -> None:
    examples = [row(i) for i in range(20)]
    base = assign(examples, TWO, Iid(num_clients=2), Aligned(), 0)
    swapped = tuple(type(s)(1 - s.client, s.rows, s.visible) for s in reversed(base))
    hidden = assign(examples, TWO, Iid(num_clients=2), Missing(rate=0.5), 0)
    renamed = [row(i + 1) for i in range(20)]
    assert (
        len(
            {
                shards_digest(base, examples),
                shards_digest(swapped, examples),
                shards_digest(hidden, examples),
                shards_digest(base, renamed),
            }
        )
        == 4
    )


def test_the_same_digest_on_any_file_system_order(tmp_path: Path, monkeypatch) -> None:
    """Listings are shuffled; a split of several files and an imagefolder come out the same."""
    for name in ("b", "a", "c"):
        rawsets.write_lines(tmp_path / f"{name}.jsonl", [f'{{"text": "{name}{i}", "answer": "x"}}' for i in range(9)])
        for label in ("no", "yes"):
            rawsets.write_lines(tmp_path / "folder" / label / f"{name}.png", [])
    table = rawsets.dataset("table", tmp_path, train="*.jsonl", question="?", columns={"text": "text"})
    folder = rawsets.dataset("table", tmp_path, train="folder", question="?")
    real_scandir, real_listdir = os.scandir, os.listdir

    class Shuffled(list):
        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        close = __exit__

    digests = set()
    for seed in range(5):
        rng = random.Random(seed)
        monkeypatch.setattr(os, "scandir", lambda p=".", r=rng: Shuffled(r.sample(e := list(real_scandir(p)), len(e))))
        monkeypatch.setattr(os, "listdir", lambda p=".", r=rng: r.sample(e := real_listdir(p), len(e)))
        for data in (table, folder):
            rows = data.load("train").examples
            digests.add(shards_digest(assign(rows, data.modalities(), Dirichlet(), Aligned(), 0), rows))
    assert len(digests) == 2


def test_a_small_alpha_skews_labels_and_may_leave_clients_empty() -> None:
    examples = [row(i, "abc"[i % 3]) for i in range(300)]
    skewed = assign(examples, TWO, Dirichlet(alpha=0.01), Aligned(), 0)
    even = assign(examples, TWO, Dirichlet(alpha=1000), Aligned(), 0)
    assert any(not s.rows for s in skewed)
    assert all(25 <= len(s.rows) <= 35 for s in even)


def test_iid_sizes_differ_by_one_at_most() -> None:
    shards = assign([row(i) for i in range(23)], TWO, Iid(num_clients=4), Aligned(), 0)
    assert sorted(len(s.rows) for s in shards) == [5, 6, 6, 6]


def test_a_natural_split_by_a_column() -> None:
    wards = ["ward 10", "ward 2", "home", "ward 2"]
    shards = assign([row(i, ward=w) for i, w in enumerate(wards)], TWO, ByColumn(column="ward"), Aligned(), 0)
    assert [s.rows for s in shards] == [(2,), (1, 3), (0,)]  # home, ward 2, ward 10


def test_a_column_that_a_row_lacks_is_named_with_the_row() -> None:
    with pytest.raises(DataError, match=r"f:0: row 0 has no column 'wrad'; columns: set, ward"):
        assign([row(0, ward="a")], TWO, ByColumn(column="wrad"), Aligned(), 0)


def test_real_clients_are_not_simulated_over() -> None:
    real = [row(i, client=str(i % 2)) for i in range(4)]
    with pytest.raises(ConfigError, match="the rows name their clients"):
        assign(real, TWO, Dirichlet(), Aligned(), 0)
    assert [s.rows for s in assign(real, TWO, ByColumn(), Aligned(), 0)] == [(0, 2), (1, 3)]
    third = assign(real, TWO, ByColumn(num_clients=3), Aligned(), 0)
    assert [s.rows for s in third] == [(0, 2), (1, 3), ()]
    with pytest.raises(DataError, match=r"f:1: row 1: 'client' is '1'; partition.num_clients allows 0 to 0"):
        assign(real, TWO, ByColumn(num_clients=1), Aligned(), 0)


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (Missing(rates={"imgae": 0.1}), "scenario.rates.imgae: unknown modality; allowed: image, text"),
        (Cross(clients={"image": 1, "text": 1}), "adds up to 2, not 3 clients"),
        (Cross(num_image_clients=4), "scenario.num_image_clients: got 4; there are 3 clients"),
    ],
)
def test_scenarios_that_do_not_fit_the_rows(scenario, message) -> None:
    with pytest.raises(ConfigError, match=message):
        assign([row(0)], TWO, Iid(num_clients=3), scenario, 0)


def test_cross_on_cameras_asks_for_numbers() -> None:
    with pytest.raises(ConfigError, match=r"as in \{ CAM_FRONT = 1, CAM_BACK = 1, CAM_BACK_LEFT = 1 \}"):
        assign([row(0, modalities=CAMERAS)], CAMERAS, Iid(num_clients=3), Cross(), 0)


def test_no_rows_no_federation() -> None:
    with pytest.raises(DataError, match="there are no rows to partition"):
        assign([], TWO, Iid(), Aligned(), 0)


def test_test_rows_show_what_they_have_and_may() -> None:
    assert show_only([row(0), row(1, modalities=("text",))], frozenset({"image"})) == ({"image"}, frozenset())


def test_messages_about_columns_cut_what_they_quote() -> None:
    long = "x" * 100_000
    row = Example(long, {}, "?", (), "a", "f:0", {"ward": long})
    with pytest.raises(DataError, match=r"partition\.num_clients allows") as numbered:
        ByColumn(column="ward", num_clients=2).split([row], 0)
    with pytest.raises(DataError, match="has no column") as missing:
        ByColumn(column="wrad").split([row], 0)
    assert max(len(str(numbered.value)), len(str(missing.value))) < 300
