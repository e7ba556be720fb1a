"""Layers that several steps share. Shapes: M members, B batch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EnsembleLinear(nn.Module):
    """M linear maps as one batched product: (M, B, in) to (M, B, out)."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x_MBI: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x_MBI, self.weight)


class EnsembleMLP(nn.Module):
    """M perceptrons side by side; LayerNorm before each activation where asked for."""

    def __init__(
        self,
        members: int,
        inputs: int,
        outputs: int,
        *,
        width: int,
        layers: int,
        activation: str = "relu",
        layer_norm: bool = False,
    ):
        super().__init__()
        sizes = [inputs] + [width] * layers
        self.hidden = nn.ModuleList(EnsembleLinear(members, a, b) for a, b in itertools.pairwise(sizes))
        self.out = EnsembleLinear(members, sizes[-1], outputs)
        self.norm_scale = nn.ParameterList()
        self.norm_shift = nn.ParameterList()
        if layer_norm:
            self.norm_scale.extend(nn.Parameter(torch.ones(members, 1, width)) for _ in range(layers))
            self.norm_shift.extend(nn.Parameter(torch.zeros(members, 1, width)) for _ in range(layers))
        self._activation = {"relu": F.relu, "silu": F.silu}[activation]

    def forward(self, x_MBI: Tensor, outputs: int | None = None) -> Tensor:
        """(M, B, in) to (M, B, out), or to the first `outputs` of them; float32 also where hidden layers are not."""
        for i, layer in enumerate(self.hidden):
            x_MBI = layer(x_MBI)
            if len(self.norm_scale):
                x_MBI = _normed(x_MBI, self.norm_scale[i], self.norm_shift[i])
            x_MBI = self._activation(x_MBI)
        with torch.autocast(x_MBI.device.type, enabled=False):
            return torch.baddbmm(self.out.bias[..., :outputs], x_MBI.float(), self.out.weight[..., :outputs])


def matrix_products(device: str, precision: str) -> torch.autocast:
    """Matrix products of hidden layers take factors of this precision inside the block; weights stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def _normed(x_MBI: Tensor, scale_M1I: Tensor, shift_M1I: Tensor) -> Tensor:
    """LayerNorm with scale and shift of each member's own: fused a member, which is faster than scaling all after."""
    x_MBI = x_MBI.float()  # of bfloat16, its gradient is slow
    members = zip(x_MBI.unbind(), scale_M1I.unbind(), shift_M1I.unbind(), strict=True)
    normed = [F.layer_norm(x, x.shape[-1:], scale[0], shift[0]) for x, scale, shift in members]
    return torch.stack(normed) if len(normed) > 1 else normed[0][None]


def block_generator(seed: int, stream: int, block: int) -> torch.Generator:
    """Return a CPU generator that depends on identity alone, never on process state."""
    # Hashed to 32 bits: torch's CPU generator looks at no more of its seed.
    state = np.random.SeedSequence([seed, stream, block]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
