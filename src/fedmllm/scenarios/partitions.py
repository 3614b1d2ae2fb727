"""Partitions: rules that give each row to one client."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from fedmllm.core.errors import DataError
from fedmllm.core.rng import stream
from fedmllm.core.rows import Coded, columns_of_rows, row_labels
from fedmllm.core.spec import Named
from fedmllm.core.types import Example

ClientSplit = list[list[int]]  # per client, the rows that it holds


class Partition(Named):
    """A rule that gives every row to exactly one client."""

    num_clients: NonNegativeInt = 0
    """Number of clients; 0 = as many as the rows name."""

    @abstractmethod
    def split(self, examples: Sequence[Example], seed: int) -> ClientSplit:
        """Assign the rows to clients. Pure: the same rows and seed give the same split.

        Args:
            examples: The training rows, in file order.
            seed: Seed of the experiment.

        Returns:
            Per client, in client order, the indices of its rows in `examples`.

        Raises:
            DataError: A row lacks the column that the partition reads.
        """

    def split_test(self, train: Sequence[Example], test: Sequence[Example], seed: int) -> ClientSplit:
        """Assign test rows to the same clients by the same law: that of the training rows, with the same seed.

        Args:
            train: The training rows, in file order.
            test: The test rows, in file order.
            seed: Seed of the experiment.

        Returns:
            Per client of `split`, in client order, the indices of its rows in `test`.

        Raises:
            DataError: A row lacks the column that the partition reads.
            ConfigError: The law does not determine a split of the test rows.
        """
        return self.split(test, seed)

    def client_names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        """Names of the clients in client order, if the rows name them.

        Args:
            examples: The rows that `split` gets.

        Returns:
            One name per client, or () if clients are only numbered.
        """
        return ()


class Dirichlet(Partition):
    """Label skew (arXiv:1909.06335): the rows of a label go to the clients in shares drawn from Dirichlet(alpha).

    The label of a row is its answer, or "(open)" if it has no choices; or its value in `column`, if one is named.
    Large alpha: all clients alike; small alpha: few clients hold most labels, and some clients may stay empty.
    """

    name: Literal["dirichlet"] = "dirichlet"
    alpha: PositiveFloat = 0.5
    """Concentration; small = strong label skew."""
    num_clients: PositiveInt = 10
    """Number of clients."""
    column: str = ""
    """Column whose values are the labels; "" = the answer."""

    def split(self, examples: Sequence[Example], seed: int) -> ClientSplit:
        groups = (values_of(examples, self.column) if self.column else row_labels(examples)).groups()
        clients: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(self.num_clients)]
        for label in sorted(groups):
            rng = stream(seed, "partition", label)
            shares = rng.dirichlet([self.alpha] * self.num_clients)
            ends = np.rint(np.cumsum(shares) * len(groups[label])).astype(int)
            ends[-1] = len(groups[label])
            for client, part in enumerate(np.split(rng.permutation(groups[label]), ends[:-1])):
                clients[client].append(part)
        return [
            stream(seed, "order", client).permutation(np.concatenate(parts)).tolist() if parts else []
            for client, parts in enumerate(clients)
        ]


class Iid(Partition):
    """Rows shuffled and cut into parts whose sizes differ by one at most."""

    name: Literal["iid"] = "iid"
    num_clients: PositiveInt = 10
    """Number of clients."""

    def split(self, examples: Sequence[Example], seed: int) -> ClientSplit:
        order = stream(seed, "partition", "iid").permutation(len(examples))
        return [part.tolist() for part in np.array_split(order, self.num_clients)]


class ByColumn(Partition):
    """A natural split: one client for each value of `column`, in the order of the values, rows in file order.

    With `num_clients`, the values are the clients' numbers, and a client without rows stays empty.
    """

    name: Literal["by-column"] = "by-column"
    column: str = "client"
    """Column whose values name the clients."""

    def split_test(self, train: Sequence[Example], test: Sequence[Example], seed: int) -> ClientSplit:
        groups = values_of(test, self.column).groups()
        return [groups[name].tolist() if name in groups else [] for name in self.client_names(train)]

    def client_names(self, examples: Sequence[Example]) -> tuple[str, ...]:
        numbered = map(str, range(self.num_clients))
        return tuple(sorted({*numbered, *values_of(examples, self.column).groups()}, key=in_order))

    def split(self, examples: Sequence[Example], seed: int) -> ClientSplit:
        groups = values_of(examples, self.column).groups()
        numbered = set(map(str, range(self.num_clients)))
        if self.num_clients and groups.keys() - numbered:
            row, value = min((rows[0], value) for value, rows in groups.items() if value not in numbered)
            example = examples[row]
            raise DataError(
                f"{example.where}: row {example.id!r:.60}: {self.column!r} is {value!r:.60}; "
                f"partition.num_clients allows 0 to {self.num_clients - 1}"
            )
        clients = sorted({*numbered, *groups}, key=in_order)
        return [groups[value].tolist() if value in groups else [] for value in clients]


def value_of(example: Example, column: str) -> str:
    """The row's value in a column, or an error that names the row and the columns that it has."""
    if column not in example.columns:
        has = ", ".join(sorted(example.columns)) or "none"
        raise DataError(f"{example.where}: row {example.id!r:.60} has no column {column!r}; columns: {has}")
    return example.columns[column]


def values_of(examples: Sequence[Example], column: str) -> Coded[str]:
    """As `value_of`, of all rows."""
    try:
        return columns_of_rows(examples).of_values(lambda columns: columns[column])
    except KeyError:
        return Coded.of((value_of(example, column) for example in examples), str)  # one of them raises


def in_order(value: str) -> list[tuple[int, str]]:
    """Sorting key in which numbers count as numbers: "site 2" before "site 10"."""
    pieces = re.split(r"([0-9]+)", value)
    return [(int(piece), "") if i % 2 else (-1, piece) for i, piece in enumerate(pieces)]
