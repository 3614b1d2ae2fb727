"""Adapters of a run as PEFT folders."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fedmllm.backbones.base import Backbone
from fedmllm.backbones.frozen import installed, save_as
from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import sync
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


def adapter_config(backbone: Backbone) -> bytes:
    """Return `adapter_config.json` as the backbone writes it beside its adapter."""
    with tempfile.TemporaryDirectory() as folder:
        backbone.save(Path(folder))
        return (Path(folder) / CONFIG).read_bytes()


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise what the disk refuses as an error that names the place."""
    try:
        yield
    except OSError as error:
        raise FedmllmError(f"{place}: cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FedmllmError(f"{place}: cannot be written: {error}") from error
