"""Statistics of audits: lower bounds on epsilon, membership, exposure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def one_run_p_value(epsilon: float, delta: float, num_canaries: int, num_guesses: int, num_correct: int) -> float:
    """Probability of so many correct guesses if the mechanism is (epsilon, delta)-private.

    Steinke, Nasr and Jagielski, NeurIPS 2023, arXiv:2305.08846, Thm. 5.2:
    P[Bin(r, q) >= v] + 2 m delta max_i P[v - i <= Bin(r, q) < v] / i, q = e^eps / (1 + e^eps).

    Args:
        epsilon: Of the hypothesis.
        delta: Of the hypothesis.
        num_canaries: m, each included with probability 1/2.
        num_guesses: r; on the others the attack abstains.
        num_correct: v.

    Returns:
        A bound on the p-value, at most 1.
    """
    from scipy.stats import binom

    r, v = num_guesses, num_correct
    guess = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(v - 1, r, guess))
    steps = np.arange(1, v + 1)
    within = binom.cdf(v - 1, r, guess) - binom.cdf(v - 1 - steps, r, guess)
    alpha = float(np.max(within / steps)) if v else 0.0
    return min(1.0, beta + 2 * num_canaries * delta * alpha)


def one_run_epsilon(
    delta: float, num_canaries: int, num_guesses: int, num_correct: int, confidence: float = 0.95
) -> float:
    """Largest epsilon that the guesses refute.

    Args:
        delta: At which epsilon is stated.
        num_canaries: m.
        num_guesses: r, chosen before the scores are seen.
        num_correct: v.
        confidence: Of the bound.

    Returns:
        A lower bound on epsilon; 0 if the guesses refute nothing.
    """
    low, high = 0.0, 50.0
    if one_run_p_value(low, delta, num_canaries, num_guesses, num_correct) > 1 - confidence:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        refuted = one_run_p_value(middle, delta, num_canaries, num_guesses, num_correct) < 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def correct_guesses(scores: ArrayLike, is_in: Sequence[bool], num_guesses: int) -> int:
    """Guess "in" for the highest scores and "out" for the lowest, half of the guesses each.

    Args:
        scores: One per canary; higher for those that are in.
        is_in: The truth.
        num_guesses: In all, at most the number of canaries.

    Returns:
        How many guesses are right.
    """
    order = np.argsort(np.asarray(scores), kind="stable")
    truth = np.asarray(is_in)[order]
    half = num_guesses // 2
    return int((~truth[:half]).sum() + truth[len(truth) - (num_guesses - half) :].sum())


def lira_scores(phi_SN: NDArray[np.float64], in_SN: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Log-likelihood ratios of membership, each shadow in turn as the target (Carlini et al., arXiv:2112.03570).

    Args:
        phi_SN: Logit of each row's true answer under each shadow's adapter.
        in_SN: Whether the shadow was trained on the row.

    Returns:
        [S, N], higher for members; of one variance for all rows, because shadows are few.
    """
    num_shadows = len(phi_SN)
    out = np.zeros_like(phi_SN)
    for s in range(num_shadows):
        rest = np.arange(num_shadows) != s
        phi, member = phi_SN[rest], in_SN[rest]
        means, deviations = [], []
        for side in (member, ~member):
            count = np.maximum(side.sum(axis=0), 1)
            mean = np.where(side.any(axis=0), (phi * side).sum(axis=0) / count, phi.mean(axis=0))
            means.append(mean)
            deviations.append((phi - mean)[side])
        spread = [max(float(np.std(d)), 1e-6) for d in deviations]
        logs = [
            -((phi_SN[s] - mean) ** 2) / (2 * std**2) - math.log(std) for mean, std in zip(means, spread, strict=True)
        ]
        out[s] = logs[0] - logs[1]
    return out


def true_positive_rate(scores: ArrayLike, is_in: ArrayLike, false_positive_rate: float) -> float:
    """Share of the members above the threshold that this share of the others passes.

    Args:
        scores: Higher for members.
        is_in: The truth.
        false_positive_rate: Of the others, at most.

    Returns:
        0 to 1; a threshold that no other passes, if there are too few of them for the rate.
    """
    values, truth = np.asarray(scores).ravel(), np.asarray(is_in, dtype=bool).ravel()
    others = np.sort(values[~truth])[::-1]
    allowed = math.floor(false_positive_rate * len(others))
    threshold = others[allowed] if allowed < len(others) else -math.inf
    return float((values[truth] > threshold).mean())


def exposure(scores: Sequence[float], true: int) -> float:
    """log2 of the candidates minus log2 of the true one's rank (Carlini et al., arXiv:1802.08232).

    Args:
        scores: Log-likelihood of each candidate.
        true: Index of the one that was trained on.

    Returns:
        0 to log2 of their number; about 1 if nothing was learned.
    """
    rank = 1 + sum(score > scores[true] for i, score in enumerate(scores) if i != true)
    return math.log2(len(scores)) - math.log2(rank)
