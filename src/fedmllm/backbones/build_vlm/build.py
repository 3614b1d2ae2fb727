"""Build of a small vision-language model, from parts to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedmllm.backbones.build_vlm.assemble import assemble, write_processor, write_weights
from fedmllm.backbones.build_vlm.connector import Connector, Training
from fedmllm.backbones.build_vlm.pictures import HELD_OUT, CaptionScene
from fedmllm.backbones.build_vlm.sources import Language, Tower
from fedmllm.backbones.folder import DTYPES, folder_digest, load_processor, quiet
from fedmllm.backbones.hub_kernels import without_hub_kernels
from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import write_atomically

TRAINING = "training"  # subfolder with the log and the state
_ABOUT = "build.json"


def build(
    out: Path,
    tower: Tower,
    language: Language,
    scenes: Sequence[CaptionScene],
    pictures: str,
    settings: Training,
    image_size: int = 112,
    dtype: str = "bfloat16",
    progress: Callable[[int, float], None] = lambda _step, _loss: None,
) -> dict[str, Any]:
    """Write a model folder that `backbone.path` accepts.

    Args:
        out: The folder; a stopped build in it is resumed.
        tower: The vision tower.
        language: The language model.
        scenes: Pictures for the projector, the last `HELD_OUT` of which it is evaluated on.
        pictures: Origin and licence of the pictures.
        settings: Training of the projector.
        image_size: Pixels a side of a picture in the model.
        dtype: Type of the written weights: float32 or bfloat16.
        progress: Called after each step with its number and loss.

    Returns:
        Content of `out`/build.json: sources, licences, settings, time and accuracy.

    Raises:
        ConfigError: `image_size` does not fit the tower.
        FedmllmError: `out` is a finished model, or a stopped build of other settings or sources.
    """
    if (out / "model.safetensors").exists():
        raise FedmllmError(f"{out}: is a finished model; name a folder that does not exist")
    model = assemble(tower, language, image_size, settings.seed)
    about = {
        "tower": {"from": tower.origin, "licence": tower.licence},
        "language_model": {"from": language.origin, "licence": language.licence},
        "pictures": pictures,
        "image_size": image_size,
        "num_weights": sum(p.numel() for p in model.parameters()),
    }
    held_out = min(HELD_OUT, len(scenes) // 2)
    with quiet(), without_hub_kernels():
        write_processor(model, language, out)
        processor = load_processor(out, "internvl")
        connector = Connector(model, processor, scenes[: len(scenes) - held_out], settings, out / TRAINING, about)
        connector.run(progress)
        accuracy = connector.evaluate(scenes[len(scenes) - held_out :])
        write_weights(model, out, DTYPES[dtype])
    result = {
        **about,
        "training": settings.model_dump(),
        "time_s": round(connector.time_s, 1),
        "threads": torch.get_num_threads(),
        "held_out_token_accuracy": round(accuracy, 4),
        "dtype": dtype,
        "digest": folder_digest(out),
    }
    write_atomically(out / _ABOUT, json.dumps(result, indent=2) + "\n")
    return result
