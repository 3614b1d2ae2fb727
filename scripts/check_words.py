"""Check the vocabulary of the tree: `python scripts/check_words.py [PATH ...]`.

Prints `place: word: what to use instead` for every word of `words.toml`, every module whose docstring does not begin
with a short noun phrase, and every docstring of a class or function that begins with a clause ("What ...", "Whether ...").
Exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORDS = Path(__file__).with_name("words.toml")
SUFFIXES = {".py", ".md", ".toml", ".sh", ".yml", ".yaml", ".j2", ".html", ".css", ".js", ".conf", ""}
# Generated texts, legal texts, embedded corpora, and this list.
LEFT_OUT = re.compile(
    r"LICENSE|scripts/(words\.toml|check_words\.py)|tests/golden/|tests/corpus/|requirements/|results/[a-z_-]+/|.*\.(lock|json)$"
)
MAX_WORDS = 12
CLAUSE = re.compile(r"^(what|whether|how|where|which|who|does|do|is|are)\b", re.IGNORECASE)


def files(paths: list[str]) -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *paths], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in SUFFIXES and not LEFT_OUT.match(name) and path.is_file():
            yield path


def bad_words(path: Path, text: str, words: list[dict[str, str]]) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        for word in words:
            found = re.search(word["pattern"], line, re.IGNORECASE)
            if found and not ("except" in word and re.search(word["except"], line)):
                yield f"{path.relative_to(ROOT)}:{number}: {found[0]!r}: use {word['use']}"


def bad_first_lines(path: Path, text: str) -> Iterator[str]:
    place, tree = path.relative_to(ROOT), ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = (ast.get_docstring(node) or "").split("\n")[0]
        line = 1 if isinstance(node, ast.Module) else node.lineno
        if CLAUSE.match(first):
            yield f"{place}:{line}: {first!r}: begin a docstring with a verb (Return ...) or a noun phrase"
        if node is tree and "src" in place.parts and len(first.split(". ")[0].split()) > MAX_WORDS:
            yield f"{place}:{line}: {first!r}: the first sentence has more than {MAX_WORDS} words"


def main() -> None:
    words = tomllib.loads(WORDS.read_text(encoding="utf-8"))["word"]
    slips: list[str] = []
    for path in files(sys.argv[1:] or ["."]):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        slips += bad_words(path, text, words)
        if path.suffix == ".py":
            slips += bad_first_lines(path, text)
    print("\n".join(slips))
    sys.exit(1 if slips else 0)


if __name__ == "__main__":
    main()
