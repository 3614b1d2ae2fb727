"""Documentation pages against the code: commands, options, settings and messages that they name exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import click
import pytest
import typer.main
import yaml

from fedmllm.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LEAST_MESSAGES = 50  # of the troubleshooting page: the test reads all of its tables


def command_errors(text: str) -> list[str]:
    """Return the errors of each `fedmllm VERB ... --flag` of a page."""
    errors = []
    for found in re.finditer(r"(?:^|[`$ ])fedmllm ((?:[a-z]|--)[^`|;\n]*)", text, flags=re.MULTILINE):
        words = re.sub(r"\s(#|&|>).*", "", found[1]).split()
        command: click.Command = typer.main.get_command(app)
        while words and isinstance(command, click.Group) and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if isinstance(command, click.Group):
            if words and re.fullmatch(r"[a-z-]+", words[0]) and found[0][0] == "`":
                errors.append(f"{found[0].strip()}: no such verb")
            continue
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.split("=")[0].rstrip(".,:)") for word in words if word.startswith("--")} - {"--help"}
        errors += [f"fedmllm {found[1]}: {flag}: no such option" for flag in sorted(used - flags)]
    return errors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_have_the_verbs_and_options_of_the_command_line(page: Path) -> None:
    assert command_errors(page.read_text()) == []


def test_a_wrong_command_is_found() -> None:
    assert command_errors("`fedmllm serve X`") == ["`fedmllm serve X: no such verb"]
    assert command_errors("fedmllm run a.toml --sed 3 --seed 1\n") == [
        "fedmllm run a.toml --sed 3 --seed 1: --sed: no such option"
    ]


def settings() -> dict[str, set[str]]:
    """Keys of each table, from docs/settings.md, which is generated from the code."""
    tables: dict[str, set[str]] = {}
    for part in (ROOT / "docs/settings.md").read_text().split("\n## `[")[1:]:
        tables[part.partition("]")[0]] = set(re.findall(r"^\| `([\w.]+)` \|", part, flags=re.MULTILINE))
    return tables


@pytest.mark.parametrize("name", ["serving", "trackers", "troubleshooting", "faq", "glossary", "comparison"])
def test_settings_in_the_text_of_a_page_are_settings(name: str) -> None:
    tables = settings()
    for table, key in re.findall(r"`([a-z_]+)\.([a-z_.]+)\b(?! \.\.\.)", (ROOT / f"docs/{name}.md").read_text()):
        if table in tables and key not in ("txt", "csv"):
            known = {"name"} | tables[table] | {inner.partition(".")[0] for inner in tables[table]}
            assert key in known, f"{table}.{key}"


def texts_of_the_code() -> list[str]:
    """Every string of the package, its parts joined and its placeholders as NUL."""
    texts = []
    for path in (ROOT / "src/fedmllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_messages_of_the_troubleshooting_page_are_messages_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages: list[str] = re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)
    assert len(messages) >= LEAST_MESSAGES
    texts = texts_of_the_code()
    patterns = {m: re.compile(".*".join(map(re.escape, m.split("..."))), re.DOTALL) for m in messages}
    assert [m for m, pattern in patterns.items() if not any(map(pattern.search, texts))] == []


def test_the_python_of_the_page_on_trackers_logs_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/trackers.md").read_text(), re.DOTALL | re.MULTILINE)
    small = '{"name": "synthetic-irony", "num_train": 20, "num_test": 10}, method="majority"'  # trains nothing
    assert '"synthetic-irony"' in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"synthetic-irony"', small), {})
    assert list(tmp_path.glob("runs/tracked/tensorboard/events*"))


def test_the_citation_file_has_the_required_keys_and_the_package_s_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= found.keys()
    assert (found["version"], found["license"]) == (project["version"], project["license"])


def test_the_badges_say_what_the_package_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = re.search(r"torch>=([\d.]+),<2\.(\d+)", " ".join(project["dependencies"]))
    assert torch
    facts = (
        project["requires-python"].replace(">=", "python ≥ "),
        f"torch {torch[1]} to 2.{int(torch[2]) - 1}",
        project["license"],
    )
    title = re.search("<title.*</title>", (ROOT / "docs/badges.svg").read_text(encoding="utf-8"))
    assert title
    for fact in (*facts, "typed mypy strict"):
        assert fact in title[0]
    assert "Typing :: Typed" in project["classifiers"]
    assert "strict = true" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
