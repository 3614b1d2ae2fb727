"""Run ids of existing experiments: unchanged by renamed keys and moved modules."""

from __future__ import annotations

import json
import tarfile
import warnings
from pathlib import Path

import pytest

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError
from fedmllm.runs.suites.suite import Suite

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/run_ids.json").read_text(encoding="utf-8"))  # made by the code of release 0.1


@pytest.mark.parametrize("name", GOLDEN["suites"])
def test_cells_of_every_suite_keep_their_run_ids(name: str) -> None:
    path = ROOT / name if "/" in name else ROOT / "src/fedmllm/cli" / name
    table = path.read_text(encoding="utf-8")
    if "[matrix" in table or "extends" in table:
        assert {cell.label: cell.run_id for cell in Suite.load(path).cells} == GOLDEN["suites"][name]
    else:
        assert Experiment.load(path).run_id() == GOLDEN["suites"][name][""]


def test_the_cells_of_the_published_vlm_results_keep_their_run_ids() -> None:
    """Rows are drawn otherwise in the suite that easy_vqa.toml extends, and methods were added there."""
    with tarfile.open(ROOT / "results/easy-vqa-vlm.tar.xz") as archive:
        published = json.load(archive.extractfile("suite.json"))["cells"]  # type: ignore[arg-type]
    now = {cell.label: cell.run_id for cell in Suite.load(ROOT / "experiments/real/easy_vqa.toml").cells}
    before = {" · ".join(cell["labels"].values()): cell["run_id"] for cell in published}
    assert len(before) == 18
    assert {label: now[label] for label in before} == before
    spread = {cell.run_id for cell in Suite.load(ROOT / "experiments/real/easy_vqa-spread.toml").cells}
    assert spread.isdisjoint(before.values())


def test_the_cells_of_vqa_rad_keep_their_run_ids() -> None:
    """Those that there were before a server optimizer and the question prior were added."""
    now = {cell.label: cell.run_id for cell in Suite.load(ROOT / "experiments/real/vqa_rad.toml").cells}
    before = {
        "Majority": "1512c27a4023 52c17a23eae7 667cfbb2d49a",
        "Zero-shot": "e1f72b523e4a fa80c2042aae b53f071f86f5",
        "Local": "6697a2e95dc1 a20a0347861e 24b7f596840a",
        "FedAvg": "f61ee1dc9c50 b20ef6aa375e 04b7df8f9d29",
        "Centralised": "ff853233b013 a856b81ec1f0 f518ccdd0815",
    }
    for method, ids in before.items():
        assert [now[f"{method} · {seed}"] for seed in range(3)] == ids.split()
    assert {label.split(" · ")[0] for label in now} - before.keys() == {"FedAdam", "Question prior"}


@pytest.mark.parametrize("case", GOLDEN["experiments"], ids=lambda case: json.dumps(case["table"])[:80])
def test_members_keep_their_run_ids(case: dict[str, object]) -> None:
    assert Experiment.parse(case["table"]).run_id() == case["run_id"]  # type: ignore[arg-type]


def test_an_old_key_means_its_new_name(tmp_path: Path) -> None:
    old, new = ({"data": "synthetic-irony", key: {"max_norm": 2.0}} for key in ("screen", "update_filter"))
    assert Experiment.parse(old) == Experiment.parse(new)
    assert Experiment.parse(old).model_dump()["update_filter"]["max_norm"] == 2.0
    with pytest.raises(ConfigError, match="screen: renamed to 'update_filter', which is given too"):
        Experiment.parse({**old, **new})


def test_a_file_with_an_old_key_warns(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('data = "synthetic-irony"\n[screen]\nmax_norm = 2.0\n')
    with pytest.warns(FutureWarning, match="screen: renamed to 'update_filter'"):
        loaded = Experiment.load(path, ["update_filter.on_bad_update=drop_client"])
    assert (loaded.update_filter.max_norm, loaded.update_filter.on_bad_update) == (2.0, "drop_client")
    path.write_text('data = "synthetic-irony"\n[update_filter]\nmax_norm = 2.0\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Experiment.load(path)
