"""Hierarchical latent classes: synthetic data on which hardness shows, and a run takes seconds.

A class is a coarse group and a fine member of it.  Members of one group are near each other, so
most negatives are easy (another group) and the informative ones are hard (same group, other
member).  A random network renders the latent point to what the encoder sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_DIM = 32
INPUT_DIM = 128
RADIUS = 8**0.5  # of the centres: half a unit a coordinate
GAIN = 1.5  # of the renderer: with these two, raw neighbours fail and the task is not saturated


class Raw(nn.Flatten):
    """The rendered point itself, without parameters: the raw-input baseline."""

    out_dim = INPUT_DIM


class MLP(nn.Sequential):
    """Linear–BN–ReLU–Linear, 128-128-32."""

    def __init__(self, hidden: int = 128, out_dim: int = 32) -> None:
        super().__init__(
            nn.Linear(INPUT_DIM, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_dim),
        )
        self.out_dim = out_dim


ENCODERS: dict[str, type[Raw] | type[MLP]] = {"mlp": MLP, "raw": Raw}


@dataclass(eq=False)
class LatentClasses:
    """Points of a hierarchical mixture with their two views (implements `hcl.train.Data`).

    A row of x is (u, c): u the 32 latent coordinates that make the point what it is, c the
    nuisance coefficients of this one observation.  `inputs` renders (u, c).  `views` keeps u and
    draws c anew, twice: the positive pair is one point under two nuisances, as two augmentations
    are one photograph under two crops and colour casts.  Test points carry a nuisance too.
    """

    name: str
    classes: tuple[str, ...]
    fine: int
    x_train: Tensor  # (n, 32 + nuisances)
    y_train: Tensor  # (n,)
    x_probe: Tensor
    y_probe: Tensor
    x_test: Tensor
    y_test: Tensor
    directions: Tensor  # (nuisances, 32), one nuisance of unit coefficient each
    layers: tuple[Tensor, Tensor]  # (32, 128), (128, 128)

    @property
    def coarse_train(self) -> Tensor:
        """The group of each training point, (n,)."""
        return self.y_train // self.fine

    @property
    def coarse_test(self) -> Tensor:
        """The group of each test point, (n,)."""
        return self.y_test // self.fine

    def inputs(self, x: Tensor) -> Tensor:
        """Render rows under their own nuisance: (m, 32 + nuisances) to (m, 128)."""
        u, c = x[:, :LATENT_DIM], x[:, LATENT_DIM:]
        first, second = self.layers
        return torch.tanh(torch.tanh((u + c @ self.directions) @ first) @ second)

    def views(
        self, x: Tensor, generator: torch.Generator, mate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Render rows twice, or x and then mate, under fresh nuisances; two (m, 128)."""
        u = torch.cat([x, x if mate is None else mate])[:, :LATENT_DIM]
        c = torch.randn(
            len(u), len(self.directions), generator=generator, device=generator.device
        ).to(x.device)
        one, two = self.inputs(torch.cat([u, c], dim=1)).chunk(2)
        return one, two

    def encoder(self, name: str) -> nn.Module:
        """A fresh encoder: "mlp" (128-128-32) or "raw".

        Raises: ValueError for another name.
        """
        if name not in ENCODERS:
            raise ValueError(f"encoder is {name!r}: sphere has {', '.join(sorted(ENCODERS))}")
        return ENCODERS[name]()


def load(
    name: str = "sphere",
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    n_train: int = 2000,
    n_test: int = 1000,
    coarse: int = 10,
    fine: int = 5,
    noise: float = 0.3,
    fine_scale: float = 0.8,
    nuisances: int = 8,
    nuisance_scale: float = 3.0,
) -> LatentClasses:
    r"""Draw a world and its points: $u = \mu_g + 0.8\,\nu_{gf} + 0.3\,\varepsilon \in R^{32}$.

    The centres $\mu$ and members $\nu$ lie uniformly on the sphere of radius $\sqrt8$ in
    $R^{32}$; $\varepsilon$ is standard normal and belongs to the point, both views keep it.
    Nuisances are orthogonal directions of standard deviation `nuisance_scale`; the renderer is
    two random tanh layers.  Classes are equally frequent.  World and points depend on `seed`
    alone, on every device.

    Source: our design, for a quick experiment in which raw inputs fail and hardness helps.
    Raises: ValueError for a count below one, a negative scale, or fewer points than classes.

    >>> data = load(seed=0, n_train=100, n_test=50)
    >>> data.inputs(data.x_test).shape, len(data.classes)
    (torch.Size([50, 128]), 50)
    """
    if name != "sphere":
        raise ValueError(f"name is {name!r}: 'sphere' would do")
    _at_least(1, coarse=coarse, fine=fine)
    _at_least(coarse * fine, n_train=n_train, n_test=n_test)
    _at_least(0, noise=noise, fine_scale=fine_scale, nuisances=nuisances)
    _at_least(0, nuisance_scale=nuisance_scale)
    if nuisances > LATENT_DIM:
        raise ValueError(f"nuisances is {nuisances}: at most {LATENT_DIM} are orthogonal")
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same data on every device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    groups, members = (
        RADIUS * F.normalize(normal(coarse, n, LATENT_DIM), dim=2) for n in (1, fine)
    )
    centres = (groups + fine_scale * members).flatten(0, 1)
    directions = nuisance_scale * torch.linalg.qr(normal(LATENT_DIM, nuisances)).Q.T
    layers = (
        GAIN * normal(LATENT_DIM, INPUT_DIM) / LATENT_DIM**0.5,
        GAIN * normal(INPUT_DIM, INPUT_DIM) / INPUT_DIM**0.5,
    )

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = (torch.arange(n) % len(centres))[torch.randperm(n, generator=generator)]
        u = centres[y] + noise * normal(n, LATENT_DIM)
        return torch.cat([u, normal(n, nuisances)], dim=1).to(device), y.to(device)

    x_train, y_train = draw(n_train)
    x_test, y_test = draw(n_test)
    return LatentClasses(
        name=name,
        classes=tuple(f"{g}.{f}" for g in range(coarse) for f in range(fine)),
        fine=fine,
        x_train=x_train,
        y_train=y_train,
        x_probe=x_train,
        y_probe=y_train,
        x_test=x_test,
        y_test=y_test,
        directions=directions.to(device),
        layers=(layers[0].to(device), layers[1].to(device)),
    )


def _at_least(least: int, **options: float) -> None:
    for option, value in options.items():
        if not value >= least:
            raise ValueError(f"{option} is {value}: at least {least} would do")
