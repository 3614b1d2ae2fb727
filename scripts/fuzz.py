"""Put strange inputs into every way in; whatever raises more than our own error is a crash and goes into tests/corpus/.

python scripts/fuzz.py                       # 100,000 inputs, about half an hour on one core; results/fuzz.json
python scripts/fuzz.py --resume              # continues with the first target that results/fuzz.json does not hold
python scripts/fuzz.py --inputs 2000 --target adapter --seed 7
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from fuzz_targets import TARGETS, Target, survives
from hypothesis import HealthCheck, Phase, given, seed, settings

from fedmllm.core.storage import write_atomically
from fedmllm.runs.inputs import versions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from machine import describe  # noqa: E402


def fuzz(target: Target, number: int, folder: Path, start: int) -> dict[str, Any]:
    """Count inputs, and those that were accepted or refused; the smallest input that crashes, if one does."""
    counts = {"inputs": 0, "accepted": 0, "refused": 0}
    smallest: list[bytes] = []

    @seed(start)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def attempt(content: bytes) -> None:
        counts["inputs"] += 1
        try:
            counts["accepted" if survives(target, content, folder) else "refused"] += 1
        except BaseException:
            smallest[:] = [content]
            raise

    began = time.monotonic()
    result: dict[str, Any] = {"target": target.name}
    try:
        attempt()
    except Exception:
        kept = ROOT / "tests" / "corpus" / target.name / hashlib.sha256(smallest[0]).hexdigest()[:12]
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(smallest[0])
        result["crash"] = {
            "input": str(kept.relative_to(ROOT)),
            "error": traceback.format_exc().strip().splitlines()[-1],
        }
        traceback.print_exc()
    return {**result, **counts, "seconds": round(time.monotonic() - began, 1)}


def row(counts: dict[str, Any]) -> str:
    cells = [counts[key] for key in ("target", "inputs", "accepted", "refused")]
    return "| " + " | ".join(map(str, [*cells, int("crash" in counts)])) + " |"


def write(out: Path, results: list[dict[str, Any]], done: bool) -> None:
    command = " ".join(["python", "scripts/fuzz.py", *(word for word in sys.argv[1:] if word != "--resume")])
    inputs = sum(result["inputs"] for result in results)
    crashes = sum("crash" in result for result in results)
    summary = {"command": command, "is_complete": done, "inputs": inputs, "crashes": crashes, "machine": describe()}
    write_atomically(out, json.dumps({**summary, "versions": versions(), "targets": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--target", choices=[target.name for target in TARGETS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fuzz.json")
    parser.add_argument("--resume", action="store_true", help="keep the targets that --out holds already")
    arguments = parser.parse_args()
    chosen = [target for target in TARGETS if arguments.target in (None, target.name)]
    whole = sum(target.share for target in chosen)
    results = json.loads(arguments.out.read_text())["targets"] if arguments.resume else []
    kept = {result["target"] for result in results}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for target in [target for target in chosen if target.name not in kept]:
            left, start = round(arguments.inputs * target.share / whole), arguments.seed
            sums: dict[str, Any] = {"target": target.name, "inputs": 0, "accepted": 0, "refused": 0, "seconds": 0}
            while left > 0:  # hypothesis ends early where it has seen all it can think of: then with another seed
                found = fuzz(target, left, Path(folder) / "case", start)
                sums |= {key: round(sums[key] + found[key], 1) for key in sums if key != "target"}
                left, start = left - max(1, found["inputs"]), start + 1
                if "crash" in found:
                    sums["crash"] = found["crash"]
                    break
            results.append(sums)
            print(row(sums), flush=True)
            if not arguments.target:  # after each target: a run that is stopped keeps what it has
                write(arguments.out, results, done=target is chosen[-1])
    crashes = [result for result in results if "crash" in result]
    inputs = sum(result["inputs"] for result in results)
    print("\n| target | inputs | accepted | refused | crashes |\n|---|---|---|---|---|")
    print("\n".join(map(row, results)))
    print(f"{inputs} inputs, {len(crashes)} crashes")
    sys.exit(bool(crashes))


if __name__ == "__main__":
    main()
