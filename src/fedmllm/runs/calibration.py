"""Measured speed of this device, and expected time of a round.

A pass over a batch costs a fixed time and a time per token, which are measured on the model itself; so the figures hold for
other numbers of clients, rows and steps. For a model that was not measured, the device's rate of matrix products gives a
lower bound. Rows that were not measured are counted in tokens by the model's processor, which needs no weights. Everything
measured is kept in one file in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedmllm.backbones.base import Backbone, Row
from fedmllm.backbones.encode import Encoder
from fedmllm.backbones.folder import family_of, load_processor
from fedmllm.backbones.footprint import empty_model
from fedmllm.backbones.places import base_folder
from fedmllm.config.engine import Stacked
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import make_folder, write_atomically, writing
from fedmllm.core.types import Example, visible_of
from fedmllm.federation.client import planned_steps
from fedmllm.federation.engines.stacked.memory import CPU_TOKENS
from fedmllm.scenarios.assign import assign

_FORMAT = 1
THREADS = ", threads: "  # between the name of a CPU and their number
SAMPLE = 32  # rows that are encoded and timed
REPEATS = 5  # of each pass; the fastest counts, because other programs only add time
SIDE, PRODUCT_TOKENS = 2048, 256  # of the matrix products that are timed
TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpeed:
    """Measured costs of training one model on one device, in seconds."""

    pass_s: float  # of a forward and backward pass, in addition to its tokens
    token_s: float  # of a token in it
    encode_s: float  # of a row the first time that it is read: preprocessing and the frozen vision tower


@dataclass(frozen=True)
class DeviceSpeed:
    """Measurements of one device."""

    device: str  # its name, and the number of threads on a CPU
    products_per_s: Mapping[str, float]  # type of the base's weights -> floating-point operations a second
    models: Mapping[str, ModelSpeed]  # `model_key` -> speed
    tokens: Mapping[str, float]  # `rows_key` -> mean tokens of a row


@dataclass(frozen=True)
class RoundTime:
    """Expected time of a round.

    Attributes:
        seconds: Of a round whose rows were read before; None = not known.
        first_s: In addition, while every row of the cohort is read for the first time; None = not known.
        about: What the figure rests on, or why there is none.
    """

    seconds: float | None
    first_s: float | None
    about: str


def calibration_file() -> Path:
    """Return the file of this user: `$XDG_CACHE_HOME/fedmllm/calibration.json`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmllm" / "calibration.json"


def device_key(device: torch.device) -> str:
    """Return the name under which a device's measurements are kept."""
    if device.type == "cuda":
        here = (device.index or 0) < torch.cuda.device_count()
        return torch.cuda.get_device_name(device) if here else str(device)  # another machine's: nothing is known of it
    return f"{_processor()}{THREADS}{torch.get_num_threads()}"


def model_key(experiment: Experiment) -> str:
    """Return the identity of a model as it is trained: its source, precision and LoRA."""
    return _digest({**experiment.backbone.identity(), "adapter": ""})


def rows_key(experiment: Experiment) -> str:
    """Return the identity of how long rows are: data, prompt and model."""
    return _digest([experiment.data.identity(), experiment.prompt.identity(), model_key(experiment)])


def read_calibrations() -> dict[str, DeviceSpeed]:
    """Return device -> what was measured there; {} before the first calibration.

    Raises:
        FedmllmError: The file is damaged, or of another version.
    """
    path = calibration_file()
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != _FORMAT:
            raise ValueError(f"format: got {table['format']!r}; this version reads {_FORMAT}")
        return {
            name: DeviceSpeed(
                name,
                {kind: float(rate) for kind, rate in one["products_per_s"].items()},
                {key: ModelSpeed(**speed) for key, speed in one["models"].items()},
                {key: float(count) for key, count in one["tokens"].items()},
            )
            for name, one in table["devices"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedmllmError(f"{path}: not a calibration: {error}; delete it and calibrate again") from None


def calibrate(experiment: Experiment) -> DeviceSpeed:
    """Measure the device of an experiment's model, and that model on its rows; keep both.

    Args:
        experiment: Its model, rows, prompt and device count.

    Returns:
        Everything known of that device, earlier measurements of other models included.

    Raises:
        FedmllmError: Rows or model cannot be loaded, or the file cannot be written.
    """
    e = experiment
    examples = e.data.load("train").examples[:SAMPLE]
    backbone = e.backbone.load(e.seed)
    device = torch.device(backbone.device)
    present = visible_of("all", e.data.modalities())
    began = time.perf_counter()
    rows = [backbone.encode(e.prompt.render(example, present), e.prompt.target(example)) for example in examples]
    _timed(backbone, rows[:1], 1)  # the first pass of a process warms up libraries
    first_s = time.perf_counter() - began
    speed = _speed(backbone, rows, first_s)
    known = read_calibrations()
    rates = {name: _rate(device, dtype) for name, dtype in TYPES.items() if name != "nf4"}
    tokens = statistics.fmean(row.num_tokens for row in rows)
    before = known.get(device_key(device)) or DeviceSpeed(device_key(device), {}, {}, {})
    found = replace(
        before,
        products_per_s={**rates, "nf4": rates["bfloat16"]},
        models={**before.models, model_key(e): speed},
        tokens={**before.tokens, rows_key(e): tokens},
    )
    _write({**known, found.device: found})
    return found


def round_time(experiment: Experiment, num_weights: int, device: torch.device) -> RoundTime:
    """Return the expected time of a round on a device.

    Args:
        experiment: What would run.
        num_weights: Of its model.
        device: On which it would run.

    Raises:
        FedmllmError: The file of calibrations is damaged.
    """
    e, found = experiment, _measured_on(device)
    if found is None:
        return RoundTime(None, None, "this device is not calibrated; run `fedmllm calibrate EXPERIMENT.toml`")
    try:
        examples = e.data.load("train").examples
        sizes = _rows_of_clients(e, examples)
    except FedmllmError as error:
        return RoundTime(None, None, f"the rows cannot be read: {str(error).splitlines()[0]}")
    tokens, note = found.tokens.get(rows_key(e)), "as calibrated"
    if tokens is None:
        tokens, note = _row_tokens(e, examples)
    note = f"; rows of {tokens:.0f} tokens, {note}"
    num_passes, num_rows = _passes_of_a_round(e, sizes, tokens, device)
    if speed := found.models.get(model_key(e)):
        seconds = num_passes * speed.pass_s + num_rows * tokens * speed.token_s
        return RoundTime(seconds, num_rows * speed.encode_s, f"this model was measured on {found.device}{note}")
    rate = found.products_per_s[e.backbone.precision.base]
    operations = 4.0 * num_weights * num_rows * tokens  # forward, and backward to the activations: no frozen gradient
    about = f"at least, by matrix products on {found.device}: this model was not measured{note}"
    return RoundTime(operations / rate, None, about)


def _row_tokens(e: Experiment, examples: Sequence[Example]) -> tuple[float, str]:
    """(mean tokens of a training row, how they are known): of a sample that shows all it has, or the most that are allowed."""
    sample, counts, fault = examples[:: math.ceil(len(examples) / SAMPLE)], list[int](), "there are no rows"
    try:
        folder = base_folder(e.backbone, config_only=True)
        family = family_of(folder)
        model, processor = empty_model(folder, family), load_processor(folder, family)
        encoder = Encoder(model, processor, e.backbone.max_tokens, lambda _: False, lambda _: 0)
    except FedmllmError as error:
        sample, fault = (), str(error).splitlines()[0]
    present = visible_of("all", e.data.modalities())
    for example in sample:
        try:
            row = encoder.encode(e.prompt.render(example, present), e.prompt.target(example))
            counts.append(row.num_tokens)
        except FedmllmError as error:  # a picture that cannot be read, or a row that is too long
            fault = str(error).splitlines()[0]
    if not counts:
        return float(e.backbone.max_tokens), f"the most that are allowed, because no sample can be tokenized: {fault}"
    about = f"the mean of {len(counts)} of {len(examples)} training rows, tokenized now, nothing hidden"
    return statistics.fmean(counts), about


def _measured_on(device: torch.device) -> DeviceSpeed | None:
    """Return the measurements of the device; on a CPU with another number of threads if there is nothing else."""
    known, key = read_calibrations(), device_key(device)
    alike = [one for name, one in known.items() if name.partition(THREADS)[0] == key.partition(THREADS)[0]]
    return known.get(key) or next(iter(alike), None)


def _rows_of_clients(e: Experiment, examples: Sequence[Example]) -> list[int]:
    shards = assign(examples, e.data.modalities(), e.partition, e.scenario, e.seed)
    sizes = [len(shard.rows) for shard in shards if shard.rows]
    return [sum(sizes)] if e.method == "centralised" else sizes


def _passes_of_a_round(e: Experiment, sizes: Sequence[int], tokens: float, device: torch.device) -> tuple[float, float]:
    """(passes, rows) of a round, for clients of mean size; a stack of clients shares passes."""
    cohort = min(e.cohort_size or len(sizes), len(sizes)) if e.federates else 1
    steps = statistics.fmean(planned_steps(e.train, size) for size in sizes)
    per_step = min(e.train.batch_size * e.train.accumulation, statistics.fmean(sizes))
    rows = cohort * steps * per_step
    if not isinstance(e.engine, Stacked):
        return cohort * steps * math.ceil(per_step / e.train.batch_size), rows
    together = min(e.engine.clients, cohort)
    budget = e.engine.token_budget or (CPU_TOKENS if device.type == "cpu" else math.inf)
    fit = max(1.0, budget // tokens)  # rows of a pass
    return steps * (cohort / together) * math.ceil(together * per_step / fit), rows


def _speed(backbone: Backbone, rows: Sequence[Row], first_s: float) -> ModelSpeed:
    """Costs by a pass of one row and one of several, as in the stacked engine's passes on a CPU."""
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    small, middle = ordered[:1], ordered[len(ordered) // 2]
    many = [middle] * max(2, CPU_TOKENS // middle.num_tokens)
    short_s, long_s = _timed(backbone, small, REPEATS), _timed(backbone, many, REPEATS)
    extra = sum(row.num_tokens for row in many) - small[0].num_tokens
    token_s = max(0.0, (long_s - short_s) / extra)
    pass_s = max(0.0, short_s - small[0].num_tokens * token_s)
    return ModelSpeed(pass_s, token_s, max(0.0, first_s - short_s) / len(rows))


def _timed(backbone: Backbone, rows: Sequence[Row], repeats: int) -> float:
    """Seconds of the fastest of some training passes; the weights stay as they are."""

    def step() -> None:
        nll_B, tokens_B = backbone.loss(backbone.collate(rows), list(range(len(rows))))
        torch.autograd.grad((nll_B / tokens_B).sum(), list(backbone.trainable().values()), allow_unused=True)

    return _fastest(step, repeats, torch.device(backbone.device))


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product in this type."""
    weight = torch.randn(SIDE, SIDE, device=device).to(dtype)
    tokens = torch.randn(PRODUCT_TOKENS, SIDE, device=device).to(dtype)
    seconds = _fastest(lambda: torch.mm(tokens, weight), 3, device)
    return 2.0 * PRODUCT_TOKENS * SIDE * SIDE / seconds


def _fastest(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _write(devices: Mapping[str, DeviceSpeed]) -> None:
    path = calibration_file()
    with writing(path):
        make_folder(path.parent)
    table = {name: {k: v for k, v in asdict(one).items() if k != "device"} for name, one in devices.items()}
    write_atomically(path, json.dumps({"format": _FORMAT, "devices": table}, indent=1))


def _processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that it does not name
        return platform.processor() or platform.machine()


def _digest(table: Any) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]
