"""Every command of README and docs: it runs here, or it is checked as far as this machine can, with the reason stated.

Commands are the lines of `sh` blocks, the lines after `$ ` of transcripts, and the inline code that begins with a program.
Each must match a rule; a rule that nothing matches is an error too.
"""

from __future__ import annotations

import ast
import csv
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import pytest
import typer.main
from typer.testing import CliRunner

from fedmllm.backbones.tiny import CHECKPOINTS
from fedmllm.cli.main import app
from fedmllm.config.experiment import Experiment
from fedmllm.runs.run import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = r"(?:[A-Z_]+=\S+ )?(?:fedmllm|pip|python|make)\b"
WHOLE_PAGES = {
    "docs/tutorial.md": "tests/test_tutorial.py",
    "docs/extend": "tests/test_docs.py",
}  # their blocks run there

How = Literal["run", "write", "check", "exempt"]


@dataclass(frozen=True)
class Rule:
    """Treatment of the commands that match a pattern as a whole.

    "run": as it stands, with samples for words in capitals. "write": a file whose text follows. "check": the command line
    is parsed, and its experiment or suite is read and validated; scripts exist and know their options. "exempt": nothing.
    """

    pattern: str
    how: How
    reason: str = ""  # why it is not run


TRAINS = "trains for minutes; the same verb runs in tests/test_tutorial.py"
PROCESS = "a process of a deployment; tests/engines/test_flower_sites.py runs all of them"
INSTALLS = "installs from a package index"
TRANSCRIPT = "looks at files of the transcript, which scripts/deploy_vqa_rad.sh makes"
RULES = (
    Rule(r"(?:RAY_ADDRESS=\S+ )?fedmllm run .+\.toml.*", "check", TRAINS),
    Rule(r"fedmllm run", "check", "the verb alone"),
    Rule(r"fedmllm quickstart", "check", "two or three minutes; .ci/run runs it"),
    Rule(r"fedmllm audit .+", "check", "trains; tests/test_audits.py runs every kind"),
    Rule(r"fedmllm doctor .+ --device cuda", "check", "needs a CUDA device"),
    Rule(r"fedmllm build-vlm .+", "check", "needs models from packages; tests/backbones/test_build_vlm.py builds a small one"),
    Rule(r"fedmllm (?:server start|server run|server add|site start)\b.*", "check", PROCESS),
    Rule(r"fedmllm site (?:key|ledger)\b.*", "check", "changes or needs what a deployment has made; tests/engines run both"),
    Rule(r"fedmllm suite .+", "check", TRAINS),
    Rule(r"fedmllm site check (?:SITE|site)\.toml", "check", "needs a site; the transcript of docs/deploy.md runs it"),
    Rule(r"fedmllm (?:doctor|export|predict|report|suite|site)", "check", "the verb alone"),
    Rule(r"fedmllm .+", "run"),
    Rule(r"pip install .+", "check", INSTALLS),
    Rule(r"pip wheel .+", "check", INSTALLS),
    Rule(r"make \w+", "check", "sets up an environment; .ci/run makes these targets"),
    Rule(r"python scripts/pack_results\.py .+", "run"),
    Rule(r"python (?:scripts|benchmarks)/\w+\.py.*", "check", "minutes to hours; what it printed is in results/"),
    Rule(r"cat > .+", "write"),
    Rule(r"cp .+", "run"),
    Rule(r"kill -9 \d+", "exempt", TRANSCRIPT),
    Rule(r"(?:cat|tail|ls) .+", "exempt", TRANSCRIPT),
)  # fmt: skip

SAMPLES = {
    "EXPERIMENT.toml": "mine.toml", "X.toml": "mine.toml", "SITE.toml": "ABD/site.toml", "site.toml": "ABD/site.toml",
    "SUITE.toml": "suite.toml", "RUN": "runs/mine", "runs/RUN_A": "runs/a", "runs/RUN_B": "runs/b",
    "ROWS": "new.csv", "SET": "vqa-rad",
    "KIND": "tokens", "FAMILY.MEMBER": "aggregator.fedadam", "TABLE": "train", "VERB": "run", "SERVER": "server",
}  # fmt: skip
EXACT = {  # words in capitals that mean different things in different commands
    "fedmllm suite FILE --dry-run": "fedmllm suite suite.toml --dry-run",
    "fedmllm predict RUN ROWS --out FILE": "fedmllm predict runs/mine new.csv --out answers.csv",
    "fedmllm report DIR": "fedmllm report runs/irony",
    "fedmllm data export EXPERIMENT.toml DIR": "fedmllm data export mine.toml exported",
    "fedmllm export RUN --merge DIR --base MODEL": "fedmllm export runs/mine --merge merged --base models/MODEL",
}


@dataclass(frozen=True)
class Command:
    """A command of a page, and the lines that follow it in a transcript."""

    text: str
    after: str = ""


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of a page in their order: those of blocks, then inline code."""
    text = page.read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    name = str(page.relative_to(ROOT))
    for language, block in blocks:
        if language == "sh":
            if not any(name.startswith(whole) for whole in WHOLE_PAGES):
                yield from (Command(part) for line in block.splitlines() for part in parts(line))
        elif not language:
            assert not re.search(rf"^{PROGRAMS}", block, flags=re.MULTILINE), f"{name}: name the block's language: sh"
            for found in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, flags=re.MULTILINE):
                yield from (Command(part, found[2]) for part in parts(found[1]))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for inline in re.findall(rf"`({PROGRAMS}(?: [^`]*)?)`", prose):
        if len(inline.split()) > 1:
            yield Command(inline)


def parts(line: str) -> Iterator[str]:
    """Yield the commands of a line, without its comment, redirections and ampersands."""
    line = re.sub(r"(^|\s)#.*", "", line)
    line = re.sub(r" > \S+ 2>&1 &$", "", line.strip())
    yield from (part.strip() for part in line.split(" && ") if part.strip())


def rule_of(command: str) -> Rule | None:
    return next((rule for rule in RULES if re.fullmatch(rule.pattern, command)), None)


def test_every_command_has_a_rule_and_every_rule_a_command() -> None:
    found = {command.text: page.name for page in PAGES for command in commands(page)}
    assert len(found) > 80  # the pages are read
    assert [f"{page}: {text}" for text, page in found.items() if rule_of(text) is None] == []
    used = {rule for text in found if (rule := rule_of(text))}
    assert [rule.pattern for rule in RULES if rule not in used] == []
    assert all(rule.reason for rule in RULES if rule.how in ("check", "exempt"))
    assert rule_of("rm -rf runs") is rule_of("fedmllm") is None


def test_the_pages_that_run_elsewhere_are_read_there() -> None:
    for page, test in WHOLE_PAGES.items():
        assert (ROOT / page).exists()
        assert f'"{page}' in (ROOT / test).read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a finished run on them."""
    folder = tmp_path_factory.mktemp("commands")
    for name, head in (("rows.csv", ["case", "note", "ill"]), ("new.csv", ["case", "note"])):
        with (folder / name).open("w", newline="") as file:
            lines = [[i, f"note {i}", "yes" if i % 2 else "no"][: len(head)] for i in range(8)]
            csv.writer(file).writerows([head, *lines])
    columns = {"id": "case", "text": "note", "answer": "ill"}
    data = {"name": "table", "root": str(folder), "train": "rows.csv", "test": "rows.csv", "columns": columns}
    data |= {"question": "Is it ill?", "choices": ["no", "yes"]}
    partition, train = {"name": "iid", "num_clients": 2}, {"max_steps": 1}
    table: dict[str, Any] = {"data": data, "partition": partition, "num_rounds": 1, "train": train}
    for seed, name in enumerate(("mine", "b")):
        run(Experiment.parse({**table, "seed": seed}), folder / "runs" / name)
    for name in ("a", "irony/1", "crisis/1", "verdict/1"):
        shutil.copytree(folder / "runs/mine", folder / "runs" / name)
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder as the pages suppose it: the repository's files, `mine.toml`, runs, and models."""
    for name in ("rows.csv", "new.csv"):
        shutil.copy(finished / name, tmp_path)
    shutil.copytree(finished / "runs", tmp_path / "runs")
    for name in ("scripts", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "vqa_rad").symlink_to(ROOT / "examples/vqa_rad")
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for name in ("MODEL", "MiniCPM-V-2_6"):
        shutil.copytree(CHECKPOINTS[1], tmp_path / "models" / name)
    (mine, *_) = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for name in ("mine.toml", "experiments/mine.toml", "experiment.toml", "hospital.toml"):
        (tmp_path / name).write_text(mine)
    base = "".join(f"{line}\n" for line in mine.splitlines())
    (tmp_path / "suite.toml").write_text(f"[base]\n{base}[matrix]\nseeds = [0, 1]\n")
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p))], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page(page: Path, place: Path) -> None:
    for command in commands(page):
        rule = rule_of(command.text)
        text = EXACT.get(command.text, command.text)
        for word, sample in SAMPLES.items():
            text = re.sub(rf"(?<![\w./]){re.escape(word)}(?![\w.])", sample, text)
        if rule is None or rule.how == "exempt" or "..." in text:
            continue
        try:
            {"run": ran, "check": checked, "write": written}[rule.how](text, command.after)
        except Exception as error:
            raise AssertionError(f"{command.text} ({rule.how}: {text}): {error}") from error


def ran(text: str, _: str) -> None:
    """Run a command."""
    words = shlex.split(text)
    if words[0] == "cp":
        shutil.copy(words[1], words[2])
    elif words[0] == "python":
        before, sys.argv = sys.argv, words[1:]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = before
    else:
        if "--merge" in words:  # a page may have two ways to make one folder
            shutil.rmtree(words[words.index("--merge") + 1], ignore_errors=True)
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, f"{done.output[-2000:]} {done.exception}"


def written(text: str, content: str) -> None:
    """Write the file that the lines after `cat > FILE` are."""
    path = Path(text.split()[2])
    if content.strip():
        path.write_text(content)
    else:  # "as ABD's, with its own name and value"
        path.write_text(Path("ABD/site.toml").read_text().replace("ABD", path.parent.name))


def checked(text: str, _: str) -> None:
    """Check a command without what it costs."""
    program, *words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", text))
    {"fedmllm": check_verb, "pip": check_pip, "make": check_make, "python": check_script}[program](words)


def check_verb(words: list[str]) -> None:
    """Parse a command line, and validate the experiment or the suite that it names."""
    command: click.Command = typer.main.get_command(app)
    path = ["fedmllm"]
    while isinstance(command, click.Group) and words:
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    if not words:
        return  # the verb alone
    given = command.make_context(" ".join(path), list(words)).params
    if path[1] == "suite":
        ran(shlex.join([*path, *words, *([] if given["dry_run"] else ["--dry-run"])]), "")
    elif "experiment" in given:
        keys = {"seed": "seed", "rounds": "num_rounds", "engine": "engine.name", "num_actors": "engine.num_actors"}
        named = [f"{key}={given[option]}" for option, key in keys.items() if given.get(option) is not None]
        Experiment.load(given["experiment"], [*(given.get("set_") or []), *named])


def check_pip(words: list[str]) -> None:
    """The extras of the package that are named exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        for extras in re.findall(r"^(?:fedmllm|\.)\[(.+?)\]", word):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), extras


def check_make(words: list[str]) -> None:
    """The targets exist."""
    for target in words:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


def check_script(words: list[str]) -> None:
    """The script exists, is Python, and its text has the options."""
    source = (ROOT / words[0]).read_text()
    ast.parse(source)
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, word


def test_a_wrong_command_fails(place: Path) -> None:
    for text, reason in {
        "fedmllm run mine.toml --set scenario.rat=0.5": "scenario.rat: unknown key",
        "fedmllm run mine.toml --sed 1": "No such option",
        "fedmllm run theirs.toml": "cannot be read",
        "fedmllm suite suite.toml --only nothing": "not in any label",
        "pip install 'fedmllm[flow]'": "flow",
        "make tests": "tests",
        "python scripts/fuzz.py --cases 3": "--cases",
    }.items():
        with pytest.raises((Exception,), match=reason):
            checked(text, "")
    with pytest.raises(AssertionError, match="no such file or folder"):
        ran("fedmllm predict runs/mine other.csv --out x.csv", "")


def test_help_names_every_verb_that_a_page_may_run() -> None:
    """`fedmllm VERB --help` of the troubleshooting page, for every verb."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    for verb in group.commands:
        assert CliRunner().invoke(app, [verb, "--help"], env=dict(os.environ)).exit_code == 0
