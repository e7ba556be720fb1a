"""Step 3: V learned on inside the world model. Shapes: S roll-outs, E elites, K steps, N rows, O observation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipd_ray.artifacts import Workspace, load_optimizer, optimizer_tensors, prefixed, stripped
from ipd_ray.config import PlannerConfig, RefineConfig
from ipd_ray.data.transitions import Floats, Ints, Log
from ipd_ray.imagine.planner import Dynamics, plan
from ipd_ray.layers import block_generator
from ipd_ray.training import exhaust, train
from ipd_ray.values.fit import diagnose, evaluate_in_chunks, frozen
from ipd_ray.values.networks import ValueFunctions

VERSION = 1
_STREAM = 33
_BATCH, _LOG_BATCH = 512, 256
"""Imagined states an update, and states of the log, where V is held near what the log taught."""
_LOG_WEIGHT = 0.5
_FRONTIER = 0.3
"""Half of the roll-outs start in this share of the log, of the highest V; the others anywhere in it."""
_RANGE = 0.05
"""Share of the log's range by which an imagined observation may leave it."""
_CHECKED = 200
"""Held-out states that the result is checked from."""


class RefineTrainer:
    """One update of V on states that the planner reaches inside the world model; a round of them begins with roll-outs.

    V of the log says nothing where the log has never been, and planners go there: on Hopper it promises the best
    returns a step before a fall. The world model knows such ends. So each round rolls the planner of the round before
    out (the first: the behaviour policy), each state in one elite, every second one with noise on its actions, and
    regresses V on the lambda-returns of what happened (Dyna, Sutton 1990; model-based value expansion,
    arXiv:1803.00101). Q and the behaviour policy stay as they are.
    """

    def __init__(
        self,
        log: Log,
        values: ValueFunctions,
        dynamics: Dynamics,
        planner: PlannerConfig,
        config: RefineConfig,
        *,
        seed: int,
        device: str,
    ):
        """values: step 1's result, which is not changed."""
        self.model = copy.deepcopy(values).to(device)
        self.model.v_net.requires_grad_(True)
        self._values, self._dynamics, self._planner, self._config = values, dynamics, planner, config
        self._log, self._seed, self._device = log, seed, device
        t = log.transitions
        self._v = evaluate_in_chunks(values.v, t.observation, device=device)
        self._anchor = torch.from_numpy(t.observation[log.train_steps]).to(device)
        self._anchor_v = torch.from_numpy(self._v[log.train_steps]).to(device)
        low = np.minimum(t.observation.min(0), t.next_observation.min(0))
        high = np.maximum(t.observation.max(0), t.next_observation.max(0))
        slack = _RANGE * (high - low)
        self._low, self._high = (torch.from_numpy(x).to(device) for x in (low - slack, high + slack))
        self._parameters = list(self.model.v_net.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.learning_rate, fused=True)
        self._observation, self._target = self._anchor[:0], self._anchor_v[:0]

    def update(self, step: int) -> dict[str, Tensor]:
        turn, done = divmod(step, self._config.updates)
        if done == 0:
            self._observation, self._target = self._rolled_out(turn, self._starts(self._log.train_steps, turn))
            self._optimizer = torch.optim.Adam(self._parameters, lr=self._config.learning_rate, fused=True)
        generator = block_generator(self._seed, _STREAM + 1, step)
        rows, anchors = (
            torch.randint(len(table), (count,), generator=generator).to(self._device)
            for table, count in ((self._target, _BATCH), (self._anchor_v, _LOG_BATCH))
        )
        scale = self.model.return_std
        v_loss = ((self.model.v(self._observation[rows]) - self._target[rows]) / scale).square().mean()
        log_loss = ((self.model.v(self._anchor[anchors]) - self._anchor_v[anchors]) / scale).square().mean()
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * (1.0 - 0.95 * done / self._config.updates)
        self._optimizer.zero_grad(set_to_none=True)
        (v_loss + _LOG_WEIGHT * log_loss).backward()
        self._optimizer.step()
        return {"v_loss": v_loss, "log_loss": log_loss, "target_mean": self._target.mean()}

    def state(self) -> dict[str, Tensor]:
        return {
            **prefixed("model", self.model.v_net.state_dict()),
            **optimizer_tensors(self._optimizer),
            "table.observation": self._observation,
            "table.target": self._target,
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.model.v_net.load_state_dict(stripped("model", tensors))
        load_optimizer(self._optimizer, tensors)
        self._observation = tensors["table.observation"].to(self._device)
        self._target = tensors["table.target"].to(self._device)

    def _starts(self, steps: Ints, turn: int, count: int | None = None) -> Floats:
        """(S, O) states of these steps of the log; S is a multiple of the elites."""
        elites = self._dynamics.elites
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, 33, turn]))
        wanted = -(-(count or self._config.starts) // elites) * elites
        best = steps[np.argsort(-self._v[steps], kind="stable")[: max(1, int(_FRONTIER * len(steps)))]]
        half = wanted // 2
        chosen = np.concatenate([rng.choice(best, half), rng.choice(steps, wanted - half)])
        return self._log.transitions.observation[rng.permutation(chosen)]

    @torch.no_grad()
    def _rolled_out(self, turn: int, start_SO: Floats, trace: float | None = None) -> tuple[Tensor, Tensor]:
        """Roll round `turn`'s planner out; return the states on the way (N, O) and their lambda-returns (N,).

        Nothing follows an end; where a state leaves the log's range, V before that step stands in for it.
        """
        config, discount, E = self._config, self._log.discount, self._dynamics.elites
        lam = config.trace if trace is None else trace
        s = torch.from_numpy(start_SO).to(self._device)
        noise_std = config.noise_std * (torch.arange(len(s), device=self._device) % 2)[:, None]
        alive = torch.ones(len(s), dtype=torch.bool, device=self._device)
        observations, rewards, ended, left, lives = [s], [], [], [], []
        for k in range(config.length):
            generator = block_generator(self._seed, _STREAM, turn * 100_000 + k)
            if turn == 0:
                action = self.model.act(s)
            else:
                action = plan(
                    s, self._dynamics, self.model, self._planner, discount=discount, generator=generator
                ).action
            noise = torch.randn(action.shape, generator=generator).to(self._device)
            action = (action + noise_std * noise).clamp(-1.0, 1.0)
            grouped = (x.reshape(E, len(s) // E, -1) for x in (s, action))
            following, reward, end = (x.reshape(len(s), -1) for x in self._dynamics.step(*grouped))
            ends = alive & (end[:, 0] > 0.5)
            leaves = alive & ~ends & ((following < self._low) | (following > self._high)).any(1)
            rewards.append(reward[:, 0])
            ended.append(ends)
            left.append(leaves)
            lives.append(alive)
            alive = alive & ~ends & ~leaves
            s = torch.where(alive[:, None], following, s)
            observations.append(s)
        value = [self.model.v(o) for o in observations]
        outcome, outcomes = value[-1], []
        for k in reversed(range(config.length)):
            after = (1.0 - lam) * value[k + 1] + lam * outcome
            after = torch.where(ended[k], 0.0, after)
            outcome = torch.where(left[k] | ~lives[k], value[k], rewards[k] + discount * after)
            outcomes.append(outcome)
        usable = torch.stack([live & ~leaves for live, leaves in zip(lives, left, strict=True)])
        return torch.stack(observations[:-1])[usable], torch.stack(outcomes[::-1])[usable]

    def diagnose(self) -> dict[str, Any]:
        """Step 1's diagnostics of the refined V, and its error against returns of the planner that it belongs to.

        These returns are imagined from held-out episodes and summed to the end of the roll-out; `rmse` is in units of
        their spread, `rmse_log` is the error of step 1's V on the same states.
        """
        steps = self._log.holdout_steps if len(self._log.holdout_steps) else self._log.train_steps
        turn = self._config.rounds
        observation, outcome = self._rolled_out(turn, self._starts(steps, turn, _CHECKED), trace=1.0)
        spread = float(outcome.std()) or 1.0
        with torch.no_grad():
            errors = {
                "rmse": self.model.v(observation) - outcome,
                "rmse_log": self._values.v(observation) - outcome,
            }
        return {
            **diagnose(self.model, self._log, self._device),
            **{name: float(error.square().mean().sqrt()) / spread for name, error in errors.items()},
            "outcome_mean": float(outcome.mean()),
        }


def fit_refined(
    log: Log,
    values: ValueFunctions,
    dynamics: Dynamics,
    planner: PlannerConfig,
    config: RefineConfig,
    described: Mapping[str, Any],
    *,
    seed: int,
    device: str,
    workspace: Workspace,
) -> None:
    """Step 3: train to the end, check, leave an artifact of step 1's kind. described: what step 1's artifact says."""
    trainer = RefineTrainer(log, values, dynamics, planner, config, seed=seed, device=device)
    exhaust(train(trainer, config.rounds * config.updates, workspace, log_every=max(1, config.updates // 10)))
    model = frozen(trainer.model, device)
    kept = {k: described[k] for k in ("values", "observation_dim", "action_dim")}
    workspace.finish(model.state_dict(), trainer.diagnose(), **kept)
