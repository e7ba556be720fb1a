"""The ensemble. Shapes: M members (or E elites), B rows, O observation, A action, D = O + 1 (with the reward)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipd_ray.config import WorldModelConfig
from ipd_ray.errors import UserError
from ipd_ray.layers import EnsembleMLP
from ipd_ray.world_model.termination import UNBOUNDED, TerminationRule

_RARE = 0.01
"""Share of endings within the bounds, up to which bounds alone decide."""


class Ensemble(nn.Module):
    """M networks of (s, a) -> Gaussian of (s' - s, r) in normalised units, and one of (s, s') -> termination logit.

    Log-variances are softly bounded by two learned vectors a member (Chua et al. 2018, arXiv:1805.12114). Termination
    looks at s', not at a: an environment ends an episode for where it has got to, and that boundary is the simpler
    function. Beside its network stand bounds of single observations, see `ending_bounds`.
    """

    ends_below: Tensor
    ends_above: Tensor
    ends_within: Tensor
    """Share of endings that no bound explains."""
    observation_mean: Tensor
    observation_std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(self, members: int, observation_dim: int, action_dim: int, config: WorldModelConfig):
        super().__init__()
        self.members, self.observation_dim = members, observation_dim
        targets = observation_dim + 1
        self.net = EnsembleMLP(
            members,
            observation_dim + action_dim,
            2 * targets,
            width=config.width,
            layers=config.layers,
            activation="silu",
        )
        self.termination_net = EnsembleMLP(1, 2 * observation_dim, 1, width=128, layers=2, activation="silu")
        self.max_log_variance = nn.Parameter(torch.full((members, 1, targets), 0.5))
        self.min_log_variance = nn.Parameter(torch.full((members, 1, targets), -10.0))
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("ends_below", torch.full((observation_dim,), -UNBOUNDED))
        self.register_buffer("ends_above", torch.full((observation_dim,), UNBOUNDED))
        self.register_buffer("ends_within", torch.ones(()))
        self.register_buffer("target_mean", torch.zeros(targets))
        self.register_buffer("target_std", torch.ones(targets))

    @property
    def of_members(self) -> dict[str, Tensor]:
        """The state that members have of their own, (M, ...) each, by name; termination is one network's."""
        own = ("net.", "max_log_variance", "min_log_variance")
        return {name: value for name, value in self.state_dict().items() if name.startswith(own)}

    def normalise(self, observation: Tensor) -> Tensor:
        """Return observations in units of the log's spread."""
        return (observation - self.observation_mean) / self.observation_std

    def means(self, inputs_MBI: Tensor) -> Tensor:
        """Mean (M, B, D) in normalised units, of normalised inputs: `heads` without the variance."""
        mean: Tensor = self.net(inputs_MBI, outputs=self.observation_dim + 1)
        return mean

    def heads(self, inputs_MBI: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (M, B, D) in normalised units, of normalised inputs."""
        mean, raw = self.net(inputs_MBI).chunk(2, -1)
        log_variance = self.max_log_variance - F.softplus(self.max_log_variance - raw)
        log_variance = self.min_log_variance + F.softplus(log_variance - self.min_log_variance)
        return mean, log_variance

    def termination_logit(self, normalised_BO: Tensor, next_normalised_BO: Tensor) -> Tensor:
        """Logit (B,) of the probability that the step to the next observation ended the episode."""
        return self.termination_net(torch.cat([normalised_BO, next_normalised_BO], -1)[None])[0, :, 0]


class WorldModel(nn.Module):
    """What step 2 leaves behind: the elites, a termination rule, and transitions in raw observations."""

    _varying: Tensor

    def __init__(self, ensemble: Ensemble, rule: TerminationRule | None):
        super().__init__()
        self.ensemble = ensemble
        self._rule = rule
        self._bounds_decide = bool(ensemble.ends_within <= _RARE)
        varies = ensemble.target_std > 0
        self._all_vary = bool(varies.all())
        self.register_buffer("_varying", torch.nonzero(varies)[:, 0], persistent=False)

    @property
    def elites(self) -> int:
        return self.ensemble.members

    def step(self, observation_EBO: Tensor, action_EBA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One mean transition, elite e for row group e.

        Returns next observation (E, B, O), transformed reward (E, B), termination probability (E, B).
        """
        mean = self.ensemble.means(self._inputs(observation_EBO, action_EBA))
        following, reward = self._decode(observation_EBO, mean)
        rows = (-1, observation_EBO.shape[-1])
        ended = self.ended(observation_EBO.reshape(rows), following.reshape(rows)).reshape(reward.shape)
        return following, reward, ended

    def step_together(
        self, observation_BO: Tensor, action_BA: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """One transition by the mean of the elites.

        Returns next observation (B, O), reward (B,), termination probability (B,), and the elites' normalised means
        and log-variances (E, B, D) of what varies in the log, for the uncertainty.
        """
        mean, log_variance = self.ensemble.heads(self._inputs(observation_BO, action_BA).expand(self.elites, -1, -1))
        following, reward = self._decode(observation_BO, mean)
        together = following.mean(0)
        if not self._all_vary:
            mean, log_variance = mean[..., self._varying], log_variance[..., self._varying]
        return together, reward.mean(0), self.ended(observation_BO, together), (mean, log_variance)

    def ended(self, observation_BO: Tensor, following_BO: Tensor) -> Tensor:
        """Probability (B,) that the step to `following` ended the episode; 0 or 1 by a known rule.

        1 beyond a learned bound. Within, the network's; where bounds explain the endings it is 0, and of the network
        only the gradient is left, which leads away from the edge.
        """
        if self._rule is not None:
            ended = self._rule(following_BO)
            if ended.shape != following_BO.shape[:1]:
                raise UserError(
                    f"world_model.termination: the function returned shape {tuple(ended.shape)} for observations of "
                    f"shape {tuple(following_BO.shape)}: return one boolean a row, ({len(following_BO)},)."
                )
            return ended.to(observation_BO.dtype)
        e = self.ensemble
        beyond = ((following_BO < e.ends_below) | (following_BO > e.ends_above)).any(-1).to(observation_BO.dtype)
        if self._bounds_decide and not torch.is_grad_enabled():
            return beyond
        probability = torch.sigmoid(e.termination_logit(e.normalise(observation_BO), e.normalise(following_BO)))
        if self._bounds_decide:
            return beyond + (probability - probability.detach())
        return torch.maximum(beyond, probability)

    def _inputs(self, observation: Tensor, action: Tensor) -> Tensor:
        return torch.cat([self.ensemble.normalise(observation), action], -1)

    def _decode(self, observation: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        change = mean * self.ensemble.target_std + self.ensemble.target_mean
        return observation + change[..., :-1], change[..., -1]
