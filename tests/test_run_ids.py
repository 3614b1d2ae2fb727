"""Run ids of existing experiments: unchanged by renamed keys and moved modules."""

from __future__ import annotations

import json
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
