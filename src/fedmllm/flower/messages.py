"""Payloads of a round and their exchange over Flower."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import flatten, manifest_digest, unflatten
from fedmllm.core.types import ClientFailure, ClientUpdate, Params
from fedmllm.federation.exchange import split_uplink, uplink
from fedmllm.flower.request import CLIENT_METRICS
from fedmllm.flower.wire import ABOUT, ADAPTER_KEY, REFUSED, array_data, array_record, legible

_CHECK_S = 2.0  # between checks whether a reply can still come
# Metrics that are read from a reply; a client cannot override the record's own keys.
_NAMES = frozenset({*CLIENT_METRICS, "base_loads"})
LONGEST_METRICS = 2000  # characters


class Packed:
    """An adapter that is serialised once for all messages of a round."""

    def __init__(self, params: Params) -> None:
        self._adapter: ArrayRecord = array_record(flatten(params).numpy().tobytes())
        self._manifest = manifest_digest(params)

    def content(self, about: Mapping[str, str | int | float | bytes]) -> RecordDict:
        """The content of a message.

        Args:
            about: Further entries of its record `ABOUT`.

        Returns:
            The adapter as one array [P], its manifest's digest, and `about`.
        """
        return RecordDict({ADAPTER_KEY: self._adapter, ABOUT: ConfigRecord({"manifest": self._manifest, **about})})


def unpack(content: RecordDict, like: Params) -> Params:
    """The adapter of a message.

    Args:
        content: As `Packed.content` made it.
        like: Names and shapes that the adapter must have.

    Raises:
        FedmllmError: The manifest, the type or the length differs.
    """
    theirs, ours = content[ABOUT].get("manifest"), manifest_digest(like)
    if theirs != ours:
        raise FedmllmError(
            f"manifest: got {str(theirs)[:12]} from the other side, expected {ours[:12]}: names or shapes differ"
        )
    return unflatten(torch.frombuffer(bytearray(array_data(content)), dtype=torch.float32), like)


def update_content(update: ClientUpdate) -> RecordDict:
    """A client's reply: its delta with its extra tensors, row count and metrics."""
    metrics = json.dumps(dict(update.metrics))
    return Packed(uplink(update.delta, update.extra)).content({"num_examples": update.num_examples, "metrics": metrics})


def refusal(reason: str) -> RecordDict:
    """A reply with a reason instead of an update."""
    return RecordDict({ABOUT: ConfigRecord({REFUSED: reason})})


def read_update(
    client: int, reply: Message | str, like: Params, extra: Params | None = None
) -> ClientUpdate | ClientFailure:
    """Read a client's reply. Nothing in it can raise.

    Args:
        client: Its number.
        reply: The reply, or the reason why there is none.
        like: Names and shapes that the delta must have, `Sent.returned()`.
        extra: Those of further tensors, `Aggregator.returned_extra()`; a client that did not train may leave them out.

    Returns:
        The update, or a failure with one printable line of reason.
    """
    if isinstance(reply, str):
        return ClientFailure(client, reply)
    try:
        if reply.has_error():
            return ClientFailure(client, f"Flower: {legible(reply.error.reason or 'error')} (code {reply.error.code})")
        about = reply.content[ABOUT]
        if REFUSED in about:
            return ClientFailure(client, legible(about[REFUSED]))
        num_examples = about["num_examples"]
        if not isinstance(num_examples, int) or num_examples < 0:
            return ClientFailure(client, f"num_examples: got {num_examples!r:.100}; a count of rows is required")
        whole = uplink(like, extra or {})
        if extra and about.get("manifest") == manifest_digest(like):
            whole = like
        delta, more = split_uplink(unpack(reply.content, whole))
        return ClientUpdate(client, delta, num_examples, read_metrics(str(about["metrics"])), more)
    except Exception as error:  # arbitrary malformed input from the network
        return ClientFailure(client, legible(f"its reply cannot be read: {type(error).__name__}: {error}"))


def read_metrics(text: str) -> dict[str, float]:
    """The metrics of a reply.

    Args:
        text: A JSON table.

    Returns:
        Known names with finite values; only the loss may be NaN or Inf, because the update filter checks it.

    Raises:
        FedmllmError: The text is too long.
    """
    if len(text) > LONGEST_METRICS:
        raise FedmllmError(f"metrics of {len(text)} characters; at most {LONGEST_METRICS} are allowed")
    metrics = {k: float(v) for k, v in json.loads(text).items() if k in _NAMES}
    return {k: v for k, v in metrics.items() if k == "loss" or math.isfinite(v)}


def ask(
    grid: Grid,
    messages: Mapping[int, Message],
    timeout_s: float,
    poll_s: float,
    lost: Callable[[], Mapping[int, str]],
) -> Iterator[tuple[int, Message | str]]:
    """Send one message to each client and yield the replies as they come.

    Replaces `Grid.send_and_receive`, which sleeps for 3 s between checks and waits for clients that were lost.

    Args:
        grid: Of a ServerApp.
        messages: By client.
        timeout_s: For all of them together.
        poll_s: Pause between checks for replies.
        lost: Called every `CHECK_S` seconds; returns the clients from which no reply can come, with the reason. May raise.

    Yields:
        Each client once, with its reply or the reason why there is none.
    """
    clients = list(messages)
    sent = list(grid.push_messages([messages[client] for client in clients])) if clients else []
    waiting = {message_id: client for message_id, client in zip(sent, clients, strict=False) if message_id}
    yield from ((client, "Flower did not accept the message") for client in set(clients) - set(waiting.values()))
    until, check = time.monotonic() + timeout_s, 0.0
    while waiting and time.monotonic() < until:
        for reply in grid.pull_messages(list(waiting)):
            if (client := waiting.pop(reply.metadata.reply_to_message_id, None)) is not None:
                yield client, reply
        if waiting and time.monotonic() > check:
            check, reasons = time.monotonic() + _CHECK_S, lost()
            for message_id, client in list(waiting.items()):
                if client in reasons:
                    del waiting[message_id]
                    yield client, reasons[client]
        if waiting:
            time.sleep(poll_s)
    yield from ((client, f"no reply within {timeout_s:g} s") for client in waiting.values())
