"""Learning-rate schedules over the rounds and within a round.

As published, without the published faults (protocol, 5.8 and 5.10).
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "constant", "cosine-reference"]


def round_factor(schedule: Schedule, round_: int, num_rounds: int) -> float:
    """Factor of the base rate in a round, counted from 1.

    Warm-up over 1 % of the rounds, then cosine to 0 at the end of the last round, so that the last round still trains.
    "cosine-reference" multiplies the first round's rate if 1 % of the rounds is less than one: by 2 of 50 rounds, 4 of 25.
    """
    if schedule == "constant":
        return 1.0
    warm = 0.01 * num_rounds
    done = round_ - 1
    if done < warm:
        rising = round_ / warm
        return rising if schedule == "cosine-reference" else min(1.0, rising)
    return _cosine((done - warm) / (num_rounds - warm))


def step_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """Factor of the round's rate at an optimizer step, counted from 0: linear warm-up of 1 %, then cosine.

    "cosine-reference" rounds the warm-up up, so that the first step is at rate 0 and a client of one step never trains.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine-reference":
        warm = math.ceil(0.01 * num_steps)
        return step / warm if step < warm else _cosine((step - warm) / max(1, num_steps - warm))
    warm = int(0.01 * num_steps)
    return (step + 1) / (warm + 1) if step < warm else _cosine((step - warm) / (num_steps - warm))


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
