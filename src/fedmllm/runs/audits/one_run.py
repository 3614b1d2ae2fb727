"""Lower bound on epsilon from one run with canaries.

Steinke, Nasr and Jagielski, arXiv:2305.08846.
Shapes: m canaries, P numbers of a release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmllm.algorithms.privacy.client_dp import ClientDp, NoisyMean
from fedmllm.algorithms.privacy.noise import simulation_key
from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise
from fedmllm.core.errors import ConfigError
from fedmllm.core.tensors import params_digest
from fedmllm.core.types import ClientUpdate, Params, State
from fedmllm.runs.audits.bounds import correct_guesses, one_run_epsilon
from fedmllm.runs.audits.federation import claimed, cohort_of, noise_key, trained_adapter
from fedmllm.runs.inputs import Inputs

if TYPE_CHECKING:
    from torch import Tensor

_MOST_CACHED_BYTES = 256 * 2**20
FIRST_CANARY = 10**9  # a client number that no client has


class Canaries:
    """m random directions, each included with probability 1/2, and what the releases show of them.

    Args:
        num: m.
        rng: Of the coins and directions: secret to the attack but for the directions.
    """

    def __init__(self, num: int, rng: np.random.Generator) -> None:
        self.is_in = [bool(coin) for coin in rng.integers(0, 2, num)]
        self.scores = np.zeros(num)
        self._cached: NDArray[np.float32] | None = None
        self._seeds = [int(seed) for seed in rng.integers(0, 2**62, num)]

    def direction(self, i: int, size: int) -> NDArray[np.float32]:
        """A unit vector [P]; those of small releases are kept in memory."""
        if self._cached is not None and self._cached.shape[1] == size:
            return np.asarray(self._cached[i])
        vector = np.random.default_rng(self._seeds[i]).standard_normal(size, dtype=np.float32)
        return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)

    def see(self, release_P: NDArray[np.float64]) -> None:
        """Add to each canary's score how far the release points in its direction."""
        num, size = len(self.scores), len(release_P)
        if self._cached is None and num * size * 4 <= _MOST_CACHED_BYTES:
            self._cached = np.stack([self.direction(i, size) for i in range(num)])
        if self._cached is not None:
            self.scores += self._cached @ release_P
            return
        for i in range(num):
            self.scores[i] += float(self.direction(i, len(release_P)) @ release_P)


class CanaryMean:
    """Wraps a noisy mean: canary clients send their direction at the norm of the clip, and each release is scored.

    Args:
        inner: The mechanism under audit.
        canaries: The canary clients.
        num_rows: That a canary claims: a mechanism that weighs by rows is then more sensitive than it may be.
        known: The same mechanism with noise that anyone can compute, to see whether `inner` has it.
        asked: (round, canary) -> whether the canary is in the cohort, if it is in at all: as often as the claim counts.
    """

    def __init__(
        self,
        inner: NoisyMean,
        canaries: Canaries,
        num_rows: int = 1,
        known: NoisyMean | None = None,
        asked: Callable[[int, int], bool] = lambda round_, canary: True,
    ) -> None:
        self._inner, self._canaries, self._num_rows, self._known = inner, canaries, num_rows, known
        self._asked = asked
        self.noise_is_known = False

    def __call__(
        self, updates: Iterable[ClientUpdate], round_: int, like: Params, state: State
    ) -> tuple[ClientUpdate, State, dict[str, Any]]:
        """As `NoisyMean`, with the canaries among the clients."""
        received = list(chain(updates, self._sent(round_, like, self._inner.clip(state))))
        update, own, entry = self._inner(received, round_, like, state)
        if self._known and entry["noise_std"]:
            guess, _, _ = self._known(received, round_, like, state)
            self.noise_is_known |= params_digest(guess.delta) == params_digest(update.delta)
        self._canaries.see(_flat(update.delta))
        return update, own, entry

    def clip(self, state: State) -> float:
        """The clip of the next round."""
        return self._inner.clip(state)

    def _sent(self, round_: int, like: Params, clip: float) -> Iterator[ClientUpdate]:
        import torch

        size = sum(t.numel() for t in like.values())
        for i, is_in in enumerate(self._canaries.is_in):
            if is_in and self._asked(round_, i):
                flat, begin, delta = torch.from_numpy(self._canaries.direction(i, size) * clip), 0, {}
                for name, t in like.items():
                    delta[name] = flat[begin : begin + t.numel()].reshape(t.shape).to(t.dtype)
                    begin += t.numel()
                yield ClientUpdate(FIRST_CANARY + i, delta, self._num_rows, {})


class CanaryNoise(RowNoise):
    """Wraps the noise of rows: canary rows of one client add their direction to the first step of each round.

    Args:
        inner: The mechanism under audit.
        canaries: The canary rows.
        client: Who holds them.
        known: The same mechanism with noise that anyone can compute, in each way in which it could be drawn.
    """

    def __init__(self, inner: RowNoise, canaries: Canaries, client: int, known: Sequence[RowNoise] = ()) -> None:
        self.settings, self.group = inner.settings, inner.group
        self._inner, self._canaries, self._client, self._known = inner, canaries, client, known
        self.noise_is_known = False

    def noisy(self, sum_T: Tensor, client: int, round_: int, step: int) -> Tensor:
        import torch

        if client != self._client or step:
            return self._inner.noisy(sum_T, client, round_, step)
        total = sum_T.detach().clone()
        for i, is_in in enumerate(self._canaries.is_in):
            if is_in:
                row = torch.from_numpy(self._canaries.direction(i, len(total)) * self.settings.clip)
                total += row.to(total)
        out = self._inner.noisy(total, client, round_, step)
        if self.settings.noise_multiplier:
            guesses = (known.noisy(total, client, round_, step) for known in self._known)
            self.noise_is_known |= any(torch.equal(out, guess) for guess in guesses)
        self._canaries.see(out.double().cpu().numpy())
        return out


def one_run(
    inputs: Inputs, num_canaries: int = 200, rng: np.random.Generator | None = None, mechanism: Any = None
) -> dict[str, Any]:
    """Audit an experiment's mechanism.

    Args:
        inputs: Of an experiment with client-dp or row-dp.
        num_canaries: m; half as many guesses.
        rng: Of the canaries; a new one by default.
        mechanism: In place of the experiment's own, to test the audit: a `NoisyMean` or a `RowNoise`.

    Returns:
        A row of the audit's table. `caught` is true if the mechanism breaks its claim.

    Raises:
        ConfigError: The experiment has no privacy to audit.
    """
    e, clients = inputs.experiment, inputs.clients(inputs.experiment.num_rounds)
    rng = rng or np.random.default_rng()
    claim = claimed(e, clients, inputs.train)
    if claim is None:
        raise ConfigError(f'privacy: got "{e.privacy.name}"; --kind one-run needs a claim; allowed: client-dp, row-dp')
    canaries = Canaries(num_canaries, rng)
    members, cohorts = cohort_of(e, clients)
    most = max(members, key=lambda client: sum(client in cohort for cohort in cohorts))
    wrapped: CanaryMean | CanaryNoise
    if isinstance(e.privacy, ClientDp):
        mean = mechanism or NoisyMean(e.privacy, e.cohort_size, noise_key(e))
        known = NoisyMean(e.privacy, e.cohort_size, simulation_key(e.seed))
        if e.cohort == "poisson":  # a canary is drawn as a client is
            drawn = rng.random((e.num_rounds, num_canaries)) < e.cohort_size / len(members)
        else:  # as often as the client that is asked most often
            drawn = np.array([[most in cohort] * num_canaries for cohort in cohorts])
        wrapped = CanaryMean(mean, canaries, 1000, known, lambda round_, i: bool(drawn[round_ - 1, i]))
        trained_adapter(inputs, clients, mean=wrapped)  # type: ignore[arg-type]
    else:
        assert isinstance(e.privacy, RowDp)
        noise = mechanism or RowNoise(e.privacy, noise_key(e), e.run_id(), e.data.group_column())
        ways = [e.privacy.model_copy(update={"simulate_noise": simulated}) for simulated in (False, True)]
        known_rows = [RowNoise(way, simulation_key(e.seed), e.run_id()) for way in ways]
        wrapped = CanaryNoise(noise, canaries, most, known_rows)
        trained_adapter(inputs, clients, noise=wrapped)
    return verdict(canaries, claim.epsilon, claim.delta, wrapped.noise_is_known) | {"claim": claim.claim()}


def verdict(canaries: Canaries, epsilon: float, delta: float, noise_is_known: bool) -> dict[str, Any]:
    """The audit's row of scored canaries.

    Args:
        canaries: With the scores of all releases.
        epsilon: Claimed.
        delta: Claimed.
        noise_is_known: Whether the noise is what anyone can compute from the record.

    Returns:
        kind, attack, bound, largest_bound, correct, guesses, caught, reason.
    """
    m = len(canaries.is_in)
    r = m // 2
    correct = correct_guesses(canaries.scores, canaries.is_in, r)
    bound = one_run_epsilon(delta, m, r, correct)
    reasons = ["the noise can be computed from the public seed"] if noise_is_known else []
    if bound > epsilon:
        reasons.append(f"epsilon is over {bound:.3g}, and {epsilon:.3g} is claimed")
    return {
        "kind": "one-run",
        "attack": f"{m} canaries, {correct} of {r} guesses right",
        "bound": bound,
        "largest_bound": one_run_epsilon(delta, m, r, r),
        "correct": correct,
        "guesses": r,
        "caught": bool(reasons),
        "reason": "; ".join(reasons),
    }


def _flat(params: Params) -> NDArray[np.float64]:
    return np.concatenate([t.double().reshape(-1).numpy() for t in params.values()])
