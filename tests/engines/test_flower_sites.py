"""A real federation on loopback: SuperLink, three sites, TLS, keys. `scripts/flower_trial.py` holds these and more cases."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

SCRIPT = Path(__file__).parents[2] / "scripts" / "flower_trial.py"
BACKBONE = 'name = "tiny"'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="child processes end with their parent on Linux only"),
    pytest.mark.xdist_group("flower-sites"),
]


@pytest.fixture(scope="module")
def trial():
    spec = importlib.util.spec_from_file_location("flower_trial", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_sites_give_the_bytes_of_one_process_and_load_the_base_once(trial):
    assert "1 load a site" in trial.same_bytes(BACKBONE)


def test_what_a_site_does_not_allow_is_refused_and_the_reason_is_in_the_record(trial):
    assert "refused by site" in trial.refusals(BACKBONE)


def test_bad_updates_are_left_out_of_the_sum_and_named(trial):
    assert "NaN" in trial.bad_updates(BACKBONE)
