"""Adapters of a run as PEFT folders."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fedmllm.backbones.base import Backbone
from fedmllm.backbones.frozen import installed, save_as
from fedmllm.core.storage import make_folder, sync, writing
from fedmllm.core.types import Params
from fedmllm.runs.checkpoint import CONFIG


def save_adapter(backbone: Backbone, params: Params, final: Path) -> None:
    """Write an adapter as the PEFT folder `final`, whole or not at all; a folder that is there is replaced.

    Raises:
        FedmllmError: The folder cannot be written.
    """
    partial = final.with_name(f".{final.name}.partial")
    with writing(final):
        shutil.rmtree(partial, ignore_errors=True)
        with installed(backbone, params):
            save_as(backbone, params, partial)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync(final.parent)


def adapter_config_json(backbone: Backbone, folder: Path) -> bytes:
    """Return `adapter_config.json` as the backbone writes it next to its adapter.

    Args:
        backbone: With an adapter.
        folder: For temporary files, which are as large as the adapter: the folder of the checkpoints, since the system's
            temporary folder may be small.

    Raises:
        FedmllmError: There is no room.
    """
    with writing(folder):
        make_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".round-config-") as temporary:
            backbone.save(Path(temporary))
            return (Path(temporary) / CONFIG).read_bytes()
