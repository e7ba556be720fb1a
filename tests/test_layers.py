"""Perceptrons side by side are what each is alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ipd_ray.layers import EnsembleMLP


def plain(net: EnsembleMLP, member: int, x_BI: Tensor) -> Tensor:
    """One member, layer by layer: scale and shift after LayerNorm, then ReLU."""
    for i, layer in enumerate(net.hidden):
        x_BI = x_BI @ layer.weight[member] + layer.bias[member]
        if len(net.norm_scale):
            x_BI = F.layer_norm(x_BI, x_BI.shape[-1:]) * net.norm_scale[i][member] + net.norm_shift[i][member]
        x_BI = x_BI.relu()
    return x_BI @ net.out.weight[member] + net.out.bias[member]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("members", [1, 3])
def test_members_and_their_gradients_are_those_of_each_alone(members: int, layer_norm: bool):
    torch.manual_seed(0)
    net = EnsembleMLP(members, 5, 2, width=16, layers=2, layer_norm=layer_norm)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(members, 7, 5)
    together, alone = net(x), torch.stack([plain(net, m, x[m]) for m in range(members)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)
    parameters = list(net.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (together, alone)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
