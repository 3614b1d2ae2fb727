"""Results in one file, and results as shares of the ceiling."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from fedmllm.core.errors import FedmllmError
from fedmllm.reports.archive import pack_results
from fedmllm.reports.reading import read_results
from fedmllm.reports.shares import about_shares, share_table, share_text
from fedmllm.reports.write import markdown, write_report
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.suites.suite import Suite
from support.made_up import write_run

CEILINGS = {"all": 0.9, "image": 0.75}
SUITE = """
title = "made up"
[base]
data = "synthetic-verdict"
num_rounds = 2
evaluate = { visible = ["all", "image"] }
[matrix]
seeds = [0, 1]
seed_keys = ["seed", "data.seed"]
[matrix.settings]
"whole" = {}
"half" = { scenario = { name = "missing", rate = 0.5 } }
[matrix.methods]
"FedAvg" = { aggregator = "fedavg" }
"FedAdam" = { aggregator = "fedadam" }
"""


def set_rows(run: Path, **values: float) -> None:
    """AUC by visibility, and the ceilings."""
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["rows"]:
        if row["metric"] == "auc":
            row |= {"value": values[row["visible"]], "ceiling": CEILINGS[row["visible"]]}
    (run / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "suite.toml").write_text(SUITE)
    suite = Suite.load(folder / "suite.toml")
    suite.save(folder)
    for cell in suite.cells:
        write_run(folder / cell.run_id, cell.experiment)
        seed, half = int(cell.labels["seeds"]), cell.labels["settings"] == "half"
        set_rows(folder / cell.run_id, all=0.74 + 0.04 * seed - 0.08 * half, image=0.7 if seed else 0.65)
    return folder


def test_a_share_is_between_chance_and_the_ceiling_and_over_settings_then_seeds(suite: Path):
    dataset = read_results([suite]).datasets[0]
    table = share_table(dataset)
    assert table is not None
    assert table.ceilings == CEILINGS
    whole = table.rows["FedAvg"]["all"]  # per seed the mean of whole and half: 0.70, 0.74
    assert (whole.mean, whole.n) == (pytest.approx((0.5 + 0.6) / 2), 2)
    assert whole.std == pytest.approx(0.1 / 2**0.5)
    assert table.rows["FedAdam"]["image"].mean == pytest.approx((0.6 + 0.8) / 2)
    assert share_text(whole) == "0.55 ± 0.07"
    assert "(AUC - 0.5) / (ceiling - 0.5)" in about_shares(table, 2)
    assert "| FedAvg | 0.55 ± 0.07 | 0.70 ± 0.14 |" in markdown(read_results([suite]))


def test_runs_of_another_law_have_no_common_share(suite: Path, tmp_path: Path):
    pack_results(suite, tmp_path / "kept.tar.xz")
    with tarfile.open(tmp_path / "kept.tar.xz") as archive:
        archive.extractall(tmp_path / "copy", filter="data")
    run = next(path.parent for path in (tmp_path / "copy").glob("*/summary.json"))
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["rows"]:
        row.pop("ceiling", None)
    (run / "summary.json").write_text(json.dumps(summary))
    assert share_table(read_results([tmp_path / "copy"]).datasets[0]) is None


def test_an_archive_gives_the_report_of_its_folder_and_continues_as_a_suite(suite: Path, tmp_path: Path):
    out = tmp_path / "kept.tar.xz"
    (suite / "half-done").mkdir(exist_ok=True)
    assert pack_results(suite, out) == 8
    before = out.read_bytes()
    pack_results(suite, out)
    assert out.read_bytes() == before
    (suite / "suite.json").rename(tmp_path / "suite.json")
    assert pack_results(suite, tmp_path / "bare.tar.xz") == 8  # runs without a suite
    (tmp_path / "suite.json").rename(suite / "suite.json")
    pages = []
    for source, name in ((suite, "folder"), (out, "archive")):
        paths = write_report([source], tmp_path / f"{name}.html")
        pages.append([path.read_bytes() for path in paths])
    assert pages[0] == pages[1]
    with tarfile.open(out) as archive:
        archive.extractall(tmp_path / "runs", filter="data")
    cells = Suite.load(suite / "suite.toml").cells
    assert all(RunFolder(tmp_path / "runs" / cell.run_id).is_finished for cell in cells)


def test_messages_name_the_archive_and_not_the_folder_that_it_was_unpacked_into(suite: Path, tmp_path: Path):
    out = tmp_path / "v0.1.tar.xz"
    pack_results(suite, out)
    assert {run.folder for run in read_results([out]).runs} == {
        out / path.parent.name for path in suite.glob("*/summary.json")
    }
    assert write_report([out])[0] == tmp_path / "v0.1.html"
    with tarfile.open(out, "w:xz") as archive:
        for name in ("record.jsonl", "summary.json"):
            member = tarfile.TarInfo(f"run/{name}")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"?"))
    with pytest.raises(FedmllmError, match=re.escape(f"{out / 'run'}: not a run's record and summary")):
        read_results([out])


def test_a_bad_archive_is_named(suite: Path, tmp_path: Path):
    bad = tmp_path / "bad.tar.xz"
    bad.write_bytes(b"nothing")
    with pytest.raises(FedmllmError, match=r"bad.tar.xz: not an archive of results"):
        read_results([bad])
    pack_results(suite, bad)
    bad.write_bytes(bad.read_bytes()[:2000])
    with pytest.raises(FedmllmError, match=r"bad.tar.xz: not an archive of results"):
        read_results([bad])
    with tarfile.open(bad, "w:xz") as archive:
        member = tarfile.TarInfo("../summary.json")
        archive.addfile(member, io.BytesIO())
    with pytest.raises(FedmllmError, match="outside the archive"):
        read_results([bad])
    with pytest.raises(FedmllmError, match=r"ends with \.tar\.xz"):
        pack_results(suite, tmp_path / "kept.zip")
    with pytest.raises(FedmllmError, match="no finished run"):
        pack_results(tmp_path, tmp_path / "none.tar.xz")
