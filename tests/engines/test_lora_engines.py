"""LoRA methods through engines and runs: equal engines at unequal ranks, resume, adapters that PEFT loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from fedmllm.algorithms.base import Aggregator
from fedmllm.backbones.base import Tiny
from fedmllm.backbones.frozen import installed
from fedmllm.backbones.hf import TransformersBackbone
from fedmllm.config.experiment import Experiment
from fedmllm.core.types import ClientUpdate, Example, Params, Round, State
from fedmllm.federation.client_state import ClientStateStore
from fedmllm.runs.events import Evaluated, Event, RoundEnd
from fedmllm.runs.record import read
from fedmllm.runs.run import run
from support.small_federation import COHORT, SIZES, assert_same, federation, flat, one_after_another, stirred, together

Load = Callable[..., TransformersBackbone]
Engine = Callable[..., list[ClientUpdate]]
PARTIAL = [
    "ffa-lora",
    "rolora",
    "fedsa-lora",
    "fedrot-lora",
    "lora-fair",
    "lora-fair-reference",
    "fedsvd",
    "fedex-lora",
    "fedalt",
]
ONE_ROUND = {"yoco": "principal", "yoco-reference": "principal-b"}  # and how their adapters start
RANKED = ["flora", "flexlora", "raflora", "florist", "hetlora", "fedilora", "fed-plora"]
PRUNED = "hetlora, pruned"
RANKS = (2, 8, 3)


def lora(name: str) -> dict[str, Any]:
    return {"lora": {"ranks": list(RANKS)}} if name in (*RANKED, PRUNED) else {}


def table_of(name: str) -> dict[str, Any]:
    """The aggregator's table. A weight as large as 10 makes tails fall in three rounds."""
    return {"name": "hetlora", "tail_penalty": 10.0, "tail_from": 0.7} if name == PRUNED else {"name": name}


@pytest.mark.parametrize("name", [*PARTIAL, *RANKED, PRUNED, *ONE_ROUND])
def test_engines_agree_in_two_rounds(load: Load, examples: list[Example], name: str, tmp_path: Path) -> None:
    """Unequal ranks in one pass, resting and kept factors, frozen adapters of their own: float64, as in test_stacked.py."""
    plain, aggregator = federation(load("tiny"), examples), Aggregator.pick(table_of(name), "aggregator")
    start = stirred(plain.backbone)
    ranks = RANKS if name in (*RANKED, PRUNED) else ()

    def rounds(engine: Engine, folder: Path) -> tuple[list[ClientUpdate], Params, State]:
        params, state = start, aggregator.init(start)
        clients = replace(plain, aggregator=aggregator, state=ClientStateStore(folder))
        for number in (1, 2):
            at = Round(number, 0, 4, tuple(COHORT), len(SIZES), ranks)
            sents = {client: aggregator.sends(params, state, at, client) for client in COHORT}
            updates = engine(clients, sents, round_=number)
            if number == 1:
                params, state = aggregator.apply(params, state, at, iter(updates))
        return updates, params, state

    first = Round(1, 0, 4, tuple(COHORT), len(SIZES), ranks)
    begin, state = start, aggregator.init(start)
    clients = replace(plain, aggregator=aggregator, state=ClientStateStore(tmp_path / "c"))
    sents = {client: aggregator.sends(begin, state, first, client) for client in COHORT}
    if name not in ONE_ROUND:  # see below
        alone, stacked = (engine(clients, sents, round_=1) for engine in (one_after_another, together))
        assert_same(alone, stacked, largest=1e-12)
    # The second round starts from one engine's first, so that only a round's own rounding counts.
    expected, params, state = rounds(one_after_another, tmp_path / "a")
    if name == PRUNED:
        assert len({u.delta[n].shape for u in expected for n in u.delta if "lora_A" in n}) > 2
        assert state["pruned"]["ranks"].any()
    clients = replace(plain, aggregator=aggregator, state=ClientStateStore(tmp_path / "a", finished=1))
    at = Round(2, 0, 4, tuple(COHORT), len(SIZES), ranks)
    updates = together(clients, {client: aggregator.sends(params, state, at, client) for client in COHORT})
    # yoco starts at gradients near 0, where AdamW makes lr / eps = 1e5 times 1e-14 of rounding: 9e-10 on one processor
    assert_same(expected, updates, largest=3e-9 if name == "yoco" else 1e-10)
    assert bool(flat(updates[4].delta).any())


TABLE: dict[str, Any] = {
    "data": {"name": "synthetic-irony", "num_train": 36, "num_validation": 4, "num_test": 4},
    "partition": {"name": "iid", "num_clients": 4},
    "train": {"lr": 1e-2, "batch_size": 4, "accumulation": 1, "max_steps": 2},
    "num_rounds": 3,
    "cohort_size": 2,
}


class Stop:
    def __init__(self, number: int, kind: type[Event] = RoundEnd) -> None:
        self.left, self.kind = number, kind

    def __call__(self, event: Event) -> None:
        self.left -= isinstance(event, self.kind)
        if self.left == 0:
            self.left = -1
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", [*PARTIAL, *RANKED, PRUNED])
def test_resumed_after_every_round_a_run_ends_with_the_same_bytes_and_peft_loads_it(name: str, tmp_path: Path) -> None:
    settings = Experiment.parse({**TABLE, "aggregator": table_of(name), "backbone": {"name": "tiny", **lora(name)}})
    run(settings, tmp_path / "whole")
    files = sorted((tmp_path / "whole").glob("adapter*/**/*.safetensors"))
    assert len(files) == (4 if name in ("fedsa-lora", "fedalt") else 1)
    stops = {1: Stop(2), 2: Stop(3), 3: Stop(1, Evaluated)}  # the last checkpoint is of this round
    for finished, stop in stops.items():
        folder = tmp_path / f"after-{finished}"
        with pytest.raises(KeyboardInterrupt):
            run(settings, folder, [stop])
        run(settings, folder, resume=True)
        (again,) = [event for event in read(folder / "record.jsonl") if event["event"] == "resumed"]
        assert again["round"] == finished
        for path in files:
            assert path.read_bytes() == (folder / path.relative_to(tmp_path / "whole")).read_bytes()
    rounds = [event for event in read(tmp_path / "whole" / "record.jsonl") if event["event"] == "round"]
    if name in ("fedsa-lora", "fedalt"):
        assert "aggregation_error" not in rounds[-1]
        assert "no global model" in rounds[-1]["aggregation_note"]
    elif name in ("ffa-lora", "rolora", "fedsvd", "flora", "fedex-lora"):
        assert max(event["aggregation_error"] for event in rounds) < 1e-5  # float32; exact otherwise
    else:
        assert all(0 <= event["aggregation_error"] < 1.5 for event in rounds)
    cuts = name in ("flexlora", "raflora", "florist")
    assert all(("truncation_error" in event) == cuts and event.get("truncation_error", 0) < 1 for event in rounds)
    assert all(event["result_rank"] >= 1 for event in rounds if "aggregation_note" not in event)
    if name == PRUNED:
        sizes = {(c["client"], c["down_bytes"]) for event in rounds for c in event["clients"]}
        assert len(sizes) > len({client for client, _ in sizes})  # some client received less in a later round
    trained = rounds[0]["cohort"][0]
    same_logits_by_peft(next(f.parent for f in files if f.parent.name in ("adapter", f"client-{trained}")), settings)


def same_logits_by_peft(folder: Path, settings: Experiment) -> None:
    """PEFT's own reading of the folder gives the losses and scores of the adapter that was evaluated, to 1e-4 in float32."""
    from safetensors.torch import load_file

    backbone, other = (Tiny(lora=settings.backbone.lora).load(0) for _ in range(2))
    assert isinstance(backbone, TransformersBackbone)
    assert isinstance(other, TransformersBackbone)
    rows = settings.data.load("test").examples
    encoded = [backbone.encode(settings.prompt.render(r, frozenset(r.fields)), settings.prompt.target(r)) for r in rows]
    with installed(backbone, load_file(folder / "adapter_model.safetensors")), torch.no_grad():
        ours, _ = backbone.loss(backbone.collate(encoded))
        our_scores = scores_of(backbone, settings, rows)
    assert isinstance(other.model, PeftModel)
    base = other.model.unload()
    theirs_model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        theirs, _ = other.loss(other.collate(encoded))
        their_scores = scores_of(other, settings, rows)
    assert len([m for m in theirs_model.modules() if hasattr(m, "lora_A")]) > 0
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(our_scores, their_scores, atol=1e-4)
    with torch.no_grad(), installed(backbone, Tiny(lora=settings.backbone.lora).load(0).lora()):
        untrained, _ = backbone.loss(backbone.collate(encoded))
    assert not torch.allclose(ours, untrained, atol=1e-4)


def scores_of(backbone: TransformersBackbone, settings: Experiment, rows: Sequence[Example]) -> torch.Tensor:
    """Log-likelihoods of the options of each row, as an evaluation takes them from the logits."""
    asked = [settings.prompt.render(row, frozenset(row.fields)) for row in rows]
    return torch.tensor(backbone.score(asked, [settings.prompt.options(row) for row in rows]), dtype=torch.float64)


@pytest.mark.parametrize("name", ONE_ROUND)
def test_one_round_ends_with_an_adapter_that_peft_loads(name: str, tmp_path: Path) -> None:
    lora = {"init": ONE_ROUND[name], "r": 4, "alpha": 2.0}
    table = {**TABLE, "aggregator": name, "num_rounds": 1, "backbone": {"name": "tiny", "lora": lora}}
    settings = Experiment.parse(table)
    run(settings, tmp_path)
    (entry,) = [event for event in read(tmp_path / "record.jsonl") if event["event"] == "round"]
    assert entry["result_rank"] == (8 if name == "yoco" else 4)
    assert entry["down_bytes"] == (2 if name == "yoco" else 1) * entry["up_bytes"]
    backbone = settings.backbone.load(0)
    assert isinstance(backbone, TransformersBackbone)
    layer = next(module for module in backbone.model.modules() if isinstance(module, LoraLayer))
    u, s, vt = torch.linalg.svd(layer.get_base_layer().weight.detach().double(), full_matrices=False)
    b, a = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_B", "lora_A"))
    if name == "yoco":
        assert torch.allclose(b @ a, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)
    assert torch.allclose(b @ b.mT, (u[:, :4] * s[:4]) @ u[:, :4].mT, atol=1e-5)
    same_logits_by_peft(tmp_path / "adapter", settings)


@pytest.mark.parametrize("stop", [None, 2, 4])
def test_own_rows_of_a_resumed_run_are_those_of_the_unbroken_one(stop: int | None, tmp_path: Path) -> None:
    """The summary's columns about each client's own test rows, after a stop in the federation or in a client's training."""
    table = {**TABLE, "method": "personal", "data": {**TABLE["data"], "num_test": 24}}
    whole = run(Experiment.parse(table), tmp_path / "whole")
    if stop:
        with pytest.raises(KeyboardInterrupt):
            run(Experiment.parse(table), tmp_path / "run", [Stop(stop)])
        again = run(Experiment.parse(table), tmp_path / "run", resume=True)
        assert [one["own_value"] for one in again if "own_value" in one] == [
            one["own_value"] for one in whole if "own_value" in one
        ]
        return
    evals = [event for event in read(tmp_path / "whole" / "record.jsonl") if event["event"] == "eval"]
    globally, *personal = evals
    assert [one["client"] for one in globally["own"]] == [0, 1, 2, 3]  # the global adapter on every client's rows
    assert [[one["client"] for one in event["own"]] for event in personal] == [[0], [1], [2], [3]]
    assert sum(one["num_rows"] for one in globally["own"]) == 24
    (row,) = [one for one in whole if one["metric"] == "accuracy"]
    values = [event["own"][0]["metrics"]["accuracy"] for event in personal]
    assert row["own_value"] == pytest.approx(sum(values) / 4)
    assert row["own_n"] == 4
    assert {one["metric"] for one in whole}.isdisjoint({"own"})


@pytest.mark.parametrize("stop", [None, 2, 4])
def test_personal_fine_tunes_each_client_from_the_global_adapter(stop: int | None, tmp_path: Path) -> None:
    """Stopped in the federation and in a client's own training: the same bytes."""
    table = {**TABLE, "aggregator": "scaffold", "method": "personal", "personal": {"rounds": 2, "mu": 0.1}}
    settings = Experiment.parse(table)
    assert settings.method_name() == "personal-scaffold"
    run(settings, tmp_path / "whole")
    if stop:
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "run", [Stop(stop)])
        run(settings, tmp_path / "run", resume=True)
        files = sorted((tmp_path / "whole").glob("adapter*/**/*.safetensors"))
        assert len(files) == 5
        for path in files:
            assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "whole")).read_bytes()
        return
    federated = Experiment.parse({**TABLE, "aggregator": "scaffold"})
    run(federated, tmp_path / "federated")
    one, two = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "federated"))
    assert one.read_bytes() == two.read_bytes()
    events = [event for event in read(tmp_path / "whole" / "record.jsonl") if event["event"] in ("round", "eval")]
    assert [event.get("client") for event in events if event["event"] == "eval"] == [None, 0, 1, 2, 3]
    alone = [event for event in events if event["event"] == "round" and event.get("client") == 0]
    assert [event["cohort"] for event in alone] == [[0], [0]]


@pytest.mark.parametrize("engine", ["stacked", "in-process"])
def test_ranks_by_a_column_are_those_that_the_clients_train(engine: str, tmp_path: Path) -> None:
    """Three sites whose rows state 2, 4 and 64, the last one above `lora.r`: bytes and result are those of ranks in turn."""
    limits = {"east": 2, "north": 4, "west": 64}
    note, answer = ("well", "fever"), ("no", "yes")
    lines = [f"{s}-{i},{note[i % 2]},{answer[i % 2]},{s},{limits[s]}" for s in limits for i in range(4)]
    (tmp_path / "rows.csv").write_text("\n".join(["case,note,ill,site,limit", *lines]) + "\n")
    columns = {"id": "case", "text": "note", "answer": "ill", "client": "site", "keep": ["limit"]}
    data = {"name": "table", "root": str(tmp_path), "train": "rows.csv", "test": "rows.csv", "columns": columns}
    table = {
        "data": data | {"question": "Is it ill?", "choices": ["no", "yes"]},
        "train": TABLE["train"], "num_rounds": 2, "aggregator": "fedilora", "engine": engine,
    }  # fmt: skip
    found = {}
    for name, lora in (("column", {"rank_column": "limit"}), ("ranks", {"ranks": [2, 4, 8]})):
        run(Experiment.parse({**table, "backbone": {"name": "tiny", "lora": {**lora, "r": 8}}}), tmp_path / name)
        rounds = [event for event in read(tmp_path / name / "record.jsonl") if event["event"] == "round"]
        found[name] = [[(c["up_bytes"], c["down_bytes"], c["norm"]) for c in event["clients"]] for event in rounds]
    east, north, west = (up for up, _, _ in found["column"][0])
    assert 4 * east == 2 * north == west
    assert found["column"] == found["ranks"]
    one, two = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in found)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", ["ffa-lora", "rolora"])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_run_whose_optimizer_has_no_state_of_a_resting_factor_is_resumed(
    name: str, stop: int, tmp_path: Path
) -> None:
    """The optimizer makes `m` in its first round, for the factor that moved."""
    settings = Experiment.parse({**TABLE, "aggregator": {"name": name, "server": "fedadam-reference"}})
    run(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "stopped", [Stop(stop)])
    run(settings, tmp_path / "stopped", resume=True)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
