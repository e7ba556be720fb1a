"""The distillation loss. Shapes: B windows, K context steps, A action."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CriticFn = Callable[[Tensor, Tensor], Tensor]
"""Raw observations (..., O) and actions (..., A) to Q_1, Q_2 (2, ...)."""


@dataclass(frozen=True)
class Sums:
    """Parts of the loss of one worker, not yet divided by the global batch's counts."""

    imitation: Tensor
    """Sum over positions of weight * mean over action dims of (a - pi)^2."""
    q: Tensor
    """Sum over positions of Q_i(s, pi)."""
    q_size: Tensor
    """Sum over positions of |Q_j(s, pi)|, detached."""
    weight: Tensor
    """Sum of the imitation weights."""
    count: Tensor
    """Positions that count."""


def loss_sums(
    pi_BKA: Tensor,
    action_BKA: Tensor,
    observation_BKO: Tensor,
    weight_BK: Tensor,
    critic: CriticFn | None,
    pair: tuple[int, int],
) -> Sums:
    """Return the sums that `IPD` (arXiv:2603.04289), step 5, is made of.

    L = sum(weight * mean over dims (a - pi)^2) / sum(weight) - eta * M[Q_i(s, pi)] / scale, over the positions of the
    global batch with weight > 0, M their mean. critic: None without a value term. pair: (i, j), the critics that score
    and that scale.
    """
    counted = weight_BK > 0
    imitation = (weight_BK * (pi_BKA - action_BKA).square().mean(-1)).sum()
    zero = torch.zeros((), device=pi_BKA.device)
    q = q_size = zero
    if critic is not None:
        both = critic(observation_BKO, pi_BKA)
        q = (both[pair[0]] * counted).sum()
        q_size = (both[pair[1]].detach().abs() * counted).sum()
    return Sums(imitation, q, q_size, weight_BK.sum(), counted.sum().to(pi_BKA.dtype))
