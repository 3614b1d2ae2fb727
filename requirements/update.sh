#!/usr/bin/env bash
# Write the exact versions that CI installs, for Python >= 3.11 on any platform: ci.txt, the newest allowed ones, and lowest.txt,
# the lowest (but for torch, which is large). `--keep` leaves the versions in ci.txt that still fit. Needs `pip install uv`.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
    uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
        --custom-compile-command requirements/update.sh "$@" pyproject.toml
}
[ "${1-}" = --keep ] || upgrade=--upgrade
compile ${upgrade-} --extra dev --output-file requirements/ci.txt
compile --upgrade --extra test --resolution lowest-direct --constraint <(grep '^torch==' requirements/ci.txt) \
    --output-file requirements/lowest.txt
