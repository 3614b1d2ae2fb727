"""Make the embedded model: MiniCPM-V 2.6 at about a million weights, pre-trained on the proxy tasks of `tiny_tasks`.

    python scripts/pretrain_tiny.py --out runs/tiny                                # about 15 minutes of a core
    python scripts/pretrain_tiny.py --out runs/tiny --compare src/fedmllm/backbones/tiny_checkpoint_2   # edition 2, rebuilt
    python scripts/pretrain_tiny.py --steps 50 --vision-steps 50 --out runs/tiny   # a trial

Two stages. Vision first: the tower and the resampler learn to separate the scenes' attributes through linear heads, because a
language model that starts with an untrained tower learns to ignore the picture. Then language, with the pictures' features
frozen and kept. Writes the folder in the hub's layout and a JSON log of settings, times and accuracies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_muon import Muon
from tiny_tasks import Sample, corpus
from tiny_tokenizer import save_tokenizer, train_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config

from fedmllm.backbones.minicpmv2.images import ImageSettings
from fedmllm.backbones.minicpmv2.model import MiniCPMV2Config, MiniCPMV2ForConditionalGeneration, MiniCPMV2Processor
from fedmllm.backbones.minicpmv2.processor import build_tokenizer
from fedmllm.core.rng import stream, stream_seed
from fedmllm.data.scenes import COLOURS, FACES, SIZE, SKIES, THINGS, Scene, draw

VOCABULARY = 1300
QUERIES = 8
PATCH = 7
WEIGHTS = "model.safetensors"
# Muon's rate decides whether yes/no questions about an attribute are learned, and with them every joint question: at 0.02, what
# was learned is lost again (results/LOG.md). The first token of an answer is the letter or word that decides; the rest of a
# lettered answer only copies its option.
LANGUAGE_LR = 0.005
FIRST_TOKEN = 8.0
ATTRIBUTES = {"sky": SKIES, "thing": THINGS, "colour": COLOURS, "face": FACES}


def config(vocab_size: int) -> MiniCPMV2Config:
    """A million weights: wide enough for the resampler's heads (128), few enough layers for a step of 10 ms."""
    text = Qwen2Config(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=256, max_position_embeddings=2048, rope_theta=10000.0, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = {
        "hidden_size": 96, "image_size": SIZE, "intermediate_size": 192, "num_attention_heads": 4,
        "num_hidden_layers": 2, "patch_size": PATCH,
    }  # fmt: skip
    return MiniCPMV2Config(
        version=2.6, text_config=text.to_dict(), vision_config=vision, query_num=QUERIES, image_size=SIZE,
        patch_size=PATCH, slice_mode=False, slice_config={"max_slice_nums": 1, "scale_resolution": SIZE},
        tie_word_embeddings=True,
    )  # fmt: skip


def image_settings() -> ImageSettings:
    """One slice of about 56 x 56 pixels, whatever the picture's size."""
    return ImageSettings(
        max_slice_nums=1, scale_resolution=SIZE, patch_size=PATCH, image_feature_size=QUERIES, slice_mode=False
    )


def optimizers(
    modules: Sequence[nn.Module], embeddings: Sequence[nn.Parameter], lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (it learns in seconds what AdamW needs minutes for), AdamW for embeddings, norms and biases."""
    parameters = {id(p): p for module in modules for p in module.parameters()}
    apart = {id(p) for p in embeddings}
    matrices = [p for key, p in parameters.items() if p.ndim == 2 and key not in apart]
    rest = [p for key, p in parameters.items() if p.ndim != 2 or key in apart]
    return [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def set_rates(optimizers_: Sequence[torch.optim.Optimizer], base: Sequence[float], progress: float) -> None:
    """Clear the gradients; the base rates times a warm-up of 2 % and a linear fall to 0."""
    factor = min(1.0, progress / 0.02 + 0.05) * (1 - progress)
    for optimizer, lr in zip(optimizers_, base, strict=True):
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor


def pictures(scenes: Sequence[Scene], seed: int, purpose: str, processor: MiniCPMV2Processor) -> Tensor:
    """Pixels of the scenes as the model reads them: [S, 3, patch, patches * patch]."""
    drawn = [draw(scene, stream(seed, purpose, i)) for i, scene in enumerate(scenes)]
    return torch.stack([processor.preprocess_image(image).slices[0] for image in drawn])


def features(model: Any, pixels: Tensor) -> Tensor:
    """Pixels [S, ...] -> what the language model reads, [S, Q, D]."""
    sizes = [(SIZE // PATCH, SIZE // PATCH)] * len(pixels)
    out: Tensor = model.resampler(model.vpm(pixels, sizes), sizes)
    return out


def train_vision(model: Any, scenes: Sequence[Scene], pixels: Tensor, num_steps: int, rng: Any) -> nn.ModuleDict:
    """Tower and resampler, with one linear head an attribute on all of the resampler's outputs (their mean learns slower)."""
    width = QUERIES * model.config.hidden_size
    heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})
    targets = {n: torch.tensor([v.index(getattr(s, n)) for s in scenes]) for n, v in ATTRIBUTES.items()}
    apart = [model.vpm.embeddings.position_embedding.weight, model.resampler.query]
    chosen = optimizers([model.vpm, model.resampler, heads], apart, lr=0.02)
    base = [group["lr"] for o in chosen for group in o.param_groups]
    for n in range(num_steps):
        index = torch.from_numpy(rng.integers(len(scenes), size=64))
        flat = features(model, pixels[index]).flatten(1)
        losses = [F.cross_entropy(heads[name](flat), target[index]) for name, target in targets.items()]
        set_rates(chosen, base, n / num_steps)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        for optimizer in chosen:
            optimizer.step()
    return heads


@torch.no_grad()
def vision_accuracy(heads: nn.ModuleDict, feats: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of held-out pictures whose attribute the linear head predicts."""
    found = {}
    for name, values in ATTRIBUTES.items():
        guesses = heads[name](feats.flatten(1)).argmax(1).tolist()
        found[name] = float(np.mean([values[k] == getattr(s, name) for k, s in zip(guesses, scenes, strict=True)]))
    return found


class Encoded:
    """The corpus as ids, in the form in which `Backbone.encode` will put the same rows."""

    def __init__(self, samples: Sequence[Sample], tokenizer: Any) -> None:
        self.samples = samples
        image = "<image>" + "<unk>" * QUERIES + "</image>\n"
        prompts = [
            f"<|im_start|>user\n{image if s.scene >= 0 else ''}{s.conversation.text}<|im_end|>\n<|im_start|>assistant\n"
            for s in samples
        ]
        self.prompts: list[list[int]] = tokenizer(prompts)["input_ids"]
        self.answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([s.answer for s in samples])["input_ids"]]
        self.placeholder = tokenizer.convert_tokens_to_ids("<unk>")

    def batch(self, index: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """(ids_BL, labels_BL with -100 outside the answer, scenes of the rows that have a picture)."""
        rows = [self.prompts[i] + self.answers[i] for i in index]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for n, (i, row) in enumerate(zip(index, rows, strict=True)):
            ids[n, : len(row)] = torch.tensor(row)
            labels[n, len(self.prompts[i]) : len(row)] = torch.tensor(self.answers[i])
        return ids, labels, [self.samples[i].scene for i in index if self.samples[i].scene >= 0]

    def by_length(self, index: Sequence[int], parts: int) -> list[list[int]]:
        """A batch cut into parts of about equal length, so that little of it is padding."""
        order = sorted(index, key=lambda i: len(self.prompts[i]) + len(self.answers[i]))
        return [[int(i) for i in part] for part in np.array_split(np.array(order), parts)]


def answer_logits(model: Any, encoded: Encoded, index: Sequence[int], feats: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, labels) at every token of the rows' answers."""
    ids, labels, scenes = encoded.batch(index)
    embeds = model.llm.model.embed_tokens(ids)
    embeds = embeds.masked_scatter((ids == encoded.placeholder)[..., None], feats[scenes].to(embeds))
    hidden = model.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state  # padding is on the right: causal
    asked = labels[:, 1:] != -100
    return model.llm.lm_head(hidden[:, :-1][asked]), labels[:, 1:][asked]


def first_tokens(encoded: Encoded, index: Sequence[int]) -> list[int]:
    """Return where the answers of the rows begin in what `answer_logits` returns for them."""
    lengths = [len(encoded.answers[i]) for i in index]
    return [0, *np.cumsum(lengths)[:-1].tolist()]


def train_language(model: Any, encoded: Encoded, feats: Tensor, size: int) -> list[float]:
    """One pass over the corpus, in its order; the loss is the answers' alone, each first token with `FIRST_TOKEN`."""
    chosen = optimizers([model.llm], [model.llm.model.embed_tokens.weight], lr=LANGUAGE_LR)
    base = [group["lr"] for o in chosen for group in o.param_groups]
    batches, losses = np.arange(len(encoded.samples)).reshape(-1, size), []
    for n, index in enumerate(batches):
        set_rates(chosen, base, n / len(batches))
        total = sum(len(encoded.answers[i]) + FIRST_TOKEN - 1 for i in index)
        losses.append(0.0)
        for part in encoded.by_length(index, max(1, size // 16)):
            logits, labels = answer_logits(model, encoded, part, feats)
            weights = torch.ones(len(labels))
            weights[first_tokens(encoded, part)] = FIRST_TOKEN
            loss = (weights * F.cross_entropy(logits, labels, reduction="none")).sum() / total
            loss.backward()  # type: ignore[no-untyped-call]
            losses[-1] += float(loss.detach())
        for optimizer in chosen:
            optimizer.step()
        if n % 200 == 199:
            print(f"  step {n + 1}/{len(batches)} loss {np.mean(losses[-200:]):.3f}", flush=True)
    return [round(float(np.mean(part)), 4) for part in np.array_split(losses, 20)]


@torch.no_grad()
def language_accuracy(model: Any, encoded: Encoded, feats: Tensor) -> dict[str, float]:
    """Share of held-out rows whose first answer token is right, by task."""
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(encoded.samples), 64):
        index = list(range(start, min(start + 64, len(encoded.samples))))
        logits, labels = answer_logits(model, encoded, index, feats)
        for i, first in zip(index, first_tokens(encoded, index), strict=True):
            right[encoded.samples[i].task].append(float(logits[first].argmax() == labels[first]))
    return {task: round(float(np.mean(values)), 3) for task, values in sorted(right.items())}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def content(path: Path) -> bytes | dict[str, Any]:
    """Content of a file; without the version of transformers that wrote a configuration."""
    if path.name not in ("config.json", "generation_config.json"):
        return path.read_bytes()
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in table.items() if key != "transformers_version"}


def is_equal(new: Path, old: Path) -> bool:
    """Return whether the files say the same; print which do not, and how far the weights are apart.

    Equal weights need equal sums: one kind of processor, one version of torch, one thread.
    """
    ours, theirs = ({p.name: content(p) for p in folder.iterdir() if p.is_file()} for folder in (new, old))
    for name in sorted(ours.keys() | theirs.keys()):
        print(f"{'equal' if ours.get(name) == theirs.get(name) else 'DIFFERENT'}  {name}")
    a, b = load_file(new / WEIGHTS), load_file(old / WEIGHTS)
    if {n: x.shape for n, x in a.items()} == {n: x.shape for n, x in b.items()}:
        print(f"largest difference of a weight: {max(float((x - b[n]).abs().max()) for n, x in a.items()):.3g}")
    return ours == theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--log", type=Path, help="JSON of settings, times, accuracies and the files' SHA-256")
    parser.add_argument("--compare", type=Path, help="exit with 1 unless the new files equal those of this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="another number sums in another order: other weights")
    parser.add_argument("--scenes", type=int, default=12000)
    parser.add_argument("--vision-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    if args.compare and not (args.compare / WEIGHTS).is_file():
        parser.error(f"--compare: {args.compare} has no {WEIGHTS}")
    if args.compare and args.compare.resolve() == args.out.resolve():
        parser.error("--compare: the folder of --out, which is overwritten; give another --out")
    torch.set_num_threads(args.threads)
    torch.manual_seed(stream_seed(args.seed, "pretrain"))
    log: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items() if k not in ("out", "log")}}
    log["settings"] |= {"language_lr": str(LANGUAGE_LR), "first_token": str(FIRST_TOKEN)}
    log |= {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    log |= {"python": platform.python_version(), "machine": platform.machine()}
    began = time.perf_counter()

    def timed(name: str) -> None:
        log[f"{name}_s"] = round(time.perf_counter() - began, 1)
        print(f"{log[f'{name}_s']:7.1f} s  {name}", flush=True)

    rng = stream(args.seed, "scenes")
    scenes = [Scene.random(rng) for _ in range(args.scenes)]
    held_out = [Scene.random(rng) for _ in range(1000)]
    samples = corpus(scenes, args.steps * args.batch, stream(args.seed, "corpus"))
    args.out.mkdir(parents=True, exist_ok=True)
    texts = [f"user\nassistant\n{s.conversation.text}" for s in samples[:8000]] + [
        f" {s.answer}" for s in samples[:8000]
    ]
    save_tokenizer(train_tokenizer(texts, VOCABULARY), args.out)
    tokenizer = build_tokenizer(args.out, 2.6)
    processor = MiniCPMV2Processor(tokenizer, image_settings())
    model: Any = MiniCPMV2ForConditionalGeneration(config(len(tokenizer)))
    log["num_weights"] = sum(p.numel() for p in model.parameters())
    pixels, held_pixels = (pictures(s, args.seed, p, processor) for s, p in ((scenes, "draw"), (held_out, "held-out")))
    timed("prepared")

    heads = train_vision(model, scenes, pixels, args.vision_steps, stream(args.seed, "vision"))
    with torch.no_grad():
        feats, held_feats = (torch.cat([features(model, x) for x in p.split(256)]) for p in (pixels, held_pixels))
    log["vision_accuracy"] = vision_accuracy(heads, held_feats, held_out)
    timed("vision")
    print(log["vision_accuracy"], flush=True)

    encoded = Encoded(samples, tokenizer)
    log["mean_tokens"] = round(
        float(np.mean([len(p) + len(a) for p, a in zip(encoded.prompts, encoded.answers, strict=True)])), 1
    )
    log["loss"] = train_language(model, encoded, feats, args.batch)
    timed("language")
    held = Encoded(corpus(held_out, 4000, stream(args.seed, "held-out corpus")), tokenizer)
    log["accuracy"] = language_accuracy(model, held, held_feats)

    model.save_pretrained(args.out)
    (args.out / "preprocessor_config.json").unlink(missing_ok=True)
    processor_file = {"image_processor_type": "MiniCPMVImageProcessor", "processor_class": "MiniCPMVProcessor"}
    settings = image_settings()
    processor_file |= {field: getattr(settings, field) for field in settings.__dataclass_fields__}
    (args.out / "preprocessor_config.json").write_text(json.dumps(processor_file, indent=1) + "\n", encoding="utf-8")
    log["sha256"] = digests(args.out)
    print(json.dumps(log, indent=1))
    if args.log:
        args.log.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    if args.compare and not is_equal(args.out, args.compare):
        sys.exit(1)


if __name__ == "__main__":
    main()
