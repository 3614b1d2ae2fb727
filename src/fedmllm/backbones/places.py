"""Folder of a backbone's base model."""

from __future__ import annotations

from pathlib import Path

from fedmllm.backbones.base import BackboneSpec, FromFolder, Tiny
from fedmllm.backbones.folder import find_folder
from fedmllm.backbones.tiny import CHECKPOINTS
from fedmllm.core.errors import ConfigError


def base_folder(spec: BackboneSpec, config_only: bool = False) -> Path:
    """The folder of the base model; one of the hub is fetched.

    Args:
        spec: Settings of the backbone.
        config_only: Fetch config.json alone.

    Raises:
        ConfigError: The backbone is not one with a folder.
        FedmllmError: There is no such folder.
    """
    if isinstance(spec, Tiny):
        return CHECKPOINTS[spec.edition]
    if not isinstance(spec, FromFolder):
        raise ConfigError(f"backbone.name: got {spec.name!r}; this command needs 'hf' or 'tiny'")
    return find_folder(spec.path, config_only)
