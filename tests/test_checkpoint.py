"""Checkpoints: read back to the bit, or refused with the file's name; written whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.server_optimizers import FedAdam
from fedmllm.config.experiment import FAMILIES
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import ClientUpdate, Params, Round, State
from fedmllm.runs import checkpoint
from fedmllm.runs.checkpoint import Best, Checkpoints
from support.checkpoints import LIKE, run_state, values, write


@pytest.mark.parametrize("name", sorted(FAMILIES["aggregator"].members))
def test_every_aggregator_goes_on_from_disk_to_the_same_bits(name: str, tmp_path: Path) -> None:
    aggregator = Aggregator.pick(name, "aggregator")

    def step(params: Params, state: State, round_: int) -> tuple[Params, State]:
        updates = [ClientUpdate(k, values(10 * round_ + k), k + 1, {"loss": 0.0}) for k in range(6)]
        return aggregator.apply(params, state, Round(round_, 0, 3, tuple(range(6)), 6), updates)

    params, state = LIKE, aggregator.init(LIKE)
    for round_ in (1, 2):
        params, state = step(params, state, round_)
    checkpoints = Checkpoints(tmp_path, 1, b"{}", lambda: None)
    checkpoints.save(run_state(2), params, state)
    checkpoints.wait()
    again = checkpoint.read_checkpoint(tmp_path / "round-0002", LIKE, aggregator.init(LIKE))
    assert list(again.params) == list(LIKE)  # "the first tensor" of fedavg-reference depends on it
    assert {k: list(tree) for k, tree in again.state.items()} == {k: list(tree) for k, tree in state.items()}
    for (one, one_state), (two, two_state) in [
        ((params, state), (again.params, again.state)),
        (step(params, state, 3), step(again.params, again.state, 3)),
    ]:
        assert all(torch.equal(one[n], two[n]) for n in LIKE)
        assert all(torch.equal(one_state[k][n], two_state[k][n]) for k in one_state for n in one_state[k])


def test_the_book_comes_back_as_it_was(tmp_path: Path) -> None:
    entry = run_state(
        3, client=4, results=({"all": {"auc": 0.1, "f1": None}},), best=Best(number=1, round=1, value=0.1 + 0.2)
    )
    write(tmp_path, entry)
    back = checkpoint.read_run_state(tmp_path / "round-0003")
    assert back.model_copy(update={"files": {}, "digest": ""}) == entry


def test_the_last_ones_stay_and_the_best_that_each_of_them_names(tmp_path: Path) -> None:
    best = {n: Best(number=2 if n < 6 else 5, round=1, value=0.5) for n in range(3, 8)}
    write(tmp_path, *(run_state(n, best=best.get(n)) for n in range(1, 7)))
    assert checkpoint.numbers(tmp_path) == [2, 5, 6]  # 5 still names 2
    write(tmp_path, run_state(7, best=best[7]))
    assert checkpoint.numbers(tmp_path) == [5, 6, 7]
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_what_a_kill_left_half_written_is_not_a_checkpoint_and_is_overwritten(tmp_path: Path) -> None:
    half = tmp_path / ".round-0002.partial"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) is None
    write(tmp_path, run_state(2))
    assert checkpoint.newest(tmp_path) == tmp_path / "round-0002"
    checkpoint.read_checkpoint(tmp_path / "round-0002", LIKE, {})


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_damage_is_seen_named_and_answered(name: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path, run_state(1), run_state(2), state=FedAdam().init(LIKE))
    path = tmp_path / "round-0002" / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-20] ^= 0x80  # in a tensor's data, or in a digest
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(FedmllmError, match=r"round-0002/.*continue from round-0001") as caught:
        checkpoint.read_checkpoint(tmp_path / "round-0002", LIKE, FedAdam().init(LIKE))
    assert name in str(caught.value) or damage == "flip"
    checkpoint.read_checkpoint(tmp_path / "round-0001", LIKE, FedAdam().init(LIKE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema_version": 3, "new": 1},
            "schema_version: got 3; this version of fedmllm reads 2; continue with the version",
        ),
        ({"schema_version": "3"}, "schema_version: "),
        ({"record_bytes": -1}, "record_bytes: "),
        ({"wall_s": float("nan")}, "wall_s: "),
        ({"round": "../../2"}, "round: "),
        ({"best": {"number": "../1", "round": 1, "value": 1.0}}, "best.number: "),
        ({"files": {"../../x": "00"}}, "files."),
        ({"more": 1}, "more: "),
    ],
)
def test_a_strange_book_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, run_state(1))
    path = tmp_path / "round-0001" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FedmllmError, match=r"state\.json: ") as caught:
        checkpoint.read_run_state(path.parent)
    assert message in str(caught.value)


def test_a_changed_figure_in_the_book_is_seen(tmp_path: Path) -> None:
    """Well-formed, of the right type, and not what was written."""
    write(tmp_path, run_state(1, results=({"all": {"auc": 0.25}},)))
    path = tmp_path / "round-0001" / "state.json"
    for was, is_ in (
        (b"0.25", b"0.75"),
        (b'"record_bytes": 100', b'"record_bytes": 900'),
        (b'"seed": 1', b'"seed": 2'),
    ):
        content = path.read_bytes()
        assert content.count(was) == 1
        path.write_bytes(content.replace(was, is_))
        with pytest.raises(FedmllmError, match=r"round-0001/state\.json: damaged: .* its own digest"):
            checkpoint.read_run_state(path.parent)
        path.write_bytes(content)
    checkpoint.read_run_state(path.parent)


def test_a_state_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    write(tmp_path, run_state(1), state={"m": LIKE})
    with pytest.raises(FedmllmError, match=r"state_keys: got \('m',\); \['v'\] must be among them"):
        checkpoint.read_checkpoint(tmp_path / "round-0001", LIKE, FedAdam().init(LIKE))


def test_an_older_checkpoint_that_was_damaged_since_does_not_stop_the_run(tmp_path: Path) -> None:
    write(tmp_path, run_state(1), run_state(2), keep=3)
    (tmp_path / "round-0001" / "state.json").write_bytes(b"{")
    write(tmp_path, run_state(3), keep=3)
    assert checkpoint.numbers(tmp_path) == [1, 2, 3]
    with pytest.raises(FedmllmError, match=r"round-0001/state\.json: ") as caught:
        checkpoint.read_params(tmp_path / "round-0001", LIKE)
    assert "delete" not in str(caught.value)  # the way on from the newest: a resume does not begin here


def test_the_adapter_alone_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path, run_state(1), run_state(2))
    assert torch.equal(checkpoint.read_params(tmp_path / "round-0001", LIKE)["a"], values(1)["a"])
    path = tmp_path / "round-0001" / checkpoint.ADAPTER_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x3f")  # another number, as finite as the one before
    with pytest.raises(FedmllmError, match="damaged"):
        checkpoint.read_params(tmp_path / "round-0001", LIKE)


def test_a_name_that_is_not_ours_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, run_state(1))
    (tmp_path / "round-00002").mkdir()
    (tmp_path / "round-2").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "round-0001"


def test_new_folders_are_on_the_disk_with_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """POSIX: a new entry is durable once its folder is synced, whatever the file itself is."""
    synced, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    last = tmp_path / "runs" / "a" / "checkpoints" / "round-0001"
    write(last.parent, run_state(1))
    places = [*last.iterdir(), last, *last.parents[:4]]
    assert places[-1] == tmp_path
    assert [place for place in places if place.stat().st_ino not in synced] == []


def test_a_checkpoint_of_another_round_under_this_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, run_state(1))
    (tmp_path / "round-0001").rename(tmp_path / "round-0009")
    with pytest.raises(FedmllmError, match=r"round-0009.*of round 1"):
        checkpoint.read_checkpoint(tmp_path / "round-0009", LIKE, {})


def odd(**changed: torch.Tensor) -> Params:
    return {**LIKE, **changed}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": LIKE["a"]}, "1 missing tensors, such as 'b'"),
        (odd(c=torch.zeros(1)), "1 unknown tensors, such as 'c'"),
        (odd(**{"../../etc/passwd": torch.zeros(1)}), "unknown tensors, such as '../../etc/passwd'"),
        (odd(a=torch.zeros(5)), "a is [5] F32, should be [4] F32"),
        (odd(a=torch.zeros(4, dtype=torch.float64)), "a is [4] F64, should be [4] F32"),
        (odd(a=torch.zeros(4, dtype=torch.int32)), "a is [4] I32, should be [4] F32"),
        (odd(a=torch.tensor([0, 1, float("nan"), 2])), "a holds NaN or Inf"),
    ],
)
def test_an_adapter_from_elsewhere_must_fit(tensors: Params, message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FedmllmError) as caught:
        checkpoint.read_adapter(tmp_path, LIKE)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_header_that_promises_terabytes_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2], "data_offsets": [0, 2**43]}}).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(FedmllmError, match="not a whole safetensors file"):
        checkpoint.read_adapter(path, LIKE)


def test_a_checkpoint_is_an_adapter_file(tmp_path: Path) -> None:
    write(tmp_path, run_state(1))
    loaded = load_file(tmp_path / "round-0001" / "adapter_model.safetensors")
    assert all(torch.equal(loaded[n], values(1)[n]) for n in LIKE)


FULL = """
    import resource, sys, pathlib, torch
    sys.path[:0] = [{tests!r}]
    from fedmllm.runs import checkpoint
    from fedmllm.runs.checkpoint import Checkpoints
    from support.checkpoints import run_state, values
    big = {{"w": torch.zeros(30_000)}}  # 120 kB
    place = pathlib.Path({folder!r})
    checkpoints = Checkpoints(place, 2, b"{{}}", lambda: None)
    checkpoints.save(run_state(1), values(1), {{}})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a write beyond it fails, as on a full disk
    checkpoints.save(run_state(2), big, {{}})
    try:
        checkpoints.save(run_state(3), values(3), {{}})
    except checkpoint.FedmllmError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_write_that_fails_is_said_and_the_one_before_stays(tmp_path: Path) -> None:
    code = textwrap.dedent(FULL).format(tests=str(Path(__file__).parent), folder=str(tmp_path / "c"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert "round-0002 cannot be written: File too large; the last one is " in done.stdout, done.stderr
    assert "--resume continues" in done.stdout
    assert not list((tmp_path / "c").glob(".*"))  # room for the last line of the record
    assert checkpoint.numbers(tmp_path / "c") == [1]
    checkpoint.read_checkpoint(tmp_path / "c" / "round-0001", LIKE, {})
    shutil.rmtree(tmp_path / "c")
