"""V, twin Q, return expectiles and the behaviour policy, in the log's transformed reward units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ipd_ray.config import ValuesConfig
from ipd_ray.layers import EnsembleMLP


class ValueFunctions(nn.Module):
    """All that step 1 learns. Takes raw observations (..., O) and actions (..., A) in [-1, 1].

    The networks predict in units of the log's discounted returns (mean and std are buffers), so that one learning rate
    serves rewards of any size; what the methods return is in transformed reward units.
    """

    observation_mean: Tensor
    observation_std: Tensor
    return_mean: Tensor
    return_std: Tensor

    def __init__(self, observation_dim: int, action_dim: int, config: ValuesConfig):
        super().__init__()
        width, layers, norm = config.width, config.layers, config.layer_norm
        both = observation_dim + action_dim
        self.q_net = EnsembleMLP(2, both, 1, width=width, layers=layers, layer_norm=norm)
        self.v_net = EnsembleMLP(1, observation_dim, 1, width=width, layers=layers, layer_norm=norm)
        self.return_net = EnsembleMLP(1, observation_dim, 2, width=width, layers=layers, layer_norm=norm)
        self.behaviour_net = EnsembleMLP(1, observation_dim, action_dim, width=width, layers=layers)
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("return_mean", torch.zeros(()))
        self.register_buffer("return_std", torch.ones(()))

    def normalise(self, observation: Tensor) -> Tensor:
        """Return observations in units of the log's spread."""
        return (observation - self.observation_mean) / self.observation_std

    def v(self, observation: Tensor) -> Tensor:
        """V(s), shape (...,)."""
        return self.return_mean + self.return_std * _apply(self.v_net, self.normalise(observation))[0, ..., 0]

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q_1 and Q_2, shape (2, ...)."""
        inputs = torch.cat([self.normalise(observation), action], -1)
        return self.return_mean + self.return_std * _apply(self.q_net, inputs)[..., 0]

    def return_expectiles(self, observation: Tensor) -> Tensor:
        """The 0.5- and the prompt-expectile of the return-to-go of the log, shape (2, ...)."""
        out = _apply(self.return_net, self.normalise(observation))[0]
        return self.return_mean + self.return_std * out.movedim(-1, 0)

    def act(self, observation: Tensor) -> Tensor:
        """The behaviour policy's action, shape (..., A), inside (-1, 1)."""
        return torch.tanh(_apply(self.behaviour_net, self.normalise(observation))[0])


def _apply(net: EnsembleMLP, inputs: Tensor) -> Tensor:
    """Apply an ensemble to shared inputs (..., I): returns (M, ..., out)."""
    members = net.out.weight.shape[0]
    flat = inputs.reshape(1, -1, inputs.shape[-1]).expand(members, -1, -1)
    out = net(flat)
    return out.reshape(members, *inputs.shape[:-1], out.shape[-1])
