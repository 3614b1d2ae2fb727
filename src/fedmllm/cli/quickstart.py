"""`fedmllm quickstart`: the suite `quickstart.toml` and one table of its results."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fedmllm.cli.display import show_table
from fedmllm.cli.suite_display import SuiteTable
from fedmllm.core.errors import FedmllmError
from fedmllm.core.machine import usable_bytes, usable_cores
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.suites.scheduler import run_suite
from fedmllm.runs.suites.suite import Suite

QUICKSTART_SUITE = Path(__file__).with_name("quickstart.toml")


def run_quickstart(out: Path | None) -> list[dict[str, Any]]:
    """Run every method in every scenario and print one table; records go to `out` (default runs/quickstart-TIME).

    A model of a million weights gains more from a second process than from a second thread, so each core gets a run.
    """
    folder = out or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    suite, began = Suite.load(QUICKSTART_SUITE), time.perf_counter()
    with SuiteTable(len(suite.cells)) as table:
        state = run_suite(suite, folder, usable_cores(), 1, int(0.8 * usable_bytes()), table)
    if state.failed:
        raise FedmllmError("\n".join(f"{label}: {reason}" for label, reason in state.failed.items()))
    rows: list[dict[str, Any]] = []
    for cell in suite.cells:
        rows += RunFolder(folder / cell.run_id).read_rows()
    RunFolder(folder).write_rows(rows)
    show_table(rows, headline_only=True)
    print(f"{len(suite.cells)} runs in {time.perf_counter() - began:.0f} s; records and adapters: {folder}")
    print(f"a page of it: fedmllm report {folder}")
    return rows
