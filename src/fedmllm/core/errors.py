"""Exceptions raised by fedmllm."""

from __future__ import annotations


class FedmllmError(Exception):
    """Error that names place, value and what is allowed: a user can act on it. Anything else that escapes is a bug."""


class ConfigError(FedmllmError):
    """A setting is unknown, misspelt or out of range. Raised before anything is loaded."""


class DataError(FedmllmError):
    """A row, file or image cannot be used; the message begins with its place (file:line or file, and the row's id)."""


class Reason(str):
    """Reason of a refusal: the text for another machine, and what only this machine's own log adds.

    Attributes:
        here: For the log of this machine.
    """

    __slots__ = ("here",)
    here: str

    def __new__(cls, said: str, here: str = "") -> Reason:
        """Make a reason.

        Args:
            said: For the machine that asked; without numbers that depend on rows.
            here: For the log of this machine.
        """
        reason = super().__new__(cls, said)
        reason.here = here or getattr(said, "here", "")
        return reason

    @classmethod
    def of(cls, error: BaseException) -> Reason:
        """Return the message of an exception that was raised with a text or a reason."""
        first = error.args[0] if error.args else ""
        return first if isinstance(first, Reason) else cls(str(error))


class NothingToAverage(FedmllmError):
    """No update of a round can be used: the global adapter stays as it was, and the record says so."""
