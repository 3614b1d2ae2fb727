"""A site's process, between Flower's SuperNode and the resident trainer.

The SuperNode runs with `--isolation process`: it fetches messages and starts nothing. This process takes the messages from
it as Flower's executor would, but never opens the app that came with them: no code of the server runs at a site, no process
is started for a message, and the base model is loaded once.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedmllm.core.errors import ConfigError, FedmllmError, Reason
from fedmllm.core.spec import validate
from fedmllm.flower.keys import refuse_open_key
from fedmllm.flower.patches import PULL_CAP_S, PULL_FIRST_S, PULL_S, set_message_id
from fedmllm.flower.processes import exclusive_lock, stop
from fedmllm.flower.request import KEPT, LARGEST_REQUEST, Request
from fedmllm.flower.secure.attempt import Asked, common_digest
from fedmllm.flower.secure.member import SecureMember
from fedmllm.flower.secure.terms import Ask
from fedmllm.flower.site.config import Refused, Site, state_folder
from fedmllm.flower.site.ledger import Ledger
from fedmllm.flower.site.probe import report_reachability
from fedmllm.flower.site.resident import ResidentTrainer
from fedmllm.flower.site.supernode import SuperNode
from fedmllm.flower.wire import (
    ABOUT,
    ADAPTER_KEY,
    HERE,
    LARGEST_RANK,
    REFUSED,
    SECURE,
    array_data,
    array_record,
    legible,
    masked_record,
)
from fedmllm.runs.privacy import NOISE_KEY

POLL_S = 0.2


def run_site(path: Path, imports: Sequence[str] = ()) -> None:
    """Serve a site until SIGINT or SIGTERM. Child processes end with this one, however it ends.

    Args:
        path: Of SITE.toml.
        imports: Plug-ins that the trainer loads in addition to the file's own, as `load_plugins` returned them.

    Raises:
        FedmllmError: A file is missing, the key has an unsafe mode, or another process serves this site.
    """
    site = Site.load(path)
    for key, file in {"ca": site.ca, "key": site.key}.items():
        if not file.is_file():
            raise FedmllmError(f"{path}: {key}: {file}: no such file")
    refuse_open_key(site.key)
    state = state_folder(path)
    try:
        state.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FedmllmError(f"{state}: cannot be made: {error.strerror}") from None
    if site.allow.max_epsilon is not None:
        Ledger.of(site, state, state / NOISE_KEY).claim()
    signal.signal(signal.SIGTERM, _interrupt)

    def log(line: str) -> None:
        say(f"site {site.name}: {line}")

    member = SecureMember(site, state)
    with contextlib.closing(exclusive_lock(state)), contextlib.closing(ResidentTrainer(site, path, imports)) as trainer:
        node = SuperNode(site, state, log)
        log(f"serving {site.server}; log of the SuperNode: {state / 'supernode.log'}")
        ended = threading.Event()
        about_server = (site.server, site.ca, log, ended)
        threading.Thread(target=report_reachability, args=about_server, daemon=True).start()
        try:
            for token in tasks(node):
                # The content of a message is lost if its run died with SuperLink, and is waited for until PULL_S. Each message
                # has a thread of its own, so that the next one does not wait. The trainer serves one at a time.
                threading.Thread(target=serve_task, args=(node, token, trainer, member, log), daemon=True).start()
        except KeyboardInterrupt:
            log("stopped")
        finally:
            ended.set()
            stop(node.process)


def tasks(node: SuperNode) -> Iterator[str]:
    """The tokens of the SuperNode's tasks, as they come. Never ends by itself."""
    client = node.client()
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    while True:
        if not node.keep_alive():
            client.close()
            client = node.client()
        with contextlib.suppress(httpx.HTTPError):  # not up yet, or just died
            answer = client.AcquireTask(request)
            if answer.HasField("task") and answer.token:
                yield answer.token
                continue
        time.sleep(POLL_S)


def serve_task(
    node: SuperNode, token: str, trainer: ResidentTrainer, member: SecureMember, log: Callable[[str], None]
) -> None:
    """Serve one message; the SuperNode gets a reply in any case.

    Args:
        node: That has the task.
        token: Of the task.
        trainer: Of this site.
        member: Of this site.
        log: Called with each line for the operator.
    """
    process, client = node.process, node.client(token)
    heartbeat = HeartbeatSender(beat(client))
    heartbeat.start()
    message, context = None, None
    try:
        message, context = pull(client)
        content, said = answer(message, trainer, member)
        push_message(client, Message(content, reply_to=message), context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
        log(legible(said))
    except Exception as error:  # this process must survive for the next message
        log(legible(f"a message was lost: {type(error).__name__}: {error}"))
        if message and context:
            try:
                reason = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"the site lost it: {type(error).__name__}")
                push_message(client, Message(reason, reply_to=message), context)
            except Exception:  # a SuperNode without a reply waits for ever and fetches no other message
                stop(process)
        push_task_output(client, None, SubStatus.FAILED, type(error).__name__)
    finally:
        with contextlib.suppress(RuntimeError):  # it ended by itself
            heartbeat.stop()
        client.close()


def beat(client: RuntimeHttpClient) -> Callable[[], bool]:
    """A task's heartbeat. Unlike Flower's own it does not end this process if the SuperNode has dropped the task."""

    def send() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPStatusError:
            return True  # the task was dropped; the push of the reply will fail
        except httpx.HTTPError:
            return False
        return True

    return send


def pull(client: RuntimeHttpClient) -> tuple[Message, Context]:
    """Fetch a task's message, as Flower's executor does, but more often, with a time limit, and without the app.

    Args:
        client: For the task.

    Returns:
        The message and its context.

    Raises:
        FedmllmError: The task has no message.
    """
    context = context_from_proto(client.PullTaskInput(PullTaskInputRequest()).context)
    found = client.PullMessages(PullAppMessagesRequest())
    if not found.messages_list:
        raise FedmllmError("the SuperNode has a task without a message")
    tree, node = found.message_object_trees[0], Node(node_id=context.node_id)
    message = pull_and_inflate_object_from_tree(
        tree,
        make_pull_object_fn_protobuf(client.PullObject, node, context.run_id),
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id),
        return_type=Message,
        max_time=PULL_S,
        max_tries_per_object=None,
        initial_backoff=PULL_FIRST_S,
        backoff_cap=PULL_CAP_S,
    )
    set_message_id(message, tree.object_id)
    return message, context


def answer(message: Message, trainer: ResidentTrainer, member: SecureMember) -> tuple[RecordDict, str]:
    """Train as a message asks, or give what a secure sum needs, or the site's largest rank.

    Args:
        message: From the server.
        trainer: Of this site.
        member: Of this site, for secure sums.

    Returns:
        The reply's content, and a line for the site's operator.
    """
    try:
        about = message.content[ABOUT]
        if SECURE in about:
            return _keys(str(about[SECURE]), member)
        if LARGEST_RANK in about:
            rank = trainer.site.largest_rank()
            return RecordDict(
                {ABOUT: ConfigRecord({LARGEST_RANK: rank})}
            ), f"reported the largest rank of an adapter here: {rank or 'any'}"
        head = {"request": str(about["request"]), "manifest": str(about["manifest"])}
        adapter = array_data(message.content)
    except (FedmllmError, KeyError, TypeError, ValueError, AttributeError) as error:
        return _refusal(f"request cannot be read: {type(error).__name__}: {error}")
    try:
        request = Request.read(head["request"])
        if request.secure:
            member.prepare(request, Asked.of(head["request"], adapter))
        said, delta = trainer.ask(head, adapter)
        if REFUSED in said:
            return _refusal(Reason(said[REFUSED], said.get(HERE, "")))
        if request.secure:
            return _masked(request, common_digest(head["request"], adapter), said, delta, member)
    except (Refused, ConfigError) as error:
        return _refusal(Reason.of(error))
    line = f"trained on {said['num_examples']} rows in {said['busy_s']:.1f} s; sent {len(delta)} bytes, {said['metrics']}; "
    return reply_content(said, delta), f"{line}base loaded {said['num_loads']} time(s)"


def reply_content(said: dict[str, Any], delta: bytes) -> RecordDict:
    """Everything that leaves a site after a round: the tensors, their manifest, row count, metrics, digest of kept state."""
    words = {"manifest": said["manifest"], "num_examples": said["num_examples"], "metrics": json.dumps(said["metrics"])}
    words |= {KEPT: said[KEPT]} if KEPT in said else {}
    return RecordDict({ADAPTER_KEY: array_record(delta), ABOUT: ConfigRecord(words)})


def _keys(text: str, member: SecureMember) -> tuple[RecordDict, str]:
    try:
        if len(text) > LARGEST_REQUEST:
            raise ConfigError(f"request: {len(text)} characters; at most {LARGEST_REQUEST} are allowed")
        ask = cast("Ask", validate(Ask, json.loads(text), "request"))
        words = ConfigRecord({SECURE: member.respond(ask)})
    except (Refused, ConfigError) as error:
        return _refusal(Reason.of(error))
    return RecordDict({ABOUT: words}), f"secure sum of run {ask.run_id}: {ask.op}"


def _masked(
    request: Request, common: str, said: dict[str, Any], delta: bytes, member: SecureMember
) -> tuple[RecordDict, str]:
    """A reply of which the server can read the kept state's digest only, unless it has those of all other sites."""
    numbers = np.frombuffer(delta, dtype="<f4")
    data = member.mask(request, common, numbers, int(said["num_examples"]), said["metrics"])
    others = len(request.secure.adverts) - 1 if request.secure else 0
    line = f"trained on {said['num_examples']} rows in {said['busy_s']:.1f} s; sent {len(data)} bytes, masked "
    return masked_content(data, said), f"{line}with {others} other sites"


def masked_content(data: bytes, said: Mapping[str, Any]) -> RecordDict:
    """Everything that leaves a site after a round of a secure sum: masked words, manifest, digest of kept state."""
    words = {"manifest": said["manifest"]} | ({KEPT: said[KEPT]} if KEPT in said else {})
    return RecordDict({ADAPTER_KEY: masked_record(data), ABOUT: ConfigRecord(words)})


def _refusal(reason: str) -> tuple[RecordDict, str]:
    """The reply to the server, and the line for this site's operator, which alone has the numbers."""
    words, here = legible(reason), getattr(reason, "here", "")
    return RecordDict({ABOUT: ConfigRecord({REFUSED: words})}), f"{words} (here: {here})" if here else words


def say(line: str) -> None:
    """Print a line for the site's operator, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt(f"signal {signum}")
