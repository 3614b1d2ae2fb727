"""Completion of pictures by a generator of frozen features, learned before training.

Shapes: B rows, C condition, F = Q D values of the tower's output (Q vectors of D channels), Z latent, H hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from fedmllm.core.errors import ConfigError
from fedmllm.core.images import CANVAS, FEATURES
from fedmllm.core.rng import torch_stream
from fedmllm.core.storage import write_tensors
from fedmllm.core.types import Example, Modality, Params, Round
from fedmllm.scenarios.modalities.completion import Completion, CompletionSite, Filling

if TYPE_CHECKING:
    from torch import Generator, Tensor

MAX_VALUES = 16_384  # F; above it the generator would be larger than most adapters
LABELS = 8  # choices whose number is part of the condition; a row with a later one, or an open answer, goes without
ROWS_PER_STEP = 64


class Imagine(Completion):
    """Imagine the tower's output for a missing picture from the row's text and answer (FIN, arXiv:2505.20232).

    Before the federation the clients that have complete rows learn one generator by FedAvg over its weights; it is frozen
    afterwards (FedRecon, arXiv:2504.09941). Its condition is the mean of the text's frozen token embeddings and the answer's
    place among the choices. A missing text is not filled, and test rows are never filled: without the answer nothing is gained.

    kind "mean" is ridge regression, from sums over rows that travel once and give the same result for any partition. kind
    "cvae" is a conditional variational autoencoder (Sohn et al., NeurIPS 2015) whose draws differ from row to row.

    What leaves a client in addition: moments of its complete rows' features, or generator weights, which can memorize them.
    """

    learns: ClassVar[bool] = True
    leaks: ClassVar[bool] = (
        True  # measured: a linear probe finds the answer in imagined pictures better than in real ones
    )

    name: Literal["imagine"] = "imagine"
    kind: Literal["mean", "cvae"] = "cvae"
    """Kind of the generator."""
    rounds: PositiveInt = 5
    """Rounds of "cvae", after one for the moments; "mean" has that one alone."""
    steps: PositiveInt = 100
    """Local steps of 64 rows in a round, by Adam."""
    lr: PositiveFloat = 2e-3
    """Learning rate of these steps."""
    hidden: PositiveInt = 64
    """Hidden units of each network."""
    latent: PositiveInt = 16
    """Number of latent variables."""
    beta: NonNegativeFloat = 0.1
    """Weight of the latent's divergence from the standard normal."""
    ridge: PositiveFloat = 0.1
    """Penalty of "mean", for a condition of mean square 1."""
    picture: str = "image"
    """Modality that is imagined."""
    text: str = "text"
    """Modality that it is imagined from."""

    def check(self, modalities: tuple[Modality, ...]) -> None:
        for key in ("picture", "text"):
            if getattr(self, key) not in modalities:
                allowed = ", ".join(modalities)
                raise ConfigError(f"completion.{key}: got {getattr(self, key)!r}; the rows have {allowed}")

    def num_rounds(self) -> int:
        return 1 if self.kind == "mean" else 1 + self.rounds

    def start(self, site: CompletionSite) -> Params:
        import torch

        c, f = self._sizes(site)
        moments = {"moment.mean": torch.zeros(f), "moment.square": torch.zeros(f)}
        if self.kind == "mean":
            return {"mean.cc": torch.zeros(c + 1, c + 1), "mean.cf": torch.zeros(c + 1, f)}
        shapes = {
            "encoder.0": (self.hidden, f + c),
            "encoder.1": (2 * self.latent, self.hidden),
            "decoder.0": (self.hidden, self.latent + c),
            "decoder.1": (f, self.hidden),
        }
        net = {}
        for name, (rows, columns) in shapes.items():
            noise = torch_stream(site.seed, "imagine", name)
            net[f"{name}.weight"] = torch.randn(rows, columns, generator=noise) / columns**0.5
            net[f"{name}.bias"] = torch.zeros(rows)
        return {**moments, **net}

    def learn(
        self, site: CompletionSite, rows: Sequence[Example], params: Params, at: Round, client: int
    ) -> tuple[Params, int, float]:
        import torch

        zero = {name: torch.zeros_like(t) for name, t in params.items()}
        pairs = [(self._condition(site, row, True), _vectors(site, row, self.picture)) for row in rows]
        count = self._sizes(site)[1]
        usable = [(c, v.flatten()) for c, v in pairs if v.numel() == count]
        if not usable:
            return zero, 0, 0.0
        c_BC, f_BF = torch.stack([c for c, _ in usable]), torch.stack([v for _, v in usable])
        if self.kind == "mean":
            one_BC = torch.cat([c_BC, torch.ones(len(c_BC), 1)], 1).double()
            sums = {"mean.cc": one_BC.T @ one_BC, "mean.cf": one_BC.T @ f_BF.double()}
            return {name: (t / len(usable)).float() for name, t in sums.items()}, len(usable), 0.0
        if at.number == 1:
            return {**zero, "moment.mean": f_BF.mean(0), "moment.square": f_BF.square().mean(0)}, len(usable), 0.0
        delta, loss = self._train(params, c_BC, f_BF, torch_stream(site.seed, "imagine", at.number, client))
        return {**zero, **delta}, len(usable), loss

    def _train(self, params: Params, c_BC: Tensor, f_BF: Tensor, noise: Generator) -> tuple[Params, float]:
        """Local steps on all complete rows of a client -> (change of the network's weights, mean loss)."""
        import torch

        start = {name: t for name, t in params.items() if not name.startswith("moment.")}
        live = {name: t.clone().requires_grad_(True) for name, t in start.items()}
        mean_F, std_F = _moments(params)
        optimizer = torch.optim.Adam(live.values(), lr=self.lr)
        total = 0.0
        with torch.enable_grad():
            for _ in range(self.steps):
                pick = torch.randint(len(c_BC), (min(ROWS_PER_STEP, len(c_BC)),), generator=noise)
                c, f = c_BC[pick], (f_BF[pick] - mean_F) / std_F
                mu_BZ, log_var_BZ = _layers(live, "encoder", torch.cat([f, c], 1)).chunk(2, dim=1)
                draw_BZ = torch.randn(mu_BZ.shape, generator=noise)
                z_BZ = mu_BZ + (log_var_BZ / 2).exp() * draw_BZ
                made = _layers(live, "decoder", torch.cat([z_BZ, c], 1))
                divergence = (mu_BZ.square() + log_var_BZ.exp() - 1 - log_var_BZ).sum(1).mean() / 2
                loss = (made - f).square().mean() + self.beta * divergence / mu_BZ.shape[1]
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += float(loss.detach())
        return {name: (t.detach() - start[name]) for name, t in live.items()}, total / self.steps

    def prepare(self, site: CompletionSite) -> Filling:
        return _Imagining(self, site)

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

    def _condition(self, site: CompletionSite, example: Example, labelled: bool) -> Tensor:
        """[C]: text embedding, whether there is a text, the answer's place, whether it is given."""
        import torch

        text, label = example.fields.get(self.text), torch.zeros(LABELS + 1)
        ids, vectors_LD = site.model.token_vectors(str(text) if text else "a")
        shape = torch.zeros(vectors_LD.shape[1])
        embedding = vectors_LD.mean(0) * shape.numel() ** 0.5 if text and ids else shape
        place = example.choices.index(example.answer) if labelled and example.answer in example.choices else LABELS
        if place < LABELS:
            label[[place, LABELS]] = 1.0
        return torch.cat([embedding, torch.tensor([1.0 if text else 0.0]), label])


class _Imagining(Filling):
    def __init__(self, settings: Imagine, site: CompletionSite) -> None:
        import torch

        self._settings, self._site = settings, site
        params = site.learned
        if settings.kind == "mean" and params:
            square = params["mean.cc"].double()
            penalty = settings.ridge * torch.eye(len(square), dtype=torch.float64)
            penalty[-1, -1] = 0.0  # the intercept
            self._weights = torch.linalg.solve(square + penalty, params["mean.cf"].double()).float()

    def fill(self, example: Example, training: bool) -> Example:
        s, params = self._settings, self._site.learned
        if s.picture in example.fields or not params:
            return example
        import torch

        with torch.no_grad():
            c = self._settings._condition(self._site, example, training)
            if s.kind == "mean":
                made_F = torch.cat([c, torch.ones(1)]) @ self._weights
            else:
                noise = torch_stream(self._site.seed, "imagine-row", str(example.id))
                z = torch.randn(s.latent, generator=noise)
                mean_F, std_F = _moments(params)
                made_F = _layers(params, "decoder", torch.cat([z, c])[None])[0] * std_F + mean_F
        like = self._site.model.picture_vectors(_canvas(self._site.folder))
        return replace(
            example, fields={**example.fields, s.picture: (_stored(self._site.folder, made_F.view_as(like)),)}
        )


def _layers(params: Params, part: str, x_B: Tensor) -> Tensor:
    from torch.nn.functional import linear, silu

    hidden = silu(linear(x_B, params[f"{part}.0.weight"], params[f"{part}.0.bias"]))
    return linear(hidden, params[f"{part}.1.weight"], params[f"{part}.1.bias"])


def _moments(params: Params) -> tuple[Tensor, Tensor]:
    """Pooled mean and standard deviation [F]."""
    mean_F = params["moment.mean"]
    return mean_F, (params["moment.square"] - mean_F.square()).clamp_min(1e-6).sqrt()


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
