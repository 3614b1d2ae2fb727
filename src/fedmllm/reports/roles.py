"""Roles of runs in a comparison: method, control, bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmllm.core.errors import ConfigError
from fedmllm.scenarios.modalities.completion import Completion, Role, strictest

EVERY_ROLE: tuple[Role, ...] = ("method", "control", "bound")
ROLE_TEXT: Mapping[Role, str] = {
    "control": "control: shows what a part of a method adds",
    "bound": "bound: trained with content that the masks hide",
}


def role_of(heading: Mapping[str, Any], settings: Mapping[str, Any]) -> Role:
    """Return the role of a run, as its record states it; of an older record, as its settings give it.

    Args:
        heading: First line of the record.
        settings: Of the run.
    """
    if stated := [role for role in EVERY_ROLE if role == heading.get("role")]:
        return stated[0]
    public = settings.get("public") or {}
    return strictest([_completion_role(settings.get("completion")), "control" if public.get("client") else "method"])


def _completion_role(table: Any) -> Role:
    name = table.get("name") if isinstance(table, Mapping) else table
    if name not in Completion.members:  # older records have no completion
        return "method"
    try:
        return Completion.pick(table, "completion").role()
    except ConfigError:  # settings of another version
        return "method"
