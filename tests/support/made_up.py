"""Records of runs that never took place, in the form in which `runs.run` writes them: to test what reads records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedmllm.config.experiment import Experiment

LEVEL = {"aligned": 0.95, "missing": 0.75, "cross": 0.65, "hybrid": 0.8}
SKILL = {
    "zero-shot": -0.35,
    "local": -0.15,
    "fedavg": 0.0,
    "fedadam": 0.02,
    "fedyogi": 0.015,
    "fedavgm": -0.04,
    "fedadagrad": -0.06,
}


def write_run(folder: Path, experiment: Experiment, num_clients: int = 10) -> None:
    """`record.jsonl` and `summary.json` of a made-up run; its numbers depend on its settings alone."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(experiment.run_id(), 16) % 2**32)
    head = {"scenario": experiment.scenario.name, "setting": experiment.setting(), "method": experiment.method_name()}
    final = LEVEL[head["scenario"]] + SKILL.get(head["method"].split("+")[0], 0) + 0.02 * rng.standard_normal()
    if experiment.method == "zero-shot":
        final = 0.53
    final = min(1.0, final)
    events: list[dict[str, Any]] = [_heading(experiment, rng, num_clients)]
    sent = client_s = 0.0
    federated = experiment.method == "federated"
    rounds = experiment.num_rounds if federated else 0
    for round_ in range(1, rounds + 1):
        clients = [
            {
                "client": c,
                "num_examples": 60,
                "norm": 0.2,
                "loss": 1 / round_,
                "num_steps": 15,
                "num_tokens": 5000,
                "time_s": 0.4,
            }
            for c in sorted(rng.choice(num_clients, 2, replace=False).tolist())
        ]
        sent, client_s = sent + 262144, client_s + 0.8
        sizes = dict.fromkeys(("up_bytes", "up_lora_bytes", "down_bytes", "down_lora_bytes"), 262144)
        about = {"round": round_, "cohort": [c["client"] for c in clients], "clients": clients, "dropped": [], **sizes}
        events.append({"event": "round", **about, "server_s": 0.01, "wall_s": 0.82, "lr": 1e-3, "num_rounds": rounds})
        if experiment.evaluate.every and round_ % experiment.evaluate.every == 0 and round_ < rounds:
            value = 0.5 + (final - 0.5) * round_ / rounds + 0.02 * rng.standard_normal()
            events += [_eval(v, value, round=round_) for v in experiment.evaluate.visible]
    about = {"round": rounds} if federated else {}
    events += [_eval(v, final, **about) for v in experiment.evaluate.visible]
    cost = {
        "num_rounds": rounds,
        **dict.fromkeys(("up_bytes", "down_bytes", "up_lora_bytes", "down_lora_bytes"), int(sent)),
    }
    cost |= {"client_s": client_s, "server_s": 0.1, "num_tokens": 10000 * rounds, "wall_s": 20.0}
    cost |= {"peak_host_bytes": 9 * 10**8, "peak_device_bytes": 0}
    rows = []
    for visible in experiment.evaluate.visible:
        for metric, value in _metrics(visible, final).items():
            about = {"metric": metric, "value": value, "std": None, "n": 1, "visible": visible}
            words = {**head, "prompt": experiment.prompt.name, "seed": experiment.seed}
            rows.append({**words, **about, **cost, "run_id": experiment.run_id()})
    events.append({"event": "end", "num_rows": len(rows)})
    (folder / "record.jsonl").write_text("".join(json.dumps({**e, "time": 0.0}) + "\n" for e in events))
    (folder / "summary.json").write_text(json.dumps({"rows": rows}))


def _metrics(visible: str, value: float) -> dict[str, float]:
    seen = value if visible in ("both", "all") else 0.5 + (value - 0.5) * 0.4
    return {"auc": seen, "auc_hard": seen - 0.05, "accuracy": seen - 0.06, "unparsed": 0.0}


def _eval(visible: str, value: float, **about: Any) -> dict[str, Any]:
    return {
        "event": "eval",
        "visible": visible,
        "metrics": _metrics(visible, value),
        "num_rows": 300,
        "wall_s": 1.0,
        **about,
    }


def _heading(experiment: Experiment, rng: np.random.Generator, num_clients: int) -> dict[str, Any]:
    clients = []
    for client in range(num_clients):
        ironic, other = (int(n) for n in rng.integers(0, 60, size=2))
        shows: dict[str, int] = {"image+text": ironic + other}
        if experiment.scenario.name == "cross":
            shows = {"image" if client % 2 else "text": ironic + other}
        elif experiment.scenario.name != "aligned":
            shows = {"image": ironic, "text": other // 2, "image+text": other - other // 2, "none": 2}
        clients.append({"client": client, "labels": {"ironic": ironic, "not-ironic": other}, "shows": shows})
    return {
        "event": "experiment",
        "run_id": experiment.run_id(),
        "settings": experiment.model_dump(mode="json"),
        "versions": dict.fromkeys(("fedmllm", "torch", "transformers", "peft", "numpy"), "1.0"),
        "device": {"name": "cpu", "machine": "x86_64", "python": "3.11"},
        "digests": {"partition": "0" * 16, "base": "0" * 64},
        "num_train": 800,
        "num_test": 300,
        "rows_per_client": [sum(c["labels"].values()) for c in clients],
        "clients": clients,
        "num_skipped": 0,
        "skipped": [],
    }
