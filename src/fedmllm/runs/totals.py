"""What a run has cost so far. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt

from fedmllm.core.spec import Spec


class Totals(Spec):
    """Sums over the rounds of a run."""

    num_rounds: NonNegativeInt = 0
    up_bytes: NonNegativeInt = 0
    down_bytes: NonNegativeInt = 0
    up_lora_bytes: NonNegativeInt = 0
    down_lora_bytes: NonNegativeInt = 0
    num_tokens: NonNegativeInt = 0
    client_s: NonNegativeFloat = 0.0
    server_s: NonNegativeFloat = 0.0

    def plus(self, log: Mapping[str, Any]) -> Totals:
        """With the round that `log` (`Progress.log`) tells of. A site may keep its tokens and seconds to itself."""
        return Totals(
            num_rounds=self.num_rounds + 1,
            up_bytes=self.up_bytes + log["up_bytes"],
            down_bytes=self.down_bytes + log["down_bytes"],
            up_lora_bytes=self.up_lora_bytes + log["up_lora_bytes"],
            down_lora_bytes=self.down_lora_bytes + log["down_lora_bytes"],
            num_tokens=self.num_tokens + sum(int(c.get("num_tokens", 0)) for c in log["clients"]),
            client_s=self.client_s + sum(c.get("time_s", 0.0) for c in log["clients"]),
            server_s=self.server_s + log["server_s"],
        )
