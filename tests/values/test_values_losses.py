"""IQL losses, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ipd_ray.values.losses import advantage_weights, expectile_loss


def column(*values: float) -> Tensor:
    return torch.tensor(values)


def test_expectile_loss_matches_hand_computation():
    # u = [1, -2]; weights [0.9, 0.1]; mean(0.9 * 1, 0.1 * 4) = 0.65
    assert expectile_loss(column(2.0, -1.0), column(1.0, 1.0), tau=0.9).item() == pytest.approx(0.65)


def test_expectile_one_half_is_half_the_squared_error():
    # u = [1, -2]; mean(0.5 * 1, 0.5 * 4) = 1.25
    assert expectile_loss(column(2.0, -1.0), column(1.0, 1.0), tau=0.5).item() == pytest.approx(1.25)


def test_huber_expectile_loss_is_linear_beyond_one():
    # u = [0.5, 3, -2]; ell = [0.25, 2 * 3 - 1, 2 * 2 - 1]; weights [0.9, 0.9, 0.1]; (0.225 + 4.5 + 0.3) / 3 = 1.675
    loss = expectile_loss(column(1.5, 4.0, -1.0), torch.ones(3), tau=0.9, huber=True)
    assert loss.item() == pytest.approx(1.675)


def test_square_and_huber_meet_at_one():
    for u in (1.0, -1.0):
        plain, huber = (expectile_loss(column(u), column(0.0), tau=0.7, huber=h).item() for h in (False, True))
        assert plain == pytest.approx(huber)


def test_no_gradient_reaches_the_target():
    target, prediction = column(1.0, -1.0).requires_grad_(), torch.zeros(2, requires_grad=True)
    expectile_loss(target, prediction, tau=0.9).backward()
    # dL/dv = -2 w u / 2 = [-0.9, 0.1]
    assert target.grad is None
    assert prediction.grad is not None and prediction.grad.tolist() == pytest.approx([-0.9, 0.1])


def test_the_loss_is_least_at_the_expectile():
    # Of -1 and 1, half and half: 0.9 (1 - m) = 0.1 (m + 1) at m = 0.8.
    around = [expectile_loss(column(-1.0, 1.0), column(m, m), tau=0.9).item() for m in (0.75, 0.8, 0.85)]
    assert min(around) == around[1]


def test_advantage_weights_by_hand():
    # mean |A| = 2; beta 1: exp(-1 / 2), exp(3 / 2)
    weights = advantage_weights(column(-1.0, 3.0), temperature=1.0)
    assert weights.tolist() == pytest.approx([math.exp(-0.5), math.exp(1.5)])


def test_advantage_weights_are_limited_and_free_of_the_unit_of_reward():
    # mean |A| = 2; beta 5: exp(7.5) = 1808 is limited to 100
    assert advantage_weights(column(-1.0, 3.0), temperature=5.0)[1].item() == 100.0
    one, thousand = (advantage_weights(column(-1.0, 3.0) * s, temperature=1.0) for s in (1.0, 1000.0))
    assert torch.allclose(one, thousand)


def test_weights_without_temperature_or_without_advantage_are_one():
    assert advantage_weights(column(-1.0, 3.0), temperature=0.0).tolist() == [1.0, 1.0]
    assert advantage_weights(torch.zeros(2), temperature=3.0).tolist() == [1.0, 1.0]
