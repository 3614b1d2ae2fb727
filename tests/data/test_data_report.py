"""`fedmllm data`: where, show, plot, export, and reading an export back in."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedmllm.cli.data import app
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.data.base import Dataset
from fedmllm.reports import data as reports_data
from fedmllm.reports.columns import Column, fitting_tables
from fedmllm.reports.data import Federation, export, where_to_get
from support import rawsets


def experiment(folder: Path, name: str = "hateful-memes", tail: str = "", **settings) -> Path:
    lines = ["[data]", f'name = "{name}"', f"root = {json.dumps(str(folder))}"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    path = folder / "experiment.toml"
    path.write_text("\n".join(lines) + "\n" + tail)
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_show_as_json_needs_no_image(tmp_path: Path) -> None:
    """The form is that of issue 3: ids as in the file, one flag a row and modality."""
    rawsets.hateful_memes(tmp_path, 300)
    toml = experiment(tmp_path, tail='[partition]\nname = "published"\n[scenario]\nname = "missing"\nrate = 0.5\n')
    found = json.loads(invoke("show", toml, "--json").stdout)
    assert found.keys() == {"clients", "digest"}
    assert sorted(i for client in found["clients"] for i in client["ids"]) == list(range(300))
    for number, client in enumerate(found["clients"]):
        assert list(client) == ["client", "name", "ids", "image", "text"]
        assert client["client"] == number
        assert len(client["image"]) == len(client["text"]) == len(client["ids"])
        assert set(client["image"] + client["text"]) <= {"0", "1"}
    again = json.loads(invoke("show", toml, "--json").stdout)
    assert again == found
    other = json.loads(invoke("show", toml, "--json", "--set", "scenario.rate=0.3").stdout)
    assert other["digest"] != found["digest"]
    assert [c["ids"] for c in other["clients"]] == [c["ids"] for c in found["clients"]]


SUITE = """
[base]
data = { name = "synthetic-irony", num_train = 40, num_test = 10 }
partition = { name = "iid", num_clients = 2 }
[matrix]
seeds = [3, 4]
seed_keys = ["seed", "data.seed"]
[matrix.settings]
"beta 30 %" = { scenario = { name = "missing", rate = 0.3 } }
"all" = {}
"""


def test_show_of_a_suite_names_the_cell(tmp_path: Path) -> None:
    suite, parent, one = tmp_path / "suite.toml", tmp_path / "parent.toml", tmp_path / "one.toml"
    parent.write_text(SUITE)
    suite.write_text('extends = "parent.toml"\n[base.partition]\nnum_clients = 3\n')
    found = invoke("show", suite).stdout
    assert found.startswith("cell: beta 30 % · 3\n")
    assert found.count("cell: ") == 1  # the settings share their rows; other seeds draw the same set again
    settings = {"num_train": 40, "num_test": 10, "seed": 3}
    table = {"data": {"name": "synthetic-irony", **settings}, "partition": {"name": "iid", "num_clients": 3}, "seed": 3}
    scenario = {"name": "missing", "rate": 0.3}
    digest = Federation.of(Experiment.parse({**table, "scenario": scenario})).digest
    assert digest in found
    other = json.loads(invoke("show", suite, "--json", "--set", "scenario.rate=0.6").stdout)
    assert other == Federation.of(Experiment.parse({**table, "scenario": {**scenario, "rate": 0.6}})).to_json()
    with pytest.raises(ConfigError, match=r"suite\.toml: a suite of experiments, not one"):
        Experiment.load(suite)
    one.write_text(SUITE.replace('"all" = {}', '"more" = { data = { num_train = 60 } }'))
    both = invoke("show", one).stdout
    assert [line for line in both.splitlines() if line.startswith("cell: ")] == [
        "cell: beta 30 % · 3",
        "cell: more · 3",
    ]
    assert "60 rows" in both
    with pytest.raises(ConfigError, match=r"--json: .*one\.toml has 2 data sets"):
        invoke("show", one, "--json")


def test_the_published_suite_shows_its_ceilings() -> None:
    """As docs/benchmark.md says."""
    found = invoke("show", Path(__file__).parents[2] / "experiments/verdict/core.toml").stdout
    assert "cell: alpha 0.5 · Zero-shot · 0" in found
    assert "best expected on rows with all: auc 0.926" in found


def test_show_does_not_call_rows_with_gaps_aligned(tmp_path: Path) -> None:
    """The title says what the rows show, and the scenario's own name where every row is complete."""
    columns = {"id": "case", "text": "note", "image": "scan", "answer": "ill"}
    tail = '[partition]\nname = "iid"\nnum_clients = 2\n[data.columns]\n' + "".join(
        f"{key} = {json.dumps(column)}\n" for key, column in columns.items()
    )
    for gap, title in (("", "iid partition, rows as they are"), ("cough", "iid partition, aligned")):
        lines = ["case,note,scan,ill", "1,fever,1.png,yes", f"2,{gap},2.png,no", "3,well,3.png,no", "4,ill,4.png,yes"]
        (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
        data = {"train": "rows.csv", "test": "rows.csv", "question": "Is it ill?", "choices": ["no", "yes"]}
        toml = experiment(tmp_path, "table", tail, **data)
        assert (
            title in CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(toml)], catch_exceptions=False).output
        )


@pytest.mark.parametrize("width", [80, 140])
def test_show_has_every_column_of_eight_modalities(tmp_path: Path, width: int) -> None:
    """Piped output has 80 columns; words are whole, no line is cut, and each client has each of its counts."""
    lines = ['data = { name = "synthetic-driving", num_train = 60, num_test = 40 }', "[partition]", 'name = "iid"']
    (tmp_path / "e.toml").write_text(
        "\n".join([*lines, "num_clients = 3", "[scenario]", 'name = "missing"', "rate = 0.4"])
    )
    federation = Federation.of(Experiment.load(tmp_path / "e.toml"))
    runner = CliRunner(env={"COLUMNS": str(width)})
    text = runner.invoke(app, ["show", str(tmp_path / "e.toml")], catch_exceptions=False).stdout
    assert max(map(len, text.splitlines())) <= width
    assert f"digest {federation.digest}" in text
    tables: list[list[list[str]]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]
        if line.startswith("┃"):
            tables.append([cells])
        elif line.startswith("│"):
            tables[-1].append(cells)
    found = {}
    for head, *rows in tables:
        assert head[0] == "client"
        for row in rows:
            found |= {(row[0], name): int(n) for name, n in zip(head[1:], row[1:], strict=True)}
    for shard in federation.shards:
        for modality in federation.experiment.data.modalities():
            shows = sum(modality in visible for visible in shard.visible)
            assert found[str(shard.client), modality] == shows
        assert found[str(shard.client), "rows"] == len(shard.rows)
        assert {("0", "all"), ("0", "none"), ("0", "other")} < found.keys()


def test_a_word_wider_than_the_console_is_broken_and_nothing_is_lost() -> None:
    first, long = Column("client", ("site with a long name",)), Column("x" * 50, ("12345678901",))
    console = Console(width=30, file=StringIO())
    for table in fitting_tables(first, [[long], [Column("[label]", ("3",))]], 30):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("x") == 50
    assert "12345678901" in text
    assert "[label]" in text


def test_show_counts_rows_labels_and_modalities(tmp_path: Path) -> None:
    rawsets.hateful_memes(tmp_path, 30)
    toml = experiment(
        tmp_path, tail='[partition]\nname = "iid"\nnum_clients = 3\n[scenario]\nname = "cross"\nnum_image_clients = 1\n'
    )
    text = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["show", str(toml)], catch_exceptions=False).stdout
    assert "not-hateful" in text
    assert "digest" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[1] for row in cells] == ["10", "10", "10"]
    assert sorted(row[4:8] for row in cells) == [["0", "0", "10", "0"], ["0", "0", "10", "0"], ["0", "10", "0", "0"]]
    assert sum(int(row[3]) for row in cells) == 10  # a third of the rows is hateful


def test_show_names_the_first_clients_and_sums_up_the_others(tmp_path: Path, monkeypatch) -> None:
    rawsets.hateful_memes(tmp_path, 30)
    toml = experiment(
        tmp_path, tail='[partition]\nname = "iid"\nnum_clients = 5\n[scenario]\nname = "cross"\nnum_image_clients = 1\n'
    )

    def table() -> list[list[str]]:
        text = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(toml)], catch_exceptions=False).stdout
        return [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]

    whole = table()
    monkeypatch.setattr(reports_data, "LISTED", 2)
    short = table()
    assert short[:2] == whole[:2]
    assert short[2][0] == "3 others, 6 to 6 rows each"
    assert [int(cell) for cell in short[2][1:]] == [
        sum(int(row[k]) for row in whole[2:]) for k in range(1, len(whole[0]))
    ]


def test_show_counts_what_is_left_out(tmp_path: Path) -> None:
    rawsets.hateful_memes(tmp_path, 30)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() + '{"id": 99}\n')
    toml = experiment(tmp_path, on_bad_row="skip")
    result = invoke("show", toml)
    assert "30 rows, 1 bad rows left out" in result.stdout
    assert "train.jsonl:31: row 99: no 'label'" in result.stderr


def test_show_of_six_cameras(tmp_path: Path) -> None:
    rawsets.drivelm(tmp_path)
    toml = experiment(
        tmp_path, "drivelm", '[partition]\nname = "by-column"\ncolumn = "scene"\n[scenario]\nname = "missing"\n'
    )
    found = json.loads(invoke("show", toml, "--json").stdout)
    assert list(found["clients"][0]) == ["client", "name", "ids", *rawsets.CAMERAS]
    assert found["clients"][0]["ids"][0] == "scene0/frame0/perception/0"


def test_plot_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rawsets.crisismmd(tmp_path)
    toml = experiment(tmp_path, "crisismmd", '[scenario]\nname = "hybrid"\n')
    invoke("show", toml, "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FedmllmError, match=r"a\.xyz: cannot be drawn"):
        invoke("show", toml, "--plot", tmp_path / "a.xyz")


MADE = {
    "hateful-memes": rawsets.hateful_memes,
    "crisismmd": rawsets.crisismmd,
    "vqa-rad": rawsets.vqa_rad,
    "medical": rawsets.medical,
    "drivelm": rawsets.drivelm,
}


@pytest.mark.parametrize("scenario", ['"aligned"', '{ name = "missing", rate = 0.5 }', '{ name = "hybrid" }'])
@pytest.mark.parametrize("name", MADE)
def test_an_export_reads_back_in_with_the_same_clients_and_masks(tmp_path: Path, name: str, scenario: str) -> None:
    (tmp_path / "raw").mkdir()
    MADE[name](tmp_path / "raw")
    toml = experiment(tmp_path / "raw", name)
    toml.write_text(f'scenario = {scenario}\npartition = {{ name = "dirichlet", alpha = 0.05 }}\n' + toml.read_text())
    invoke("export", toml, tmp_path / "out")
    there, back = (Federation.of(Experiment.load(p)) for p in (toml, tmp_path / "out" / "data.toml"))
    assert back.digest == there.digest
    assert [len(s.rows) for s in back.shards] == [len(s.rows) for s in there.shards]
    held = {
        (e.id, s.client): (e, v)
        for s in there.shards
        for r, v in zip(s.rows, s.visible, strict=True)
        for e in [there.examples[r]]
    }
    for shard in back.shards:
        for row in shard.rows:
            example = back.examples[row]
            original, visible = held[example.id, shard.client]
            assert (example.question, example.choices, example.answer) == (
                original.question,
                original.choices,
                original.answer,
            )
            assert example.fields == {
                m: c if isinstance(c, str) else tuple(p.absolute() for p in c)
                for m, c in original.visible_fields(visible).items()
            }


def test_exported_rows_have_the_widespread_form_and_hold_nothing_hidden(tmp_path: Path) -> None:
    rawsets.hateful_memes(tmp_path, 50)
    toml = experiment(tmp_path, tail='[partition]\nname = "iid"\n[scenario]\nname = "missing"\nrate = 0.5\n')
    federation = Federation.of(Experiment.load(toml))
    files = export(federation, tmp_path / "out")
    assert [f.name for f in files] == [*(f"client_{k}.json" for k in range(10)), "data.toml"]
    for shard, file in zip(federation.shards, files, strict=False):
        rows = json.loads(file.read_text())
        for row, r, visible in zip(rows, shard.rows, shard.visible, strict=True):
            example = federation.examples[r]
            assert list(row)[:3] == ["id", "image", "conversations"]
            assert row["id"] == example.id
            assert [turn["role"] for turn in row["conversations"]] == ["user", "assistant"]
            assert row["conversations"][0]["content"].count("<image>\n") == ("image" in visible)
            assert row["image"] == (str(example.fields["image"][0].absolute()) if "image" in visible else None)
            assert ("some words" in json.dumps(row)) == ("text" in visible)
            assert row["conversations"][1]["content"] in ("(A) not-hateful", "(B) hateful")


def read_back(folder: Path, lines: list[str], out: Path, **settings) -> tuple[Federation, Federation]:
    """A table of one's own as it is, and as its export reads."""
    rawsets.write_lines(folder / "rows.jsonl", lines)
    columns = settings.pop("columns")
    tail = f'columns = {columns}\n[partition]\nname = "iid"\nnum_clients = 2\n'
    toml = experiment(folder, "table", tail, train="rows.jsonl", question="?", **settings)
    invoke("export", toml, out)
    return Federation.of(Experiment.load(toml)), Federation.of(Experiment.load(out / "data.toml"))


@pytest.mark.parametrize(
    "columns",
    [
        '{ image = { image = "a", thermal = "b" }, text = { note = "t" } }',
        '{ image = { CAM = "a", image = "b" } }',
        '{ image = { image_ = "a", id = "b" }, text = { image = "t" } }',
        '{ image = { image = "a" }, text = { question = "t", choices = "t", answer_ = "t", answer = "t", file = "t" } }',
        '{ image = "a" }',
        '{ text = "t" }',
    ],
)
def test_an_export_of_any_modalities_reads_back_in(tmp_path: Path, columns: str) -> None:
    """`image` is where other code bases look for all pictures of a row; each modality keeps a column of its own."""
    rows = [{"a": f"x/{i}.png", "b": [f"y/{i}.png", f"x/{i}.jpg"], "t": f"t{i}", "answer": "x"} for i in range(6)]
    (tmp_path / "raw").mkdir()
    there, back = read_back(tmp_path / "raw", [json.dumps(row) for row in rows], tmp_path / "out", columns=columns)
    assert back.digest == there.digest
    fields = {e.id: e.fields for e in there.examples}
    assert {e.id: e.fields for e in back.examples} == fields
    (first, *_) = json.loads((tmp_path / "out" / "client_0.json").read_text())
    pictures = [str(p) for content in fields[first["id"]].values() if isinstance(content, tuple) for p in content]
    assert first["image"] == (pictures[0] if len(pictures) == 1 else pictures or None)
    assert first["conversations"][0]["content"].count("<image>") == len(pictures)


@pytest.mark.parametrize(
    "name", ["\U0001f600 caf\xe9", 'a "b" \\ c', "tab\tand\x07bell\x7fdel", "line\nend", "[1]", "a#b"]
)
def test_an_export_into_folders_of_any_name_reads_back_in(tmp_path: Path, name: str) -> None:
    """TOML knows no pair of escapes for what lies beyond U+FFFF, and wants control characters escaped, DEL among them."""
    (tmp_path / name).mkdir()
    rows = ['{"a": "1.png", "answer": "x"}', '{"a": "y/1.png", "answer": "x"}']
    rawsets.write_lines(tmp_path / name / "rows.jsonl", rows)
    table = {
        "name": "table",
        "root": str(tmp_path / name),
        "train": "rows.jsonl",
        "question": "?",
        "columns": {"image": "a"},
    }
    there = Federation.of(Experiment.parse({"data": table, "partition": {"name": "iid", "num_clients": 2}}))
    export(there, tmp_path / name / "out")
    back = Federation.of(Experiment.load(tmp_path / name / "out" / "data.toml"))
    assert back.digest == there.digest
    assert {e.fields["image"] for e in back.examples} == {e.fields["image"] for e in there.examples}


def test_show_prints_the_ceilings_of_a_set_whose_law_is_known(tmp_path: Path) -> None:
    toml = tmp_path / "verdict.toml"
    toml.write_text('data = { name = "synthetic-verdict", num_train = 20, num_validation = 2, num_test = 2 }')
    lines = invoke("show", toml).stdout
    for visible, value in (("all", "0.926"), ("image", "0.788"), ("text", "0.782")):
        assert f"best expected on rows with {visible}: auc {value}" in " ".join(lines.split())
    rawsets.hateful_memes(tmp_path)
    assert "best expected" not in invoke("show", experiment(tmp_path)).stdout


def test_export_overwrites_nothing(tmp_path: Path) -> None:
    rawsets.hateful_memes(tmp_path)
    toml = experiment(tmp_path)
    invoke("export", toml, tmp_path / "out", "--format", "conversations")
    with pytest.raises(FedmllmError, match=r"client_0\.json exists; choose an empty folder"):
        invoke("export", toml, tmp_path / "out")


def test_where_describes_every_set() -> None:
    for name in Dataset.members:
        text = invoke("where", name).stdout
        assert text.strip()
        if Dataset.members[name].source:
            assert "Licence:" in text
            assert "Expected files" in text
    with pytest.raises(ConfigError, match=r"no data set is called 'imagenet'; there are: .*crisismmd, drivelm"):
        where_to_get("imagenet")


def test_nothing_of_this_loads_torch(tmp_path: Path) -> None:
    import subprocess

    rawsets.hateful_memes(tmp_path)
    code = f"""
import sys
from fedmllm.config.experiment import Experiment
from fedmllm.reports import data as reports_data
from fedmllm.reports.columns import Column, fitting_tables
from fedmllm.reports.data import Federation
Federation.of(Experiment.load({str(experiment(tmp_path))!r})).to_json()
assert not {{"torch", "PIL", "matplotlib", "transformers"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
