"""Epsilon of repeated Gaussian releases.

The closed form is built in. The extra `dp` (dp-accounting) is needed only to count the secrecy of a Poisson draw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

CLOSED_FORM = "closed form (Gaussian, arXiv:1905.02383)"


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Smallest delta of a mu-GDP mechanism: Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2) (arXiv:1905.02383, Cor. 2.13).

    Args:
        epsilon: At least 0.
        mu: Sensitivity over standard deviation, of all releases together; above 0.

    Returns:
        A probability.
    """
    from scipy.special import log_ndtr, ndtr

    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(min(700.0, epsilon + log_ndtr(-mu / 2 - epsilon / mu))))


def gaussian_epsilon(noise_multiplier: float, num_releases: int, delta: float) -> float:
    """Epsilon of `num_releases` Gaussian releases of the same unit, without amplification by sampling.

    Args:
        noise_multiplier: z, standard deviation over sensitivity.
        num_releases: Releases that contain the unit; they compose to mu = sqrt(num_releases) / z.
        delta: In (0, 1).

    Returns:
        Epsilon; infinity if there is no noise, 0 if there is no release.
    """
    from scipy.optimize import brentq

    if not num_releases:
        return 0.0
    if not noise_multiplier:
        return math.inf
    mu = math.sqrt(num_releases) / noise_multiplier
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, mu) > delta:
        high *= 2
        if high > 1e6:  # the noise is next to none
            return math.inf
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, high, xtol=1e-10, rtol=1e-12))


def poisson_epsilon(noise_multiplier: float, releases: Sequence[int], delta: float, rate: float) -> tuple[float, str]:
    """Epsilon if each unit is drawn for a round with probability `rate` by a secret draw.

    A round that is released c times, as after a stop, has one draw: it is one Gaussian release with z / sqrt(c) of one sample,
    which costs more than c samples of their own.

    Args:
        noise_multiplier: z.
        releases: Of each round, whether they contain the unit or not.
        delta: In (0, 1).
        rate: q, in (0, 1].

    Returns:
        Epsilon under replacing a unit's contributions by zeros (dp-accounting's ADD_OR_REMOVE_ONE), and the accountant.
        Without the extra `dp` the draw is not counted: the
        closed form is a valid, larger epsilon.
    """
    plain = gaussian_epsilon(noise_multiplier, sum(releases), delta)
    if rate >= 1 or plain in (0.0, math.inf):
        return plain, CLOSED_FORM
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        return plain, f"{CLOSED_FORM}; the draw is not counted: pip install fedmllm[dp]"
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for times, num_rounds in sorted(Counter(releases).items()):
        once = dp_accounting.GaussianDpEvent(noise_multiplier / math.sqrt(times))
        event = dp_accounting.PoissonSampledDpEvent(rate, once)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, num_rounds))
    return float(accountant.get_epsilon(delta)), f"PLD, dp-accounting {version('dp-accounting')}"
