"""What travels over Flower, and how a round is asked for: the same for the simulation and for real sites."""

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
from fedmllm.flower.site.config import METRICS
from fedmllm.flower.wire import ABOUT, ADAPTER, REFUSED, array_data, array_record, legible

CHECK_S = 2.0  # between two looks at whether an answer can still come
NAMES = frozenset(
    {*METRICS, "base_loads"}
)  # of metrics that are taken from an answer; others could pose as the record's own
LONGEST_METRICS = 2000  # characters


class Packed:
    """An adapter made ready for the wire once, for all the messages of a round."""

    def __init__(self, params: Params) -> None:
        self._adapter: ArrayRecord = array_record(flatten(params).numpy().tobytes())
        self._manifest = manifest_digest(params)

    def content(self, about: Mapping[str, str | int | float | bytes]) -> RecordDict:
        """A message's content: the adapter as one array [P], and what is said about it."""
        return RecordDict({ADAPTER: self._adapter, ABOUT: ConfigRecord({"manifest": self._manifest, **about})})


def unpack(content: RecordDict, like: Params) -> Params:
    """The adapter of a message, shaped as `like`. Raises FedmllmError naming what differs."""
    theirs, ours = content[ABOUT].get("manifest"), manifest_digest(like)
    if theirs != ours:
        raise FedmllmError(
            f"manifest {str(theirs)[:12]} of the other side is not ours, {ours[:12]}: names or shapes differ"
        )
    return unflatten(torch.frombuffer(bytearray(array_data(content)), dtype=torch.float32), like)


def update_content(update: ClientUpdate) -> RecordDict:
    """A client's answer: its delta with its extra tensors, its row count and its metrics."""
    metrics = json.dumps(dict(update.metrics))
    return Packed(uplink(update.delta, update.extra)).content({"num_examples": update.num_examples, "metrics": metrics})


def refusal(reason: str) -> RecordDict:
    """An answer that says why there is no update."""
    return RecordDict({ABOUT: ConfigRecord({REFUSED: reason})})


def read_update(
    client: int, reply: Message | str, like: Params, extra: Params | None = None
) -> ClientUpdate | ClientFailure:
    """A reply as an update, or as the reason why it is none. Nothing in a reply can raise.

    Args:
        client: Who replied.
        reply: The reply, or the reason why there is none.
        like: The tensors that it returns, `Sent.returned()`.
        extra: Those in addition, `Aggregator.returned_extra()`; a client that did not train may leave them out.
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
    except Exception as error:  # whatever another machine thinks of: too deep, too large, of the wrong kind
        return ClientFailure(client, legible(f"its answer cannot be used: {type(error).__name__}: {error}"))


def read_metrics(text: str) -> dict[str, float]:
    """The metrics of an answer: known names alone, finite but for the loss, which the screen judges."""
    if len(text) > LONGEST_METRICS:
        raise FedmllmError(f"metrics of {len(text)} characters; at most {LONGEST_METRICS} are read")
    metrics = {k: float(v) for k, v in json.loads(text).items() if k in NAMES}
    return {k: v for k, v in metrics.items() if k == "loss" or math.isfinite(v)}


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
