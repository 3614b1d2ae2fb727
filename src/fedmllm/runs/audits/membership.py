"""Membership of rows (LiRA, arXiv:2112.03570) and extraction of inserted secrets (arXiv:1802.08232).

Shapes: S shadow federations, N target rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from fedmllm.core.errors import ConfigError
from fedmllm.core.rng import stream
from fedmllm.core.types import Example, Params, Shard
from fedmllm.federation.client import RowStore
from fedmllm.runs.audits.bounds import exposure, lira_scores, true_positive_rate
from fedmllm.runs.audits.federation import claimed, trained_adapter
from fedmllm.runs.inputs import Inputs

_WORDS = [
    "red",
    "blue",
    "green",
    "black",
    "white",
    "small",
    "large",
    "round",
    "square",
    "light",
    "dark",
    "left",
    "right",
    "high",
    "low",
    "old",
]
_TIMES = (1, 4, 16)  # how often each secret is inserted
CANDIDATES = 256
NOTICED_AUC = 0.6  # with the numbers of rows and shadows of an audit, chance stays well below


def lira(inputs: Inputs, num_shadows: int = 8, num_targets: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Infer membership of rows: each shadow federation trains on a random half of the target rows.

    Args:
        inputs: Of an experiment whose rows have choices.
        num_shadows: S, at least 4.
        num_targets: N at most.
        seed: Of the choice of targets and halves.

    Returns:
        One row of the audit's table: the area under the ROC curve, and true positives at 1 % and 0.1 % false positives.

    Raises:
        ConfigError: There are too few shadows, or no rows with choices.
    """
    if num_shadows < 4:
        raise ConfigError(f"--shadows: got {num_shadows}; allowed: 4 and more")
    e, clients = inputs.experiment, inputs.clients(inputs.experiment.num_rounds)
    rng = stream(seed, "audit", "lira")
    held = [(shard, i) for shard in clients.shards for i in range(len(shard.rows))]
    held = [(shard, i) for shard, i in held if len(inputs.train[shard.rows[i]].choices) > 1]
    if not held:
        raise ConfigError("data: no training row has choices; --kind lira needs them")
    targets = [held[int(i)] for i in rng.permutation(len(held))[:num_targets]]
    in_SN = rng.integers(0, 2, (num_shadows, len(targets))).astype(bool)
    phi_SN = np.zeros(in_SN.shape)
    for s in range(num_shadows):
        left_out = {(t[0].client, t[0].rows[t[1]]) for t, is_in in zip(targets, in_SN[s], strict=True) if not is_in}
        shards = [_without(shard, left_out) for shard in clients.shards]
        adapter = trained_adapter(inputs, replace(clients, shards=shards))
        phi_SN[s] = _margins(inputs, adapter, [(inputs.train[t.rows[i]], t.visible[i]) for t, i in targets])
    scores = lira_scores(phi_SN, in_SN)
    auc = float(roc_auc_score(in_SN.ravel(), scores.ravel()))
    claim = claimed(e, clients, inputs.train)
    rates = {f"tpr_at_{rate:g}": true_positive_rate(scores, in_SN, rate) for rate in (0.01, 0.001)}
    return [
        {
            "kind": "lira",
            "attack": f"{num_shadows} shadow federations, {len(targets)} rows",
            "claim": claim.claim() if claim else "none",
            "bound": auc,
            **rates,
            "caught": auc >= NOTICED_AUC,
            "reason": f"members are recognized: AUC {auc:.2f}" if auc >= NOTICED_AUC else "",
        }
    ]


def _without(shard: Shard, left_out: set[tuple[int, int]]) -> Shard:
    kept = [i for i, row in enumerate(shard.rows) if (shard.client, row) not in left_out]
    return replace(shard, rows=tuple(shard.rows[i] for i in kept), visible=tuple(shard.visible[i] for i in kept))


def _margins(inputs: Inputs, adapter: Params, rows: list[tuple[Example, Any]]) -> list[float]:
    """log p(answer) - log p(all other choices) of each row, over its choices."""
    backbone, prompt = inputs.backbone, inputs.experiment.prompt
    backbone.set_lora(adapter)
    out = []
    scored = backbone.score(
        [prompt.render(example, visible) for example, visible in rows],
        [[prompt.target(replace(example, answer=choice)) for choice in example.choices] for example, _ in rows],
    )
    for (example, _), values in zip(rows, scored, strict=True):
        true = example.choices.index(example.answer)
        others = np.logaddexp.reduce([value for i, value in enumerate(values) if i != true])
        out.append(float(values[true] - others))
    return out


def extraction(inputs: Inputs, seed: int = 0) -> list[dict[str, Any]]:
    """Insert secrets of four words into the rows of one client; how far do they come up among the candidates?

    Args:
        inputs: Of the experiment.
        seed: Of the secrets.

    Returns:
        A row of the audit's table for each number of insertions.
    """
    e, clients = inputs.experiment, inputs.clients(inputs.experiment.num_rounds)
    rng = stream(seed, "audit", "canary")
    whose = max(clients.shards, key=lambda shard: len(shard.rows))
    codes = [" ".join(_WORDS[int(i)] for i in rng.integers(0, len(_WORDS), 4)) for _ in range(CANDIDATES)]
    secrets = [_row(f"What is code {chr(65 + i)}?", codes[i], e.data.group_column()) for i in range(len(_TIMES))]
    examples = (*inputs.train, *(row for row, times in zip(secrets, _TIMES, strict=True) for _ in range(times)))
    more = range(len(inputs.train), len(examples))
    shards = list(clients.shards)
    shards[whose.client] = replace(
        whose, rows=(*whose.rows, *more), visible=(*whose.visible, *(frozenset[str]() for _ in more))
    )
    changed = replace(clients, shards=shards, store=RowStore(inputs.backbone, e.prompt, examples))
    claim = claimed(e, changed, examples)
    adapter = trained_adapter(inputs, changed)
    table = []
    for i, (row, times) in enumerate(zip(secrets, _TIMES, strict=True)):
        before, after = (_exposure(inputs, start, row, codes, i) for start in (inputs.start, adapter))
        learned = after - before >= 4
        table.append(
            {
                "kind": "canary",
                "attack": f"a secret inserted {times} times, {CANDIDATES} candidates",
                "claim": claim.claim() if claim else "none",
                "bound": after,
                "before": before,
                "caught": learned,
                "reason": f"exposure rose from {before:.1f} to {after:.1f} bits" if learned else "",
            }
        )
    return table


def _row(question: str, answer: str, group: str) -> Example:
    """A secret; all of its copies are one group."""
    columns = {group: f"inserted: {question}"} if group else {}
    return Example("canary", {}, question, (), answer, "inserted by the audit", columns)


def _exposure(inputs: Inputs, adapter: Params, row: Example, codes: list[str], true: int) -> float:
    inputs.backbone.set_lora(adapter)
    prompt = inputs.experiment.prompt.render(row, frozenset())
    return exposure(inputs.backbone.score([prompt], [codes])[0], true)
