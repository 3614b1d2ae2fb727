"""Run the test-suite on the lowest and on the newest allowed versions of the libraries whose insides we depend on.

    python scripts/versions.py lowest                 # transformers and peft as low as pyproject.toml allows
    python scripts/versions.py newest -- tests/backbones
    python scripts/versions.py lowest --only peft     # the others as they are installed here

The versions are installed into build/versions/, in front of those of this environment, which stays as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "peft", "flwr")
TESTS = (
    "tests/backbones",
    "tests/engines",
    "tests/test_runs.py",
    "tests/test_checkpoint.py",
    "tests/test_determinism.py",
)


def requirement(library: str, end: str) -> str:
    """ "peft==0.18" for the lowest, "peft>=0.18,<1" for the newest (pip takes the newest that fits)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    (found,) = [d for d in listed if re.match(rf"{library}(\[|[<>=])", d)]
    bounds = re.sub(r"\[.*?\]", "", found)
    return bounds if end == "newest" else f"{library}=={re.search(r'>=([0-9.]+)', bounds)[1]}"  # type: ignore[index]


def install(wanted: list[str], folder: Path) -> None:
    """Without dependencies, but for transformers, whose tokenizers and hub client go with its version."""
    shutil.rmtree(folder, ignore_errors=True)
    for each in wanted:
        alone = [] if each.startswith("transformers") else ["--no-deps"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *alone, each]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("end", choices=["lowest", "newest"])
    parser.add_argument("--only", action="append", choices=LIBRARIES, help="may be given several times")
    parser.add_argument("tests", nargs="*", default=TESTS)
    arguments = parser.parse_args()
    chosen = arguments.only or [name for name in LIBRARIES if name != "flwr" or shutil.which("flwr")]
    wanted = [requirement(library, arguments.end) for library in chosen]
    folder = ROOT / "build" / "versions" / "-".join([arguments.end, *chosen])
    install(wanted, folder)
    print(f"{arguments.end}: {', '.join(wanted)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow"]
    sys.exit(subprocess.run([*pytest, *arguments.tests], env=environment, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
