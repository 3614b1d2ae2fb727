"""Public names that more than one module of the package defines.

Exits with 1 if there are `LIMIT` or more, so that a name leads to one place.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src/fedmllm"
LIMIT = 10


def defined(tree: ast.Module) -> set[str]:
    """Public names of the classes, functions and constants at the top level of a module."""
    names: set[str] = set()
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names.update(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return {name for name in names if not name.startswith("_")}


def main() -> int:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        for name in defined(ast.parse(path.read_text(encoding="utf-8"))):
            places[name].append(str(path.relative_to(SOURCE)))
    repeated = {name: found for name, found in sorted(places.items()) if len(found) > 1}
    for name, found in repeated.items():
        print(f"{name}: {', '.join(found)}")
    print(f"{len(repeated)} public names are defined in more than one module; fewer than {LIMIT} are allowed")
    return int(len(repeated) >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
