"""Files of a run's folder and their names."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import write_atomically, writing

RECORD = "record.jsonl"
SUMMARY = "summary.json"
PREDICTIONS = "predictions.jsonl.gz"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def record(self) -> Path:
        """The events, one JSON line each."""
        return self.path / RECORD

    @property
    def summary(self) -> Path:
        """The rows of the result. It is written last, so a run is finished exactly if this file is there."""
        return self.path / SUMMARY

    @property
    def completion(self) -> Path:
        """Tensors that a completion has learned before training."""
        return self.path / "completion.safetensors"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """The predictions of every evaluation on the test rows (`fedmllm.runs.predictions`)."""
        return self.path / PREDICTIONS

    @property
    def client_state(self) -> Path:
        """State that clients keep from round to round."""
        return self.path / "client_state"

    def adapter(self, client: int | None = None) -> Path:
        """The PEFT folder of the result, or of one client's result for method "local"."""
        return self.path / ("adapter" if client is None else f"adapters/client-{client}")

    def client_adapters(self) -> dict[int, Path]:
        """Client -> PEFT folder, for the clients of method "local" that are finished."""
        found = {path.name.removeprefix("client-"): path for path in self.path.glob("adapters/client-*")}
        return {int(name): found[name] for name in sorted((n for n in found if n.isdecimal()), key=int)}

    @property
    def is_finished(self) -> bool:
        """True if the run has a summary."""
        return self.summary.exists()

    def remove_summary(self) -> None:
        """Delete the summary: the run is not finished any more.

        Raises:
            FedmllmError: It cannot be deleted.
        """
        with writing(self.summary):
            self.summary.unlink(missing_ok=True)

    def read_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the summary.

        Raises:
            FedmllmError: The file is not the summary of a run.
        """
        try:
            rows = json.loads(self.summary.read_bytes())["rows"]
            if not rows or not all(isinstance(row, dict) for row in rows):
                raise ValueError("no rows")
            for row in rows:
                if not (row["value"] is None or (type(row["value"]) in (int, float) and math.isfinite(row["value"]))):
                    raise ValueError(f"value: got {str(row['value'])[:60]!r}")
        except OSError as error:
            raise FedmllmError(f"{self.summary}: cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FedmllmError(
                f"{self.summary}: not a summary ({type(error).__name__}: {error}); "
                "delete it, and --resume writes it again"
            ) from None
        return list(rows)

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the summary, whole or not at all."""
        write_atomically(self.summary, json.dumps({"rows": list(rows)}, indent=1))
