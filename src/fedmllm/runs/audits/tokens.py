"""Words of rows from one update (DAGER, arXiv:2405.15586).

The gradient of `lora_A` in the first layer is a sum over tokens of their normalized embeddings, so it spans them: a token is in
the rows if its embedding lies in that span.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise
from fedmllm.core.errors import FedmllmError
from fedmllm.core.rng import stream, torch_stream
from fedmllm.core.types import Params, Round, Sent
from fedmllm.federation.client import Clients
from fedmllm.runs.audits.federation import noise_key
from fedmllm.runs.inputs import Inputs

FRAME_ROWS = 60  # of which the words that all have in common are the prompt's own
CAUGHT = (
    0.5  # share of words from which on a setting counts as leaking; an honest adapter and AdamW leave about a quarter
)
ADAPTERS = {"an ordinary adapter": (1.0, 0.02), "a crafted adapter": (0.0, 1e-11)}  # factor of A, size of B


def tokens(inputs: Inputs) -> list[dict[str, Any]]:
    """Attack one update of the client with the most rows.

    Args:
        inputs: Of the experiment.

    Returns:
        A row of the audit's table for each adapter that a server may send, and for two settings of training: the experiment's
        own, and one step of one row, which a server may ask for.

    Raises:
        FedmllmError: The model has no attention with LoRA in its first layer.
    """
    e = inputs.experiment
    clients = inputs.clients(e.num_rounds)
    if isinstance(e.privacy, RowDp):
        clients = replace(clients, row_noise=RowNoise(e.privacy, noise_key(e), e.run_id(), e.data.group_column()))
    whose = max(clients.shards, key=lambda shard: len(shard.rows)).client
    one_row = e.train.model_copy(update={"batch_size": 1, "accumulation": 1, "max_steps": 1, "epochs": 1})
    table = []
    for what, train in (("the experiment's rounds", e.train), ("one step of one row", one_row)):
        for adapter, (a, b) in ADAPTERS.items():
            there = replace(clients, train=train)
            share, num_words = recovered(there, whose, _start(there, a, b))
            table.append(
                {
                    "kind": "tokens",
                    "attack": f"{adapter}, {what}",
                    "claim": "none" if e.privacy.name != "row-dp" else "row-dp",
                    "bound": share,
                    "words": num_words,
                    "caught": share >= CAUGHT,
                    "reason": f"{share:.0%} of {num_words} words recovered" if share >= CAUGHT else "",
                }
            )
    return table


def _start(clients: Clients, a: float, b: float) -> Params:
    noise = torch_stream(clients.seed, "audit")
    own = clients.backbone.lora()
    return {n: t * a if "lora_A" in n else b * torch.randn(t.shape, generator=noise).to(t) for n, t in own.items()}


def recovered(clients: Clients, client: int, start: Params) -> tuple[float, int]:
    """Train one round and look for the words of its first step.

    Args:
        clients: Of the federation; `train` as the server asks.
        client: Who is attacked.
        start: The adapter that the server sends.

    Returns:
        Share of the words among as many nearest tokens, and their number.

    Raises:
        FedmllmError: The model has no attention with LoRA in its first layer.
    """
    step = next(clients.steps(client, 1))
    update, _ = clients.train_one(client, Round(1, clients.seed, clients.num_rounds, (client,), 1), Sent(start), {})
    shard = clients.shards[client]
    order = stream(clients.seed, "order", 1, client, 0).permutation(len(shard.rows))[:FRAME_ROWS]
    frame = set.intersection(
        *(set(clients.store.row(shard.rows[i], shard.visible[i]).input_ids.tolist()) for i in order)
    )
    words = {token for row in step.rows for token in row.input_ids.tolist()} - frame
    nearest = nearest_words(clients.backbone.model, update.delta, frame, len(words))
    return (len(nearest & words) / len(words) if words else 0.0), len(words)


def nearest_words(model: Any, delta: Params, frame: set[int], num_words: int) -> set[int]:
    """Words whose embeddings lie nearest to the span of the first layer's change.

    Shapes: V words, D hidden, R rows of the changes of all lora_A.

    Args:
        model: Whose embeddings they are.
        delta: An update.
        frame: Words that are known to be there, such as the prompt's own; they are taken out of the span.
        num_words: How many to return.

    Returns:
        Token ids.

    Raises:
        FedmllmError: The model has no attention with LoRA in a first layer that begins with a norm.
    """
    layer = next((m for n, m in model.named_modules() if n.endswith("layers.0.input_layernorm")), None)
    changes = [t for n, t in delta.items() if "layers.0.self_attn" in n and "lora_A" in n]
    if layer is None or not changes:
        raise FedmllmError("audit: the model has no attention with LoRA in a first layer that begins with a norm")
    with torch.no_grad():
        x_VD = layer(model.get_input_embeddings().weight.float()).double().cpu()
    known, _ = torch.linalg.qr(x_VD[sorted(frame)].T)
    x_VD = x_VD - x_VD @ known @ known.T
    g_RD = torch.cat(changes).double()
    g_RD = g_RD / g_RD.norm().clamp_min(1e-300)
    g_RD = g_RD - g_RD @ known @ known.T
    _, sizes, basis = torch.linalg.svd(g_RD, full_matrices=False)
    basis = basis[sizes > 1e-5 * sizes[0]]
    off_V = (x_VD - x_VD @ basis.T @ basis).norm(dim=1) / x_VD.norm(dim=1).clamp_min(1e-9)
    off_V[sorted(frame)] = torch.inf
    return set(off_V.argsort()[:num_words].tolist())
