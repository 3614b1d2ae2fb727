"""Time of a round with row-dp relative to one without, on the tiny model: `python benchmarks/row_dp.py`.

Rounds alternate, so both see the same machine; the ratio is that of the medians.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise
from fedmllm.backbones.base import Tiny
from fedmllm.config import engine as engines
from fedmllm.core.types import Round, Sent
from fedmllm.federation.engines.stacked.engine import StackedEngine
from fedmllm.testing import COHORT, SIZES, examples, federation, perturbed

REPEATS = 9


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clients = federation(Tiny().load(seed=0), examples(Path(folder)), clip_norm=0.0, batch_size=4, accumulation=1)
        start = perturbed(clients.backbone)
        noise = RowNoise(RowDp(name="row-dp", noise_multiplier=1.0, clip=0.5), b"k" * 32, "0" * 12)
        made = {
            "ordinary": StackedEngine(engines.Stacked(), clients),
            "row-dp": StackedEngine(engines.Stacked(), replace(clients, row_noise=noise)),
        }
        at = Round(1, 0, 4, tuple(COHORT), len(SIZES))
        times: dict[str, list[float]] = {name: [] for name in made}
        for repeat in range(REPEATS + 1):
            for name, engine in made.items():
                began = time.process_time()
                list(engine(at, {client: Sent(start) for client in COHORT}))
                if repeat:  # the first one encodes the rows
                    times[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{platform.machine()}, torch {torch.__version__}, 1 thread, tiny model, {sum(SIZES)} rows of {len(SIZES)} clients"
    )
    for name, median in medians.items():
        spread = f"{min(times[name]):.3f} to {max(times[name]):.3f}"
        print(f"{name:<9} median {median:.3f} s of {REPEATS} rounds ({spread}), processor time")
    print(f"ratio     {medians['row-dp'] / medians['ordinary']:.3f}")


if __name__ == "__main__":
    main()
