"""U(s, a): how far apart the elites' Gaussians are, and what is known. Shapes: E elites, B rows, D dimensions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIKE = 1.5
"""Times the median, up to which an uncertainty is as good as it."""


@dataclass(frozen=True)
class Trust:
    """How far a world model is believed."""

    uncertainty: str
    """Kind of U, of KINDS."""
    threshold: float
    """U over which a step is not known."""
    range_margin: float
    """Share of the log's range by which an observation may lie outside it."""


def known_threshold(uncertainty_H: NDArray[Any], known: float) -> float:
    """U that a share `known` of the held-out steps (H,) stays under, and not much over their median: of few steps that
    share is all, and where noise rules they are all alike."""
    return float(max(np.quantile(uncertainty_H, known), _ALIKE * np.median(uncertainty_H)))


def geometric_js(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor, kind: str) -> Tensor:
    """Geometric Jensen-Shannon divergence of diagonal Gaussians (..., D), summed over D (Nielsen 2019).

    primal: sum of 1/2 [q - 1 - 1/2 ln q + d^2 (v1^2 + v2^2) / (4 v1 v2 (v1 + v2))], q = (v1 + v2)^2 / (4 v1 v2).
    dual:   sum of d^2 / (4 (v1 + v2)) + 1/2 ln((v1 + v2) / (2 sqrt(v1 v2))), the Bhattacharyya distance.
    """
    square = (mean_1 - mean_2).square()
    v1, v2 = log_var_1.exp(), log_var_2.exp()
    total, product = v1 + v2, v1 * v2
    q = total.square() / (4.0 * product)
    if kind == "dual":
        return (square / (4.0 * total) + 0.25 * q.log()).sum(-1)
    spread = square * (v1.square() + v2.square()) / (4.0 * product * total)
    return (0.5 * (q - 1.0 - 0.5 * q.log() + spread)).sum(-1)


KINDS = ("spread", "primal", "dual")


def ensemble_uncertainty(mean_EBD: Tensor, log_variance_EBD: Tensor, kind: str) -> Tensor:
    """U (B,), by one of KINDS.

    primal, dual: mean divergence over all pairs of elites (the paper's). Measured in units of the predicted variance,
    it is small where the members are unsure together. spread: root mean square over D of the mixture's standard
    deviation, the members' own variance included, in units of the spread of (s' - s, r): the error to expect.
    """
    if kind == "spread":
        mixture = log_variance_EBD.exp().mean(0) + mean_EBD.var(0, correction=0)
        return mixture.mean(-1).sqrt()
    pairs = torch.tensor(list(itertools.combinations(range(len(mean_EBD)), 2)), device=mean_EBD.device).T
    return geometric_js(
        mean_EBD[pairs[0]], log_variance_EBD[pairs[0]], mean_EBD[pairs[1]], log_variance_EBD[pairs[1]], kind
    ).mean(0)
