"""Strange inputs for every way in: good ones that were cut, flipped and stuffed, and ones built to be odd."""

from __future__ import annotations

import hashlib
import io
import json
import re
import typing
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from fedmllm.algorithms.server_optimizers import FedAdam
from fedmllm.config.experiment import FAMILIES, Experiment
from fedmllm.config.train import Evaluate, Train, UpdateFilter
from fedmllm.core.types import Params
from fedmllm.runs import checkpoint

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
DIGEST = re.compile(rb'"digest": "[0-9a-f]{64}"')
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


def conversations() -> Inputs:
    """Lists of conversations whose marks and pictures correspond or not."""
    marks = st.sampled_from(
        ["<image>", "<image_0>", "<image_1>", "<IMAGE>", "<video>", "<img>a.png</img>", "?", "\n", "word "]
    )
    text = st.lists(marks, max_size=4).map("".join)
    role = st.sampled_from(["user", "human", "assistant", "gpt", "system", "robot"])
    turn = st.fixed_dictionaries({"role": role, "content": st.one_of(text, text, text, VALUES)})
    pair = st.tuples(text, text).map(
        lambda texts: [{"from": "human", "value": texts[0]}, {"from": "gpt", "value": texts[1] or "x"}]
    )
    turns = st.one_of(
        st.lists(pair, min_size=1, max_size=3).map(lambda pairs: [t for p in pairs for t in p]),
        st.lists(turn, max_size=4),
    )
    names = st.sampled_from(["a.png", "b.png", None, "", "../a.png"])
    image = st.one_of(
        names,
        st.lists(names, max_size=3),
        st.dictionaries(st.sampled_from(["<image_0>", "<image_1>", "image", "x"]), names, max_size=2),
        VALUES,
    )
    more = st.dictionaries(
        st.sampled_from(["id", "video", "images", "question", "choices", "answer"]), VALUES, max_size=2
    )
    row = st.builds(lambda table, image, turns: {**table, "image": image, "conversations": turns}, more, image, turns)
    return st.lists(row, min_size=1, max_size=4).map(as_json)


def folder_trees() -> Inputs:
    """Image folders as {path: text}: labels or metadata files, and among them hidden files, other kinds, odd places."""
    labels = st.lists(
        st.sampled_from(["cat", "dog", "fox", "0", "two words", "caf\u00e9", "cafe\u0301"]),
        min_size=2,
        max_size=4,
        unique_by=lambda name: unicodedata.normalize("NFC", name),
    )
    names = st.lists(
        st.sampled_from(["1.png", "2.JPG", "3.avif", "4.jfif", "sub/5.webp"]), min_size=1, max_size=3, unique=True
    )
    junk = st.lists(
        st.sampled_from(
            [
                "._1.png",
                ".DS_Store",
                "notes.txt",
                ".hidden/6.png",
                "__MACOSX/cat/._1.png",
                "cat/.ipynb_checkpoints/7.png",
                "scan.dcm",
            ]
        ),
        max_size=3,
        unique=True,
    )
    odd = st.lists(
        st.sampled_from(["8.png", "metadata.csv", "cat/Metadata.CSV", "metadata.jsonl", "dog/metadata.parquet"]),
        max_size=2,
        unique=True,
    )

    def labelled(chosen: list[str], names: list[list[str]]) -> dict[str, str]:
        return {f"{label}/{name}": "" for label, own in zip(chosen, names, strict=False) for name in own}

    def listed(tree: dict[str, str], form: str, share: float) -> dict[str, str]:
        """With one metadata file on top, which lists a share of the images."""
        images = sorted(tree)[: max(1, round(share * len(tree)))]
        if form.lower().endswith("csv"):
            lines = ["file_name,answer", *(f"{path},{len(path) % 2}" for path in images)]
        else:
            lines = [json.dumps({"file_name": path, "answer": str(len(path) % 2)}) for path in images]
        return {**tree, form: "\n".join(lines) + "\n"}

    tree = st.builds(labelled, labels, st.lists(names, min_size=4, max_size=4))
    forms = st.sampled_from(["metadata.csv", "Metadata.CSV", "metadata.jsonl"])
    right = st.one_of(tree, st.builds(listed, tree, forms, st.floats(0, 1)))
    some_odd = st.one_of(st.just([]), st.just([]), odd)
    return st.builds(lambda tree, junk, odd: {**dict.fromkeys([*junk, *odd], ""), **tree}, right, junk, some_odd).map(
        as_json
    )


def picture_modes() -> Inputs:
    """Pictures of every mode and form: {mode, form, size, orientation, seed}."""
    modes = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"]
    return st.fixed_dictionaries(
        {
            "mode": st.sampled_from(modes),
            "form": st.sampled_from(["PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TGA", "JPEG2000"]),
            "size": st.tuples(st.integers(1, 9), st.integers(1, 9)),
            "orientation": st.integers(0, 9),
            "transparent": st.booleans(),
            "seed": st.integers(0, 999),
        }
    ).map(as_json)


def answer_pairs() -> Inputs:
    """Two answers and whether they mean the same: {one, two, same}."""
    words = st.sampled_from(
        ["yes", "left lung", "x-ray", "hepatitis", "O+", "Rh-", "-5", ">5 mm", "<5 mm", "1,000 ml", "1.5", "3/4", "50%",
         "vitamin A", "caf\u00e9", "it's", "\u80ba\u708e", "\u3042\u308b", "T1", "5-6 cm", "na\u00efve patient",
         "(right) kidney", "Crohn's disease", "B", "A"]
    )  # fmt: skip
    alike: dict[str, Callable[[str], str]] = {
        "case": lambda text: text.upper() if text != "vitamin A" else text,
        "blanks": lambda text: f"  {text}\n",
        "stop": lambda text: f"{text}.",
        "wide stop": lambda text: f"{text}\u3002",
        "article": lambda text: f"the {text}",
        "composed": lambda text: unicodedata.normalize("NFC", text),
        "decomposed": lambda text: unicodedata.normalize("NFD", text),
        "wide": lambda text: text.translate({c: c + 0xFEE0 for c in range(0x30, 0x3A)}),
        "quotes": lambda text: text.replace("'", "\u2019"),
        "quoted": lambda text: f'"{text}"',
        "dash": lambda text: text.replace("-", "\u2212"),
        "same": lambda text: text,
    }
    other: dict[str, Callable[[str], str]] = {
        "word": lambda text: f"{text} mass",
        "no": lambda text: f"no {text}",
        "number": lambda text: f"{text} 7",
        "plus": lambda text: f"{text} +",
        "A": lambda text: f"{text} A",
        "percent": lambda text: f"{text} %",
        "less": lambda text: f"< {text}",
    }

    def pair(text: str, first: list[str], change: str, same: bool) -> bytes:
        one = two = text
        for name in first:
            two = alike[name](two)
        two = two if same else other[change](two)
        return as_json({"one": one, "two": two, "same": same, "changes": [*first, *([] if same else [change])]})

    return st.builds(
        pair,
        words,
        st.lists(st.sampled_from(sorted(alike)), max_size=3, unique=True),
        st.sampled_from(sorted(other)),
        st.booleans(),
    )


def settings_tables() -> Inputs:
    """Experiments that are right: members of every family, with other values of their numbers, choices and flags."""
    base: dict[str, Any] = {"data": "synthetic-irony", "partition": {"name": "iid", "num_clients": 4}, "cohort_size": 3}

    def values_of(member: type[Any]) -> st.SearchStrategy[Any]:
        ways: dict[str, st.SearchStrategy[Any]] = {}
        for key, about in member.model_fields.items():
            default = about.default
            if key == "name" or about.is_required():
                continue
            if isinstance(default, bool):
                ways[key] = st.booleans()
            elif isinstance(default, int):
                ways[key] = st.sampled_from([default, default + 1, max(1, default)])
            elif isinstance(default, float):
                ways[key] = st.sampled_from([default, default / 2, 0.25])
            elif typing.get_origin(about.annotation) is Literal:
                ways[key] = st.sampled_from(typing.get_args(about.annotation))
        return st.fixed_dictionaries({"name": st.just(member.model_fields["name"].default)}, optional=ways)

    def family(key: str) -> st.SearchStrategy[Any]:
        members = [m for name, m in sorted(FAMILIES[key].members.items()) if m.plugin is None and name != "at-sites"]
        return st.one_of(*[values_of(m) for m in members if not any(f.is_required() for f in m.model_fields.values())])

    families = st.fixed_dictionaries({}, optional={key: family(key) for key in FAMILIES})
    train = values_of_spec(Train)
    rest = st.fixed_dictionaries(
        {},
        optional={
            "train": train,
            "evaluate": values_of_spec(Evaluate),
            "update_filter": values_of_spec(UpdateFilter),
            "num_rounds": st.integers(1, 9),
            "seed": st.integers(0, 3),
        },
    )
    one = st.builds(
        lambda key, families: {k: v for k, v in families.items() if k == key},
        st.sampled_from(sorted(FAMILIES)),
        families,
    )
    return st.builds(lambda chosen, rest: {**base, **rest, **chosen}, st.one_of(one, one, families), rest).map(as_json)


def values_of_spec(spec: type[Any]) -> st.SearchStrategy[Any]:
    """A table of a Spec with its defaults written out, or other allowed words and flags."""
    ways: dict[str, st.SearchStrategy[Any]] = {}
    for key, about in spec.model_fields.items():
        if isinstance(about.default, bool):
            ways[key] = st.booleans()
        elif isinstance(about.default, int | float | str):
            ways[key] = st.just(about.default)
    return st.fixed_dictionaries({}, optional=ways)


def summaries() -> Inputs:
    """Values, seeds, methods and digests of a few runs: [{method, seed, value, rows}]."""
    run = st.fixed_dictionaries(
        {
            "method": st.sampled_from(["fedavg", "fedadam", "fedyogi"]),
            "seed": st.integers(0, 3),
            "value": st.one_of(st.floats(0, 1), st.floats(0, 1), st.sampled_from([None, 0, 1, -1, 0.5, 0.5])),
            "rows": st.sampled_from(["", "", "", "1111", "2222"]),
        }
    )
    return st.lists(run, min_size=1, max_size=7).map(as_json)


def picture_values() -> Inputs:
    """Pictures of 16-bit, 32-bit and float values: {type, values}."""
    kinds = {"uint16": (0, 2**16 - 1), "int32": (-(2**31), 2**31 - 1), "float32": (None, None)}

    def of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
        low, high = kinds[kind]
        value = st.floats(width=32) if low is None else st.integers(low, high)
        return st.fixed_dictionaries({"type": st.just(kind), "values": st.lists(value, min_size=4, max_size=12)})

    return st.one_of(*map(of, kinds)).map(as_json)


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
    odd = st.dictionaries(names, st.one_of(entry, entry, VALUES), max_size=3)
    good = {
        n: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [24 * i, 24 * i + 24]}
        for i, (n, t) in enumerate(LIKE.items())
    }
    notes = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2).map(
        lambda text: {"__metadata__": text}
    )
    right = st.builds(
        lambda order, more: {**more, **dict(order)}, st.permutations(list(good.items())), st.one_of(st.just({}), notes)
    )
    whole = st.one_of(odd, right, st.builds(lambda base, changed: {**base, **changed}, right, odd))

    def pack(header: Any, length: int | None, data: bytes) -> bytes:
        text = as_json(header)
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    lengths = st.one_of(st.none(), st.none(), st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1]))
    data = st.one_of(st.just(b"\0" * 48), st.binary(min_size=48, max_size=48), st.binary(max_size=64))
    return st.builds(pack, whole, lengths, data)


def books() -> Inputs:
    """state.json with some keys changed, added or gone."""
    good = json.loads(checkpoint_files()[checkpoint.RUN_STATE])
    keys = st.sampled_from([*good, "more"])

    def changed(changes: dict[str, Any], gone: list[str]) -> bytes:
        return as_json({k: v for k, v in {**good, **changes}.items() if k not in gone})

    nested = st.dictionaries(
        st.sampled_from(["number", "round", "value", "num_rounds", "up_bytes", "x"]), VALUES, max_size=3
    )
    return st.builds(changed, st.dictionaries(keys, st.one_of(VALUES, nested), max_size=3), st.lists(keys, max_size=1))


def answers() -> Inputs:
    """The metadata that a client reports, and the numbers of its delta."""
    names = st.sampled_from(["loss", "num_steps", "num_tokens", "time_s", "client", "norm", "x"])
    fine = st.integers(0, 9)
    amounts = st.one_of(fine, fine, fine, st.floats(), st.sampled_from([-1, 2**53, 2**64, 10**400]))
    delta = st.lists(st.one_of(st.floats(-9, 9), st.floats(width=32)), min_size=11, max_size=13)
    table = {
        "num_examples": st.one_of(amounts, SCALARS),
        "metrics": st.dictionaries(names, st.one_of(amounts, amounts, SCALARS), max_size=4),
    }
    return st.fixed_dictionaries({**table, "delta": delta}).map(as_json)


def checkpoint_files() -> dict[str, bytes]:
    state = FedAdam().init(LIKE)
    files = {
        checkpoint.ADAPTER_FILE: save(LIKE),
        checkpoint.STATE: save({f"{k}/{n}": t.clone() for k, tree in state.items() for n, t in tree.items()}),
    }
    run_state = {
        "schema_version": 2,
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
        "digest": "0" * 64,
    }
    return {**files, checkpoint.RUN_STATE: resealed(as_json(run_state))}


def resealed(run_state: bytes) -> bytes:
    unsealed = DIGEST.sub(b'"digest": ""', run_state)
    return DIGEST.sub(b'"digest": "%s"' % hashlib.sha256(unsealed).hexdigest().encode(), run_state)


def pictures() -> list[bytes]:
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


FILES = checkpoint_files()
