"""More than two modalities: lab values, series and gene variants as text, the embedded clinic, masks and prompts."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.rng import stream
from fedmllm.core.types import Example, visible_of
from fedmllm.data.drivelm import ASK, CAMERAS, DriveLM, _asked
from fedmllm.data.prompts import Agnostic, FromFile, Plain
from fedmllm.data.render import Render, number, samples_of, variants_of
from fedmllm.data.synthetic_clinic import SyntheticClinic
from fedmllm.data.synthetic_driving import SENSORS, SyntheticDriving, spoken_camera
from fedmllm.data.table import Table
from fedmllm.reports.data import Federation, export
from fedmllm.scenarios.masks import Cross
from fedmllm.testing import check_scenario

ALL = ("image", "text", "labs", "genes")
SMALL = {"num_train": 40, "num_validation": 3, "num_test": 8}
HEADER = "id,crp,hb,speed,KRAS,TP53,any,answer"
COLUMNS = {
    "series": {"labs": ["crp", "hb"], "motion": "speed"},
    "variants": {"genes": ["KRAS", "TP53"], "other": "any"},
}
RENDER = {
    "units": {"crp": "mg/l", "speed": "m/s"},
    "ranges": {"crp": [0, 5]},
    "step_s": {"speed": 0.5},
    "genes": ["EGFR", "KRAS", "TP53"],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMLLM_CACHE", str(tmp_path / "cache"))


def table(folder: Path, *rows: str, header: str = HEADER, **settings) -> Table:
    (folder / "rows.csv").write_text("\n".join([header, *rows]) + "\n")
    form = {"root": str(folder), "train": "rows.csv", "question": "Is it?", "choices": ["no", "yes"]}
    return Table.pick({"name": "table", **form, "columns": COLUMNS, "render": RENDER, **settings}, "data")


# --- numbers and variants


def test_values_series_and_variants_become_text(tmp_path: Path) -> None:
    data = table(tmp_path, "1,112.4,9.1,12.3 8 0.4,G12D,wt,EGFR L858R; ABC A1B,yes", "2,3,,[4],,,KRAS=WT,no")
    assert data.modalities() == ("labs", "motion", "genes", "other")
    first, second = data.load("train").examples
    assert first.fields == {
        "labs": "crp 112 mg/l high, hb 9.1",
        "motion": "speed 12.3 to 0.4 m/s in 1 s, falling, from 0.4 to 12.3",
        "genes": "KRAS G12D",
        "other": "EGFR L858R",  # ABC is not on the list of genes
    }
    assert second.fields == {
        "labs": "crp 3 mg/l normal",
        "motion": "speed 4 m/s",
        "other": "no variant",
    }  # no "genes" at all
    assert first.announced == {"labs", "motion", "genes", "other"}


def test_the_text_of_a_modality_depends_on_its_own_columns_alone(tmp_path: Path) -> None:
    (before,) = table(tmp_path, "1,112,9,3 4,G12D,wt,EGFR L858R,yes").load("train").examples
    (after,) = (
        table(tmp_path, "yes,KRAS A1B,R2W,G12D,77;1,9,112,1", header=",".join(HEADER.split(",")[::-1]))
        .load("train")
        .examples
    )
    assert before.fields["labs"] == after.fields["labs"]
    assert before.fields["motion"] != after.fields["motion"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1230000"), (0.000123456, "0.000123"), (-0.0, "0"), (5, "5"), (9.999, "10"), (1e-30, f"0.{'0' * 29}1")],
)
def test_a_number_keeps_its_digits(value: float, text: str) -> None:
    assert number(value, 3) == text
    assert float(text) == pytest.approx(value, rel=5e-3)


def test_trends() -> None:
    write = Render().series
    assert write({"v": (1, 2)}) == "v 1 to 2, rising, from 1 to 2"
    assert "steady" in write({"v": (100, 300, 101)})
    assert Render().variants({"A": "0", "B": "WT", "C": "0/0"}) == "no variant"
    assert write({"a": (1, 0), "b": (2,)}) == "a 1 to 0, falling, from 0 to 1; b 2"
    assert Render(top=1).variants({"A": "x", "B": "y"}) == "A x"


@pytest.mark.parametrize(
    "cell", ["12,5", "high", "nan", "1 2 inf", "[1, true]", "[1", "[]", True, [None], {"a": 1}, b"1"]
)
def test_what_is_not_a_number_is_refused(cell: object) -> None:
    with pytest.raises(DataError, match=r"^rows\.csv:2: .*'crp'"):
        samples_of(cell, "crp", "rows.csv:2")


@pytest.mark.parametrize("cell", ["G12D", "KRAS G12D; KRAS G12D", 7, ["KRAS G12D", 3], {"KRAS": 5}])
def test_what_is_not_a_variant_is_refused(cell: object) -> None:
    with pytest.raises(DataError, match=r"^rows\.csv:2: .*'any'"):
        variants_of(cell, "any", "rows.csv:2")


def test_variants_in_any_form() -> None:
    expected = {"KRAS": "G12D", "TP53": "c.524G>A"}
    for cell in (
        "KRAS G12D; TP53:c.524G>A",
        ["KRAS=G12D", "TP53 c.524G>A"],
        dict(expected),
        "; KRAS  G12D;TP53 c.524G>A ;",
    ):
        assert variants_of(cell, "any", "here") == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"render": {}}, r"data\.render\.genes: missing; name the genes whose variants in 'any'"),
        ({"columns": {"series": {"labs": []}}}, r"data\.columns\.series\.labs: name one or more columns"),
        ({"columns": {"series": {"labs": "crp"}, "text": {"labs": "hb"}}}, r"two kinds of columns are called 'labs'"),
        (
            {"columns": {"text": "hb", "announced": ["note"]}, "render": {}},
            r"data\.columns\.announced: got 'note'; allowed: text",
        ),
        (
            {"render": {**RENDER, "units": {"crap": "mg/l"}}},
            r"data\.render\.units\.crap: no such column of numbers; there are: crp",
        ),
        ({"columns": {"series": {"labs+": "crp"}}}, r"data\.columns: got 'labs\+'; allowed: a name other than all"),
        ({"columns": {"series": {"all": "crp"}}, "render": {}}, r"data\.columns: got 'all'; allowed"),
        ({"render": {**RENDER, "ranges": {"crp": [5, 0]}}}, r"normal range has to be two numbers, the lower one first"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table(tmp_path, **settings)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row has a column 'hb' \(data\.columns\.series\.labs\)"):
        table(tmp_path, "1,2,3,G12D,wt,EGFR L858R,yes", header=HEADER.replace("hb,", "")).load("train")


# --- prompts, masks and what test rows show


def test_a_prompt_puts_each_reading_under_its_name() -> None:
    row = SyntheticClinic(**SMALL).load("train").examples[0]
    lines = Plain().render(row, frozenset(ALL)).text.splitlines()
    assert lines[0] == "Select the best answer based on the text, image, labs and genes."
    assert [line.split(":")[0] for line in lines[1:4]] == ["Text", "Labs", "Genes"]
    hidden = Plain().render(row, frozenset({"labs"}))
    assert not hidden.pictures
    assert hidden.text.splitlines()[:2] == ["Select the best answer based on the labs.", f"Labs: {row.fields['labs']}"]
    assert f"Labs: {row.fields['labs']}" in Agnostic().render(row, frozenset({"labs"})).text
    own = FromFile(wording="{text}\n{question}").render(row, frozenset({"text", "genes"})).text
    assert own == f"{row.fields['text']}\nGenes: {row.fields['genes']}\n{row.question}"


@pytest.mark.parametrize(
    "scenario", [Cross(clients={"image": 1, "labs+genes": 2, "text": 1}), Cross(clients={"genes": 4})]
)
def test_cross_gives_clients_groups_of_modalities(scenario: Cross) -> None:
    check_scenario(scenario, ALL)
    masks = scenario.hide([[0, 1], [2], [3, 4], [5]], ALL, 7)
    assert all(len(set(own)) == 1 for own in masks)
    seen = sorted("+".join(m for m in ALL if m in own[0]) for own in masks)
    assert seen == sorted(group for group, n in scenario.clients.items() for _ in range(n))


def test_cross_refuses_unknown_and_doubled_groups() -> None:
    with pytest.raises(ConfigError, match=r"scenario\.clients\.lab: unknown modality"):
        Cross(clients={"image+lab": 2}).check(ALL, 2)
    with pytest.raises(ConfigError, match=r"genes\+labs: the same modalities as 'labs\+genes'"):
        Cross(clients={"labs+genes": 1, "genes+labs": 1}).check(ALL, 2)


def test_visible_may_name_what_is_hidden() -> None:
    assert visible_of("all-labs-text", ALL) == {"image", "genes"}
    with pytest.raises(ConfigError, match="got 'all-lab'; allowed: all, none, image, text, labs, genes"):
        visible_of("all-lab", ALL)


# --- the clinic


def test_the_ceilings_of_the_clinic_are_those_of_a_large_sample() -> None:
    """All sixteen patterns of visible modalities, for other weights than the default ones."""
    data = SyntheticClinic(image_weight=0.5, labs_weight=2.5, interaction_weight=-1.5)
    rows = [data.row(stream(3, "many", i)) for i in range(12000)]
    labels, looks = [int(r.at_risk) for r in rows], [(r.face, r.tone, r.lab, r.gene) for r in rows]
    rate = sum(labels) / len(labels)
    for visible in (set(c) for n in range(5) for c in combinations(range(4), n)):
        sums: dict[tuple[str, ...], list[int]] = {}
        seen = [tuple(look[i] for i in sorted(visible)) for look in looks]
        for look, label in zip(seen, labels, strict=True):
            of_look = sums.setdefault(look, [0, 0])
            of_look[0] += label
            of_look[1] += 1
        known = [sums[look][0] / sums[look][1] for look in seen]
        found = {
            "auc": roc_auc_score(labels, known),
            "auc_hard": balanced_accuracy_score(labels, [p > rate for p in known]),
            "accuracy": accuracy_score(labels, [p > 0.5 for p in known]),
        }
        assert data.ceilings(frozenset(ALL[i] for i in visible)) == pytest.approx(found, abs=0.016), visible


def test_the_clinic_is_drawn_from_its_seed_and_every_modality_tells_its_level() -> None:
    data = SyntheticClinic(**SMALL)
    rows, more = (d.load("train").examples for d in (data, SyntheticClinic(**{**SMALL, "num_train": 60})))
    assert [(e.fields["labs"], e.answer) for e in rows] == [(e.fields["labs"], e.answer) for e in more[:40]]
    assert SyntheticClinic(**SMALL, seed=1).load("train").examples[0].fields != rows[0].fields
    for index, row in enumerate(rows):
        patient = data.row(stream(0, data.name, "train", index))
        assert row.answer == ("no", "yes")[patient.at_risk]
        assert (
            str(row.fields["labs"]).split(",")[0].endswith({"low": "small", "high": "large"}.get(patient.lab, "normal"))
        )
        genes = str(row.fields["genes"])
        assert ("heron" in genes, "flint" in genes) == (patient.gene == "harms", patient.gene == "guards")


def test_clients_masks_and_prompts_of_the_clinic_survive_an_export(tmp_path: Path) -> None:
    there = Federation.of(
        Experiment(data={"name": "synthetic-clinic", **SMALL}, scenario={"name": "missing", "rate": 0.4})
    )
    assert {m for shard in there.shards for v in shard.visible for m in v} == set(ALL)
    export(there, tmp_path / "out")
    back = Federation.of(Experiment.load(tmp_path / "out" / "data.toml"))
    assert back.digest == there.digest
    for one, two in zip(there.shards, back.shards, strict=True):
        for a, b, visible in zip(one.rows, two.rows, one.visible, strict=True):
            assert Plain().render(there.examples[a], visible) == Plain().render(back.examples[b], visible)


def test_data_show_has_a_ceiling_without_each_modality_and_with_it_alone() -> None:
    found = Federation.of(Experiment(data={"name": "synthetic-clinic", **SMALL})).ceilings()
    assert list(found) == ["all", *(f"all-{m}" for m in ALL), *ALL]
    assert found["all"]["auc"] > found["all-labs"]["auc"] > found["labs"]["auc"] > 0.6
    two = Federation.of(Experiment(data={"name": "synthetic-irony", **SMALL})).ceilings()
    assert list(two) == ["all", "image", "text"]
    flags = json.loads(json.dumps(Federation.of(Experiment(data={"name": "synthetic-clinic", **SMALL})).to_json()))
    assert list(flags["clients"][0]) == ["client", "name", "ids", *ALL]


# --- the driving set

PLACES = (*CAMERAS, *SENSORS)


def test_the_ceilings_of_driving_are_those_of_a_large_sample() -> None:
    """The best guess from what is visible, learned from the drawn moments and not from the formula."""
    data = SyntheticDriving()
    asked = []
    for i in range(3000):
        rng = stream(5, "many", i)
        moment = data.moment(rng)
        looks = {**moment.cameras, "speed": moment.slower, "range": moment.nearer}
        asked += [(looks, question, answer) for _, question, answer in data.questions(moment, rng)]
    for visible in (
        set(),
        {"speed"},
        {"CAM_BACK"},
        {"CAM_FRONT", "range"},
        {*CAMERAS},
        {*PLACES} - {"range"},
        {*PLACES},
    ):
        counts: dict[object, Counter[str]] = {}
        guessed = 0.0
        for looks, question, answer in asked:
            named = next((c for c in CAMERAS if f" {spoken_camera(c)}?" in question), None)
            if named:  # one of four things, which only the named camera reveals
                guessed += 1 if named in visible else 1 / 4
                continue
            sky = next((looks[c].sky == "night" for c in CAMERAS if c in visible), None)
            front = looks["CAM_FRONT"].face == "frown" if "CAM_FRONT" in visible else None
            seen = (question, sky, front, *(looks[s] for s in SENSORS if s in visible))
            counts.setdefault(seen, Counter())[answer] += 1
        right = guessed + sum(max(of_look.values()) for of_look in counts.values())
        assert data.ceilings(frozenset(visible))["accuracy"] == pytest.approx(right / len(asked), abs=0.01), visible
    assert data.ceilings(frozenset(PLACES))["accuracy"] == 1.0


def test_driving_has_the_file_of_drivelm_and_every_row_says_what_it_needs() -> None:
    data = SyntheticDriving(num_train=12, num_validation=3, num_test=7)
    rows = {split: data.load(split).examples for split in ("train", "validation", "test")}
    assert {split: len(of_split) for split, of_split in rows.items()} == {"train": 12, "validation": 3, "test": 7}
    more = SyntheticDriving(num_train=15, num_validation=3, num_test=7).load("train").examples
    assert [(e.question, e.answer) for e in more[:12]] == [(e.question, e.answer) for e in rows["train"]]
    as_published = DriveLM(root=data.folder(), test_rate=0.01)
    assert as_published.modalities() == CAMERAS
    assert len(as_published.load("train").examples) >= 12
    for index, row in enumerate(rows["train"]):
        moment = data.moment(stream(0, data.name, "train", index // 5))
        trends = {s: "falling" in str(row.fields[s]) for s in SENSORS}
        assert (trends["speed"], trends["range"]) == (moment.slower, moment.nearer)
        truth = {
            "any camera": moment.cameras["CAM_BACK"].sky == "night",
            "speed": moment.slower,
            "range": moment.nearer,
        }
        truth["CAM_FRONT+range"] = moment.danger
        need = row.columns["needs"]
        expected = moment.cameras[need].thing if need in CAMERAS else ("no", "yes")[truth[need]]
        assert row.answer == expected
        assert list(row.fields) == list(PLACES)
        assert all(path.is_file() for camera in CAMERAS for path in row.fields[camera])


def test_a_prompt_of_driving_leaves_no_trace_of_a_hidden_sensor() -> None:
    row = SyntheticDriving(num_train=5, num_validation=1, num_test=1).load("train").examples[0]
    prompt = Plain().render(row, frozenset({"CAM_BACK", "range"}))
    assert len(prompt.pictures) == 1
    assert prompt.text.splitlines()[:3] == [
        "CAM_BACK: ",
        "Select the best answer based on the range and back camera.",
        f"Range: {row.fields['range']}",
    ]
    assert "Speed" not in prompt.text


@pytest.mark.parametrize(
    ("sensors", "message"),
    [([1, 2], "sensors is"), ({"speed": "fast"}, "'speed' holds 'fast'"), ({"speed": [1, None]}, "'speed' holds None")],
)
def test_a_key_frame_with_broken_sensors_is_named(tmp_path: Path, sensors: object, message: str) -> None:
    entry = {"QA": {"behavior": [{"Q": "Is it?", "A": "Yes."}]}, "image_paths": {}, "sensors": sensors}
    (tmp_path / "v1_1_train_nus.json").write_text(json.dumps({"s": {"key_frames": {"f": entry}}}))
    data = DriveLM(root=tmp_path, sensors=("speed",), test_rate=0.01)
    with pytest.raises(DataError, match=rf"v1_1_train_nus\.json: s/f: {message}"):
        data.load("train")


def test_a_key_frame_without_a_sensor_lacks_the_modality(tmp_path: Path) -> None:
    entry = {"QA": {"behavior": [{"Q": "Is it?", "A": "Yes."}]}, "image_paths": {}, "sensors": {"speed": []}}
    (tmp_path / "v1_1_train_nus.json").write_text(json.dumps({"s": {"key_frames": {"f": entry}}}))
    (row,) = DriveLM(root=tmp_path, sensors=("speed", "range"), test_rate=0.01).load("train").examples
    assert row.fields == {}
    for sensors, render, message in (
        (["s-1"], {}, r"data\.sensors: got 's-1'; allowed"),
        (
            ["speed"],
            {"units": {"sped": "m/s"}},
            r"data\.render\.units\.sped: no such column of numbers; there are: speed",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            DriveLM.pick({"name": "drivelm", "root": str(tmp_path), "sensors": sensors, "render": render}, "data")
    with pytest.raises(ConfigError, match="cameras are not sensors"):
        DriveLM.pick({"name": "drivelm", "root": str(tmp_path), "sensors": ["CAM_BACK"]}, "data")


def test_columns_give_the_rows_that_single_questions_give(tmp_path: Path) -> None:
    plain = [
        {"Q": " What? ", "A": " A bus. "},
        {"Q": "Is it?", "A": "YES."},
        {"Q": "Is it?", "A": "no"},
        {"Q": "", "A": "Not."},
    ]
    whole = [{"Q": f"Is it? {ASK} A. x B. y", "A": "B"}, {"Q": "How many?", "A": 4}, {"Q": "How many?", "A": "4"}]
    bad = [{"Q": "Is it?", "A": " "}, {"Q": "Is it?"}, 7, {"Q": 3.5, "A": ["x"]}, {"Q": f"{ASK} A. x B. y", "A": "C"}]
    image_paths, rng = {camera: f"{camera}.jpg" for camera in CAMERAS}, random.Random(0)
    scenes: dict[str, dict[str, dict[str, object]]] = {}
    expected: list[Example | str] = []
    path = tmp_path / "v1_1_train_nus.json"
    for count in range(60):
        scene, frame = f"s{count // 3}", f"f{count}"
        pool = plain if count % 3 else [*plain, *whole] if count % 2 else [*plain, *whole, *bad]
        asked = [rng.choice(pool) for _ in range(rng.randrange(9))]
        paths = image_paths if count % 10 else {**image_paths, "CAM_TOP": "x.jpg"}
        scenes.setdefault(scene, {"key_frames": {}})["key_frames"][frame] = {
            "QA": {"planning": asked},
            "image_paths": paths,
        }
        if paths is not image_paths:
            expected.append(f"{path}: {scene}/{frame}: unknown camera 'CAM_TOP'; allowed: {', '.join(CAMERAS)}")
            continue
        for index, row in enumerate(asked):
            where = f"{path}: {scene}/{frame}/planning[{index}]"
            try:
                question, choices, answer = _asked(where, row)
            except DataError as error:
                expected.append(str(error))
                continue
            columns = {"set": "drivelm", "scene": scene, "frame": frame, "task": "planning"}
            columns["answer_type"] = "CLOSED" if choices else "OPEN"
            fields = {camera: (tmp_path / f"{camera}.jpg",) for camera in CAMERAS}
            expected.append(
                Example(f"{scene}/{frame}/planning/{index}", fields, question, choices, answer, where, columns)
            )
    path.write_text(json.dumps(scenes))
    data = DriveLM.pick({"name": "drivelm", "root": str(tmp_path), "on_bad_row": "skip"}, "data")
    rows = data.load_scenes("train", lambda scene: True)
    good = tuple(row for row in expected if isinstance(row, Example))
    assert rows.examples == good
    assert (rows.examples[-1], rows.examples[3:9], len(rows.examples)) == (good[-1], good[3:9], len(good))
    assert rows.skipped == tuple(row for row in expected if isinstance(row, str))
    for first in (3, 6, 18, 30):  # from a scene on, so that the first fault is another one
        kept = {f"s{count}" for count in range(first, 20)}
        faults = [
            str(row) for row in expected if isinstance(row, str) and f"{row.split('/f')[0]}".split(": ")[1] in kept
        ]
        if faults:
            with pytest.raises(DataError) as raised:
                data.model_copy(update={"on_bad_row": "fail"}).load_scenes("train", kept.__contains__)
            assert str(raised.value) == faults[0]
    assert len({message.split(": ")[-1] for message in rows.skipped}) > 4
