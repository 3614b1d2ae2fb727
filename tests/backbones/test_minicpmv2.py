"""The port of MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5: parity with the original, and what federated training leans on.

Parity (`../shared/parity`): what the hub's code gave on transformers 4.40.0 in float32. The other tests make their own
folders of random weights, so they run in a checkout that stands alone. Pictures and text: `test_minicpmv2_inputs.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedmllm.backbones.minicpmv2.model import MiniCPMV2Config, MiniCPMV2ForConditionalGeneration, MiniCPMV2Processor
from fedmllm.backbones.minicpmv2.vision import axis_positions, position_buckets
from fedmllm.core.errors import FedmllmError
from support.minicpmv2_folder import ROWS, VERSIONS, ask, load, picture, right_padded, write_folder

CASES = [
    ("minicpmv26", "img", [["small"], ["sliced"]]),
    ("minicpmv26", "mix", [["small"], []]),
    ("minicpmllama3v25", "img", [["sliced"]]),
]
LORA = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"  # the paper's


# --- parity


@pytest.fixture(scope="module")
def parity(shared: Path) -> Any:
    """name -> (model, loading info, processor, golden tensors, golden json), each loaded once."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            folder = shared / "parity" / name
            model, info = MiniCPMV2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
            golden = load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())
            loaded[name] = (model.eval(), info, MiniCPMV2Processor.from_pretrained(folder), *golden)
        return loaded[name]

    return load


def golden_batch(shared: Path, processor: MiniCPMV2Processor, rows: list[list[str]]) -> Any:
    pictures = {name: Image.open(shared / "parity" / f"{name}.png") for name in ("small", "sliced")}
    conversations = [ask([pictures[name] for name in row]) for row in rows]
    return processor.apply_chat_template(conversations, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["minicpmv26", "minicpmllama3v25"])
def test_every_weight_of_the_hub_layout_is_loaded(parity: Any, shared: Path, name: str) -> None:
    model, info, *_ = parity(name)
    assert not any(info.values()), info
    stored = load_file(shared / "parity" / name / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "case", "rows"), CASES)
def test_ids_and_pixels_are_the_originals(parity: Any, shared: Path, name: str, case: str, rows: list[Any]) -> None:
    _, _, processor, golden, _ = parity(name)
    batch = golden_batch(shared, processor, rows)
    assert torch.equal(batch["input_ids"], golden[f"{case}.input_ids"])
    if f"{case}.attention_mask" in golden:
        assert torch.equal(batch["attention_mask"], golden[f"{case}.attention_mask"])
    keys = [k for k in golden if k.startswith(f"{case}.pixel_values.")]
    keys.sort(key=lambda k: tuple(map(int, k.split(".")[2:])))
    assert len(batch["pixel_values"]) == len(keys)
    for mine, key in zip(batch["pixel_values"], keys, strict=True):
        length = golden[key].shape[-1]
        assert torch.equal(mine[..., :length], golden[key])
        assert not mine[..., length:].any()
    sizes = torch.cat([golden[k] for k in sorted(golden) if k.startswith(f"{case}.tgt_sizes.")])
    assert torch.equal(batch["tgt_sizes"].long(), sizes)
    assert batch["tgt_sizes"].dtype == torch.int32


@pytest.mark.parametrize(("name", "case", "rows"), CASES)
def test_logits_are_the_originals(parity: Any, shared: Path, name: str, case: str, rows: list[Any]) -> None:
    model, _, processor, golden, _ = parity(name)
    batch = golden_batch(shared, processor, rows)
    with torch.no_grad():
        difference = (model(**batch).logits - golden[f"{case}.logits"])[batch["attention_mask"].bool()]
    assert difference.abs().max() < 5e-4  # the logits' own deviation is 2.4


@pytest.mark.parametrize("name", ["minicpmv26", "minicpmllama3v25"])
def test_greedy_tokens_are_the_originals(parity: Any, shared: Path, name: str) -> None:
    model, _, processor, _, golden = parity(name)
    batch = golden_batch(shared, processor, next(rows for n, case, rows in CASES if (n, case) == (name, "img")))
    ids = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert ids.tolist() == json.loads(golden["greedy_new_tokens"][0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {version: write_folder(tmp_path_factory.mktemp("v") / version, version) for version in VERSIONS}


@pytest.fixture(scope="module", params=VERSIONS)
def tiny(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    return load(folders[request.param])


# --- the eye


def test_position_buckets_follow_float32_steps() -> None:
    boundaries = torch.arange(1 / 70, 1.0, 1 / 70)
    differ = []
    for count in range(1, 71):
        plain = torch.bucketize(torch.arange(count, dtype=torch.float32) / count, boundaries, right=True)
        mine = position_buckets(count, 70)
        assert len(mine) == count
        assert mine.max() < 70
        differ += [] if torch.equal(plain, mine) else [count]
    assert differ == [25, 49, 50, 55, 58]  # found in the original; i / count would be wrong for these


def test_the_first_half_of_the_position_channels_is_the_column() -> None:
    table = axis_positions(5, 64, torch.device("cpu"))
    frequencies = 10000.0 ** (-np.arange(32) / 32)
    by_hand = np.concatenate([np.sin(3 * frequencies), np.cos(3 * frequencies)])
    assert np.abs(table[3].numpy() - by_hand).max() < 1e-6


def padded_reference(model: Any, pixels: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """All slices in one padded batch behind masks, with torch's own attention: how the original goes about it."""
    strip = model.config.on_strip
    longest = max(h * w for h, w in sizes)
    real_SN = torch.stack([torch.arange(longest) < h * w for h, w in sizes])
    embed, resampler = model.vpm.embeddings, model.resampler
    ids_SN = torch.zeros(len(sizes), longest, dtype=torch.long)
    for row, (h, w) in zip(ids_SN, sizes, strict=True):
        h, w = (1, longest) if strip else (h, w)
        row[: h * w] = (
            position_buckets(h, embed.side)[:, None] * embed.side + position_buckets(w, embed.side)
        ).flatten()
    hidden = embed.patch_embedding(pixels).flatten(2).transpose(1, 2) + embed.position_embedding(ids_SN)
    mask = None if strip else real_SN[:, None, None, :].expand(-1, 1, longest, -1)  # 2.5 attends its padding
    hidden = model.vpm.post_layernorm(model.vpm.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state)
    width = resampler.proj.shape[0]
    positions = torch.zeros(len(sizes), longest, width)
    table = axis_positions(64, width // 2, hidden.device)
    for row, (h, w) in zip(positions, sizes, strict=True):
        for patch in range(h * w):
            row[patch] = torch.cat([table[patch % w], table[patch // w]])
    attention = nn.MultiheadAttention(width, width // 128, batch_first=True)
    attention.load_state_dict(resampler.attn.state_dict())
    values = resampler.ln_kv(resampler.kv_proj(hidden))
    query = resampler.ln_q(resampler.query).expand(len(sizes), -1, -1)
    out = attention(query, values + positions, values, key_padding_mask=~real_SN, need_weights=False)[0]
    return resampler.ln_post(out) @ resampler.proj


@torch.no_grad()
def test_features_are_those_of_one_padded_batch(tiny: Any) -> None:
    model, processor = tiny
    pictures = [picture(150, 90), picture(20, 200), picture(56, 56), picture(60, 40)]
    batch = processor.apply_chat_template(ask(pictures))  # one row of 18 slices, more than vision_batch_size
    sizes = [(h, w) for h, w in batch["tgt_sizes"].tolist()]
    assert len({h * w for h, w in sizes}) > 2
    mine = model.get_image_features(batch["pixel_values"], batch["tgt_sizes"])
    assert (mine - padded_reference(model, batch["pixel_values"], sizes)).abs().max() < 1e-4


@torch.no_grad()
def test_a_slice_does_not_depend_on_its_neighbours(folders: dict[str, Path]) -> None:
    model, processor = load(folders["2.6"])
    batch = processor.apply_chat_template(ROWS)
    together = model.get_image_features(batch["pixel_values"], batch["tgt_sizes"])
    for index, features in enumerate(together):
        alone = model.get_image_features(batch["pixel_values"][index, None], batch["tgt_sizes"][index, None])
        assert (alone[0] - features).abs().max() < 1e-4


@torch.no_grad()
def test_in_25_a_slice_depends_on_the_longest_of_its_row(folders: dict[str, Path]) -> None:
    model, processor = load(folders["2.5"])
    long, short = processor.preprocess_image(picture(150, 90)), processor.preprocess_image(picture(60, 40))
    batch = processor.apply_chat_template([ask([short]), ask([long])])
    pixels, sizes = batch["pixel_values"], batch["tgt_sizes"]
    alone = model.get_image_features(pixels[:1], sizes[:1])[0]
    by_row = model.get_image_features(pixels, sizes, [1, len(sizes) - 1])[0]
    as_one = model.get_image_features(pixels, sizes)[0]
    assert (alone - by_row).abs().max() < 1e-4
    assert (alone - as_one).abs().max() > 1e-2  # the quirk, see get_image_features


# --- batches


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "right without mask"])
def test_a_row_does_not_depend_on_its_batch(tiny: Any, side: str) -> None:
    model, processor = tiny
    left = side == "left"
    batch = processor.apply_chat_template(ROWS, add_generation_prompt=True) if left else right_padded(processor, ROWS)
    inside = batch["attention_mask"].bool()
    if side == "right without mask":
        del batch["attention_mask"]
    logits = model(**batch).logits
    for index, row in enumerate(ROWS):
        alone = model(**processor.apply_chat_template(row, add_generation_prompt=True)).logits[0]
        assert (logits[index][inside[index]] - alone).abs().max() < 2e-4


@torch.no_grad()
def test_features_may_be_given_in_place_of_pixels(tiny: Any) -> None:
    model, processor = tiny
    batch = processor.apply_chat_template(ROWS)
    expected = model(**batch).logits
    pixels, sizes = batch.pop("pixel_values"), batch.pop("tgt_sizes")
    slices = [1, 0, 8, 1]  # of ROWS: 150 x 90 is cut in 3 x 2 and has a thumbnail
    rows = [
        model.get_image_features(p, s) for p, s in zip(pixels.split(slices), sizes.split(slices), strict=True) if len(p)
    ]
    assert (model(**batch, image_features=torch.cat(rows)).logits - expected).abs().max() < 2e-4


@torch.no_grad()
def test_pictures_and_their_order_matter(tiny: Any) -> None:
    model, processor = tiny
    a, b = picture(56, 56, 1), picture(56, 56, 2)
    logits = [
        model(**processor.apply_chat_template(ask(list(pair)))).logits[0, -1] for pair in ((a, b), (b, a), (a, a))
    ]
    assert all((logits[i] - logits[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


@torch.no_grad()
def test_only_the_asked_logits_are_computed(tiny: Any) -> None:
    model, processor = tiny
    batch = processor.apply_chat_template(ROWS)
    whole = model(**batch).logits
    assert torch.allclose(model(**batch, logits_to_keep=2).logits, whole[:, -2:], atol=1e-5)
    features = model.get_image_features(batch["pixel_values"], batch["tgt_sizes"], [1, 0, 8, 1])
    embeds = model.embed(batch["input_ids"], batch["mm_token_type_ids"], image_features=features)
    hidden = model.llm.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).last_hidden_state
    assert torch.allclose(model.llm.lm_head(hidden[:, -1]), whole[:, -1], atol=1e-4)


# --- generation


def test_generation_with_and_without_cache_is_the_same_and_as_alone(tiny: Any) -> None:
    model, processor = tiny
    batch = processor.apply_chat_template(ROWS, add_generation_prompt=True)
    start, options = batch["input_ids"].shape[1], {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(**batch, **options, pad_token_id=0, eos_token_id=None)[:, start:]
    plain = model.generate(**batch, **options, pad_token_id=0, eos_token_id=None, use_cache=False)[:, start:]
    assert torch.equal(cached, plain)
    for index, row in enumerate(ROWS):
        alone = processor.apply_chat_template(row, add_generation_prompt=True)
        ids = model.generate(**alone, **options, pad_token_id=0, eos_token_id=None)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(ids, cached[index])


def test_beams_keep_rows_and_slices_together(tiny: Any) -> None:
    model, processor = tiny
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    batch = processor.apply_chat_template(ROWS, add_generation_prompt=True)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for index, row in enumerate(ROWS):
        alone = processor.apply_chat_template(row, add_generation_prompt=True)
        assert torch.equal(model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], together[index])


# --- training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["text", "image", "mixed"])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_reach_lora_and_nothing_else(
    folders: dict[str, Path], version: str, kind: str, checkpointing: bool
) -> None:
    model, processor = load(folders[version])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=LORA, init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    batch = right_padded(processor, {"text": ROWS[1:2], "image": ROWS[2:3], "mixed": ROWS}[kind])
    labels = batch["input_ids"].masked_fill(batch.pop("attention_mask") == 0, -100)
    adapted.train()
    adapted(**batch, labels=labels, use_cache=False).loss.backward()
    moved = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(moved) == 2 * 4 * 2  # layers x projections x (A, B)
    assert not any("vpm" in name for name in moved)


def test_checkpointing_changes_no_gradient(folders: dict[str, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, processor = load(folders["2.6"])
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        weight = model.llm.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        batch = right_padded(processor, ROWS)
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_the_eye_can_be_trained_too(tiny: Any) -> None:
    model, processor = tiny
    model.zero_grad()
    model(**processor.apply_chat_template(ROWS)).logits.square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    model.zero_grad(set_to_none=True)
    assert without == set()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(folders: dict[str, Path], dtype: torch.dtype) -> None:
    for version in VERSIONS:
        model, processor = load(folders[version])
        other, _ = load(folders[version], dtype=dtype)
        batch = processor.apply_chat_template(ROWS)
        a, b = model(**batch).logits, other(**batch).logits
        assert b.dtype == dtype
        keep = batch["attention_mask"].bool()
        error = (a - b)[keep].square().mean().sqrt() / a[keep].std()
        assert error < (0.05 if dtype == torch.bfloat16 else 1e-4)  # bfloat16 keeps 8 bits


# --- files


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_save_and_load_is_exact(tmp_path: Path, version: str, tied: bool) -> None:
    model, processor = load(write_folder(tmp_path / "a", version, tied))
    model.save_pretrained(tmp_path / "b")
    processor.save_pretrained(tmp_path / "b")
    again, processor_again = load(tmp_path / "b")
    assert (again.llm.lm_head.weight is again.llm.model.embed_tokens.weight) == tied
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    configs = [{**m.config.to_dict(), "_name_or_path": ""} for m in (model, again)]
    assert configs[0] == configs[1]
    batch, batch_again = (p.apply_chat_template(ROWS, add_generation_prompt=True) for p in (processor, processor_again))
    assert all(torch.equal(batch[key], batch_again[key]) for key in batch)
    assert torch.equal(model(**batch).logits, again(**batch_again).logits)
    flat = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (flat["model_type"], flat["hidden_size"], "text_config" in flat) == ("minicpmv", 128, False)


def test_a_saved_hub_folder_loads_with_the_same_numbers(parity: Any, shared: Path, tmp_path: Path) -> None:
    model, _, processor, *_ = parity("minicpmv26")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())  # no way back to remote code
    again, processor_again = load(tmp_path)
    batches = [golden_batch(shared, p, [["small"], ["sliced"]]) for p in (processor, processor_again)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, again(**batches[1]).logits)


def test_the_real_models_have_their_published_sizes() -> None:
    tower = {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "patch_size": 14}
    tower |= {"num_attention_heads": 16, "num_hidden_layers": 27}
    qwen = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    configs = [
        MiniCPMV2Config(version=2.6, vocab_size=151666, num_key_value_heads=4, vision_config=tower, **qwen),
        MiniCPMV2Config(version="2.5", vocab_size=128256, num_key_value_heads=8, query_num=96, **llama),
    ]
    for config, total in zip(configs, [8_099_175_152, 8_537_092_336], strict=True):  # as the hub counts them
        with torch.device("meta"):
            model = MiniCPMV2ForConditionalGeneration(config)
        assert sum(p.numel() for p in model.parameters()) == total
        assert not [name for name, _ in model.named_buffers() if "inv_freq" not in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "missing keys.*llm.model.layers.2"),
        ({"num_hidden_layers": 1}, "unexpected keys.*llm.model.layers.1"),
        ({"query_num": 5}, "mismatched keys.*resampler.query"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings true"),
        ({"version": 2.0}, "version is 2.0"),
        ({"hidden_size": 192}, "multiple of 128"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(folders["2.6"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    if "num_hidden_layers" in change:
        config.pop("layer_types")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FedmllmError, match=message):
        MiniCPMV2ForConditionalGeneration.from_pretrained(tmp_path / "m")


def test_an_absent_weight_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["2.6"], tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["resampler.proj"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FedmllmError, match=r"1 missing keys: \['resampler.proj'\]"):
        MiniCPMV2ForConditionalGeneration.from_pretrained(tmp_path / "m")


def test_batches_that_do_not_fit_are_errors(tiny: Any) -> None:
    model, processor = tiny
    batch = processor.apply_chat_template(ask([picture(60, 40)]))
    for absent, message in {
        "mm_token_type_ids": "without mm_token_type_ids",
        "tgt_sizes": "without tgt_sizes",
        "pixel_values": "neither pixel_values nor image_features",
    }.items():
        with pytest.raises(FedmllmError, match=message):
            model(**{key: value for key, value in batch.items() if key != absent})
    with pytest.raises(FedmllmError, match="4 places for image features, but 2 slices"):
        model(
            **{
                **batch,
                "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1),
                "tgt_sizes": batch["tgt_sizes"].repeat(2, 1),
            }
        )
