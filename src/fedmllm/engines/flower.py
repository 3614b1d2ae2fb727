"""What travels over Flower, and how a round is asked for: the same for the simulation and for real sites.

An adapter is ONE float32 array in manifest order with the digest of that manifest: Flower stores and fetches every array of
a message as an object of its own, and 200 tensors cost five times what one costs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedmllm.engines.flower_names import ABOUT, ADAPTER, FLAT, REFUSED
from fedmllm.tensors import flatten, manifest_digest, unflatten
from fedmllm.types import ClientFailure, ClientUpdate, FedmllmError, Params

CHECK_S = 2.0  # between two looks at whether an answer can still come


def pack(params: Params, about: Mapping[str, str | int | float | bytes]) -> RecordDict:
    """A message's content: the adapter as one array [P], and what is said about it."""
    flat = flatten(params).numpy()
    words = ConfigRecord({"manifest": manifest_digest(params), **about})
    return RecordDict({ADAPTER: ArrayRecord({FLAT: Array(flat)}), ABOUT: words})


def unpack(content: RecordDict, like: Params) -> Params:
    """The adapter of a message, shaped as `like`. Raises FedmllmError naming what differs."""
    theirs, ours = content[ABOUT].get("manifest"), manifest_digest(like)
    if theirs != ours:
        raise FedmllmError(
            f"manifest {str(theirs)[:12]} of the other side is not ours, {ours[:12]}: names or shapes differ"
        )
    array = content[ADAPTER][FLAT]
    if array.dtype != "float32":
        raise FedmllmError(f"the adapter came as {array.dtype}; only float32 travels")
    try:
        flat = np.ascontiguousarray(array.numpy())
    except ValueError as error:  # truncated, or an object array: never unpickled
        raise FedmllmError(f"the adapter cannot be read: {error}") from None
    return unflatten(torch.from_numpy(flat), like)


def update_content(update: ClientUpdate) -> RecordDict:
    """A client's answer: its delta, its row count and its metrics."""
    metrics = json.dumps(dict(update.metrics))
    return pack(update.delta, {"num_examples": update.num_examples, "metrics": metrics})


def refusal(reason: str) -> RecordDict:
    """An answer that says why there is no update."""
    return RecordDict({ABOUT: ConfigRecord({REFUSED: reason})})


def read_update(client: int, reply: Message | str, like: Params) -> ClientUpdate | ClientFailure:
    """A reply as an update, or as the reason why it is none. Nothing in a reply can raise."""
    if isinstance(reply, str):
        return ClientFailure(client, reply)
    if reply.has_error():
        return ClientFailure(client, f"Flower: {reply.error.reason or 'error'} (code {reply.error.code})")
    try:
        about = reply.content[ABOUT]
        if REFUSED in about:
            return ClientFailure(client, str(about[REFUSED]))
        num_examples = about["num_examples"]
        if not isinstance(num_examples, int) or num_examples < 0:
            return ClientFailure(client, f"num_examples: got {num_examples!r}; a count of rows is required")
        metrics = {str(k): float(v) for k, v in json.loads(str(about["metrics"])).items()}
        metrics = {k: v for k, v in metrics.items() if k == "loss" or math.isfinite(v)}
        return ClientUpdate(client, unpack(reply.content, like), num_examples, metrics)
    except (FedmllmError, KeyError, TypeError, ValueError, AttributeError) as error:
        return ClientFailure(client, f"its answer cannot be used: {type(error).__name__}: {error}")


def ask(
    grid: Grid,
    messages: Mapping[int, Message],
    timeout_s: float,
    poll_s: float,
    lost: Callable[[], Mapping[int, str]],
) -> Iterator[tuple[int, Message | str]]:
    """Send one message a client -> (client, its reply, or why there is none) as they come.

    What `Grid.send_and_receive` does, without its fixed sleeps of 3 s, and with a way out: `lost`, looked at every
    CHECK_S, says of which clients no reply can come any more. It may raise.
    """
    clients = list(messages)
    sent = list(grid.push_messages([messages[client] for client in clients])) if clients else []
    waiting = {message_id: client for message_id, client in zip(sent, clients, strict=False) if message_id}
    yield from ((client, "Flower did not take the message") for client in set(clients) - set(waiting.values()))
    until, check = time.monotonic() + timeout_s, 0.0
    while waiting and time.monotonic() < until:
        for reply in grid.pull_messages(list(waiting)):
            if (client := waiting.pop(reply.metadata.reply_to_message_id, None)) is not None:
                yield client, reply
        if waiting and time.monotonic() > check:
            check, reasons = time.monotonic() + CHECK_S, lost()
            for message_id, client in list(waiting.items()):
                if client in reasons:
                    del waiting[message_id]
                    yield client, reasons[client]
        if waiting:
            time.sleep(poll_s)
    yield from ((client, f"no answer within {timeout_s:g} s") for client in waiting.values())
