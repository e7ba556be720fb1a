"""The ensemble. Shapes: M members (or E elites), B rows, O observation, A action, D = O + 1 (observation and reward)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipd_ray.config import WorldModelConfig
from ipd_ray.layers import EnsembleMLP
from ipd_ray.world_model.termination import TerminationRule


class Ensemble(nn.Module):
    """M networks of (s, a) -> Gaussian of (s' - s, r) in normalised units, and a termination logit.

    Log-variances are softly bounded by two learned vectors (Chua et al. 2018, arXiv:1805.12114).
    """

    observation_mean: Tensor
    observation_std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(self, members: int, observation_dim: int, action_dim: int, config: WorldModelConfig):
        super().__init__()
        self.members, self.observation_dim = members, observation_dim
        targets = observation_dim + 1
        self.net = EnsembleMLP(
            members, observation_dim + action_dim, 2 * targets + 1, width=config.width, layers=config.layers,
            activation="silu",
        )
        self.max_log_variance = nn.Parameter(torch.full((targets,), 0.5))
        self.min_log_variance = nn.Parameter(torch.full((targets,), -10.0))
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("target_mean", torch.zeros(targets))
        self.register_buffer("target_std", torch.ones(targets))

    def normalise(self, observation: Tensor) -> Tensor:
        """Return observations in units of the log's spread."""
        return (observation - self.observation_mean) / self.observation_std

    def heads(self, inputs_MBI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance (M, B, D) in normalised units, termination logit (M, B), of normalised inputs."""
        targets = self.observation_dim + 1
        mean, raw, logit = self.net(inputs_MBI).split([targets, targets, 1], -1)
        log_variance = self.max_log_variance - F.softplus(self.max_log_variance - raw)
        log_variance = self.min_log_variance + F.softplus(log_variance - self.min_log_variance)
        return mean, log_variance, logit[..., 0]


class WorldModel(nn.Module):
    """What step 2 leaves behind: the elites, a termination rule, and transitions in raw observations."""

    def __init__(self, ensemble: Ensemble, rule: TerminationRule | None):
        super().__init__()
        self.ensemble = ensemble
        self._rule = rule

    @property
    def elites(self) -> int:
        return self.ensemble.members

    def step(self, observation_EBO: Tensor, action_EBA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One mean transition, elite e for row group e.

        Returns next observation (E, B, O), transformed reward (E, B), termination probability (E, B).
        """
        mean, _, logit = self._heads(observation_EBO, action_EBA)
        return self._decode(observation_EBO, mean, logit)

    def step_together(
        self, observation_BO: Tensor, action_BA: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """One transition by the mean of the elites.

        Returns next observation (B, O), reward (B,), termination probability (B,), and the elites' normalised means
        and log-variances (E, B, D), for the uncertainty.
        """
        observation = observation_BO.expand(self.elites, -1, -1)
        mean, log_variance, logit = self._heads(observation, action_BA.expand(self.elites, -1, -1))
        following, reward, done = self._decode(observation, mean, logit)
        together = following.mean(0)
        done_B = done.mean(0) if self._rule is None else self._rule(together).to(reward.dtype)
        return together, reward.mean(0), done_B, (mean, log_variance)

    def _heads(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.ensemble.heads(torch.cat([self.ensemble.normalise(observation), action], -1))

    def _decode(self, observation: Tensor, mean: Tensor, logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        change = mean * self.ensemble.target_std + self.ensemble.target_mean
        following, reward = observation + change[..., :-1], change[..., -1]
        if self._rule is None:
            return following, reward, torch.sigmoid(logit)
        done = self._rule(following.reshape(-1, following.shape[-1])).reshape(following.shape[:-1])
        return following, reward, done.to(reward.dtype)
