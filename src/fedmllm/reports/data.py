"""Rows and modalities of clients, as text, JSON, picture or files.

Opens no image.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.rows import row_fields, row_ids, row_labels
from fedmllm.core.storage import make_folder, write_atomically, writing
from fedmllm.core.types import Content, Example, Modality, Picture, Shard, Visible
from fedmllm.data.base import Dataset
from fedmllm.data.marks import MARK
from fedmllm.data.overlap import overlap
from fedmllm.data.reading import is_there, listed
from fedmllm.reports.columns import Column, fitting_tables
from fedmllm.reports.names import scenario_label
from fedmllm.scenarios.assign import assign, digest_of_ids

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

FORM = ("id", "image", "conversations", "client", "question", "choices", "answer")  # columns of an exported row
LISTED = 200  # clients that a table names


@dataclass(frozen=True)
class Federation:
    """The training rows of an experiment, the clients that hold them, and the test rows.

    Attributes:
        experiment: Its settings.
        examples: The training rows.
        skipped: One message per bad training row that was left out.
        shards: The clients' rows and masks.
        test: The test rows; () if there are none, or if they cannot be read.
        notes: Findings about the rows, such as pictures that are in training and test.
    """

    experiment: Experiment
    examples: Sequence[Example]
    skipped: tuple[str, ...]
    shards: tuple[Shard, ...]
    test: Sequence[Example] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, experiment: Experiment) -> Federation:
        rows = experiment.data.load("train")
        modalities = experiment.data.modalities()
        shards = assign(rows.examples, modalities, experiment.partition, experiment.scenario, experiment.seed)
        return cls(experiment, rows.examples, rows.skipped, shards, notes=rows.notes)

    def with_test(self) -> Federation:
        """The federation with its test rows, their overlap with the training rows, and the number of missing files."""
        data = self.experiment.data
        try:
            test = data.load("test")
        except FedmllmError as error:
            return replace(self, notes=(*self.notes, f"no test rows: {error}"))
        fields = (*row_fields(self.examples).used(), *row_fields(test.examples).used())
        paths = dict.fromkeys(path for several in fields for path in _paths(several))
        missing = [path for path in paths if not is_there(path)]
        lost = f"{len(missing)} of {len(paths)} image files are not there: {listed(missing[:5])}"
        shared = overlap(self.examples, test.examples, data.group_column())
        notes = dict.fromkeys((*self.notes, *test.notes, *test.skipped, *shared, *([lost] if missing else [])))
        return replace(self, test=test.examples, notes=tuple(notes))

    @property
    def digest(self) -> str:
        return digest_of_ids(self.shards, self._ids)

    @cached_property
    def _ids(self) -> list[Sequence[str | int]]:
        """Of each client's rows."""
        return [row_ids(self.examples, shard.rows) for shard in self.shards]

    def labels(self) -> list[Counter[str]]:
        """Per client, rows a label; an open question counts as "(open)"."""
        return [self._labels([shard]) for shard in self.shards]

    @cached_property
    def _label(self) -> list[str]:
        """Of each row."""
        return list(row_labels(self.examples))

    def _labels(self, shards: Sequence[Shard]) -> Counter[str]:
        return Counter(self._label[row] for shard in shards for row in shard.rows)

    def to_json(self) -> dict[str, Any]:
        """{"clients": [{"client", "name", "ids", one string of 0/1 per modality}], "digest"}; ids as in the file."""
        modalities = self.experiment.data.modalities()
        number = {visible: i for i, visible in enumerate({v for shard in self.shards for v in set(shard.visible)})}
        flags = {m: np.array([b"01"[m in visible] for visible in number], np.uint8) for m in modalities}
        clients = []
        for shard, ids in zip(self.shards, self._ids, strict=True):
            masks = np.fromiter(map(number.__getitem__, shard.visible), np.intp, len(shard.rows))
            about = {"client": shard.client, "name": shard.name or str(shard.client)}
            of_rows = {m: flags[m][masks].tobytes().decode() for m in modalities}
            clients.append({**about, "ids": ids, **of_rows})
        return {"clients": clients, "digest": self.digest}

    def to_tables(self, width: int) -> list[Table | Text]:
        """Per client: rows, rows per label (the most frequent ones), rows per pattern of visible modalities.

        The clients after the first LISTED share a line.

        Args:
            width: Of the console; if one table does not fit, labels and modalities have tables of their own.
        """
        from rich.text import Text

        total = self._labels(self.shards)
        named = [label for label, _ in total.most_common(8)]
        lines = [(str(shard.name or shard.client), [shard]) for shard in self.shards[:LISTED]]
        if others := self.shards[LISTED:]:
            sizes = [len(shard.rows) for shard in others]
            lines.append((f"{len(others):,} others, {min(sizes):,} to {max(sizes):,} rows each", list(others)))
        labels = [self._labels(shards) for _, shards in lines]
        visible = [Counter(mask for shard in shards for mask in shard.visible) for _, shards in lines]

        def column(heading: str, counts: Iterable[int]) -> Column:
            return Column(heading, tuple(map(str, counts)))

        of_labels = [column("rows", (sum(len(shard.rows) for shard in shards) for _, shards in lines))]
        of_labels += [column(label, (count[label] for count in labels)) for label in named]
        if len(total) > len(named):
            of_labels.append(column("other", (sum(c.values()) - sum(c[label] for label in named) for c in labels)))
        patterns = self._patterns(self.experiment.data.modalities())
        of_modalities = [column(name, (sum(c[m] for m in masks) for c in visible)) for name, masks in patterns.items()]
        first = Column("client", tuple(name for name, _ in lines))
        tables = fitting_tables(first, [of_labels, of_modalities], width)
        e = self.experiment
        tables[0].title = f"{e.data.name}: {e.partition.name} partition, {self._scenario()}"
        if len(tables) > 1:
            return [*tables, Text(self._caption())]
        tables[0].caption = self._caption()
        return [*tables]

    def _scenario(self) -> str:
        """The scenario's name; that of rows with gaps if nothing is hidden and some row lacks a modality."""
        whole = frozenset(self.experiment.data.modalities())
        gaps = any(visible != whole for shard in self.shards for visible in shard.visible)
        return scenario_label(self.experiment.scenario.name, gaps)

    def _patterns(self, modalities: tuple[Modality, ...]) -> dict[str, list[Visible]]:
        """Heading -> masks that it counts: "image+text", "image only", "none"; with many modalities, one each, all, none."""
        seen = {mask for shard in self.shards for mask in shard.visible}
        if len(modalities) > 2:
            of_modality = {m: [mask for mask in seen if m in mask] for m in modalities}
            return {**of_modality, "all": [frozenset(modalities)], "none": [frozenset()]}
        single = {f"{m} only" if len(modalities) > 1 else m: [frozenset({m})] for m in modalities}
        whole = {"+".join(modalities): [frozenset(modalities)]} if len(modalities) > 1 else {}
        return {**whole, **single, "none": [frozenset()]}

    def _caption(self) -> str:
        skipped = f", {len(self.skipped)} bad rows left out" if self.skipped else ""
        test = f", {len(self.test)} test rows" if self.test else ""
        lines = [f"{len(self.examples)} rows{skipped}{test}; digest {self.digest}"]
        for visible, metrics in self.ceilings().items():
            best = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            lines.append(f"best expected on rows with {visible.replace('all-', 'all but ')}: {best}")
        return "\n".join(lines)

    def ceilings(self) -> dict[str, dict[str, float]]:
        """Visible modalities -> metric -> the best expected value; {} if the label law is unknown.

        "all", "all-labs" (everything but the labs; with more than two modalities), and each modality alone.
        """
        data = self.experiment.data
        modalities = data.modalities()
        wanted = {"all": frozenset(modalities)}
        wanted |= {f"all-{m}": frozenset(modalities) - {m} for m in modalities if len(modalities) > 2}
        wanted |= {m: frozenset({m}) for m in modalities if len(modalities) > 1}
        return {name: dict(found) for name, visible in wanted.items() if (found := data.ceilings(visible))}


def _paths(fields: Mapping[Modality, Content]) -> list[Path]:
    return [path for content in fields.values() if isinstance(content, tuple) for path in content]


def plot(federation: Federation, path: Path) -> None:
    """Label skew (rows a client and label) above, who sees what (share of rows a client and modality) below."""
    import matplotlib
    from matplotlib.figure import Figure

    counts, modalities = federation.labels(), federation.experiment.data.modalities()
    clients = [shard.client for shard in federation.shards]
    figure = Figure(figsize=(max(6.4, 0.5 * len(clients) + 3), 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 0.5 + 0.35 * len(modalities)), sharex=True)
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    total = sum(counts, Counter())
    heights = [0] * len(clients)
    for index, (label, _) in enumerate(total.most_common()):
        rows = [count[label] for count in counts]
        name = {"label": label} if index < 12 else {}
        top.bar(clients, rows, bottom=heights, color=colours[index % len(colours)], **name)
        heights = [height + n for height, n in zip(heights, rows, strict=True)]
    for client, height in zip(clients, heights, strict=True):
        top.text(client, height, str(height), ha="center", va="bottom", fontsize=7)
    top.set_ylabel("rows")
    e = federation.experiment
    top.set_title(
        f"{e.data.name}: {e.partition.name} partition, {federation._scenario()}; digest {federation.digest}", fontsize=9
    )
    top.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    share = [
        [sum(m in v for v in s.visible) / len(s.rows) if s.rows else float("nan") for s in federation.shards]
        for m in modalities
    ]
    bottom.imshow(share, vmin=0, vmax=1, cmap="Greens", aspect="auto")
    for y, row in enumerate(share):
        for x, value in enumerate(row):
            text = f"{value:.0%}" if value == value else "-"
            bottom.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black")
    bottom.set_yticks(range(len(modalities)), modalities)
    names = [(shard.name or str(shard.client))[:12] for shard in federation.shards]
    bottom.set_xticks(range(len(clients)), names, rotation=40 if max(map(len, names)) > 3 else 0)
    bottom.set_xlabel("client (boxes: share of its rows that show the modality)")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise FedmllmError(f"{path}: cannot be drawn: {reason or error}") from None


def export(federation: Federation, folder: Path) -> list[Path]:
    """Write client_K.json for each client, in the conversation form, and data.toml, which reads the folder back in.

    A row is {id, image, conversations: [{role, content}]} with "<image>" where a picture goes, as the experiment's prompt
    puts it. Hidden modalities are not written. A row also holds the parts that the conversation was made of.
    """
    with writing(folder):
        make_folder(folder)
    if old := sorted(folder.glob("client_*.json")):
        raise FedmllmError(f"{old[0]} exists; choose an empty folder")
    columns, files = columns_of(federation), []
    reading_back = _reading_back(federation, folder, columns)  # before anything is written: it may refuse a path
    for shard in federation.shards:
        rows = [
            exported(federation.experiment, federation.examples[row], visible, shard.client, columns)
            for row, visible in zip(shard.rows, shard.visible, strict=True)
        ]
        path = folder / f"client_{shard.client}.json"
        write_atomically(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        files.append(path)
    toml = folder / "data.toml"
    write_atomically(toml, reading_back)
    return [*files, toml]


def columns_of(federation: Federation) -> dict[Modality, str]:
    """Modality -> the column of an exported row that holds it: its own name, unless the form needs that one.

    `image` holds all pictures of a row, so it is a modality's column only where no other modality has pictures.
    """
    pictures, taken = _pictures(federation), {*FORM, "file"}  # "file" means the name of the file
    columns: dict[Modality, str] = {}
    for modality in federation.experiment.data.modalities():
        column = modality
        while column in taken and pictures != [column]:
            column += "_"
        columns[modality] = column
        taken.add(column)
    return columns


def _pictures(federation: Federation) -> list[Modality]:
    """The modalities that no row has as a text."""
    texts = {m for example in federation.examples for m, content in example.fields.items() if isinstance(content, str)}
    return [m for m in federation.experiment.data.modalities() if m not in texts]


def exported(
    experiment: Experiment, example: Example, visible: Visible, client: int, columns: dict[Modality, str]
) -> dict[str, Any]:
    """One row in the conversation form. `image` is a path, a list of paths, or null."""
    conversation = experiment.prompt.render(example, visible)
    images = [str(part.path.absolute()) for part in conversation.pictures]
    content = ""
    for part in conversation.parts:
        if isinstance(part, Picture):
            content += MARK if example.pieces else f"{MARK}\n"
        else:
            content += part.removeprefix("\n") if content.endswith("\n") else part
    fields = example.visible_fields(visible)
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": experiment.prompt.target(example)},
    ]
    image = images[0] if len(images) == 1 else images or None
    question = MARK.join(example.pieces) if example.pieces and images else example.question
    form = (example.id, image, turns, client, question, list(example.choices), example.answer)
    own = {column: written(fields.get(modality)) for modality, column in columns.items() if column != "image"}
    return {**dict(zip(FORM, form, strict=True)), **own}


def written(content: Content | None) -> str | list[str] | None:
    """A text, the absolute paths of pictures, or null where the modality is hidden."""
    return [str(path.absolute()) for path in content] if isinstance(content, tuple) else content


def _reading_back(federation: Federation, folder: Path, columns: dict[Modality, str]) -> str:
    folders = {
        str(path.absolute().parent)
        for example in federation.examples
        for content in example.fields.values()
        if isinstance(content, tuple)
        for path in content
    }
    pictures = _pictures(federation)
    mapped = {
        "image": {m: column for m, column in columns.items() if m in pictures},
        "text": {m: column for m, column in columns.items() if m not in pictures},
    }
    tables = ['id = "id"', 'client = "client"']
    tables += [f"{key} = {_toml_table(table)}" for key, table in mapped.items() if table]
    announced = {m for example in federation.examples for m in example.announced}
    if names := [_toml(m) for m in mapped["text"] if m in announced]:
        tables.append(f"announced = [{', '.join(names)}]")
    images = f"images = {_toml(os.path.commonpath(folders))}\n" if folders else ""
    return (
        f"# {federation.experiment.data.name}, as `fedmllm data export` wrote it; digest {federation.digest}\n"
        f'[data]\nname = "table"\nroot = {_toml(str(folder.absolute()))}\ntrain = "client_*.json"\n{images}'
        f"columns = {{ {', '.join(tables)} }}\n\n"
        f'[partition]\nname = "by-column"\ncolumn = "client"\nnum_clients = {len(federation.shards)}\n'
    )


def _toml_table(table: dict[str, str]) -> str:
    return "{ " + ", ".join(f"{_toml(key)} = {_toml(value)}" for key, value in table.items()) + " }"


def _toml(text: str) -> str:
    """A TOML string: as JSON's, but without pairs of escapes, which TOML does not know, and with DEL escaped."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FedmllmError(f"{text!a}: a path that is not UTF-8 cannot be written into data.toml") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def where_to_get(name: str) -> str:
    """Return the source of a data set, its terms, and the files that are expected."""
    if name not in Dataset.members:
        raise ConfigError(f"no data set is called {name!r}; there are: {', '.join(sorted(Dataset.members))}")
    member = Dataset.members[name]
    source = member.source if issubclass(member, Dataset) else None
    if source is None:
        return f"{name} is embedded: it is drawn at first use, there is nothing to get."
    paper = f"Paper:    {source.paper}\n" if source.paper else ""
    tree = textwrap.indent(textwrap.dedent(source.tree), "  ")
    use = "" if "[data]" in tree else f'\nIn an experiment:\n  [data]\n  name = "{name}"\n  root = "the folder"\n'
    return (
        f"{source.title}\nGet it:   {source.get}\nLicence:  {source.licence}\n{paper}"
        f"Expected files under data.root:\n{tree}\n{use}\n"
        "Nothing is downloaded by fedmllm."
    )
