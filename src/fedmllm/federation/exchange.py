"""Payloads between server and clients as flat trees of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer

from fedmllm.core.errors import FedmllmError
from fedmllm.core.spec import Spec
from fedmllm.core.tensors import fits, params_digest
from fedmllm.core.types import Params, Sent

EXTRA, FROZEN = "extra/", "frozen/"


class Header(Spec):
    """Description of a `Sent` without its numbers, as JSON: with `Sent.travelling()` and the receiver's own tensors it
    is the whole of it."""

    shapes: dict[str, tuple[int, ...]]
    """Of every tensor of `Sent.travelling()`, by its name there."""
    own: dict[str, tuple[int, ...]] = {}  # noqa: RUF012
    """Of the tensors of `start` that do not travel."""
    trains: tuple[str, ...] | None = None
    keeps: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    known_digest: str = ""
    """Of the values of the tensors in `known`, which each side makes itself; "" if there are none."""
    scale: float = 1.0

    @model_serializer(mode="wrap")
    def _without_an_empty_digest(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Earlier versions refuse the key `known_digest`: it travels only where they could not do what it is for."""
        return {key: value for key, value in dump(self).items() if key != "known_digest" or value}

    @classmethod
    def of(cls, sent: Sent) -> Header:
        """The header of what one client receives."""
        own = sent.keeps | sent.known
        return cls(
            shapes={name: tuple(t.shape) for name, t in sent.travelling().items()},
            own={name: tuple(t.shape) for name, t in sent.start.items() if name in own},
            trains=None if sent.trains is None else tuple(sorted(sent.trains)),
            keeps=tuple(sorted(sent.keeps)),
            known=tuple(sorted(sent.known)),
            known_digest=params_digest({name: sent.start[name] for name in sent.known}) if sent.known else "",
            scale=sent.scale,
        )

    def like(self) -> Params:
        """Tensors in the shapes of the payload, float32; their values mean nothing."""
        return {name: torch.zeros(()).expand(shape) for name, shape in self.shapes.items()}

    def sent(self, payload: Params, initial: Params) -> Sent:
        """Return the tensors that the client works with.

        Args:
            payload: The tensors that travelled.
            initial: The receiver's seeded adapter, before any training: the value of the tensors that did not travel.

        Raises:
            FedmllmError: a tensor does not belong to the adapter, or is larger than it; or what the receiver makes itself has
                other values than at the sender.
        """
        self.check(initial)
        own = {name: initial[name][tuple(slice(n) for n in shape)] for name, shape in self.own.items()}
        self._check_known(own)
        start = {n: own[n] if n in own else payload[n] for n in initial}
        return Sent(
            start,
            None if self.trains is None else frozenset(self.trains),
            frozenset(self.keeps),
            frozenset(self.known),
            without_prefix(payload, FROZEN),
            without_prefix(payload, EXTRA),
            self.scale,
        )

    def check(self, initial: Params) -> None:
        """Raise FedmllmError unless the header describes an adapter that fits the receiver's."""
        plain = {n: s for n, s in self.shapes.items() if not n.startswith((EXTRA, FROZEN))}
        if plain.keys() & self.own.keys() or plain.keys() | self.own.keys() != initial.keys():
            odd = sorted((plain.keys() | self.own.keys()) ^ initial.keys())[:3]
            raise FedmllmError(f"header: the names of the adapter differ from those here: {odd}")
        for name, shape in {**plain, **self.own}.items():
            here = tuple(initial[name].shape)
            if not fits(name, shape, here):
                raise FedmllmError(f"header: {name} has shape {list(shape)}; here it is {list(here)}")
        if odd := sorted({*(self.trains or ()), *self.keeps, *self.known} - initial.keys())[:3]:
            raise FedmllmError(f"header: {odd} are not tensors of the adapter")

    def _check_known(self, own: Params) -> None:
        """Raise FedmllmError unless the tensors that both sides make have equal values."""
        if not self.known:
            return
        what = f"{len(self.known)} tensors are not sent but made here from the seed ({self.known[0]}, ...)"
        if not self.known_digest:
            raise FedmllmError(
                f"header.known_digest: missing; {what}, and a server of this version sends their digest; install the same "
                "version of fedmllm on both sides"
            )
        here = params_digest({name: t for name, t in own.items() if name in self.known})
        if here != self.known_digest:
            raise FedmllmError(
                f"header.known_digest: got {self.known_digest[:12]}; {what}, and their digest here is {here[:12]}: another "
                "base model, seed, or version of fedmllm or torch"
            )


def uplink(delta: Params, extra: Params) -> Params:
    """A response as one tree."""
    return {**delta, **{EXTRA + name: t for name, t in extra.items()}}


def without_prefix(tree: Mapping[str, torch.Tensor], prefix: str) -> Params:
    """The tensors whose names have the prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tree.items() if name.startswith(prefix)}


def split_uplink(tree: Params) -> tuple[Params, Params]:
    """Inverse of `uplink`."""
    return {n: t for n, t in tree.items() if not n.startswith(EXTRA)}, without_prefix(tree, EXTRA)


def distinct(trees: Mapping[int, Params]) -> Sequence[tuple[Params, list[int]]]:
    """The different trees, each with the clients that receive it: equal if their tensors are the same objects."""
    groups: dict[tuple[int, ...], tuple[Params, list[int]]] = {}
    for client, tree in trees.items():
        groups.setdefault(tuple(map(id, tree.values())), (tree, []))[1].append(client)
    return list(groups.values())
