"""Step 7 where there is no environment: the policy's value on held-out episodes, by fitted-Q evaluation.

Le, Voloshin and Yue 2019 (arXiv:1903.08738): Q of the policy is regressed on r + gamma Q(s', pi(s')) over the log. What
the policy would do is asked once, along the log: its past is the log's own. A proxy: off the log's actions Q is a
guess, and a policy that remembers is not a function of s. Shapes: T steps, A action, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ipd_ray.artifacts import Workspace, load_optimizer, optimizer_tensors, prefixed, stripped
from ipd_ray.config import ValuesConfig
from ipd_ray.data.transitions import Floats, Log
from ipd_ray.evaluate.acting import Policy
from ipd_ray.layers import EnsembleMLP, block_generator
from ipd_ray.training import exhaust, train
from ipd_ray.values.fit import bootstrapped_returns
from ipd_ray.values.networks import ValueFunctions

VERSION = 2
_STREAM = 99
_POLYAK = 0.05
"""Step of the targets towards Q. A backup carries a reward one step back, so 1 / (1 - gamma) of them must fit into the
updates: ten times the values' step, which looks `n_step` ahead at once. With theirs, policies of -373 and -160 on
Pendulum came out as -334 and -332 after 1500 updates, with this one as -248 and -180."""


class FittedQ:
    """One update of two Q functions of one policy, each on targets of its own; in units of the log's returns."""

    def __init__(
        self, log: Log, following: Floats, values: ValueFunctions, config: ValuesConfig, *, seed: int, device: str
    ):
        """following: (T, A) the policy's action in every step's next observation. values: where Q begins."""
        t = log.transitions
        self._config, self._seed, self._device = config, seed, device
        mean, std = log.observation_moments
        self._shift, self._scale = log.return_moments
        inputs = t.observation_dim + t.spec.action_dim
        self.q_net, self._target_net = (
            EnsembleMLP(
                2, inputs, 1, width=config.width, layers=config.layers, layer_norm=config.layer_norm
            ).to(device)
            for _ in range(2)
        )
        for net in (self.q_net, self._target_net):
            net.load_state_dict(values.q_net.state_dict())
        columns = [
            (t.observation - mean) / std, t.action, (t.next_observation - mean) / std, following,
            log.reward[:, None], log.discount * (1.0 - t.terminal[:, None]),
        ]
        self._widths = [c.shape[1] for c in columns]
        table = np.concatenate(columns, 1).astype(np.float32)[log.train_steps]
        self._table = torch.from_numpy(table).to(device)
        # No policy's return lies outside of the best and the worst reward for ever.
        ends = np.array([log.reward.min(), log.reward.max()], np.float64) / (1.0 - log.discount)
        self._least, self._most = (float(x) for x in (min(ends[0], 0.0), max(ends[1], 0.0)))
        self._optimizer = torch.optim.Adam(self.q_net.parameters(), lr=config.learning_rate, fused=True)

    def update(self, step: int) -> dict[str, Tensor]:
        generator = block_generator(self._seed, _STREAM, step)
        rows = torch.randint(len(self._table), (self._config.batch_size,), generator=generator)
        s, a, s_next, a_next, reward, weight = self._table[rows.to(self._device)].split(self._widths, 1)
        with torch.no_grad():
            q_next = self._shift + self._scale * self._target_net(torch.cat([s_next, a_next], 1).expand(2, -1, -1))
            y = ((reward + weight * q_next).clamp(self._least, self._most) - self._shift) / self._scale
        q = self.q_net(torch.cat([s, a], 1).expand(2, -1, -1))
        loss = (q - y).square().mean((1, 2)).sum()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        online = [p.data for p in self.q_net.parameters()]
        torch._foreach_lerp_([p.data for p in self._target_net.parameters()], online, _POLYAK)
        return {"q_loss": loss, "q_mean": self._shift + self._scale * q.mean()}

    def state(self) -> dict[str, Tensor]:
        return {
            **prefixed("q", self.q_net.state_dict()), **prefixed("target", self._target_net.state_dict()),
            **optimizer_tensors(self._optimizer),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.q_net.load_state_dict(stripped("q", tensors))
        self._target_net.load_state_dict(stripped("target", tensors))
        load_optimizer(self._optimizer, tensors)

    @torch.no_grad()
    def value(self, log: Log, rows: np.ndarray, action: Floats) -> Floats:
        """(N,) Q of these actions (N, A) in the observations of these steps, mean of both, transformed reward units."""
        mean, std = log.observation_moments
        inputs = np.concatenate([(log.transitions.observation[rows] - mean) / std, action], 1).astype(np.float32)
        q = self._shift + self._scale * self.q_net(torch.from_numpy(inputs).to(self._device).expand(2, -1, -1))
        return np.asarray(q.mean(0)[:, 0].cpu().numpy())


def fit_q(
    log: Log,
    policy: Policy,
    values: ValueFunctions,
    config: ValuesConfig,
    *,
    updates: int,
    seed: int,
    device: str,
    workspace: Workspace,
) -> None:
    """Fit Q of the policy; leave its value at the held-out episodes' beginnings, discounted and in raw reward units.

    config: sizes and step sizes of Q, as the values had them. log_value is what the log's own episodes brought there;
    value_sem is None where one episode is held out.
    """
    t = log.transitions
    action, at_ends = policy.along(t)
    last = t.episode_start[1:] - 1
    following = np.concatenate([action[1:], action[:1]])
    following[last] = at_ends
    trainer = FittedQ(log, following, values, config, seed=seed, device=device)
    exhaust(train(trainer, updates, workspace, log_every=min(1000, max(1, updates // 20))))
    first = t.episode_start[:-1][log.holdout_episode]
    value = trainer.value(log, first, action[first]) / log.reward_scale
    held = trainer.value(log, log.holdout_steps, action[log.holdout_steps]) / log.reward_scale
    logged = bootstrapped_returns(log, values.v, device)[first] / log.reward_scale
    several = len(value) > 1
    workspace.finish(
        prefixed("q", trainer.q_net.state_dict()),
        {
            "value_mean": float(value.mean()), "value_sem": float(value.std() / len(value) ** 0.5) if several else None,
            "value_held_out": float(held.mean()), "log_value": float(logged.mean()), "episodes": len(first),
        },
    )
