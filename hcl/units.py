"""Rows divided by their lengths, and pairs' inner products, with a gradient of three operations."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hcl.rowstats import differentiable
from hcl.tiles import wide

EPSILON = 1e-12  # of torch.nn.functional.normalize


def unit_views(
    z1: Tensor, z2: Tensor | None, order: Tensor | None, *, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Rows of length one, (B, V, d) float64 or float32, and a pair's inner product, (B,).

    Source: the gradient of z / |z| is the part of what arrives that is orthogonal to it, over |z|.
    """
    views = (z1,) if z2 is None else (z1, z2)
    found: tuple[Tensor, Tensor]
    if normalize:
        found = _UnitViews.apply(order, *views)
        return found
    z = _stack(order, *views)
    return z, _products(z)


def _stack(order: Tensor | None, *views: Tensor) -> Tensor:
    z = torch.stack(views, dim=1)
    z = z if z.dtype == torch.float64 else z.float()
    return z if order is None else z[order]


def _products(z: Tensor) -> Tensor:
    first, last = z.unbind(1)[0], z.unbind(1)[-1]
    return (first * last).sum(dim=1, dtype=wide(z))


class _UnitViews(torch.autograd.Function):
    """Divides in float64: the rounding of a norm is an error common to all scores of its row."""

    @staticmethod
    def forward(ctx: Any, order: Tensor | None, *views: Tensor) -> tuple[Tensor, Tensor]:
        z = _stack(order, *views)
        exact = z.to(wide(z))
        norm = torch.linalg.vector_norm(exact, dim=2, keepdim=True).clamp_(min=EPSILON)
        exact = exact.div_(norm)
        p, z, norm = _products(exact), exact.to(z.dtype), norm.to(z.dtype)
        ctx.save_for_backward(order, z, norm, *views)
        return z, p

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_p: Tensor) -> tuple[Tensor | None, ...]:
        order, z, norm, *views = ctx.saved_tensors
        if torch.is_grad_enabled():

            def formula(*views: Tensor) -> tuple[Tensor, Tensor]:
                unit = F.normalize(_stack(order, *views), dim=2, eps=EPSILON)
                return unit, _products(unit)

            return None, *differentiable(formula, views, (grad, grad_p))
        grad = torch.addcmul(grad, z.flip(1), grad_p[:, None, None].to(z))
        if z.shape[1] == 1:
            grad = torch.addcmul(grad, z, grad_p[:, None, None].to(z))  # <z, z> has it twice
        along = (z * grad).sum(dim=2, keepdim=True).masked_fill_(norm <= EPSILON, 0.0)
        dz = grad.addcmul_(z, along, value=-1.0).div_(norm)
        if order is not None:  # images that were left out get zero
            dz = dz.new_zeros(len(views[0]), *dz.shape[1:]).index_copy_(0, order, dz)
        return None, *(g.to(v.dtype) for g, v in zip(dz.unbind(1), views, strict=True))


def placed(z: Tensor, normalize: str) -> Tensor:
    """Rows (n, d) as a Run's loss compares them: on the sphere, in the ball, or as they are.

    Source: Jiang et al. 2023 (neural collapse), the released code divides lengths above 1 alone.

    >>> placed(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), "ball")
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    if normalize == "none":
        return z
    if normalize == "sphere":
        return F.normalize(z, dim=1)
    return z / z.norm(dim=1, keepdim=True).clamp(min=1.0)
