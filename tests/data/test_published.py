"""`partition = "published"` gives the published rows and masks, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.types import Shard
from fedmllm.scenarios.assign import assign, shards_digest  # fmt: skip
from fedmllm.scenarios.masks import Aligned, Cross, Hybrid, Missing, Scenario
from fedmllm.scenarios.partitions import Dirichlet
from fedmllm.scenarios.published import Published, lift
from support import rawsets

GOLDEN: dict[str, tuple[float, Scenario]] = {
    "aligned/5.0": (5.0, Aligned()),
    "aligned/0.5": (0.5, Aligned()),
    "missing/0.3": (0.5, Missing(rate=0.3)),
    "cross/5": (0.5, Cross(num_image_clients=5)),
    "hybrid/0.6": (0.5, Hybrid(keep_rate=0.6)),
}
TWELVE = [
    *((alpha, Aligned()) for alpha in (5.0, 1.0, 0.5)),
    *((0.5, Missing(rate=rate)) for rate in (0.3, 0.4, 0.5)),
    *((0.5, Cross(num_image_clients=k)) for k in (3, 5, 7)),
    *((0.5, Hybrid(keep_rate=rate)) for rate in (0.8, 0.7, 0.6)),
]


def shards_of(data, scenario, alpha=0.5, seed=0):
    examples = data.load("train").examples
    return examples, assign(examples, data.modalities(), Published(alpha=alpha), scenario, seed)


@pytest.mark.parametrize("key", GOLDEN)
def test_the_golden_partitions_and_masks_of_hateful_memes(shared: Path, tmp_path: Path, key: str) -> None:
    shutil.copy(shared / "golden" / "hateful_memes_raw.jsonl", tmp_path / "train.jsonl")
    want = json.loads((shared / "golden" / "hateful_memes_partitions.json").read_text())["partitions"][key]
    alpha, scenario = GOLDEN[key]
    examples, shards = shards_of(rawsets.dataset("hateful-memes", tmp_path), scenario, alpha)
    assert [[examples[row].id for row in s.rows] for s in shards] == [client["ids"] for client in want]
    for modality in ("image", "text"):
        assert [flags(s, modality) for s in shards] == [client[modality] for client in want]


def flags(shard: Shard, modality: str) -> str:
    return "".join("1" if modality in visible else "0" for visible in shard.visible)


def test_every_published_setting_as_the_reference_made_it(tmp_path: Path, golden) -> None:
    """The digests of tests/golden/published.txt were compared row by row with the reference's scheme when written."""
    rawsets.hateful_memes(tmp_path / "hateful-memes", 850)
    rawsets.crisismmd(tmp_path / "crisismmd", 700)
    rawsets.medical(tmp_path / "medical", images=97, cards=351)
    lines = []
    for name in ("hateful-memes", "crisismmd", "medical"):
        data = rawsets.dataset(name, tmp_path / name)
        for alpha, scenario in TWELVE[6:] if name == "medical" else TWELVE:
            examples, shards = shards_of(data, scenario, alpha)
            setting = " ".join(str(v) for k, v in scenario.model_dump().items() if k != "name" and v != {})
            lines.append(
                f"{name} alpha {alpha} {scenario.name} {setting}".strip() + f": {shards_digest(shards, examples)}"
            )
    golden("published.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize(("k", "want"), [(3, {0, 1, 4}), (5, {0, 1, 4, 6, 9}), (7, {0, 1, 4, 5, 6, 8, 9})])
def test_the_image_clients_of_cross(tmp_path: Path, k: int, want: set[int]) -> None:
    """Sets as in protocol.md, section 3."""
    rawsets.hateful_memes(tmp_path, 300)
    _, shards = shards_of(rawsets.dataset("hateful-memes", tmp_path), Cross(num_image_clients=k), 5.0)
    assert {s.client for s in shards if all(v == {"image"} for v in s.visible)} == want
    assert {s.client for s in shards if all(v == {"text"} for v in s.visible)} == set(range(10)) - want


@pytest.mark.parametrize(("k", "order"), [(3, [6, 5, 3]), (5, [6, 5, 3, 1, 7]), (7, [6, 5, 3, 1, 7, 4, 2])])
def test_medical_cross(tmp_path: Path, k: int, order: list[int]) -> None:
    """97 image questions in k parts of 97 // k, the last taking the rest, in the order of the draw; then the cards."""
    rawsets.medical(tmp_path, images=97, cards=351)
    examples, shards = shards_of(rawsets.dataset("medical", tmp_path), Cross(num_image_clients=k))
    others = [client for client in range(10) if client not in order]
    assert [len(shards[c].rows) for c in order] == [97 // k] * (k - 1) + [97 - 97 // k * (k - 1)]
    assert [len(shards[c].rows) for c in others][:-1] == [351 // (10 - k)] * (9 - k)
    for shard in shards:
        kind = "image" if shard.client in order else "text"
        assert all(v == {kind} for v in shard.visible)
        assert {examples[r].columns["set"] for r in shard.rows} == {"vqa-rad" if kind == "image" else "flashcards"}


def test_medical_hybrid_mixes_both_sets_on_clients_with_both(tmp_path: Path) -> None:
    rawsets.medical(tmp_path, images=97, cards=351)
    examples, shards = shards_of(rawsets.dataset("medical", tmp_path), Hybrid(keep_rate=0.6))
    assert sorted(row for s in shards for row in s.rows) == list(range(97 + 351))
    mixed = [s for s in shards if len(set(s.visible)) == 2]
    assert mixed
    for shard in mixed:
        order = [examples[row].columns["set"] for row in shard.rows]
        assert order != sorted(order)
        assert order != sorted(order, reverse=True)


@pytest.mark.parametrize("scenario", [Aligned(), Missing(rate=0.3)])
def test_medical_was_published_with_cross_and_hybrid_only(tmp_path: Path, scenario: Scenario) -> None:
    rawsets.medical(tmp_path)
    with pytest.raises(ConfigError, match="cross and hybrid"):
        shards_of(rawsets.dataset("medical", tmp_path), scenario)


def test_crisismmd_lifts_the_first_label_only(tmp_path: Path) -> None:
    """Its rarest classes have fewer rows than there are clients: lifting these would never end."""
    rawsets.crisismmd(tmp_path, 700)
    data = rawsets.dataset("crisismmd", tmp_path)
    examples, shards = shards_of(data, Aligned(), alpha=0.1)
    labels = list(dict.fromkeys(e.answer for e in examples))
    held = {label: [sum(examples[r].answer == label for r in s.rows) for s in shards] for label in labels}
    assert min(held[labels[0]]) == 1
    assert all(min(held[label][:-1]) == 0 for label in labels[1:])
    assert min(sum(counts) for counts in held.values()) < 10


def test_lifting_by_hand() -> None:
    """Clients 1, 3, 4 are lifted in order: the first donor (0) gives one and falls to 1, the next donor (2) gives two."""
    counts = [2, 0, 5, 0, 0]
    lift(counts, "x")
    assert counts == [1, 1, 3, 1, 1]


def test_a_label_that_cannot_be_lifted_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    rawsets.hateful_memes(tmp_path, 12)
    with pytest.raises(DataError, match=r"train.jsonl:1: label 'not-hateful': too few rows"):
        shards_of(rawsets.dataset("hateful-memes", tmp_path), Aligned())


def test_the_seed_of_the_experiment_plays_no_part(tmp_path: Path) -> None:
    rawsets.hateful_memes(tmp_path, 300)
    data = rawsets.dataset("hateful-memes", tmp_path)
    assert shards_of(data, Missing(), seed=0) == shards_of(data, Missing(), seed=1)


def test_sets_without_a_published_partition_say_so(tmp_path: Path) -> None:
    rawsets.vqa_rad(tmp_path)
    with pytest.raises(ConfigError, match="image and text, not image"):
        shards_of(rawsets.dataset("vqa-rad", tmp_path), Aligned())
    rawsets.write_lines(tmp_path / "a.csv", ["scan,report,answer,question", "a.png,x,y,z"])
    table = rawsets.dataset("table", tmp_path, train="a.csv", columns={"image": "scan", "text": "report"})
    with pytest.raises(ConfigError, match="not known for table; published: hateful-memes, crisismmd, medical"):
        shards_of(table, Aligned())


def test_other_columns_are_not_published(tmp_path: Path) -> None:
    rawsets.hateful_memes(tmp_path, 300)
    data = rawsets.dataset("hateful-memes", tmp_path)
    examples = data.load("train").examples
    ours = assign(examples, data.modalities(), Dirichlet(), Aligned(), 0)
    published = assign(examples, data.modalities(), Published(), Aligned(), 0)
    assert shards_digest(ours, examples) != shards_digest(published, examples)
