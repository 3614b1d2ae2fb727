"""Completion of pictures by a generator of frozen features, learned before training.

Shapes: B rows, C condition, F = Q D values of the tower's output (Q vectors of D channels).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from fedmllm.core.errors import ConfigError
from fedmllm.core.images import CANVAS, FEATURES
from fedmllm.core.rng import stream, torch_stream
from fedmllm.core.spec import ADDED_LATER
from fedmllm.core.storage import write_tensors
from fedmllm.core.types import Example, Modality, Params, Round
from fedmllm.scenarios.modalities.completion import Completion, CompletionSite, Filling, Role, require_kind
from fedmllm.scenarios.modalities.generators import GENERATORS, Generator, GeneratorSizes, Trained

if TYPE_CHECKING:
    from torch import Tensor

MAX_VALUES = 16_384  # F; above it the generator would be larger than most adapters
LABELS = 8  # choices whose number is part of the condition; a row with a later one, or an open answer, goes without
_OF_KIND = {  # setting -> the kinds that read it
    "rounds": ("cvae", "gan", "flow"),
    "steps": ("cvae", "gan", "flow"),
    "lr": ("cvae", "gan", "flow"),
    "hidden": ("cvae", "gan", "flow"),
    "latent": ("cvae", "gan"),
    "components": ("gan", "flow"),
    "beta": ("cvae",),
    "ridge": ("mean",),
}


class Imagine(Completion):
    """Imagine the tower's output for a missing picture from the row's text and answer (FIN, arXiv:2505.20232).

    Before the federation the clients that have complete rows learn one generator by FedAvg over its weights; it is frozen
    afterwards (FedRecon, arXiv:2504.09941). Its condition is the mean of the text's frozen token embeddings and the answer's
    place among the choices. A missing text is not filled, and test rows are never filled: without the answer nothing is gained.

    kind "mean" is ridge regression, from sums over rows that travel once and give the same result for any partition. The
    draws of the others differ from row to row: "cvae" is a conditional variational autoencoder (Sohn et al., NeurIPS 2015),
    "flow" a rectified flow (arXiv:2209.03003) and "gan" a Wasserstein GAN with gradient penalty (arXiv:1704.00028), these two
    in the space of the features' principal components, which the clients find first.

    What leaves a client in addition: moments of its complete rows' features, or generator weights, which can memorize them.
    Moments of few rows give these rows away: those of one row are the row, and "mean" sends enough to solve for fewer rows
    than the condition has values (138 for tiny). Where rows must stay hidden, set `least_rows` to twice that number.
    """

    learns: ClassVar[bool] = True
    leaks: ClassVar[bool] = (
        True  # measured: a linear probe finds the answer in imagined pictures better than in real ones
    )

    name: Literal["imagine"] = "imagine"
    kind: Literal["mean", "cvae", "gan", "flow"] = "cvae"
    """Kind of the generator."""
    rounds: PositiveInt = 5
    """Rounds of training, after those for moments: one of "cvae", five of "gan" and "flow". "mean" has one of these alone."""
    steps: PositiveInt = 100
    """Local steps of 64 rows in a round, by Adam; each of "gan" takes five steps of its critic before."""
    lr: PositiveFloat = 2e-3
    """Learning rate of these steps."""
    hidden: PositiveInt = 64
    """Hidden units of each layer of a network."""
    latent: PositiveInt = 16
    """Number of latent variables of "cvae" and "gan"."""
    components: Annotated[PositiveInt, ADDED_LATER] = 32
    """Principal components of "gan" and "flow"."""
    beta: NonNegativeFloat = 0.1
    """Weight of the latent's divergence from the standard normal, of "cvae"."""
    ridge: PositiveFloat = 0.1
    """Penalty of "mean", for a condition of mean square 1."""
    least_rows: Annotated[PositiveInt, ADDED_LATER] = 2
    """Complete rows, each with one picture, that a client needs to take part: with fewer it sends nothing before training."""
    answer: Annotated[Literal["own", "any", "random"], ADDED_LATER] = "own"
    """Answer in the condition: the training row's own; none, in learning as in drawing (a control); or, drawn for each filled
    row, one of its choices (a control)."""
    picture: str = "image"
    """Modality that is imagined."""
    text: str = "text"
    """Modality that it is imagined from."""

    def check(self, modalities: tuple[Modality, ...]) -> None:
        for key in ("picture", "text"):
            if getattr(self, key) not in modalities:
                allowed = ", ".join(modalities)
                raise ConfigError(f"completion.{key}: got {getattr(self, key)!r}; the rows have {allowed}")
        if self.picture == self.text:
            others = ", ".join(m for m in modalities if m != self.picture) or "none"
            raise ConfigError(f"completion.text: got {self.text!r}, which is also `picture`; allowed: {others}")

    def check_kinds(self, pictures: frozenset[Modality], texts: frozenset[Modality]) -> None:
        require_kind("completion.picture", self.picture, "pictures", pictures)
        require_kind("completion.text", self.text, "text", texts)

    def notes(self, train: Sequence[Example], public: Sequence[Example]) -> Sequence[str]:
        if self.answer == "own" or any(row.answer in row.choices[:LABELS] for row in train):
            return ()
        return [f'completion: answer = "{self.answer}" has no effect: no row is a choice of {LABELS} at most']

    def may_leak(self) -> bool:
        return self.answer == "own"

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Imagine:
        fields = type(self).model_fields
        for key, kinds in _OF_KIND.items():
            if self.kind not in kinds and (value := getattr(self, key)) != fields[key].default:
                raise ValueError(
                    f'{key}: got {value}, without effect for kind "{self.kind}"; it is for: {", ".join(kinds)}'
                )
        return self

    def num_rounds(self) -> int:
        generator = GENERATORS[self.kind]
        return generator.measured_rounds + (self.rounds if issubclass(generator, Trained) else 0)

    def learns_from(self, example: Example) -> bool:
        return len(example.fields.get(self.picture, ())) == 1

    def role(self) -> Role:
        return super().role() if self.answer == "own" else "control"

    def min_rows(self) -> int:
        return self.least_rows

    def start(self, site: CompletionSite) -> Params:
        return self._generator(site).start(site.seed)

    def learn(
        self, site: CompletionSite, rows: Sequence[Example], params: Params, at: Round, client: int
    ) -> tuple[Params, int, float]:
        import torch

        zero = {name: torch.zeros_like(t) for name, t in params.items()}
        pairs = [(self._condition(site, row, self._known(row)), _vectors(site, row, self.picture)) for row in rows]
        count = self._sizes(site)[1]
        usable = [(c, v.flatten()) for c, v in pairs if v.numel() == count]
        if len(usable) < self.least_rows:  # pictures of which the tower gives another number of vectors
            return zero, 0, 0.0
        c_BC, f_BF = torch.stack([c for c, _ in usable]), torch.stack([v for _, v in usable])
        generator = self._generator(site)
        if at.number <= generator.measured_rounds or not isinstance(generator, Trained):
            found = generator.measure(at.number, params, c_BC, f_BF)
            return {**zero, **{name: t - params[name] for name, t in found.items()}}, len(usable), 0.0
        delta, loss = generator.train(params, c_BC, f_BF, torch_stream(site.seed, "imagine", at.number, client))
        return {**zero, **delta}, len(usable), loss

    def prepare(self, site: CompletionSite) -> Filling:
        return _Imagining(self, site)

    def _generator(self, site: CompletionSite) -> Generator:
        c, f = self._sizes(site)
        sizes = GeneratorSizes(
            c, f, self.hidden, self.latent, self.components, self.steps, self.lr, self.beta, self.ridge
        )
        return GENERATORS[self.kind](sizes)

    def _sizes(self, site: CompletionSite) -> tuple[int, int]:
        """(C, F)."""
        channels = site.model.token_vectors("a")[1].shape[1]
        values = site.model.picture_vectors(_canvas(site.folder)).numel()
        if values > MAX_VALUES:
            raise ConfigError(
                f"completion: got 'imagine' for a tower that gives {values} values a picture; at most {MAX_VALUES} are "
                "generated. allowed: retrieve, describe"
            )
        return channels + LABELS + 2, values

    def _known(self, example: Example) -> str | None:
        """The answer that is part of a real row's condition; None = none is."""
        return None if self.answer == "any" else example.answer

    def _asked(self, example: Example, seed: int) -> str | None:
        """The answer for which a training row's picture is drawn; None = none is given."""
        if self.answer != "random" or not example.choices:
            return self._known(example)
        return example.choices[int(stream(seed, "imagine-answer", str(example.id)).integers(len(example.choices)))]

    def _condition(self, site: CompletionSite, example: Example, answer: str | None) -> Tensor:
        """[C]: text embedding, whether there is a text, the answer's place, whether it is given."""
        import torch

        text, label = example.fields.get(self.text), torch.zeros(LABELS + 1)
        ids, vectors_LD = site.model.token_vectors(str(text) if text else "a")
        shape = torch.zeros(vectors_LD.shape[1])
        embedding = vectors_LD.mean(0) * shape.numel() ** 0.5 if text and ids else shape
        place = example.choices.index(answer) if answer is not None and answer in example.choices else LABELS
        if place < LABELS:
            label[[place, LABELS]] = 1.0
        return torch.cat([embedding, torch.tensor([1.0 if text else 0.0]), label])


class _Imagining(Filling):
    def __init__(self, settings: Imagine, site: CompletionSite) -> None:
        self._settings, self._site = settings, site
        self._draw = settings._generator(site).drawing(site.learned) if site.learned else None

    def fill(self, example: Example, training: bool) -> Example:
        s, site = self._settings, self._site
        if s.picture in example.fields or not self._draw:
            return example
        import torch

        with torch.no_grad():
            c = s._condition(site, example, s._asked(example, site.seed) if training else None)
            made_F = self._draw(c, torch_stream(site.seed, "imagine-row", str(example.id)))
        like = site.model.picture_vectors(_canvas(site.folder))
        return replace(example, fields={**example.fields, s.picture: (_stored(site.folder, made_F.view_as(like)),)})


def _vectors(site: CompletionSite, example: Example, modality: Modality) -> Tensor:
    import torch

    return torch.cat([site.model.picture_vectors(Path(path)) for path in example.fields[modality]])


def _canvas(folder: Path) -> Path:
    """A blank picture, whose place in the prompt an imagined one takes."""
    from PIL import Image

    path = folder / "canvas.png"
    if not path.exists():
        Image.new("RGB", (CANVAS, CANVAS), "white").save(path)
    return path


def _stored(folder: Path, vectors_QD: Tensor) -> Path:
    """The file of imagined features; equal ones have one file."""
    name = hashlib.sha256(vectors_QD.numpy().tobytes()).hexdigest()[:32]
    path = folder / f"{name}{FEATURES}"
    if not path.exists():
        write_tensors(path, {"vectors": vectors_QD.contiguous()})
    return path
