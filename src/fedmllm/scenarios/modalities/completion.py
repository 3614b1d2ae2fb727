"""Interface of completions, and the rules that hold for all of them."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import Named
from fedmllm.core.types import Conversation, Example, Modality, Params, Round, Shard, Visible

if TYPE_CHECKING:
    from torch import Tensor


Role: TypeAlias = Literal["method", "control", "bound"]
"""Part of a run in a comparison. Reports rank and recommend methods alone."""


def strictest(roles: Sequence[Role]) -> Role:
    """Return the role of a run whose parts have these: "bound" before "control" before "method"."""
    return "bound" if "bound" in roles else "control" if "control" in roles else "method"


class FrozenModel(Protocol):
    """Part of the backbone that a completion may use. Nothing of it depends on the adapter."""

    digest: str

    def token_vectors(self, text: str) -> tuple[list[int], Tensor]:
        """Return the tokens of a text [L] and their input embeddings [L, D]."""

    def picture_vectors(self, path: Path) -> Tensor:
        """Return the vision tower's output for a picture [Q, D]."""

    def generate_frozen(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Return greedy answers of the model without its adapter."""


def require_kind(key: str, modality: Modality, kind: str, allowed: frozenset[Modality]) -> None:
    """Refuse a setting that names a modality of another kind.

    Args:
        key: The setting, as in "completion.to".
        modality: Its value.
        kind: The kind that is needed: "pictures" or "text".
        allowed: Modalities of that kind.

    Raises:
        ConfigError: The modality is not among them.
    """
    if modality not in allowed:
        listed = ", ".join(sorted(allowed)) or f"none, as the rows have no {kind}"
        raise ConfigError(f"{key}: got {modality!r}, which has no {kind}; allowed: {listed}")


@cache
def _files() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="fedmllm-")
    _FOLDERS.append(folder)  # removed at the end of the process
    return Path(folder.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class CompletionSite:
    """Inputs of a completion: at a client, or at the server for test rows.

    Attributes:
        model: The frozen model.
        public: Complete public rows, in the order of their ids; () = none.
        modalities: Of the data set, in order.
        seed: Of the experiment.
        learned: What a completion that learns has learned; {} = nothing yet.
        folder: For files that filled rows name; it lasts as long as the process.
    """

    model: FrozenModel
    public: tuple[Example, ...]
    modalities: tuple[Modality, ...]
    seed: int
    learned: Params = field(default_factory=dict)
    folder: Path = field(default_factory=_files)


class Filling(ABC):
    """A completion at work. `fill` is a pure function of the row, the settings and the `CompletionSite`."""

    def warm(self, examples: Sequence[Example], training: bool) -> None:
        """Compute at once what later calls of `fill` need. Optional.

        Args:
            examples: Rows as `fill` will get them.
            training: As `fill` will get it.
        """
        return

    @abstractmethod
    def fill(self, example: Example, training: bool) -> Example:
        """Add modalities to a row.

        Args:
            example: The row with the fields that its mask leaves; hidden content is not in it. Outside training its answer is
                "" and its columns are {}.
            training: False for a row that is evaluated.

        Returns:
            The row with more fields, or the same object if nothing can be added.
        """


class Completion(Named):
    """A rule that fills, or converts, modalities of a row before it becomes a prompt.

    Masks, shards and digests stay as they are. A completion sees of a row what its mask leaves, and the answer of training
    rows only (`Completer`).
    """

    needs_public: ClassVar[bool] = False
    """True if it reads public rows (`[public]`)."""
    reads_model: ClassVar[bool] = True
    """True if it uses the frozen model, which must then not be trained in part (`lora.train_extra`)."""
    sees_hidden: ClassVar[bool] = False
    """True for a control that gets what the mask hides. The record says so."""
    leaks: ClassVar[bool] = False
    """True if filled training content can give the answer away by itself (`fedmllm.testing.leak_probe`). The record says so."""
    learns: ClassVar[bool] = False
    """True if it is learned federatedly before training (`num_rounds`, `start`, `learn`)."""
    converts: ClassVar[bool] = False
    """True if rows without a gap are changed, too."""

    def at_test(self) -> bool:
        """Return whether rows that are evaluated are completed.

        Returns:
            False unless a member says otherwise: without the answer a completion adds no information about it.
        """
        return False

    def role(self) -> Role:
        """Part in a comparison.

        Returns:
            "bound" if it sees hidden content, else "method"; a member whose settings make it a control says so.
        """
        return "bound" if self.sees_hidden else "method"

    def label(self) -> str:
        """The name in tables: with the settings that differ from their defaults.

        Returns:
            A name such as "retrieve" or "retrieve(label=none)".
        """
        set_ = {k: v for k, v in self.model_dump(mode="json", exclude_defaults=True).items() if k != "name"}
        return f"{self.name}({','.join(f'{k}={v}' for k, v in set_.items())})" if set_ else self.name

    def check(self, modalities: tuple[Modality, ...]) -> None:
        """Check the settings against the experiment, before anything is loaded.

        Args:
            modalities: Of the data set.

        Raises:
            ConfigError: A setting does not fit.
        """

    def check_kinds(self, pictures: frozenset[Modality], texts: frozenset[Modality]) -> None:
        """Check settings that name modalities, after `check`. Called if the data set knows its kinds before it is read.

        Args:
            pictures: Modalities of the data set whose content is pictures.
            texts: All others.

        Raises:
            ConfigError: A setting names a modality of the other kind.
        """

    def may_leak(self) -> bool:
        """Return whether the settings let filled content give the answer away.

        Returns:
            `leaks` unless a member says otherwise.
        """
        return self.leaks

    def notes(self, train: Sequence[Example], public: Sequence[Example]) -> Sequence[str]:
        """Findings about the rows for the record.

        Args:
            train: Training rows.
            public: Public rows.

        Returns:
            One sentence each.
        """
        return ()

    def num_rounds(self) -> int:
        """Rounds in which it is learned before training.

        Returns:
            0 unless `learns`.
        """
        return 0

    def learns_from(self, example: Example) -> bool:
        """Return whether a complete row can be learned from.

        Args:
            example: The row.

        Returns:
            True unless a member says otherwise.
        """
        return True

    def min_rows(self) -> int:
        """Rows that a client needs to take part in learning.

        Returns:
            1 unless a member says otherwise.
        """
        return 1

    def start(self, site: CompletionSite) -> Params:
        """Weights before the first of these rounds.

        Args:
            site: Frozen model and seed.

        Returns:
            float32 tensors; {} unless `learns`.
        """
        return {}

    def learn(
        self, site: CompletionSite, rows: Sequence[Example], params: Params, at: Round, client: int
    ) -> tuple[Params, int, float]:
        """One client's part of such a round. Pure.

        Args:
            site: Frozen model and seed.
            rows: The client's complete rows that can be learned from, at least `min_rows()`.
            params: The weights.
            at: The round.
            client: Its number, for random streams.

        Returns:
            Change of the weights, the rows that it counts for in their mean, and the mean loss.
        """
        return {}, 0, 0.0

    @abstractmethod
    def prepare(self, site: CompletionSite) -> Filling:
        """Make ready to fill rows.

        Args:
            site: Frozen model, public rows, modalities and seed.

        Returns:
            The filling.

        Raises:
            ConfigError: A setting does not fit the site.
        """


class Nothing(Completion):
    """Rows stay as they are: a missing modality is left out of the prompt."""

    name: Literal["none"] = "none"
    reads_model = False

    def prepare(self, site: CompletionSite) -> Filling:
        return _Unchanged()


class _Unchanged(Filling):
    def fill(self, example: Example, training: bool) -> Example:
        return example


class Completer:
    """Applies a completion to rows, under the rules that hold for every member.

    Args:
        completion: The member.
        site: What it works with.
    """

    def __init__(self, completion: Completion, site: CompletionSite) -> None:
        self._completion, self._modalities = completion, site.modalities
        self.site, self._filling = site, completion.prepare(site)

    def with_learned(self, learned: Params) -> None:
        """Fill rows with what was learned from now on.

        Args:
            learned: Weights as `Completion.start` has them.
        """
        self.site = replace(self.site, learned=learned)
        self._filling = self._completion.prepare(self.site)

    def __call__(self, example: Example, visible: Visible, training: bool) -> tuple[Example, Visible]:
        """Return the row as it is rendered, and what it shows. A row without a gap is returned as it is.

        Args:
            example: The whole row.
            visible: What its mask leaves.
            training: False for a row that is evaluated.

        Raises:
            FedmllmError: The completion took a modality away without `converts`, or added one that the set does not have.
        """
        given = self._given(example, visible, training)
        if given is None:
            return example, visible
        filled = self._filling.fill(given, training)
        if filled is given:
            return example, visible
        odd = sorted(set(filled.fields) - set(self._modalities))
        lost = [] if self._completion.converts else sorted(set(given.fields) - set(filled.fields))
        if odd or lost:
            fault = f"adds {odd}, allowed: {', '.join(self._modalities)}" if odd else f"takes away {lost}"
            raise FedmllmError(f"{example.where}, id {example.id}: completion {self._completion.name} {fault}")
        fields = {m: filled.fields[m] for m in self._modalities if m in filled.fields}
        row = replace(filled, answer=example.answer, columns=example.columns) if not training else filled
        return replace(row, id=example.id, where=example.where, fields=fields), frozenset(fields)

    def warm(self, rows: Sequence[tuple[Example, Visible]], training: bool) -> None:
        """Let the completion compute at once what these rows need.

        Args:
            rows: Rows and their masks.
            training: False for rows that are evaluated.
        """
        given = (self._given(example, visible, training) for example, visible in rows)
        self._filling.warm([example for example in given if example is not None], training)

    def _given(self, example: Example, visible: Visible, training: bool) -> Example | None:
        """Return the part of a row that the completion receives; None = the row is not completed."""
        present = example.visible_fields(visible)
        if not training and not self._completion.at_test():
            return None
        if not self._completion.converts and all(m in present for m in self._modalities):
            return None
        fields = example.fields if self._completion.sees_hidden else present
        given = replace(example, fields=fields)
        return given if training else replace(given, answer="", columns={})


def rows_to_learn_from(
    completion: Completion, train: Sequence[Example], shards: Sequence[Shard], modalities: Sequence[Modality]
) -> dict[int, list[Example]]:
    """Find each client's complete rows from which a completion is learned.

    Args:
        completion: One that learns.
        train: Training rows.
        shards: All clients.
        modalities: Of the data set.

    Returns:
        Client -> rows, [] where it has none.
    """
    whole = frozenset(modalities)
    return {
        shard.client: [
            train[row]
            for row, visible in zip(shard.rows, shard.visible, strict=True)
            if visible >= whole and completion.learns_from(train[row])
        ]
        for shard in shards
    }


def hidden_slots(shards: Sequence[Shard], modalities: Sequence[Modality]) -> dict[Modality, int]:
    """Count the training rows that do not show a modality.

    Args:
        shards: All clients.
        modalities: Of the data set.

    Returns:
        Modality -> number of rows, without zeros.
    """
    hidden = Counter(m for shard in shards for visible in shard.visible for m in modalities if m not in visible)
    return {m: hidden[m] for m in modalities if hidden[m]}
