"""Inputs from outside, and what is done with them. Only FedmllmError may come out.

A target is bytes in, nothing out, so that whatever breaks it is a file of the corpus (tests/corpus/TARGET/).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_inputs import (
    EXPERIMENT,
    FILES,
    LIKE,
    ROWS,
    Inputs,
    answer_pairs,
    answers,
    as_json,
    books,
    checkpoint_files,
    conversations,
    experiment_line,
    folder_trees,
    headers,
    mutated,
    picture_modes,
    picture_values,
    pictures,
    resealed,
    settings_tables,
    summaries,
    tables,
)
from hypothesis import strategies as st
from PIL import Image

from fedmllm.algorithms.server_optimizers import FedAdam
from fedmllm.config.experiment import Experiment, set_key
from fedmllm.config.train import UpdateFilter
from fedmllm.core.answers import same_answer, word_f1
from fedmllm.core.errors import DataError, FedmllmError
from fedmllm.core.images import open_image
from fedmllm.core.types import ClientUpdate
from fedmllm.data.hateful_memes import HatefulMemes
from fedmllm.data.imagefolder import contents_of
from fedmllm.data.prompts import Plain
from fedmllm.data.table import Columns, Table
from fedmllm.federation.rounds import Progress, federate
from fedmllm.flower.server.experiment import over_sites
from fedmllm.reports.comparisons import all_pairs
from fedmllm.reports.reading import read_results
from fedmllm.reports.write import markdown
from fedmllm.runs import checkpoint, record
from fedmllm.runs.costs import Totals
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.resume import Resume


@dataclass(frozen=True)
class Target:
    """A way in. `check` raises nothing but FedmllmError; the folder is empty and its own."""

    name: str
    share: float  # of the inputs
    inputs: Inputs
    check: Callable[[bytes, Path], None]


def check_experiment_file(content: bytes, folder: Path) -> None:
    (folder / "x.toml").write_bytes(content)
    _use(Experiment.load(folder / "x.toml"))


def check_experiment_table(content: bytes, folder: Path) -> None:
    _use(Experiment.parse(json.loads(content), "x"))


def check_override(content: bytes, folder: Path) -> None:
    table = {"data": "synthetic-irony", "aggregator": "fedadam"}
    set_key(table, content.decode("utf-8", "replace"))
    _use(Experiment.parse(table))


def _use(experiment: Experiment) -> None:
    experiment.run_id(), experiment.setting(), experiment.method_name(), experiment.data.modalities()
    assert Experiment.parse(experiment.model_dump(mode="json")) == experiment


def check_rows(ending: str) -> Callable[[bytes, Path], None]:
    def check(content: bytes, folder: Path) -> None:
        (folder / f"rows.{ending}").write_bytes(content)
        Image.new("RGB", (4, 4)).save(folder / "a.png")
        columns = Columns(image="image", text="text")
        for policy in ("skip", "fail"):  # "fail" last: it is the one that raises
            Table(root=folder, train=f"rows.{ending}", columns=columns, on_bad_row=policy).load("train")

    return check


def check_published(content: bytes, folder: Path) -> None:
    (folder / "img").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "img" / "a.png")
    (folder / "train.jsonl").write_bytes(content)
    HatefulMemes(root=folder).load("train")


def check_picture(content: bytes, folder: Path) -> None:
    (folder / "a").write_bytes(content)
    open_image(folder / "a", "rows.csv:2")


def check_conversations(content: bytes, folder: Path) -> None:
    """Every conversation gives rows, or a message that names its place."""
    (folder / "rows.json").write_bytes(content)
    rows = Table(root=folder, train="rows.json", na_values=(), on_bad_row="skip").load("train")
    places = " ".join([*(f"{e.where} " for e in rows.examples), *(f"{message} " for message in rows.skipped)])
    for index in range(len(json.loads(content))):
        assert f"[{index}]" in places, f"row {index} was dropped"
    for example in rows.examples:
        number = sum(len(content) for content in example.fields.values() if isinstance(content, tuple))
        assert not example.pieces or len(example.pieces) == number + 1
        Plain().render(example, frozenset({"image"}))


def check_folder_tree(content: bytes, folder: Path) -> None:
    """Every file of an image folder is a row, or it is counted and named."""
    top, tree = folder / "train", json.loads(content)
    for name, text in tree.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    contents = contents_of(top)
    found = [*contents.images, *contents.metadata, *contents.hidden, *contents.others]
    assert sorted(path.as_posix() for path in found) == sorted(tree)
    rows = Table(root=folder, train="train", question="?", on_bad_row="skip").load("train")
    counted = len(contents.images) - len(rows.examples) - len(rows.skipped)
    unlisted = [note for note in rows.notes if "in no metadata file" in note]
    assert counted == sum(int(note.split(": ")[1].split()[0]) for note in unlisted)
    left_out = sum(int(note.split(": ")[1].split()[0]) for note in rows.notes if "left out" in note)
    assert left_out == len(contents.hidden) + len(contents.others)
    if not contents.metadata:
        for example in rows.examples:
            assert example.answer == unicodedata.normalize("NFC", str(example.id).split("/")[0])


def check_picture_mode(content: bytes, folder: Path) -> None:
    """8-bit RGB of the right size, turned upright; pixels of a lossless RGB or grey picture are kept."""
    table = json.loads(content)
    (width, height), mode, form = table["size"], table["mode"], table["form"]
    values = np.random.default_rng(table["seed"]).integers(0, 256, (height, width, 4), np.uint8)
    image = Image.fromarray(values).convert("RGB")
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(values[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    elif mode != "RGB":
        image = (Image.fromarray(values) if mode in ("RGBA", "LA") else image).convert(mode)
    exif = Image.Exif()
    exif[274] = table["orientation"]
    more = {"transparency": 0} if table["transparent"] and mode in ("L", "P") and form == "PNG" else {}
    try:
        image.save(folder / "a", form, exif=exif, **more)
    except (OSError, ValueError, KeyError, SystemError) as error:
        raise DataError(f"{form} does not hold {mode}: {error}") from None
    with (folder / "a").open("rb") as file, Image.open(file) as raw:
        turn, kept_mode = raw.getexif().get(274, 1), raw.mode
    read = open_image(folder / "a", "rows.csv:2")
    assert read.mode == "RGB"
    assert read.size == ((height, width) if turn in (5, 6, 7, 8) else (width, height))
    if form in ("PNG", "TIFF", "BMP", "PPM", "TGA") and mode in ("RGB", "L") and kept_mode == mode and not more:
        before = np.asarray(image.convert("RGB"))
        turns = {2: before[:, ::-1], 3: before[::-1, ::-1], 4: before[::-1], 5: before.swapaxes(0, 1),
                 6: np.rot90(before, -1), 7: before[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(before)}  # fmt: skip
        assert (np.asarray(read) == turns.get(turn, before)).all()


def check_answer_pair(content: bytes, folder: Path) -> None:
    """Equal answers count as equal in both orders and have an F1 of 1; others do not."""
    table = json.loads(content)
    one, two = table["one"], table["two"]
    assert same_answer(one, two) == same_answer(two, one) == table["same"]
    assert same_answer(two, two)
    assert (word_f1(one, two) == word_f1(two, one) == 1.0) == table["same"]
    assert 0 <= word_f1(one, two) <= 1


def check_settings(content: bytes, folder: Path) -> None:
    """Settings that are written out and read back mean the same: alone, in a suite's process, and over real sites."""
    one = Experiment.parse(json.loads(content))
    for two in (Experiment.parse(one.dump()), Experiment.parse(json.loads(json.dumps(one.model_dump(mode="json"))))):
        assert two == one
        assert _at_sites(two) == _at_sites(one)
        assert (two.identity(), two.run_id(), two.method_name(), two.setting()) == (
            one.identity(), one.run_id(), one.method_name(), one.setting(),
        )  # fmt: skip
        assert two.dump().keys() >= one.dump().keys()


def _at_sites(experiment: Experiment) -> Experiment | str:
    try:
        return over_sites(experiment, list("ABCD"), test=True)
    except FedmllmError as error:
        return str(error)


def check_summaries(content: bytes, folder: Path) -> None:
    """Every run is in the report or named in a note; runs over other rows are not paired; no NaN, no negative lead."""
    runs = json.loads(content)
    for i, run in enumerate(runs):
        line, row = _record_of(run)
        (folder / str(i)).mkdir()
        (folder / str(i) / "record.jsonl").write_bytes(line)
        (folder / str(i) / "summary.json").write_text(json.dumps({"rows": [row]}))
    report = read_results([folder])
    kept = {(run.settings["aggregator"]["name"], run.seed, run.draw.rows) for run in report.runs}
    assert kept == {(run["method"], run["seed"], run["rows"]) for run in runs}
    different = {(run["method"], run["seed"], run["value"], run["rows"]) for run in runs}
    assert len(report.runs) == len(different) or report.notes
    for dataset in report.datasets:
        draws = {method: set(seeds) for (_, method), seeds in dataset.values().items()}
        for pair in all_pairs(dataset):
            assert pair.test.difference >= 0
            assert 0 < pair.test.n == len(draws[pair.higher] & draws[pair.lower])
    text = markdown(report).lower()
    assert " nan" not in text
    assert "inf " not in text


@lru_cache(maxsize=64)
def _experiment(method: str, seed: int) -> Experiment:
    return Experiment.parse({"data": "synthetic-irony", "aggregator": method, "seed": seed, "num_rounds": 1})


def _record_of(run: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """First lines of a record, and the row of a summary."""
    e = _experiment(run["method"], run["seed"])
    digests = {"partition": "0", "base": "0", **({"rows": run["rows"]} if run["rows"] else {})}
    heading = {
        "event": "experiment",
        "run_id": e.run_id(),
        "settings": e.model_dump(mode="json"),
        "digests": digests,
        "num_test": 3,
    }
    cost = dict.fromkeys(("num_rounds", "up_bytes", "down_bytes", "up_lora_bytes", "down_lora_bytes", "client_s", "server_s",
                          "num_tokens", "wall_s", "peak_host_bytes", "peak_device_bytes"), 1)  # fmt: skip
    row = {"scenario": "aligned", "setting": e.setting(), "method": e.method_name(), "prompt": "plain", "seed": e.seed}
    row |= {"metric": "auc", "value": run["value"], "std": None, "n": 1, "visible": "all", "run_id": e.run_id(), **cost}
    return as_json(heading) + b"\n", row


def check_picture_values(content: bytes, folder: Path) -> None:
    """More than one value gives more than one grey level, in the same order; or the picture is refused."""
    table = json.loads(content)
    values = np.array([table["values"]], dtype=table["type"])
    Image.fromarray(values).save(folder / "a.tif")
    grey = np.asarray(open_image(folder / "a.tif", "rows.csv:2"))[0, :, 0]
    assert (np.diff(grey[np.argsort(values[0], kind="stable")].astype(int)) >= 0).all()
    assert (len(set(values[0].tolist())) > 1) == (len(set(grey.tolist())) > 1)


def check_adapter(content: bytes, folder: Path) -> None:
    (folder / checkpoint.ADAPTER_FILE).write_bytes(content)
    params = checkpoint.read_adapter(folder, LIKE)
    assert {n: (t.shape, t.dtype) for n, t in params.items()} == {n: (t.shape, t.dtype) for n, t in LIKE.items()}


def check_book(content: bytes, folder: Path) -> None:
    """Its own digest is put right where there is one: whoever changes a run state can do that too."""
    _write_checkpoint(folder, {checkpoint.RUN_STATE: content})
    checkpoint.read_checkpoint(folder / "round-0002", LIKE, FedAdam().init(LIKE))


def check_state(content: bytes, folder: Path) -> None:
    _write_checkpoint(folder, {checkpoint.STATE: content})  # its digest is put right: only the tensors are odd
    checkpoint.read_checkpoint(folder / "round-0002", LIKE, FedAdam().init(LIKE))


def check_answer(content: bytes, folder: Path) -> None:
    reply = json.loads(content)
    flat = torch.tensor(reply["delta"], dtype=torch.float32)
    delta = dict(
        zip(LIKE, (flat[:6].reshape(2, 3), flat[6:].reshape(-1, 2) if len(flat) == 12 else flat[6:]), strict=True)
    )
    lie = ClientUpdate(1, delta, reply["num_examples"], reply["metrics"])
    honest = ClientUpdate(0, LIKE, 1, {"loss": 0.5, "num_tokens": 3, "time_s": 0.1})
    begin, aggregator = Progress(0, LIKE, FedAdam().init(LIKE)), FedAdam()
    for policy in ("drop_client", "fail"):  # "fail" last: it is the one that raises
        update_filter = UpdateFilter(on_bad_update=policy)
        for after in federate(begin, lambda *_: [honest, lie], aggregator, lambda _: [0, 1], 2, update_filter):
            assert all(t.isfinite().all() for t in after.params.values())
            assert [entry["client"] for entry in after.log["clients"]][:1] == [0]
            json.dumps(Totals().plus(after.log).model_dump(mode="json"), allow_nan=False)


def check_record(content: bytes, folder: Path) -> None:
    (folder / "record.jsonl").write_bytes(content)
    with contextlib.suppress(FedmllmError):
        list(record.read(folder / "record.jsonl"))
    Resume.find(RunFolder(folder), Experiment.parse({"data": "synthetic-irony"}))


def check_summary(content: bytes, folder: Path) -> None:
    (folder / "summary.json").write_bytes(content)
    RunFolder(folder).read_rows()


def _write_checkpoint(folder: Path, changed: dict[str, bytes]) -> None:
    files = {**checkpoint_files(), **changed}
    if checkpoint.RUN_STATE not in changed:
        run_state = json.loads(files[checkpoint.RUN_STATE])
        run_state["files"] = {name: hashlib.sha256(files[name]).hexdigest() for name in run_state["files"]}
        files[checkpoint.RUN_STATE] = as_json(run_state)
    files[checkpoint.RUN_STATE] = resealed(files[checkpoint.RUN_STATE])
    place = folder / "round-0002"
    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)


TARGETS = [
    Target("conversations", 0.12, conversations(), check_conversations),
    Target("folder-tree", 0.12, folder_trees(), check_folder_tree),
    Target("picture-values", 0.06, picture_values(), check_picture_values),
    Target("picture-modes", 0.10, picture_modes(), check_picture_mode),
    Target("answer-pairs", 0.30, answer_pairs(), check_answer_pair),
    Target("settings-round-trip", 0.08, settings_tables(), check_settings),
    Target("summaries", 0.02, summaries(), check_summaries),
    Target("picture", 0.06, mutated(*pictures()), check_picture),
    Target("experiment-file", 0.06, mutated(EXPERIMENT), check_experiment_file),
    Target("experiment-table", 0.06, tables(), check_experiment_table),
    Target("override", 0.03, mutated(b"aggregator.lr=1e-2", b"data.name=table", b"train.lr=[1]"), check_override),
    *[Target(f"rows-{ending}", 0.03, mutated(seed), check_rows(ending)) for ending, seed in ROWS.items()],
    Target("hateful-memes", 0.03, mutated(ROWS["jsonl"]), check_published),
    Target("adapter", 0.06, mutated(FILES[checkpoint.ADAPTER_FILE]), check_adapter),
    Target("adapter-header", 0.03, headers(), check_adapter),
    Target("run-state", 0.01, books(), check_book),
    Target("run-state-bytes", 0.02, mutated(FILES[checkpoint.RUN_STATE]), check_book),
    Target("checkpoint-state", 0.02, st.one_of(mutated(FILES[checkpoint.STATE]), headers()), check_state),
    Target("client-answer", 0.03, answers(), check_answer),
    Target("record", 0.03, mutated(experiment_line()), check_record),
    Target("summary", 0.03, mutated(b'{"rows": [{"metric": "auc", "value": 0.5}]}'), check_summary),
]


def survives(target: Target, content: bytes, folder: Path) -> bool:
    """Return whether it was accepted (False: refused with our own error). Anything else that is raised is a crash."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        target.check(content, folder)
    except FedmllmError:
        return False
    return True
