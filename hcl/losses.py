r"""The contrastive losses: one objective, with another distribution over the negatives each.

With unit vectors, scores :math:`s_{ij} = \langle z_i, z_j \rangle / t`, a positive's score p, an
anchor's M negatives and their log-weights :math:`a_{ij}`:

.. math::
    g_i = \sum_j q_{ij} e^{s_{ij}}, \quad q_i = \mathrm{softmax}(a_i), \qquad
    \mathrm{Ng}_i = \max\Big\{\frac{Q g_i - \tau^+ Q e^{p}}{1 - \tau^+}, Q e^{-1/t}\Big\}, \qquad
    \ell_i = \log\Big(1 + \frac{\mathrm{Ng}_i}{e^{p}}\Big).

==========  ================  ===================  ========  =======================================
loss        negatives         :math:`a_{ij}`       tau_plus  positives
==========  ================  ===================  ========  =======================================
nt_xent     all other views   0                    0         the other view
decoupled   all other views   0                    0         the other view, not in the denominator
debiased    all other views   0                    > 0       the other view
hard        all other views   :math:`\beta s`      >= 0      the other view
scl         other labels      0                    0         same label, each its own denominator
hard_scl    other labels      :math:`\beta s`      0         same label, each its own denominator
supcon      other labels      0                    0         same label, all in the denominator
schane      other labels      :math:`\beta s`      0         same label, all in the denominator
weighted    as you say        as you say           >= 0      the other view
==========  ================  ===================  ========  =======================================

The denominators of ``decoupled``, ``supcon`` and ``schane`` differ, as their docstrings show.
Each is computed in log space from row log-sum-exps (:mod:`hcl.rowstats`) in O(N d) memory (second
derivatives take O(N^2)):
:math:`\log M g_i = \log M + \mathrm{LSE}_j((1 + \beta) s_{ij}) - \mathrm{LSE}_j(\beta s_{ij})`.

All of them take the options of :class:`hcl.negatives.Among` as keywords: ``normalize``,
``cross_modal``, ``queue``, ``synthetic``, ``gather``, ``engine``, ``precision``. All return a
scalar, float64 for float64 embeddings and float32 otherwise, also under autocast, and raise

* ValueError: a parameter out of its range, shapes or devices that do not fit, one image without
  labels, NaN or infinity (looked for on a CPU; on a GPU that would wait for the device);
* TypeError: embeddings that are not floating point or of two dtypes, labels that are not integers.

Only torch and numpy are imported, so the losses can be used in any trainer.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcl import checks, debiasing
from hcl.annealing import anneal_beta as anneal_beta
from hcl.debiasing import Clamp, Debias, log_count, log_negatives, log_tilted_sums
from hcl.negatives import Among, Batch, Unlabelled, log_add

Temperature = float | Tensor


def nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: Temperature = 0.5, **among: Unpack[Among]
) -> Tensor:
    r"""NT-Xent, the loss of SimCLR: every other view in the batch is an equally likely negative.

    .. math:: \ell_i = -\log \frac{e^{p_i}}{e^{p_i} + \sum_j e^{s_{ij}}}

    Args:
        z1, z2: (B, d) floating point, B >= 2; row i of one is the positive of row i of the other.
            float16 and bfloat16 are computed in float32 on a CPU, with products of 16 bits and
            sums of 32 on a GPU.
        temperature: t > 0, divides the cosine similarities; a tensor of one element may learn.
        among: see the docstring of this module, as for the result and the errors.

    Returns: scalar, the mean over the 2B anchors.

    Source: Chen et al. 2020 (SimCLR); with ``cross_modal``, the form of Radford et al. 2021 (CLIP).

    >>> z = torch.eye(2)
    >>> round(nt_xent(z, z, temperature=0.5).item(), 4)  # log(1 + 2 e^0 / e^2)
    0.2395
    """
    batch = Batch(z1, z2, temperature, **among)
    (log_sum,) = batch.log_sums(1.0)
    return batch.mean(_softplus(log_sum - batch.positives))


def debiased(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.5,
    tau_plus: float = 0.1,
    clamp: Clamp = "scaled",
    Q: float | None = None,
    **among: Unpack[Among],
) -> Tensor:
    """Debiased contrastive loss with one positive: subtracts the expected false negatives.

    :func:`hard` with beta = 0; arguments, shapes and errors are explained there.

    Source: Chuang et al. 2020 (Debiased Contrastive Learning) and the released code, which takes
    one positive.

    >>> z1, z2 = torch.eye(4, 8), torch.eye(4, 8)
    >>> bool(debiased(z1, z2, tau_plus=0.1) < nt_xent(z1, z2))
    True
    """
    return hard(
        z1, z2, temperature=temperature, beta=0.0, tau_plus=tau_plus, clamp=clamp, Q=Q, **among
    )


def hard(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    detach_weights: bool = False,
    threshold: float | None = None,
    debias: Debias = "released",
    clamp: Clamp = "scaled",
    Q: float | None = None,
    **among: Unpack[Among],
) -> Tensor:
    r"""HCL: negatives weighted by their similarity to the anchor, and debiased.

    .. math::
        \ell_i = -\log \frac{e^{p_i}}{e^{p_i} + \mathrm{Ng}_i}, \qquad
        \mathrm{Ng}_i = \max\Big\{ \frac{Q}{1-\tau^+}
        \Big( \sum_j q_{ij} e^{s_{ij}} - \tau^+ e^{p_i} \Big), Q e^{-1/t} \Big\}, \qquad
        q_{ij} \propto e^{\beta s_{ij}} .

    Args:
        z1, z2, temperature, among: as in :func:`nt_xent`. The weights tilt by beta * cosine / t, as
            the released code does.
        beta: hardness >= 0. Zero weighs all negatives alike.
        tau_plus: class prior in [0, 1): the assumed share of false negatives.
        detach_weights: stop the gradient through the weights q (the released code does not).
        threshold: a cosine in [-1, 1]; negatives below it have no weight, the hardest one always
            has. With beta = 0 this is hardening by a threshold instead of an exponential. It is
            computed in strips, several times slower; debias="separate" does not go with it.
        debias: "released" is the formula above. It takes tau_plus for the share of false negatives
            under the weights q, which is :math:`\tau^+ Z^+ / Z`, with Z and :math:`Z^+` the means
            of :math:`e^{\beta s}` over all candidates and over the false negatives:

            .. math::
                \frac{\mathbb E[e^{(1+\beta)s}]}{\mathbb E[e^{\beta s}]} =
                \frac{\tau^+ \mathbb E^+[e^{(1+\beta)s}] + \tau^- \mathbb E^-[e^{(1+\beta)s}]}
                     {\tau^+ \mathbb E^+[e^{\beta s}] + \tau^- \mathbb E^-[e^{\beta s}]} .

            "separate" subtracts from both sums and so recovers the tilted mean over true
            negatives. With A and C the sums of :math:`e^{(1+\beta)s}` and :math:`e^{\beta s}`
            over the M candidates,

            .. math:: \mathrm{Ng} = Q\, \frac{A / M - \tau^+ e^{(1+\beta)p}}
                                           {C / M - \tau^+ e^{\beta p}},

            numerator and denominator no less than :math:`\tau^- e^{-(1+\beta)/t}` and
            :math:`\tau^- e^{-\beta/t}`, their least values for unit rows, and Ng no more than
            :math:`Q e^{1/t}`. The two agree at beta = 0.
        clamp: floor of Ng: "scaled" is Q e^(-1/t), as released; "unscaled" is e^(-1/t), as in the
            paper's pseudo-code (as others' code quotes it).
        Q: weight on the negatives; None is their number, 2B - 2, as released.

    Returns: scalar, the mean over the 2B anchors.

    Source: Robinson et al. 2021 (HCL) with one positive, and the released image code's constants;
    debias="separate" is our derivation; threshold is our reading of Jiang et al. 2022 (H-SCL).

    >>> z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    >>> torch.equal(hard(z1, z2, beta=0.0, tau_plus=0.0), nt_xent(z1, z2))
    True
    """
    _check(beta, tau_plus, debias, clamp, Q, detach_weights, threshold)
    batch = Batch(z1, z2, temperature, **among)
    log_ng, _ = log_negatives(batch, beta, tau_plus, detach_weights, debias, clamp, Q, threshold)
    return batch.mean(_softplus(log_ng - batch.positives))


def decoupled(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.5,
    sigma: float | None = None,
    **among: Unpack[Among],
) -> Tensor:
    r"""Decoupled contrastive loss: the positive leaves the denominator.

    .. math:: \ell_i = -w_i p_i + \log \sum_j e^{s_{ij}}, \qquad
              w_i = 2 - B\, \mathrm{softmax}_i(t p_i / \sigma)

    Args:
        z1, z2, temperature, among: as in :func:`nt_xent`.
        sigma: > 0, of the weights over the B pairs, which have no gradient; None weighs all by 1.

    Returns: scalar, the mean over the 2B anchors.

    Source: Yeh et al. 2022 (Decoupled Contrastive Learning), DCL and DCLW, after a third-party
    implementation; its temperature is 0.1.

    >>> z = torch.eye(2)
    >>> round(decoupled(z, z, temperature=0.5).item(), 4)  # -2 + log(2 e^0)
    -1.3069
    """
    if sigma is not None:
        checks.number("sigma", sigma, "must be positive (0.5 is common), or None", above=0)
    batch = Batch(z1, z2, temperature, **among)
    (log_sum,) = batch.log_sums(1.0)
    if sigma is None:
        return batch.mean(log_sum - batch.positives)
    with torch.no_grad():
        cosines = batch.pairs * batch.temperature
        log_total = (cosines / sigma).logsumexp(dim=0)
        share = torch.exp(batch.positives * batch.temperature / sigma - log_total)
        weight = 2 - len(cosines) * share
    return batch.mean(log_sum - weight * batch.positives)


def scl(
    z1: Tensor, z2: Tensor | None, labels: Tensor, *, temperature: Temperature = 0.5,
    Q: float | Literal["negatives"] | None = None, unlabelled: Unlabelled = "negative",
    **among: Unpack[Among],
) -> Tensor:  # fmt: skip
    """SCL: negatives are the views of other labels, all weighted alike.

    :func:`hard_scl` with beta = 0; arguments, shapes and errors are explained there.

    Source: Jiang et al. 2022 (H-SCL), the released code's ``easy`` estimator.

    >>> z, labels = torch.eye(4, 8), torch.arange(4)
    >>> torch.allclose(scl(z, z, labels), nt_xent(z, z))  # every image its own class
    True
    """
    return hard_scl(
        z1, z2, labels, temperature=temperature, beta=0.0, Q=Q, unlabelled=unlabelled, **among
    )


def hard_scl(
    z1: Tensor,
    z2: Tensor | None,
    labels: Tensor,
    *,
    temperature: Temperature = 0.5,
    beta: float = 1.0,
    detach_weights: bool = False,
    threshold: float | None = None,
    Q: float | Literal["negatives"] | None = None,
    unlabelled: Unlabelled = "negative",
    **among: Unpack[Among],
) -> Tensor:
    r"""H-SCL: hard negatives among the views of other labels, a denominator for each positive.

    .. math::
        \mathcal L = \frac{1}{\sum_i |P(i)|} \sum_i \sum_{p \in P(i)}
        \log\Big(1 + \frac{Q \sum_j q_{ij} e^{s_{ij}}}{e^{s_{ip}}}\Big), \qquad
        q_{ij} \propto e^{\beta s_{ij}}

    with j over the views of other labels and P(i) the other views of the same label. The mean is
    over pairs, so anchors of large classes count more.

    Args:
        z1, z2, temperature, among: as in :func:`nt_xent`; z2 may be None: one view of each image.
        labels: (B,) integers, on the device of z1. They may repeat.
        beta, detach_weights, threshold: as in :func:`hard`.
        Q: weight on the negatives; None is the number of other candidates, 2B - 2, as released;
            "negatives" is the number of those of other labels.
        unlabelled: an image of label -1 is a class of its own, so a negative of all others
            ("negative"), or left out ("ignore").

    Returns:
        Scalar. Pairs whose anchor has no negatives are 0; without any pair the loss is 0.

    Source: Jiang et al. 2022 (H-SCL), the released code; Q = "negatives" and threshold are our
    reading.

    >>> z, labels = torch.eye(4, 8), torch.tensor([0, 0, 1, 1])
    >>> round(hard_scl(z, z, labels).item(), 4)
    1.4954
    """
    number = None if Q == "negatives" else Q
    _check(beta, 0.0, "released", "scaled", number, detach_weights, threshold)
    batch = Batch(z1, z2, temperature, labels, unlabelled, supervised=True, **among)
    log_a, log_c = log_tilted_sums(batch, beta, detach_weights, threshold)
    log_q = log_count(batch.negatives) if Q == "negatives" else math.log(Q or max(batch.others, 1))
    log_ng = log_a - log_c + log_q

    def each(s: Tensor, positive: Tensor, log_ng: Tensor) -> Tensor:
        return (_softplus(log_ng[:, None].to(s) - s) * positive).sum(dim=1)

    sums = batch.over_positives(each, log_ng)
    pairs = batch.companions.to(sums)
    return batch.mean(sums / pairs.clamp(min=1), weight=pairs)


def supcon(
    z1: Tensor, z2: Tensor | None, labels: Tensor, *, temperature: Temperature = 0.5,
    unlabelled: Unlabelled = "negative", **among: Unpack[Among],
) -> Tensor:  # fmt: skip
    r"""SupCon: all other views in the denominator, the mean over positives outside the logarithm.

    .. math:: \ell_i = \log \sum_{a \ne i} e^{s_{ia}} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}

    Args: as in :func:`hard_scl`.

    Returns:
        Scalar, the mean over the anchors that have a positive; 0 without any. The reference code
        multiplies by t / 0.07; this does not.

    Source: Khosla et al. 2020 (SupCon) and its reference code.

    >>> z = torch.eye(4, 8)
    >>> torch.allclose(supcon(z, z, torch.arange(4)), nt_xent(z, z))  # every image its own class
    True
    """
    batch = Batch(z1, z2, temperature, labels, unlabelled, supervised=True, **among)
    (log_sum,) = batch.log_sums(1.0, everyone=True)
    some = batch.companions > 0
    return batch.mean((log_sum - batch.positive_mean()).where(some, 0.0), weight=some)


def schane(
    z1: Tensor,
    z2: Tensor | None,
    labels: Tensor,
    *,
    temperature: Temperature = 0.5,
    beta: float = 1.0,
    detach_weights: bool = False,
    unlabelled: Unlabelled = "negative",
    **among: Unpack[Among],
) -> Tensor:
    r"""SCHaNe's contrastive term: SupCon whose negatives of other labels are weighted.

    .. math::
        \ell_i = \log \Big( \sum_{p \in P(i)} e^{s_{ip}} + |N(i)| \sum_j q_{ij} e^{s_{ij}} \Big)
        - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}, \qquad q_{ij} \propto e^{\beta s_{ij}}

    Args: as in :func:`hard_scl`; as we recall the paper, its weights are those of beta = 1.

    Returns: scalar, the mean over the anchors that have a positive; 0 without any.

    Source: Long et al. 2023 (SCHaNe), our reading, from memory, of an ambiguous formula; the mean
    over anchors is ours.

    >>> z, labels = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, -1])
    >>> torch.allclose(schane(z, z, labels, beta=0.0), supcon(z, z, labels))
    True
    """
    _check(beta, 0.0, "released", "scaled", None, detach_weights)
    batch = Batch(z1, z2, temperature, labels, unlabelled, supervised=True, **among)
    log_a, log_c = log_tilted_sums(batch, beta, detach_weights)
    log_ng = log_a - log_c + log_count(batch.negatives)

    def positives(s: Tensor, positive: Tensor) -> Tensor:
        s = s.masked_fill(~positive, -math.inf)
        alone = ~positive.any(dim=1)
        return s.masked_fill(alone[:, None], 0.0).logsumexp(dim=1).masked_fill(alone, -math.inf)

    some = batch.companions > 0
    log_positives = batch.over_positives(positives).to(log_ng).where(some, 0.0)
    both = log_add(log_positives, log_ng)
    return batch.mean((both - batch.positive_mean()).where(some, 0.0), weight=some)


def weighted(
    z1: Tensor,
    z2: Tensor,
    log_weights: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    temperature: Temperature = 0.5,
    tau_plus: float = 0.0,
    clamp: Clamp = "scaled",
    Q: float | None = None,
    **among: Unpack[Among],
) -> Tensor:
    r"""Any weights over any negatives: the objective of this module with log-weights of your own.

    Args:
        z1, z2, temperature, among: as in :func:`nt_xent`.
        log_weights: ``log_weights(s, i, j)`` gets scores s (r, c) and the indices of their anchors
            i (r,) and candidates j (c,) in ``cat([z1, z2])``, then the queue, then the synthetic
            negatives; it returns :math:`a_{ij}` (r, c), -inf where j is no negative of i. The
            anchor itself and its other view have s = -inf and are left out whatever it returns.
            Gradients flow through s, not through other tensors that it uses; weights made of
            ``s.detach()`` are constants. It is called on strips of rows, and again in the backward
            pass.
        tau_plus, clamp: as in :func:`hard`.
        Q: weight on the negatives; None is the number an anchor has.

    Returns: scalar, the mean over the 2B anchors; those without negatives count 0.

    Source: our reading: the common form of the methods in this book.

    >>> z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    >>> ours = weighted(z1, z2, lambda s, i, j: 2.0 * s, tau_plus=0.1)
    >>> torch.allclose(ours, hard(z1, z2, beta=2.0, tau_plus=0.1))
    True
    """
    _check(0.0, tau_plus, "released", clamp, Q)
    if not callable(log_weights):
        raise TypeError(f"log_weights={log_weights!r}: must be a function of s, i and j")
    batch = Batch(z1, z2, temperature, **among)

    def strip(s: Tensor, excluded: Tensor, i: Tensor, j: Tensor) -> Tensor:
        a = log_weights(s.masked_fill(excluded, -math.inf), i, j)
        if not (isinstance(a, Tensor) and a.is_floating_point()):
            raise TypeError(f"log_weights returned {checks.kind(a)}: must be floating point")
        if a.shape != s.shape:
            raise ValueError(f"log_weights returned {tuple(a.shape)} for scores {tuple(s.shape)}")
        a = a.masked_fill(excluded, -math.inf)
        count = (a > -math.inf).sum(dim=1)
        a = a.masked_fill(count[:, None] == 0, 0.0)  # -inf throughout would give NaN
        log_g = (s + a).logsumexp(dim=1) - a.logsumexp(dim=1)
        return torch.stack([log_g, count.to(s)], dim=1)

    log_g, count = batch.over_negatives(strip).to(batch.positives).unbind(dim=1)
    log_q = log_count(count) if Q is None else torch.full_like(log_g, math.log(Q))
    log_ng, _ = debiasing.released(log_g, batch, tau_plus, clamp, log_q)
    return batch.mean(_softplus(log_ng - batch.positives).where(count > 0, 0.0))


class ContrastiveLoss(nn.Module):
    """The losses of this module behind one name: ``loss(z1, z2, labels=None)``.

    ``beta`` is a plain attribute, so a trainer may anneal it (:func:`anneal_beta`). Supervised and
    unsupervised losses share the signature: the latter ignore ``labels``.

    Args:
        method: one of ``METHODS``.
        temperature, beta, tau_plus, detach_weights, threshold, debias, clamp, Q, sigma,
            unlabelled: as in the functions, used where the method has them. A temperature that is
            a Parameter learns.
        among: options of :class:`hcl.negatives.Among` but ``queue`` and ``synthetic``, which change
            from call to call and are given to it.

    Raises: ValueError, TypeError: an unknown method or an argument out of range, at construction.

    >>> loss = ContrastiveLoss("hard", beta=2.0)
    >>> loss(torch.randn(4, 8), torch.randn(4, 8)).ndim
    0
    """

    def __init__(
        self,
        method: str = "hard",
        *,
        temperature: Temperature = 0.5,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        detach_weights: bool = False,
        threshold: float | None = None,
        debias: Debias = "released",
        clamp: Clamp = "scaled",
        Q: float | Literal["negatives"] | None = None,
        sigma: float | None = None,
        unlabelled: Unlabelled = "negative",
        **among: Unpack[Among],
    ):
        super().__init__()
        checks.choice("method", method, METHODS)
        checks.temperature(temperature)
        number = None if Q == "negatives" else Q
        _check(beta, tau_plus, debias, clamp, number, detach_weights, threshold)
        if sigma is not None:
            checks.number("sigma", sigma, "must be positive (0.5 is common), or None", above=0)
        checks.choice("unlabelled", unlabelled, get_args(Unlabelled))
        checks.options(among)
        for name in ("queue", "synthetic"):
            if name in among:
                raise TypeError(f"{name}: changes from call to call, loss(z1, z2, {name}=…)")
        if Q == "negatives" and "labels" not in ARGUMENTS[method]:
            raise ValueError(f"Q='negatives': {method} has no labels; a number, or None")
        self.method, self.temperature, self.beta = method, temperature, beta
        if "beta" not in ARGUMENTS[method]:
            self.beta = 0.0
        self.settings = {
            "tau_plus": tau_plus, "detach_weights": detach_weights, "threshold": threshold,
            "debias": debias, "clamp": clamp, "Q": Q, "sigma": sigma, "unlabelled": unlabelled,
        }  # fmt: skip
        self.among = among

    def forward(
        self, z1: Tensor, z2: Tensor | None, labels: Tensor | None = None, **among: Unpack[Among]
    ) -> Tensor:
        """Two (B, d) views, and (B,) labels where the method has them, to the scalar loss."""
        names = ARGUMENTS[self.method]
        given: dict[str, Any] = {**self.settings, "beta": self.beta, "labels": labels}
        chosen = {name: given[name] for name in names}
        loss: Tensor = globals()[self.method](
            z1, z2, temperature=self.temperature, **chosen, **{**self.among, **among}
        )
        return loss

    def extra_repr(self) -> str:
        names = [n for n in ARGUMENTS[self.method] if n not in ("labels", "beta")]
        values = {"temperature": self.temperature, "beta": self.beta} | {
            name: self.settings[name] for name in names
        }
        return ", ".join([self.method, *(f"{name}={value}" for name, value in values.items())])


ARGUMENTS = {  # those each method has, beside the temperature
    "nt_xent": (),
    "decoupled": ("sigma",),
    "debiased": ("tau_plus", "clamp", "Q"),
    "hard": ("beta", "tau_plus", "detach_weights", "threshold", "debias", "clamp", "Q"),
    "scl": ("labels", "Q", "unlabelled"),
    "hard_scl": ("labels", "beta", "detach_weights", "threshold", "Q", "unlabelled"),
    "supcon": ("labels", "unlabelled"),
    "schane": ("labels", "beta", "detach_weights", "unlabelled"),
}
METHODS = tuple(ARGUMENTS)


@torch.no_grad()
def negative_weights(
    z1: Tensor, z2: Tensor, *, temperature: float = 0.5, beta: float = 1.0, normalize: bool = True
) -> Tensor:
    r"""The distribution over negatives, :math:`q_{ij} \propto e^{\beta s_{ij}}`, of every anchor.

    Returns:
        (2B, 2B): rows are the anchors of z1, then of z2; each sums to one; an anchor's own column
        and its positive's are zero. The one function here that makes the whole matrix.

    Raises: as :func:`hard`. Source: Robinson et al. 2021, the sampling distribution q_beta.

    >>> q = negative_weights(torch.eye(3), torch.eye(3), beta=0.0)
    >>> q[0]
    tensor([0.0000, 0.2500, 0.2500, 0.0000, 0.2500, 0.2500])
    """
    checks.tilt(beta)
    batch = Batch(z1, z2, temperature, normalize=normalize)
    (side,) = batch.sides
    with torch.autocast(side.x.device.type, enabled=False):
        a = beta / temperature * side.x @ side.x.T
    q = a.masked_fill(side.own[:, None] == side.own, -math.inf).softmax(dim=1)
    return torch.empty_like(q).index_put_((batch.rows(side)[:, None], batch.cols(side)), q)


@torch.no_grad()
def clamp_share(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    threshold: float | None = None,
    debias: Debias = "released",
    clamp: Clamp = "scaled",
    Q: float | None = None,
    **among: Unpack[Among],
) -> float:
    """Share of anchors, in [0, 1], whose clamp binds: their negatives receive no gradient.

    With debias="separate", those with any of its clamps. Arguments and errors as in :func:`hard`.

    Source: our reading of the released clamp.

    >>> z = torch.nn.functional.normalize(torch.randn(64, 128), dim=1)
    >>> clamp_share(z, z, temperature=0.1, beta=0.0, tau_plus=0.1)  # aligned, small temperature
    1.0
    """
    _check(beta, tau_plus, debias, clamp, Q, threshold=threshold)
    batch = Batch(z1, z2, temperature, **among)
    _, bound = log_negatives(batch, beta, tau_plus, False, debias, clamp, Q, threshold)
    return batch.mean(bound.to(batch.positives)).item()


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # exact at both ends, unlike torch's softplus


def _check(
    beta: float,
    tau_plus: float,
    debias: str,
    clamp: str,
    Q: float | None,
    detach_weights: bool = False,
    threshold: float | None = None,
) -> None:
    checks.tilt(beta, tau_plus)
    checks.choice("detach_weights", detach_weights, (True, False))
    checks.choice("debias", debias, get_args(Debias))
    checks.choice("clamp", clamp, get_args(Clamp))
    if Q is not None:
        checks.number("Q", Q, "a positive weight on the negatives, or None", above=0)
    if threshold is not None:
        checks.number("threshold", threshold, "a cosine in [-1, 1], or None")
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: a cosine in [-1, 1], or None")
        if debias == "separate":
            raise ValueError("debias='separate' sums over all negatives: threshold must be None")
