"""Prompts: a golden file for each (set, prompt strategy, visible modalities), and a user's own wording."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from fedmllm.core.errors import ConfigError
from fedmllm.core.types import Conversation, Example, Picture
from fedmllm.data.prompts import PLACEHOLDERS, Agnostic, FromFile, Plain, Prompt, in_words
from support import rawsets

BOTH = frozenset({"image", "text"})
MEME = Example(1, {"image": (Path("a.png"),), "text": "hi {there}"}, "Is it?", ("no", "yes"), "yes", "f:1")
OPEN = Example(2, {"image": (Path("a.png"),)}, "What is it?", (), "a cyst", "f:2")
TEMPLATE = """\
== text and image ==
{images}Look at {modalities}.
{text}
{question} {{one letter}}
{options}
== nothing ==
{question}
{options}
== else ==
Only {modalities}: {question}
{images}
{text}
{options}

== open ==
{text}
{images}Q: {question}
"""


def written(conversation: Conversation) -> str:
    return "".join(f"<{part.path.name}>" if isinstance(part, Picture) else part for part in conversation.parts)


def drive(root: Path) -> None:
    rawsets.drivelm(root, 3)


SETS = {
    "hateful-memes": (rawsets.hateful_memes, {}),
    "crisismmd": (rawsets.crisismmd, {}),
    "vqa-rad": (rawsets.vqa_rad, {}),
    "slake": (rawsets.slake, {}),
    "easy-vqa": (rawsets.easy_vqa, {"choices": True}),
    "flashcards": (rawsets.flashcards, {}),
    "medical": (rawsets.medical, {}),
    "drivelm": (drive, {"test_rate": 1e-9}),
    "table": (
        lambda root: rawsets.write_lines(root / "a.csv", ["scan,note,answer", "1.png,two cats,dog"]),
        {
            "train": "a.csv",
            "question": "What?",
            "choices": ["cat", "dog"],
            "columns": {"image": "scan", "text": "note"},
        },
    ),
}


def visibilities(modalities: tuple[str, ...]) -> list[frozenset[str]]:
    """Every subset of up to two modalities; of six cameras, a few."""
    if len(modalities) > 2:
        return [frozenset(), frozenset(modalities[:1]), frozenset(modalities[1:4]), frozenset(modalities)]
    return [frozenset(c) for n in range(len(modalities) + 1) for c in combinations(modalities, n)]


def representatives(examples: tuple[Example, ...]) -> list[Example]:
    """The first row of each kind: by set, and by the number of choices."""
    return list({(e.columns["set"], len(e.choices), e.columns.get("task")): e for e in reversed(examples)}.values())[
        ::-1
    ]


@pytest.mark.parametrize("prompt", [Plain(), Agnostic(), FromFile(wording=TEMPLATE)], ids=["plain", "agnostic", "file"])
@pytest.mark.parametrize("name", SETS)
def test_the_golden_prompts(tmp_path: Path, golden, name: str, prompt: Prompt) -> None:
    make, settings = SETS[name]
    make(tmp_path)
    data = rawsets.dataset(name, tmp_path, **settings)
    rows = [*data.load("train").examples]
    if name not in ("flashcards", "table", "hateful-memes", "crisismmd", "drivelm"):
        rows += data.load("test").examples
    for visible in visibilities(data.modalities()):
        blocks = [
            f"{written(prompt.render(e, visible))}\n--- options: {list(prompt.options(e))}, target: {prompt.target(e)!r}\n"
            for e in representatives(tuple(rows))
        ]
        fields = "+".join(m for m in data.modalities() if m in visible) or "nothing"
        golden(f"prompts/{name}/{prompt.name}/{fields}.txt", "\n".join(blocks))


def test_agnostic_words_all_four_cases_alike() -> None:
    """Protocol.md, section 4: one wording, in the instruction and in the question."""
    lines = [
        [line for line in Agnostic().render(MEME, frozenset(v)).text.splitlines() if not line.startswith("Text:")]
        for v in ((), ("text",), ("image",), ("image", "text"))
    ]
    assert lines[0] == lines[1] == lines[2] == lines[3]
    assert lines[0][0] == "Select the best answer, without considering the modality."
    assert lines[0][1] == "Question: Is it, without considering the modality?"


@pytest.mark.parametrize(
    ("visible", "basis"),
    [
        (BOTH, " based on the text and image"),
        ({"text"}, " based on the text"),
        ({"image"}, " based on the image"),
        (set(), ""),
    ],
)
def test_plain_names_what_is_there(visible, basis: str) -> None:
    assert Plain().render(MEME, frozenset(visible)).text.startswith(f"Select the best answer{basis}.\n")


@pytest.mark.parametrize("prompt", [Plain(), Agnostic()])
def test_open_questions_are_put_as_they_are(prompt: Prompt) -> None:
    assert prompt.render(OPEN, frozenset({"image"})).parts == (Picture(Path("a.png")), "What is it?")
    assert prompt.render(OPEN, frozenset()).parts == ("What is it?",)


@pytest.mark.parametrize("prompt", [Plain(), Agnostic(), FromFile(wording=TEMPLATE)])
def test_an_option_begins_its_target(prompt: Prompt) -> None:
    assert prompt.target(MEME) == "(B) yes"
    assert prompt.target(MEME).startswith(prompt.options(MEME)[1])
    assert (prompt.options(OPEN), prompt.target(OPEN)) == ((), "a cyst")


def test_modalities_in_words() -> None:
    assert in_words(("image", "text")) == "text and image"
    assert in_words(("CAM_FRONT", "CAM_BACK_LEFT", "CAM_BACK")) == "front, back left and back cameras"
    assert in_words(("CAM_FRONT",)) == "front camera"
    assert in_words(("text", "CAM_FRONT", "CAM_BACK")) == "text and front and back cameras"
    assert in_words(("prior_report",)) == "prior report"
    assert in_words(()) == ""


# --- a user's own wording -----------------------------------------------------------------------------------------


def test_a_wording_for_each_case() -> None:
    prompt = FromFile(wording=TEMPLATE)
    options = "(A) no\n(B) yes"
    assert (
        written(prompt.render(MEME, BOTH))
        == f"<a.png>Look at text and image.\nhi {{there}}\nIs it? {{one letter}}\n{options}"
    )
    assert written(prompt.render(MEME, frozenset())) == f"Is it?\n{options}"
    assert written(prompt.render(MEME, frozenset({"image"}))) == f"Only image: Is it?\n<a.png>\n{options}"
    assert written(prompt.render(MEME, frozenset({"text"}))) == f"Only text: Is it?\nhi {{there}}\n{options}"
    assert written(prompt.render(OPEN, BOTH)) == "<a.png>Q: What is it?"


def test_one_wording_for_all_puts_pictures_first_and_leaves_open_questions_alone() -> None:
    prompt = FromFile(wording="Answer.\n{text}\n{question}\n{options}\n")
    assert written(prompt.render(MEME, BOTH)) == "<a.png>Answer.\nhi {there}\nIs it?\n(A) no\n(B) yes"
    assert written(prompt.render(MEME, frozenset())) == "Answer.\nIs it?\n(A) no\n(B) yes"
    assert written(prompt.render(OPEN, BOTH)) == "<a.png>What is it?"


def test_a_record_holds_the_wording_and_needs_the_file_no_more(tmp_path: Path) -> None:
    path = rawsets.write_lines(tmp_path / "mine.txt", ["{question}", "{options}"], "\r\n", "\ufeff")
    prompt = Prompt.pick({"name": "file", "template": str(path)}, "prompt")
    path.unlink()
    again = Prompt.pick(prompt.model_dump(mode="json"), "prompt")
    assert again == prompt
    assert written(again.render(MEME, BOTH)) == "<a.png>Is it?\n(A) no\n(B) yes"


@pytest.mark.parametrize(
    ("wording", "message"),
    [
        ("{question}\n{chioces}", r"mine\.txt:2: unknown placeholder \{chioces\}; allowed: \{images\}, \{text\}, "),
        ("{questoin}", r"mine\.txt:1: .*did you mean 'question'\?"),
        ("{question!r}", r"mine\.txt:1: unknown placeholder \{question\}"),
        ("{}", r"mine\.txt:1: unknown placeholder \{\}"),
        ("{question", r"mine\.txt:1: .*write \"\{\{\" or \"\}\}\" for a brace that is not part of a placeholder"),
        ("== text ==\na\n== text ==\nb", r"mine\.txt:3: a second wording for text"),
        ("", r"mine\.txt: a file with the wording is required"),
    ],
)
def test_a_wording_that_cannot_be_used_names_line_and_placeholder(tmp_path: Path, wording: str, message: str) -> None:
    (tmp_path / "mine.txt").write_text(wording)
    with pytest.raises(ConfigError, match=message):
        Prompt.pick({"name": "file", "template": str(tmp_path / "mine.txt")}, "prompt")


def test_a_wording_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.template: .*nowhere\.txt: cannot be read"):
        Prompt.pick({"name": "file", "template": str(tmp_path / "nowhere.txt")}, "prompt")
    with pytest.raises(ConfigError, match="a file with the wording is required"):
        Prompt.pick({"name": "file"}, "prompt")
    with pytest.raises(ConfigError, match=r"no wording for rows with text; the file has: image; \"== else ==\""):
        FromFile(wording="== image ==\n{question}").render(MEME, frozenset({"text"}))


def test_every_placeholder_is_documented() -> None:
    assert all(PLACEHOLDERS.values())
