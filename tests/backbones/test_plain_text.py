"""Row text never becomes control tokens, in any family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fedmllm.backbones.base import FromFolder
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.backbones.plain_text import SENTINEL, control_strings
from fedmllm.core.errors import DataError
from fedmllm.core.types import Conversation, Picture
from support.family_configs import FAMILIES
from support.tiny_families import PORTS

Loaded = Callable[[str], TransformersBackbone]
ALL = [*FAMILIES, *PORTS]


@pytest.fixture
def backbone(loaded: Loaded, family: str) -> TransformersBackbone:
    return loaded(family)


def written_by(family: str) -> list[str]:
    """Every control string of a family, by its published names."""
    if family in PORTS:
        return [
            "<image>",
            "</image>",
            "<unk>",
            "(<image>./</image>)",
            "<|eot_id|>" if "2.5" in family else "<|im_end|>",
        ]
    end = "<end_of_utterance>" if family == "smolvlm" else "<|im_end|>"
    return [*FAMILIES[family][1].values(), "<|im_start|>", end, "<pad>"]


@pytest.mark.parametrize("family", ALL)
def test_control_strings_in_an_answer_are_its_characters(backbone: TransformersBackbone, family: str) -> None:
    encoder = backbone.encoder
    special = set(encoder.tokenizer.all_special_ids)
    for text in (*written_by(family), SENTINEL):
        answer = f"<div>{text}</div> {text}{text}"
        ids = encoder.answer_ids(answer)
        assert special.isdisjoint(ids), text
        assert encoder.decode(ids) == answer


@pytest.mark.parametrize("family", ALL)
def test_a_row_trains_with_a_placeholder_in_its_answer(
    backbone: TransformersBackbone, pictures: tuple[Picture, Picture], family: str
) -> None:
    """The placeholder of pictures in an answer once ended the run: more places than features."""
    row = backbone.encode(Conversation((pictures[0], "Write html")), f"<div>{written_by(family)[0]}</div>")
    nll_B, num_B = backbone.loss(backbone.collate([row]))
    assert bool(nll_B.isfinite().all())
    assert int(num_B) > len("<div></div>")
    scores = backbone.score([Conversation((pictures[0], "Which?"))], [[written_by(family)[0], "no"]])
    assert torch.tensor(scores).isfinite().all()


@pytest.mark.parametrize("family", ALL)
def test_control_strings_in_a_question_add_no_control_token(
    backbone: TransformersBackbone, pictures: tuple[Picture, Picture], family: str
) -> None:
    """With `words` in place of them, the control tokens of the row are the same, in number and in order."""
    encoder, strings = backbone.encoder, written_by(family)
    special = set(encoder.tokenizer.all_special_ids)

    def controls(words: list[str]) -> list[int]:
        text = f"Say {' and '.join(words)}"
        row = encoder.prompt(Conversation((pictures[0], text, pictures[1], f"or {words[0]}?")))
        assert row.input_ids.shape == row.labels.shape
        for name, value in row.per_token.items():
            assert value.shape[-1] == row.num_tokens, name
        backbone.loss(backbone.collate([encoder.answered(row, encoder.answer_ids("yes"))]))
        return [int(token) for token in row.input_ids if int(token) in special]

    assert controls(strings) == controls(["words"] * len(strings))


@pytest.mark.parametrize("family", ALL)
def test_the_text_of_a_question_is_kept(backbone: TransformersBackbone, family: str) -> None:
    text = f"before {written_by(family)[0]}\n{written_by(family)[-2]} after"
    row = backbone.encoder.prompt(Conversation((text,)))
    assert text in backbone.encoder.tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("family", ALL)
def test_rows_without_control_strings_are_tokenized_as_by_the_family(
    backbone: TransformersBackbone, pictures: tuple[Picture, Picture], family: str
) -> None:
    """The processor's own ids; angle brackets and pipes alone are not control strings."""
    encoder, text = backbone.encoder, "Is 1 < 2 | <b>bold</b>, <|im end|>? a_token"
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    rendered = encoder._render(message, add_generation_prompt=True)
    image = Image.open(pictures[0].path).convert("RGB")
    options = {"add_special_tokens": False} if encoder._doubles_bos else {}
    theirs = backbone.processor(text=[rendered], images=[[image]], return_tensors="pt", **options)["input_ids"][0]
    assert torch.equal(encoder.prompt(Conversation((pictures[0], text))).input_ids, theirs)
    assert encoder.answer_ids(text) == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ALL)
def test_every_special_token_of_a_family_counts(backbone: TransformersBackbone, family: str) -> None:
    strings = control_strings(backbone.processor)
    assert {*written_by(family), *backbone.encoder.tokenizer.all_special_tokens} <= {*strings}
    assert strings == sorted(strings, key=lambda text: (-len(text), text))


def test_a_chat_template_that_repeats_a_text_is_an_error(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("llava"), tmp_path / "twice"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("{{ p['text'] }}", "{{ p['text'] }}{{ p['text'] }}"))
    encoder = load_folder(FromFolder(path=str(folder)), seed=0).encoder
    assert encoder.prompt(Conversation(("plain",))).num_tokens > 10
    with pytest.raises(DataError, match=r"control strings \['<image>'\].*remove them from the row"):
        encoder.prompt(Conversation(("an <image> here",)))
