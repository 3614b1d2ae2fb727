"""Write what README.md lists of the code: `python scripts/readme_tree.py [--check]`.

Two parts between markers: the members of each family, and the packages of `src/fedmllm` with the first sentence of their
docstrings, top layer first. `--check` changes nothing and exits with 1 if README.md is not current.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from pathlib import Path

from fedmllm.config.experiment import FAMILIES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/fedmllm"
README = ROOT / "README.md"


def first_sentence(package: Path) -> str:
    """The first sentence of the package's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    return re.split(r"\.(?:\s|$)", docstring, maxsplit=1)[0]


def layers() -> list[str]:
    """The packages in the order of the import contract: each may import only those below it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    top = next(c for c in contracts if c["type"] == "layers" and c["containers"] == ["fedmllm"])
    return [name for layer in top["layers"] for name in re.findall(r"\w+", layer)]


def tree() -> str:
    """One line per package."""
    packages = [name for name in layers() if (PACKAGE / name).is_dir()]
    width = max(map(len, packages)) + 1
    lines = [f"{name + '/':{width}}  {first_sentence(PACKAGE / name)}" for name in packages]
    return "\n".join(["```", *lines, "```"])


def members() -> str:
    """One table row per family: its members, and the files that define them."""
    rows = ["| table | members | where |", "|---|---|---|"]
    for key, family in FAMILIES.items():
        shipped = {name: kind for name, kind in family.members.items() if kind.__module__.startswith("fedmllm.")}
        places = {kind.__module__.split(".")[1] + "/" for kind in shipped.values()}
        names = ", ".join(f"`{name}`" for name in sorted(shipped))
        rows.append(f"| `[{key}]` | {names} | {', '.join(f'`{place}`' for place in sorted(places))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the generated lists of README.md.")
    parser.add_argument("--check", action="store_true", help="only check that README.md is current")
    check = parser.parse_args().check
    before = after = README.read_text(encoding="utf-8")
    for name, text in (("members", members()), ("tree", tree())):
        begin, end = f"<!-- {name}: written by scripts/readme_tree.py -->", f"<!-- end of {name} -->"
        if before.count(begin) != 1 or before.count(end) != 1:
            sys.exit(f"README.md: the markers of {name!r} are missing or repeated; restore {begin} and {end}")
        inside = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.DOTALL)
        after = inside.sub(lambda _, b=begin, t=text, e=end: f"{b}\n{t}\n{e}", after)  # type: ignore[misc]
    if check and after != before:
        sys.exit("README.md is not current; run scripts/readme_tree.py")
    if not check:
        README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
