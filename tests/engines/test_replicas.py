"""The stacked engine over several devices: two and three copies of the model on the CPU, each with a thread of its own."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as safetensors_load

from fedmllm.algorithms.base import Aggregator
from fedmllm.algorithms.feddyn import FedDyn
from fedmllm.algorithms.scaffold import Scaffold
from fedmllm.backbones.base import Lora, Precision, Tiny
from fedmllm.config import engine as engines
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, DataError, FedmllmError
from fedmllm.core.types import ClientUpdate, Example, Params, Sent
from fedmllm.federation.client import Clients
from fedmllm.federation.client_state import ClientStateStore
from fedmllm.federation.engines.stacked.engine import StackedEngine
from fedmllm.federation.engines.stacked.replicas import ReplicaEngine, clients_by_device, find_replica_devices, start
from fedmllm.runs.run import run
from fedmllm.scenarios.modalities.completion import Completer
from support.runs import Stop, events
from support.small_federation import (
    COHORT,
    SIZES,
    assert_same,
    at,
    federation,
    flat,
    one_after_another,
    stirred,
    together,
)

CPUS = ("cpu", "cpu")


def clients_of(examples: list[Example], lora: Lora | None = None, device: str = "cpu") -> Clients:
    """The small federation in float64, with the experiment from which copies of its model are loaded."""
    tiny = Tiny(precision=Precision(base="float64"), lora=lora or Lora(), device=device)
    experiment = Experiment(data="synthetic-irony", backbone=tiny)
    return replace(federation(tiny.load(0), examples), experiment=experiment)


def on_devices(
    federation_: Clients, sents: dict[int, Sent], devices: Sequence[str] = CPUS, **settings: int
) -> list[ClientUpdate]:
    engine = start(engines.Stacked(devices=tuple(devices), **settings), federation_)
    assert isinstance(engine, ReplicaEngine)
    return list(engine(at(), sents))


def same_bytes(a: Sequence[ClientUpdate], b: Sequence[ClientUpdate]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.client == other.client
        assert one.metrics["loss"] == other.metrics["loss"]
        assert all(torch.equal(one.delta[name], other.delta[name]) for name in one.delta)


@pytest.mark.parametrize("num_devices", [2, 3, 7])
def test_updates_of_one_device(examples: list[Example], num_devices: int) -> None:
    """In the cohort's order, and twice the same bytes; with more devices than clients, too."""
    clients = clients_of(examples)
    begin = stirred(clients.backbone)
    sents = {client: Sent(begin) for client in COHORT}
    updates = on_devices(clients, sents, ["cpu"] * num_devices)
    assert_same(one_after_another(clients, begin), updates)
    assert_same(together(clients, begin), updates)
    same_bytes(updates, on_devices(clients, sents, ["cpu"] * num_devices))


def test_threads_and_copies(examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices compute at the same time, each with a model of its own, which is loaded once."""
    clients = clients_of(examples)
    engine = start(engines.Stacked(devices=CPUS), clients)
    meet, seen = threading.Barrier(2, timeout=60), {}
    train = StackedEngine._train

    def met(self: StackedEngine, *arguments: object) -> list[ClientUpdate]:
        meet.wait()  # one after another, the first would wait in vain
        seen[threading.get_ident()] = self._backbone
        return train(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StackedEngine, "_train", met)
    begin = {client: Sent(stirred(clients.backbone)) for client in COHORT}
    list(engine(at(1), begin))
    first = set(map(id, seen.values()))
    list(engine(at(2), begin))
    assert len(first) == 2
    assert set(map(id, seen.values())) == first


def test_one_client_needs_no_copy(examples: list[Example]) -> None:
    clients = replace(clients_of(examples), experiment=None)  # a copy could not be loaded
    begin = stirred(clients.backbone)
    (update,) = on_devices(clients, {1: Sent(begin)})
    same_bytes(together(clients, begin, cohort=[1]), [update])
    with pytest.raises(FedmllmError, match="belong to no experiment"):
        on_devices(clients, {1: Sent(begin), 2: Sent(begin)})


def test_mixed_ranks_and_turns(examples: list[Example]) -> None:
    """Clients of rank 8, 1 and 3 that train different factors, two adapters a device at a time."""
    clients = clients_of(examples)
    begin = stirred(clients.backbone)
    trains = [None, frozenset(n for n in begin if ".lora_B." in n), None]

    def of_rank(rank: int) -> Params:
        return {n: (t[:rank] if ".lora_A." in n else t[:, :rank]).clone() for n, t in begin.items()}

    sents = {client: Sent(of_rank((8, 1, 3)[client % 3]), trains[client % 3]) for client in COHORT}
    assert_same(one_after_another(clients, sents), on_devices(clients, sents, clients=2), largest=1e-10)
    assert_same(one_after_another(clients, sents), on_devices(clients, sents, clients=1), largest=1e-10)


@pytest.mark.parametrize("aggregator", [Scaffold(), FedDyn(alpha=0.1)], ids=lambda a: a.name)
def test_client_state(examples: list[Example], aggregator: Aggregator, tmp_path: Path) -> None:
    plain = replace(clients_of(examples), aggregator=aggregator)
    begin = stirred(plain.backbone)

    def rounds(devices: Sequence[str], folder: Path) -> list[ClientUpdate]:
        params, state = begin, aggregator.init(begin)
        clients = replace(plain, state=ClientStateStore(folder))
        engine = start(engines.Stacked(devices=tuple(devices)), clients)
        for round_ in (1, 2):
            sents = {client: aggregator.sends(params, state, at(round_), client) for client in COHORT}
            updates = list(engine(at(round_), sents))
            params, state = aggregator.apply(params, state, at(round_), iter(updates))
        return updates

    assert_same(rounds((), tmp_path / "a"), rounds(CPUS, tmp_path / "b"), largest=1e-10)  # as in test_stacked_cases.py
    files = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*.safetensors")) for f in "ab"]
    assert files[0] == files[1] != []


def test_trained_modules_go_one_after_another_on_each_device(examples: list[Example]) -> None:
    clients = clients_of(examples, Lora(train_extra=("resampler",)))
    begin = clients.backbone.lora()
    engine = start(engines.Stacked(devices=CPUS), clients)
    assert "one after another" in engine.note
    updates = list(engine(at(), {client: Sent(begin) for client in COHORT}))
    assert_same(one_after_another(clients, begin), updates)


@pytest.mark.parametrize("faulty", [4, 1])  # the client with most rows is on the first device, the next on the second
def test_a_fault_is_raised_as_it_is(examples: list[Example], faulty: int) -> None:
    """A picture that is gone, on one device or the other. No thread is left, and the next round is computed as always."""
    first = sum(SIZES[:faulty])
    place = next(
        i for i in range(first, first + SIZES[faulty]) if (faulty + i - first) % 3 == 0
    )  # it shows its picture
    gone = replace(examples[place], fields={**examples[place].fields, "image": (Path("gone.png"),)})
    clients = clients_of([*examples[:place], gone, *examples[place + 1 :]])
    begin = stirred(clients.backbone)
    with pytest.raises(DataError) as one_device:
        together(clients, begin, cohort=[faulty])
    engine = start(engines.Stacked(devices=CPUS), clients)
    num_threads = threading.active_count()
    with pytest.raises(DataError) as fault:
        list(engine(at(), {client: Sent(begin) for client in COHORT}))
    assert str(fault.value) == str(one_device.value)
    assert threading.active_count() == num_threads
    others = [client for client in COHORT if client != faulty]
    updates = list(engine(at(), {client: Sent(begin) for client in others}))
    assert_same(together(clients, begin, cohort=others), updates)


def test_an_interrupt_ends_the_round(examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    clients = clients_of(examples)
    engine = start(engines.Stacked(devices=CPUS), clients)
    steps = []
    gradients = StackedEngine._gradients

    def counted(self: StackedEngine, *arguments: object) -> None:
        steps.append(self)
        gradients(self, *arguments)  # type: ignore[arg-type]

    def interrupted(tasks: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StackedEngine, "_gradients", counted)
    sents = {client: Sent(stirred(clients.backbone)) for client in COHORT}
    list(engine(at(), sents))
    whole = len(steps)
    steps.clear()
    monkeypatch.setattr("fedmllm.federation.engines.stacked.replicas.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine(at(), sents))
    assert len(steps) < whole


WHOLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 70, "num_validation": 4, "num_test": 4},
    "partition": {"name": "dirichlet", "alpha": 0.5, "num_clients": 6},
    "backbone": {"name": "tiny", "precision": {"base": "float64"}},
    "train": {"lr": 1e-3, "batch_size": 4, "accumulation": 1, "max_steps": 2},
    "cohort_size": 5,
    "num_rounds": 2,
}
MIXED = {
    "aggregator": "hetlora",
    "backbone": {**WHOLE["backbone"], "lora": {"r": 8, "ranks": [8, 2, 4]}},
}


def whole_run(
    folder: Path, devices: Sequence[str], sinks: Sequence[Stop] = (), resume: bool = False, **more: Any
) -> bytes:
    engine = {"name": "stacked", "devices": list(devices)}
    run(Experiment.parse({**WHOLE, **more, "engine": engine}), folder, sinks, resume=resume)
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("more", [{}, MIXED], ids=["equal-ranks", "mixed-ranks"])
def test_a_whole_federation(tmp_path: Path, more: dict[str, Any]) -> None:
    """The numbers of one device; the same bytes twice, also of a run that was stopped and resumed."""
    one, two = whole_run(tmp_path / "one", (), **more), whole_run(tmp_path / "two", CPUS, **more)
    a, b = safetensors_load(one), safetensors_load(two)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-12
    assert max(float(a[name].abs().max()) for name in a if "lora_B" in name) > 1e-4  # it has trained
    assert "2 devices (cpu, cpu)" in events(tmp_path / "two", "engine")[0]["note"]
    assert whole_run(tmp_path / "again", CPUS, **more) == two
    with pytest.raises(KeyboardInterrupt):
        whole_run(tmp_path / "stopped", CPUS, [Stop("round", 1)], **more)
    assert whole_run(tmp_path / "stopped", CPUS, resume=True, **more) == two
    ours, theirs = (
        [{k: v for k, v in c.items() if k != "time_s"} for r in events(tmp_path / name, "round") for c in r["clients"]]
        for name in ("stopped", "two")
    )
    assert ours == theirs


def test_a_run_that_is_resumed_on_other_devices_says_so(tmp_path: Path) -> None:
    """The record has the devices of the copies, and `resumed` names a change."""
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):
        whole_run(two, CPUS, [Stop("round", 2)])
    assert events(two)[0]["device"]["name"] == "cpu, cpu"
    shutil.copytree(two, one)
    whole_run(two, CPUS, resume=True)
    whole_run(one, (), resume=True)
    same, other = (events(folder, "resumed")[0] for folder in (two, one))
    assert not same["changed"]
    assert other["device"]["name"] == "cpu"
    assert "cpu, cpu" in str(other["changed"])


def test_rows_are_filled_before_the_threads_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion may use the model of the first device, which a thread is training with."""
    threads = set()
    fill = Completer.__call__

    def seen(self: Completer, example: Example, visible: Any, training: bool) -> Any:
        if training:
            threads.add(threading.current_thread())
        return fill(self, example, visible, training)

    monkeypatch.setattr(Completer, "__call__", seen)
    scenario = {"name": "missing", "rate": 0.5}
    data = {**WHOLE["data"], "num_validation": 20}
    more = {"scenario": scenario, "completion": "retrieve", "public": {"rows": 10}, "data": data, "num_rounds": 1}
    one = whole_run(tmp_path / "one", (), **more)
    two = whole_run(tmp_path / "two", CPUS, **more)
    a, b = safetensors_load(one), safetensors_load(two)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-12
    assert threads == {threading.main_thread()}


def test_clients_by_device() -> None:
    rows = {0: 3, 1: 9, 2: 1, 3: 0, 4: 12}
    assert clients_by_device(rows, 2, 16) == [[2, 4], [0, 1, 3]]  # 13 rows and 12
    assert clients_by_device(rows, 1, 16) == [[0, 1, 2, 3, 4]]
    assert clients_by_device({7: 2}, 3, 16) == [[7], [], []]
    assert clients_by_device(dict(reversed(rows.items())), 3, 16) == clients_by_device(rows, 3, 16)
    assert max(map(len, clients_by_device({k: 100 if k == 0 else 1 for k in range(8)}, 2, 4))) == 4
    sums = [sum(SIZES[k] for k in part) for part in clients_by_device(dict(enumerate(SIZES)), 2, 16)]
    assert all(abs(a - b) <= 1 for a, b in pairwise(sums))


def test_devices_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_replica_devices([], cpu) == [cpu]
    assert find_replica_devices(CPUS, cpu) == [cpu, cpu]
    with pytest.raises(ConfigError, match=r"engine\.devices: got 'all', but this machine has no CUDA device"):
        find_replica_devices(["all"], cpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [d.index for d in find_replica_devices(["all"], gpu)] == [1, 0, 2]
    assert [d.index for d in find_replica_devices(["cuda", "cuda:1"], torch.device("cuda"))] == [0, 1]
    with pytest.raises(ConfigError, match=r"engine\.devices: got 'cuda:3', but this machine has 3 CUDA devices"):
        find_replica_devices(["cuda:1", "cuda:3"], gpu)
    with pytest.raises(ConfigError, match=r"engine\.devices: got cuda:0, cuda:2, but the model is on cuda:1"):
        find_replica_devices(["cuda:0", "cuda:2"], gpu)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["cuda:0", "cuda"], r"engine\.devices: .*'cuda:0' is named twice"),
        (["cuda:1", "cuda:1"], r"engine\.devices: .*'cuda:1' is named twice"),
        (["cuda:0", "cpu"], r"engine\.devices: .*a CPU is too slow"),
        (["all", "cuda:0"], r"engine\.devices: .*'all' with other names; allowed"),
        (["mps"], r"engine\.devices: .*'mps' is not a known device; allowed"),
        (["auto"], r"engine\.devices: .*'auto' is not a known device; allowed"),
        ("cuda:x", r"engine\.devices: .*'cuda:x' is not a known device; allowed"),
        ("all", r'backbone\.device: got "cpu" with engine\.devices = \[\'all\'\]'),
        (["cuda:0", "cuda:1"], r'backbone\.device: got "cpu" with engine\.devices'),
    ],
)
def test_refused_settings(devices: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Experiment(data="synthetic-irony", engine={"name": "stacked", "devices": devices})


def test_other_engines_have_no_devices() -> None:
    for name in ("in-process", "flower-simulation", "flower-sites"):
        with pytest.raises(ConfigError, match=r"engine.*devices"):
            Experiment(data="synthetic-irony", engine={"name": name, "devices": ["cpu", "cpu"]})


def test_no_part_of_the_identity() -> None:
    plain = Experiment(data="synthetic-irony")
    for devices, device in ((CPUS, "cpu"), ("all", "auto"), ("all", "cuda:1"), (["cuda:1", "cuda:0"], "cuda")):
        engine = {"name": "stacked", "devices": devices}
        assert (
            Experiment(data="synthetic-irony", engine=engine, backbone=Tiny(device=device)).run_id() == plain.run_id()
        )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards(examples: list[Example]) -> None:
    clients = clients_of(examples, device="cuda:0")
    begin = stirred(clients.backbone)
    sents = {client: Sent(begin) for client in COHORT}
    updates = on_devices(clients, sents, ["cuda:0", "cuda:1"])
    assert_same(together(clients, begin), updates, largest=1e-10)
    assert all(bool(flat(update.delta).isfinite().all()) for update in updates)
