"""Row-level privacy at a site: its own key, its own ledger, and what it refuses."""

from __future__ import annotations

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
from fedmllm.core.errors import FedmllmError
from fedmllm.flower.request import Request
from fedmllm.flower.site.config import Refused
from fedmllm.flower.site.ledger import Ledger
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
    with pytest.raises(Refused, match=r"epsilon would be 4\.377 at delta 1e-05; spent so far 3\.709; this site allows"):
        ask(restarted, experiment, start)
    assert restarted.num_loads == 0
    assert len(restarted.ledger.entries()) == 3
    quiet = experiment.model_copy(update={"privacy": PRIVATE.model_copy(update={"noise_multiplier": 1e4})})
    ask(restarted, quiet, start)  # what is left of the budget can be spent


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
    }
    for reason, changes in reasons.items():
        assert reason in limited.site.refuse(request.model_copy(update=changes), 2, 100)
    assert limited.site.refuse(request, 2, 100) == ""
    assert "not below 1 / number of its rows" in limited.site.refuse(request, 2, 100_000)


def test_a_damaged_ledger_stops_the_site_and_the_verb_prints_it(tmp_path: Path) -> None:
    there = trainer(tmp_path, "max_epsilon = 3.0")
    path = tmp_path / "site-state" / "privacy.jsonl"
    assert Ledger(path).charge("a" * 12, 1, 2.0, 1, 3.0, 1e-5) == ""
    said = CliRunner().invoke(app, ["site", "ledger", str(tmp_path / "site.toml")]).output
    assert f"run {'a' * 12}: 1 requests, epsilon {gaussian_epsilon(2.0, 1, 1e-5):.4g}" in said
    assert "at delta 1e-05 per row; limit 3" in said
    path.write_text('{"run_id": "a"}\n')
    with pytest.raises(FedmllmError, match=r"privacy\.jsonl: cannot be read"):
        Ledger(path).charge("a" * 12, 2, 2.0, 1, 3.0, 1e-5)
    assert there.site.allow.max_epsilon == 3.0
