"""Lab values, sensor series and gene variants as text.

Pure: the same cells and settings give the same text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated

from pydantic import Field, PositiveFloat, field_validator

from fedmllm.core.errors import ConfigError, DataError
from fedmllm.core.spec import Spec
from fedmllm.core.types import Modality
from fedmllm.data.reading import RawRow, as_text, listed, quoted

STEADY = 0.05  # a series whose ends differ by less, as a share of its largest magnitude, is steady
MAX_SAMPLES = 1_000_000  # of one series; more are a mistake in the mapping
_SEPARATOR = re.compile(r"[;\s]+")
_VARIANT = re.compile(r"(?P<gene>[A-Za-z0-9][\w.-]*)(?:\s*[=:]\s*|\s+)(?P<variant>\S.*)")

ReferenceRange = tuple[float, float]


class Render(Spec):
    """Text form of lab values, series and variants. Keys of the tables are the columns of the values."""

    digits: Annotated[int, Field(ge=1, le=15)] = 3
    """Significant digits of a number."""
    units: dict[str, str] = Field(default_factory=dict)
    """Unit behind the numbers of a column: { crp = "mg/l" }."""
    ranges: dict[str, ReferenceRange] = Field(default_factory=dict)
    """Normal range of a column: { crp = [0, 5] }; a single value is followed by one of `flags`."""
    flags: tuple[str, str, str] = ("low", "normal", "high")
    """Words for a value below, in and above its normal range."""
    step_s: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Seconds between two samples of a series: { speed = 0.5 }."""
    genes: tuple[str, ...] = ()
    """Genes whose variants are written, in this order; needed for a column that holds variants of any gene. Others never
    leave the table: a rare variant identifies a person."""
    reference: tuple[str, ...] = ("reference", "ref", "wt", "wild type", "wildtype", "none", "negative", "0", "0/0")
    """Words that mean that a gene has no variant, in any case."""
    top: Annotated[int, Field(ge=0)] = 0
    """Number of variants that are written, the first ones; 0 = all."""

    def check(self, numbers: Collection[str], place: str) -> None:
        """Check that the tables name columns of numbers.

        Args:
            numbers: Columns that hold numbers.
            place: Of the settings; begins the error message.

        Raises:
            ConfigError: A key is none of them.
        """
        for key in ("units", "ranges", "step_s"):
            if odd := sorted(getattr(self, key).keys() - set(numbers)):
                raise ConfigError(
                    f"{place}.{key}.{odd[0]}: no such column of numbers; there are: {listed(sorted(numbers))}"
                )

    @field_validator("ranges")
    @classmethod
    def _in_order(cls, ranges: dict[str, ReferenceRange]) -> dict[str, ReferenceRange]:
        for column, (low, high) in ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"{column}: the normal range has to be two numbers, the lower one first")
        return ranges

    def series(self, values: Mapping[str, Sequence[float]], named: bool = True) -> str:
        """Write columns of numbers, in the given order.

        Args:
            values: Column -> one number, or the samples of a series in order of time.
            named: Write the name of a column in front of its numbers.

        Returns:
            Such as "crp 112 mg/l high, hb 9.1 g/dl low", or "speed 12.3 to 0.4 m/s in 2 s, falling, from 0.4 to 12.3"; the
            statistics of a series are its ends, its trend, and its lowest and highest sample.
        """
        several = any(len(samples) > 1 for samples in values.values())
        separator = "; " if several else ", "
        return separator.join(
            f"{f'{column} ' if named else ''}{self._numbers(column, samples)}" for column, samples in values.items()
        )

    def _numbers(self, column: str, samples: Sequence[float]) -> str:
        unit = f" {self.units[column]}" if self.units.get(column) else ""
        if len(samples) == 1:
            flag = f" {self._flag(samples[0], self.ranges[column])}" if column in self.ranges else ""
            return f"{number(samples[0], self.digits)}{unit}{flag}"
        first, last, low, high = samples[0], samples[-1], min(samples), max(samples)
        change, scale = last - first, max(abs(low), abs(high))
        trend = "steady" if abs(change) <= STEADY * scale else "rising" if change > 0 else "falling"
        ends, extremes = ([number(v, self.digits) for v in pair] for pair in ((first, last), (low, high)))
        step = self.step_s.get(column)
        time = f" in {number(step * (len(samples) - 1), self.digits)} s" if step else ""
        return f"{ends[0]} to {ends[1]}{unit}{time}, {trend}, from {extremes[0]} to {extremes[1]}"

    def _flag(self, value: float, normal: ReferenceRange) -> str:
        return self.flags[0 if value < normal[0] else 2 if value > normal[1] else 1]

    def variants(self, found: Mapping[str, str]) -> str:
        """Write the variants of genes.

        Args:
            found: Gene -> variant, or a word that means none, in the order of a table with a column per gene.

        Returns:
            Such as "KRAS G12D, TP53 R175H"; "no variant" if every gene is as in the reference.
        """
        reference = {word.casefold() for word in self.reference}
        order = self.genes or tuple(found)
        named = [f"{g} {found[g]}" for g in order if g in found and found[g].casefold() not in reference]
        return ", ".join(named[: self.top or None]) or "no variant"


def check_names(modalities: Iterable[Modality], place: str) -> None:
    """Refuse names of modalities that `evaluate.visible` or `scenario.clients` could not name.

    Args:
        modalities: The names.
        place: Of the settings; begins the error message.

    Raises:
        ConfigError: A name is reserved, or has a character that joins names.
    """
    for modality in modalities:
        if modality in ("", "all", "both", "none") or set(modality) & set("+-") or modality != modality.strip():
            raise ConfigError(
                f"{place}: got {modality!r}; allowed: a name other than all, both and none, without + and -"
            )


def number(value: float, digits: int) -> str:
    """A number with that many significant digits, without an exponent and without trailing zeros."""
    text = format(Decimal(f"{value:.{digits}g}"), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def samples_of(cell: object, column: str, place: str) -> tuple[float, ...]:
    """The numbers of a cell: a number, a list of numbers, or a text with numbers between blanks or semicolons.

    Args:
        cell: Not empty.
        column: Its column.
        place: Of the row; begins the error message.

    Raises:
        DataError: Something in the cell is not a finite number, or there are too many of them.
    """
    values: object = cell
    if isinstance(cell, str):
        text = cell.strip()
        try:
            values = json.loads(text) if text.startswith("[") else _SEPARATOR.split(text)
        except (ValueError, RecursionError):
            raise DataError(f"{place}: {column!r} is {quoted(cell)}, not a list of numbers") from None
    several = values if isinstance(values, list) else [values]
    if not 0 < len(several) <= MAX_SAMPLES:
        raise DataError(f"{place}: {column!r} has {len(several):,} numbers; allowed: 1 to {MAX_SAMPLES:,}")
    return tuple(_finite(value, column, place) for value in several)


def _finite(value: object, column: str, place: str) -> float:
    try:
        if isinstance(value, (bool, bytes)) or not isinstance(value, (int, float, str)):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{place}: {column!r} holds {quoted(value)}; allowed: numbers such as 12.3, and lists of them"
        ) from None
    if not math.isfinite(found):
        raise DataError(f"{place}: {column!r} holds {quoted(value)}; replace it, or leave the cell empty")
    return found


def variants_of(cell: object, column: str, place: str) -> dict[str, str]:
    """Gene -> variant of a cell that holds variants of any gene: an object, or "KRAS G12D; TP53=R175H", or a list of such.

    Args:
        cell: Not empty.
        column: Its column.
        place: Of the row; begins the error message.

    Raises:
        DataError: An element is not a gene with a variant, or a gene stands there twice.
    """
    if isinstance(cell, Mapping):
        pairs = [(str(gene).strip(), variant) for gene, variant in cell.items() if variant is not None]
        bad = next((v for g, v in pairs if not g or not isinstance(v, str) or not v.strip()), None)
        if bad is not None:
            raise DataError(f"{place}: {column!r} holds the variant {quoted(bad)}; allowed: a text such as G12D")
        return {gene: str(variant).strip() for gene, variant in pairs}
    elements = cell if isinstance(cell, list) else str(cell).split(";")
    found: dict[str, str] = {}
    for element in elements:
        if not str(element).strip():
            continue
        match = _VARIANT.fullmatch(str(element).strip()) if isinstance(element, str) else None
        if match is None:
            raise DataError(
                f"{place}: {column!r} holds {quoted(element)}; allowed: a gene and its variant, as in KRAS G12D, "
                "several of them with ';' between"
            )
        if match["gene"] in found:
            raise DataError(f"{place}: {column!r} has {match['gene']} twice: {listed(elements)}")
        found[match["gene"]] = match["variant"].strip()
    return found


ColumnNames = Mapping[str, tuple[str, ...]]  # modality -> its columns


def readings(
    row: RawRow,
    series: ColumnNames,
    variants: ColumnNames,
    render: Render,
    is_empty: Callable[[object], bool],
    place: str,
) -> dict[Modality, str]:
    """Read the numbers and variants of a row.

    Args:
        row: Column -> cell.
        series: Columns with numbers of each modality.
        variants: Columns with gene variants of each modality: one for variants of any gene, or one per gene.
        render: How they are written.
        is_empty: True for a cell without a value.
        place: Of the row; begins the error message.

    Returns:
        Modality -> text; a modality whose cells are all empty is left out.

    Raises:
        DataError: A cell cannot be read.
    """
    found: dict[Modality, str] = {}

    def has_value(cell: object) -> bool:
        return not (cell in ([], {}) or is_empty(cell))

    for modality, columns in series.items():
        cells = {column: row[column] for column in columns if has_value(row.get(column))}
        if cells:
            values = {c: samples_of(cell, c, place) for c, cell in cells.items()}
            found[modality] = render.series(values, named=columns != (modality,))  # the prompt has the modality's name
    for modality, columns in variants.items():
        cells = {column: row[column] for column in columns if has_value(row.get(column))}
        if cells and len(columns) == 1:
            found[modality] = render.variants(variants_of(cells[columns[0]], columns[0], place))
        elif cells:
            found[modality] = render.variants(
                {gene: as_text(cell, gene, place).strip() for gene, cell in cells.items()}
            )
    return found
