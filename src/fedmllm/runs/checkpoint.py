"""Checkpoints of a run: its state after a round, on disk.

A checkpoint is written whole or not at all, and read back to the bit or refused. There is no pickle.

checkpoints/round-0007/adapter_model.safetensors   the global adapter: with adapter_config.json a folder that PEFT loads
                       state.safetensors           the aggregator's memory, tensor "KEY/NAME"; absent where it has none
                       state.json                  all else (`RunState`); digests of the others and of itself: damage is seen
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, ValidationError
from safetensors.torch import save
from torch import Tensor

from fedmllm.backbones.base import Backbone, Lora
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import Spec
from fedmllm.core.storage import make_folder, read_tensors, sync, tensor_names
from fedmllm.core.tensors import rank_dim
from fedmllm.core.types import Params, State
from fedmllm.runs.costs import Totals

ADAPTER_FILE, CONFIG, STATE, RUN_STATE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "state.safetensors",
    "state.json",
)
FOLDER = re.compile(r"round-([0-9]{4}|[1-9][0-9]{4,8})")
MAX_RUN_STATE_BYTES = 16 * 2**20  # bytes; a real one has some thousands


class Best(Spec):
    """The best adapter so far on the validation rows."""

    number: NonNegativeInt  # of its checkpoint
    round: NonNegativeInt
    value: float


class RunState(Spec):
    """`state.json`: where a run stands, apart from tensors. It names no file outside its folder."""

    schema_version: Literal[2] = 2
    round: NonNegativeInt  # of the federation at hand; `totals.num_rounds` counts over all of a run's federations
    client: NonNegativeInt | None  # whose federation of one it is, for method "local"
    totals: Totals
    results: tuple[dict[str, dict[str, float | None]], ...]  # of the clients that are done, for method "local"
    best: Best | None  # before this round was evaluated
    wall_s: NonNegativeFloat
    record_bytes: NonNegativeInt  # length of record.jsonl up to and with this round's line
    prediction_bytes: NonNegativeInt = 0  # length of predictions.jsonl.gz
    settings: dict[str, Any]  # those that change results
    digests: dict[str, str]  # of rows, partition, base
    versions: dict[str, str]
    device: dict[str, str | int] = {}  # noqa: RUF012
    state_keys: tuple[str, ...] = ()
    files: dict[Literal["adapter_model.safetensors", "adapter_config.json", "state.safetensors"], str] = {}  # noqa: RUF012
    digest: str = ""  # of all the rest, as `sealed` writes it


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: `like` of `Checkpoints.read` says how its tensors must look."""

    folder: Path
    run_state: RunState
    params: Params
    state: State


class Checkpoints:
    """The checkpoints of one run. A thread writes them, so that the disk's time is not the round's.

    When the next one is handed over, the one before is on the disk: a power cut or kill costs the round at hand and, at
    most, the one whose checkpoint was just being written.
    """

    def __init__(self, folder: Path, keep: int, config: bytes, sync_record: Callable[[], None]) -> None:
        self.folder, self._keep, self._config, self._sync_record = folder, keep, config, sync_record
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        for left in folder.glob(".round-*"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        self._pending: Future[None] | None = None

    def save(self, run_state: RunState, params: Params, state: State) -> None:
        """Hand one over to be written. Raises FedmllmError where the one before could not be."""
        self.wait()
        self._pending = self._writer.submit(self._write, run_state, params, state)

    def wait(self) -> None:
        """Until all that was handed over is on the disk. Raises FedmllmError where that failed."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """End the thread; what it is writing is finished first."""
        self._writer.shutdown()

    def _write(self, run_state: RunState, params: Params, state: State) -> None:
        final = self.folder / f"round-{run_state.totals.num_rounds:04d}"
        partial = final.with_name(f".{final.name}.partial")
        try:
            make_folder(self.folder)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            files = {ADAPTER_FILE: save(_copied(params), {"format": "pt"}), CONFIG: self._config}
            if state:
                named = {f"{key}/{name}": t for key, tree in state.items() for name, t in tree.items()}
                files[STATE] = save(_copied(named))
            digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            files[RUN_STATE] = sealed(
                RunState.model_validate({**dict(run_state), "files": digests, "state_keys": tuple(state)})
            )
            for name, content in files.items():
                (partial / name).write_bytes(content)
            for name in files:  # after all are written: the first sync then carries most of the work
                sync(partial / name)
            sync(partial)
            self._sync_record()
            if final.exists():
                self._remove(run_state.totals.num_rounds)
            partial.rename(final)
            sync(self.folder)
            self._prune()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)  # room for the record's last line
            left = max(self.numbers(), default=None)
            last = f"the last one is {self.path(left)}" if left is not None else "there is none yet"
            raise FedmllmError(
                f"checkpoint {final} cannot be written: {error.strerror or error}; {last}. "
                "When there is room again, --resume continues from there"
            ) from error

    def _prune(self) -> None:
        """Remove all but the last ones and the best that each of these names: a resume from any of them needs it."""
        last = self.numbers()[-self._keep :]
        kept = set(last)
        for number in last:
            with contextlib.suppress(FedmllmError):  # damaged since: no resume from it, so it needs no best one
                if best := read_run_state(self.path(number)).best:
                    kept.add(best.number)
        for number in set(self.numbers()) - kept:
            self._remove(number)

    def _remove(self, number: int) -> None:
        gone = self.path(number).rename(self.folder / f".round-{number:04d}.gone")  # never half a checkpoint
        shutil.rmtree(gone, ignore_errors=True)

    def path(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}"

    def numbers(self) -> list[int]:
        return numbers(self.folder)


def numbers(folder: Path) -> list[int]:
    """The rounds that have a checkpoint in `folder`, which may not exist."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for entry in folder.iterdir() if (found := FOLDER.fullmatch(entry.name)))


def newest(folder: Path) -> Path | None:
    """The checkpoint of the last round; None where there is none."""
    found = numbers(folder)
    return folder / f"round-{found[-1]:04d}" if found else None


def sealed(run_state: RunState) -> bytes:
    """`state.json`: the run state with the digest of all else in it."""
    text = run_state.model_copy(update={"digest": ""}).model_dump_json(indent=1).encode()
    return text.replace(_digest_line(""), _digest_line(hashlib.sha256(text).hexdigest()))


def _digest_line(sha: str) -> bytes:
    return f'"digest": "{sha}"'.encode()


def read_run_state(folder: Path) -> RunState:
    """`state.json` of a checkpoint. Raises FedmllmError naming the file and what is wrong with it."""
    path = folder / RUN_STATE
    try:
        if path.stat().st_size > MAX_RUN_STATE_BYTES:
            raise FedmllmError(
                f"{path}: {path.stat().st_size} bytes; a checkpoint's is never over {MAX_RUN_STATE_BYTES}"
            )
        content = path.read_bytes()
        run_state = RunState.model_validate_json(content, strict=True)
    except OSError as error:
        raise FedmllmError(f"{path}: cannot be read: {error.strerror}{_advice(folder)}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["loc"] == ("schema_version",) and first["input"] in range(1, 1000):
            raise FedmllmError(
                f"{path}: schema_version: got {first['input']}; this version of fedmllm reads 2; "
                "continue with the version that wrote it, or choose another --out"
            ) from None
        place = ".".join(str(part) for part in first["loc"])[:200] or "whole file"
        raise FedmllmError(f"{path}: {place}: {first['msg']}{_advice(folder)}") from None
    unsealed = content.replace(_digest_line(run_state.digest), _digest_line(""))
    if hashlib.sha256(unsealed).hexdigest() != run_state.digest:
        raise FedmllmError(f"{path}: damaged: it is not what its own digest says{_advice(folder)}")
    if (found := FOLDER.fullmatch(folder.name)) and int(found[1]) != run_state.totals.num_rounds:
        raise FedmllmError(
            f"{folder}: holds the checkpoint of round {run_state.totals.num_rounds}; rename or delete it"
        )
    return run_state


def read_checkpoint(folder: Path, like: Params, init: State) -> Checkpoint:
    """A checkpoint, every byte of it checked against its digests, every tensor against the run that wants it.

    Args:
        folder: Of one round.
        like: The adapter before training: names, shapes, types, and the order of the names.
        init: The aggregator's state before training; a key that comes later holds tensors like some or all of the adapter's.
    """
    run_state = read_run_state(folder)
    params = _read_checked(folder, ADAPTER_FILE, run_state, like)
    if lost := init.keys() - run_state.state_keys:
        raise FedmllmError(
            f"{folder / RUN_STATE}: state_keys: got {run_state.state_keys}; {sorted(lost)} must be among them"
        )
    state: State = {}
    if run_state.state_keys:
        held = tensor_names(_check_digest(folder, STATE, run_state))
        late = {k: {n: t for n, t in like.items() if f"{k}/{n}" in held} for k in run_state.state_keys if k not in init}
        trees = {key: {**init, **late}[key] for key in run_state.state_keys}
        flat = _read_checked(
            folder, STATE, run_state, {f"{k}/{n}": t for k, tree in trees.items() for n, t in tree.items()}
        )
        state = {key: {n: flat[f"{key}/{n}"] for n in tree} for key, tree in trees.items()}
    return Checkpoint(folder, run_state, params, state)


def read_params(folder: Path, like: Params) -> Params:
    """The adapter of a checkpoint alone, checked as `read` checks it."""
    return _read_checked(folder, ADAPTER_FILE, read_run_state(folder), like)


def _read_checked(folder: Path, name: str, run_state: RunState, like: Params) -> Params:
    return read_tensors(_check_digest(folder, name, run_state), like)


def _check_digest(folder: Path, name: str, run_state: RunState) -> Path:
    path = folder / name
    try:
        with path.open("rb") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FedmllmError(f"{path}: cannot be read: {error.strerror}{_advice(folder)}") from None
    if (name, sha) not in run_state.files.items():
        raise FedmllmError(f"{path}: damaged: it is not what the checkpoint's digest says{_advice(folder)}")
    return path


def any_rank(like: Params) -> Params:
    """`like` for an adapter of any rank: a size of 0 stands for any size (`read_tensors`)."""
    return {n: t if (dim := rank_dim(n)) is None else t.narrow(dim, 0, 0) for n, t in like.items()}


def read_adapter(place: Path, like: Params) -> Params:
    """An adapter from a PEFT folder, or its safetensors file, for a backbone whose `lora()` is `like`."""
    return read_tensors(place / ADAPTER_FILE if place.is_dir() else place, like)


def read_peft_adapter(place: Path, lora: Lora, backbone: Backbone) -> Params:
    """Return the adapter of a PEFT folder that training starts from.

    Args:
        place: The folder.
        lora: The settings of the adapter that is trained: rank and scaling must be the same.
        backbone: The model that it is for.

    Raises:
        ConfigError: There is no such folder, or its rank, scaling or kind differ; the message has both.
        FedmllmError: The tensors are not those of the model.
    """
    path = place / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = {"r": config["r"], "alpha": config["lora_alpha"], "rslora": bool(config.get("use_rslora", False))}
    except OSError as error:
        raise ConfigError(f"backbone.adapter: {path}: cannot be read: {error.strerror}; give a PEFT folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"backbone.adapter: {path}: not a LoRA adapter of PEFT: {error!r}") from None
    wanted = {"r": lora.r, "alpha": lora.alpha, "rslora": lora.rslora}
    odd = [
        f"lora.{key} is {value} there and {wanted[key]} here" for key, value in found.items() if value != wanted[key]
    ]
    if odd:
        raise ConfigError(f"backbone.adapter: {place}: {'; '.join(odd)}; set backbone.lora to the adapter's values")
    if patterns := [key for key in ("rank_pattern", "alpha_pattern", "use_dora") if config.get(key)]:
        raise ConfigError(f"backbone.adapter: {place}: has {patterns[0]}; allowed: LoRA of one rank and scaling")
    return read_adapter(place, backbone.lora())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().contiguous().clone() for name, t in tensors.items()}  # safetensors refuses shared memory


def _advice(folder: Path) -> str:
    if not (found := FOLDER.fullmatch(folder.name)):
        return ""
    others = [n for n in numbers(folder.parent) if folder.name != f"round-{n:04d}"]
    if others and others[-1] > int(found[1]):
        return ""  # not the one that a resume begins from
    earlier = f"delete {folder} to continue from round-{others[-1]:04d}" if others else "there is no other checkpoint"
    return f"; {earlier}"
