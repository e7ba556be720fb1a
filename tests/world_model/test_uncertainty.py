"""Divergences of Gaussians against their definition, and the uncertainty made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ipd_ray.world_model.uncertainty import KINDS, ensemble_uncertainty, geometric_js

X = np.linspace(-60.0, 60.0, 400_001)


def density(mean: float, variance: float) -> np.ndarray:
    return np.exp(-((X - mean) ** 2) / (2.0 * variance)) / math.sqrt(2.0 * math.pi * variance)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) by summation."""
    inside = (p > 1e-200) & (q > 1e-200)
    return float((p[inside] * np.log(p[inside] / q[inside])).sum() * (X[1] - X[0]))


def by_definition(one: tuple[float, float], two: tuple[float, float], kind: str) -> float:
    """Mean divergence to (primal) or from (dual) the normalised geometric mean of two densities."""
    p, q = density(*one), density(*two)
    middle = np.sqrt(p * q)
    middle /= middle.sum() * (X[1] - X[0])
    if kind == "primal":
        return 0.5 * divergence(p, middle) + 0.5 * divergence(q, middle)
    return 0.5 * divergence(middle, p) + 0.5 * divergence(middle, q)


def js(one: tuple[float, float], two: tuple[float, float], kind: str) -> float:
    columns = [torch.tensor([value], dtype=torch.float64) for m, v in (one, two) for value in (m, math.log(v))]
    return geometric_js(*columns, kind).item()


PAIRS = [((0.0, 1.0), (1.0, 1.0)), ((0.0, 1.0), (0.0, 4.0)), ((-1.0, 0.5), (2.0, 3.0))]


@pytest.mark.parametrize("kind", ["primal", "dual"])
@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_the_closed_form_is_the_definition(one: tuple[float, float], two: tuple[float, float], kind: str):
    assert js(one, two, kind) == pytest.approx(by_definition(one, two, kind), rel=1e-6)


def test_unit_gaussians_one_apart_by_hand():
    # primal: q = 1, 1/2 * 1 * (1 + 1) / (4 * 1 * 2) = 1/8; dual: 1 / (4 * 2) = 1/8.
    assert js((0.0, 1.0), (1.0, 1.0), "primal") == pytest.approx(0.125)
    assert js((0.0, 1.0), (1.0, 1.0), "dual") == pytest.approx(0.125)
    # variances 1 and 4: q = 25 / 16; primal 1/2 (9/16 - 1/2 ln q); dual 1/4 ln q.
    assert js((0.0, 1.0), (0.0, 4.0), "primal") == pytest.approx(0.5 * (0.5625 - 0.5 * math.log(25 / 16)))
    assert js((0.0, 1.0), (0.0, 4.0), "dual") == pytest.approx(0.25 * math.log(25 / 16))


@pytest.mark.parametrize("kind", ["primal", "dual"])
def test_it_is_zero_for_equal_gaussians_symmetric_and_adds_up_over_dimensions(kind: str):
    assert js((3.0, 0.2), (3.0, 0.2), kind) == pytest.approx(0.0, abs=1e-12)
    for one, two in PAIRS:
        assert js(one, two, kind) == pytest.approx(js(two, one, kind)) and js(one, two, kind) > 0.0
    m1, v1, m2, v2 = (torch.tensor([[pair[i][j] for pair in PAIRS]]) for i in (0, 1) for j in (0, 1))
    together = geometric_js(m1, v1.log(), m2, v2.log(), kind)
    assert together.tolist() == pytest.approx([sum(js(one, two, kind) for one, two in PAIRS)], rel=1e-5)


@pytest.mark.parametrize("kind", ["primal", "dual"])
def test_the_ensemble_takes_the_mean_over_pairs(kind: str):
    # Unit variances, means 0, 0, 2: pairs apart 0, 2, 2; a distance of 2 diverges by 4 / 8: (0 + 1/2 + 1/2) / 3.
    mean = torch.tensor([0.0, 0.0, 2.0]).reshape(3, 1, 1)
    assert ensemble_uncertainty(mean, torch.zeros(3, 1, 1), kind).tolist() == pytest.approx([1 / 3])


def test_spread_is_the_standard_deviation_of_the_mixture():
    # Dimension 1: means 1 and 3, variances 1 and 3: 2 + 1. Dimension 2: means 0, variances 1: 1. sqrt((3 + 1) / 2).
    mean = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])
    log_variance = torch.tensor([[[1.0, 1.0]], [[3.0, 1.0]]]).log()
    assert ensemble_uncertainty(mean, log_variance, "spread").tolist() == pytest.approx([math.sqrt(2.0)])


@pytest.mark.parametrize("kind", KINDS)
def test_it_grows_as_members_part_and_does_not_depend_on_their_order(kind: str):
    def u(distance: float) -> Tensor:
        mean = torch.tensor([0.0, distance, -distance]).reshape(3, 1, 1)
        return ensemble_uncertainty(mean, torch.zeros(3, 1, 1), kind)

    assert u(0.5) < u(1.0) < u(2.0)
    mean, log_variance = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = ensemble_uncertainty(mean[order], log_variance[order], kind)
    assert torch.allclose(ensemble_uncertainty(mean, log_variance, kind), shuffled, rtol=1e-4)
