"""Groups of test rows by modalities, site or column."""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Visible, visible_of
from fedmllm.runs.predictions import Evaluation

BY_SHOWS, BY_SITE = "shows", "site"
SITE_COLUMN = "client"  # of rows that name their sites
MOST_VALUES = 12  # of a column that is a grouping without being asked for


def modalities_of(evaluation: Evaluation) -> tuple[str, ...]:
    """Modalities that any test row has, in their order."""
    return tuple(dict.fromkeys(name for has in evaluation.has for name in sorted(has)))


def received(evaluation: Evaluation) -> list[Visible]:
    """Per test row the modalities that the model received: those that the row has and that were visible."""
    kept = visible_of(evaluation.visible, modalities_of(evaluation))
    return [has & kept for has in evaluation.has]


def received_name(visible: Visible, modalities: Sequence[str]) -> str:
    """ "image + text", "image only", "nothing"."""
    names = [name for name in modalities if name in visible]
    if len(names) == 1 and len(modalities) > 1:
        return f"{names[0]} only"
    return " + ".join(names) or "nothing"


def slices(evaluation: Evaluation, by: str) -> dict[str, list[int]]:
    """Name of a group -> positions of its test rows; the groups with most modalities, or in the order of their names.

    Args:
        evaluation: With the rows.
        by: "shows" (the modalities that the model received), "site", or a column that the rows keep (`data.columns.keep`).

    Returns:
        The groups; a row without the column is in none.

    Raises:
        ConfigError: No row has the column; the message lists those that are there.
    """
    found: dict[str, list[int]] = {}
    if by == BY_SHOWS:
        modalities = modalities_of(evaluation)
        kinds = received(evaluation)
        for kind in sorted(set(kinds), key=lambda kind: (-len(kind), sorted(kind))):
            found[received_name(kind, modalities)] = [i for i, own in enumerate(kinds) if own == kind]
        return found
    column = SITE_COLUMN if by == BY_SITE else by
    values = [p.example.columns.get(column) for p in evaluation.predictions]
    if not any(value is not None for value in values):
        known = ", ".join([BY_SHOWS, *row_columns(evaluation)])
        raise ConfigError(f"by: got {by!r}; no test row has that column; allowed: {known}")
    for name in sorted({value for value in values if value is not None}):
        found[name] = [i for i, value in enumerate(values) if value == name]
    return found


def row_columns(evaluation: Evaluation) -> list[str]:
    """Names of `slices` for the columns of the test rows: "site" for the column of the client."""
    names = dict.fromkeys(name for p in evaluation.predictions for name in p.example.columns)
    return [BY_SITE if name == SITE_COLUMN else name for name in names]


def groupings(evaluation: Evaluation) -> list[str]:
    """Values of `by` that divide the test rows into 2 to 12 groups."""
    return [by for by in (BY_SHOWS, *row_columns(evaluation)) if 2 <= len(slices(evaluation, by)) <= MOST_VALUES]
