"""Cost of secure aggregation for a round over real processes, and of its arithmetic alone.

    python benchmarks/secure.py > results/secure.md

Sites on loopback with TLS, 12 rows each, one optimiser step a round; the LoRA of the embedded backbone is made so wide that the
adapter has the bytes asked for. The same federation runs the experiment in the clear, then with masks, and again, so that all
see the same load; the first round of each run, in which bases are loaded and keys exchanged, is left out. Wall time of a round,
training included. Target: <= 2 s a round above the deployment without masks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import flower_federation as trial

from fedmllm.flower.secure.fixed_point import from_words, to_words
from fedmllm.flower.secure.masks import add_masks

BYTES_A_RANK = 131_072 // 8  # of the embedded backbone's adapter
MODES = {
    "clear": (),
    "repeat": ("--set", "engine.secure={}"),
    "recover": ("--set", 'engine.secure={drop_outs="recover"}'),
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


def arithmetic(num_sites: int, megabytes: float) -> tuple[float, float]:
    """Seconds of one site's words and masks, and of the server's sum of all."""
    delta = np.random.default_rng(0).normal(0, 1e-3, int(megabytes * 1e6 / 4)).astype(np.float32)
    keys = {f"site-{i:02d}": bytes([i] * 32) for i in range(1, num_sites)}
    began = time.perf_counter()
    words = add_masks(to_words(delta, 100, 32, 8.0), "site-00", keys)
    site_s, began = time.perf_counter() - began, time.perf_counter()
    total = np.zeros_like(words)
    for _ in range(num_sites):
        total += words
    from_words(total, 32)
    return site_s, time.perf_counter() - began


def cell(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each mode, in turn")
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[5.0, 22.0])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="clear has to be among them")
    a = parser.parse_args()
    torch.set_num_threads(1)
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
            alone = [f"{s:.2f}" for s in arithmetic(num_sites, megabytes)]
            for mode in a.modes:
                seconds, clear = found[mode], found["clear"]
                more = (statistics.median(seconds) - statistics.median(clear), min(seconds) - min(clear))
                line = [str(num_sites), f"{megabytes:g} MB", mode, cell(seconds), *(f"{s:+.2f}" for s in more)]
                line += [f"{found[f'up {mode}'][0] / 1e6:.1f}", *(alone if mode != "clear" else ["", ""])]
                print(f"| {' | '.join(line)} |", flush=True)
    loads = " -> ".join(f"{load[0]:.0f}" for load in (before, os.getloadavg()))
    print(f"\nLoad average (1 minute) of the machine before and after: {loads} on {os.cpu_count()} cores.")


if __name__ == "__main__":
    sys.exit(main())
