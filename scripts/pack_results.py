"""Write the finished runs of a suite's folder into one file that `fedmllm report` reads.

python scripts/pack_results.py runs/verdict results/verdict-core.tar.xz --suite experiments/verdict/core.toml

Without the adapters, and without predictions unless --predictions is given. To continue the suite:
`mkdir runs/verdict && tar -xf FILE -C runs/verdict`, then `fedmllm suite SUITE.toml --out runs/verdict`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedmllm.reports.archive import pack_results
from fedmllm.runs.suites.suite import Suite

MOST_BYTES = 9 * 10**6  # of a file in the repository


def main() -> None:
    """Pack, and say how large the file is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--suite", type=Path, help="write this suite's labels and claims into the folder first")
    parser.add_argument(
        "--predictions",
        action="store_true",
        help="also pack the predictions of the last evaluations, which name test rows and their answers, if they fit",
    )
    arguments = parser.parse_args()
    if arguments.suite:
        Suite.load(arguments.suite).save(arguments.folder)
    runs = pack_results(arguments.folder, arguments.out, arguments.predictions)
    size = arguments.out.stat().st_size
    if size > MOST_BYTES and arguments.predictions:
        print(f"{arguments.out}: {size / 1e6:.2f} MB with predictions; packed again without them")
        runs = pack_results(arguments.folder, arguments.out)
        size = arguments.out.stat().st_size
    print(f"{arguments.out}: {runs} runs, {size / 1e6:.2f} MB")
    if size > MOST_BYTES:
        raise SystemExit(f"{arguments.out}: over {MOST_BYTES / 1e6:.0f} MB; keep it outside the repository")


if __name__ == "__main__":
    main()
