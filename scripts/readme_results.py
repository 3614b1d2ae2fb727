"""Write README's table of results, the reports and the pictures of docs/ from results/. CI runs it with --check.

python scripts/readme_results.py            # table and reports (results/*.md, *-results.csv, *-costs.csv)
python scripts/readme_results.py --check    # write nothing; fail if a table differs from the records in results/
python scripts/readme_results.py --shots    # also docs/report-*.png, with a chromium on the PATH
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fedmllm.reports.archive import ARCHIVE
from fedmllm.reports.comparisons import all_pairs, declared, mean_over_settings
from fedmllm.reports.names import metric_label, visible_label
from fedmllm.reports.reading import DatasetResults, ReportData, read_results
from fedmllm.reports.shares import share_table, share_text
from fedmllm.reports.stats import Spread
from fedmllm.reports.tables import result_table
from fedmllm.reports.texts import amount_text
from fedmllm.reports.write import write_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
GRADED = RESULTS / f"verdict-core{ARCHIVE}"  # of README's table
BROWSER = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
BEGIN, END = "<!-- results: written by scripts/readme_results.py -->", "<!-- end of results -->"


def table(dataset: DatasetResults) -> str:
    """Methods by scenario: means over its settings, then mean ± standard deviation over seeds; bold: best federated.

    The last column is the share of the ceiling over all settings, where the runs state one.
    """
    values, groups = dataset.values(), {**dataset.scenarios, "all settings": dataset.settings}
    scale = result_table(dataset).scale
    spreads = {
        group: {
            m: Spread.of(seeds.values()) for m in dataset.methods if (seeds := mean_over_settings(values, m, settings))
        }
        for group, settings in groups.items()
    }
    shares = share_table(dataset)
    head = [metric_label(dataset.metric) + (f", {scale.unit}" if scale.unit else ""), *groups]
    if shares and dataset.visible in shares.ceilings:
        head.append("share of the ceiling")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for method in dataset.methods:
        cells = []
        for of_group in spreads.values():
            federated = [m for m in of_group if m in dataset.candidates]
            best = max(federated, key=lambda m: of_group[m].mean, default="")
            text = scale.spread(of_group[method].mean, of_group[method].std) if method in of_group else ""
            cells.append(f"**{text}**" if method == best and len(federated) > 1 else text)
        if shares and dataset.visible in shares.ceilings:
            cells.append(share_text(shares.rows.get(method, {}).get(dataset.visible)))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text_of(places: list[Path]) -> str:
    """Return the text between the markers."""
    parts = [
        "The embedded benchmark, a drawn data set and a model of a million weights: not a result about a real MLLM.\n"
    ]
    for place in places:
        report = read_results([place])
        for dataset in report.datasets:
            settings = " + ".join(f"{len(s)} {name}" for name, s in dataset.scenarios.items())
            found = result_table(dataset)
            least, scale = found.detectable_mean, found.scale
            detect = f"; detectable difference of {least.of} over all settings: " if least else ""
            detect += amount_text(least.difference, scale) if least else ""
            about = f"{len(dataset.runs)} runs, {len(dataset.seeds)} seeds ({settings}){detect}"
            parts.append(f"{report.title}: {about}.\n\n{table(dataset)}\n\n{findings(report, dataset)}")
    note = (
        "Mean over a scenario's settings ± standard deviation over seeds; bold is the highest mean of the federated methods. "
        "The reports under `results/` have every setting, the paired tests and the costs; "
        "[docs/benchmark.md](docs/benchmark.md) says what the benchmark can show."
    )
    return "\n".join([*parts, note])


def findings(report: ReportData, dataset: DatasetResults) -> str:
    """Ceilings, declared claims, and the pairs whose order is established."""
    parts = []
    if shares := share_table(dataset):
        words = ", ".join(f"{visible_label(v)} {100 * c:.1f}" for v, c in shares.ceilings.items())
        parts.append(f"Ceilings: {words}.")
    claims = declared(dataset, report.claims)
    for kind, tests in (("declared claims", claims), ("pairs of methods", all_pairs(dataset))):
        if tests:
            yes = [c.text or f"{c.higher} above {c.lower}" for c in tests if c.is_established]
            others = "; ".join(c.text for c in tests if not c.is_established) if tests is claims else ""
            parts.append(
                f"Established, of {len(tests)} {kind} (paired t-test, Holm): {'; '.join(yes) or 'none'}"
                f"{f'; not: {others}' if others else ''}."
            )
    return " ".join(parts) + "\n"


def shots(page: Path) -> None:
    """Light, dark and phone (a frame of 390 px) pictures of a page."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("--shots: no chromium on the PATH (Debian: apt-get install chromium)")
    frame = page.with_name("phone.html")
    frame.write_text(
        f"<body style='margin:0'><iframe src='{page.name}' width='390' height='1200' style='border:0'></iframe></body>"
    )
    dark = ["--blink-settings=preferredColorScheme=0"]
    for name, source, size, options in (
        ("light", page, "1280,1200", []),
        ("dark", page, "1280,1200", dark),
        ("phone", frame, "500,1200", ["--allow-file-access-from-files", "--virtual-time-budget=4000"]),
    ):
        out = ROOT / f"docs/report-{name}.png"
        command = [chromium, *BROWSER, f"--user-data-dir={page.parent / 'chromium'}", *options]
        subprocess.run(
            [*command, f"--window-size={size}", f"--screenshot={out}", source.as_uri()],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        print(out.relative_to(ROOT))


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--shots", action="store_true")
    arguments = parser.parse_args()
    folders = [*sorted(RESULTS.glob(f"*{ARCHIVE}")), *sorted(path.parent for path in RESULTS.glob("*/suite.json"))]
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        print(
            f"README.md: no table is written: the lines {BEGIN!r} and {END!r} must stand there once each",
            file=sys.stderr,
        )
        if arguments.check:
            sys.exit(1)
    inside = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", flags=re.DOTALL)
    after = inside.sub(lambda _: f"{BEGIN}\n{text_of([GRADED])}\n{END}", before)
    stale = ["README.md"] if after != before else []
    if not arguments.check:
        readme.write_text(after, encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        for folder in folders:
            written = write_report([folder], Path(place) / f"{folder.name.removesuffix(ARCHIVE)}.html")
            for path in (p for p in written if p.suffix != ".html" and not p.name.endswith("-rounds.csv")):
                kept = RESULTS / path.name
                if not kept.exists() or kept.read_bytes() != path.read_bytes():
                    stale.append(str(kept.relative_to(ROOT)))
                if not arguments.check:
                    shutil.copy(path, kept)
            if arguments.check:
                continue
            if arguments.shots and folder == GRADED:
                shots(written[0])
    if arguments.check and stale:
        sys.exit(f"not what the records in results/ say: {', '.join(stale)}; run scripts/readme_results.py")
    print("\n".join(stale))


if __name__ == "__main__":
    main()
