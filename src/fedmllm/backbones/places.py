"""Where the base model of a specification lies."""

from __future__ import annotations

from pathlib import Path

from fedmllm.backbones.base import BackboneSpec, FromFolder, Tiny
from fedmllm.backbones.folder import find
from fedmllm.backbones.tiny import CHECKPOINT
from fedmllm.core.errors import ConfigError


def base_folder(spec: BackboneSpec, config_only: bool = False) -> Path:
    """The folder of the base model; of a hub id it is fetched, where `config_only` config.json alone."""
    if isinstance(spec, Tiny):
        return CHECKPOINT
    if not isinstance(spec, FromFolder):
        raise ConfigError(f"backbone.name: got {spec.name!r}; this verb knows 'hf' and 'tiny'")
    return find(spec.path, config_only)
