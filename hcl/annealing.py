"""Hardness that falls while training goes on."""

from typing import Literal


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
