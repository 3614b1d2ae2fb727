"""AUC of the strategies for missing modalities: `python benchmarks/modality_table.py SUITE_FOLDER ... > results/modality.md`.

Reads the summaries of `experiments/modality/strategies.toml`; cells that are not finished are "-".
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

SETTINGS = ("beta 50 %", "I5:T5", "p 60 %")
VISIBLE = ("all", "image", "text")


def cells(folders: list[Path]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """(seed, method) -> setting -> visible modalities -> AUC."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for folder in folders:
        for cell in json.loads((folder / "suite.json").read_text())["cells"]:
            summary = folder / cell["run_id"] / "summary.json"
            if summary.exists():
                rows = [row for row in json.loads(summary.read_text())["rows"] if row["metric"] == "auc"]
                labels = cell["labels"]
                key = (labels["seeds"], labels["methods"])
                found[key][labels["settings"]] = {row["visible"]: row["value"] for row in rows}
    return found


def main() -> None:
    found = cells([Path(name) for name in sys.argv[1:]])
    print("# Strategies for missing modalities: a trial\n")
    print(
        "`experiments/modality/strategies.toml`, printed by `benchmarks/modality_table.py`. AUC on 600 test rows that show all"
    )
    print("modalities / the image / the text. Two shared cores, one thread a run. Not all cells have been run.")
    for seed in sorted({seed for seed, _ in found}):
        print(f"\n## Seed {seed}\n")
        print(f"| method | {' | '.join(SETTINGS)} |\n|---|{'---|' * len(SETTINGS)}")
        for (own, method), values in found.items():
            if own == seed:
                made = (values.get(setting) for setting in SETTINGS)
                texts = (" / ".join(f"{v[name]:.3f}" for name in VISIBLE) if v else "-" for v in made)
                print(f"| {method} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
