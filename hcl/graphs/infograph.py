r"""InfoGraph's objective, and what hard negatives make of it: nodes against graphs.

A node's positive is its own graph, its negatives are the other graphs of the batch. Their scores
:math:`s_{ng} = \langle u_n, v_g \rangle` are neither normalised nor divided by a temperature, and
:math:`\mathrm{sp}(a) = \log(1 + e^a)`. Two functions: :func:`local_global` is the objective of the
equations, :func:`local_global_released` what the released code computes.

The (V, G) scores are made in one piece: 128 graphs of twenty nodes are 300,000 numbers, a megabyte.
The engine of :mod:`hcl.losses` streams log-sum-exps over rows; here a row is summed under softplus.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcl import checks
from hcl.graphs.gin import glorot_

Sign = Literal["hard", "easy"]
ARGUMENTS = ("beta", "tau_plus", "detach_weights")  # of a Run, that decide something here


class Heads(nn.Module):
    """Two networks of one shape, for nodes and for graphs: ``heads.local(u)``, ``heads(v)``.

    Each is three times Linear–ReLU, plus a linear shortcut, all of one width.

    Source: Sun et al. 2020 (InfoGraph), kept by the released code of Robinson et al. 2021.

    >>> Heads(96)(torch.zeros(2, 96)).shape
    torch.Size([2, 96])
    """

    def __init__(self, width: int):
        super().__init__()
        self.local, self.whole = _Head(width), _Head(width)
        glorot_(self)

    def forward(self, v: Tensor) -> Tensor:
        out: Tensor = self.whole(v)
        return out


class _Head(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.block, self.shortcut = nn.Sequential(*layers), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.block(h) + self.shortcut(h)
        return out


def local_global(
    nodes: Tensor,
    graphs: Tensor,
    batch: Tensor,
    *,
    beta: float = 0.0,
    tau_plus: float = 0.0,
    sign: Sign = "hard",
    detach_weights: bool = False,
    floor: bool = True,
) -> Tensor:
    r"""The hard, debiased Jensen–Shannon objective as its equation has it.

    .. math::
        \frac1V \sum_n \Big[ \mathrm{sp}(-s_n^+) + \max\Big\{0, \frac{1}{1-\tau^+} \Big(
        \sum_{g \ne g(n)} q_{ng}\, \mathrm{sp}(s_{ng}) - \tau^+ \mathrm{sp}(s_n^+) \Big)\Big\}
        \Big], \qquad q_{ng} \propto e^{\beta s_{ng}}

    Args:
        nodes, graphs: (V, d) and (G, d) floating point, G >= 2.
        batch: (V,) int64, the graph of each node.
        beta: hardness >= 0. With tau_plus = 0 too it is InfoGraph's objective, plus 2 log 2.
        tau_plus: class prior in [0, 1): the assumed share of false negatives.
        sign: "hard" weighs the most similar negatives most, "easy" the least similar.
        detach_weights: stop the gradient through the weights q.
        floor: what is left of a node's negatives is a mean of softplus, so no less than 0. Without
            the floor the objective has no minimum once tau_plus > 0: it falls without end as all
            positives' scores grow.

    Returns: scalar.

    Source: Robinson et al. 2021, the objective of the graph experiments, with one positive of a
    node; the floor is ours, after that of the image loss.
    Raises: ValueError: a parameter out of range, shapes that do not fit, or a single graph;
    TypeError: no floating point, or numbers of graphs that are no integers.

    >>> u, v = torch.zeros(3, 8), torch.zeros(2, 8)
    >>> round(local_global(u, v, torch.tensor([0, 0, 1])).item() / math.log(2), 4)
    2.0
    """
    _check(nodes, graphs, batch, beta, tau_plus, sign)
    positive, expected = _terms(nodes, graphs, batch, beta, tau_plus, sign, detach_weights)
    if floor:
        expected = expected.clamp(min=0)
    return (F.softplus(-positive) + expected).mean()


@torch.no_grad()
def floor_share(
    nodes: Tensor, graphs: Tensor, batch: Tensor, *, beta: float = 0.0, tau_plus: float = 0.0,
    sign: Sign = "hard",
) -> float:  # fmt: skip
    """Share of nodes, in [0, 1], whose floor binds: their negatives receive no gradient.

    Arguments and errors as in :func:`local_global`. Source: our reading, as is the floor.

    >>> u = torch.eye(2)
    >>> floor_share(9 * u, u, torch.tensor([0, 1]), tau_plus=0.5)
    1.0
    """
    _check(nodes, graphs, batch, beta, tau_plus, sign)
    _, expected = _terms(nodes, graphs, batch, beta, tau_plus, sign, True)
    return (expected < 0).double().mean().item()


class LocalGlobal(nn.Module):
    """Either of the two objectives for a trainer: ``loss(nodes, graphs, batch)``.

    ``beta`` is a plain attribute, so it may be annealed; sign "own" is the one of the objective.
    """

    def __init__(
        self, *, beta: float, tau_plus: float, sign: str = "own", detach_weights: bool = False,
        released: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.beta, self.released = beta, released
        self.settings: dict[str, Any] = {"tau_plus": tau_plus}
        if sign != "own":
            self.settings["sign"] = sign
        if not released:
            self.settings["detach_weights"] = detach_weights

    def forward(self, nodes: Tensor, graphs: Tensor, batch: Tensor) -> Tensor:
        loss = local_global_released if self.released else local_global
        return loss(nodes, graphs, batch, beta=self.beta, **self.settings)

    def floor_share(self, nodes: Tensor, graphs: Tensor, batch: Tensor) -> float:
        """Share of nodes whose floor binds, 0 where there is none."""
        if self.released:
            return 0.0
        settings = {k: v for k, v in self.settings.items() if k != "detach_weights"}
        return floor_share(nodes, graphs, batch, beta=self.beta, **settings)


def _terms(
    nodes: Tensor, graphs: Tensor, batch: Tensor, beta: float, tau_plus: float, sign: Sign,
    detach_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Score of each node's positive, (V,), and its debiased mean over negatives, (V,)."""
    s = nodes @ graphs.T  # (V, G)
    positive = s.gather(1, batch[:, None]).squeeze(1)
    if beta == 0:
        expected = (F.softplus(s).sum(dim=1) - F.softplus(positive)) / (len(graphs) - 1)
    else:
        tilt = (beta if sign == "hard" else -beta) * (s.detach() if detach_weights else s)
        q = tilt.scatter(1, batch[:, None], -math.inf).softmax(dim=1)
        expected = (q * F.softplus(s)).sum(dim=1)
    return positive, (expected - tau_plus * F.softplus(positive)) / (1 - tau_plus)


def local_global_released(
    nodes: Tensor,
    graphs: Tensor,
    batch: Tensor,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.5,
    sign: Sign = "easy",
) -> Tensor:
    r"""The objective as the released code computes it, masked entries and all.

    With p the scores where the graph is the node's own, q where it is not, and 0 elsewhere, the
    loss is :math:`E_{neg} - E_{pos}`, sums over all V·G entries:

    .. math::
        E_{pos} &= \frac1V \sum_{n,g} \Big[ \log 2 - \mathrm{sp}(-p_{ng})
            - \frac{\tau^+}{1-\tau^+} \mathrm{sp}(p_{ng}) \Big], \\
        E_{neg} &= \frac{1}{V(G-1)} \sum_{n,g} \Big[ \frac{\omega_{ng}\, \mathrm{sp}(q_{ng})}
            {1-\tau^+} - \log 2 \Big], \qquad
        \omega_{ng} = \frac{e^{\beta r_{ng}}}{\frac1G \sum_{g'} e^{\beta r_{ng'}}}, \quad
        r_{ng} = \frac{\mp 2 q_{ng}}{\max(\max q, |\min q|)} ;

    with beta = 0 the last log 2 is divided by :math:`1-\tau^+` too.

    Args:
        nodes, graphs, batch, beta: as in :func:`local_global`. Gradients flow through the weights
            and their scale.
        tau_plus: 0.5 there, for every data set. Its term has the sign of a penalty on the score of
            positives, where the equation rewards it: with 0.5 both parts are least at a score of 0.
        sign: "easy" is the minus of the released code, which weighs the least similar negatives
            most; "hard" the plus.

    Returns: scalar.

    Source: Robinson et al. 2021, `graph/losses.py` and `gan_losses.py` of the released code.
    Raises: as :func:`local_global`.

    >>> u, v = torch.zeros(3, 8), torch.zeros(2, 8)
    >>> round(local_global_released(u, v, torch.tensor([0, 0, 1])).item() / math.log(2), 4)
    4.0
    """
    _check(nodes, graphs, batch, beta, tau_plus, sign)
    s = nodes @ graphs.T  # (V, G)
    own = torch.zeros_like(s).scatter(1, batch[:, None], 1.0)
    p, q = s * own, s * (1 - own)
    expected_positive = math.log(2) - F.softplus(-p) - tau_plus / (1 - tau_plus) * F.softplus(p)
    if beta == 0:
        expected_negative = (F.softplus(q) - math.log(2)) / (1 - tau_plus)
    else:
        weight = _released_weights(q, -beta if sign == "easy" else beta)
        expected_negative = weight * F.softplus(q) / (1 - tau_plus) - math.log(2)
    negatives = len(nodes) * (len(graphs) - 1)
    return expected_negative.sum() / negatives - expected_positive.sum() / len(nodes)


def _released_weights(q: Tensor, tilt: float) -> Tensor:
    """Weights (V, G) of mean 1 in a row, over masked entries too, on a scale of the whole batch."""
    scale = torch.maximum(q.max(), q.min().abs()).clamp(min=torch.finfo(q.dtype).tiny)
    weight = (tilt * 2 * q / scale).exp()
    return weight / weight.mean(dim=1, keepdim=True)


def _check(
    nodes: Tensor, graphs: Tensor, batch: Tensor, beta: float, tau_plus: float, sign: str
) -> None:
    checks.tilt(beta, tau_plus)
    checks.choice("sign", sign, get_args(Sign))
    checks.embeddings("nodes", nodes)
    checks.embeddings("graphs", graphs)
    checks.same("graphs", graphs, nodes)
    if nodes.shape[1] != graphs.shape[1]:
        raise ValueError(
            f"graphs {tuple(graphs.shape)}: must be (G, {nodes.shape[1]}), as wide as nodes"
        )
    if len(graphs) < 2:
        raise ValueError(f"graphs: {len(graphs)} leave(s) no negatives; a batch needs at least 2")
    if batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        raise TypeError(f"batch: must be integers, the graph of each node, not {batch.dtype}")
    if batch.shape != (len(nodes),) or not len(nodes):
        raise ValueError(f"batch {tuple(batch.shape)}: must be ({len(nodes)},), V >= 1")
    if batch.device.type == "cpu" and not 0 <= int(batch.min()) <= int(batch.max()) < len(graphs):
        raise ValueError(
            f"batch: {int(batch.min())} to {int(batch.max())}; must be 0 to {len(graphs) - 1}"
        )
