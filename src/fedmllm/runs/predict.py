"""Predictions for new rows, with the adapter of a run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError, FedmllmError
from fedmllm.core.storage import check_writable, write_atomically, writing
from fedmllm.core.types import Example, Prediction, Visible, visible_of
from fedmllm.data.imagefolder import is_bare
from fedmllm.data.table import Table, by_modality
from fedmllm.federation.evaluation import predict as predict_rows
from fedmllm.runs.checkpoint import read_adapter
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.inputs import completer_of
from fedmllm.runs.predictions import choice_probabilities
from fedmllm.runs.record import read

CHUNK = 256  # rows between two reports of progress
FORMATS = (".jsonl", ".csv", ".parquet")


def predict(
    source: str | Path,
    rows: str | Path,
    out: str | Path | None = None,
    experiment: Experiment | None = None,
    visible: str = "all",
    columns: Mapping[str, Any] | None = None,
    client: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Predict the answers of rows, which need none of their own.

    Args:
        source: The folder of a finished run, or a PEFT adapter folder together with `experiment`.
        rows: A file or folder in any form that the data set `table` reads.
        out: A file to write: .jsonl, .csv or .parquet.
        experiment: Model, prompt and columns; by default those of the run.
        visible: Modalities that the model receives of those that a row has: "all", "none", or names joined by "+".
        columns: Keys of `data.columns` that differ from those of the experiment, such as {"image": "scan"}.
        client: Whose adapter to take, for a run of method "local": a number, or the name of a site.
        progress: Called with (rows done, rows in all).
        notice: Called with each finding about the files, such as one that was left out, and with what was wrong with each row
            that `data.on_bad_row = "skip"` has left out.

    Returns:
        One dictionary per row in the order of the file: id, answer, visible; for closed questions `p`, choice ->
        probability; for open ones `text`, the generation. An answer that could not be parsed is None.

    Raises:
        ConfigError: The columns are not there, or no experiment describes the adapter.
        DataError: A row cannot be used.
        FedmllmError: The run has no adapter, the adapter does not fit the model, or `out` cannot be written.
    """
    target = None if out is None else Path(out)
    if target and target.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out: got {target.name!r}; allowed endings: {', '.join(FORMATS)}")
    if target:
        check_writable(target)
    place, settings = adapter_of(Path(source), experiment, client)
    if place:
        settings.backbone.check_adapter(place)
    if not Path(rows).exists():
        raise DataError(f"{rows}: no such file or folder")
    found = table_of(settings, Path(rows), columns or {}).load("test")
    if notice:
        for text in (*found.notes, *found.skipped):
            notice(text)
    examples = found.examples
    kept = visible_of(visible, settings.data.modalities())
    backbone = settings.backbone.load(settings.seed)
    if place:
        backbone.set_lora(read_adapter(place, backbone.lora()))
    public = settings.public.load(settings.data) if settings.public.rows and settings.completion.at_test() else ()
    completer = completer_of(settings, backbone, public) if settings.completion.at_test() else None
    # Rows of about one length share a batch; the chunks keep that and let the progress be seen.
    order = sorted(range(len(examples)), key=lambda i: (len(settings.prompt.render(examples[i], kept).text), i))
    made: dict[int, Prediction] = {}
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        if completer:
            completer.warm([(examples[i], kept) for i in chunk], training=False)
        answered = predict_rows(
            backbone, settings.prompt, [examples[i] for i in chunk], kept, settings.evaluate, completer
        )
        made |= dict(zip(chunk, answered, strict=True))
        if progress:
            progress(len(made), len(order))
    result = [as_row(made[i], kept) for i in range(len(examples))]
    if target:
        write_rows(result, target)
    return result


def adapter_of(source: Path, experiment: Experiment | None, client: int | str | None) -> tuple[Path | None, Experiment]:
    """Return the adapter's folder and the experiment that describes model and prompt; None = the model as it is."""
    run = RunFolder(source)
    if not run.record.is_file():
        if not (source / "adapter_model.safetensors").is_file():
            raise FedmllmError(f"{source}: neither the folder of a run nor a PEFT adapter folder")
        if not experiment:
            raise ConfigError(f"{source}: an adapter does not name its model; give --experiment FILE.toml")
        return source, experiment
    head = next(read(run.record), {})
    if head.get("event") != "experiment":
        raise FedmllmError(f"{run.record}: no settings in its first line")
    settings = experiment or Experiment.parse(head["settings"], str(run.record))
    if settings.method == "zero-shot":
        return None, settings
    names = {about["name"]: about["client"] for about in head.get("clients", ())}
    number = names.get(client, client) if isinstance(client, str) else client
    place = run.adapter(number)
    if not place.is_dir():
        there = run.client_adapters()
        known = ", ".join([name for name, number in names.items() if number in there] or map(str, there))
        advice = f"--client is one of: {known}" if known else "the run is not finished, or its method trains no adapter"
        raise FedmllmError(f"{place}: no such adapter; {advice}")
    return place, settings


def table_of(experiment: Experiment, rows: Path, changed: Mapping[str, Any]) -> Table:
    """Return the rows of a file as a table, with the columns of the experiment where its data is a table, too.

    Otherwise the columns have the names of the modalities, and `question` and `choices`. A folder of pictures without metadata
    has a row per picture.

    Raises:
        ConfigError: The rows are a folder of pictures, and the experiment does not read one picture a row.
    """
    own, rows = experiment.data, rows.absolute()
    if isinstance(own, Table):
        table = own.dump()
        columns = {**table.get("columns", {}), "client": "", "keep": ()}
    else:
        table = {"name": "table", **own.table_settings()}
        columns = table["columns"]
    columns = {**columns, "answer": "", **changed}
    if is_bare(rows):  # its files have a name and nothing else
        pictures = own.image_columns() if isinstance(own, Table) else by_modality(columns.get("image", ""), "image")
        if len(pictures) != 1:
            reads = f"the pictures {', '.join(pictures)}" if pictures else "no pictures"
            raise ConfigError(
                f"{rows}: a folder of pictures, one a row, and the experiment reads {reads}; allowed: a table of rows, or a "
                "folder with metadata.csv or metadata.jsonl"
            )
        image = dict.fromkeys(pictures, "file_name")
        columns = {"answer": "", "image": image, **changed}
        table = {key: value for key, value in table.items() if key != "images"} | {"form": "imagefolder"}
        if isinstance(own, Table) and not own.choices:
            table["choices"] = own.folder_labels()
    folder = rows.parent
    images_at = {"images": str(table["images"])} if table.get("images") else {}
    place = {"root": str(folder), "train": rows.name, "test": rows.name, "validation": "", **images_at}
    dropped = ("test_rate", "test_column", "group", "validation_rate")
    kept = {key: value for key, value in table.items() if key not in dropped}
    made = Table.pick({**kept, **place, "columns": columns}, "predict")
    assert isinstance(made, Table)
    return made


def as_row(prediction: Prediction, visible: Visible) -> dict[str, Any]:
    """Return a prediction as a row of the output."""
    example: Example = prediction.example
    row: dict[str, Any] = {"id": example.id}
    if prediction.scores:
        best = prediction.scores.index(max(prediction.scores))
        row |= {"answer": example.choices[best]}
        row |= {"p": dict(zip(example.choices, choice_probabilities(prediction), strict=True))}
    else:
        row |= {"answer": prediction.text, "text": prediction.raw}
    return row | {"visible": [name for name in example.fields if name in visible]}


def write_rows(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write predictions as JSON lines, CSV or Parquet, by the ending; whole or not at all.

    In CSV and Parquet `p` and `visible` are JSON texts, so that the columns do not depend on the rows.
    """
    if out.suffix.lower() == ".jsonl":
        write_atomically(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    flat = [{name: cell_of(row.get(name)) for name in ("id", "answer", "p", "text", "visible")} for row in rows]
    if out.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["id", "answer", "p", "text", "visible"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        write_atomically(out, text.getvalue())
        return
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FedmllmError(f"{out}: Parquet needs pyarrow; pip install pyarrow, or name a .jsonl file") from None
    partial = out.with_name(f".{out.name}.partial")
    with writing(out):
        texts = [{**row, "id": str(row["id"])} for row in flat]
        parquet.write_table(pyarrow.Table.from_pylist(texts), partial)
        partial.replace(out)


def cell_of(value: Any) -> Any:
    """Return a value as a cell: lists and tables as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
