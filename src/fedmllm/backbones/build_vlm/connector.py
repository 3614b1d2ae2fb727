"""Training of the projector between two frozen models.

The questions about one picture share its prefix: a row is the prefix, then each question with its answer, and a question
attends to the prefix and itself alone. Shapes: B pictures, L tokens, D width, V vocabulary, N label tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmllm.backbones.build_vlm.assemble import PROJECTOR, TOKENS
from fedmllm.backbones.build_vlm.pictures import CaptionScene, questions
from fedmllm.core.errors import FedmllmError
from fedmllm.core.rng import stream
from fedmllm.core.spec import Spec
from fedmllm.core.storage import write_atomically, write_tensors

_STATE, _LOG, _WEIGHTS = "state.json", "log.jsonl", "projector.safetensors"
BETAS, _EPS, _CLIP = (0.9, 0.999), 1e-8, 1.0
WARMUP = 10  # steps


class Training(Spec):
    """Settings of the projector's training."""

    seed: int = 0
    """Source of the projector's first weights, the order of pictures and the questions."""

    steps: int = 160
    """Optimizer steps."""

    batch_size: int = 16
    """Pictures a step."""

    lr: float = 1e-3
    """Peak learning rate of AdamW; linear warm-up, then a cosine to a tenth of it."""

    save_every: int = 20
    """Steps between states from which a stopped build resumes."""


@dataclass(frozen=True)
class _Packed:
    """One picture with its questions.

    Attributes:
        ids: int64 [L].
        segment: int64 [L]; 0 = the prefix with the picture, otherwise the number of the question.
        position: int64 [L]; each question continues the prefix.
        labels: int64 [L]; the token that follows, -100 outside answers.
    """

    ids: Tensor
    segment: Tensor
    position: Tensor
    labels: Tensor


def pack(tokenizer: Any, asked: Sequence[tuple[str, str]], num_image_tokens: int) -> _Packed:
    """Rows as the chat template renders them, with their common prefix written once."""
    picture = TOKENS["start_image_token"] + TOKENS["context_image_token"] * num_image_tokens + TOKENS["end_image_token"]
    last = tokenizer.convert_tokens_to_ids(TOKENS["end_image_token"])
    ids: list[int] = []
    segment, position, labels = list[int](), list[int](), list[int]()
    for number, (question, answer) in enumerate(asked, start=1):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text.replace(TOKENS["context_image_token"], picture), add_special_tokens=False)["input_ids"]
        reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        prefix = prompt.index(last) + 1
        if not ids:
            ids, segment, position = list(prompt[:prefix]), [0] * prefix, list(range(prefix))
            labels = [-100] * prefix
        rest = [*prompt[prefix:], *reply]
        ids += rest
        segment += [number] * len(rest)
        position += range(prefix, prefix + len(rest))
        labels += [-100] * (len(rest) - len(reply) - 1) + reply + [-100]
    return _Packed(*(torch.tensor(values) for values in (ids, segment, position, labels)))


def attention_mask(segment_BL: Tensor) -> Tensor:
    """True if a token attends to another: not to the right, and to the prefix or its own segment; [B, 1, L, L]."""
    length = segment_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = segment_BL[:, :, None] == segment_BL[:, None, :]
    return (causal & (own | (segment_BL == 0)[:, None, :]))[:, None]


def pixels(scene: CaptionScene, processor: Any) -> Tensor:
    """Pixels [3, H, W] of one picture."""
    with Image.open(scene.path) as image:
        values: Tensor = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"][0]
    return values


def label_logits(model: Any, packed: Sequence[_Packed], pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and tokens [N] of all answers."""

    def stack(name: str, value: int) -> Tensor:
        rows: list[Tensor] = [getattr(row, name) for row in packed]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids_BL, labels_BL = stack("ids", 0), stack("labels", -100)
    features = model.model.get_image_features(pixel_values=pixels_BCHW)
    features = getattr(features, "pooler_output", features)
    embeds_BLD = model.get_input_embeddings()(ids_BL)
    places = (ids_BL == model.config.image_token_id)[..., None]
    embeds_BLD = embeds_BLD.masked_scatter(places, features.to(embeds_BLD.dtype))
    allowed = attention_mask(stack("segment", -1))
    bias = torch.zeros_like(allowed, dtype=embeds_BLD.dtype).masked_fill(~allowed, torch.finfo(embeds_BLD.dtype).min)
    hidden_BLD = model.model.language_model(
        inputs_embeds=embeds_BLD, attention_mask=bias, position_ids=stack("position", 0), use_cache=False
    ).last_hidden_state
    answers = labels_BL != -100
    return model.lm_head(hidden_BLD[answers]), labels_BL[answers]


@dataclass
class Connector:
    """The projector of a model in training, with its optimizer; its state is a folder.

    Args:
        model: By `assemble`; all of it is frozen but the projector.
        processor: Of the model's folder.
        scenes: Training pictures.
        settings: Of the training.
        folder: For the state and the log.
        about: Origins of all parts; a state of others is not resumed.
    """

    model: Any
    processor: Any
    scenes: Sequence[CaptionScene]
    settings: Training
    folder: Path
    about: dict[str, Any]
    step: int = 0
    time_s: float = 0.0
    live: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.live = {n: p for n, p in self.model.named_parameters() if n.startswith(PROJECTOR)}
        for parameter in self.live.values():
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self.live.values(), lr=self.settings.lr, betas=BETAS, eps=_EPS, weight_decay=0.0
        )
        self._num_tokens = int(self.model.config.image_seq_length)

    def run(self, progress: Callable[[int, float], None] = lambda _step, _loss: None) -> None:
        """Train up to `settings.steps`, from the state in the folder if there is one.

        Args:
            progress: Called after each step with its number and loss.

        Raises:
            FedmllmError: The folder's state has other settings or origins.
        """
        self._resume()
        while self.step < self.settings.steps:
            start = time.monotonic()
            loss, accuracy = self._train_step()
            self.step += 1
            self.time_s += time.monotonic() - start
            with (self.folder / _LOG).open("a", encoding="utf-8") as log:
                line = {"step": self.step, "loss": loss, "token_accuracy": accuracy, "time_s": round(self.time_s, 1)}
                log.write(json.dumps(line) + "\n")
            if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                self._save()
            progress(self.step, loss)

    def _train_step(self) -> tuple[float, float]:
        rng = stream(self.settings.seed, "connector", self.step)
        chosen = rng.choice(len(self.scenes), size=min(self.settings.batch_size, len(self.scenes)), replace=False)
        logits_NV, token_N = self._logits([self.scenes[i] for i in chosen], rng)
        loss = nn.functional.cross_entropy(logits_NV, token_N)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.live.values(), _CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.lr * schedule(self.step, self.settings.steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item(), float((logits_NV.argmax(-1) == token_N).float().mean())

    def _logits(self, scenes: Sequence[CaptionScene], rng: Any) -> tuple[Tensor, Tensor]:
        packed = [pack(self.processor.tokenizer, questions(scene, rng), self._num_tokens) for scene in scenes]
        return label_logits(
            self.model, packed, torch.stack([pixels(s, self.processor.image_processor) for s in scenes])
        )

    @torch.no_grad()
    def evaluate(self, scenes: Sequence[CaptionScene]) -> float:
        """Share of label tokens that are the likeliest, 0..1, on questions that depend on the seed alone."""
        right = total = 0
        for start in range(0, len(scenes), self.settings.batch_size):
            part = scenes[start : start + self.settings.batch_size]
            logits_NV, token_N = self._logits(part, stream(self.settings.seed, "connector evaluation", start))
            right += int((logits_NV.argmax(-1) == token_N).sum())
            total += len(token_N)
        return right / total

    def _identity(self) -> dict[str, Any]:
        return {"settings": self.settings.model_dump(exclude={"save_every"}), "about": self.about}

    def _save(self) -> None:
        tensors = {name: p.detach() for name, p in self.live.items()}
        for name, parameter in self.live.items():
            moments = self._optimizer.state[parameter]
            tensors |= {f"{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        # the weights of a step have its number: a stop between the two files leaves the state before
        write_tensors(self.folder / f"{self.step}-{_WEIGHTS}", tensors)
        state = {**self._identity(), "step": self.step, "time_s": self.time_s}
        write_atomically(self.folder / _STATE, json.dumps(state, indent=1) + "\n")
        for file in self.folder.glob(f"*-{_WEIGHTS}"):
            if file.name != f"{self.step}-{_WEIGHTS}":
                file.unlink()

    def _resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / _LOG
        if not (self.folder / _STATE).is_file():
            log.write_text("", encoding="utf-8")
            return
        state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        if {key: state[key] for key in ("settings", "about")} != self._identity():
            raise FedmllmError(
                f"{self.folder / _STATE}: a build with other settings or sources; name another folder, or delete this one"
            )
        self.step, self.time_s = state["step"], state["time_s"]
        tensors = load_file(self.folder / f"{self.step}-{_WEIGHTS}")
        with torch.no_grad():
            for name, parameter in self.live.items():
                parameter.copy_(tensors[name])
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")},
                }
        lines = log.read_text(encoding="utf-8").splitlines()[: self.step]
        log.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at `step`, from 0."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
