"""Every method that a Run can name: which fields of a Run it has, options of its own, its loss.

Those of :mod:`hcl.losses` come with their arguments; the others are

=============== ===================================================================================
infograph       nodes against graphs, :mod:`hcl.graphs.infograph`
quick_thoughts  sentences against their neighbours, :mod:`hcl.neighbours`
hard_neighbours the same with HCL's denominator
unremix         three scores, :mod:`hcl.unremix`
ring, bayesian  a band of similarity; a posterior of the rank, :mod:`hcl.relatives`
transport       an optimal transport plan, :mod:`hcl.transport`
cross_entropy   a linear classifier on the encoder and no contrast at all
=============== ===================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hcl import checks, losses, neighbours, relatives, transport, unremix
from hcl.graphs import infograph

if TYPE_CHECKING:
    from hcl.run import Run

INFOGRAPH = "infograph"
CROSS_ENTROPY = "cross_entropy"
NEIGHBOURS: dict[str, Callable[..., Tensor]] = {
    "quick_thoughts": neighbours.quick_thoughts,
    "hard_neighbours": neighbours.hard_neighbours,
}
WEIGHTED: dict[str, Callable[..., Tensor]] = {  # losses of two views with weights of their own
    "unremix": unremix.unremix,
    "ring": relatives.ring,
    "bayesian": relatives.bayesian,
    "transport": transport.transported,
}
ARGUMENTS: dict[str, tuple[str, ...]] = {  # fields of a Run, beside the temperature
    **losses.ARGUMENTS,
    INFOGRAPH: infograph.ARGUMENTS,
    "quick_thoughts": (),
    "hard_neighbours": ("beta", "tau_plus", "detach_weights"),
    "unremix": ("tau_plus", "detach_weights"),
    "ring": (),
    "bayesian": ("tau_plus",),
    "transport": ("tau_plus",),
    CROSS_ENTROPY: ("labels",),
}
_OPTIONS = {  # a Run's method_args
    "unremix": ("anchor", "uncertainty", "representativeness", "normalisation", "nearness"),
    "ring": ("inner", "outer"),
    "bayesian": ("alpha", "concentration"),
    "transport": ("eps",),
}
_CHECKS: dict[str, Callable[..., None]] = {
    "unremix": unremix.check,
    "ring": relatives.check_ring,
    "bayesian": relatives.check_bayesian,
    "transport": transport.check_eps,
}


def options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A method's own options, those that are not given at their defaults.

    Raises: ValueError: an option the method does not have, or a value it refuses.

    >>> options("transport", {})
    {'eps': 0.7}
    """
    known = defaults(method)
    if unknown := set(given) - set(known):
        raise ValueError(f"{sorted(unknown)}: {method!r} takes {', '.join(known) or 'none'}")
    found = known | {k: v + 0.0 if type(v) in (int, float) else v for k, v in given.items()}
    if method in _CHECKS:
        _CHECKS[method](**found)
    if method == "decoupled" and found["sigma"]:
        checks.number("sigma", found["sigma"], "must be positive (0.5 is common), or 0", above=0)
    return {k: v for k, v in found.items() if v or k != "sigma"}


def defaults(method: str) -> dict[str, Any]:
    """Names of a method's own options and their defaults; of ``decoupled``, sigma, 0 for none."""
    if method == "decoupled":
        return {"sigma": 0.0}
    names = _OPTIONS.get(method, ())
    has = inspect.signature(WEIGHTED[method]).parameters if names else {}
    return {name: has[name].default for name in names}


def has_two_views(method: str) -> bool:
    """Whether a method's loss is one of two views of samples."""
    return method in losses.METHODS or method in WEIGHTED or method == CROSS_ENTROPY


def loss_of(run: Run) -> nn.Module:
    """The loss of a Run's method; its ``beta`` may be set from epoch to epoch.

    Two views and labels to a scalar, ``loss(z1, z2, labels)``, except for "infograph" (nodes,
    graphs and which node is whose) and the neighbours' (f, g and which sentence is whose).
    """
    if run.method == INFOGRAPH:
        args = {name: getattr(run, name) for name in ("beta", "tau_plus", "detach_weights", "sign")}
        return infograph.LocalGlobal(released=run.protocol == "released", **args)
    on_sphere = run.normalize == "sphere"  # where the loss itself divides
    if run.method in losses.METHODS:
        sigma: dict[str, Any] = dict(run.method_args)  # of "decoupled"
        return losses.ContrastiveLoss(run.method, normalize=on_sphere, **sigma, **run.loss_args())
    args = {name: getattr(run, name) for name in ARGUMENTS[run.method] if name != "labels"}
    args |= {"temperature": run.temperature, **run.method_args}
    if run.method in NEIGHBOURS:
        return _Loss(NEIGHBOURS[run.method], args, bounded=on_sphere)
    return _Loss(WEIGHTED.get(run.method), args)


class _Loss(nn.Module):
    """A loss and its arguments; ``beta``, where it is one of them, may be set."""

    def __init__(self, function: Callable[..., Tensor] | None, args: dict[str, Any], **more: Any):
        super().__init__()
        self.function, self.args, self.beta = function, args, args.get("beta", 0.0)
        takes = inspect.signature(function).parameters if function else {}
        self.args |= {name: value for name, value in more.items() if name in takes}

    def forward(self, one: Tensor, two: Tensor, which: Tensor | None = None) -> Tensor:
        assert self.function is not None
        beta = {"beta": self.beta} if "beta" in self.args else {}
        own = () if self.function in WEIGHTED.values() else (which,)  # these have no labels
        found: Tensor = self.function(one, two, *own, **{**self.args, **beta})
        return found
