"""What may come from outside, and what is done with it. Only FedmllmError may come out.

A target is bytes in, nothing out, so that whatever breaks it is a file of the corpus (tests/corpus/TARGET/).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fuzz_inputs import (
    EXPERIMENT,
    FILES,
    LIKE,
    ROWS,
    Inputs,
    answers,
    as_json,
    books,
    checkpoint_files,
    conversations,
    experiment_line,
    folder_trees,
    headers,
    mutated,
    picture_values,
    pictures,
    resealed,
    tables,
)
from hypothesis import strategies as st
from PIL import Image

from fedmllm.algorithms.server_optimizers import FedAdam
from fedmllm.config.experiment import Experiment, set_key
from fedmllm.config.train import UpdateFilter
from fedmllm.core.errors import FedmllmError
from fedmllm.core.images import open_image
from fedmllm.core.types import ClientUpdate
from fedmllm.data.hateful_memes import HatefulMemes
from fedmllm.data.imagefolder import contents_of
from fedmllm.data.prompts import Plain
from fedmllm.data.table import Columns, Table
from fedmllm.federation.rounds import Progress, federate
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
    """Every file of an image folder is a row, or it is counted."""
    top = folder / "train"
    for name in json.loads(content):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("file_name,answer\n" if name.lower().endswith("csv") else "")
    contents = contents_of(top)
    found = [*contents.images, *contents.metadata, *contents.hidden, *contents.others]
    assert sorted(path.as_posix() for path in found) == sorted(json.loads(content))
    rows = Table(root=folder, train="train", question="?", on_bad_row="skip").load("train")
    counted = len(contents.images) - len(rows.examples) - len(rows.skipped)
    unlisted = [note for note in rows.notes if "in no metadata file" in note]
    assert counted == sum(int(note.split(": ")[1].split()[0]) for note in unlisted)


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
    Target("experiment-file", 0.12, mutated(EXPERIMENT), check_experiment_file),
    Target("experiment-table", 0.10, tables(), check_experiment_table),
    Target("override", 0.03, mutated(b"aggregator.lr=1e-2", b"data.name=table", b"train.lr=[1]"), check_override),
    *[Target(f"rows-{ending}", 0.04, mutated(seed), check_rows(ending)) for ending, seed in ROWS.items()],
    Target("hateful-memes", 0.05, mutated(ROWS["jsonl"]), check_published),
    Target("conversations", 0.08, conversations(), check_conversations),
    Target("folder-tree", 0.05, folder_trees(), check_folder_tree),
    Target("picture-values", 0.04, picture_values(), check_picture_values),
    Target("picture", 0.10, mutated(*pictures()), check_picture),
    Target("adapter", 0.12, mutated(FILES[checkpoint.ADAPTER_FILE]), check_adapter),
    Target("adapter-header", 0.12, headers(), check_adapter),
    Target("checkpoint-state", 0.07, books(), check_book),
    Target("checkpoint-state-bytes", 0.03, mutated(FILES[checkpoint.RUN_STATE]), check_book),
    Target("checkpoint-state", 0.05, st.one_of(mutated(FILES[checkpoint.STATE]), headers()), check_state),
    Target("client-answer", 0.06, answers(), check_answer),
    Target("record", 0.05, mutated(experiment_line()), check_record),
    Target("summary", 0.05, mutated(b'{"rows": [{"metric": "auc", "value": 0.5}]}'), check_summary),
]


def survives(target: Target, content: bytes, folder: Path) -> bool:
    """Whether it was accepted (False: refused with our own error). Anything else that is raised is a crash."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        target.check(content, folder)
    except FedmllmError:
        return False
    return True
