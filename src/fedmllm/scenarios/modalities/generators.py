"""Small conditional generators of frozen picture features, which clients learn together.

Shapes: B rows, C condition, F values of the tower's output, Z latent, H hidden, P principal components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from fedmllm.core.rng import torch_stream
from fedmllm.core.types import Params

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Draw: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
    Loss: TypeAlias = Callable[[Params, Tensor, Tensor], Tensor]

ROWS_PER_STEP = 64
SPAN_ROUNDS = 3  # of subspace iteration, from a random start
EULER_STEPS = 8
CRITIC_STEPS = 5  # before each step of the generator (arXiv:1704.00028)
GRADIENT_PENALTY = 10.0


@dataclass(frozen=True)
class GeneratorSizes:
    """Settings of a generator.

    Attributes:
        condition: C.
        values: F.
        hidden: H of each network.
        latent: Z.
        components: P at most.
        steps: Local steps in a round.
        lr: Learning rate of Adam.
        beta: Weight of the latent's divergence.
        ridge: Penalty of the regression.
    """

    condition: int
    values: int
    hidden: int
    latent: int
    components: int
    steps: int
    lr: float
    beta: float
    ridge: float


class Generator(ABC):
    """A generator that clients measure in some rounds: the server takes the weighted mean of what they send.

    Args:
        sizes: Its settings.
    """

    measured_rounds: ClassVar[int] = 1
    """Rounds in which clients send means over their rows."""

    def __init__(self, sizes: GeneratorSizes) -> None:
        self._sizes = sizes

    @abstractmethod
    def start(self, seed: int) -> Params:
        """Return the weights before the first round.

        Args:
            seed: Of the experiment.
        """

    @abstractmethod
    def measure(self, number: int, params: Params, c_BC: Tensor, f_BF: Tensor) -> Params:
        """Return new values of some weights: means over a client's rows.

        Args:
            number: The round, at most `measured_rounds`.
            params: The weights.
            c_BC: Conditions.
            f_BF: Features.
        """

    @abstractmethod
    def drawing(self, params: Params) -> Draw:
        """Return (c_C, noise) -> f_F, one draw.

        Args:
            params: The learned weights.
        """


class Ridge(Generator):
    """Ridge regression of the features on the condition, from sums over rows that travel once."""

    def start(self, seed: int) -> Params:
        import torch

        c, f = self._sizes.condition + 1, self._sizes.values
        return {"mean.cc": torch.zeros(c, c), "mean.cf": torch.zeros(c, f)}

    def measure(self, number: int, params: Params, c_BC: Tensor, f_BF: Tensor) -> Params:
        import torch

        one_BC = torch.cat([c_BC, torch.ones(len(c_BC), 1)], 1).double()
        sums = {"mean.cc": one_BC.T @ one_BC, "mean.cf": one_BC.T @ f_BF.double()}
        return {name: (t / len(c_BC)).float() for name, t in sums.items()}

    def drawing(self, params: Params) -> Draw:
        import torch

        square = params["mean.cc"].double()
        penalty = self._sizes.ridge * torch.eye(len(square), dtype=torch.float64)
        penalty[-1, -1] = 0.0  # the intercept
        weights = torch.linalg.solve(square + penalty, params["mean.cf"].double()).float()
        return lambda c_C, _: torch.cat([c_C, torch.ones(1)]) @ weights


class Trained(Generator):
    """A generator whose networks are trained after the measured rounds, by FedAvg over their weights."""

    @abstractmethod
    def train(self, params: Params, c_BC: Tensor, f_BF: Tensor, noise: torch.Generator) -> tuple[Params, float]:
        """Take a client's local steps of a round.

        Args:
            params: The weights.
            c_BC: Conditions of its rows.
            f_BF: Their features.
            noise: Of the client's round.

        Returns:
            The change of the trained weights, and the mean loss.
        """

    def _descend(
        self, loss_of: Loss, params: Params, c_BC: Tensor, f_BF: Tensor, noise: torch.Generator
    ) -> tuple[Params, float]:
        """Take the steps by Adam on one loss of (trained weights, c_BC, f_BF)."""
        import torch

        start = _networks(params)
        live = {name: t.clone().requires_grad_(True) for name, t in start.items()}
        optimizer = torch.optim.Adam(live.values(), lr=self._sizes.lr)
        total = 0.0
        with torch.enable_grad():
            for _ in range(self._sizes.steps):
                loss = loss_of(live, *_some(noise, c_BC, f_BF))
                _step(optimizer, loss)
                total += float(loss.detach())
        return {name: t.detach() - start[name] for name, t in live.items()}, total / self._sizes.steps


class Cvae(Trained):
    """Conditional variational autoencoder of standardized features (Sohn et al., NeurIPS 2015)."""

    def start(self, seed: int) -> Params:
        import torch

        s = self._sizes
        widths: dict[str, tuple[int, ...]] = {"encoder": (s.values + s.condition, s.hidden, 2 * s.latent)}
        widths["decoder"] = (s.latent + s.condition, s.hidden, s.values)
        zero = torch.zeros(s.values)
        return {"moment.mean": zero, "moment.square": zero.clone(), **_random_layers(widths, seed)}

    def measure(self, number: int, params: Params, c_BC: Tensor, f_BF: Tensor) -> Params:
        return {"moment.mean": f_BF.mean(0), "moment.square": f_BF.square().mean(0)}

    def train(self, params: Params, c_BC: Tensor, f_BF: Tensor, noise: torch.Generator) -> tuple[Params, float]:
        import torch

        mean_F, std_F = _moments(params)

        def loss(live: Params, c_BC: Tensor, f_BF: Tensor) -> Tensor:
            f = (f_BF - mean_F) / std_F
            mu_BZ, log_var_BZ = _layers(live, "encoder", torch.cat([f, c_BC], 1)).chunk(2, dim=1)
            draw_BZ = torch.randn(mu_BZ.shape, generator=noise)
            z_BZ = mu_BZ + (log_var_BZ / 2).exp() * draw_BZ
            made = _layers(live, "decoder", torch.cat([z_BZ, c_BC], 1))
            divergence = (mu_BZ.square() + log_var_BZ.exp() - 1 - log_var_BZ).sum(1).mean() / 2
            return (made - f).square().mean() + self._sizes.beta * divergence / mu_BZ.shape[1]

        return self._descend(loss, params, c_BC, f_BF, noise)

    def drawing(self, params: Params) -> Draw:
        import torch

        mean_F, std_F = _moments(params)

        def draw(c_C: Tensor, noise: torch.Generator) -> Tensor:
            z_Z = torch.randn(self._sizes.latent, generator=noise)
            return _layers(params, "decoder", torch.cat([z_Z, c_C])[None])[0] * std_F + mean_F

        return draw


class Component(Trained):
    """Generators in the space of the pooled features' P principal components, where all variances are 1.

    The clients find the components together: round 1 is the mean, `SPAN_ROUNDS` rounds are subspace iteration (each client
    multiplies its own covariance with the common basis, which is made orthonormal afterwards), one round is the variances.
    """

    measured_rounds = 2 + SPAN_ROUNDS

    @property
    def num_components(self) -> int:
        """P: not more than there are values."""
        return min(self._sizes.components, self._sizes.values)

    def start(self, seed: int) -> Params:
        import torch

        f, p = self._sizes.values, self.num_components
        span = torch.randn(f, p, generator=torch_stream(seed, "imagine", "span"))
        found = {"moment.mean": torch.zeros(f), "component.span": span, "component.variance": torch.zeros(p)}
        return {**found, **_random_layers(self.widths(), seed)}

    @abstractmethod
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Return network -> widths of its layers."""

    def measure(self, number: int, params: Params, c_BC: Tensor, f_BF: Tensor) -> Params:
        if number == 1:
            return {"moment.mean": f_BF.mean(0)}
        centred_BF, basis_FP = f_BF - params["moment.mean"], _orthonormal(params["component.span"])
        projected_BP = centred_BF @ basis_FP
        if number < self.measured_rounds:
            return {"component.span": centred_BF.T @ projected_BP / len(f_BF)}
        return {"component.variance": projected_BP.square().mean(0)}

    def drawing(self, params: Params) -> Draw:
        mean_F, basis_FP, std_P = _components(params)
        return lambda c_C, noise: mean_F + basis_FP @ (std_P * self.component(params, c_C, noise))

    @abstractmethod
    def component(self, params: Params, c_C: Tensor, noise: torch.Generator) -> Tensor:
        """Return one draw in the space of the components [P].

        Args:
            params: The learned weights.
            c_C: The condition.
            noise: Of the row.
        """


class Flow(Component):
    """Rectified flow (arXiv:2209.03003): a velocity that carries normal noise to the features' components.

    With s_t = (1 - t) e + t s the loss is ||v(s_t, t, c) - (s - e)||^2; a draw takes `EULER_STEPS` Euler steps.
    """

    def widths(self) -> dict[str, tuple[int, ...]]:
        s, p = self._sizes, self.num_components
        return {"velocity": (p + 1 + s.condition, s.hidden, s.hidden, p)}

    def train(self, params: Params, c_BC: Tensor, f_BF: Tensor, noise: torch.Generator) -> tuple[Params, float]:
        import torch

        whiten = _whitening(params)

        def loss(live: Params, c_BC: Tensor, f_BF: Tensor) -> Tensor:
            s_BP, t_B1 = whiten(f_BF), torch.rand(len(f_BF), 1, generator=noise)
            e_BP = torch.randn(s_BP.shape, generator=noise)
            at_BP = (1 - t_B1) * e_BP + t_B1 * s_BP
            velocity_BP = _layers(live, "velocity", torch.cat([at_BP, t_B1, c_BC], 1))
            return (velocity_BP - (s_BP - e_BP)).square().mean()

        return self._descend(loss, params, c_BC, f_BF, noise)

    def component(self, params: Params, c_C: Tensor, noise: torch.Generator) -> Tensor:
        import torch

        at_P = torch.randn(self.num_components, generator=noise)
        for step in range(EULER_STEPS):
            t_1 = torch.full((1,), step / EULER_STEPS)
            at_P = at_P + _layers(params, "velocity", torch.cat([at_P, t_1, c_C])[None])[0] / EULER_STEPS
        return at_P


class Gan(Component):
    """Wasserstein GAN with gradient penalty (arXiv:1704.00028). Clients average generator and critic alike.

    The loss that is reported is the critic's: mean score of generated rows - that of real ones + the penalty.
    """

    def widths(self) -> dict[str, tuple[int, ...]]:
        s, p = self._sizes, self.num_components
        made = (s.latent + s.condition, s.hidden, s.hidden, p)
        return {"generator": made, "critic": (p + s.condition, s.hidden, s.hidden, 1)}

    def train(self, params: Params, c_BC: Tensor, f_BF: Tensor, noise: torch.Generator) -> tuple[Params, float]:
        import torch

        start, real_BP, total = _networks(params), _whitening(params)(f_BF), 0.0
        live = {name: t.clone().requires_grad_(True) for name, t in start.items()}
        parts = ([t for name, t in live.items() if name.startswith(part)] for part in ("critic.", "generator."))
        critic, generator = (torch.optim.Adam(part, lr=self._sizes.lr, betas=(0.0, 0.9)) for part in parts)
        with torch.enable_grad():
            for _ in range(self._sizes.steps):
                for _ in range(CRITIC_STEPS):
                    loss = self._critic_loss(live, *_some(noise, c_BC, real_BP), noise)
                    _step(critic, loss)
                    total += float(loss.detach())
                c, _ = _some(noise, c_BC, real_BP)
                _step(generator, -_layers(live, "critic", torch.cat([self._made(live, c, noise), c], 1)).mean())
        delta = {name: t.detach() - start[name] for name, t in live.items()}
        return delta, total / (CRITIC_STEPS * self._sizes.steps)

    def _made(self, live: Params, c_BC: Tensor, noise: torch.Generator) -> Tensor:
        import torch

        z_BZ = torch.randn(len(c_BC), self._sizes.latent, generator=noise)
        return _layers(live, "generator", torch.cat([z_BZ, c_BC], 1))

    def _critic_loss(self, live: Params, c_BC: Tensor, real_BP: Tensor, noise: torch.Generator) -> Tensor:
        import torch

        made_BP = self._made(live, c_BC, noise).detach()
        share_B1 = torch.rand(len(c_BC), 1, generator=noise)
        mixed_BP = (share_B1 * real_BP + (1 - share_B1) * made_BP).requires_grad_(True)

        def score(s_BP: Tensor) -> Tensor:
            return _layers(live, "critic", torch.cat([s_BP, c_BC], 1))

        (slope_BP,) = torch.autograd.grad(score(mixed_BP).sum(), mixed_BP, create_graph=True)
        penalty = (slope_BP.norm(dim=1) - 1).square().mean()
        loss: Tensor = score(made_BP).mean() - score(real_BP).mean() + GRADIENT_PENALTY * penalty
        return loss

    def component(self, params: Params, c_C: Tensor, noise: torch.Generator) -> Tensor:
        made_P: Tensor = self._made(params, c_C[None], noise)[0]
        return made_P


GENERATORS: dict[str, type[Generator]] = {"mean": Ridge, "cvae": Cvae, "gan": Gan, "flow": Flow}


def _random_layers(widths: dict[str, tuple[int, ...]], seed: int) -> Params:
    """Weights of linear layers: normal with variance 1 / inputs, zero biases."""
    import torch

    net = {}
    for part, sizes in widths.items():
        for i, (columns, rows) in enumerate(pairwise(sizes)):
            noise = torch_stream(seed, "imagine", f"{part}.{i}")
            net[f"{part}.{i}.weight"] = torch.randn(rows, columns, generator=noise) / columns**0.5
            net[f"{part}.{i}.bias"] = torch.zeros(rows)
    return net


def _layers(params: Params, part: str, x_B: Tensor) -> Tensor:
    """A network of linear layers, with SiLU between them."""
    from torch.nn.functional import linear, silu

    depth = sum(name.startswith(f"{part}.") for name in params) // 2
    for i in range(depth):
        x_B = linear(silu(x_B) if i else x_B, params[f"{part}.{i}.weight"], params[f"{part}.{i}.bias"])
    return x_B


def _networks(params: Params) -> Params:
    """The weights that steps train."""
    return {name: t for name, t in params.items() if not name.startswith(("moment.", "component."))}


def _some(noise: torch.Generator, c_BC: Tensor, f_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Conditions and features of the rows of a step."""
    import torch

    pick = torch.randint(len(c_BC), (min(ROWS_PER_STEP, len(c_BC)),), generator=noise)
    return c_BC[pick], f_BF[pick]


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _moments(params: Params) -> tuple[Tensor, Tensor]:
    """Pooled mean and standard deviation [F]."""
    mean_F = params["moment.mean"]
    return mean_F, (params["moment.square"] - mean_F.square()).clamp_min(1e-6).sqrt()


def _orthonormal(span_FP: Tensor) -> Tensor:
    """An orthonormal basis of a span; its signs do not depend on the machine's linear algebra."""
    import torch

    basis_FP, r_PP = torch.linalg.qr(span_FP.double())
    sign_P = torch.where(r_PP.diagonal() < 0, -1.0, 1.0)
    orthonormal_FP: Tensor = (basis_FP * sign_P).float()
    return orthonormal_FP


def _components(params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [F], basis [F, P] and standard deviations [P]; one without variance counts as a small one.

    All are 0 if the pictures do not differ: their one value is then what is drawn.
    """
    std_P = params["component.variance"].sqrt()
    return params["moment.mean"], _orthonormal(params["component.span"]), std_P.clamp_min(1e-3 * float(std_P.max()))


def _whitening(params: Params) -> Callable[[Tensor], Tensor]:
    """Features [B, F] -> components of variance 1 [B, P]; 0 if the pictures do not differ."""
    mean_F, basis_FP, std_P = _components(params)
    scale_P = std_P.where(std_P > 0, 1.0)
    return lambda f_BF: (f_BF - mean_F) @ basis_FP / scale_P
