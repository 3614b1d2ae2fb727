"""Resident trainer of a site, in a process of its own.

It loads the frozen base once and trains at each request of the site's process, its parent. The two are connected by an
anonymous socket pair, which no other process can open. A message is a JSON head and the adapter's raw float32.
`python -m fedmllm.flower.site.trainer FD SITE.toml [PLUGIN ...]`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmllm.algorithms.privacy.noise import NOISE_KEY_BYTES
from fedmllm.algorithms.privacy.row_dp import RowDp, RowNoise
from fedmllm.backbones.base import Backbone, BackboneSpec
from fedmllm.core.errors import ConfigError, FedmllmError, Reason
from fedmllm.core.plugins import load_plugins
from fedmllm.core.tensors import flatten, manifest_digest, unflatten
from fedmllm.core.types import Example, Params, Sent, Shard
from fedmllm.federation.client import Clients, RowStore, grouped, planned_steps
from fedmllm.federation.exchange import Header, uplink
from fedmllm.flower.request import KEPT, Request
from fedmllm.flower.site.config import Refused, Site, state_folder
from fedmllm.flower.site.ledger import Entry, Ledger
from fedmllm.flower.site.plausibility import implausible_adapter, moving_steps, scales, suppressed_updates
from fedmllm.flower.site.state import LostState, SiteState
from fedmllm.flower.wire import HERE, REFUSED
from fedmllm.runs.privacy import NOISE_KEY, secret_key

_OF_CONTENT = ("num_tokens", "time_s")  # metrics that depend on what a row says; with row-dp they stay at the site


class Trainer:
    """One site's base model and encoded rows, kept while the settings that they depend on stay the same.

    Args:
        site: Its own file.
        folder: For state that an algorithm keeps here.
        charges: Whether requests count for the site's ledger.
    """

    def __init__(self, site: Site, folder: Path = Path("site-state"), charges: bool = True) -> None:
        self.site, self.num_loads, self._folder = site, 0, folder / "clients"
        self._key = folder / NOISE_KEY
        self._charges = charges
        self.ledger = Ledger.of(site, folder, self._key)
        if site.threads:
            torch.set_num_threads(site.threads)
        self._examples: Sequence[Example] = ()
        self._shard = Shard(0, (), ())
        self._loaded: tuple[BackboneSpec, int] | None = None
        self._backbone: Backbone | None = None
        self._store: tuple[Any, RowStore] | None = None
        self._initial: Params = {}  # the adapter before any training
        self._scales: dict[str, float] = {}

    def train(self, request: Request, flat: np.ndarray[Any, Any], manifest: str) -> tuple[Params, dict[str, Any]]:
        """Train for one round. Settings are checked before anything is built from them.

        Args:
            request: From the server.
            flat: The adapter to start from, in the order of its manifest.
            manifest: Digest of its names and shapes.

        Returns:
            The delta with further tensors, and what else leaves: row count, metrics, manifest, digest of the kept state.

        Raises:
            Refused: The site does not allow the request, the adapter, or the delta that came of it.
        """
        shard = self._rows(request.client)
        num_units = self._num_units(request, shard)
        num_steps = planned_steps(request.train, num_units)
        num_moving = moving_steps(request.train, request.round_lr(), num_steps)
        if reason := self.site.refuse(request, num_steps, num_units, num_moving):
            raise Refused(reason)
        if reason := self._charge(request, spend=False):
            raise Refused(self.site.refusal([reason]))
        backbone = self.backbone(request)
        if reason := self.site.refuse_base(request, backbone.digest):
            raise Refused(reason)
        sent = self._sent(request, flat, manifest)
        if reason := self.site.refusal(self._objections(request, sent)):
            raise Refused(reason)
        state = SiteState(self._folder, request.run_id, request.client)
        before = self._kept(request, state)
        if reason := self._charge(request):  # a refusal above spends nothing: it says nothing about a row's content
            raise Refused(self.site.refusal([reason]))
        clients = self._clients(request, backbone, shard)  # makes the key of the noise, if there is none
        update, kept = clients.train_one(request.client, request.at(), sent, before)
        allow, rate = self.site.allow, clients.round_lr(request.round)
        moved = suppressed_updates(update.delta, sent.start, request.train, rate, num_steps, allow.min_movement)
        if reason := self.site.refusal(moved):
            raise Refused(reason)
        reply = uplink(update.delta, update.extra)
        withheld = _OF_CONTENT if isinstance(request.privacy, RowDp) else ()
        metrics = {k: v for k, v in update.metrics.items() if k in allow.metrics and k not in withheld}
        about = {"num_examples": update.num_examples, "metrics": metrics, "manifest": manifest_digest(reply)}
        if sha := state.write(request.round, kept):
            about[KEPT] = sha
        return reply, about

    def _num_units(self, request: Request, shard: Shard) -> int:
        """Rows, or groups if the request clips these and this site has them."""
        privacy, column = request.privacy, self.site.data.group_column()
        if isinstance(privacy, RowDp) and privacy.unit == "group" and column:
            return len(grouped(self._examples, shard, column))
        return len(shard.rows)

    def _charge(self, request: Request, spend: bool = True) -> Reason:
        """Enter a request in the ledger, before it is trained; the reason why it would spend too much.

        Without `spend` only look, before a model is built.
        """
        if not self._charges:
            return Reason("")
        privacy, allow = request.privacy, self.site.allow
        z = privacy.noise_multiplier if isinstance(privacy, RowDp) else 0.0
        unit = privacy.unit_of(self.site.data.group_column()) if isinstance(privacy, RowDp) else "row"
        entry = Entry(request.run_id, request.round, z, request.train.epochs, round(time.time(), 3), unit)
        return self.ledger.charge(entry, allow.max_epsilon, allow.epsilon_delta, allow.epsilon_since, spend)

    def _sent(self, request: Request, flat: np.ndarray[Any, Any], manifest: str) -> Sent:
        """Return the tensors that the server sent. Raises Refused if they do not fit the adapter here."""
        header = request.header or Header.of(Sent(self._initial))
        like = header.like()
        if manifest != (ours := manifest_digest(like)):
            reason = f"manifest {manifest[:12]} of the adapter is not the one here, {ours[:12]}"
            raise Refused(self.site.refusal([reason]))
        try:
            header.check(self._initial)
            return header.sent(unflatten(torch.from_numpy(flat), like), self._initial)
        except FedmllmError as error:  # about the request only
            raise Refused(self.site.refusal([str(error)])) from None

    def _kept(self, request: Request, state: SiteState) -> Params:
        """Read the algorithm's state of this site. Raises Refused if it is lost."""
        try:
            return state.read(request.kept)
        except LostState as error:
            said = (
                f"{error}, which {request.aggregator.name} keeps here and needs: restore clients/{request.run_id} in the "
                "folder of the site's state, or start the run again from round 1"
            )
            raise Refused(self.site.refusal([Reason(said, Reason.of(error).here)])) from None

    def _objections(self, request: Request, sent: Sent) -> list[str]:
        allow, reasons = self.site.allow, implausible_adapter(sent.start, self._scales, self.site.allow)
        name = request.aggregator.name
        if not allow.extra_tensors and request.aggregator.returned_extra(sent):
            reasons.append(f"{name} returns more than the delta; this site has allow.extra_tensors = false")
        if not allow.frozen_adapter and sent.frozen:
            reasons.append(f"{name} adds a frozen adapter; this site has allow.frozen_adapter = false")
        return reasons

    def backbone(self, request: Request) -> Backbone:
        """The base model with the LoRA of a request, kept until a request has another one."""
        same = {"lora": request.lora, "precision": request.precision, "max_tokens": request.max_tokens}
        spec = self.site.backbone.model_copy(update=same)
        if self._backbone is None or self._loaded != (spec, request.seed):
            self._backbone = self._store = None  # the old one leaves memory before the new one comes
            self._backbone = spec.load(request.seed)
            self._initial = {name: tensor.clone() for name, tensor in self._backbone.lora().items()}
            self._scales = scales(self._initial)
            self._loaded = (spec, request.seed)
            self.num_loads += 1
        return self._backbone

    def _rows(self, client: int) -> Shard:
        if not self._examples:
            self._examples, self._shard = self.site.shard(client)
        return Shard(client, self._shard.rows, self._shard.visible)

    def _clients(self, request: Request, backbone: Backbone, shard: Shard) -> Clients:
        if self._store is None or self._store[0] != request.prompt:
            self._store = (request.prompt, RowStore(backbone, request.prompt, self._examples))
        return Clients(
            backbone=backbone,
            objective=request.objective,
            train=request.train,
            store=self._store[1],
            shards=[*(Shard(k, (), ()) for k in range(request.client)), shard],
            modalities=self.site.data.modalities(),
            num_rounds=request.num_rounds,
            left_out=self._left_out if isinstance(request.privacy, RowDp) else None,
            seed=request.seed,
            aggregator=request.aggregator,
            row_noise=self._row_noise(request),
        )

    def _left_out(self, reason: str) -> None:
        print(f"site {self.site.name}: a row counts as zeros: {reason}", file=sys.stderr, flush=True)

    def _row_noise(self, request: Request) -> RowNoise | None:
        """Clipping and noise of a request whose noise, if it has any, is in the ledger by now."""
        privacy = request.privacy
        if not isinstance(privacy, RowDp):
            return None
        # Clipping alone makes no key: a key says that the ledger has an entry.
        key = secret_key(self._key) if privacy.noise_multiplier else bytes(NOISE_KEY_BYTES)
        return RowNoise(privacy, key, request.run_id, self.site.data.group_column())


def serve_trainer(site: Site, link: Connection, folder: Path = Path("site-state")) -> None:
    """Serve requests until the parent closes the connection. Errors are returned as replies; the trainer keeps running.

    Args:
        site: Its own file.
        link: To the site's process.
        folder: For state that an algorithm keeps here.
    """
    trainer = Trainer(site, folder)
    while True:
        try:
            head, body = json.loads(link.recv_bytes()), link.recv_bytes()
        except EOFError:
            return
        began, delta = time.perf_counter(), b""
        try:
            params, about = trainer.train(_request(head["request"]), _floats(body), head["manifest"])
            delta = flatten(params).numpy().tobytes()
        except Refused as error:
            about = {REFUSED: str(error), HERE: Reason.of(error).here}
        except Exception as error:  # may name rows and files: that stays here
            print(f"site {site.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            about = {REFUSED: f"site {site.name}: training failed with {type(error).__name__}; its own log says why"}
        about |= {"num_loads": trainer.num_loads, "busy_s": time.perf_counter() - began}
        link.send_bytes(json.dumps(about).encode())
        link.send_bytes(delta)


def _request(text: str) -> Request:
    try:
        return Request.read(text)
    except ConfigError as error:  # about the request only, so it may leave the site
        raise Refused(str(error)) from None


def _floats(body: bytes) -> np.ndarray[Any, Any]:
    if len(body) % 4:
        raise Refused(f"the adapter has {len(body)} bytes, which is not a whole number of float32")
    return np.frombuffer(bytearray(body), dtype=np.float32)


def _end_with(parent: int) -> None:
    """End this process when the site's process has died: the reply has no reader."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Entry point of the child process."""
    descriptor, path = int(sys.argv[1]), Path(sys.argv[2])
    load_plugins(sys.argv[3:], "--import")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    serve_trainer(Site.load(path), Connection(descriptor), state_folder(path))


if __name__ == "__main__":
    main()
