r"""Losses of consecutive sentences: the ones beside a sentence are its positives.

With scores :math:`s_{ij} = f_i^\top g_j / t` of B consecutive sentences, two encoders f and g, and
P(i) the sentences at most ``reach`` places from i (of the same book), quick-thoughts is a softmax
over all sentences whose target is uniform on P(i). Hard negatives change its denominator:

=============== ============================================================================
quick-thoughts  :math:`-\frac1{|P(i)|}\sum_p s_{ip} + \log\sum_j e^{s_{ij}}`, with
                :math:`s_{ii} = 0` in the sum
debiased, hard  :math:`\frac1{|P(i)|}\sum_p \log(1 + \mathrm{Ng}_{ip} / e^{s_{ip}})`, with Ng the
                estimator of :func:`hcl.losses.hard` over the sentences that are neither i nor in
                P(i)
=============== ============================================================================

The scores of a batch are one small dense matrix (400 x 400): nothing is gained by streaming it.
"""

import math

import torch
from torch import Tensor

from hcl import checks
from hcl.debiasing import log_minus


def quick_thoughts(
    f: Tensor, g: Tensor, book: Tensor | None = None, *, temperature: float = 1.0, reach: int = 1
) -> Tensor:
    """The loss of quick-thoughts, a scalar: the mean over the sentences that have a neighbour.

    Args:
        f, g: (B, d), the embeddings of B consecutive sentences by two encoders, compared as they
            are: quick-thoughts neither normalises them nor divides by a temperature.
        book: (B,) integers; sentences of different books are no neighbours. None: all of one.
        temperature: divides the scores. reach: how far away a neighbour may be.

    Raises: ValueError, TypeError: shapes that do not fit, NaN, or a batch without neighbours.

    Source: Logeswaran & Lee 2018, the released code, which sets the score of a sentence with itself
    to 0 and so leaves it in the denominator.

    >>> quick_thoughts(torch.zeros(4, 2), torch.zeros(4, 2))  # log 4
    tensor(1.3863)
    """
    s, positive = _scores(f, g, book, temperature, reach)
    s = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), 0.0)
    count = positive.sum(dim=1)
    known = count > 0
    mean_positive = (s * positive).sum(dim=1)[known] / count[known]
    return (s[known].logsumexp(dim=1) - mean_positive).mean()


def hard_neighbours(
    f: Tensor,
    g: Tensor,
    book: Tensor | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    tau_plus: float = 0.0,
    detach_weights: bool = False,
    bounded: bool = False,
    reach: int = 1,
) -> Tensor:
    """HCL with neighbours as positives, each with its own denominator; a scalar, as above.

    Args:
        f, g, book, temperature, reach: as in :func:`quick_thoughts`; unit rows are the caller's.
        beta, tau_plus, detach_weights: as in :func:`hcl.losses.hard`; beta=0 and tau_plus=0 is the
            plain loss, with tau_plus > 0 the debiased one.
        bounded: rows are of length 1, so that the estimate of the negatives' mean is kept above
            e^(-1/t), the released clamp. Scores without a bound have no such floor: where the
            estimate is not positive, the pair's loss is log(1 + 0) = 0, without a gradient.

    Raises: ValueError, TypeError: as :func:`quick_thoughts`, or a sentence without negatives.

    Source: our reading. Robinson et al. 2021 put hard negatives into quick-thoughts with beta of 1
    and 2 and tau_plus = 0, as recalled, unverified; that code was not released.

    >>> z = torch.zeros(4, 2)  # one negative for the middle two, two for the others
    >>> round(hard_neighbours(z, z).item(), 4) == round((math.log(2) + math.log(3)) / 2, 4)
    True
    """
    checks.tilt(beta, tau_plus)
    s, positive = _scores(f, g, book, temperature, reach)
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    a = (beta * (s.detach() if detach_weights else s)).masked_fill(positive | itself, -math.inf)
    count = (~(positive | itself)).sum(dim=1)
    if not (count > 0).all():
        raise ValueError(f"batch of {len(s)}: a sentence has no negatives; a larger batch would do")
    log_g = (s + a).logsumexp(dim=1) - a.logsumexp(dim=1)  # (B,) log of the tilted mean
    anchor, which = positive.nonzero(as_tuple=True)
    p, log_ng = s[anchor, which], log_g[anchor]
    if tau_plus:
        log_ng, below = log_minus(log_ng, math.log(tau_plus) + p)
        log_ng = log_ng - math.log1p(-tau_plus)
        floor = -1 / temperature if bounded else -math.inf
        log_ng = torch.where(below | (log_ng < floor), floor, log_ng)
    log_ng = log_ng + count[anchor].to(s).log()
    each = torch.logaddexp(torch.zeros_like(p), log_ng - p)  # (pairs,)
    share = 1 / positive.sum(dim=1)[anchor].to(s)
    return (each * share).sum() / share.sum()


@torch.no_grad()
def found_share(f: Tensor, g: Tensor, book: Tensor | None = None, *, reach: int = 1) -> float:
    """The share of sentences whose highest score with another one is with a neighbour.

    Of those that have a neighbour; arguments and errors as in :func:`quick_thoughts`.

    Source: ours; the loss itself, as a count.

    >>> z = torch.eye(5)[:4] + torch.eye(5)[1:]  # alike are those that stand side by side
    >>> found_share(z, z)
    1.0
    """
    s, positive = _scores(f, g, book, 1.0, reach)
    best = s.fill_diagonal_(-math.inf).argmax(dim=1, keepdim=True)
    found = positive.gather(1, best).squeeze(1)[positive.any(dim=1)]
    return float(found.double().mean())


def _scores(
    f: Tensor, g: Tensor, book: Tensor | None, temperature: float, reach: int
) -> tuple[Tensor, Tensor]:
    """Scores (B, B), and which of them are of neighbours."""
    if f.shape != g.shape or f.ndim != 2 or len(f) < 2:
        raise ValueError(
            f"f is {tuple(f.shape)} and g {tuple(g.shape)}: equal shapes (B, d), B >= 2, would do"
        )
    if not f.is_floating_point() or f.dtype != g.dtype:
        raise TypeError(f"f is {f.dtype} and g {g.dtype}: one floating point type would do")
    checks.temperature(temperature)
    if reach < 1:
        raise ValueError(f"reach={reach}: must be 1 or more")
    place = torch.arange(len(f), device=f.device)
    apart = (place[:, None] - place).abs()
    positive = (apart > 0) & (apart <= reach)
    if book is not None:
        if book.shape != place.shape:
            raise ValueError(f"book is {tuple(book.shape)}: ({len(f)},) would do")
        positive &= book[:, None] == book
    if not positive.any():
        raise ValueError(f"book: no two of {len(f)} sentences are neighbours in one")
    s = f @ g.T / temperature
    if not s.isfinite().all():
        raise ValueError("f, g: scores are NaN or infinite: did training diverge?")
    return s, positive
