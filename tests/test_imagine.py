"""The generator of picture features: what is learned, what travels, what is filled, and refusals."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedmllm.backbones.base import Tiny
from fedmllm.cli.display import show_table
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.core.rng import torch_stream
from fedmllm.core.tensors import num_bytes, tree_map
from fedmllm.core.text import bytes_text
from fedmllm.core.types import Example, Params, Round
from fedmllm.data.prompts import Plain
from fedmllm.reports.reading import read_results
from fedmllm.reports.tables import costs
from fedmllm.reports.write import write_report
from fedmllm.runs.inputs import Inputs
from fedmllm.runs.result import load_run
from fedmllm.runs.run import run
from fedmllm.scenarios.assign import assign
from fedmllm.scenarios.modalities.completion import Completer, Completion, CompletionSite
from fedmllm.scenarios.modalities.generators import Component, _orthonormal, _whitening
from fedmllm.scenarios.modalities.imagine import Imagine, _vectors
from fedmllm.testing import check_completion, examples, leak_probe
from support.runs import Stop, events, experiment

MODALITIES = ("image", "text")
TEXT = frozenset({"text"})
AT = Round(1, 0, 1, (0, 1), 2)
CVAE = {"name": "imagine", "rounds": 1, "steps": 3}
SHORT = [Imagine(kind="mean")] + [Imagine(kind=kind, rounds=1, steps=3) for kind in ("cvae", "gan", "flow")]


@pytest.fixture(scope="module")
def site() -> CompletionSite:
    return CompletionSite(Tiny().load(seed=0), (), MODALITIES, 0)


@pytest.fixture(scope="module")
def drawn() -> tuple[Example, ...]:
    return Experiment.parse({"data": {"name": "synthetic-verdict", "num_train": 300}}).data.load("train").examples[:300]


def learned(completion: Imagine, site: CompletionSite, rows: tuple[Example, ...]) -> CompletionSite:
    params = completion.start(site)
    for number in range(1, completion.num_rounds() + 1):
        delta, _, _ = completion.learn(site, rows, params, replace(AT, number=number), 0)
        params = tree_map(torch.add, params, delta)
    return replace(site, learned=params)


@pytest.mark.parametrize("completion", SHORT, ids=lambda c: c.kind)
def test_a_learned_generator_keeps_the_rules(completion: Imagine, site, tmp_path, monkeypatch):
    rows = examples(tmp_path)[:8]
    ready = learned(completion, site, tuple(rows))
    monkeypatch.setattr(
        Imagine, "prepare", lambda self, s, before=Imagine.prepare: before(self, replace(s, learned=ready.learned))
    )
    check_completion(completion, ready.model, rows)  # type: ignore[arg-type]
    filled, present = Completer(completion, ready)(rows[0], TEXT, True)
    assert present == set(MODALITIES)
    other, _ = Completer(completion, ready)(replace(rows[0], answer="yes"), TEXT, True)
    assert filled.fields["image"] != other.fields["image"]  # the answer counts
    assert Completer(completion, ready)(rows[0], frozenset({"image"}), True)[0] is rows[0]  # a text is not filled


def test_sums_of_clients_are_those_of_all_rows(site, drawn):
    """kind "mean": the weighted mean of the clients' sums is the sum over the pooled rows, whatever the partition."""
    completion = Imagine(kind="mean")
    start, rows = completion.start(site), drawn[:30]
    whole, count, _ = completion.learn(site, rows, start, AT, 0)
    assert count == 30
    parts = [completion.learn(site, part, start, AT, k) for k, part in enumerate((rows[:7], rows[7:12], rows[12:]))]
    mean: Params = {n: sum(c * d[n] for d, c, _ in parts) / 30 for n in whole}  # type: ignore[misc]
    assert all(torch.allclose(mean[n], whole[n], rtol=1e-4, atol=1e-5) for n in whole)


def test_the_regression_recovers_what_is_linear(site, drawn, monkeypatch):
    completion = Imagine(kind="mean", ridge=1e-6)
    c, f = completion._sizes(site)
    matrix = torch.randn(c, f, generator=torch.Generator().manual_seed(0))
    real = {row.id: completion._condition(site, row, row.answer) @ matrix for row in drawn[:200]}
    monkeypatch.setattr(
        "fedmllm.scenarios.modalities.imagine._vectors", lambda site, row, modality: real[row.id].view(8, -1)
    )
    completer = Completer(completion, learned(completion, site, drawn[:200]))
    for row in drawn[:3]:
        (path,) = completer(row, TEXT, True)[0].fields["image"]
        made = site.model.picture_vectors(path).flatten()
        assert torch.allclose(made, real[row.id], rtol=0, atol=0.02 * float(real[row.id].abs().max()))


@pytest.mark.parametrize("kind", ["flow", "gan"])
def test_components_are_those_of_the_pooled_rows(kind, site, drawn):
    """Clients that multiply their own covariances find the pooled rows' leading directions and variances."""
    completion, parts = Imagine(kind=kind, components=16), (drawn[:10], drawn[10:50], drawn[50:120])
    params = completion.start(site)
    for number in range(1, Component.measured_rounds + 1):
        found = [completion.learn(site, part, params, replace(AT, number=number), k) for k, part in enumerate(parts)]
        assert all(set(delta) == set(params) for delta, _, _ in found)
        params = {n: t + sum(count * delta[n] for delta, count, _ in found) / 120 for n, t in params.items()}
    f = torch.stack([_vectors(site, row, "image").flatten() for row in drawn[:120]]).double()
    mean, (_, values, directions) = f.mean(0), torch.linalg.svd(f - f.mean(0), full_matrices=False)
    assert torch.allclose(params["moment.mean"].double(), mean, rtol=0, atol=1e-4)
    basis = _orthonormal(params["component.span"]).double()
    assert torch.allclose(basis.T @ basis, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
    kept = ((f - mean) @ basis).square().sum() / values[:16].square().sum()
    assert 0.95 < kept < 1 + 1e-6  # of the variance of the best sixteen directions
    assert torch.allclose(params["component.variance"].double(), ((f - mean) @ basis).square().mean(0), rtol=1e-3)
    assert ((directions[:1] @ basis).norm()) > 0.99


def test_a_flow_without_velocity_draws_normal_noise(site, drawn):
    """v = 0: a draw's components are the noise itself, of the row's own stream."""
    params = learned(Imagine(kind="flow", rounds=1, steps=1), site, drawn[:60]).learned
    still = {n: torch.zeros_like(t) if n.startswith("velocity") else t for n, t in params.items()}
    flow = Imagine(kind="flow")._generator(site)
    condition = Imagine()._condition(site, drawn[0], drawn[0].answer)
    draws = torch.stack([flow.component(still, condition, torch_stream(0, "row", i)) for i in range(500)])  # type: ignore[attr-defined]
    assert torch.equal(draws[7], torch.randn(32, generator=torch_stream(0, "row", 7)))
    whole = flow.drawing(still)(condition, torch_stream(0, "row", 7))
    assert torch.allclose(_whitening(still)(whole[None])[0], draws[7], rtol=0, atol=1e-3)
    assert abs(float(draws.std()) - 1) < 0.02


@pytest.mark.parametrize("kind", ["mean", "cvae", "flow", "gan"])
def test_pictures_that_do_not_differ_are_what_is_drawn(kind, site, drawn):
    """No spread of the features, no spread of the draws: the scale of the noise is that of the features."""
    rows = [replace(row, fields={**row.fields, "image": drawn[0].fields["image"]}) for row in drawn[:4]]
    completion = Imagine(kind=kind, **({} if kind == "mean" else {"rounds": 1, "steps": 3}))
    draw = completion._generator(site).drawing(learned(completion, site, tuple(rows)).learned)
    real = _vectors(site, drawn[0], "image").flatten()
    made = [draw(completion._condition(site, rows[0], rows[0].answer), torch_stream(0, "row", i)) for i in range(5)]
    spread = torch.stack(made).std(0).max()
    assert spread <= 1e-2 * real.std()
    assert all(torch.allclose(f, real, rtol=0, atol=1e-2 * float(real.std())) for f in made if kind != "mean")


@pytest.mark.parametrize("kind", ["flow", "gan"])
def test_draws_follow_the_condition(kind, site, drawn):
    """Draws for an answer are nearer to real pictures of that answer than to those of the other one, on average."""
    completion = Imagine(kind=kind, rounds=2, steps=60, components=8)
    draw = completion._generator(site).drawing(learned(completion, site, drawn[:200]).learned)
    real = {row.id: _vectors(site, row, "image").flatten() for row in drawn}
    made = {
        row.id: draw(completion._condition(site, row, row.answer), torch_stream(0, "row", row.id))
        for row in drawn[200:]
    }

    def means(features: dict[Any, torch.Tensor], rows: tuple[Example, ...]) -> torch.Tensor:
        yes, no = ([features[r.id] for r in rows if (r.answer == r.choices[0]) == first] for first in (True, False))
        return torch.stack(yes).mean(0) - torch.stack(no).mean(0)

    assert float(torch.cosine_similarity(means(made, drawn[200:]), means(real, drawn[:200]), dim=0)) > 0.5
    assert all(torch.isfinite(t).all() for t in made.values())


def test_settings_of_other_kinds_are_refused():
    with pytest.raises(ConfigError, match='completion: latent: got 4, without effect for kind "flow"; it is for: cvae'):
        Completion.pick({"name": "imagine", "kind": "flow", "latent": 4}, "completion")
    assert Imagine(kind="flow", latent=16) == Imagine(kind="flow")  # a default does no harm: a dump names all settings
    assert "components" not in Imagine().identity()  # which the run ids of earlier experiments do not know


def test_the_model_reads_imagined_vectors(site, drawn):
    completer = Completer(Imagine(kind="mean"), learned(Imagine(kind="mean"), site, drawn[:50]))
    filled, present = completer(drawn[60], TEXT, True)
    (path,) = filled.fields["image"]
    row = site.model.encode(Plain().render(filled, present), "yes")  # type: ignore[attr-defined]
    real = site.model.encode(Plain().render(drawn[60], present), "yes")  # type: ignore[attr-defined]
    assert row.num_tokens == real.num_tokens  # it takes the place of a picture
    assert row.image_key != real.image_key
    assert torch.equal(site.model.picture_vectors(path), row.imagined[0])
    losses = [site.model.loss(site.model.collate([r]))[0].detach() for r in (row, real)]  # type: ignore[attr-defined]
    assert float((losses[0] - losses[1]).abs()) > 1e-4


def two_pictures(folder: Path, rows: int = 40) -> dict[str, Any]:
    """A table whose rows have two pictures and a note, as an experiment reads it."""
    for i, colour in enumerate(("red", "blue", "white", "black")):
        Image.new("RGB", (40, 30 + 10 * i), colour).save(folder / f"{i}.png")
    for split in ("train", "test"):
        lines = [f"{i},{i % 4}.png,{(i + 1) % 4}.png,note {i},{('no', 'yes')[i % 2]}" for i in range(rows)]
        (folder / f"{split}.csv").write_text("\n".join(["id,mri,xray,note,label", *lines]))
    columns = {"id": "id", "image": {"mri": "mri", "xray": "xray"}, "text": "note", "answer": "label"}
    splits = {split: f"{split}.csv" for split in ("train", "test")}
    return {
        "name": "table",
        "root": str(folder),
        **splits,
        "question": "Is it so?",
        "choices": ["no", "yes"],
        "columns": columns,
    }


def test_one_of_two_pictures_is_imagined(site, tmp_path: Path):
    """The other one stays what the tower gives for it, before and behind the imagined one."""
    data = Experiment.parse({"data": two_pictures(tmp_path)}).data
    rows, three = data.load("train").examples, ("mri", "xray", "text")
    completion = Imagine(kind="mean", picture="mri")
    completer = Completer(completion, learned(completion, replace(site, modalities=three), tuple(rows)))
    filled, present = completer(rows[0], frozenset({"xray", "text"}), True)
    assert present == set(three)
    (made,), (real,) = filled.fields["mri"], filled.fields["xray"]
    assert real == rows[0].fields["xray"][0]
    row = site.model.encode(Plain().render(filled, present), "yes")  # type: ignore[attr-defined]
    both = site.model.features.vectors(row)  # type: ignore[attr-defined]
    own = [site.model.picture_vectors(path) for path in (made, real)]
    assert torch.equal(both[: len(own[0])], own[0])
    assert torch.allclose(both[len(own[0]) :], own[1], rtol=0, atol=1e-4)  # computed in one pass with a blank picture


@pytest.mark.parametrize("picture", ["mri", "xray"])
def test_rows_of_two_pictures_train_by_both_engines(picture: str, tmp_path: Path):
    table = {**TABLE, "num_rounds": 1, "data": two_pictures(tmp_path), "completion": {**CVAE, "picture": picture}}
    table["train"] = {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 4}
    runs = [run(experiment(**table, engine=name), tmp_path / name) for name in ("stacked", "in-process")]
    hidden = next(note for note in events(tmp_path / "stacked", "experiment")[0]["notes"] if "hidden" in note)
    assert all(f"x {modality}" in hidden for modality in ("mri", "xray", "text"))
    stacked, other = (result.adapter.tensors for result in runs)
    assert all(torch.allclose(t, other[n], rtol=0, atol=1e-4) for n, t in stacked.items())


def test_one_camera_of_six_is_imagined(tmp_path: Path):
    driving = {"name": "synthetic-driving", "num_train": 24, "num_validation": 4, "num_test": 4}
    completion = {**CVAE, "picture": "CAM_FRONT", "text": "speed"}
    table = {**TABLE, "num_rounds": 1, "data": driving, "completion": completion}
    result = run(experiment(**{**table, "scenario": {"name": "missing", "rate": 0.1}}), tmp_path / "run")
    assert all(t.isfinite().all() for t in result.adapter.tensors.values())


def test_the_answer_counts_only_where_it_should(site, drawn):
    """`own` draws for the row's answer, `any` reads it neither in learning nor in drawing, `random` draws one for each row."""
    other = [replace(row, answer=next(c for c in row.choices if c != row.answer)) for row in drawn]

    def pictures(answer: str, rows: Sequence[Example], known: Sequence[Example] = drawn[:60]) -> list[Any]:
        completion = Imagine(kind="mean", answer=answer)  # type: ignore[arg-type]
        completer = Completer(completion, learned(completion, site, tuple(known)))
        return [completer(row, TEXT, True)[0].fields["image"] for row in rows]

    rows, others = drawn[60:80], other[60:80]
    assert all(a != b for a, b in zip(pictures("own", rows), pictures("own", others), strict=True))
    assert pictures("any", rows) == pictures("any", others)
    assert pictures("any", rows) == pictures("any", rows, other[:60])  # learned without the answers
    random = pictures("random", rows)
    assert random == pictures("random", others)
    assert random == pictures("random", rows[::-1])[::-1]  # of the row's own stream
    same = [a == b for a, b in zip(random, pictures("own", rows), strict=True)]
    assert 0 < sum(same) < len(same)  # some draws are the row's own answer


def test_controls_of_the_answer_have_names_and_run_ids(tmp_path: Path):
    assert "answer" not in Imagine().identity()  # which the run ids of earlier experiments do not know
    assert Imagine(answer="any").label() == "imagine(answer=any)"
    for answer in ("any", "random"):
        table = {**TABLE, "num_rounds": 1, "completion": {**CVAE, "answer": answer}}
        result = run(experiment(**table), tmp_path / answer)
        assert all(t.isfinite().all() for t in result.adapter.tensors.values())


def test_it_leaks_and_says_so(site, drawn):
    completion = Imagine(kind="mean")
    leak = leak_probe(replace_site(completion, learned(completion, site, drawn[:200])), site.model, drawn[200:260])[
        "image"
    ]
    assert completion.leaks
    assert leak.filled > leak.real + 0.05


def replace_site(completion: Imagine, ready: CompletionSite) -> Imagine:
    class Ready(Imagine):
        name: Any

        def prepare(self, site: CompletionSite):
            return super().prepare(ready)

    return Ready(**completion.model_dump())


TABLE: dict[str, Any] = {"num_rounds": 2, "scenario": {"name": "missing", "rate": 0.4}, "completion": CVAE}


@pytest.fixture(scope="module")
def imagined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagined") / "run"
    run(experiment(**TABLE), folder)
    return folder


@pytest.mark.parametrize(("kind", "stop"), [("gan", ("completion_round", 4)), ("flow", ("round", 1))])
def test_other_kinds_travel_the_same_way(kind: str, stop: tuple[str, int], tmp_path: Path, site):
    """Counted rounds before training, the same bytes of an adapter after a stop, and the same result by both engines."""
    completion = {"name": "imagine", "kind": kind, "rounds": 1, "steps": 2}
    table = {**TABLE, "num_rounds": 1, "completion": completion}
    size = num_bytes(Completion.pick(completion, "completion").start(site))  # type: ignore[attr-defined]
    run(experiment(**table), tmp_path / "stacked")
    rounds = events(tmp_path / "stacked", "completion_round")
    assert [(e["round"], e["up_bytes"], e["down_bytes"]) for e in rounds] == [
        (i, 3 * size, 3 * size) for i in range(1, 7)
    ]
    run(experiment(**table, engine="in-process"), tmp_path / "in-process")
    with pytest.raises(KeyboardInterrupt):
        run(experiment(**table), tmp_path / "again", [Stop(*stop)])
    run(experiment(**table), tmp_path / "again", resume=True)
    assert len(events(tmp_path / "again", "completion_round")) == 6  # none is counted twice
    stacked, other, again = (load_run(tmp_path / name).adapter.tensors for name in ("stacked", "in-process", "again"))
    assert all(torch.allclose(t, other[n], rtol=0, atol=1e-4) for n, t in stacked.items())
    assert all(torch.equal(t, again[n]) for n, t in stacked.items())


def test_what_travels_is_counted(imagined: Path, site):
    size = num_bytes(Imagine(**{k: v for k, v in CVAE.items() if k != "name"}).start(site))
    rounds = events(imagined, "completion_round")
    assert [(e["round"], e["num_rounds"], len(e["clients"])) for e in rounds] == [(1, 2, 3), (2, 2, 3)]
    assert all(e["up_bytes"] == e["down_bytes"] == 3 * size for e in rounds)
    row = load_run(imagined).rows[0]
    assert row["completion_up_bytes"] == row["completion_down_bytes"] == 6 * size
    assert row["up_bytes"] == sum(e["up_bytes"] for e in events(imagined, "round"))  # of training alone
    assert any("can give their answers away" in note for note in events(imagined, "experiment")[0]["notes"])


def test_bytes_before_training_are_in_what_a_run_sent(imagined: Path, tmp_path: Path, capsys):
    """A column of their own, and part of the bytes of all runs, of the end of `run` and of the page."""
    row = load_run(imagined).rows[0]
    before = row["completion_up_bytes"] + row["completion_down_bytes"]
    trained = row["up_bytes"] + row["down_bytes"]
    assert min(before, trained) > 0
    (cost,) = costs(read_results([imagined]).datasets[0])
    assert (cost.before_training_bytes, cost.total_bytes) == (before, before + trained)
    assert cost.completion_s == row["completion_s"] > 0
    write_report([imagined], tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    assert "| before training |" in text
    assert f"{bytes_text(before + trained)} sent." in text
    assert f"{bytes_text(before + trained)} sent" in (tmp_path / "report.html").read_text()
    (line,) = csv.DictReader((tmp_path / "report-costs.csv").read_text().splitlines())
    assert float(line["completion_up_bytes"]) == pytest.approx(row["completion_up_bytes"], rel=1e-5)
    show_table([row])
    assert bytes_text(before + trained) in capsys.readouterr().out


def test_resume_and_engines(imagined: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(experiment(**TABLE), tmp_path / "run", [Stop("round", 2)])
    run(experiment(**TABLE), tmp_path / "run", resume=True)
    run(experiment(**TABLE, engine="in-process"), tmp_path / "in-process")
    tensors = [load_run(folder).adapter.tensors for folder in (imagined, tmp_path / "run", tmp_path / "in-process")]
    assert all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    assert all(torch.allclose(t, tensors[2][n], rtol=0, atol=1e-4) for n, t in tensors[0].items())
    assert (
        load_run(tmp_path / "run").rows[0]["completion_up_bytes"] == load_run(imagined).rows[0]["completion_up_bytes"]
    )
    assert len(events(tmp_path / "run", "completion_round")) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine": "flower-simulation"}, "learned before training; allowed: in-process, stacked"),
        ({"method": "local"}, "which all clients learn together"),
        ({"completion": {**CVAE, "kind": "mean"}}, 'rounds: got 1, without effect for kind "mean"'),
        ({"completion": {**CVAE, "picture": "scan"}}, "completion.picture: got 'scan'; the rows have image, text"),
        (
            {
                "privacy": {"name": "client-dp", "noise_multiplier": 1.0, "clip": 0.1},
                "update_filter": {"on_bad_update": "drop_client"},
                "cohort": "poisson",
            },
            "before training",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_when_it_is_read(changed: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        experiment(**{**TABLE, **changed})
    assert message in str(error.value)


def few_rows(least: int, some: int) -> Experiment:
    """An experiment of which one client has one complete row and `some` others have more; the first seed that draws it."""
    table = {
        **TABLE,
        "num_rounds": 1,
        "scenario": {"name": "missing", "rate": 0.5},
        "partition": {"name": "iid", "num_clients": 4},
    }
    table["completion"] = {**CVAE, "least_rows": least}
    for seed in range(200):
        counts = _complete(found := experiment(**table, seed=seed))
        if counts.count(1) == 1 and sum(count > 1 for count in counts) == some:
            return found
    raise AssertionError("no seed draws such clients")


def test_a_client_with_one_complete_row_sends_nothing_before_training(tmp_path: Path):
    """Its moments would be those of the row itself. The others learn the generator, and the record says who does not."""
    e = few_rows(2, some=3)
    run(e, tmp_path / "run")
    rounds = events(tmp_path / "run", "completion_round")
    left_out = _complete(e).index(1)
    assert all(left_out not in [c["client"] for c in r["clients"]] and len(r["clients"]) == 3 for r in rounds)
    note = "completion imagine: 1 of 4 clients with complete rows have fewer than 2 and take no part in learning it"
    assert note in events(tmp_path / "run", "experiment")[0]["notes"]


def test_the_least_number_of_rows_is_a_setting(tmp_path: Path):
    run(few_rows(1, some=3), tmp_path / "run")
    assert {len(r["clients"]) for r in events(tmp_path / "run", "completion_round")} == {4}
    assert not any("take no part" in note for note in events(tmp_path / "run", "experiment")[0]["notes"])
    assert "least_rows" not in Imagine().identity()  # which the run ids of earlier experiments do not know


def test_a_client_below_the_least_number_returns_no_change(site, drawn):
    start = Imagine(kind="mean").start(site)
    delta, count, _ = Imagine(kind="mean").learn(site, drawn[:1], start, AT, 0)
    assert count == 0
    assert not any(t.any() for t in delta.values())
    assert Imagine(kind="mean", least_rows=1).learn(site, drawn[:1], start, AT, 0)[1] == 1


@pytest.mark.parametrize(
    ("least", "fault"),
    [
        (
            20,
            r"no client has 20 complete rows to learn it from, the least that may take part \(least_rows\); the most is \d+;",
        ),
        (1, "one complete row together, and what is learned from it is a copy of it"),
    ],
)
def test_too_few_complete_rows_are_refused(least: int, fault: str, monkeypatch):
    table = {**TABLE, "completion": {**CVAE, "least_rows": least}}
    if least == 1:
        table["scenario"] = {"name": "missing", "rate": 0.97}
        table["seed"] = next(n for n in range(40) if sum(_complete(experiment(**table, seed=n))) == 1)
    monkeypatch.setattr(Tiny, "load", lambda self, seed: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=fault):
        Inputs.load(experiment(**table))


def _complete(e: Experiment) -> list[int]:
    """Complete rows of each client."""
    shards = assign(e.data.load("train").examples, e.data.modalities(), e.partition, e.scenario, e.seed)
    return [sum(len(visible) == 2 for visible in shard.visible) for shard in shards]


def test_without_a_complete_row_nothing_is_loaded():
    cross = experiment(**{**TABLE, "scenario": {"name": "cross", "num_image_clients": 1}})
    with pytest.raises(
        ConfigError, match=r"no client has a complete row to learn it from; set public.rows and public.client"
    ):
        Inputs.load(cross)
