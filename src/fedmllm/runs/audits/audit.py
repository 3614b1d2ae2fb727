"""Run an audit and write its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from fedmllm.config.experiment import Experiment
from fedmllm.core.storage import check_writable, write_atomically, writing
from fedmllm.runs.audits.federation import check_auditable
from fedmllm.runs.audits.membership import extraction, lira
from fedmllm.runs.audits.one_run import one_run
from fedmllm.runs.audits.tokens import tokens
from fedmllm.runs.inputs import Inputs

Kind = Literal["tokens", "one-run", "lira", "canary"]
_SETTINGS = ("num_rounds", "cohort_size", "cohort", "seed")


def audit(
    experiment: Experiment, kind: Kind, out: str | Path | None = None, num_canaries: int = 200, num_shadows: int = 8
) -> list[dict[str, Any]]:
    """Attack an experiment.

    Args:
        experiment: What to attack; it is trained in this process.
        kind: The attack.
        out: File for the table as JSON; None = none.
        num_canaries: For one-run.
        num_shadows: For lira.

    Returns:
        The table: claim, bound, attack, caught, reason.

    Raises:
        ConfigError: The experiment cannot be audited in this way.
        FedmllmError: `out` cannot be written; this is found before the attack.
    """
    check_auditable(experiment)
    if out is not None:
        check_writable(Path(out))
    inputs = Inputs.load(experiment)
    match kind:
        case "tokens":
            rows = tokens(inputs)
        case "one-run":
            rows = [one_run(inputs, num_canaries)]
        case "lira":
            rows = lira(inputs, num_shadows)
        case "canary":
            rows = extraction(inputs)
    if out is not None:
        settings = {key: getattr(experiment, key) for key in _SETTINGS}
        settings |= {
            "train": experiment.train.model_dump(mode="json"),
            "privacy": experiment.privacy.model_dump(mode="json"),
        }
        table = {"run_id": experiment.run_id(), "kind": kind, "settings": settings, "rows": rows}
        with writing(Path(out)):
            write_atomically(Path(out), json.dumps(table, indent=1))
    return rows
