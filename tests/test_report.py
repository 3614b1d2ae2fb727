"""A report says what the records say, and its page stands alone."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats as scipy_stats

from fedmllm.algorithms.privacy.guarantee import Guarantee
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.reports.answers import answers, groups
from fedmllm.reports.compare import compare
from fedmllm.reports.comparisons import all_pairs, declared
from fedmllm.reports.guarantees import _FACTS, privacy_tables
from fedmllm.reports.published import published_for
from fedmllm.reports.reading import read_results
from fedmllm.reports.stats import detectable, holm, paired, seeds_needed
from fedmllm.reports.tables import result_table
from fedmllm.reports.write import write_report
from fedmllm.runs.record import read
from fedmllm.runs.result import load_run
from fedmllm.runs.run import run
from fedmllm.runs.suites.suite import Suite
from support import runs
from support.made_up import write_run

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "experiments/tiny/irony.toml"


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny matrix with made-up numbers: 216 runs."""
    folder = tmp_path_factory.mktemp("made-up")
    suite = Suite.load(SUITE)
    suite.save(folder)
    for cell in suite.cells:
        write_run(folder / cell.run_id, cell.experiment)
    return folder


@pytest.fixture(scope="module")
def written(made_up: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report.html"
    write_report([made_up], out)
    return out


def test_paired_t_test_is_that_of_scipy():
    a, b = {0: 0.91, 1: 0.87, 2: 0.93, 7: 1.0}, {0: 0.88, 1: 0.86, 2: 0.88, 9: 0.0}
    found = paired(a, b)
    expected = scipy_stats.ttest_rel([0.91, 0.87, 0.93], [0.88, 0.86, 0.88])
    interval = expected.confidence_interval(0.95)
    assert found is not None
    assert (found.n, found.difference) == (3, pytest.approx(0.03))
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))


def test_no_test_without_spread():
    one, same = paired({0: 0.9}, {0: 0.1}), paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    constant = paired({0: 0.9, 1: 0.8, 2: 0.3}, {0: 0.5, 1: 0.4, 2: -0.1})  # 0.4 three times, not in binary
    for found in (one, same, constant):
        assert found is not None
        assert (found.p, found.low, found.high, found.needed()) == (None, None, None, None)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_detectable_difference_has_eighty_percent_power():
    for n in (3, 10, 40):
        found = detectable(2.5, n)
        t, freedom = scipy_stats.t.ppf(0.975, n - 1), n - 1
        power = scipy_stats.nct.sf(t, freedom, found * n**0.5 / 2.5)
        assert power == pytest.approx(0.8, abs=0.07 if n == 3 else 0.02)
    assert seeds_needed(detectable(2.5, 10), 2.5) == 10
    assert seeds_needed(1e-6, 2.5) is None


def test_holm_by_hand():
    # sorted 0.01 * 3, max(0.03, 0.02 * 2), max(0.04, 0.04 * 1)
    assert holm({"a": 0.04, "b": 0.01, "c": 0.02}) == pytest.approx({"b": 0.03, "c": 0.04, "a": 0.04})


def test_the_table_holds_means_and_deviations_over_seeds(made_up: Path, written: Path):
    cells = [cell for cell in Suite.load(SUITE).cells if cell.label.startswith("beta 40 % · FedAdam ·")]
    values = []
    for cell in cells:
        evals = [
            e for e in read(made_up / cell.run_id / "record.jsonl") if e["event"] == "eval" and e["visible"] == "both"
        ]
        values.append(evals[-1]["metrics"]["auc"])
    rows = list(csv.DictReader(io.StringIO(written.with_name("report-results.csv").read_text())))
    wanted = {"setting": "beta 40 %", "method": "FedAdam", "test_shows": "both", "metric": "auc"}
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    assert float(row["mean"]) == pytest.approx(statistics.fmean(values), rel=1e-5)
    assert float(row["std"]) == pytest.approx(statistics.stdev(values), rel=1e-4)
    assert (row["n"], row["seeds"]) == ("3", "0 1 2")
    text = f"{100 * statistics.fmean(values):.1f}\xa0±\xa0{100 * statistics.stdev(values):.1f}"
    line = next(line for line in written.with_suffix(".md").read_text().splitlines() if "| beta 40 % |" in line)
    assert text in line


def test_best_and_second_are_federated_and_marked_in_every_row(made_up: Path):
    table = result_table(read_results([made_up]).datasets[0])
    assert len(table.rows) == 12
    for row in table.rows:
        ranked = sorted(table.methods[2:], key=lambda m: -row.cells[m].spread.mean)
        assert [row.cells[m].mark for m in ranked] == ["best", "second", "", ""]
        assert {row.cells[m].mark for m in ("Zero-shot", "Local")} == {""}


def test_every_pair_with_a_federated_method_once_the_better_one_first(made_up: Path):
    pairs = all_pairs(read_results([made_up]).datasets[0])
    assert len({frozenset((c.higher, c.lower)) for c in pairs}) == len(pairs) == 6 * 5 / 2 - 1  # two baselines
    assert {c.family for c in pairs} == {14}
    for c in pairs:
        assert c.test.difference >= 0
        assert c.cells == 36
        assert c.wins >= 3 * len(c.stable)
        assert not set(c.stable) & set(c.reversed)


def test_three_sentences_answer_before_any_table(made_up: Path, written: Path):
    dataset = read_results([made_up]).datasets[0]
    table, chart = result_table(dataset), groups(dataset)
    assert [g.name for g in chart] == [
        "Complete rows", "Random rows lack a modality", "Mixed sites", "Sites with one modality"
    ]  # fmt: skip
    assert chart[0].settings == ("alpha 0.5",)  # split over sites as in the other scenarios
    use, costs, sure = answers(dataset, table, all_pairs(dataset), chart)
    assert use.text.startswith("Use FedAdam") == all(
        c.is_established for c in all_pairs(dataset) if c.higher == "FedAdam" and c.lower in dataset.candidates
    )
    assert f"From {100 * chart[0].spread.mean:.1f}\N{NO-BREAK SPACE}% on complete rows" in costs.text
    assert "With 3\N{NO-BREAK SPACE}seeds, a difference of two federated methods below" in sure.text
    text = written.read_text()
    assert text.index("What to use") < text.index("<table") < text.index("Published numbers")


def test_claims_of_the_suite_are_corrected_alone(made_up: Path):
    claims = [
        {"higher": {"methods": "FedAdam"}, "lower": {"methods": "FedAvgM"}},
        {
            "text": "Missing data costs",
            "higher": {"settings": "alpha 0.5", "methods": "FedAdam"},
            "lower": {"settings": ["beta 30 %", "beta 50 %"], "methods": "FedAdam"},
        },
    ]
    dataset = read_results([made_up]).datasets[0]
    values, found = dataset.values(), declared(dataset, claims)
    (pair,) = [c for c in all_pairs(dataset) if (c.higher, c.lower) == ("FedAdam", "FedAvgM")]
    assert found[0].test == pair.test
    assert {c.family for c in found} == {2}
    means = [statistics.fmean(values[s, "FedAdam"].values()) for s in ("alpha 0.5", "beta 30 %", "beta 50 %")]
    assert found[1].test.difference == pytest.approx(means[0] - (means[1] + means[2]) / 2)
    assert found[1].text == "Missing data costs"


def test_runs_without_a_suite_get_names_and_odd_settings_are_told_apart(tmp_path: Path):
    for i, change in enumerate(({}, {"train": {"lr": 1e-3}}, {"prompt": "agnostic"}, {"seed": 1})):
        write_run(tmp_path / str(i), Experiment.parse({"data": "synthetic-irony", "aggregator": "fedadam", **change}))
    dataset = read_results([tmp_path]).datasets[0]
    assert dataset.settings == ["alpha 0.5"]
    assert set(dataset.methods) == {"FedAdam (train.lr=2e-05)", "FedAdam (train.lr=0.001)", "FedAdam, agnostic prompt"}


def test_unfinished_runs_are_counted_and_nothing_at_all_is_an_error(tmp_path: Path, made_up: Path):
    with pytest.raises(FedmllmError, match="not a folder"):
        read_results([tmp_path / "none"])
    with pytest.raises(FedmllmError, match="no finished run"):
        read_results([tmp_path])
    shutil.copytree(made_up, tmp_path / "copy")
    first, second = [f for f in sorted((tmp_path / "copy").iterdir()) if f.is_dir()][:2]
    (first / "summary.json").unlink()
    report = read_results([tmp_path / "copy"])
    assert (len(report.runs), report.unfinished, report.missing) == (215, (str(first),), 0)
    shutil.rmtree(first)
    assert read_results([tmp_path / "copy"]).missing == 1
    (second / "summary.json").write_text('{"rows": []}')
    with pytest.raises(FedmllmError, match=f"{second.name}: not a run's record and summary"):
        read_results([tmp_path / "copy"])
    (tmp_path / "copy" / "suite.json").write_text('{"cells": [')
    with pytest.raises(FedmllmError, match=r"suite.json: not a suite's list of cells"):
        read_results([tmp_path / "copy"])


class Page(html.parser.HTMLParser):
    """Tags, ids and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        of_tag = dict(attrs)
        if "id" in of_tag:
            self.ids.append(of_tag["id"])
        self.addresses += [of_tag[key] for key in ("href", "src", "xlink:href") if of_tag.get(key)]


def test_the_page_stands_alone_and_its_figures_can_be_read_aloud(written: Path):
    text = written.read_text()
    page = Page(text)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)
    figures = page.tags.count("svg")
    assert figures == page.tags.count("desc") >= 1 + 4 + 12 + 9 + 2
    assert text.count('role="img"') == figures
    named = [i for i in page.ids if i.endswith(("-t", "-d"))]
    assert len(named) == len(set(named)) == 2 * figures
    assert not re.search(r"#0100[0-9a-f]{2}", text), "a colour that does not follow the theme"
    assert {i[1:] for i in page.addresses if i.startswith("#c")} <= set(page.ids)


def test_300_runs_in_ten_seconds_and_three_megabytes(made_up: Path, tmp_path: Path):
    suite = Suite.load(SUITE)
    for cell in suite.cells[:84]:
        changed = cell.experiment.model_copy(update={"seed": cell.experiment.seed + 3})
        write_run(tmp_path / "more" / changed.run_id(), changed)
    began = time.process_time()
    write_report([made_up, tmp_path / "more"], tmp_path / "report.html")
    assert time.process_time() - began < 10
    assert (tmp_path / "report.html").stat().st_size < 3e6
    assert len(read_results([made_up, tmp_path / "more"]).runs) == 300


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    return found


def in_browser(path: Path, *options: str) -> str:
    command = [
        browser(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={path.parent / 'chromium'}",
        "--hide-scrollbars",
        *options,
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [500, 1280])  # headless chromium has no narrower window; a phone is a frame in it
def test_the_page_fits_and_sorts_in_a_browser(written: Path, tmp_path: Path, width: int):
    probe = """<script>
    const heads = [...document.querySelectorAll("table.sortable")[0].querySelectorAll("thead tr:last-child th button")];
    const rows = () => [...document.querySelectorAll("table.sortable")[0].tBodies[0].rows];
    const names = () => rows().map((r) => r.children[0].textContent).join();
    const before = names();
    heads[0].click();
    const words = heads[0].closest("th").ariaSort === "ascending" && names() !== before;
    heads[0].click();
    heads[0].click();
    const restored = words && names() === before;
    heads[2].click();
    const column = rows().map((r) => +r.children[2].dataset.value);
    const falls = restored && column.every((v, i) => i === 0 || column[i - 1] >= v);
    const over = document.documentElement.scrollWidth - innerWidth;
    document.body.dataset.probe = [over, falls, heads[2].closest("th").ariaSort].join();
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(written.read_text().replace("</body>", probe))
    found = in_browser(page, f"--window-size={width},900", "--dump-dom")
    found = re.search(r'data-probe="(-?\d+),(\w+),(\w+)"', found)
    assert found
    assert int(found.group(1)) <= 0, "the page is wider than the window"
    assert found.groups()[1:] == ("true", "descending")


def test_a_phone_scrolls_down_only_and_not_far(written: Path, tmp_path: Path):
    shutil.copy(written, tmp_path / "page.html")
    probe = "const p = f.contentDocument.documentElement; document.body.dataset.probe = [p.scrollWidth, p.scrollHeight]"
    frame = f'<body><iframe id="f" src="page.html" width="390" height="800" onload="{probe}"></iframe></body>'
    (tmp_path / "phone.html").write_text(frame)
    found = in_browser(
        tmp_path / "phone.html", "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"
    )
    size = re.search(r'data-probe="390,(\d+)"', found)
    assert size
    assert int(size[1]) < 5000


def test_a_picture_of_the_page_can_be_taken(written: Path, tmp_path: Path):
    in_browser(Path(shutil.copy(written, tmp_path)), "--window-size=1280,1600", f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_published_numbers_are_twelve_settings_a_method():
    for data in ("hateful-memes", "synthetic-irony", "crisismmd", "synthetic-crisis"):
        published = published_for(data)
        assert published is not None
        assert {len(row) for row in published.values.values()} == {12}
        assert published.same_data == (not data.startswith("synthetic"))
    assert published_for("hateful-memes").values["FedYogi"]["I7:T3"] == 75.94
    assert published_for("crisismmd").values["FedAvgM"]["p 60 %"] == 39.44
    assert published_for("vqa-rad") is None
    suite = {cell.labels["settings"] for cell in Suite.load(SUITE).cells}
    assert suite == set(published_for("hateful-memes").values["FedYogi"])


def test_compare_pairs_seed_with_seed(tmp_path: Path):
    for seed in (0, 1, 2):
        for side, name in (("a", "fedadam"), ("b", "fedavgm")):
            table = {
                "data": "synthetic-irony",
                "aggregator": name,
                "seed": seed,
                "engine": "in-process" if side == "a" else "stacked",
            }
            write_run(tmp_path / side / str(seed), Experiment.parse(table))
    found = compare([tmp_path / "a"], [tmp_path / "b"])
    assert (found.num_a, found.num_b, found.num_pairs) == (3, 3, 3)
    assert found.settings["aggregator.name"] == ("fedadam", "fedavgm")
    assert set(found.execution_only) >= {"engine.name"}
    assert found.rows[0].test is not None
    assert found.rows[0].test.n == 3
    alone = compare([tmp_path / "a/0"], [tmp_path / "b/0"])
    assert alone.rows[0].test is not None
    assert alone.rows[0].test.p is None
    with pytest.raises(FedmllmError, match="several runs"):
        compare([tmp_path / "a", tmp_path / "b"], [tmp_path / "a"])


def test_made_up_records_have_the_form_of_real_ones(tmp_path: Path):
    from fedmllm.runs.run import run

    settings = Experiment.parse(
        {
            "data": {"name": "synthetic-irony", "num_train": 30, "num_validation": 5, "num_test": 8},
            "partition": {"name": "iid", "num_clients": 3},
            "train": {"batch_size": 8, "max_steps": 1},
            "evaluate": {"every": 1, "visible": ["both"]},
            "num_rounds": 2,
        }
    )
    run(settings, tmp_path / "real")
    write_run(tmp_path / "made-up", settings, num_clients=3)
    real, ours = (list(read(tmp_path / name / "record.jsonl")) for name in ("real", "made-up"))
    for kind in ("experiment", "round", "eval", "end"):
        of_real, of_ours = (next(e for e in events if e["event"] == kind) for events in (real, ours))
        assert of_ours.keys() <= of_real.keys(), kind
    assert (
        read_results([tmp_path / "real"]).runs[0].rows[0].keys()
        >= read_results([tmp_path / "made-up"]).runs[0].rows[0].keys()
    )


def test_every_run_with_privacy_has_all_that_its_claim_needs_beside_its_price_and_its_audit(tmp_path: Path):
    table = {"num_rounds": 1, "update_filter": {"on_bad_update": "drop_client"}}
    private = {"privacy": {"name": "client-dp", "noise_multiplier": 2.0, "clip": 0.5, "delta": 1e-3}}
    clear, noisy, alone = (
        runs.experiment(**{**table, **changed}) for changed in ({}, private, {**private, "seed": 1, "num_rounds": 2})
    )
    for name, experiment in (("clear", clear), ("noisy", noisy), ("alone", alone)):
        run(experiment, tmp_path / name)
    row = {"kind": "one-run", "bound": 0.25, "claim": "epsilon 1", "attack": "10 canaries", "reason": ""}
    (tmp_path / "noisy" / "audit.json").write_text(json.dumps({"run_id": noisy.run_id(), "rows": [row]}))
    (tmp_path / "audit-of-another.json").write_text(json.dumps({"run_id": "0" * 12, "rows": [row]}))
    page, text, *_ = (path.read_text() for path in write_report([tmp_path], tmp_path / "report.html"))
    (dataset,) = read_results([tmp_path]).datasets
    tables = {t.facts["releases counted"]: t.facts for t in privacy_tables(dataset)}
    assert tables["1"].keys() == {"claim", *_FACTS.values(), "who knows the draw", "outside of the guarantee", *PRICE}
    assert tables["1"]["relation"] == "a client's updates replaced by zeros"
    assert tables["1"]["claim"] == load_run(tmp_path / "noisy").guarantee["claim"]
    values = [load_run(tmp_path / name).value() for name in ("noisy", "clear")]
    assert "{:.3f}, without noise {:.3f} on the same 1".format(*values) in tables["1"]["utility"]
    assert tables["1"]["audit"].startswith("one-run: epsilon at least 0.25; claimed epsilon 1; 10 canaries")
    assert "no run without noise on the same seeds" in tables["2"]["utility"]
    assert tables["2"]["audit"].startswith("none in the folders of these runs")
    for words in ("the server, which sees every update", "closed form (Gaussian", "epsilon at least 0.25"):
        assert words in page
        assert words in text
    assert text.count("closed form (Gaussian") == 1  # what all methods share stands once
    (tmp_path / "noisy" / "audit.json").write_text("{}")
    with pytest.raises(FedmllmError, match=r"audit\.json: not a table of `fedmllm audit`"):
        write_report([tmp_path], tmp_path / "report.html")


def test_noise_of_rows_has_no_denominator_of_clients(made_up: Path):
    dataset = read_results([made_up]).datasets[0]
    said = Guarantee(
        mechanism="row-dp",
        unit="row",
        relation="a row added or removed",
        adversary="the server",
        epsilon=1.0,
        delta=1e-5,
        accountant="closed form",
        noise_multiplier=1.0,
        clip=1.0,
        denominator=0.0,
        num_releases=3,
        sampling="all rows",
        sampling_is_secret=False,
        noise="keyed",
        outside=(),
    )
    noisy = replace(dataset.runs[0], guarantee=said.to_json())
    (table,) = privacy_tables(replace(dataset, runs=(noisy,)))
    assert table.facts["denominator of the mean"] == "\N{EN DASH}"
    of_clients = replace(noisy, guarantee={**said.to_json(), "denominator": 4.0})
    assert privacy_tables(replace(dataset, runs=(of_clients,)))[0].facts["denominator of the mean"] == "4"


PRICE = {"utility", "audit"}


def test_a_baseline_without_a_model_stands_in_the_table(tmp_path: Path):
    table = {"data": "synthetic-irony", "evaluate": {"visible": ["all"]}}
    write_run(tmp_path / "a", Experiment.parse(table))
    write_run(tmp_path / "b", Experiment.parse({**table, "method": "majority", "evaluate": {"visible": ["none"]}}))
    assert set(result_table(read_results([tmp_path]).datasets[0]).rows[0].cells) == {"FedAvg", "Majority"}
