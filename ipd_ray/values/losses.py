"""IQL losses (Kostrikov et al. 2021, arXiv:2110.06169). Shapes: B batch."""

from __future__ import annotations

import torch
from torch import Tensor


def expectile_loss(target_B: Tensor, prediction_B: Tensor, *, tau: float, huber: bool = False) -> Tensor:
    """L_V of IQL: mean of |tau - 1(u < 0)| ell(u), u = target - prediction.

    target_B: (B,) such as the minimum over target critics; no gradient flows into it.
    prediction_B: (B,) in units where one is the spread of returns.
    tau: expectile in (0, 1); 0.5 is half the squared error, towards 1 it nears the maximum of the target.
    huber: ell is u^2 up to |u| = 1 and 2|u| - 1 beyond, instead of u^2 throughout.
    """
    u = target_B.detach() - prediction_B
    weight = torch.where(u < 0, 1.0 - tau, tau)
    size = torch.where(u.abs() <= 1.0, u.square(), 2.0 * u.abs() - 1.0) if huber else u.square()
    return (weight * size).mean()


def advantage_weights(advantage_B: Tensor, *, temperature: float, limit: float = 100.0) -> Tensor:
    """min(exp(beta * A / mean|A|), limit): IQL's weights, with beta free of the reward's unit."""
    scale = advantage_B.abs().mean().clamp(min=1e-8)
    return torch.exp((temperature * advantage_B / scale).clamp(max=20.0)).clamp(max=limit)
