"""Precision of the base, and what is trained on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedmllm.backbones.base import FromFolder, Lora, Precision
from fedmllm.backbones.folder import load_base
from fedmllm.backbones.hf import TransformersBackbone, load_folder
from fedmllm.core.errors import ConfigError
from fedmllm.core.tensors import num_bytes
from fedmllm.core.types import Conversation
from support.tiny_families import PORTS, stirred, write

FolderOf = Callable[[str], Path]
SOME = ["minicpmv2.6", "minicpmv4_6", "qwen3_vl", "gemma3"]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'fedmllm[nf4]'"
)


def load(folder: Path, base: str = "float32", **settings: Any) -> TransformersBackbone:
    checkpointing = settings.pop("gradient_checkpointing", False)
    precision = Precision.model_validate({"base": base, "gradient_checkpointing": checkpointing})
    return stirred(load_folder(FromFolder(path=str(folder), precision=precision, **settings), seed=0))


def gradients(
    backbone: TransformersBackbone, prompts: list[Conversation], seeds: list[int] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    live = backbone.trainable()
    nll_B, _ = backbone.loss(backbone.collate([backbone.encode(prompt, "yes") for prompt in prompts]), seeds)
    return nll_B.detach(), dict(zip(live, torch.autograd.grad(nll_B.sum(), list(live.values())), strict=True))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 over all tensors together."""
    flat_a, flat_b = (torch.cat([t.flatten().double() for t in tree.values()]) for tree in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(("base", "tolerance", "of_gradient"), [("float64", 1e-5, 1e-5), ("bfloat16", 0.1, 0.3)])
def test_a_base_of_another_precision_says_nearly_the_same(
    folder_of: FolderOf, prompts: list[Conversation], family: str, base: str, tolerance: float, of_gradient: float
) -> None:
    """bfloat16 keeps 8 bits; random weights of unit gain make the most of it (seen: 0.08 to 0.24 of the gradient)."""
    reference, changed = load(folder_of(family)), load(folder_of(family), base)
    (nll_B, grads), (other_B, others) = gradients(reference, prompts), gradients(changed, prompts)
    assert other_B.dtype == (torch.float64 if base == "float64" else torch.float32)
    wide = torch.float64 if base == "float64" else torch.float32
    assert {p.dtype for p in changed.trainable().values()} == {t.dtype for t in changed.lora().values()} == {wide}
    torch.testing.assert_close(other_B.float(), nll_B, rtol=tolerance, atol=tolerance)
    # float32 of the reference ends at 1.1e-5 to 2.2e-5 there, by the processor's vector instructions
    assert distance(others, grads) < (3e-5 if (family, base) == ("minicpmv2.6", "float64") else of_gradient)


@pytest.mark.parametrize("family", SOME)
def test_checkpointing_changes_no_bit_of_the_gradient(
    folder_of: FolderOf, prompts: list[Conversation], family: str
) -> None:
    """Dropout too: the second pass through a layer drops what the first did."""
    plain, recomputed = load(folder_of(family)), load(folder_of(family), gradient_checkpointing=True)
    (nll_B, grads), (other_B, others) = (gradients(b, prompts, [1, 2, 3]) for b in (plain, recomputed))
    assert torch.equal(nll_B, other_B)
    assert all(torch.equal(others[name], grads[name]) for name in grads)
    assert recomputed.generate(prompts, 3) == plain.generate(prompts, 3)  # the cache still works


@needs_bitsandbytes
@pytest.mark.parametrize("family", SOME)
def test_four_bits_train_after_an_evaluation(folder_of: FolderOf, prompts: list[Conversation], family: str) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would repack at the first evaluation, and gradients would stop, silently."""
    from bitsandbytes.nn import Linear4bit

    backbone = load(folder_of(family), "nf4")
    quantized = [name for name, m in backbone.base.named_modules() if isinstance(m, Linear4bit)]
    assert any(".layers.0.mlp." in name for name in quantized)
    assert any("vis" in name or "vpm" in name for name in quantized)  # the tower too, as in the hub's -int4
    assert not any(name.endswith("lm_head") for name in quantized)
    if family in PORTS:
        assert not any(name.endswith(("out_proj", "kv_proj")) for name in quantized)
    backbone.score(prompts, [("A", "B")] * 3)
    _, grads = gradients(backbone, prompts)
    assert all(float(g.abs().sum()) > 0 for g in grads.values())
    together, alone = backbone.loss(backbone.collate([backbone.encode(p, "yes") for p in prompts]))[0], []
    for prompt in prompts:
        alone.append(backbone.loss(backbone.collate([backbone.encode(prompt, "yes")]))[0])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["minicpmv2.6", "qwen3_vl"])
def test_a_folder_that_was_quantized_before(
    folder_of: FolderOf, tmp_path: Path, prompts: list[Conversation], family: str
) -> None:
    full = folder_of(family)
    base, _, _ = load_base(FromFolder(path=str(full), precision=Precision(base="nf4")))
    base.save_pretrained(tmp_path)
    for file in full.iterdir():
        if file.name not in ("config.json", "model.safetensors") and file.suffix in (".json", ".jinja"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"precision\.base: got 'float32', but .* holds 4-bit weights; set 'nf4'"):
        load(tmp_path)
    (nll_B, grads), (other_B, others) = (gradients(load(path, "nf4"), prompts) for path in (full, tmp_path))
    torch.testing.assert_close(other_B, nll_B, rtol=1e-5, atol=1e-5)
    assert distance(others, grads) < 1e-4


@pytest.mark.parametrize("base", ["float32", "bfloat16", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_whole_modules_are_trained_sent_and_saved_in_float32(
    folder_of: FolderOf, tmp_path: Path, prompts: list[Conversation], base: str
) -> None:
    folder = folder_of("minicpmv2.6")
    extra = load(folder, base, lora=Lora(train_extra=("embed_tokens", "resampler")), keep_image_features_mb=8)
    plain = load(folder, base)
    _, grads = gradients(extra, prompts)
    assert all(float(g.abs().sum()) > 0 for name, g in grads.items() if "lora_A" not in name)
    more = {name: t for name, t in extra.lora().items() if name not in plain.lora()}
    assert {name.split(".")[2] for name in more} == {"llm", "resampler"}
    assert "base_model.model.llm.model.embed_tokens.weight" in more
    assert {t.dtype for t in more.values()} == {torch.float32}
    assert num_bytes(extra.lora()) == num_bytes(plain.lora()) + 4 * sum(t.numel() for t in more.values())
    assert all(extra.layer_of(name) is None for name in more)
    torch.testing.assert_close(gradients(extra, prompts)[0], gradients(plain, prompts)[0], rtol=0.02, atol=0.02)

    extra.set_lora({name: t + 0.01 if name in more else t for name, t in extra.lora().items()})
    moved, _ = gradients(extra, prompts[:1])
    assert abs(float(moved - gradients(plain, prompts[:1])[0])) > 1e-3  # no feature was cached before
    if base == "float32":
        extra.save(tmp_path)
        theirs = PeftModel.from_pretrained(load_base(FromFolder(path=str(folder)))[0], str(tmp_path)).eval()
        row = extra.encode(prompts[0], "yes")
        arguments = {"input_ids": row.input_ids[None], **row.images, **{k: v[None] for k, v in row.per_token.items()}}
        with torch.no_grad():
            torch.testing.assert_close(theirs(**arguments).logits, extra.base(**arguments).logits)


def test_tied_embeddings_cannot_be_trained_whole(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = write("llava", tmp_path / "tied", tied=True)
    load(folder)
    with pytest.raises(ConfigError, match=r"'model\.language_model\.embed_tokens' is tied to 'lm_head'"):
        load(folder, lora=Lora(train_extra=("embed_tokens",)))


def test_rslora_scales_by_the_root_of_the_rank(folder_of: FolderOf, prompts: list[Conversation]) -> None:
    """arXiv:2312.03732: alpha / sqrt(r) instead of alpha / r; so alpha = sqrt(r) equals plain LoRA with alpha = r."""
    plain = load(folder_of("llava"), lora=Lora(r=4, alpha=4.0))
    rs = load(folder_of("llava"), lora=Lora(r=4, alpha=2.0, rslora=True))
    assert torch.equal(gradients(plain, prompts)[0], gradients(rs, prompts)[0])


def test_targets_of_one_s_own(folder_of: FolderOf) -> None:
    """The paper's regex works as it stands on MiniCPM-V 2.6."""
    paper = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"
    ours, theirs = (load(folder_of("minicpmv2.6"), lora=Lora(targets=t)).lora() for t in ("", paper))
    assert ours.keys() == theirs.keys()
    only = load(folder_of("llava"), lora=Lora(targets=r"model\.language_model\.layers\.1\.mlp\.down_proj")).lora()
    assert list(only) == [f"base_model.model.model.language_model.layers.1.mlp.down_proj.lora_{x}.weight" for x in "AB"]


def test_features_are_kept_up_to_their_limit(tmp_path: Path, prompts: list[Conversation]) -> None:
    backbone = load(write("llava", tmp_path / "own", tied=True), keep_image_features_mb=1)  # no other test's model
    rows = [backbone.encode(prompt, "yes") for prompt in prompts]
    backbone.features._keep_bytes = 16 * 64 * 4  # the 16 vectors of 64 float32 of one picture: the first row's
    backbone.loss(backbone.collate(rows))
    assert [backbone.features.has(row) for row in rows] == [True, False, True]  # the last has no picture


def test_a_prompt_that_was_scored_before_is_not_read_again(
    folder_of: FolderOf, prompts: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the same bits."""
    choices = [("A", "no, never")] * 3
    cached, fresh = load(folder_of("qwen2_vl"), keep_image_features_mb=1), load(folder_of("qwen2_vl"))
    before = cached.score(prompts, choices)
    assert before == fresh.score(prompts, choices)
    monkeypatch.setattr("fedmllm.backbones.encode.open_image", lambda _: pytest.fail("a picture was read"))
    assert cached.score(prompts, choices) == before
    assert cached.generate(prompts, 3)
    cached.set_lora({name: t * 2 for name, t in cached.lora().items()})
    assert cached.score(prompts, choices) != before  # prompts are cached, answers are not


def test_thinking_is_switched_off(tmp_path: Path, prompts: list[Conversation]) -> None:
    """As the templates of Qwen3.5 and MiniCPM-V 4.6 do it: the answer follows an empty thought, not an open one."""
    folder = write("llava", tmp_path / "thinks")
    template = folder / "chat_template.jinja"
    opened = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"
    template.write_text(template.read_text().replace("assistant\n{%", f"assistant\n{opened}{{%"))
    backbone = load(folder)
    row = backbone.encode(prompts[2], "yes")
    assert backbone.encoder.decode(row.input_ids.tolist()).endswith("assistant\n<think></think>yes")
    assert (
        row.labels[-1] == backbone.encoder.end_of_turn == backbone.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
