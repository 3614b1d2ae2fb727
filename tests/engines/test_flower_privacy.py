"""Row-level privacy at a site: its own key, its own ledger, and what it refuses."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedmllm.algorithms.objectives import AdaptiveFedProx
from fedmllm.algorithms.privacy.accounting import gaussian_epsilon
from fedmllm.algorithms.privacy.client_dp import ClientDp
from fedmllm.algorithms.privacy.row_dp import RowDp
from fedmllm.cli.main import app
from fedmllm.core.errors import FedmllmError, Reason
from fedmllm.core.tensors import flatten, manifest_digest
from fedmllm.flower.request import Request
from fedmllm.flower.site.config import Refused, Site, state_folder
from fedmllm.flower.site.ledger import LEDGER_MARK, Entry, Ledger, spent
from fedmllm.flower.site.plausibility import moving_steps, suppressed_updates
from fedmllm.flower.site.process import _refusal
from fedmllm.flower.site.trainer import Trainer
from support.token_attack import ONE_ROW, OPEN, STEPS, adapter, ask, recovered, request_of, trainer

PRIVATE = RowDp(name="row-dp", noise_multiplier=2.0, clip=0.5)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trainer(tmp_path_factory.mktemp("open"), OPEN)


def private(there: Trainer, train: dict[str, Any], **changes: Any) -> Request:
    return request_of(there, train, **{"privacy": PRIVATE, **changes})


def test_words_cannot_be_recovered_from_a_noisy_step(there: Trainer) -> None:
    request = private(there, ONE_ROW)  # the crafted adapter, one step of one row: without noise all words are found
    delta = ask(there, request, adapter(there, request, a=0.0, b=1e-11))
    assert recovered(there, request, delta) < 0.5


def test_noise_is_the_site_s_own_and_a_repeated_request_repeats_it(there: Trainer) -> None:
    request = private(there, STEPS)
    start = there.backbone(request).lora()
    first, again = ask(there, request, start), ask(there, request, start)
    assert all(torch.equal(first[name], again[name]) for name in first)
    before = len(there.ledger.entries())
    nudged = {name: t + 1e-4 for name, t in start.items()}
    other = ask(there, request, nudged)  # independent noise, so the difference of the two is noise as well
    assert max(float((first[name] - other[name]).abs().max()) for name in first) > 1e-4
    assert len(there.ledger.entries()) == before + 1  # what was asked twice counts twice
    assert (there.site.name, there._key.stat().st_mode & 0o777) == ("north", 0o600)


@pytest.fixture
def limited(tmp_path: Path) -> Trainer:
    return trainer(tmp_path, f"max_epsilon = {gaussian_epsilon(2.0, 3, 1e-5) + 0.01}")


def test_a_request_over_the_budget_is_refused_before_a_model_is_built(limited: Trainer, tmp_path: Path) -> None:
    experiment = request_of(limited, STEPS, privacy=PRIVATE)
    start = limited.backbone(experiment).lora()
    for run_id in ("a" * 12, "b" * 12, "c" * 12):  # over all runs
        ask(limited, experiment.model_copy(update={"run_id": run_id}), start)
    restarted = Trainer(limited.site, tmp_path)
    with pytest.raises(Refused, match=r"epsilon would pass allow\.max_epsilon$") as refused:
        ask(restarted, experiment, start)
    assert Reason.of(refused.value).here == "4.377 at delta 1e-05, spent so far 3.709, limit 3.71863"
    assert restarted.num_loads == 0
    assert len(restarted.ledger.entries()) == 3
    quiet = experiment.model_copy(update={"privacy": PRIVATE.model_copy(update={"noise_multiplier": 1e4})})
    ask(restarted, quiet, start)  # what is left of the budget can be spent


def test_a_request_that_is_refused_for_its_model_or_adapter_spends_nothing(limited: Trainer) -> None:
    request = private(limited, STEPS)
    start = limited.backbone(request).lora()
    with pytest.raises(Refused, match="base model 000000000000 is not the one here"):
        ask(limited, request.model_copy(update={"base": "0" * 64}), start)
    with pytest.raises(Refused, match="RMS relative to an untrained one is 100"):
        ask(limited, request, {n: 100 * t for n, t in start.items()})
    with pytest.raises(Refused, match="manifest"):
        ask(limited, request, dict(list(start.items())[1:]))
    assert limited.ledger.entries() == []
    ask(limited, request, start)
    assert len(limited.ledger.entries()) == 1


def test_metrics_about_the_content_of_rows_stay_at_the_site(there: Trainer) -> None:
    """A row's length is a number about it, to which no noise is added."""
    for request, names in (
        (private(there, STEPS), {"num_steps"}),
        (request_of(there, STEPS), {"loss", "num_steps", "num_tokens", "time_s"}),
    ):
        start = there.backbone(request).lora()
        _, about = there.train(request, flatten(start).numpy(), manifest_digest(start))
        assert set(about["metrics"]) == names


def test_a_lost_ledger_is_not_an_empty_one(limited: Trainer, tmp_path: Path) -> None:
    request = private(limited, STEPS)
    start = limited.backbone(request).lora()
    clipping = private(limited, STEPS, privacy=PRIVATE.model_copy(update={"noise_multiplier": 0.0}))
    open_there = trainer(tmp_path, "")
    ask(open_there, clipping, start)
    ask(open_there, request, start)
    ask(open_there, request, start)
    (tmp_path / "privacy.jsonl").unlink()
    with pytest.raises(FedmllmError, match=r"privacy\.jsonl: missing, but .*noise\.key was used"):
        ask(Trainer(limited.site, tmp_path), request, start)


def test_what_a_site_with_a_limit_refuses(limited: Trainer) -> None:
    request = private(limited, STEPS)
    reasons = {
        'privacy is "none"': {"privacy": request_of(limited, STEPS).privacy},
        "simulate_noise = True": {"privacy": PRIVATE.model_copy(update={"simulate_noise": True})},
        "noise_multiplier = 0": {"privacy": PRIVATE.model_copy(update={"noise_multiplier": 0.0})},
        "client-dp is not for a site": {"privacy": ClientDp(name="client-dp", noise_multiplier=1.0, clip=1.0)},
        "fedprox-adaptive depends on the rows": {"objective": AdaptiveFedProx()},
        "names no column of groups (data.group)": {"privacy": PRIVATE.model_copy(update={"unit": "group"})},
    }
    for reason, changes in reasons.items():
        assert reason in limited.site.refuse(request.model_copy(update=changes), 2, 100)
    assert limited.site.refuse(request, 2, 100) == ""
    assert "not below 1 / number of its rows" in limited.site.refuse(request, 2, 100_000)


def test_a_damaged_ledger_stops_the_site_and_the_verb_prints_it(tmp_path: Path) -> None:
    there = trainer(tmp_path, "max_epsilon = 3.0")
    path = tmp_path / "site-state" / "privacy.jsonl"
    assert Ledger(path).charge(Entry("a" * 12, 1, 2.0, 1, 0.0), 3.0, 1e-5) == ""
    said = CliRunner().invoke(app, ["site", "ledger", str(tmp_path / "site.toml")]).output
    assert f"run {'a' * 12}: 1 requests, epsilon {gaussian_epsilon(2.0, 1, 1e-5):.4g}" in said
    assert "at delta 1e-05 per row; limit 3" in said
    path.write_text('{"run_id": "a"}\n')
    with pytest.raises(FedmllmError, match=r"privacy\.jsonl: cannot be read"):
        Ledger(path).charge(Entry("a" * 12, 2, 2.0, 1, 0.0), 3.0, 1e-5)
    assert there.site.allow.max_epsilon == 3.0


def test_a_ledger_counts_one_unit(tmp_path: Path) -> None:
    """Rows that are clipped one by one say nothing about the epsilon of a patient with several."""
    trainer(tmp_path, "max_epsilon = 3.0")
    ledger = Ledger(tmp_path / "site-state" / "privacy.jsonl")
    patient = Entry("a" * 12, 1, 2.0, 1, 0.0, "group 'patient'")
    assert ledger.charge(patient, 3.0, 1e-5) == ""
    refused = ledger.charge(replace(patient, unit="row"), 3.0, 1e-5)
    assert refused == "privacy.unit: this site's ledger counts epsilon for another unit than row"
    assert len(ledger.entries()) == 1
    said = CliRunner().invoke(app, ["site", "ledger", str(tmp_path / "site.toml")]).output
    assert "at delta 1e-05 per group 'patient'; limit 3" in said


def test_a_site_clips_and_counts_its_own_patients(tmp_path: Path) -> None:
    lines = [f"p{i % 6},note {i},Is it so?,{('yes', 'no')[i % 2]}" for i in range(24)]
    (tmp_path / "rows.csv").write_text("\n".join(["patient,note,question,answer", *lines]) + "\n")
    head = 'name = "north"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\n'
    data = (
        f'[data]\nname = "table"\nroot = "{tmp_path}"\ntrain = "rows.csv"\ngroup = "patient"\nchoices = ["no", "yes"]\n'
    )
    columns = 'columns = { question = "question", answer = "answer", text = "note" }\n'
    allow = "[allow]\nmax_epsilon = 9.0\nmin_rows_per_step = 2\n"
    (tmp_path / "site.toml").write_text(head + data + columns + allow)
    there = Trainer(Site.load(tmp_path / "site.toml"), tmp_path)
    request = request_of(there, STEPS, privacy=PRIVATE.model_copy(update={"unit": "group"}))
    start = there.backbone(request).lora()
    reply, about = there.train(request, flatten(start).numpy(), manifest_digest(start))
    assert about["metrics"]["num_steps"] == 2  # of six patients, four a step
    assert all(bool(tensor.any()) for name, tensor in reply.items() if "lora_B" in name)
    assert [entry.unit for entry in there.ledger.entries()] == ["group 'patient'"]
    with pytest.raises(Refused, match="counts epsilon for another unit than row"):
        ask(there, request.model_copy(update={"privacy": PRIVATE}), start)


# ---- one ledger for the same rows


def ledger_of(folder: Path, name: str, more: str = "", part: str = "", root: str = "rows") -> Ledger:
    """The ledger of a site file of its own over the rows in `folder`/rows, as it names them from `root`."""
    (folder / "rows").mkdir(exist_ok=True)
    head = f'name = "{name}"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "site.key"\n{more}\n{part}\n'
    columns = 'question = "question", answer = "answer", text = "note"'
    data = f'[data]\nname = "table"\nroot = "{folder / root}"\ntrain = "train.csv"\ncolumns = {{ {columns} }}\n'
    path = folder / f"{name}.toml"
    path.write_text(f"{head}{data}[allow]\nmax_epsilon = 3.0\n")
    state = state_folder(path)
    return Ledger.of(Site.load(path), state, state / "noise.key")


def charged(ledger: Ledger, most: float | None = 3.0, noise_multiplier: float = 2.0, when: float = 1e9) -> str:
    return ledger.charge(Entry("a" * 12, 1, noise_multiplier, 1, when), most, 1e-5)


def test_two_site_files_over_the_same_rows_cannot_spend_a_budget_each(tmp_path: Path) -> None:
    first = ledger_of(tmp_path, "first")
    assert charged(first) == ""
    with pytest.raises(
        FedmllmError, match=r"these rows have the ledger .*first-state/privacy\.jsonl, and this site file"
    ):
        charged(ledger_of(tmp_path, "second"))
    with pytest.raises(FedmllmError, match="these rows have the ledger"):  # a part of them
        charged(ledger_of(tmp_path, "second", part='column = "ward"\nvalue = "A"'))
    common = ledger_of(tmp_path, "second", 'ledger = "first-state/privacy.jsonl"')
    assert charged(common) == ""
    assert len(first.entries()) == 2
    assert charged(common) == "epsilon would pass allow.max_epsilon"


def test_sites_with_different_rows_of_one_file_have_a_ledger_each(tmp_path: Path) -> None:
    wards = [ledger_of(tmp_path, ward, part=f'column = "ward"\nvalue = "{ward}"') for ward in ("A", "B")]
    assert [charged(ledger) for ledger in wards] == ["", ""]
    assert [len(ledger.entries()) for ledger in wards] == [1, 1]
    with pytest.raises(FedmllmError, match="these rows have the ledger"):
        charged(ledger_of(tmp_path, "all"))


@pytest.mark.parametrize("roots", [("rows", "."), (".", "rows"), ("rows", "link")])
def test_rows_that_are_named_from_another_folder_have_the_same_ledger(tmp_path: Path, roots: tuple[str, str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    first, second = roots
    assert charged(ledger_of(tmp_path, "first", root=first)) == ""
    with pytest.raises(FedmllmError, match=r"these rows have the ledger .*first-state/privacy\.jsonl"):
        charged(ledger_of(tmp_path, "second", root=second))
    assert {path.parent.resolve() for path in tmp_path.rglob(LEDGER_MARK)} == {(tmp_path / first).resolve()}
    assert charged(ledger_of(tmp_path, "second", 'ledger = "first-state/privacy.jsonl"', root=second)) == ""


def test_rows_of_folders_side_by_side_have_a_ledger_each(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert charged(ledger_of(tmp_path, "first")) == ""
    assert charged(ledger_of(tmp_path, "second", root="other")) == ""


@pytest.mark.parametrize("root", ["rows", "."])
def test_no_site_file_without_a_limit_answers_in_the_clear_about_rows_with_a_budget(tmp_path: Path, root: str) -> None:
    assert charged(ledger_of(tmp_path, "first")) == ""
    second = ledger_of(tmp_path, "second", root=root)
    with pytest.raises(FedmllmError, match="these rows have the ledger"):
        charged(second, None, 0.0)
    assert second.entries() == []
    common = ledger_of(tmp_path, "second", 'ledger = "first-state/privacy.jsonl"', root=root)
    assert charged(common, None, 0.0) == ""  # counted where the budget is, which ends it
    assert "answered requests without noise" in charged(ledger_of(tmp_path, "first"))


def test_a_marked_ledger_that_is_gone_and_rows_that_cannot_be_marked_stop_the_site(tmp_path: Path) -> None:
    assert charged(ledger_of(tmp_path, "first")) == ""
    (tmp_path / "first-state" / "privacy.jsonl").unlink()
    with pytest.raises(FedmllmError, match=r"privacy\.jsonl: missing, but .*\.fedmllm-ledger names it"):
        charged(ledger_of(tmp_path, "first"))
    (tmp_path / "rows" / LEDGER_MARK).unlink()
    (tmp_path / "rows" / LEDGER_MARK).mkdir()
    with pytest.raises(FedmllmError, match=r"fedmllm-ledger: cannot be written"):
        charged(ledger_of(tmp_path, "first"))
    (tmp_path / "rows" / LEDGER_MARK).rmdir()
    (tmp_path / "rows" / LEDGER_MARK).write_text('[{"ledger": 1}]')
    with pytest.raises(FedmllmError, match=r"fedmllm-ledger: cannot be read"):
        charged(ledger_of(tmp_path, "first"))


def test_requests_without_noise_are_counted_and_no_budget_holds_after_them(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, "first")
    assert charged(ledger, None, 0.0, when=1e9) == ""  # before the site had a budget
    assert not (tmp_path / "rows" / LEDGER_MARK).exists()  # nothing is written next to rows that have no budget
    assert "answered requests without noise" in charged(ledger)
    since = date(2020, 1, 1)
    entry = Entry("b" * 12, 1, 2.0, 1, time.time())
    assert ledger.charge(entry, 3.0, 1e-5, since) == ""
    assert (len(ledger.entries()), len(ledger.entries(since))) == (2, 1)
    assert spent(ledger.entries(), 1e-5) == float("inf")


def test_a_request_in_the_clear_is_in_the_ledger(there: Trainer) -> None:
    before = len(there.ledger.entries())
    request = request_of(there, STEPS)
    ask(there, request, there.backbone(request).lora())
    assert [e.noise_multiplier for e in there.ledger.entries()[before:]] == [0.0]


# ---- what a refusal gives away


def test_a_row_that_is_too_long_is_no_answer_with_row_dp(there: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"max_tokens": 3}  # no row has as few: without row-dp the request fails, and the server knows
    request = private(there, STEPS, **short)
    start = there.backbone(request).lora()
    with pytest.raises(FedmllmError, match="over max_tokens"):
        ask(there, request_of(there, STEPS, **short), start)
    delta = ask(there, request, start)
    assert all(bool(tensor.any()) for name, tensor in delta.items() if "lora_B" in name)  # noise alone
    assert "a row counts as zeros: FedmllmError: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("train", "moving"),
    [
        ({"step_schedule": "constant"}, 3),
        ({"step_schedule": "cosine"}, 3),
        ({"step_schedule": "cosine-reference"}, 2),  # the first step is at rate 0
        ({"step_schedule": "constant", "weight_decay": 1000.0}, 1),  # lr x decay = 1: the last step alone is left
    ],
)
def test_only_steps_that_a_delta_shows_are_counted(there: Trainer, train: dict[str, Any], moving: int) -> None:
    request = request_of(there, {**STEPS, **train, "max_steps": 3})
    assert moving_steps(request.train, 1e-3, 3) == moving
    assert moving_steps(request.train, 0.0, 3) == 0
    strict = there.site.model_copy(update={"allow": there.site.allow.model_copy(update={"min_steps": 3})})
    refused = strict.refuse(request, 3, 100, moving)
    assert ("fewer optimiser steps that move the adapter than allow.min_steps = 3" in refused) == (moving < 3)


def test_a_refusal_has_no_number_of_the_rows_and_the_site_s_log_has(tmp_path: Path) -> None:
    there = trainer(tmp_path, "min_rows_per_step = 50\nmin_steps = 40\nmax_steps = 45\nmin_movement = 0.9")
    rows, steps = 731, 37
    request = request_of(there, {**STEPS, "batch_size": 2000})
    reason = there.site.refuse(request, steps, 20, steps)
    assert "allow.min_steps = 40; fewer rows per optimiser step than allow.min_rows_per_step = 50" in reason
    assert reason.here == "37 of 37 steps; 20 rows per step"
    assert not {"37", "20", str(rows)} & set(re.findall(r"\d+", reason))
    assert there.site.refuse(request, 46, rows).here == "46 steps"
    delta, start = {"w": torch.full((4,), 1e-7)}, {"w": torch.ones(4)}
    (moved,) = suppressed_updates(delta, start, request.train, 1e-3, 2, 0.9)
    assert (str(moved), moved.here[:7]) == (
        "w: moved by less than allow.min_movement = 0.9 allows; such a change is proportional to the gradient",
        "0.00015",
    )
    content, line = _refusal(Reason("too much", "17 rows"))
    assert content["about"]["refused"] == "too much"
    assert line == "too much (here: 17 rows)"
