"""No test reaches the network; `shared` is the folder of fixtures beside the checkout, where there is one."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`; a test that needs it is skipped where the checkout stands alone."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("fixtures beside the checkout (../shared) are not here")
    return folder
