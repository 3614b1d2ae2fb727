"""No test reaches the network; `shared` is the folder of fixtures next to the checkout, if it exists."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # one core a worker: threads that wait for each other's turn cost ten times
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`; a test that needs it is skipped where the checkout stands alone."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the fixtures in ../shared are missing")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write tests/golden/ again, to be reviewed as a diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text is that of the file tests/golden/NAME, which `pytest --regenerate` writes."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--regenerate"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        assert path.is_file(), f"no golden file {name}: run pytest --regenerate and review it"
        assert text == path.read_text(encoding="utf-8")

    return check
