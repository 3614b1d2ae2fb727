"""Every way in, with strange inputs: those that once broke it (tests/corpus/) and new ones. The long run: scripts/fuzz.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from fuzz_targets import TARGETS, Target, survives  # noqa: E402


class Accepted(Exception):
    """One is enough."""


CORPUS = sorted(path for path in (ROOT / "tests" / "corpus").glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_broke_it_is_refused_with_our_own_error(path: Path, tmp_path: Path) -> None:
    (target,) = [target for target in TARGETS if target.name == path.parent.name]
    survives(target, path.read_bytes(), tmp_path / "case")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_but_our_own_error_comes_out(target: Target, tmp_path: Path) -> None:
    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        survives(target, data.draw(target.inputs), tmp_path / "case")

    attempt()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_good_input_is_accepted(target: Target, tmp_path: Path) -> None:
    """Else the fuzzing would only ever see the first check."""

    @settings(
        max_examples=3000,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def attempt(content: bytes) -> None:
        if survives(target, content, tmp_path / "case"):
            raise Accepted

    with pytest.raises(Accepted):
        attempt()
