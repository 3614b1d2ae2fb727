#!/usr/bin/env bash
# Write requirements/ci.txt anew: the exact versions that CI installs, for Python >= 3.11 on any platform. Needs `pip install uv`.
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip compile --quiet --universal --python-version 3.11 --no-annotate --upgrade \
    --custom-compile-command requirements/update.sh --extra dev --output-file requirements/ci.txt pyproject.toml
