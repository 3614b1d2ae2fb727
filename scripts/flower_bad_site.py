"""A site that sends what it should not: `python scripts/flower_bad_site.py nan|shapes|norm SITE.toml`. For trials only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from fedmllm.flower.site import process as flower_site

HARMS = {
    "nan": lambda flat: np.where(np.arange(len(flat)) == 7, np.nan, flat),
    "shapes": lambda flat: flat[:-3],
    "norm": lambda flat: np.full_like(flat, 1e6),
}


def main() -> None:
    harm, path = HARMS[sys.argv[1]], Path(sys.argv[2])
    honest = flower_site.ResidentTrainer.ask

    def dishonest(
        self: flower_site.ResidentTrainer, head: dict[str, str], adapter: bytes
    ) -> tuple[dict[str, Any], bytes]:
        said, delta = honest(self, head, adapter)
        return said, harm(np.frombuffer(delta, dtype=np.float32)).astype(np.float32).tobytes()

    flower_site.ResidentTrainer.ask = dishonest  # type: ignore[method-assign]
    flower_site.run_site(path)


if __name__ == "__main__":
    main()
