"""Pictures and text of MiniCPM-V 2: slices, placeholders, chat text, batches; no model runs here.

That ids and pixels are the original's is in `test_minicpmv2.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fedmllm.backbones.minicpmv2.images import choose_grid, slice_image
from fedmllm.backbones.minicpmv2.model import IMAGE_MARK, ImageSettings, MiniCPMV2Processor
from fedmllm.core.errors import FedmllmError
from support.minicpmv2_folder import ROWS, VERSIONS, ask, picture, right_padded, write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {version: write_folder(tmp_path_factory.mktemp("v") / version, version) for version in VERSIONS}


@pytest.fixture(params=VERSIONS)
def processor(request: pytest.FixtureRequest, folders: dict[str, Path]) -> MiniCPMV2Processor:
    return MiniCPMV2Processor.from_pretrained(folders[request.param])


# --- pictures


def test_a_picture_of_three_by_two_is_cut_in_three_by_two() -> None:
    # 300 x 200 at 112: area ratio 4.8 -> 5 slices, candidates 4, 5, 6; log(3/2) is hit by 3 x 2 exactly.
    pictures, grid = slice_image(picture(300, 200), ImageSettings(scale_resolution=112))
    assert grid == (3, 2)
    assert [p.size for p in pictures] == [(140, 84), *[(112, 112)] * 6]


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 9), st.sampled_from([(112, 14), (56, 7)]))
@settings(max_examples=60, deadline=None)
def test_slices_are_whole_patches_of_about_one_area(width: int, height: int, most: int, sizes: tuple[int, int]) -> None:
    side, patch = sizes
    pictures, grid = slice_image(
        picture(width, height), ImageSettings(scale_resolution=side, patch_size=patch, max_slice_nums=most)
    )
    assert (grid is None) == (most == 1 or width * height <= side**2)
    assert len(pictures) == (1 if grid is None else 1 + grid[0] * grid[1]) <= 1 + most
    assert len({p.size for p in pictures[1:]}) <= 1
    for p in pictures:
        assert p.width % patch == p.height % patch == 0
        assert min(p.size) >= patch


def test_cells_of_a_grid_are_its_picture_row_by_row() -> None:
    left_to_right = np.repeat(np.arange(0, 240, dtype=np.uint8)[None, :], 80, axis=0)
    cells, grid = slice_image(Image.fromarray(left_to_right).convert("RGB"), ImageSettings(scale_resolution=80))
    assert grid == (3, 1)
    means = [np.asarray(cell).mean() for cell in cells[1:]]
    assert means == pytest.approx([39.5, 119.5, 199.5], abs=2)  # thirds of 0..239


def test_without_slicing_a_picture_is_one_whatever_its_size() -> None:
    off = ImageSettings(scale_resolution=56, patch_size=7, slice_mode=False)
    assert choose_grid(900, 500, off) is None
    pictures, _ = slice_image(picture(900, 500), off)
    assert [p.size for p in pictures] == [(70, 42)]  # 56 ** 2 at the aspect of 9 : 5, in whole patches
    same, _ = slice_image(picture(56, 56), off)
    assert np.array_equal(np.asarray(same[0]), np.asarray(picture(56, 56)))


def test_a_kept_picture_gives_the_same_batch_and_is_not_changed(processor: MiniCPMV2Processor) -> None:
    image = picture(150, 90)
    before = image.tobytes()
    kept = processor.preprocess_image(image)
    fresh = processor.apply_chat_template(ask([image]))
    again = processor.apply_chat_template(ask([kept]))
    assert all(torch.equal(fresh[key], again[key]) for key in fresh)
    assert image.tobytes() == before


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_kind_of_picture_becomes_three_channels(processor: MiniCPMV2Processor, mode: str) -> None:
    image = picture(60, 40).convert(mode)
    assert torch.equal(
        processor.preprocess_image(image).slices[0], processor.preprocess_image(image.convert("RGB")).slices[0]
    )


# --- text


def test_text_of_several_pictures(folders: dict[str, Path]) -> None:
    image = picture(150, 90)  # 3 x 2 at 56
    processor = MiniCPMV2Processor.from_pretrained(folders["2.6"])
    batch = processor.apply_chat_template(ask([picture(60, 40), image], "Q"), add_generation_prompt=True)
    cells = "<slice><unk><unk><unk><unk></slice>" * 3
    assert processor.decode(batch["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<image_id>0</image_id><image><unk><unk><unk><unk></image>\n"
        f"<image_id>1</image_id><image><unk><unk><unk><unk></image>{cells}\n{cells}\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    processor = MiniCPMV2Processor.from_pretrained(folders["2.5"])
    batch = processor.apply_chat_template(ask([picture(60, 40), image], "Q"), add_generation_prompt=True)
    one = "<image><unk><unk><unk><unk></image>"
    assert processor.decode(batch["input_ids"][0]) == (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{one}\n{one}<slice>{one * 3}\n{one * 3}</slice>\nQ"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(("name", "end"), [("minicpmv26", "<|im_end|>"), ("minicpmllama3v25", "<|eot_id|>")])
def test_the_token_that_ends_a_turn_is_special(shared: Path, name: str, end: str) -> None:
    tokenizer = MiniCPMV2Processor.from_pretrained(shared / "parity" / name).tokenizer
    assert tokenizer.convert_tokens_to_ids(end) in tokenizer.all_special_ids  # tokenizer_config.json of 2.5 lists none
    assert tokenizer.decode(tokenizer(f"A{end}")["input_ids"], skip_special_tokens=True) == "A"


def test_places_are_the_placeholders_in_the_order_of_slices(processor: MiniCPMV2Processor) -> None:
    batch = processor.apply_chat_template(ROWS, add_generation_prompt=True)
    unknown = processor.tokenizer.unk_token_id
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == unknown)
    assert batch["mm_token_type_ids"].sum() == 4 * len(batch["tgt_sizes"])  # 4 placeholders a slice


@pytest.mark.parametrize("name", ["minicpmv26", "minicpmllama3v25"])
def test_without_generation_prompt_the_text_ends_with_the_turn(shared: Path, name: str) -> None:
    processor = MiniCPMV2Processor.from_pretrained(shared / "parity" / name)
    turns = [*ask([], "Q"), {"role": "assistant", "content": "A"}]
    ends = {"minicpmv26": "A<|im_end|>\n", "minicpmllama3v25": "A<|eot_id|>"}
    text = processor.apply_chat_template(turns, tokenize=False)
    assert text.endswith(ends[name])
    # what a row is trained on begins with what the model will see when it answers
    prompt = processor.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


@pytest.mark.parametrize("name", ["minicpmv26", "minicpmllama3v25"])
def test_the_default_template_is_the_hubs(shared: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(shared / "parity" / name, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    turns = [*ask([], " Q "), {"role": "assistant", "content": "A"}, *ask([], "R")]
    processors = [MiniCPMV2Processor.from_pretrained(f) for f in (shared / "parity" / name, folder)]
    for flag in (False, True):
        texts = [p.apply_chat_template(turns, tokenize=False, add_generation_prompt=flag) for p in processors]
        assert texts[0] == texts[1]


def test_messages_without_pictures_render_their_marks(processor: MiniCPMV2Processor) -> None:
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert f"{IMAGE_MARK}\nQ" in text
    whole = processor.apply_chat_template(ask([picture(60, 40)], "Q"), add_generation_prompt=True)
    for images in ([picture(60, 40)], [[picture(60, 40)]]):
        batch = processor(text=text, images=images)
        assert all(torch.equal(batch[key], whole[key]) for key in whole)
    assert torch.equal(processor(text=[text], images=[[picture(60, 40)]])["input_ids"], whole["input_ids"])


def test_left_and_right_padding_hold_the_same_rows(processor: MiniCPMV2Processor) -> None:
    left, right = processor.apply_chat_template(ROWS, add_generation_prompt=True), right_padded(processor, ROWS)
    for key in ("input_ids", "mm_token_type_ids"):
        for row in range(len(ROWS)):
            kept = [batch[key][row][batch["attention_mask"][row].bool()] for batch in (left, right)]
            assert torch.equal(*kept)
    assert left["attention_mask"][:, -1].all()
    assert right["attention_mask"][:, 0].all()


def test_inputs_that_do_not_fit_are_errors(processor: MiniCPMV2Processor) -> None:
    with pytest.raises(FedmllmError, match="its own text must not hold '<image>'"):
        processor.apply_chat_template(ask([], "what is <image> here?"))
    with pytest.raises(FedmllmError, match=r"2 marks .* but 1 pictures"):
        processor(text=f"{IMAGE_MARK} {IMAGE_MARK}", images=[picture(60, 40)])
    with pytest.raises(FedmllmError, match="2 texts need as many lists"):
        processor(text=["a", "b"], images=[[]])
    with pytest.raises(FedmllmError, match="not str"):
        processor(text=[IMAGE_MARK], images=[["file.png"]])
    with pytest.raises(FedmllmError, match="type 'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(FedmllmError, match=r"no other options.*max_length"):
        processor(text="a", max_length=3)


# --- files


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_an_absent_file_is_named(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(folders["2.6"], tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    with pytest.raises(FedmllmError, match=name):
        MiniCPMV2Processor.from_pretrained(tmp_path / "m")


def test_a_tokenizer_without_the_picture_tokens_is_an_error() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(FedmllmError, match=r"no token .*<image>"):
        MiniCPMV2Processor(bare, ImageSettings())
