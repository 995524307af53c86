r"""The contrastive losses, in log space, from two row log-sum-exps.

Every loss here is one objective with another distribution over the negatives. With unit vectors,
:math:`s_{ij} = z_i^\top z_j / t`, the positive's score :math:`p_i`, the M = 2B - 2 negatives of an
anchor (both views of every other image) and log-weights :math:`a_{ij}`:

.. math::
    g_i = \sum_j q_{ij} e^{s_{ij}}, \quad q_i = \mathrm{softmax}(a_i), \qquad
    \mathrm{Ng}_i = \max\Big\{\frac{Q g_i - \tau^+ Q e^{p_i}}{1 - \tau^+}, Q e^{-1/t}\Big\}, \qquad
    \ell_i = \log\Big(1 + \frac{\mathrm{Ng}_i}{e^{p_i}}\Big).

==========  ==================  ==========
loss        :math:`a_{ij}`      tau_plus
==========  ==================  ==========
nt_xent     0                   0
debiased    0                   > 0
hard        beta * s_ij         >= 0
==========  ==================  ==========

Only torch is imported, so this module can be used in any trainer.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Clamp = Literal["scaled", "unscaled"]
METHODS = ("nt_xent", "debiased", "hard")


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float = 0.5, normalize: bool = True) -> Tensor:
    r"""NT-Xent, the loss of SimCLR: every other view in the batch is an equally likely negative.

    .. math:: \ell_i = -\log \frac{e^{p_i}}{e^{p_i} + \sum_j e^{s_{ij}}}

    Args:
        z1, z2: (B, d) floating point, B >= 2; row i of one is the positive of row i of the other.
        temperature: t > 0, divides the cosine similarities.
        normalize: divide each row by its L2 norm first.

    Returns:
        Scalar, the mean over the 2B anchors; float64 for float64 input, float32 otherwise.

    Raises:
        ValueError: shapes that differ, fewer than two rows, NaN or infinity, temperature <= 0.
        TypeError: embeddings that are not floating point.

    Source: Chen et al. 2020 (SimCLR), Eq. 1.

    >>> z = torch.eye(2)
    >>> round(nt_xent(z, z, temperature=0.5).item(), 4)  # log(1 + 2 e^0 / e^2)
    0.2395
    """
    return hard(z1, z2, temperature=temperature, beta=0.0, tau_plus=0.0, normalize=normalize)


def debiased(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    tau_plus: float = 0.1,
    clamp: Clamp = "scaled",
    Q: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """Debiased contrastive loss with one positive (M = 1): subtracts the expected false negatives.

    :func:`hard` with beta = 0; arguments, shapes and errors are explained there.

    Source: Chuang et al. 2020 (Debiased Contrastive Learning), Eqs. 7-8 with M = 1.

    >>> z1, z2 = torch.eye(4, 8), torch.eye(4, 8)
    >>> bool(debiased(z1, z2, tau_plus=0.1) < nt_xent(z1, z2))
    True
    """
    return hard(
        z1, z2, temperature=temperature, beta=0.0, tau_plus=tau_plus, clamp=clamp, Q=Q,
        normalize=normalize,
    )  # fmt: skip


def hard(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    detach_weights: bool = False,
    clamp: Clamp = "scaled",
    Q: float | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""HCL: negatives weighted by their similarity to the anchor, and debiased.

    .. math::
        \ell_i = -\log \frac{e^{p_i}}{e^{p_i} + \mathrm{Ng}_i}, \qquad
        \mathrm{Ng}_i = \max\Big\{ \frac{Q}{1-\tau^+}
        \Big( \sum_j q_{ij} e^{s_{ij}} - \tau^+ e^{p_i} \Big), Q e^{-1/t} \Big\}, \qquad
        q_{ij} \propto e^{\beta s_{ij}} .

    Args:
        z1, z2: (B, d) floating point, B >= 2; row i of one is the positive of row i of the other.
            float16 and bfloat16 are computed in float32, also under autocast.
        temperature: t > 0. The weights tilt by beta * cosine / t, as the released code does.
        beta: hardness >= 0. Zero weighs all negatives alike.
        tau_plus: class prior in [0, 1): the assumed share of false negatives.
        detach_weights: stop the gradient through the weights q (the released code does not).
        clamp: floor of Ng: "scaled" is Q e^(-1/t), as released; "unscaled" is e^(-1/t), as the
            paper's pseudo-code prints it.
        Q: weight on the negatives; None is their number 2B - 2, as released.
        normalize: divide each row by its L2 norm first. The floor assumes unit rows.

    Returns:
        Scalar, the mean over the 2B anchors; float64 for float64 input, float32 otherwise.

    Raises:
        ValueError: an argument out of its range, shapes that differ, fewer than two rows, NaN or
            infinity in z1 or z2 (looked for on a CPU; on a GPU that would wait for the device).
        TypeError: embeddings that are not floating point.

    Source: Robinson et al. 2021 (HCL), the objective of Section 3 with M = 1 positive, and the
    released image code's constants.

    >>> z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    >>> torch.equal(hard(z1, z2, beta=0.0, tau_plus=0.0), nt_xent(z1, z2))
    True
    """
    s, p = _scores(z1, z2, temperature, normalize)
    log_ng, _ = _log_negatives(s, p, temperature, beta, tau_plus, detach_weights, clamp, Q)
    return -F.logsigmoid(p - log_ng).mean()  # logsigmoid: exact at both ends, unlike softplus


class ContrastiveLoss(nn.Module):
    """The losses of this module behind one name: ``loss(z1, z2)``.

    ``beta`` is a plain attribute, so a trainer may anneal it (:func:`anneal_beta`). ``labels`` is
    accepted so that unsupervised and supervised losses share a signature; these ignore it.

    Args: method, one of ``METHODS``; the others as in :func:`hard`, each used where the method
    has it.

    Raises: ValueError: an unknown method or an argument out of its range, at construction.

    >>> loss = ContrastiveLoss("hard", beta=2.0)
    >>> loss(torch.randn(4, 8), torch.randn(4, 8)).ndim
    0
    """

    def __init__(
        self,
        method: str = "hard",
        *,
        temperature: float = 0.5,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        detach_weights: bool = False,
        clamp: Clamp = "scaled",
        Q: float | None = None,
        normalize: bool = True,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method={method!r}: choose one of {', '.join(METHODS)}")
        _check_parameters(temperature, beta, tau_plus, clamp, Q)
        self.method = method
        self.temperature, self.normalize = temperature, normalize
        self.beta = beta if method == "hard" else 0.0
        self.tau_plus = tau_plus if method != "nt_xent" else 0.0
        self.detach_weights, self.clamp, self.Q = detach_weights, clamp, Q

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Two (B, d) views to the scalar mean loss of the 2B anchors."""
        return hard(
            z1, z2, temperature=self.temperature, tau_plus=self.tau_plus,
            beta=self.beta if self.method == "hard" else 0.0,
            detach_weights=self.detach_weights, clamp=self.clamp, Q=self.Q,
            normalize=self.normalize,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.method}, temperature={self.temperature}, beta={self.beta}, "
            f"tau_plus={self.tau_plus}, detach_weights={self.detach_weights}"
        )


def anneal_beta(
    beta: float,
    epoch: int,
    epochs: int,
    *,
    steps: int = 9,
    schedule: Literal["paper", "released"] = "paper",
) -> float:
    """Hardness in a given epoch when beta is lowered in equal steps over the training.

    "paper": beta falls by beta / steps every epochs / steps epochs, so the last stretch trains at
    beta / steps. "released" repeats the code: linspace(beta, 0, steps), advanced after every
    int(epochs / steps) epochs, whose first advance hands out beta again. For 400 epochs and nine
    steps that is beta up to epoch 88, 0.875 beta from 89, and 0 only from 397.

    Args: epoch: 1 for the first; epochs: how many there will be; steps: at least 1 ("paper") or 2.

    Raises: ValueError: beta < 0, epoch outside 1..epochs, fewer epochs than steps.

    Source: Robinson et al. 2021, annealing; schedule "released" from the released image code.

    >>> [anneal_beta(1.0, e, 400, schedule="released") for e in (88, 89, 397)]
    [1.0, 0.875, 0.0]
    """
    if not beta >= 0:
        raise ValueError(f"beta={beta}: hardness must be 0 or more")
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch={epoch}: must be in 1..{epochs}")
    if not (1 if schedule == "paper" else 2) <= steps <= epochs:
        raise ValueError(f"steps={steps}: must be between 1 (released: 2) and epochs={epochs}")
    if schedule == "paper":
        return beta * (1 - (epoch - 1) * steps // epochs / steps)
    if schedule == "released":
        advances = (epoch - 1) // (epochs // steps)
        return beta * (1 - min(max(advances - 1, 0), steps - 1) / (steps - 1))
    raise ValueError(f"schedule={schedule!r}: choose 'paper' or 'released'")


@torch.no_grad()
def negative_weights(
    z1: Tensor, z2: Tensor, *, temperature: float = 0.5, beta: float = 1.0, normalize: bool = True
) -> Tensor:
    r"""The distribution over negatives, :math:`q_{ij} \propto e^{\beta s_{ij}}`, of every anchor.

    Returns:
        (2B, 2B): rows are the anchors of z1, then of z2; each sums to one; an anchor's own column
        and its positive's are zero.

    Raises: as :func:`hard`. Source: Robinson et al. 2021, the sampling distribution q_beta.

    >>> q = negative_weights(torch.eye(3), torch.eye(3), beta=0.0)
    >>> q[0]
    tensor([0.0000, 0.2500, 0.2500, 0.0000, 0.2500, 0.2500])
    """
    _check_parameters(temperature, beta, 0.0, "scaled", None)
    s, _ = _scores(z1, z2, temperature, normalize)
    allowed = s > -math.inf
    return torch.where(allowed, beta * s.where(allowed, 0), -math.inf).softmax(dim=1)


@torch.no_grad()
def clamp_share(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    clamp: Clamp = "scaled",
    Q: float | None = None,
    normalize: bool = True,
) -> float:
    """Share of anchors, in [0, 1], whose clamp binds: their negatives receive no gradient.

    Arguments and errors as in :func:`hard`. Source: our reading of the released clamp.

    >>> z = torch.nn.functional.normalize(torch.randn(64, 128), dim=1)
    >>> clamp_share(z, z, temperature=0.1, beta=0.0, tau_plus=0.1)  # aligned, small temperature
    1.0
    """
    s, p = _scores(z1, z2, temperature, normalize)
    _, bound = _log_negatives(s, p, temperature, beta, tau_plus, False, clamp, Q)
    return bound.float().mean().item()


# The two pieces every loss is made of ------------------------------------------------------------


def _scores(z1: Tensor, z2: Tensor, temperature: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """Negatives' scores (2B, 2B), -inf at the anchor itself and its positive; positives' (2B,)."""
    _check_embeddings(z1, z2)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive (the papers use 0.5)")
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2])  # (2B, d)
        z = z if z.dtype == torch.float64 else z.float()
        z = F.normalize(z, dim=1) if normalize else z
        n = len(z1)
        p = (z * z.roll(n, dims=0)).sum(dim=1) / temperature  # (2B,)
        s = z @ z.T / temperature  # (2B, 2B)
        row = torch.arange(2 * n, device=z.device)
        excluded = (row[:, None] - row[None, :]) % n == 0
        return s.masked_fill(excluded, -math.inf), p


def _log_negatives(
    s: Tensor,
    p: Tensor,
    temperature: float,
    beta: float,
    tau_plus: float,
    detach_weights: bool,
    clamp: Clamp,
    Q: float | None,
) -> tuple[Tensor, Tensor]:
    """log Ng (2B,) and where the clamp decides it (2B,) bool."""
    _check_parameters(temperature, beta, tau_plus, clamp, Q)
    negatives = len(s) - 2
    if beta == 0:
        log_g = s.logsumexp(dim=1) - math.log(negatives)
    else:
        a = beta * (s.detach() if detach_weights else s)
        log_g = (s + a).logsumexp(dim=1) - a.logsumexp(dim=1)
    log_q = math.log(negatives if Q is None else Q)
    if tau_plus == 0 and (clamp == "scaled" or log_q >= 0):
        # a weighted mean of unit rows' terms never falls below e^(-1/t)
        return log_q + log_g, torch.zeros_like(log_g, dtype=torch.bool)
    floor = -1 / temperature - (log_q if clamp == "unscaled" else 0)
    # log(g - tau e^p) = log g + log(1 - e^gap)
    gap = (math.log(tau_plus) if tau_plus else -math.inf) + p - log_g
    inside = gap < 0
    safe = gap.where(inside, -1.0)  # keeps NaN out of the branch that is not taken
    debiased_g = log_g + torch.log(-torch.expm1(safe)) - math.log1p(-tau_plus)
    bound = ~inside | (debiased_g < floor)
    return log_q + debiased_g.masked_fill(bound, floor), bound


def _check_embeddings(z1: Tensor, z2: Tensor) -> None:
    for name, z in (("z1", z1), ("z2", z2)):
        if not (isinstance(z, Tensor) and z.is_floating_point()):
            raise TypeError(f"{name}: must be a floating point tensor, not {_kind(z)}")
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(
            f"z1 {tuple(z1.shape)}, z2 {tuple(z2.shape)}: both must be (B, d), of one shape"
        )
    if len(z1) < 2:
        raise ValueError(f"z1, z2: {len(z1)} row(s) leave no negatives; a batch needs at least 2")
    if z1.device != z2.device:
        raise ValueError(f"z1 is on {z1.device}, z2 on {z2.device}: they must share a device")
    for name, z in (("z1", z1), ("z2", z2)):
        if z.device.type == "cpu" and not torch.isfinite(z).all():
            rows = (~torch.isfinite(z).all(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"{name}: NaN or infinity in row(s) {rows[:5]}; it must be finite")


def _kind(z: object) -> str:
    return f"a tensor of {z.dtype}" if isinstance(z, Tensor) else type(z).__name__


def _check_parameters(
    temperature: float, beta: float, tau_plus: float, clamp: str, Q: float | None
) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be positive (the papers use 0.5)")
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta={beta}: hardness must be 0 or more (the papers use 0.5 to 2)")
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus={tau_plus}: a class prior in [0, 1) (10 even classes: 0.1)")
    if clamp not in get_args(Clamp):
        raise ValueError(f"clamp={clamp!r}: choose 'scaled' or 'unscaled'")
    if Q is not None and not (Q > 0 and math.isfinite(Q)):
        raise ValueError(f"Q={Q}: the weight on the negatives must be positive, or None for 2B - 2")
