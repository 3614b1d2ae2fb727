"""Run tests in an environment of its own with the lowest, or the newest, versions that pyproject.toml allows.

    python scripts/versions.py lowest                    # requirements/lowest.txt; a part of CI
    python scripts/versions.py newest tests/engines      # whatever the package index has today

The environment is build/versions/lowest or newest. Torch is of one version in both, being large: that of requirements/ci.txt.
Exit code 75: no package index that has such versions can be reached here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (  # what depends on the insides of others: configs, command line, chat templates, LoRA, files, metrics
    "tests/test_config.py",
    "tests/test_checkpoint.py",
    "tests/test_export.py",
    "tests/test_metrics.py",
    "tests/data/test_data_report.py",
    "tests/backbones/test_tiny.py",
    "tests/backbones/test_families.py",
)


UNREACHABLE = 75


def pin(name: str, file: str) -> str:
    """ "peft==0.18.0", as a file of requirements/ says."""
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    return next(line.partition(" ")[0] for line in lines if line.startswith(f"{name}=="))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("end", choices=["lowest", "newest"])
    parser.add_argument("tests", nargs="*", default=TESTS)
    arguments = parser.parse_args()
    folder = ROOT / "build" / "versions" / arguments.end
    venv.create(folder, with_pip=True, clear=True, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    lowest = arguments.end == "lowest"
    limits = ROOT / "requirements" / "lowest.txt" if lowest else folder / "torch.txt"
    if not lowest:
        limits.write_text(pin("torch", "ci.txt") + "\n")
    environment = {**os.environ, "PIP_CONSTRAINT": str(limits), "HF_HUB_OFFLINE": "1"}
    try_one = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, pin("peft", "lowest.txt")]
    if lowest and subprocess.run(try_one, env=environment, check=False).returncode:
        print(f"{try_one[-1]} cannot be had here: nothing was tried", file=sys.stderr)
        raise SystemExit(UNREACHABLE)
    extras = "test" if lowest else "test,flower"  # Flower has one allowed version
    install = [python, "-m", "pip", "install", "--quiet", "--editable", f".[{extras}]"]
    subprocess.run(install, env=environment, cwd=ROOT, check=True)
    pytest = [python, "-m", "pytest", "-n", "2", "-m", "not gpu and not slow", "-p", "no:cacheprovider"]
    raise SystemExit(subprocess.run([*pytest, *arguments.tests], env=environment, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
