"""What may come from outside: how to make strange ones, and what is done with them. Only FedmllmError may come out.

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
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from fedmllm import checkpoint, record
from fedmllm.aggregators import FedAdam
from fedmllm.config import FAMILIES, Experiment, set_key
from fedmllm.data.hateful_memes import HatefulMemes
from fedmllm.data.table import Columns, Table
from fedmllm.images import open_image
from fedmllm.runs import finished, refuse_other_settings
from fedmllm.types import FedmllmError, Params

Inputs = st.SearchStrategy[bytes]
LIKE: Params = {"layers.0.q_proj.lora_A.weight": torch.zeros(2, 3), "layers.0.q_proj.lora_B.weight": torch.zeros(3, 2)}
EXPERIMENT = b"""# comment
num_rounds = 3
cohort = "seeded"
prompt = "agnostic"
[data]
name = "table"
root = "r"
train = "t.csv"
columns = { image = "scan", text = "report", keep = ["site"] }
[partition]
name = "dirichlet"
alpha = 0.5
[scenario]
name = "missing"
rate = 0.3
[backbone]
name = "hf"
path = "x"
lora = { r = 8, alpha = 8.0, targets = ".*q_proj" }
[aggregator]
name = "fedadam"
lr = 1e-3
[evaluate]
every = 2
visible = ["all", "image+text"]
[availability]
name = "unreliable"
drop_rate = 0.1
"""
ROW = {"id": "1", "img": "a.png", "image": "a.png", "text": "t", "question": "q", "choices": ["x", "y"], "answer": "x"}
ROWS = {
    "csv": b'id,image,text,question,choices,answer\n1,a.png,"a ""b"", c",q,x|y,x\n2,,only text,q,x|y,1\n3,a.png,,q,,open\n',
    "tsv": b"id\timage\ttext\tquestion\tchoices\tanswer\n1\ta.png\tt\tq\tx|y\tx\n2\t\tt\tq\tx|y\t1\n",
    "jsonl": b"\n".join(json.dumps({**ROW, "id": i, "label": 0}).encode() for i in range(3)),
    "json": json.dumps(
        [
            {**ROW, "id": i, "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "x"}]}
            for i in range(2)
        ]
    ).encode(),
}
ODD_NAMES = ["../../etc/passwd", "/etc/passwd", "a.png\0", "a" * 5000, "..", ".", "~root", "a.png/..", "\ud800", "con"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(ODD_NAMES),
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.text(max_size=4), v, max_size=3)),
    max_leaves=6,
)


@dataclass(frozen=True)
class Target:
    """A way in. `check` raises nothing but FedmllmError; the folder is empty and its own."""

    name: str
    share: float  # of the inputs
    inputs: Inputs
    check: Callable[[bytes, Path], None]


# --- how strange inputs are made


def mutated(*seeds: bytes) -> Inputs:
    """A good input with a few cuts, flips, repeats and insertions; sometimes no relation of it at all."""
    pieces = st.one_of(
        st.binary(max_size=6),
        st.sampled_from(
            [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"{", b"[" * 5000, b"[[", b"=", b"\r\n", b"\n", b","]
        ),
        st.sampled_from(
            [b"nan", b"1e999", b"-1", b"99999999999999999999", b"../..", b"null", b"true", "ü".encode("latin-1")]
        ),
    )
    edit = st.tuples(st.sampled_from(["cut", "flip", "insert", "replace", "repeat"]), st.floats(0, 1), pieces)
    return st.one_of(
        st.builds(_edited, st.sampled_from(seeds), st.lists(edit, min_size=1, max_size=5)), st.binary(max_size=64)
    )


def _edited(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, piece in edits:
        at = int(where * len(content))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        elif kind == "replace":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "repeat":
            content = content[:at] + content[max(0, at - 40) : at] * 3 + content[at:]
    return content


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def tables() -> Inputs:
    """Experiment tables whose keys are mostly right and whose values are mostly not."""
    words = sorted({name for family in FAMILIES.values() for name in family.members})
    member = st.one_of(st.sampled_from(words), VALUES)
    fields = sorted({key for family in FAMILIES.values() for m in family.members.values() for key in m.model_fields})
    inner = st.dictionaries(st.sampled_from(fields), VALUES, max_size=4)
    family = st.one_of(member, st.builds(lambda name, rest: {**rest, "name": name}, member, inner))
    keys = st.sampled_from(sorted(Experiment.model_fields))
    return st.dictionaries(keys, st.one_of(family, inner, VALUES), max_size=6).map(
        lambda t: as_json({"data": "synthetic-irony", **t})
    )


def headers() -> Inputs:
    """safetensors files whose header says odd things: other names, types, shapes, offsets, lengths."""
    numbers = st.sampled_from([0, 1, 2, 3, 6, 24, 2**31, 2**40, 2**63, 2**64, -1])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "X", "", 3]),
            "shape": st.one_of(st.just([2, 3]), st.lists(numbers, max_size=4)),
            "data_offsets": st.one_of(st.just([0, 24]), st.just([24, 48]), st.lists(numbers, max_size=3)),
        }
    )
    names = st.sampled_from([*LIKE, "__metadata__", "", *[n for n in ODD_NAMES if "\ud800" not in n]])
    whole = st.dictionaries(names, st.one_of(entry, entry, VALUES), max_size=3)

    def pack(header: Any, length: int | None, data: bytes) -> bytes:
        text = as_json(header)
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    lengths = st.one_of(st.none(), st.none(), st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1]))
    return st.builds(pack, whole, lengths, st.one_of(st.just(b"\0" * 48), st.binary(max_size=64)))


def books() -> Inputs:
    """state.json with some keys changed, added or gone."""
    good = json.loads(_checkpoint_files()[checkpoint.BOOK])
    keys = st.sampled_from([*good, "more"])

    def changed(changes: dict[str, Any], gone: list[str]) -> bytes:
        return as_json({k: v for k, v in {**good, **changes}.items() if k not in gone})

    nested = st.dictionaries(
        st.sampled_from(["number", "round", "value", "num_rounds", "up_bytes", "x"]), VALUES, max_size=3
    )
    return st.builds(changed, st.dictionaries(keys, st.one_of(VALUES, nested), max_size=3), st.lists(keys, max_size=1))


# --- what is done with them


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


def check_adapter(content: bytes, folder: Path) -> None:
    (folder / checkpoint.ADAPTER).write_bytes(content)
    params = checkpoint.read_adapter(folder, LIKE)
    assert {n: (t.shape, t.dtype) for n, t in params.items()} == {n: (t.shape, t.dtype) for n, t in LIKE.items()}


def check_book(content: bytes, folder: Path) -> None:
    _write_checkpoint(folder, {checkpoint.BOOK: content})
    checkpoint.read(folder / "round-0002", LIKE, FedAdam().init(LIKE))


def check_state(content: bytes, folder: Path) -> None:
    _write_checkpoint(folder, {checkpoint.STATE: content})  # its digest is put right: only the tensors are odd
    checkpoint.read(folder / "round-0002", LIKE, FedAdam().init(LIKE))


def check_record(content: bytes, folder: Path) -> None:
    (folder / "record.jsonl").write_bytes(content)
    with contextlib.suppress(FedmllmError):
        list(record.read(folder / "record.jsonl"))
    refuse_other_settings(folder, Experiment.parse({"data": "synthetic-irony"}))


def check_summary(content: bytes, folder: Path) -> None:
    (folder / "summary.json").write_bytes(content)
    finished(folder)


def _checkpoint_files() -> dict[str, bytes]:
    state = FedAdam().init(LIKE)
    files = {
        checkpoint.ADAPTER: save(LIKE),
        checkpoint.STATE: save({f"{k}/{n}": t.clone() for k, tree in state.items() for n, t in tree.items()}),
    }
    book = {
        "schema_version": 1,
        "round": 2,
        "client": None,
        "totals": {"num_rounds": 2, "client_s": 1.0},
        "results": [{"all": {"auc": 0.5, "f1": None}}],
        "best": {"number": 1, "round": 1, "value": 0.5},
        "wall_s": 1.0,
        "record_bytes": 10,
        "settings": {"seed": 0},
        "digests": {"rows": "a"},
        "versions": {"torch": "2"},
        "state_keys": list(state),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    return {**files, checkpoint.BOOK: as_json(book)}


def _write_checkpoint(folder: Path, changed: dict[str, bytes]) -> None:
    files = {**_checkpoint_files(), **changed}
    if checkpoint.BOOK not in changed:
        book = json.loads(files[checkpoint.BOOK])
        book["files"] = {name: hashlib.sha256(files[name]).hexdigest() for name in book["files"]}
        files[checkpoint.BOOK] = as_json(book)
    place = folder / "round-0002"
    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)


def _pictures() -> list[bytes]:
    import io

    made = []
    for form, mode in [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("JPEG", "RGB"),
        ("GIF", "P"),
        ("PNG", "I;16"),
        ("TIFF", "F"),
    ]:
        buffer = io.BytesIO()
        Image.new(mode, (5, 3)).save(buffer, form)
        made.append(buffer.getvalue())
    return made


def experiment_line() -> bytes:
    settings = Experiment.parse({"data": "synthetic-irony"}).model_dump(mode="json")
    return (
        as_json({"event": "experiment", "settings": settings}) + b"\n" + as_json({"event": "round", "round": 1}) + b"\n"
    )


FILES = _checkpoint_files()
TARGETS = [
    Target("experiment-file", 0.12, mutated(EXPERIMENT), check_experiment_file),
    Target("experiment-table", 0.12, tables(), check_experiment_table),
    Target("override", 0.06, mutated(b"aggregator.lr=1e-2", b"data.name=table", b"train.lr=[1]"), check_override),
    *[Target(f"rows-{ending}", 0.05, mutated(seed), check_rows(ending)) for ending, seed in ROWS.items()],
    Target("hateful-memes", 0.05, mutated(ROWS["jsonl"]), check_published),
    Target("picture", 0.10, mutated(*_pictures()), check_picture),
    Target("adapter", 0.10, mutated(FILES[checkpoint.ADAPTER]), check_adapter),
    Target("adapter-header", 0.10, headers(), check_adapter),
    Target("checkpoint-book", 0.07, books(), check_book),
    Target("checkpoint-book-bytes", 0.03, mutated(FILES[checkpoint.BOOK]), check_book),
    Target("checkpoint-state", 0.05, st.one_of(mutated(FILES[checkpoint.STATE]), headers()), check_state),
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
