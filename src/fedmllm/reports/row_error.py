"""Error that the choice of test rows alone gives a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedmllm.reports.numerals import NO_BREAK, Scale, counted
from fedmllm.reports.reading import DatasetResults
from fedmllm.reports.rows import RowResults
from fedmllm.reports.tables import ResultTable

OF_TRAINING = {
    "num_train",
    "num_validation",
    "validation_rate",
}  # settings of the data that leave the test rows as they are
NORMAL_95 = 1.96  # half of a 95 % interval, in standard errors


@dataclass(frozen=True)
class RowError:
    """Standard errors of a federated method's result from drawing the test rows, training apart."""

    one_set: float  # of a result on one test set
    num_sets: int  # distinct test sets of the federated runs
    num_seeds: int  # of the federated runs
    num_rows: int  # of a test set
    source: str  # how it was computed

    @property
    def mean(self) -> float:
        """Standard error of a mean over all test sets, which are drawn independently."""
        return float(self.one_set / self.num_sets**0.5)

    def interval_text(self, scale: Scale) -> str:
        """Return the sentence of the first screen, with 95 % intervals."""
        one, mean = (f"±{NO_BREAK}{_amount(scale, NORMAL_95 * error)}" for error in (self.one_set, self.mean))
        rest = f" in a run, {mean} in the mean over {counted(self.num_sets, 'test set')}" if self.num_sets > 1 else ""
        shared = " that all seeds share" if self.num_seeds > 1 and self.num_sets == 1 else ""
        rows = f"the {counted(self.num_rows, 'test row')}{shared} alone leave {one}{rest}"
        return f"{rows}, and usually less in a difference on the same rows"

    def error_text(self, scale: Scale) -> str:
        """Return the line below the result table, with standard errors."""
        size, mean = _amount(scale, self.one_set), _amount(scale, self.mean)
        if self.num_sets > 1:
            size += f" in a run and {mean} in a mean over the {counted(self.num_sets, 'test set')}"
            size += "; the standard deviation over seeds includes it"
        elif self.num_seeds > 1:
            size += "; the seeds share the rows, so their standard deviation does not include it"
        return f"Standard error that the test rows alone give to a federated method: {size} ({self.source})."


def row_error(dataset: DatasetResults, table: ResultTable, rows: Sequence[RowResults] = ()) -> RowError | None:
    """Error from the kept predictions, by the bootstrap of `rows`; without them by formula.

    The formulas are those near the mean of the federated methods in the table. AUC: Hanley and McNeil (Radiology 143, 1982),
    with as many rows of either class. Accuracy: binomial.

    Args:
        dataset: The runs.
        table: Their results in one metric.
        rows: Results by test row.

    Returns:
        None for any other metric without predictions, for a mean at an end of the range, or if runs differ in the number of
        test rows.
    """
    means = [c.spread.mean for row in table.rows for m, c in row.cells.items() if m in dataset.candidates]
    if not dataset.num_test or not means:
        return None
    num_sets, num_seeds, n = (
        num_test_sets(dataset),
        len({r.seed for r in dataset.runs if r.federated}),
        dataset.num_test,
    )
    cells = [r.whole.cells[m] for r in rows if r.metric == table.metric for m in r.federated]
    halves = [(c.high - c.low) / 2 for c in cells if c.low is not None and c.high is not None]
    if halves:
        error = (sum(half**2 for half in halves) / len(halves)) ** 0.5 / NORMAL_95
        return RowError(error, num_sets, num_seeds, n, "bootstrap over rows")
    mean = table.scale.clip(sum(means) / len(means))
    if table.metric == "auc":
        q1, q2, half = mean / (2 - mean), 2 * mean**2 / (1 + mean), n / 2
        variance = (mean * (1 - mean) + (half - 1) * (q1 + q2 - 2 * mean**2)) / half**2
        source = "Hanley and McNeil's formula for two classes of one size"
    elif table.metric == "accuracy":
        variance, source = mean * (1 - mean) / n, "binomial"
    else:
        return None
    return RowError(variance**0.5, num_sets, num_seeds, n, source) if variance > 0 else None


def num_test_sets(dataset: DatasetResults) -> int:
    """Return the number of distinct test sets of the federated runs.

    The digest of a record covers training rows too. Equal settings of the test rows give equal test rows, so the number is at
    most that of the settings.
    """
    runs = [run for run in dataset.runs if run.federated]
    tables = [{k: v for k, v in run.settings["data"].items() if k not in OF_TRAINING} for run in runs]
    settings = {json.dumps(table, sort_keys=True, default=str) for table in tables}
    digests = {run.draw.rows for run in runs}
    return max(1, len(settings) if "" in digests else min(len(settings), len(digests)))


def _amount(scale: Scale, error: float) -> str:
    return scale.difference(error).lstrip("+")
