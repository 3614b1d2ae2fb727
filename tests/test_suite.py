"""A suite expands to the experiments that its file says, and runs them so that nothing finished is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.reports.reading import read_suite
from fedmllm.runs.events import RoundEnd
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.record import read
from fedmllm.runs.suites.scheduler import CellState, Job, assign_cell, poll, run_suite, start_workers
from fedmllm.runs.suites.suite import Suite, merge_tables

ROOT = Path(__file__).parents[1]
SMALL = """
title = "small"
[base]
data = { name = "synthetic-irony", num_train = 40, num_validation = 10, num_test = 12 }
partition = { name = "dirichlet", alpha = 5.0, num_clients = 3 }
train = { lr = 1e-3, batch_size = 4, accumulation = 1, max_steps = 2 }
num_rounds = 3
evaluate = { every = 1, visible = ["both", "image"] }
[matrix]
seeds = [0, 1]
[matrix.settings]
"whole" = {}
"half" = { scenario = { name = "missing", rate = 0.5 } }
[matrix.methods]
"Zero-shot" = { method = "zero-shot" }
"FedAdam" = { aggregator = "fedadam" }
"""
FOUR = SMALL.replace(
    "seeds = [0, 1]", "seeds = [0]"
)  # cells, where processes are started: each imports torch for seconds


def file(folder: Path, text: str, name: str = "suite.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_cells_are_the_product_in_the_order_of_the_file_one_seed_after_the_other(tmp_path: Path):
    suite = Suite.load(file(tmp_path, SMALL))
    assert [cell.label for cell in suite.cells[:5]] == [
        "whole · Zero-shot · 0",
        "whole · FedAdam · 0",
        "half · Zero-shot · 0",
        "half · FedAdam · 0",
        "whole · Zero-shot · 1",
    ]
    assert len(suite.cells) == 2 * 2 * 2
    half = suite.cells[-1].experiment
    assert (half.scenario.name, half.aggregator.name, half.seed, half.num_rounds) == ("missing", "fedadam", 1, 3)


def test_another_name_replaces_a_table_and_the_same_name_changes_it():
    table = {"aggregator": {"name": "fedadam", "lr": 1.0}}
    assert merge_tables(table, {"aggregator": {"lr": 2.0}}) == {"aggregator": {"name": "fedadam", "lr": 2.0}}
    assert merge_tables(table, {"aggregator": {"name": "fedavg"}}) == {"aggregator": {"name": "fedavg"}}
    assert merge_tables({"aggregator": "fedadam"}, {"aggregator": {"lr": 2.0}}) == {
        "aggregator": {"name": "fedadam", "lr": 2.0}
    }


def test_a_file_extends_another_axis_by_axis_and_skips(tmp_path: Path):
    file(tmp_path, SMALL, "below.toml")
    above = """
extends = "below.toml"
[base]
num_rounds = 2
[matrix.methods]
"FedAvg" = {}
"FedYogi" = { aggregator = "fedyogi" }
[[matrix.skip]]
methods = ["FedAvg"]
settings = ["half"]
"""
    suite = Suite.load(file(tmp_path, above))
    assert {cell.label for cell in suite.cells} == {
        f"{s} · {m} · {k}" for s, m in (("whole", "FedAvg"), ("whole", "FedYogi"), ("half", "FedYogi")) for k in (0, 1)
    }
    assert {cell.experiment.num_rounds for cell in suite.cells} == {2}


def test_equal_experiments_stand_once(tmp_path: Path):
    twice = SMALL + '"FedAdam again" = { aggregator = { name = "fedadam", lr = 1e-3 } }\n'
    suite = Suite.load(file(tmp_path, twice))
    assert (len(suite.cells), suite.left_out) == (8, ())  # the same settings to the last: nothing is lost


def test_cells_that_differ_only_in_how_they_run_are_named(tmp_path: Path):
    from typer.testing import CliRunner

    from fedmllm.cli.main import app

    engines = SMALL.replace('"half" = {', '"in process" = { engine = "in-process" }\n"half" = {')
    path = file(tmp_path, engines)
    suite = Suite.load(path)
    assert len(suite.cells) == 8
    assert [(left.cell.label, left.kept.label) for left in suite.left_out[:2]] == [
        ("in process · Zero-shot · 0", "whole · Zero-shot · 0"),
        ("in process · FedAdam · 0", "whole · FedAdam · 0"),
    ]
    assert "engine.name" in suite.left_out[0].keys
    done = CliRunner().invoke(app, ["suite", str(path), "--dry-run", "--out", str(tmp_path / "out")])
    assert f"{path}: 4 cells differ from an earlier one only in settings that do not change results" in done.stderr
    assert "  in process · FedAdam · 1 (kept: whole · FedAdam · 1)" in done.stderr.splitlines()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_rounds = 3", "num_round = 3"), "num_round: unknown key; allowed: .*did you mean 'num_rounds'"),
        (("rate = 0.5", "rate = 1.5"), "scenario.rate: got 1.5"),
        (("seeds = [0, 1]", 'seeds = ["a"]'), "matrix.seeds: got .*whole numbers"),
        (("[matrix.settings]", "[matrix.settings]\nx = 3"), "matrix.settings: got .*label = "),
        (
            ("[base]", "[bas]"),
            "bas: unknown key; allowed: title, extends, imports, base, matrix, claims; did you mean 'base'",
        ),
        (('title = "small"', 'title = "small'), "not a TOML file"),
        (('title = "small"', 'extends = "suite.toml"'), "extends itself"),
        (('title = "small"', 'extends = "none.toml"'), "none.toml: cannot be read: No such file"),
        (("seeds = [0, 1]", "skip = 3"), "matrix.skip: got 3; give tables"),
        (("seeds = [0, 1]", "skip = [3]"), "matrix.skip 1: got 3; give a table"),
        (("seeds = [0, 1]", 'skip = [{ methods = "Zero-shot" }]'), "skip 1: methods: got 'Zero-shot'; give a list"),
        (("seeds = [0, 1]", "skip = [{ method = [] }]"), "skip 1: method: no such axis; .*did you mean 'methods'"),
        (("[base]", "[[base]]"), r"base: got \[.*; give a table"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(tmp_path: Path, change: tuple[str, str], message: str):
    path = file(tmp_path, SMALL.replace(*change))
    with pytest.raises(ConfigError, match=message) as error:
        Suite.load(path)
    assert "toml" in str(error.value)


CLAIM = """
[[claims]]
higher = { methods = "FedAdam" }
lower = { methods = "Zero-shot", settings = ["whole", "half"] }
visible = "image"
"""


def test_claims_are_checked_against_the_labels_and_reach_the_report(tmp_path: Path):
    suite = Suite.load(file(tmp_path, SMALL + CLAIM))
    suite.save(tmp_path)
    (claim,) = read_suite(tmp_path / "suite.json")[2]
    lower = {"methods": ["Zero-shot"], "settings": ["whole", "half"]}
    assert claim == {"visible": "image", "higher": {"methods": ["FedAdam"]}, "lower": lower}
    child = file(tmp_path, 'extends = "suite.toml"\n[matrix.methods]\n"FedAvg" = {}\n', "child.toml")
    assert Suite.load(child).claims == ()  # claims are about the labels of their own file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('"FedAdam" }', '"FedAdan" }'),
            "claims 1: higher: methods = 'FedAdan': no such label; known: Zero-shot, FedAdam",
        ),
        (("higher =", "above ="), "claims 1: above: unknown key"),
        (("lower = { methods", "text = { methods"), "claims 1: lower: missing"),
        (('visible = "image"', "visible = 3"), "claims 1: visible: got 3; give a text"),
        (('"image"', '"imag"'), "claims 1: visible: got 'imag'; the cells have: both, image; did you mean 'image'"),
        (("visible =", "metric ="), "claims 1: metric: got 'image'; the cells have: auc, auc_hard, accuracy"),
        (("[[claims]]", "[claims]"), "claims: got .*; give tables"),
    ],
)
def test_a_bad_claim_is_refused(tmp_path: Path, change: tuple[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        Suite.load(file(tmp_path, SMALL + CLAIM.replace(*change)))


def test_an_unknown_label_in_skip_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="skip 1: methods = 'FedAvg': no such label; known: Zero-shot, FedAdam"):
        Suite.load(file(tmp_path, SMALL + '[[matrix.skip]]\nmethods = ["FedAvg"]\n'))


def test_seeds_can_be_skipped_as_other_labels_can(tmp_path: Path):
    text = SMALL + '[[matrix.skip]]\nmethods = ["FedAdam"]\nseeds = [1]\n'
    left = [(c.labels["methods"], c.labels["seeds"]) for c in Suite.load(file(tmp_path, text)).cells]
    assert sorted(set(left)) == [("FedAdam", "0"), ("Zero-shot", "0"), ("Zero-shot", "1")]


def test_a_matrix_that_is_no_table_is_refused_in_a_file_that_extends_another(tmp_path: Path):
    file(tmp_path, SMALL, "below.toml")
    with pytest.raises(ConfigError, match=r"suite.toml: matrix: got 3; give a table"):
        Suite.load(file(tmp_path, 'extends = "below.toml"\nmatrix = 3\n'))


@pytest.mark.parametrize(
    ("name", "cells"), [("hateful-memes", 792), ("crisismmd", 792), ("medical", 396), ("as-published", 720)]
)
def test_the_published_benchmark_is_complete(name: str, cells: int):
    # settings x methods x strategies x seeds, less zero-shot with an objective: 12*6*4*3 - 12*2*3
    assert len(Suite.load(ROOT / f"experiments/paper/{name}.toml").cells) == cells


def test_the_tiny_matrix_is_twelve_by_six_by_three():
    suite = Suite.load(ROOT / "experiments/tiny/irony.toml")
    assert len(suite.cells) == 12 * 6 * 3
    assert all(cell.experiment.backbone.name == "tiny" for cell in suite.cells)


class Seen:
    """A display that keeps what it was seen."""

    def __init__(self) -> None:
        self.cells: list[tuple[str, str]] = []
        self.most_jobs = 0

    def update(self, state: CellState) -> None:
        self.most_jobs = max(self.most_jobs, sum(1 for job in state.jobs if job.cell))

    def finished(self, cell, seconds, error) -> None:
        self.cells.append((cell.label, error))


def test_two_processes_give_the_bytes_of_one(tmp_path: Path):
    from fedmllm.runs.run import run

    suite, seen = Suite.load(file(tmp_path, FOUR)), Seen()
    state = run_suite(suite, tmp_path / "out", 2, 1, 10**12, seen)
    assert (state.finished, state.kept, state.failed) == (4, 0, {})
    assert seen.most_jobs == 2
    cell = suite.cells[-1]
    run(cell.experiment, tmp_path / "alone")
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / cell.run_id / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    assert not (tmp_path / "out" / cell.run_id / "checkpoints").exists()
    again = Seen()
    state = run_suite(suite, tmp_path / "out", 2, 1, 10**12, again)
    assert (state.finished, state.kept, again.cells) == (4, 4, [])


def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path: Path):
    bad = FOUR.replace(
        '"Zero-shot" = { method = "zero-shot" }', '"Lost" = { data = { name = "hateful-memes", root = "/no" } }'
    )
    state = run_suite(Suite.load(file(tmp_path, bad)), tmp_path / "out", 1, 1, 10**12, Seen())
    assert (state.finished, len(state.failed)) == (2, 2)
    assert "DataError: /no: no such folder" in state.failed["whole · Lost · 0"]


def test_a_process_that_dies_is_named_and_its_work_goes_on(tmp_path: Path):
    class Killer(Seen):
        def update(self, state: CellState) -> None:
            job = next((j for j in state.jobs if j.cell and isinstance(j.event, RoundEnd)), None)
            if job and not self.most_jobs:
                self.most_jobs = 1
                os.kill(job.process.pid, signal.SIGKILL)

    suite = Suite.load(file(tmp_path, FOUR))
    state = run_suite(suite, tmp_path / "out", 1, 1, 10**12, Killer())
    assert (state.finished, len(state.failed)) == (3, 1)
    assert "exit code -9" in next(iter(state.failed.values()))
    state = run_suite(suite, tmp_path / "out", 1, 1, 10**12, Seen())
    assert (state.finished, state.kept, state.failed) == (4, 3, {})


def test_a_process_that_dies_between_two_cells_costs_none(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=theirs.close)
    process.start()
    theirs.close()
    process.join()
    job = Job(process, ours)
    cells = list(Suite.load(file(tmp_path, SMALL)).cells)
    state = CellState(waiting=cells, jobs=[job])
    assert not assign_cell(job, cells[0], tmp_path)
    poll(state, Seen())
    assert (state.jobs, state.failed, len(state.waiting)) == ([], {}, 8)


def test_ctrl_c_says_how_to_go_on_and_leaves_readable_records(tmp_path: Path):
    path, out = file(tmp_path, SMALL.replace("num_rounds = 3", "num_rounds = 500")), tmp_path / "out"
    command = [sys.executable, "-m", "fedmllm.cli", "suite", str(path), "--out", str(out), "--threads", "1"]

    def heard() -> None:  # a shell's background jobs, and what they start, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    suite = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard
    )
    deadline = time.monotonic() + 120
    while not any('"round"' in r.read_text() for r in out.glob("*/record.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(suite.pid, signal.SIGINT)  # as a terminal does: to the suite and its processes
    _, errors = suite.communicate(timeout=60)
    assert suite.returncode == 130
    assert "the same command resumes with the unfinished cells" in errors
    assert "Traceback" not in errors
    for record in out.glob("*/record.jsonl"):
        assert list(read(record))


def test_a_killed_suite_goes_on_and_two_in_one_folder_are_refused(tmp_path: Path):
    path, out = file(tmp_path, FOUR), tmp_path / "out"
    command = [sys.executable, "-m", "fedmllm.cli", "suite", str(path), "--out", str(out), "--threads", "1"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("*/summary.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(FedmllmError, match="another suite is running here"):
        run_suite(Suite.load(path), out, 1, 1, 10**12, Seen())
    first.kill()
    first.wait()
    kept = len(list(out.glob("*/summary.json")))
    state = run_suite(Suite.load(path), out, 1, 1, 10**12, Seen())
    assert state.finished == 4
    assert state.kept >= kept >= 1
    assert len(json.loads((out / "suite.json").read_text())["cells"]) == 4


def test_runs_of_another_suite_in_the_folder_are_seen(tmp_path: Path):
    from typer.testing import CliRunner

    from fedmllm.cli.main import app

    path, out = file(tmp_path, SMALL), tmp_path / "out"
    for name in (Suite.load(path).cells[0].run_id, "0123456789ab"):
        (out / name).mkdir(parents=True)
        RunFolder(out / name).write_rows([{"value": 0.5, "wall_s": 30.0}])
    seen = CliRunner().invoke(app, ["suite", str(path), "--dry", "--out", str(out)])
    assert seen.exit_code == 0
    assert "also holds 1 finished runs that are not cells of" in seen.stderr
    *cells, counts, _ = seen.stdout.splitlines()
    assert ["finished" in line for line in cells] == [True] + [False] * 7
    assert counts == "cells: 8, finished: 1, to run: 7"


def plan(path: Path, out: Path, *options: str) -> list[str]:
    """The last two lines of a dry run: cells and time."""
    from typer.testing import CliRunner

    from fedmllm.cli.main import app

    done = CliRunner().invoke(app, ["suite", str(path), "--dry-run", "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()[-2:]


def test_a_dry_run_estimates_the_time_from_finished_cells_of_the_same_method(tmp_path: Path):
    path, out = file(tmp_path, SMALL), tmp_path / "out"
    assert plan(path, out) == [
        "cells: 8, finished: 0, to run: 8",
        "estimated time: unknown: no cell of these methods is finished",
    ]
    cells = Suite.load(path).cells
    for cell, wall_s in ((cells[1], 90.0), (cells[3], 110.0)):  # both with FedAdam and seed 0
        (out / cell.run_id).mkdir(parents=True)
        RunFolder(out / cell.run_id).write_rows([{"value": 0.5, "wall_s": wall_s}])
    assert plan(path, out)[1] == "estimated time: more than 3:20: unknown for 4 cells (zero-shot)"
    only = ["--only", "fedadam", "--only", "HAL"]
    assert plan(path, out, *only) == ["cells: 2, finished: 1, to run: 1", "estimated time: 1:40"]
    assert (
        plan(path, out, "--only", "FedAdam", "--jobs", "2")[1] == "estimated time: 1:40"
    )  # two cells of 100 s at once
    assert plan(path, out, *only, "--only", "0") == ["cells: 1, finished: 1, to run: 0", "estimated time: 0:00"]


def test_only_matches_whole_labels_before_parts_and_lists_the_labels_if_nothing_fits(tmp_path: Path):
    text = SMALL.replace('"whole" = {}', '"alpha 0.1" = {}').replace('"half" =', '"alpha 0.1 half" =')
    suite = Suite.load(file(tmp_path, text))
    assert [cell.label for cell in suite.select(["ALPHA 0.1", "1", "adam"])] == ["alpha 0.1 · FedAdam · 1"]
    assert len(suite.select(["alpha"])) == len(suite.select([])) == 8
    labels = "settings: alpha 0.1, alpha 0.1 half; methods: Zero-shot, FedAdam; seeds: 0, 1"
    with pytest.raises(
        ConfigError, match=f"--only: got 'FedYogi', which is not in any label; labels of small: {labels}"
    ):
        suite.select(["half", "FedYogi"])
    with pytest.raises(ConfigError, match=f"no cell has a label for each of 'FedAdam', 'zero'; .*{labels}"):
        suite.select(["FedAdam", "zero"])
    with pytest.raises(ConfigError, match="got ' ', which is not in any label"):
        suite.select([" "])


def test_chosen_cells_run_with_a_tracker_each_and_the_folder_keeps_the_labels_of_all(tmp_path: Path):
    """Both cells run in one process; MLflow's address of the first must not receive the second."""
    pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    suite = Suite.load(file(tmp_path, SMALL))
    chosen, out = suite.select(["Zero-shot", "0"]), tmp_path / "out"
    state = run_suite(suite, out, 1, 1, 10**12, Seen(), chosen, ["mlflow"])
    assert (state.finished, state.failed) == (2, {})
    for cell in chosen:
        with sqlite3.connect(out / cell.run_id / "mlflow.db") as base:
            assert base.execute("select name, status from runs").fetchall() == [(cell.run_id, "FINISHED")]
    assert len(json.loads((out / "suite.json").read_text())["cells"]) == 8


def test_an_unknown_tracker_is_refused_before_anything_runs(tmp_path: Path):
    from typer.testing import CliRunner

    from fedmllm.cli.main import app

    path, out = file(tmp_path, SMALL), tmp_path / "out"
    done = CliRunner().invoke(app, ["suite", str(path), "--out", str(out), "--track", "tensorbord"])
    assert isinstance(done.exception, ConfigError)
    assert "did you mean 'tensorboard'" in str(done.exception)
    assert not out.exists()


def test_no_further_process_is_started_over_the_memory_budget():
    working = Job(process=None, pipe=None, host_bytes=3 * 10**9, has_computed=True)
    state = CellState(waiting=[None, None], jobs=[working])
    start_workers(state, num_jobs=4, num_threads=1, budget_bytes=5 * 10**9)
    assert len(state.jobs) == 1
    assert "1 of 4 jobs" in state.note
    working.has_computed = False  # its memory is not known yet
    state.note = ""
    start_workers(state, num_jobs=4, num_threads=1, budget_bytes=10**12)
    assert (len(state.jobs), state.note) == (1, "")


def test_expected_time_goes_by_method(tmp_path: Path):
    cells = list(Suite.load(file(tmp_path, SMALL)).cells)
    assert CellState(waiting=cells).left_s() is None
    state = CellState(waiting=cells, seconds={"zero-shot": [1.0], "fedadam": [9.0, 11.0]})
    assert state.left_s() == pytest.approx(4 * 1.0 + 4 * 10.0)


def test_where_the_first_cells_all_fail_the_rest_is_not_tried(tmp_path: Path):
    bad = SMALL.replace('data = { name = "synthetic-irony", num_train = 40, num_validation = 10, num_test = 12 }', "")
    bad = bad.replace("[base]", '[base]\ndata = { name = "hateful-memes", root = "/no" }')
    state = run_suite(Suite.load(file(tmp_path, bad)), tmp_path / "out", 1, 1, 10**12, Seen())
    assert (state.finished, len(state.failed), len(state.waiting)) == (0, 5, 3)
