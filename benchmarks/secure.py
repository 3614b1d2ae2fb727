"""Cost of secure aggregation for a round over real processes, and of its arithmetic alone.

    python benchmarks/secure.py > results/secure.md

Sites on loopback with TLS, 12 rows each, one optimiser step a round; the LoRA of the embedded backbone is made so wide that the
adapter has the bytes asked for. The same federation runs the experiment in the clear, then with masks, and again, so that all
see the same load; the first round of each run, in which bases are loaded and keys exchanged, is left out. Wall time of a round,
training included. Target: <= 2 s a round above the deployment without masks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import flower_federation as trial

from fedmllm.config.engine import SecureAggregation
from fedmllm.flower.secure.fixed_point import WordForm, from_words, to_words
from fedmllm.flower.secure.masks import add_masks

BYTES_A_RANK = 131_072 // 8  # of the embedded backbone's adapter
SECURE: dict[str, dict[str, Any]] = {
    "repeat": {},
    "recover": {"drop_outs": "recover"},
    "repeat-32": {"rows": 2048, "bound": 1.0},
    "recover-32": {"drop_outs": "recover", "rows": 2048, "bound": 1.0},
}
MODES = {"clear": ()} | {
    name: ("--set", f"engine.secure={{{', '.join(f'{k}={json.dumps(v)}' for k, v in given.items())}}}")
    # Sites take part in one run with one set of settings only: other words are another run, of another seed.
    + (("--set", "seed=1") if "rows" in given else ())
    for name, given in SECURE.items()
}


def measured(
    num_sites: int, megabytes: float, num_rounds: int, repeats: int, modes: list[str]
) -> dict[str, list[float]]:
    """Seconds of each round but the first of each run, by mode; and "up", bytes a site and round."""
    backbone = f'name = "tiny"\nlora = {{ r = {round(megabytes * 1e6 / BYTES_A_RANK)} }}'
    names = tuple(f"site-{i:02d}" for i in range(num_sites))
    found: dict[str, list[float]] = {}
    with trial.federation(backbone, rounds=num_rounds, train="max_steps = 1", names=names) as made:
        made.start(allow='settings = { "lora.r" = { max = 10_000 } }')
        for repeat in range(repeats):
            for mode in modes:
                out = f"{mode}-{repeat}"
                made.run(out, "--no-test", *MODES[mode])
                rounds = made.rounds(out)
                assert len(rounds) == num_rounds, (made.folder / f"run-{out}.out").read_text()
                assert not any(r["dropped"] for r in rounds), [r["dropped"] for r in rounds]
                found.setdefault(mode, []).extend(r["wall_s"] for r in rounds[1:])
                found[f"up {mode}"] = [rounds[-1]["up_bytes"] / num_sites]
    return found


def arithmetic(num_sites: int, megabytes: float, settings: SecureAggregation) -> tuple[float, float]:
    """Seconds of processor time of one site's words and masks, and of the server's sum of all.

    Raises:
        SystemExit: The sum of the masked words is not that of the words, to the bit.
    """
    delta = np.random.default_rng(0).normal(0, 1e-3, int(megabytes * 1e6 / 4)).astype(np.float32)
    names = [f"site-{i:02d}" for i in range(num_sites)]
    word_bits, bits = settings.words(num_sites, "rows")
    form = WordForm(len(delta), 0, word_bits)
    keys = {frozenset(pair): os.urandom(32) for pair in combinations(names, 2)}
    exact, total, site_s, server_s = np.zeros(len(delta), np.uint64), np.zeros(len(delta), np.uint64), 0.0, 0.0
    for weight, name in enumerate(names, start=1):
        began = time.process_time()
        plain = to_words(delta, weight, bits, settings.bound)
        own = {other: keys[frozenset((name, other))] for other in names if other != name}
        data = form.to_bytes(add_masks(plain, name, own, form))
        site_s, began = time.process_time() - began, time.process_time()
        total += form.from_bytes(data)
        server_s += time.process_time() - began
        exact += plain
    if form.to_bytes(total) != form.to_bytes(exact):
        sys.exit(f"{num_sites} sites, {megabytes:g} MB: the sum of the masked words is not exact")
    began = time.process_time()
    from_words(total, bits, word_bits)
    return site_s, server_s + time.process_time() - began


def cell(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each mode, in turn")
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[5.0, 22.0])
    parser.add_argument("--arithmetic", action="store_true", help="only masks and sums, in this process")
    parser.add_argument(
        "--modes", nargs="+", default=["clear", *SECURE], choices=MODES, help="clear has to be among them"
    )
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.arithmetic:
        print(
            "| sites | adapter | words | a site's words and masks, s | the server's sum, s | exact to the bit |\n"
            "|---|---|---|---|---|---|"
        )
        for num_sites in a.sites:
            for megabytes in a.megabytes:
                for name in ("repeat", "repeat-32"):
                    settings = SecureAggregation(**SECURE[name])
                    cells = [f"{seconds:.2f}" for seconds in arithmetic(num_sites, megabytes, settings)]
                    word_bits, _ = settings.words(num_sites, "rows")
                    print(
                        f"| {num_sites} | {megabytes:g} MB | {word_bits} bits | {' | '.join(cells)} | yes |", flush=True
                    )
        return
    print(f"# Secure aggregation: seconds a round over real processes\n\nMachine: {describe()}.")
    print(
        f"Median (least to greatest) of {a.repeats * (a.rounds - 1)} rounds of each mode; all sites share the machine.\n"
    )
    print(
        "| sites | adapter | mode | seconds a round | median above clear | least above clear | MB up a site | a site's masks "
        "| server's sum alone |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    before = os.getloadavg()
    for num_sites in a.sites:
        for megabytes in a.megabytes:
            found = measured(num_sites, megabytes, a.rounds, a.repeats, a.modes)
            for mode in a.modes:
                seconds, clear = found[mode], found["clear"]
                more = (statistics.median(seconds) - statistics.median(clear), min(seconds) - min(clear))
                line = [str(num_sites), f"{megabytes:g} MB", mode, cell(seconds), *(f"{s:+.2f}" for s in more)]
                alone = arithmetic(num_sites, megabytes, SecureAggregation(**SECURE[mode])) if mode in SECURE else ()
                line += [f"{found[f'up {mode}'][0] / 1e6:.1f}", *(f"{s:.2f}" for s in alone or ())]
                line += [""] * (2 - len(alone))
                print(f"| {' | '.join(line)} |", flush=True)
    loads = " -> ".join(f"{load[0]:.0f}" for load in (before, os.getloadavg()))
    print(f"\nLoad average (1 minute) of the machine before and after: {loads} on {os.cpu_count()} cores.")


if __name__ == "__main__":
    sys.exit(main())
