"""Numbers as text: percent, points, intervals, p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmllm.reports.names import METRIC_LABELS

NO_BREAK, MINUS, DASH = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}", "\N{EN DASH}"
COUNTS = frozenset({"unparsed", "ungraded"})  # metrics that count rows; fewer are better


@dataclass(frozen=True)
class Scale:
    """Printed form and range of the values of a metric."""

    factor: float = 100.0
    unit: str = "%"
    points: str = "points"  # unit of a difference
    low: float = 0.0
    high: float = 1.0
    higher_is_better: bool = True

    def clip(self, value: float) -> float:
        """The value, moved to the nearest end of the metric's range if it is outside."""
        return min(max(value, self.low), self.high)

    def number(self, value: float) -> str:
        """ "75.8", without its unit."""
        return signed(value * self.factor).removeprefix("+")

    def value(self, value: float) -> str:
        """ "75.8 %"."""
        return f"{self.number(value)}{NO_BREAK}{self.unit}".rstrip(NO_BREAK)

    def spread(self, mean: float, std: float | None) -> str:
        """ "75.8 ± 6.2", without its unit."""
        return self.number(mean) + ("" if std is None else f"{NO_BREAK}±{NO_BREAK}{std * self.factor:.1f}")

    def difference(self, value: float) -> str:
        """ "-15.4 points", with a real minus sign."""
        return f"{signed(value * self.factor)}{NO_BREAK}{self.points}".rstrip(NO_BREAK)

    def interval(self, low: float, high: float) -> str:
        """ "-24.8 to -6.0", without its unit."""
        return f"{signed(low * self.factor)} to {signed(high * self.factor)}"


def scale_of(metric: str, values: Sequence[float]) -> Scale:
    """Percent for shares; plain numbers for counts and for metrics with values outside 0..1."""
    if metric in COUNTS:
        return Scale(1.0, "rows", "rows", 0.0, math.inf, higher_is_better=False)
    if metric not in METRIC_LABELS and any(not 0 <= value <= 1 for value in values):
        return Scale(1.0, "", "", -math.inf, math.inf)
    return Scale()


def signed(value: float, digits: int = 1) -> str:
    """ "+0.5" or "-0.5" with a real minus sign; "0.0" has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", MINUS)


def p_text(p: float | None) -> str:
    """0.0312 -> "0.031"; tiny ones as "< 0.001"; none as a dash."""
    if p is None:
        return DASH
    return f"<{NO_BREAK}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def counted(number: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{number:,}{NO_BREAK}{noun}{'' if number == 1 else 's'}"


def counted_range(ends: tuple[int, int], noun: str) -> str:
    """ "3 seeds", "2 to 3 seeds"."""
    low, high = ends
    return counted(high, noun) if low == high else f"{low:,} to {counted(high, noun)}"


def listed_words(words: Sequence[str]) -> str:
    """ "a, b and c"; semicolons between words with commas of their own."""
    comma = "; " if any("," in word for word in words) else ", "
    return " and ".join(filter(None, [comma.join(words[:-1]), *words[-1:]]))
