"""Compare the folders of two sets of runs, byte for byte: `python scripts/same_results.py BEFORE AFTER`.

Each folder holds one folder per run. Adapters must be equal in every byte, and records and summaries in every value, apart
from times, versions, memory and the device. Keys of the record that were renamed count as equal, and keys that AFTER alone
has are not compared.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARYING = {
    "time",
    "time_s",
    "wall_s",
    "server_s",
    "client_s",
    "versions",
    "device",
    "peak_host_bytes",
    "peak_device_bytes",
}
RENAMED = {"away": "dropped_out", "alone": "client", "screen": "update_filter"}


def plain(value: Any) -> Any:
    """`value` without what may vary, under the present names of its keys."""
    if isinstance(value, dict):
        return {RENAMED.get(key, key): plain(inner) for key, inner in value.items() if key not in VARYING}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def lasts(old: Any, new: Any) -> bool:
    """True if `new` has every value of `old`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and lasts(value, new[key]) for key, value in old.items())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(lasts, old, new))
    return bool(old == new)


def contents(run: Path) -> Iterator[tuple[str, Any]]:
    """(place, comparable content) of each result of a run."""
    for number, line in enumerate((run / "record.jsonl").read_text().splitlines(), start=1):
        yield f"record.jsonl:{number}", plain(json.loads(line))
    yield "summary.json", plain(json.loads((run / "summary.json").read_text()))
    for path in sorted(run.glob("adapter*/**/*.safetensors")) + sorted(run.glob("checkpoints/*/*.safetensors")):
        yield str(path.relative_to(run)), hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    before, after = Path(sys.argv[1]), Path(sys.argv[2])
    runs = sorted(path.parent.name for path in before.glob("*/record.jsonl"))
    differing = 0
    for name in runs:
        old, new = dict(contents(before / name)), dict(contents(after / name))
        odd = [place for place in {**old, **new} if not lasts(old.get(place), new.get(place))]
        differing += bool(odd)
        print(f"{name}: {len(old)} results, " + (f"DIFFERENT: {', '.join(odd[:5])}" if odd else "equal"))
    print(f"{len(runs) - differing} of {len(runs)} runs are equal")
    sys.exit(1 if differing or not runs else 0)


if __name__ == "__main__":
    main()
