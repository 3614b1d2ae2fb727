"""Baselines without a language model, on the rows of an experiment.

    python benchmarks/cheap_baselines.py FILE.toml [--set data.seed=1]
    python benchmarks/cheap_baselines.py SUITE.toml --suite > results/verdict-baselines.md

The most frequent training answer, and that to each question text (methods "majority" and "question-prior" of the package). If
all questions have the same choices, also logistic regression on the bag of words of the text, on statistics of the picture, and
on both. Trained on all clients' rows, each as far as it is visible. Of a suite, the first cell of each data set is used.
With --suite: the regressions in every setting and seed of a suite, on the rows and masks of its cells, for each visibility of
the test rows, with the share of the ceiling.
"""

from __future__ import annotations

import argparse
import statistics as stats
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from machine import describe
from PIL import Image
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from fedmllm import Experiment
from fedmllm.core.metrics import METRICS
from fedmllm.core.types import Example, Prediction, Visible, visible_of
from fedmllm.federation.baselines import majority_predictions, question_prior_predictions
from fedmllm.runs.suites.suite import Suite, experiments_by_data
from fedmllm.scenarios.assign import assign

Row = tuple[Example, Visible]
SIDE = 8  # pixels of the reduced picture


def words(train: Sequence[Row], test: Sequence[Row]) -> tuple[csr_matrix, csr_matrix]:
    """Counts of words and pairs of words; a hidden text counts nothing."""
    texts = [[str(e.fields.get("text", "")) if "text" in v else "" for e, v in rows] for rows in (train, test)]
    counter = CountVectorizer(ngram_range=(1, 2), binary=True).fit(texts[0])
    return counter.transform(texts[0]), counter.transform(texts[1])


def pictures(train: Sequence[Row], test: Sequence[Row]) -> tuple[csr_matrix, csr_matrix]:
    """Mean and deviation of each channel, and the picture at 8 x 8 pixels; zeros for a hidden picture."""
    return csr_matrix(np.stack([statistics(row) for row in train])), csr_matrix(np.stack([statistics(r) for r in test]))


def statistics(row: Row) -> np.ndarray:
    example, visible = row
    if "image" not in visible:
        return np.zeros(6 + 3 * SIDE * SIDE)
    return of_picture(example.fields["image"][0])


@cache
def of_picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=float) / 255 - 0.5
        small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=float) / 255 - 0.5
    return np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1)), small.ravel()])


def both(train: Sequence[Row], test: Sequence[Row]) -> tuple[csr_matrix, csr_matrix]:
    """Words and pictures side by side."""
    first, second = words(train, test), pictures(train, test)
    return hstack([first[0], second[0]]).tocsr(), hstack([first[1], second[1]]).tocsr()


FEATURES: dict[str, Callable[[Sequence[Row], Sequence[Row]], tuple[csr_matrix, csr_matrix]]] = {
    "bag of words": words,
    "picture statistics": pictures,
    "both": both,
}


def regression(name: str, train: Sequence[Row], test: Sequence[Row]) -> list[Prediction]:
    """Predictions of a logistic regression."""
    first, second = FEATURES[name](train, test)
    model = LogisticRegression(max_iter=2000, C=0.3).fit(first, [example.answer for example, _ in train])
    logs = dict(zip(model.classes_, model.predict_log_proba(second).T, strict=True))
    floor = np.full(len(test), -50.0)  # a choice that never occurs in training
    columns = [[logs.get(choice, floor)[i] for choice in example.choices] for i, (example, _) in enumerate(test)]
    return [Prediction(example, tuple(scores), None) for (example, _), scores in zip(test, columns, strict=True)]


def rows_of(e: Experiment) -> tuple[list[Row], list[Example]]:
    """(training rows of all clients with what is visible of each, test rows)."""
    examples, modalities = e.data.load("train").examples, e.data.modalities()
    shards = assign(examples, modalities, e.partition, e.scenario, e.seed)
    train = [(examples[i], v) for s in shards for i, v in zip(s.rows, s.visible, strict=True)]
    return train, list(e.data.load("test").examples[: e.evaluate.limit or None])


def of_experiment(e: Experiment) -> None:
    """Print every baseline of one experiment, on complete test rows."""
    train, rows = rows_of(e)
    test = [(row, frozenset(e.data.modalities())) for row in rows]
    closed = len({row.choices for row, _ in (*train, *test)}) == 1 and bool(rows[0].choices)
    found = {"most frequent answer": majority_predictions([row for row, _ in train], rows)}
    found["answer per question text"] = question_prior_predictions([row for row, _ in train], rows)
    if closed:
        found |= {name: regression(name, train, test) for name in FEATURES}
    print("| baseline | " + " | ".join(e.data.metrics()) + " |\n|---|" + "---:|" * len(e.data.metrics()))
    for name, predictions in found.items():
        values = (f"{v:.3f}" if (v := METRICS[m](predictions)) is not None else "-" for m in e.data.metrics())
        print(f"| {name} | " + " | ".join(values) + " |")


def of_suite(suite: Suite) -> None:
    """Print the regressions in every setting of a suite: mean and standard deviation over its seeds."""
    metric = suite.cells[0].experiment.data.metrics()[0]
    cells = {(c.labels["settings"], c.labels["seeds"]): c.experiment for c in reversed(suite.cells)}
    found: defaultdict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    ceilings: dict[str, float] = {}
    for (setting, _), e in reversed(cells.items()):
        train, rows = rows_of(e)
        seen = {visible: visible_of(visible, e.data.modalities()) for visible in e.evaluate.visible}
        ceilings |= {visible: e.data.ceilings(mask)[metric] for visible, mask in seen.items()}
        for name in FEATURES:
            made = regression(name, train, [(row, mask) for mask in seen.values() for row in rows])
            parts = [made[start : start + len(rows)] for start in range(0, len(made), len(rows))]
            own = {visible: METRICS[metric](part) or 0.0 for visible, part in zip(seen, parts, strict=True)}
            found[setting, name].append(own)
    seeds = len({seed for _, seed in cells})
    print(f"# {suite.title}: baselines without a language model\n\nMachine: {describe()}.\n")
    print(f"{metric}, mean ± standard deviation over {seeds} seeds; in brackets the share of the ceiling.\n")
    print("| setting | baseline | " + " | ".join(ceilings) + " |\n|---|---|" + "---:|" * len(ceilings))
    for (setting, name), several in found.items():
        words = []
        for visible, ceiling in ceilings.items():
            values = [own[visible] for own in several]
            mean, std = stats.fmean(values), stats.stdev(values) if len(values) > 1 else 0.0
            words.append(f"{mean:.3f} ± {std:.3f} ({(mean - 0.5) / (ceiling - 0.5):.2f})")
        print(f"| {setting} | {name} | " + " | ".join(words) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="an experiment or a suite")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--suite", action="store_true")
    arguments = parser.parse_args()
    if arguments.suite:
        of_suite(Suite.load(arguments.file))
    else:
        for label, experiment in experiments_by_data(arguments.file, arguments.set).items():
            if label:
                print(f"Rows of the cell {label}.\n")
            of_experiment(experiment)


if __name__ == "__main__":
    main()
