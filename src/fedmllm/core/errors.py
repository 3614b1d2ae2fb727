"""Exceptions raised by fedmllm."""

from __future__ import annotations


class FedmllmError(Exception):
    """What went wrong, where, and what is allowed: a user can act on it. Anything else that escapes is a bug."""


class ConfigError(FedmllmError):
    """A setting is unknown, misspelt or out of range. Raised before anything is loaded."""


class DataError(FedmllmError):
    """A row, file or image cannot be used; the message begins with its place (file:line or file, and the row's id)."""


class NothingToAverage(FedmllmError):
    """No update of a round can be used: the global adapter stays as it was, and the record says so."""
