"""Write docs/settings.md: `python scripts/settings_page.py [--check]`.

Every table and member of an experiment, with the keys as `fedmllm explain` describes them. `--check` changes nothing and
exits with 1 if the page is not current.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

from fedmllm.cli.settings import allowed_values, default_value, dotted_keys, source_file
from fedmllm.config.experiment import FAMILIES, Experiment
from fedmllm.core.spec import Spec

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/settings.md"
HEAD = """\
# Settings

<!-- written by scripts/settings_page.py -->

All keys of an experiment file. `fedmllm explain TABLE` or `fedmllm explain FAMILY.MEMBER` prints the same for one of
them, members from plug-ins included; `fedmllm schema` prints a JSON Schema for editors.
"""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def row(key: str, part: dict[str, Any]) -> str:
    default = default_value(part)
    default = default if part.get("default") is None else f"`{default}`"
    meaning = part.get("description", "")
    return f"| `{key}` | {cell(allowed_values(part))} | {cell(default)} | {cell(meaning)} |"


def table(kind: type[Spec]) -> str:
    """The keys as a Markdown table."""
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    rows += [row(key, part) for key, part in dotted_keys(kind)]
    return "\n".join(rows) if len(rows) > 2 else "It has no keys."


def section(level: int, title: str, kind: type[Spec], with_keys: bool = True) -> str:
    about = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    parts = [f"{'#' * level} {title}", f"{about} Source: `src/{source_file(kind)}`."]
    return "\n\n".join([*parts, table(kind)] if with_keys else parts)


def page() -> str:
    fields = Experiment.model_fields
    tables = {key: f.annotation for key, f in fields.items() if key not in FAMILIES}
    nested = {key: kind for key, kind in tables.items() if isinstance(kind, type) and issubclass(kind, Spec)}
    properties = Experiment.model_json_schema()["properties"]
    top = ["| key | values | default | meaning |", "|---|---|---|---|"]
    top += [row(key, properties[key]) for key in tables.keys() - nested.keys()]
    parts = [HEAD, "## Top level", "\n".join([*top[:2], *sorted(top[2:])])]
    parts += [section(2, f"`[{key}]`", kind) for key, kind in nested.items()]
    for key, family in FAMILIES.items():
        parts.append(section(2, f"`[{key}]`", family, with_keys=False))
        for name, member in sorted(family.members.items()):
            if member.__module__.startswith("fedmllm."):
                parts.append(section(3, f"`{name}`", member))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/settings.md from the settings.")
    parser.add_argument("--check", action="store_true", help="only check that the page is current")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/settings.md is not current; run scripts/settings_page.py")


if __name__ == "__main__":
    main()
