"""Every strategy for missing modalities on odd rows and on real sites: a defined result, or a refusal that says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedmllm.backbones.base import Tiny
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError, FedmllmError
from fedmllm.data.base import Dataset
from fedmllm.runs.run import run
from support.runs import events

PUBLIC = {"rows": 3}
GATED = {"name": "tiny", "lora": {"modality_gate": True}}
STRATEGIES: dict[str, dict[str, Any]] = {
    "retrieve": {"completion": {"name": "retrieve", "neighbours": 2}, "public": PUBLIC},
    "retrieve, any answer": {"completion": {"name": "retrieve", "answer": "any", "test": True}, "public": PUBLIC},
    "imagine": {
        "completion": {"name": "imagine", "kind": "cvae", "rounds": 1, "steps": 2},
        "scenario": {"name": "missing", "rate": 0.1},
    },
    "describe": {"completion": {"name": "describe", "max_new_tokens": 2}},
    "profile": {"relation": "profile"},
    "similarity": {"relation": "similarity"},
    "graph attention": {"relation": "graph-attention", "public": PUBLIC},
    "importance": {"modality_dropout": {"name": "importance", "rows": 2}},
    "uniform": {"modality_dropout": "uniform"},
    "gate": {"backbone": GATED},
    "public client": {"public": {**PUBLIC, "client": True}},
}
CASES = ["one class", "unseen labels", "blank cells", "several pictures", "open question"]


def rows(case: str, split: str) -> list[dict[str, Any]]:
    made = []
    for i in range(8):
        answer = ("no", "yes")[i % 2]
        if case == "one class" or (case == "unseen labels" and split == "validation"):
            answer = "no"  # as validation rows are the public ones, no public row has the other answer
        pictures: Any = ["0.png", "1.png"] if case == "several pictures" and i % 2 else f"{i % 2}.png"
        blank = case == "blank cells" and split != "validation" and i % 4 == 1
        text = "" if blank else f"note number {i}"
        if case == "open question":
            answer = f"a finding of size {i}"
        # labs are blank in every other row; series and variants have odd cells, which `render` makes text of
        row = {"case": f"{split}-{i}", "scan": pictures, "note": text, "crp": "" if blank else 3.5 + i}
        made.append({**row, "genes": "KRAS p.G12D" if i % 2 else "", "label": answer})
    return made


def table(folder: Path, case: str) -> dict[str, Any]:
    """A table with pictures, notes, lab values and variants, as `data.render` writes them."""
    for i in range(2):
        Image.new("RGB", (40, 30), ("red", "blue")[i]).save(folder / f"{i}.png")
    for split in ("train", "validation", "test"):
        lines = [json.dumps(row) for row in rows(case, split)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    columns = {"id": "case", "image": "scan", "text": "note", "answer": "label", "series": {"labs": ["crp"]}}
    data = {"name": "table", "root": str(folder), "question": "Is it so?", "columns": columns}
    data |= {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    return data if case == "open question" else {**data, "choices": ["no", "yes"]}


def experiment(data: dict[str, Any], strategy: str, **changed: Any) -> Experiment:
    base: dict[str, Any] = {
        "data": data,
        "scenario": {"name": "missing", "rate": 0.3},
        "partition": {"name": "iid", "num_clients": 2},
        "backbone": "tiny",
        "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 1},
        "num_rounds": 1,
    }
    return Experiment.parse({**base, **STRATEGIES[strategy], **changed})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_odd_rows_have_a_defined_result(strategy: str, case: str, tmp_path: Path):
    data = table(tmp_path, case)
    result = run(experiment(data, strategy), tmp_path / "run")
    assert all(t.isfinite().all() for t in result.adapter.tensors.values())
    (head,) = events(tmp_path / "run", "experiment")
    unseen = "completion: no public row has the answer 'yes'; rows with it stay incomplete"
    assert (unseen in head["notes"]) == (strategy == "retrieve" and case == "unseen labels")


ON_SITES = {
    "completion": "which supports neither completion nor public rows",
    "public": "which supports neither completion nor public rows",
    "relation": "whose server does not know the clients' modalities",
    "modality_dropout": "which drops no modalities",
}


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "gate"])
def test_real_sites_are_refused_when_the_experiment_is_read(strategy: str, tmp_path: Path):
    """A request names no strategy of a site, so an experiment that needs one is refused before a site is asked."""
    (key, *_) = STRATEGIES[strategy]
    with pytest.raises(FedmllmError, match=re.escape(ON_SITES[key])):
        experiment(table(tmp_path, "one class"), strategy, engine="flower-sites")


def test_a_site_refuses_vectors_beside_lora_unless_it_allows_them():
    pytest.importorskip("flwr", reason="the extra `flower` is not installed")
    from fedmllm.flower.request import Request
    from fedmllm.flower.site.config import Allow, Site

    asked = experiment({"name": "synthetic-irony"}, "gate", engine="flower-sites")
    request = Request.of(asked, "base", "north", 0, 1)
    paths = {"ca": "ca.crt", "key": "site.key"}

    def reason(**allow: Any) -> str:
        site = Site.model_validate(
            {"name": "north", "server": "host:1", **paths, "data": asked.data, "allow": Allow.model_validate(allow)}
        )
        return site.refuse(request, 8, 100)

    assert "lora.modality_gate = True; this site allows False" in reason()
    assert "modality_gate" not in reason(settings={"lora.modality_gate": [True]})


@pytest.mark.parametrize(
    ("strategy", "changed", "reason"),
    [
        ("retrieve", {"public": {"rows": 0}}, "public.rows: got 0; completion 'retrieve' needs public rows"),
        ("public client", {"public": {"client": True}}, "rows: got 0; data, split and client have no effect"),
        ("importance", {"completion": {"name": "describe"}}, "which would fill what is dropped"),
        ("describe", {"completion": {"name": "describe", "ask": []}}, "completion.ask"),
    ],
)
def test_a_part_that_is_missing_is_named(strategy: str, changed: dict[str, Any], reason: str, tmp_path: Path):
    with pytest.raises(FedmllmError, match=re.escape(reason)):
        experiment(table(tmp_path, "one class"), strategy, **changed)


IMAGINE = {"name": "imagine", "kind": "cvae", "rounds": 1, "steps": 2}


@pytest.mark.parametrize(
    ("strategy", "changed", "reason"),
    [
        (
            "imagine",
            {"completion": {**IMAGINE, "picture": "text"}},
            "completion.text: got 'text', which is also `picture`; allowed: image, labs",
        ),
        (
            "imagine",
            {"completion": {**IMAGINE, "picture": "labs"}},
            "completion.picture: got 'labs', which has no pictures; allowed: image",
        ),
        (
            "imagine",
            {"completion": {**IMAGINE, "picture": "text", "text": "image"}},
            "completion.picture: got 'text', which has no pictures; allowed: image",
        ),
        (
            "imagine",
            {"completion": {**IMAGINE, "text": "image"}},
            "completion.text: got 'image', which is also `picture`; allowed: text, labs",
        ),
        (
            "describe",
            {"completion": {"name": "describe", "to": "image"}},
            "completion.to: got 'image', which has no text; allowed: labs, text",
        ),
        (
            "describe",
            {"completion": {"name": "describe", "ask": ""}},
            "completion.ask: got ''; a blank question asks nothing; allowed: questions with words",
        ),
        (
            "describe",
            {"completion": {"name": "describe", "ask": ["What is it?", "  "]}},
            "completion.ask: got ['What is it?', '  ']; a blank question asks nothing",
        ),
        (
            "profile",
            {"evaluate": {"visible": ["all", "both"]}},
            "evaluate.visible: got 'all' and 'both', the same modalities twice; allowed: each set once",
        ),
        (
            "profile",
            {"evaluate": {"visible": ["image+text", "all", "text+image"]}},
            "evaluate.visible: got 'image+text' and 'text+image', the same modalities twice; allowed: each set once",
        ),
        (
            "profile",
            {"evaluate": {"visible": ["all-image-text", "all-text-image"]}},
            "evaluate.visible: got 'all-image-text' and 'all-text-image', the same modalities twice",
        ),
    ],
)
def test_a_setting_that_names_the_wrong_modality_is_refused_when_it_is_read(
    strategy: str, changed: dict[str, Any], reason: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        experiment(table(tmp_path, "one class"), strategy, **changed)


def test_a_text_that_is_another_camera_is_refused():
    completion = {**IMAGINE, "picture": "CAM_FRONT", "text": "CAM_BACK"}
    with pytest.raises(ConfigError, match=r"completion.text: got 'CAM_BACK', which has no text; allowed: range, speed"):
        Experiment.parse({"data": "synthetic-driving", "completion": completion})


@pytest.mark.parametrize("name", sorted(name for name, cls in Dataset.members.items() if not cls.plugin))
def test_every_data_set_knows_which_modalities_are_pictures(name: str):
    roots = {"root": "/rows", "data": {"name": "synthetic-irony"}}
    fields = Dataset.members[name].model_fields
    settings = {key: value for key, value in roots.items() if key in fields and fields[key].is_required()}
    try:
        data = Dataset.pick({"name": name, **settings}, "data")
    except ConfigError:
        pytest.skip("needs more settings")
    pictures = data.picture_modalities()
    assert pictures is not None
    assert pictures < set(data.modalities()) or pictures == set(data.modalities())
    assert "text" not in pictures


@pytest.mark.parametrize("changed", [{}, {"question": "Is it so, at all?"}], ids=["a copy", "another question"])
def test_public_rows_that_clients_hold_are_refused(changed: dict[str, Any], tmp_path: Path, monkeypatch):
    """Under settings that differ from the experiment's, before the model is loaded, with the first row's place."""
    data = table(tmp_path, "one class")
    (tmp_path / "same.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    other, split = {**data, **changed}, "train" if changed else "validation"
    other |= {} if changed else {"validation": "same.jsonl"}
    monkeypatch.setattr(Tiny, "load", lambda self, seed: pytest.fail("the model was loaded"))
    place = tmp_path / other[split]
    found = f"public.data: 3 of 3 public rows are also training rows of the clients; the first is {place}:1"
    with pytest.raises(DataError, match=f"{re.escape(found)}.*allowed: rows that no client holds"):
        run(experiment(data, "retrieve", public={"rows": 3, "data": other, "split": split}), tmp_path / "run")


def test_validation_rows_that_are_also_training_rows_are_noted(tmp_path: Path):
    """They are the set's own: no other setting would help, and the record says so."""
    run(experiment(table(tmp_path, "one class"), "retrieve"), tmp_path / "run")
    notes = events(tmp_path / "run", "experiment")[0]["notes"]
    assert any(
        note.startswith("public rows: 3 of 3 public rows are also training rows; the first is") for note in notes
    )


def test_other_public_rows_are_read(tmp_path: Path):
    data = table(tmp_path, "one class")
    lines = [json.dumps({**row, "note": f"other {row['note']}"}) for row in rows("one class", "validation")]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    other = {**data, "question": "Another?", "validation": "other.jsonl"}
    run(experiment(data, "retrieve", public={"rows": 3, "data": other}), tmp_path / "run")
    assert not any("public rows are also" in note for note in events(tmp_path / "run", "experiment")[0]["notes"])


CROSS = {"name": "cross", "clients": {"image": 1, "text+labs": 1}}


@pytest.mark.parametrize(("dropout", "measures"), [("importance", True), ("uniform", False), ("none", None)])
def test_a_dropout_without_a_complete_row_is_noted(dropout: str, measures: bool | None, tmp_path: Path):
    changed: dict[str, Any] = {"scenario": CROSS, "modality_dropout": dropout}
    run(experiment(table(tmp_path, "one class"), "uniform", **changed), tmp_path / "run")
    notes = [n for n in events(tmp_path / "run", "experiment")[0]["notes"] if "modality_dropout" in n]
    text = f"modality_dropout {dropout}: no client has a complete row, so no row loses a modality"
    assert notes == ([] if measures is None else [text + ", and no importance is measured" * measures])


def test_a_dropout_with_complete_rows_is_not_noted(tmp_path: Path):
    data = table(tmp_path, "one class")
    changed: dict[str, Any] = {"scenario": CROSS, "modality_dropout": "uniform", "public": {"rows": 3, "client": True}}
    run(experiment(data, "uniform", **changed), tmp_path / "run")
    assert not any("modality_dropout" in note for note in events(tmp_path / "run", "experiment")[0]["notes"])
