"""LoRA aggregation methods: the identities of their papers in float64, and what every member must keep to.

D != C everywhere, so that a transposed product or a confusion of A and B cannot pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load, save

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.lowrank import pairs, product_norm, svd, truncated
from fedmllm.algorithms.objectives import ClientView
from fedmllm.config.experiment import FAMILIES, Experiment
from fedmllm.config.train import UpdateFilter
from fedmllm.core.errors import ConfigError, DataError, FedmllmError, NothingToAverage
from fedmllm.core.types import ClientUpdate, Example, Params, Round, Sent, State
from fedmllm.federation.rounds import Progress, federate
from fedmllm.runs.inputs import stated_rank
from fedmllm.runs.suites.suite import Suite

ROOT = Path(__file__).parent.parent
C, D, R = 11, 7, 4
MODULES = ("model.q_proj", "model.v_proj")
RANKS = (2, 4, 3)
SHRINKING = {"hetlora", "hetlora, pruned"}  # directions above a client's rank shrink in every round, as published
LORA = sorted(
    {
        "fedavg",
        "ffa-lora",
        "rolora",
        "fedsa-lora",
        "fedrot-lora",
        "lora-fair",
        "fedex-lora",
        "flora",
        "flexlora",
        "raflora",
    }
    | {
        "florist",
        "fedsvd",
        "hetlora",
        "fedilora",
        "fed-plora",
        "fedalt",
        "yoco",
        "yoco-reference",
        "lora-fair-reference",
    }
)
PRUNED = "hetlora, pruned"
MIXED = [name for name in LORA if FAMILIES["aggregator"].members[name].mixed_ranks]  # type: ignore[attr-defined]
CAN_MIX = {*MIXED, PRUNED}
ROWS = (10, 30, 20)


def name_of(module: str, factor: str) -> str:
    return f"{module}.lora_{factor}.weight"


def adapter(seed: int, rank: int = R, zero_b: bool = False) -> Params:
    noise = torch.Generator().manual_seed(seed)
    tree = {}
    for module in MODULES:
        tree[name_of(module, "A")] = torch.randn(rank, C, generator=noise, dtype=torch.float64)
        b = torch.randn(D, rank, generator=noise, dtype=torch.float64)
        tree[name_of(module, "B")] = 0 * b if zero_b else b
    return {"head.weight": torch.randn(3, generator=noise, dtype=torch.float64), **tree}


def at(number: int = 2, ranks: Sequence[int] = ()) -> Round:
    return Round(number, 0, 9, tuple(range(len(ROWS))), 5, tuple(ranks))


def trained(
    aggregator: Aggregator, params: Params, state: State, round_: Round, seed: int = 50, size: float = 0.3
) -> list[ClientUpdate]:
    """Made-up training: each client adds noise to what it received."""
    updates = []
    for client, rows in enumerate(ROWS):
        noise = torch.Generator().manual_seed(seed + client)
        returned = aggregator.sends(params, state, round_, client).returned()
        delta = {n: size * torch.randn(t.shape, generator=noise, dtype=t.dtype) for n, t in returned.items()}
        updates.append(ClientUpdate(client, delta, rows, {}))
    return updates


def step(
    aggregator: Aggregator, params: Params, state: State, round_: Round, **made: float
) -> tuple[Params, State, list[Params]]:
    """One round -> (params, state, the clients' whole functions)."""
    updates = trained(aggregator, params, state, round_, **made)  # type: ignore[arg-type]
    functions = []
    for update in updates:
        sent = aggregator.sends(params, state, round_, update.client)
        local = {n: t + update.delta.get(n, 0 * t) for n, t in sent.start.items()}
        functions.append(dense(local, sent.frozen))
    after, moved = aggregator.apply(params, state, round_, updates)
    return after, moved, functions


def dense(params: Params, frozen: Params | None = None) -> Params:
    """Module -> B A; here, where D and C are small."""
    found = {name: b @ a for name, (b, a) in pairs(params).items()}
    return {n: t + (pairs(frozen)[n][0] @ pairs(frozen)[n][1] if frozen else 0) for n, t in found.items()}


def mean(functions: Sequence[Params]) -> Params:
    return {n: sum(k / sum(ROWS) * f[n] for k, f in zip(ROWS, functions, strict=True)) for n in functions[0]}


def off(x: Params, y: Params) -> float:
    return max(float((x[n] - y[n]).norm() / y[n].norm().clamp(min=1e-30)) for n in y)


def pick(name: str, **settings: object) -> Aggregator:
    if name == PRUNED:
        name, settings = "hetlora", {"tail_penalty": 0.1, "tail_from": 0.7, **settings}
    return Aggregator.pick({"name": name, **settings}, "aggregator")


# --- low-rank arithmetic


def test_svd_of_a_product_is_the_dense_one_and_its_sign_is_fixed() -> None:
    b, a = pairs(adapter(0, rank=5))[name_of(MODULES[0], "A")]
    u, s, vt = svd((b, a))
    assert torch.allclose((u * s) @ vt, b @ a, atol=1e-12)
    assert torch.allclose(s[:5], torch.linalg.svdvals(b @ a)[:5], atol=1e-12)
    top = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    assert bool((top > 0).all())
    again = svd((-b, -a))
    assert torch.allclose(u, again[0], atol=1e-12)


def test_truncation_loses_exactly_the_small_singular_values() -> None:
    b, a = pairs(adapter(0, rank=5))[name_of(MODULES[0], "A")]
    s = torch.linalg.svdvals(b @ a)
    low = truncated((b, a), 2)
    assert float((b @ a - low[0] @ low[1]).norm()) == pytest.approx(float(s[2:].pow(2).sum().sqrt()), rel=1e-12)
    assert torch.allclose(low[0].mT @ low[0], low[1] @ low[1].mT, atol=1e-12)  # balanced
    assert truncated((b, a), 6)[1].shape == (6, C)


def test_norm_of_a_sum_of_products_without_forming_it() -> None:
    one, two = pairs(adapter(0)), pairs(adapter(1))
    for n in one:
        expected = float((one[n][0] @ one[n][1] + two[n][0] @ two[n][1]).norm())
        assert product_norm([one[n], two[n]]) == pytest.approx(expected, rel=1e-12)


# --- what a round's record says about the aggregation


def observed(
    aggregator: Aggregator, params: Params, state: State, round_: Round
) -> tuple[Params, State, dict[str, Any]]:
    """One round by the loop itself -> (params, state, log)."""

    def engine(at: Round, sends: Mapping[int, Sent]) -> list[ClientUpdate]:
        return trained(aggregator, params, state, at)

    begin = Progress(round_.number - 1, params, state)
    ranks, cohort = round_.ranks, list(round_.cohort)
    rounds = federate(begin, engine, aggregator, lambda _: cohort, round_.number, UpdateFilter(), None, 0, 5, ranks)
    (end,) = rounds
    return end.params, end.state, end.log


@pytest.mark.parametrize("ranks", [(), RANKS])
@pytest.mark.parametrize("settings", [{"name": "flexlora"}, {"name": "raflora"}, {"name": "florist", "tau": 0.7}])
def test_truncation_error_is_the_share_of_the_dropped_energy(settings: dict, ranks: Sequence[int]) -> None:
    aggregator, params = Aggregator.pick(settings, "aggregator"), adapter(1)
    _, _, log = observed(aggregator, params, {}, at(2, ranks))
    updates = trained(aggregator, params, {}, at(2, ranks))
    whole = aggregator.model_copy()
    object.__setattr__(whole, "cut", lambda target, rank: target)
    uncut, _ = whole.apply(params, {}, at(2, ranks), updates)
    result = aggregator.result(*aggregator.apply(params, {}, at(2, ranks), updates))
    lost = sum(float((dense(uncut)[n] - f).norm()) ** 2 for n, f in dense(result).items())
    before = sum(float(f.norm()) ** 2 for f in dense(uncut).values())
    assert log["truncation_error"] == pytest.approx((lost / before) ** 0.5, rel=1e-9)
    assert log["result_rank"] == max(a.shape[0] for _, a in pairs(result).values())


def test_truncation_error_of_a_capped_frozen_adapter_is_its_aggregation_error() -> None:
    params = adapter(1, zero_b=True)  # without it, the head start of the live adapter counts as well
    for name in ("flora", "fedex-lora"):
        free, capped = pick(name), pick(name, cap=5)
        assert "truncation_error" not in observed(free, params, free.init(params), at(1))[2]
        _, _, log = observed(capped, params, capped.init(params), at(1))
        assert log["truncation_error"] > 0.01
        if name == "flora":
            assert log["truncation_error"] == pytest.approx(log["aggregation_error"], rel=1e-9)


@pytest.mark.parametrize("name", ["fedavg", "ffa-lora", "hetlora", "fedilora", "fed-plora", "lora-fair", "fedrot-lora"])
def test_members_that_cut_nothing_have_no_truncation_error(name: str) -> None:
    _, _, log = observed(pick(name), adapter(1), {}, at(2))
    assert "truncation_error" not in log
    assert log["aggregation_error"] >= 0


# --- exact members: the global model is the mean of the clients' functions


@pytest.mark.parametrize("name", ["ffa-lora", "fedex-lora", "flora", "fedsvd", "rolora"])
def test_exact_members_add_the_mean_of_the_products(name: str) -> None:
    aggregator, params = pick(name), adapter(1)
    state = aggregator.init(params)
    for number in (1, 2, 3):
        params, state, functions = step(aggregator, params, state, at(number))
        assert off(dense(aggregator.result(params, state)), mean(functions)) < 1e-12


def test_flora_is_exact_at_unequal_ranks() -> None:
    aggregator, params = pick("flora"), adapter(1)
    state = aggregator.init(params)
    for number in (1, 2):
        params, state, functions = step(aggregator, params, state, at(number, RANKS))
        result = aggregator.result(params, state)
        assert off(dense(result), mean(functions)) < 1e-12
        assert result[name_of(MODULES[0], "A")].shape[0] == number * sum(RANKS)


def test_fedavg_is_not_exact() -> None:
    params = adapter(1)
    after, _, functions = step(pick("fedavg"), params, {}, at())
    assert off(dense(after), mean(functions)) > 0.01


def test_fedex_needs_no_correction_for_one_client_or_equal_a() -> None:
    aggregator, params = pick("fedex-lora"), adapter(1)
    state = aggregator.init(params)
    updates = trained(aggregator, params, state, at())
    _, alone = aggregator.apply(params, state, at(), updates[:1])
    assert alone["frozen"][name_of(MODULES[0], "A")].shape[0] == 0
    equal = [replace(u, delta={n: 0 * t if "lora_A" in n else t for n, t in u.delta.items()}) for u in updates]
    _, same = aggregator.apply(params, state, at(), equal)
    assert max(float(t.norm()) for t in dense(same["frozen"]).values()) < 1e-12


def test_the_frozen_adapter_is_compressed_above_its_cap() -> None:
    aggregator, params = pick("flora", cap=5), adapter(1)
    state = aggregator.init(params)
    params, state, functions = step(aggregator, params, state, at(1))
    best = {n: truncated((t, torch.eye(C, dtype=t.dtype)), 5) for n, t in mean(functions).items()}
    assert off(dense(aggregator.result(params, state)), {n: b @ a for n, (b, a) in best.items()}) < 1e-12


# --- sharing


def test_ffa_never_moves_or_sends_a_and_rolora_alternates() -> None:
    params = adapter(1)
    a_names, b_names = ({name_of(m, f) for m in MODULES} for f in "AB")
    sent = pick("ffa-lora").sends(params, {}, at(), 0)
    assert set(sent.returned()) == {*b_names, "head.weight"}
    assert set(sent.travelling()) == {*b_names, "head.weight"}
    for number, moving in ((1, b_names), (2, a_names)):
        rolora = pick("rolora")
        assert set(rolora.sends(params, {}, at(number), 0).returned()) == {*moving, "head.weight"}
        after, _, _ = step(rolora, params, {}, at(number))
        assert {n for n in params if not torch.equal(after[n], params[n])} == {*moving, "head.weight"}
    one, _, _ = step(pick("ffa-lora"), params, {}, at(1))
    two, _, _ = step(pick("rolora"), params, {}, at(1))
    assert all(torch.equal(one[n], two[n]) for n in params)  # round 1 of RoLoRA is FFA-LoRA's


def test_a_resting_factor_keeps_its_optimizer_state() -> None:
    aggregator, params = pick("rolora", server={"name": "fedadam", "lr": 0.01}), adapter(1)
    state = aggregator.init(params)
    _, moved, _ = step(aggregator, params, state, at(1))
    assert aggregator.label() == "rolora+fedadam"
    for module in MODULES:
        assert torch.equal(moved["server.v"][name_of(module, "A")], state["server.v"][name_of(module, "A")])
        assert not torch.equal(moved["server.v"][name_of(module, "B")], state["server.v"][name_of(module, "B")])


def test_fedsa_averages_a_and_leaves_b_with_the_clients() -> None:
    aggregator, params = pick("fedsa-lora"), adapter(1, zero_b=True)
    sent = aggregator.sends(params, {}, at(), 0)
    assert {n for n in sent.travelling() if "lora_B" in n} == set()
    after, _, _ = step(aggregator, params, {}, at())
    assert all(torch.equal(after[n], params[n]) for n in params if "lora_B" in n)
    kept = {n: t + 1 for n, t in params.items() if "lora_B" in n}
    own = aggregator.personal(after, {}, 0, kept)
    assert own is not None
    assert all(torch.equal(own[n], kept.get(n, after[n])) for n in params)


# --- LoRA-FAIR and FedRot-LoRA


def test_lora_fair_is_nearer_to_the_mean_and_at_no_penalty_a_least_squares_fit() -> None:
    params = adapter(1)
    plain, _, functions = step(pick("fedavg"), params, {}, at())
    target = mean(functions)

    def distance(after: Params) -> float:
        return sum(float((target[n] - f).norm()) for n, f in dense(after).items())

    fair, _, _ = step(pick("lora-fair", penalty=1e-6), params, {}, at())
    assert distance(fair) < 0.9 * distance(plain)
    exact, _, _ = step(pick("lora-fair", penalty=0.0), params, {}, at())
    for n, (b, a) in pairs(exact).items():
        assert float(((target[n] - b @ a) @ a.mT).norm()) < 1e-11


def test_lora_fair_reference_descends_the_published_objective() -> None:
    """Value and minimum against autograd and dense matrices; a large price keeps the mean."""
    params = adapter(1)
    plain, _, functions = step(pick("fedavg"), params, {}, at(), size=2.0)
    target = mean(functions)

    def objective(after: Params, penalty: float) -> float:
        total = 0.0
        for n, product in dense(after).items():
            moved = after[n.replace("lora_A", "lora_B")] - plain[n.replace("lora_A", "lora_B")]
            cosine = (product * target[n]).sum() / (product.norm() * target[n].norm())
            total += float(1 - cosine + penalty * moved.norm())
        return total

    for penalty in (0.0, 1e-3):
        after, _, _ = step(pick("lora-fair-reference", penalty=penalty), params, {}, at(), size=2.0)
        assert objective(after, penalty) < 0.9 * objective(plain, penalty)
        assert all(torch.equal(after[n], plain[n]) for n in params if "lora_B" not in n)
        for n in pairs(after):
            best = after[n.replace("lora_A", "lora_B")].clone().requires_grad_()
            b_mean = plain[n.replace("lora_A", "lora_B")]
            product = best @ plain[n]
            loss = 1 - (product * target[n]).sum() / (product.norm() * target[n].norm())
            (loss + penalty * (best - b_mean).norm()).backward()
            assert best.grad is not None
            assert float(best.grad.norm() * b_mean.norm()) < 0.01  # at the start: 0.27 and more
    far, _, _ = step(pick("lora-fair-reference", penalty=10.0), params, {}, at(), size=2.0)
    assert all(torch.equal(far[n], plain[n]) for n in params)  # any move costs more than it gains


@pytest.mark.parametrize("name", ["lora-fair", "lora-fair-reference"])
def test_lora_fair_changes_nothing_if_all_a_are_equal(name: str) -> None:
    aggregator, params = pick(name), adapter(1)
    updates = trained(aggregator, params, {}, at())
    equal = [replace(u, delta={n: 0 * t if "lora_A" in n else t for n, t in u.delta.items()}) for u in updates]
    fair, _ = aggregator.apply(params, {}, at(), equal)
    plain, _ = pick("fedavg").apply(params, {}, at(), equal)
    assert off(fair, plain) < 1e-12


@pytest.mark.parametrize("number", [2, 3])
def test_fedrot_undoes_rotations_between_clients(number: int) -> None:
    """Every client ends at the start up to a rotation: the plain mean destroys the product, the turned one keeps it."""
    aggregator, params = pick("fedrot-lora", amount=1.0), adapter(1)
    updates = []
    for client, rows in enumerate(ROWS):
        noise = torch.Generator().manual_seed(client)
        q, _ = torch.linalg.qr(torch.randn(R, R, generator=noise, dtype=torch.float64))
        q[:, 0] *= torch.linalg.det(q)
        turned = dict(params)
        for module in MODULES:
            a, b = name_of(module, "A"), name_of(module, "B")
            turned |= {a: q.mT @ params[a], b: params[b] @ q}
        updates.append(ClientUpdate(client, {n: turned[n] - params[n] for n in params}, rows, {}))
    after, _ = aggregator.apply(params, {}, at(number), updates)
    assert off(dense(after), dense(params)) < 1e-12
    plain, _ = pick("fedavg").apply(params, {}, at(number), updates)
    assert off(dense(plain), dense(params)) > 0.1


def test_fedrot_without_rotation_is_fedavg_to_the_byte() -> None:
    params = adapter(1)
    plain, _, _ = step(pick("fedavg"), params, {}, at())
    none, _, _ = step(pick("fedrot-lora", amount=0.0), params, {}, at())
    first, _, _ = step(pick("fedrot-lora"), params, {}, at(1))
    assert all(torch.equal(none[n], plain[n]) for n in plain)
    assert all(torch.equal(first[n], plain[n]) for n in plain)


# --- spectral members


@pytest.mark.parametrize(
    "settings", [{"name": "flexlora"}, {"name": "flexlora", "weights": "plain"}, {"name": "raflora"}]
)
def test_spectral_members_are_the_best_of_their_rank_at_equal_ranks(settings: dict) -> None:
    aggregator, params = Aggregator.pick(settings, "aggregator"), adapter(1)
    after, _, functions = step(aggregator, params, {}, at())
    for n, target in mean(functions).items():
        s = torch.linalg.svdvals(target)
        b, a = pairs(after)[n]
        assert float((target - b @ a).norm()) == pytest.approx(float(s[R:].pow(2).sum().sqrt()), rel=1e-10)
        assert torch.allclose(b.mT @ b, a @ a.mT, atol=1e-12)


@pytest.mark.parametrize("ranks", [(), RANKS])
@pytest.mark.parametrize("name", ["flexlora", "raflora"])
def test_the_split_changes_the_factors_and_not_their_product(name: str, ranks: Sequence[int]) -> None:
    params = adapter(1)
    updates = trained(pick(name), params, {}, at(ranks=ranks))
    balanced, _ = pick(name).apply(params, {}, at(ranks=ranks), updates)
    split, _ = pick(name, split="orthonormal").apply(params, {}, at(ranks=ranks), updates)
    assert off(dense(split), dense(balanced)) < 1e-12
    for b, a in pairs(split).values():
        assert torch.allclose(a @ a.mT, torch.eye(R, dtype=a.dtype), atol=1e-12)
        sizes = b.norm(dim=0)
        assert bool((sizes[:-1] >= sizes[1:]).all())


def test_the_default_split_is_not_in_the_run_id() -> None:
    for name in ("flexlora", "raflora"):
        ids = [
            Experiment.parse({**DATA, "aggregator": {"name": name, **split}}).run_id()
            for split in ({}, {"split": "balanced"}, {"split": "orthonormal"})
        ]
        assert ids[0] == ids[1] != ids[2]


def test_flexlora_innovation_and_raflora_at_unequal_ranks() -> None:
    """G + sum p_k (B_k A_k - start): by dense matrices; raFLoRA: level by level."""
    params = adapter(1)
    aggregator = pick("flexlora")
    updates = trained(aggregator, params, {}, at(ranks=RANKS))
    after, _ = aggregator.apply(params, {}, at(ranks=RANKS), updates)
    ra, _ = pick("raflora").apply(params, {}, at(ranks=RANKS), updates)
    for n, (b, a) in pairs(params).items():
        m, levels = n.replace("lora_A", "lora_B"), 0 * (b @ a)
        target, locals_ = b @ a, []
        for u, r in zip(updates, RANKS, strict=True):
            local = (b[:, :r] + u.delta[m], a[:r] + u.delta[n])
            locals_.append(local)
            target = target + u.num_examples / sum(ROWS) * (local[0] @ local[1] - b[:, :r] @ a[:r])
        for low, high in ((0, 2), (2, 3), (3, 4)):
            able = [(k, local) for k, local, r in zip(ROWS, locals_, RANKS, strict=True) if r >= high]
            levels = levels + sum(k / sum(k for k, _ in able) * (x[:, low:high] @ y[low:high]) for k, (x, y) in able)
        for found, wanted in ((after, target), (ra, levels)):
            u, s, vt = torch.linalg.svd(wanted)
            best = (u[:, :R] * s[:R]) @ vt[:R]
            assert torch.allclose(dense(found)[n], best, atol=1e-11)


def test_florist_keeps_the_least_rank_with_the_energy() -> None:
    aggregator, params = pick("florist", tau=0.8), adapter(1)
    after, state, functions = step(aggregator, params, {}, at())
    result = aggregator.result(after, state)
    for n, target in mean(functions).items():
        energy = torch.linalg.svdvals(target).pow(2).cumsum(0)
        rank = min(R, int((energy < 0.8 * energy[-1]).sum()) + 1)
        _, a = pairs(result)[n]
        assert a.shape[0] == rank
        assert torch.allclose(a @ a.mT, torch.eye(rank, dtype=a.dtype), atol=1e-12)
    assert off(dense(result), dense(after)) < 1e-12


def test_fedsvd_turns_without_changing_the_product_and_leaves_a_while_b_is_zero() -> None:
    params = adapter(1)
    after, _, _ = step(pick("fedsvd"), params, {}, at())
    for _, a in pairs(after).values():
        assert torch.allclose(a @ a.mT, torch.eye(R, dtype=a.dtype), atol=1e-12)
    later, _, _ = step(pick("fedsvd", period=4), params, {}, at(2))
    assert off(dense(after), dense(later)) < 1e-12
    assert all(torch.equal(later[n], params[n]) for n in params if "lora_A" in n)
    start = adapter(1, zero_b=True)
    still, _, _ = step(pick("fedsvd"), start, {}, at(), size=0.0)
    assert all(torch.equal(still[n], start[n]) for n in start)


def test_a_dead_direction_is_revived_without_changing_the_model() -> None:
    aggregator = pick("flexlora")
    params = adapter(1)
    for module in MODULES:
        params[name_of(module, "B")][:, 2:] = 0
    after, _, _ = step(aggregator, params, {}, at(), size=0.0)
    for b, a in pairs(after).values():
        assert bool((b[:, 2:] == 0).all())
        assert bool((a.norm(dim=1) > 0.1).all())
        assert bool((a[2:].abs() <= 1 / C**0.5).all())
    assert off(dense(after), dense(params)) < 1e-12


# --- by direction


@pytest.mark.parametrize("settings", [{"name": "fedilora", "edit_below": 0.0}, {"name": "fed-plora"}])
def test_at_equal_ranks_by_direction_is_fedavg_to_the_byte(settings: dict) -> None:
    params = {n: t.float() for n, t in adapter(1).items()}
    plain, _, _ = step(pick("fedavg"), params, {}, at())
    same, _, _ = step(Aggregator.pick(settings, "aggregator"), params, {}, at())
    assert all(torch.equal(same[n], plain[n]) for n in plain)


def test_fedilora_averages_a_direction_over_those_who_have_it() -> None:
    params = adapter(1)
    aggregator = pick("fedilora", edit_below=0.0)
    updates = trained(aggregator, params, {}, at(ranks=(2, 3, 3)))
    after, _ = aggregator.apply(params, {}, at(ranks=(2, 3, 3)), updates)
    for module in MODULES:
        a, b = name_of(module, "A"), name_of(module, "B")
        deltas = [u.delta for u in updates]
        for row, weights in ((1, ROWS), (2, (0, 30, 20))):
            da = sum(k / sum(weights) * d[a][row] for k, d in zip(weights, deltas, strict=True) if k)
            db = sum(k / sum(weights) * d[b][:, row] for k, d in zip(weights, deltas, strict=True) if k)
            assert torch.allclose(after[a][row], params[a][row] + da, atol=1e-12)
            assert torch.allclose(after[b][:, row], params[b][:, row] + db, atol=1e-12)
        assert torch.equal(after[a][3], params[a][3])  # no client has it
        assert torch.equal(after[b][:, 3], params[b][:, 3])


def test_fedilora_draws_back_the_layer_that_turned_away_most() -> None:
    params, aggregator = adapter(1), pick("fedilora")
    a, other = (name_of(m, "A") for m in MODULES)
    delta = {n: torch.zeros_like(t) for n, t in params.items()}
    delta[a] = torch.randn(R, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    delta[other] = 0.01 * delta[a]
    local = params[a] + delta[a]
    c = float((params[a] * local).sum() / (params[a].norm() * local.norm()))
    after, _ = aggregator.apply(params, {}, at(2), [ClientUpdate(0, delta, 5, {})])
    assert torch.allclose(after[a], (1 - c) * params[a] + c * local, atol=1e-12)
    assert torch.equal(after[other], params[other] + delta[other])
    first, _ = aggregator.apply(params, {}, at(1), [ClientUpdate(0, delta, 5, {})])
    assert torch.allclose(first[a], local, atol=1e-12)


def test_fed_plora_starts_every_client_at_the_global_function() -> None:
    params, aggregator = adapter(1), pick("fed-plora")
    for client, rank in enumerate(RANKS):
        sent = aggregator.sends(params, {}, at(ranks=RANKS), client)
        assert sent.start[name_of(MODULES[0], "A")].shape[0] == rank
        assert off(dense(sent.start, sent.frozen), dense(params)) < 1e-12
    drawn = {tuple(aggregator.directions(params, at(n, RANKS), 0)) for n in range(1, 30)}  # type: ignore[attr-defined]
    assert len(drawn) == 6  # all pairs out of four


def test_untouched_directions_keep_value_and_moments() -> None:
    aggregator = pick("fed-plora", server={"name": "fedadam", "lr": 0.01})
    params = adapter(1)
    state = aggregator.init(params)
    only = replace(at(ranks=(2,)), cohort=(0,))
    picked = aggregator.directions(params, only, 0)  # type: ignore[attr-defined]
    update = trained(aggregator, params, state, only)[:1]
    after, moved = aggregator.apply(params, state, only, update)
    rest = [i for i in range(R) if i not in picked]
    for module in MODULES:
        a = name_of(module, "A")
        assert torch.equal(after[a][rest], params[a][rest])
        assert torch.equal(moved["server.v"][a][rest], state["server.v"][a][rest])
        assert bool((after[a][picked] != params[a][picked]).all())


def test_hetlora_weighs_by_the_norm_of_the_product() -> None:
    params, aggregator = adapter(1), pick("hetlora")
    updates = trained(aggregator, params, {}, at(ranks=RANKS))
    after, _ = aggregator.apply(params, {}, at(ranks=RANKS), updates)
    locals_ = []
    for update in updates:
        start = aggregator.sends(params, {}, at(ranks=RANKS), update.client).start
        locals_.append({n: t + update.delta[n] for n, t in start.items()})
    sizes = [sum(float(t.norm()) ** 2 for t in dense(local).values()) ** 0.5 for local in locals_]
    for module in MODULES:
        a = name_of(module, "A")
        wanted = sum(
            s / sum(sizes) * torch.nn.functional.pad(x[a], (0, 0, 0, R - len(x[a])))
            for s, x in zip(sizes, locals_, strict=True)
        )
        assert torch.allclose(after[a], wanted, atol=1e-12)


def test_hetlora_keeps_a_direction_trainable_that_every_client_of_a_round_lacks() -> None:
    params, aggregator = adapter(1, zero_b=True), pick("hetlora")
    small = replace(at(ranks=(2, 4, 3)), cohort=(0, 2))
    after, _ = aggregator.apply(params, {}, small, [u for u in trained(aggregator, params, {}, small) if u.client != 1])
    for b, a in pairs(after).values():
        assert bool((b[:, 3:] == 0).all())  # the model is the published mean
        assert bool((a[:3].norm(dim=1) > 0).all())
        assert bool((a[3:].norm(dim=1) > 0.1).all())
    large = aggregator.sends(after, {}, at(2, ranks=(2, 4, 3)), 1).start
    assert all(bool((a.norm(dim=1) > 0).all()) for _, a in pairs(large).values())


def fallen(update: ClientUpdate, start: Params, first: int, factor: float) -> ClientUpdate:
    """The update of a client whose directions from `first` on end at `factor` times their start."""
    delta = dict(update.delta)
    for module in MODULES:
        a, b = name_of(module, "A"), name_of(module, "B")
        delta[a], delta[b] = delta[a].clone(), delta[b].clone()
        delta[a][first:] = (factor - 1) * start[a][first:]
        delta[b][:, first:] = (factor - 1) * start[b][:, first:]
    return replace(update, delta=delta)


def test_hetlora_without_a_tail_penalty_has_no_state_and_no_rule() -> None:
    params, plain = adapter(1), pick("hetlora")
    assert plain.init(params) == {}
    assert plain.begin(at(), ClientView(0.0, 1, lambda _: 0), Sent(params), {}).penalty is None
    assert Experiment.parse({**DATA, "aggregator": "hetlora"}).run_id() == "fa4759a609f5"  # before it could prune


def test_hetlora_prunes_the_client_whose_tail_fell() -> None:
    """tail_from 0.7: ranks 2, 4, 3 have tails from 1, 2, 2. Clients 0 and 1 end below their start, client 2 above."""
    params, aggregator = adapter(1), pick(PRUNED)
    state, round_ = aggregator.init(params), at(ranks=RANKS)
    updates = [
        fallen(update, aggregator.sends(params, state, round_, k).start, first, factor)
        for k, (update, first, factor) in enumerate(
            zip(trained(aggregator, params, state, round_), (1, 2, 2), (0.9, 0.99, 1.01), strict=True)
        )
    ]
    after, state = aggregator.apply(params, state, round_, updates)
    assert state["pruned"]["ranks"].tolist() == [1, 2]
    later = at(3, RANKS)
    shapes = [aggregator.sends(params, state, later, k).start[name_of(MODULES[0], "A")].shape for k in range(3)]
    assert shapes == [(1, C), (2, C), (3, C)]
    assert all(bool((after[name_of(m, "B")][:, 3] == 0).all()) for m in MODULES)  # client 1 alone had it
    plain, _ = pick("hetlora").apply(params, {}, round_, updates)
    assert all(bool((plain[name_of(m, "B")][:, 3] != 0).any()) for m in MODULES)
    # the weights are those of the pruned adapters
    locals_ = []
    for update, first in zip(updates, (1, 2, 3), strict=True):
        start = pick("hetlora").sends(params, {}, round_, update.client).start
        local = {n: t + update.delta[n] for n, t in start.items()}
        locals_.append({n: t[:first] if "lora_A" in n else t[:, :first] for n, t in local.items() if "lora" in n})
    sizes = [sum(float(t.norm()) ** 2 for t in dense(local).values()) ** 0.5 for local in locals_]
    a = name_of(MODULES[0], "A")
    wanted = sum(
        s / sum(sizes) * torch.nn.functional.pad(x[a], (0, 0, 0, R - len(x[a])))
        for s, x in zip(sizes, locals_, strict=True)
    )
    assert torch.allclose(after[a][:3], wanted[:3], atol=1e-12)
    # rank 1 stays; a rank that fell can fall again; an absent client keeps its rank
    again = trained(aggregator, params, state, later)[:2]
    starts = [aggregator.sends(params, state, later, k).start for k in (0, 1)]
    again = [fallen(u, start, first, 0.5) for u, start, first in zip(again, starts, (0, 1), strict=True)]
    _, state = aggregator.apply(params, state, later, again)
    assert state["pruned"]["ranks"].tolist() == [1, 1]
    assert aggregator.sends(params, state, later, 2).start[name_of(MODULES[0], "A")].shape[0] == 3


def test_hetlora_tail_penalty_is_the_gradient_of_the_stated_term_in_a_wider_adapter() -> None:
    """By autograd; engines pad the weights to the largest rank of a pass."""
    aggregator, params = pick("hetlora", tail_penalty=0.3, tail_from=0.5), adapter(3, rank=6)
    sent = aggregator.sends(params, aggregator.init(params), at(ranks=(5,)), 0)
    rule = aggregator.begin(at(), ClientView(0.0, 1, lambda _: 0), sent, {})
    assert rule.penalty is not None
    wide = {n: t.clone() for n, t in params.items()}
    for module in MODULES:
        wide[name_of(module, "A")][5:] = 0
        wide[name_of(module, "B")][:, 5:] = 0
    live = {n: t.requires_grad_() for n, t in wide.items() if "lora" in n}
    loss = sum(0.3 * b[:, 2:5].norm() * a[2:5].norm() for b, a in pairs(live).values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    found = rule.penalty(0.0, {n: w.detach() for n, w in live.items()})
    assert found.keys() == live.keys()
    assert all(torch.allclose(found[n], live[n].grad, atol=1e-12) for n in found)  # type: ignore[arg-type]
    zero = rule.penalty(0.0, {n: 0 * w.detach() for n, w in live.items()})  # B = 0 in the first round
    assert all(bool((t == 0).all()) for t in zero.values())


# --- personal members


def test_fedalt_mixes_a_client_with_the_mean_of_the_others() -> None:
    """The exported adapter is what the client computed with: a B_k A_k + (1 - a) B_R A_R."""
    aggregator, params = pick("fedalt", own=0.25), adapter(1)
    params, state, _ = step(aggregator, params, aggregator.init(params), at(1))
    assert set(state) == {"client-0", "client-1", "client-2"}
    sent = aggregator.sends(params, state, at(2), 1)
    assert sent.scale == 0.25
    assert all(torch.equal(sent.start[n], state["client-1"][n]) for n in params if "lora" in n)  # never from a mean
    own = dense(sent.start)
    for n, (b, a) in pairs(sent.frozen).items():
        m = n.replace("lora_A", "lora_B")
        rest = [(state[f"client-{k}"][m], state[f"client-{k}"][n]) for k in (0, 2)]
        assert torch.allclose(b @ a, 0.75 * (rest[0][0] + rest[1][0]) / 2 @ (rest[0][1] + rest[1][1]) / 2, atol=1e-12)
        export = aggregator.personal(params, state, 1, {})
        assert export is not None
        assert torch.allclose(dense(export)[n], 0.25 * own[n] + b @ a, atol=1e-12)
    alone, only, _ = params, {k: t for k, t in state.items() if k == "client-1"}, None
    assert aggregator.sends(alone, only, at(2), 1).frozen == {}  # no other client took part


# --- one round


def test_yoco_starts_at_the_base_model_and_its_result_is_what_clients_computed_with() -> None:
    aggregator, params = pick("yoco"), adapter(1)
    state = aggregator.init(params)
    sent = aggregator.sends(params, state, at(1), 0)
    assert off(dense(sent.start), dense({n: -t if "lora_A" in n else t for n, t in sent.frozen.items()})) < 1e-14
    after, state, functions = step(aggregator, params, state, at(1))
    assert list(after) == list(params)
    result = aggregator.result(after, state)
    assert {result[name_of(m, "A")].shape for m in MODULES} == {(2 * R, C)}
    for n, product in dense(result).items():
        assert torch.allclose(product, dense(after)[n] - dense(params)[n], atol=1e-12)
    assert off(mean(functions), dense(result)) > 1e-3  # factors are averaged, so the mean of the functions is not met


@pytest.mark.parametrize(("components", "centred"), [(0, True), (0, False), (2, True)])
def test_yoco_with_all_components_is_the_weighted_mean(components: int, centred: bool) -> None:
    """Three clients: all K - 1 = 2 components of centred rows."""
    aggregator, params = pick("yoco", components=components, centred=centred), adapter(1)
    state = aggregator.init(params)
    updates = trained(aggregator, params, state, at(1))
    after, _ = aggregator.apply(params, state, at(1), updates)
    plain, _ = pick("fedavg").apply(params, {}, at(1), updates)
    assert all(torch.allclose(after[n], plain[n], atol=1e-12) for n in params)


def test_yoco_components_act_through_unequal_weights_or_no_centring() -> None:
    params = adapter(1)

    def distance(rows: Sequence[int], **settings: object) -> float:
        aggregator = pick("yoco", **settings)
        state = aggregator.init(params)
        updates = [
            replace(u, num_examples=n) for u, n in zip(trained(aggregator, params, state, at(1)), rows, strict=True)
        ]
        after, _ = aggregator.apply(params, state, at(1), updates)
        plain, _ = pick("fedavg").apply(params, {}, at(1), updates)
        factors = [n for n in params if "lora_A" in n]
        assert all(torch.equal(after[n], plain[n]) for n in params if n not in factors)
        return max(float((after[n] - plain[n]).norm()) for n in factors)

    assert distance((7, 7, 7), components=1) < 1e-12
    assert distance((10, 30, 20), components=1) > 1e-2
    assert distance((7, 7, 7), components=1, centred=False) > 1e-2


@pytest.mark.parametrize("name", ["yoco", "yoco-reference"])
def test_yoco_penalty_is_the_gradient_of_the_stated_loss(name: str) -> None:
    """The gradient by autograd, of the C x C form where the published code has it."""
    aggregator, params = pick(name, gamma_max=9.0), adapter(3)
    sent = aggregator.sends(params, aggregator.init(params), at(1), 0)
    rule = aggregator.begin(at(1), ClientView(0.0, 1, lambda _: 0), sent, {})
    assert rule.penalty is not None
    for done, gamma, weight in ((0.0, 1.0, 0.1), (0.5, 5.0, 0.055), (1.0, 9.0, 0.01)):
        live = {n: (t * 0.7 + 0.1).requires_grad_() for n, t in params.items()}
        loss = torch.zeros((), dtype=torch.float64)
        for n, w in live.items():
            if "lora_B" in n:
                sign = params[n].sign()
                loss = loss + ((gamma * w).tanh() - sign).norm() / (sign.norm() + 1e-6)
            elif "lora_A" in n and name == "yoco":
                loss = loss + 1e-3 * w.abs().sum()
            elif "lora_A" in n:
                loss = loss + weight * (w.mT @ w - torch.eye(C, dtype=torch.float64)).norm() ** 2
        loss.backward()
        found = rule.penalty(done, {n: w.detach() for n, w in live.items()})
        assert found.keys() == {n for n in params if "lora" in n}
        assert all(torch.allclose(found[n], live[n].grad, atol=1e-10) for n in found)  # type: ignore[arg-type]


# --- every member


# `fedalt` has no global model: its clients continue from their own adapters. The methods of SHRINKING shrink directions above
# a client's rank, as published.
WITHOUT_TRAINING = [
    *((name, ()) for name in [*LORA, PRUNED] if name != "fedalt"),
    *((name, RANKS) for name in [*MIXED, PRUNED] if name not in SHRINKING | {"fedalt"}),
]


@pytest.mark.parametrize(("name", "ranks"), WITHOUT_TRAINING)
def test_no_training_changes_nothing(name: str, ranks: tuple[int, ...]) -> None:
    lossless = {"tau": 1.0} if name == "florist" else {}  # below 1 it drops energy in every round
    aggregator, params = pick(name, **lossless), adapter(1)
    state = aggregator.init(params)
    before = dense(aggregator.result(params, state)) if name not in ("flora", "yoco") else None
    for number in (1, 2, 3):
        params, state, functions = step(aggregator, params, state, at(number, ranks), size=0.0)
        if before is None:  # flora: the global model is the frozen sum, empty at first; yoco: B0 A0 left W
            assert max(float(t.norm()) for t in mean(functions).values()) < 1e-12
            continue
        assert off(dense(aggregator.result(params, state)), before) < 1e-10


# A method of one round has none to resume.
RESUMED = [
    (name, ranks)
    for names, ranks in (([*LORA, PRUNED], ()), ([*MIXED, PRUNED], RANKS))
    for name in names
    if not pick(name).one_round
]


@pytest.mark.parametrize(("name", "ranks"), RESUMED)
def test_resumed_after_every_round_with_a_client_absent_twice(name: str, ranks: tuple[int, ...]) -> None:
    """The loop itself, over state that went through bytes; clients 1 and 0 each miss two rounds and come back."""
    aggregator, params = pick(name), adapter(1)
    cohorts = {1: [0, 1, 2], 2: [0, 2], 3: [2], 4: [1, 2], 5: [0, 1, 2]}

    def engine(at: Round, sends: Mapping[int, Sent]) -> list[ClientUpdate]:
        made = []
        for client, sent in sends.items():
            noise = torch.Generator().manual_seed(100 * at.number + client)
            delta = {n: 0.3 * torch.randn(t.shape, generator=noise, dtype=t.dtype) for n, t in sent.returned().items()}
            made.append(ClientUpdate(client, delta, ROWS[client], {}))
        return made

    def rounds(begin: Progress) -> list[Progress]:
        return list(federate(begin, engine, aggregator, lambda r: cohorts[r], 5, UpdateFilter(), None, 0, 3, ranks))

    whole = rounds(Progress(0, params, aggregator.init(params)))
    assert [one.log["cohort"] for one in whole] == list(cohorts.values())
    for stopped in whole[:-1]:
        stored = {"": stopped.params, **stopped.state}
        trees = {key: load(save({n: t.contiguous() for n, t in tree.items()})) for key, tree in stored.items()}
        state = {key: {n: trees[key][n] for n in tree} for key, tree in stopped.state.items()}
        end = rounds(Progress(stopped.round, {n: trees[""][n] for n in stopped.params}, state))[-1]
        assert all(torch.equal(t, end.params[n]) for n, t in whole[-1].params.items())
        assert end.state.keys() == whole[-1].state.keys()
        assert all(torch.equal(t, end.state[k][n]) for k, tree in whole[-1].state.items() for n, t in tree.items())


@pytest.mark.parametrize("name", [*LORA, PRUNED])
class TestEveryMember:
    def test_is_pure_and_depends_on_no_empty_client(self, name: str) -> None:
        aggregator, params = pick(name), adapter(1)
        state, ranks = aggregator.init(params), RANKS if name in CAN_MIX else ()
        updates = trained(aggregator, params, state, at(2, ranks))
        kept = {n: t.clone() for n, t in params.items()}
        first, one = aggregator.apply(params, state, at(2, ranks), iter(updates))
        assert all(torch.equal(params[n], kept[n]) for n in params)
        sent = aggregator.sends(params, state, at(2, ranks), 3)
        empty = ClientUpdate(3, {n: torch.full_like(t, 9.0) for n, t in sent.returned().items()}, 0, {})
        again, two = aggregator.apply(params, state, at(2, ranks), [*updates, empty])
        assert all(torch.equal(first[n], again[n]) for n in first)
        assert all(torch.equal(one[k][n], two[k][n]) for k in one for n in one[k])
        assert list(first) == list(params)
        assert all(first[n].shape == params[n].shape for n in params)

    def test_refuses_other_orders_names_and_nothing(self, name: str) -> None:
        aggregator, params = pick(name), adapter(1)
        state = aggregator.init(params)
        updates = trained(aggregator, params, state, at())
        with pytest.raises(FedmllmError, match="ascending client order"):
            aggregator.apply(params, state, at(), reversed(updates))
        with pytest.raises(NothingToAverage):
            aggregator.apply(params, state, at(), [])
        odd = [ClientUpdate(0, {"other": torch.ones(2)}, 3, {})]
        with pytest.raises((FedmllmError, KeyError)):
            aggregator.apply(params, state, at(), odd)

    def test_train_extra_is_averaged_plainly(self, name: str) -> None:
        aggregator, params = pick(name), adapter(1)
        state = aggregator.init(params)
        updates = trained(aggregator, params, state, at())
        after, _ = aggregator.apply(params, state, at(), updates)
        wanted = params["head.weight"] + sum(u.num_examples / sum(ROWS) * u.delta["head.weight"] for u in updates)
        assert torch.allclose(after["head.weight"], wanted, atol=1e-12)

    def test_state_of_a_growing_adapter_is_readable(self, name: str) -> None:
        """Sizes that may change are 0 in `init`: what checkpoints compare with."""
        aggregator, params = pick(name), adapter(1)
        state = aggregator.init(params)
        _, after, _ = step(aggregator, params, state, at())
        for key, tree in state.items():
            for n, t in tree.items():
                assert all(have in (0, now) for have, now in zip(t.shape, after[key][n].shape, strict=True))


# --- settings


DATA = {"data": "synthetic-irony", "partition": {"name": "iid", "num_clients": 4}}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (
            {"backbone": {"name": "tiny", "lora": {"ranks": [2, 8]}}},
            r"backbone\.lora\.ranks: got \[2, 8\]; fedavg combines .* one of these aggregators: fed-plora, fedilora, flexlora",
        ),
        (
            {"backbone": {"name": "tiny", "lora": {"ranks": [2, 4]}}, "aggregator": "flexlora"},
            r"r: got 8; it must be the largest of ranks, 4",
        ),
        (
            {"aggregator": {"name": "flora", "server": "fedadam"}},
            r"aggregator\.server: .*flora aggregates the clients' products.*moments.*Aggregators with a server: .*ffa-lora",
        ),
        (
            {"aggregator": {"name": "flexlora", "server": "krum"}},
            r"aggregator\.server: .*flexlora aggregates the clients' products.*distances.*leave server out.*krum",
        ),
        (
            {"aggregator": {"name": "krum", "server": "flexlora"}, "cohort_size": 0},
            r"aggregator\.server\.name: got 'flexlora', which needs more than one combined delta; allowed: .*fedadam",
        ),
        (
            {"aggregator": "krum", "cohort_size": 0, "backbone": {"name": "tiny", "lora": {"ranks": [2, 8]}}},
            r"lora\.ranks: got \[2, 8\]; krum combines factors of one rank; allowed: .*flexlora",
        ),
        (
            {"aggregator": {"name": "scaffold", "server": "fedsa-lora"}},
            r"aggregator\.server: .*scaffold corrects .*a factor that stays with its client.*leave server out",
        ),
        (
            {"aggregator": {"name": "fedsa-lora", "server": "scaffold"}},
            r"aggregator\.server\.name: got 'scaffold', which needs more than one combined delta; allowed: .*fedadam",
        ),
        (
            {"aggregator": {"name": "fedadam", "server": "fedavg"}},
            r"fedadam is a server optimizer itself; leave server out",
        ),
        (
            {"aggregator": "fedsa-lora", "method": "personal"},
            r'method: got "personal", which fine-tunes a global adapter of rank lora\.r; fedsa-lora has none',
        ),
        (
            {"backbone": {"name": "tiny", "lora": {"rank_column": "limit"}}},
            r'lora\.rank_column: got "limit"; fedavg combines factors of one rank; allowed: .*hetlora',
        ),
        (
            {"backbone": {"name": "tiny", "lora": {"rank_column": "limit", "ranks": [8]}}, "aggregator": "flexlora"},
            r"rank_column: got 'limit' with ranks = \[8\]; give one of them",
        ),
        ({"aggregator": "fedsa-lora", "evaluate": {"every": 1}}, r"fedsa-lora has no global model"),
        (
            {"aggregator": "yoco", "backbone": {"name": "tiny", "lora": {"init": "principal"}}},
            r"num_rounds: got 25; yoco communicates once; allowed: 1",
        ),
        ({"aggregator": "yoco", "num_rounds": 1}, r'lora\.init: got "kaiming"; yoco starts from "principal"'),
        (
            {"backbone": {"name": "tiny", "lora": {"init": "principal"}}},
            r'lora\.init: got "principal"; fedavg starts from "kaiming"',
        ),
        (
            {"method": "local", "aggregator": "flexlora", "backbone": {"name": "tiny", "lora": {"ranks": [4, 8]}}},
            r'lora\.ranks: got \[4, 8\]; no effect with method = "local"',
        ),
        (
            {"method": "personal", "aggregator": "hetlora", "backbone": {"name": "tiny", "lora": {"ranks": [4, 8]}}},
            r'lora\.ranks: got \[4, 8\]; no effect with method = "personal", which trains adapters of rank lora\.r',
        ),
        (
            {"aggregator": {"name": "hetlora", "tail_from": 0.5}},
            r"tail_from: got 0\.5; no effect with tail_penalty = 0",
        ),
    ],
)
def test_combinations_without_meaning_are_refused(table: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Experiment.parse({**DATA, **table})


def test_ranks_that_are_equal_are_no_mixture() -> None:
    assert (
        Experiment.parse({**DATA, "backbone": {"name": "tiny", "lora": {"ranks": [8, 8]}}}).aggregator.name == "fedavg"
    )


OPTIMIZERS = sorted(name for name, member in Aggregator.members.items() if cast("type[Aggregator]", member).optimizes)


@pytest.mark.parametrize("server", OPTIMIZERS)
@pytest.mark.parametrize("name", ["rolora", "ffa-lora", "fedsa-lora", "fedilora", "fed-plora"])
def test_every_optimizer_steps_under_a_method_whose_factors_rest_in_turn(name: str, server: str) -> None:
    aggregator, params = pick(name, server=server), adapter(1)
    state = aggregator.init(params)
    for number in (1, 2, 3):
        before = params
        ranks = RANKS if aggregator.mixed_ranks else ()
        params, state, _ = step(aggregator, params, state, at(number, ranks))
        assert any(not torch.equal(params[n], before[n]) for n in params)
    assert params.keys() == adapter(1).keys()


def test_a_tensor_that_moves_in_every_round_keeps_its_momentum_where_factors_rest_in_turn() -> None:
    def grown(params: Params) -> Params:
        return {**params, "head.weight": torch.ones(2, 3, dtype=torch.float64)}

    both, alone = pick("rolora", server="fedadam-reference"), pick("fedadam-reference")
    params = grown(adapter(1))
    state = both.init(params)
    single = {"head.weight": params["head.weight"]}
    kept = alone.init(single)
    for number in (1, 2, 3, 4):
        moving = {
            n: torch.full_like(t, 0.1 * number) for n, t in params.items() if ("lora_A" in n) == (number % 2 == 0)
        }
        delta = {**moving, "head.weight": torch.full((2, 3), 0.1 * number, dtype=torch.float64)}
        params, state = both.step(params, state, at(number), delta)
        single, kept = alone.apply(
            single, kept, at(number), [ClientUpdate(0, {"head.weight": delta["head.weight"]}, 1, {})]
        )
        assert torch.equal(params["head.weight"], single["head.weight"])


def row_of(number: int, **columns: str) -> Example:
    return Example(number, {}, "", ("a", "b"), "a", f"rows:{number}", columns)


def test_a_client_has_the_rank_that_its_rows_state_up_to_the_largest() -> None:
    assert stated_rank([row_of(k, limit="4") for k in range(3)], "limit", 8, 0) == 4
    assert stated_rank([row_of(0, limit="64")], "limit", 8, 0) == 8
    assert stated_rank([], "limit", 8, 0) == 8
    for values, listed in ((["4", "2"], "'2', '4'"), (["four"], "'four'"), (["0"], "'0'"), (["-1"], "'-1'")):
        rows = [row_of(k, limit=value) for k, value in enumerate(values)]
        with pytest.raises(
            DataError, match=rf"lora\.rank_column: client 3 has 'limit' = {listed}; allowed: one whole number"
        ):
            stated_rank(rows, "limit", 8, 3)
    with pytest.raises(DataError, match="has no column 'limit'; columns: site"):
        stated_rank([row_of(0, site="north")], "limit", 8, 0)


def test_ranks_leave_older_run_ids_alone() -> None:
    plain = Experiment.parse(DATA)
    assert {"ranks", "rank_column"}.isdisjoint(plain.identity()["backbone"]["lora"])
    ranks = {"backbone": {"name": "tiny", "lora": {"ranks": [2, 8]}}, "aggregator": "flexlora"}
    assert Experiment.parse({**DATA, **ranks}).run_id() != Experiment.parse({**DATA, "aggregator": "flexlora"}).run_id()


def test_experiment_files_compare_every_member_at_equal_ranks_and_those_that_can_at_unequal_ones() -> None:
    cells = {name: Suite.load(ROOT / f"experiments/lora/{name}.toml").cells for name in ("equal", "ranks")}
    equal = {cell.experiment.aggregator.name for cell in cells["equal"]}
    assert set(LORA) <= equal
    unequal = {cell.experiment.aggregator.name for cell in cells["ranks"] if cell.experiment.backbone.lora.ranks}
    assert unequal == set(MIXED)
    assert len({cell.run_id for part in cells.values() for cell in part}) == sum(map(len, cells.values()))
