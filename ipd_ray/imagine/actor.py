"""Step 3: an actor that learns the planner's score by heart. Shapes: E elites, N rows, O observation, A action.

A gradient plan is found anew for each state and jumps where the gradient changes its sign; a network that imitates such
plans is left with what is jagged in them. The actor is a network that climbs the same score for all states at once, so
that what it does can be learned from its steps. V goes along: it learns what the actor's roll-outs come to inside the
world model, ends that the log never saw among them (docs/notes.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ipd_ray.artifacts import Workspace, load_optimizer, optimizer_tensors, prefixed, stripped
from ipd_ray.config import ActorConfig, PlannerConfig
from ipd_ray.data.transitions import Log
from ipd_ray.imagine.accept import widened
from ipd_ray.imagine.planner import ImaginationDynamics, plan_score
from ipd_ray.layers import EnsembleMLP, block_generator
from ipd_ray.training import exhaust, train
from ipd_ray.values.fit import evaluate_in_chunks, frozen
from ipd_ray.values.networks import ValueFunctions
from ipd_ray.world_model.uncertainty import Trust, ensemble_uncertainty

VERSION = 4
"""Of an actor of one reach."""
TAKEN_VERSION = 8
"""Of the one that is taken."""
_STREAM = 33
_BATCH = 512
"""Imagined states an update of V."""
_LOG_BATCH, _LOG_WEIGHT = 256, 0.5
"""States of the log an update of V, near which it is held in the first round, and their weight."""
_VALUE_RATE = 1e-3
"""Adam's step size for V; falls to a twentieth in each round."""
_FRONTIER = 0.3
"""Share of the log, of the highest V, in which many roll-outs start."""
_WORST = 0.001
"""Quantile of the log's V that a state beyond what is known is worth at most."""
_SHARE = 0.85
"""Of a gain over the behaviour policy inside the world model: a larger reach that gains less is not supported."""


class Actor(nn.Module):
    """a = pi(s) + reach * tanh(x(s)): the behaviour policy, and a change of it that is bounded in each dimension, in
    units of `Log.action_unit`."""

    observation_mean: Tensor
    observation_std: Tensor
    action_unit: Tensor

    def __init__(self, observation_dim: int, action_dim: int, *, width: int, layers: int, reach: float):
        super().__init__()
        self.behaviour_net = EnsembleMLP(1, observation_dim, action_dim, width=width, layers=layers)
        self.change_net = EnsembleMLP(1, observation_dim, action_dim, width=width, layers=layers)
        for parameter in self.change_net.out.parameters():
            nn.init.zeros_(parameter)  # at first it is the behaviour policy
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("action_unit", torch.ones(action_dim))
        self._reach = reach
        self.sizes: dict[str, Any] = {
            "observation_dim": observation_dim, "action_dim": action_dim, "width": width, "layers": layers,
            "reach": reach,
        }

    def act(self, observation: Tensor) -> Tensor:
        """Return actions (..., A) in [-1, 1] for raw observations (..., O)."""
        flat = self.normalise(observation).reshape(1, -1, observation.shape[-1])
        change = self._reach * self.action_unit * torch.tanh(self.change_net(flat))
        action = torch.tanh(self.behaviour_net(flat)) + change
        return action.clamp(-1.0, 1.0).reshape(*observation.shape[:-1], -1)

    def normalise(self, observation: Tensor) -> Tensor:
        """Return observations in units of the log's spread."""
        return (observation - self.observation_mean) / self.observation_std


@dataclass(frozen=True)
class Walk:
    """N roll-outs of K steps."""

    observations: list[Tensor]
    """K + 1 of (N, O); a row that has stopped stays where it is."""
    actions: list[Tensor]
    """K of (N, A), noise included."""
    uncertainty: list[Tensor]
    """U: K of (N,), as are the next four."""
    rewards: list[Tensor]
    ended: list[Tensor]
    left: list[Tensor]
    """Stopped at this step, beyond what is known."""
    lives: list[Tensor]
    """Had not stopped before."""
    alive: Tensor
    """(N,) not stopped at all."""

    @property
    def states(self) -> Tensor:
        """All states in which something was done, (steps, O)."""
        return torch.stack(self.observations[:-1])[torch.stack(self.lives)]


class Rollouts:
    """Roll-outs of an actor inside the world model, as far as it knows.

    Each stays inside one elite, and stops where its observation leaves the trusted range or its U is not trusted.
    """

    def __init__(
        self,
        log: Log,
        values: ValueFunctions,
        dynamics: ImaginationDynamics,
        config: ActorConfig,
        trust: Trust,
        *,
        seed: int,
        device: str,
    ):
        """values: step 1's result."""
        self.log, self.values, self.dynamics, self.config = log, values, dynamics, config
        self.seed, self.device = seed, device
        self._trust = trust
        t = log.transitions
        self._noise_std = config.noise_std * torch.from_numpy(log.action_unit).to(device)
        self.observation = torch.from_numpy(t.observation).to(device)
        """(T, O) of the log."""
        self.v = evaluate_in_chunks(values.v, t.observation, device=device)
        """(T,) by step 1."""
        self._frontier = np.argsort(-self.v, kind="stable")[: max(1, int(_FRONTIER * len(t)))]
        known = widened(*log.step_ranges[:2], trust.range_margin)
        self._low, self._high = (torch.from_numpy(x).to(device) for x in known)

    def rows(self, starts: int) -> int:
        """Return `starts`, rounded up to a multiple of the elites."""
        return -(-starts // self.dynamics.elites) * self.dynamics.elites

    def starts(self, rng: np.random.Generator, *, first: int, frontier: int, anywhere: int = 0) -> Tensor:
        """States (N, O) of the log: first ones, ones of high V, and any."""
        drawn = [rng.choice(self.log.transitions.episode_start[:-1], first), rng.choice(self._frontier, frontier),
                 rng.choice(len(self.v), anywhere)]  # fmt: skip
        return self.observation[np.concatenate(drawn)]

    def rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, _STREAM, step]))

    @torch.no_grad()
    def walk(
        self, act: Callable[[Tensor, Tensor | None], Tensor], s: Tensor, length: int, generator: torch.Generator
    ) -> Walk:
        """Roll out from states (N, O), N a multiple of the elites, every second row with noise on its actions.

        act: of states (N, O) and the rewards (N,) of the step before, None at the first.
        """
        E, rows = self.dynamics.elites, len(s)
        noise_std = self._noise_std * (torch.arange(rows, device=self.device) % 2)[:, None]
        alive = torch.ones(rows, dtype=torch.bool, device=self.device)
        observations, actions, uncertainty = [s], [], []
        rewards: list[Tensor] = []
        ended, left, lives = [], [], []
        for _ in range(length):
            action = act(s, rewards[-1] if rewards else None)
            noise = torch.randn(action.shape, generator=generator).to(self.device)
            action = (action + noise_std * noise).clamp(-1.0, 1.0)
            gaussians = self.dynamics.step_together(s, action)[3]
            u = ensemble_uncertainty(*gaussians, self._trust.uncertainty)
            unknown = u > self._trust.threshold
            following, reward, end = self.dynamics.step(s.reshape(E, rows // E, -1), action.reshape(E, rows // E, -1))
            following = following.reshape(rows, -1)
            ends = alive & (end.reshape(rows) > 0.5)
            leaves = alive & ~ends & (unknown | ((following < self._low) | (following > self._high)).any(1))
            actions.append(action)
            uncertainty.append(u)
            rewards.append(reward.reshape(rows))
            ended.append(ends)
            left.append(leaves)
            lives.append(alive)
            alive = alive & ~ends & ~leaves
            s = torch.where(alive[:, None], following, s)
            observations.append(s)
        return Walk(observations, actions, uncertainty, rewards, ended, left, lives, alive)


class ActorTrainer:
    """One update is a round: roll the actor out, teach V what came of it, let the actor climb the score with that V.

    The score is the planner's: sum_h gamma^h c_h r_h + gamma^H c_H V(s_H), each state inside one elite, gamma
    `config.discount`, or the log's where that is larger; its gradient goes through world model and V into the actor
    (SVG, arXiv:1510.09142; Dreamer, arXiv:1912.01603). V is regressed on the lambda-returns of roll-outs; what lies
    beyond what is known is worth no more than the worst states of the log. A share of the roll-outs goes on where
    others of the round before ended: the actor is to be good where it gets to.

    From round to round the actor swings, as each finds another flaw of the model. So each round's, an average over its
    updates, plays whole episodes inside the world model, and the best of the second half is kept, when V has had the
    time to learn of the ends that the actor finds; the behaviour policy where none is better.
    """

    def __init__(self, rollouts: Rollouts, planner: PlannerConfig, judge: Callable[[Actor], float], reach: float):
        """judge: an actor's return inside the world model. reach: of the actor."""
        self._rollouts, self._planner, self._judge = rollouts, planner, judge
        self._config, self._dynamics, self._device = rollouts.config, rollouts.dynamics, rollouts.device
        config, log, values = rollouts.config, rollouts.log, rollouts.values
        self._discount = max(config.discount, log.discount)
        torch.manual_seed(rollouts.seed + 3)
        self.actor = behaviour_policy(rollouts, reach)
        self.best = copy.deepcopy(self.actor)
        """The actor that is kept."""
        self.behaviour_return = self.best_return = judge(self.best)
        self.best_round = 0
        """0: the behaviour policy."""
        self.actor.change_net.requires_grad_(True)
        self._average = copy.deepcopy(self.actor).requires_grad_(False)
        self._critic = copy.deepcopy(values).to(self._device).requires_grad_(False)
        self._changed = list(self.actor.change_net.parameters())
        self._actor_optimizer = torch.optim.Adam(self._changed, lr=config.learning_rate, fused=True)
        self._critic_optimizer = torch.optim.Adam(self._critic.v_net.parameters(), lr=_VALUE_RATE, fused=True)
        # V of the log is of its own discount: as if each state's mean reward went on, which the first rounds mend.
        longer = (1.0 - log.discount) / (1.0 - self._discount)
        for moment in (self._critic.return_mean, self._critic.return_std):
            moment.mul_(longer)
        v = longer * rollouts.v
        self._worst, self._scale = float(np.quantile(v, _WORST)), max(float(v.std()), 1e-6)
        self._v = torch.from_numpy(v).to(self._device)
        self._ends = rollouts.observation[:0]

    def update(self, step: int) -> dict[str, Tensor]:
        observation, outcome, told = self._roll_out(step)
        generator = block_generator(self._rollouts.seed, _STREAM, 2 * step)
        told["v_loss"] = self._teach_values(observation, outcome, generator, anchored=step == 0)
        scores = [self._climb(observation, generator) for _ in range(self._config.updates)]
        told["score"] = torch.stack(scores).mean()
        imagined = self._judge(self._average)
        if imagined > self.best_return and 2 * step >= self._config.rounds - 1:
            self.best.load_state_dict(self._average.state_dict())
            self.best_return, self.best_round = imagined, step + 1
        return {**told, "imagined_return": torch.tensor(imagined, device=self._device)}

    @torch.no_grad()
    def _roll_out(self, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the states on the way (N, O), their lambda-returns (N,), and what to tell of them."""
        config, discount = self._config, self._discount
        generator = block_generator(self._rollouts.seed, _STREAM, 2 * step + 1)
        walk = self._rollouts.walk(lambda s, _: self._average.act(s), self._starts(step), config.length, generator)
        self._ends = walk.observations[-1][walk.alive]
        value = [self._critic.v(o) for o in walk.observations]
        outcome, outcomes = value[-1], []
        for k in reversed(range(config.length)):
            after = (1.0 - config.trace) * value[k + 1] + config.trace * outcome
            after = torch.where(walk.left[k], value[k].clamp(max=self._worst), torch.where(walk.ended[k], 0.0, after))
            outcome = torch.where(walk.lives[k], walk.rewards[k] + discount * after, value[k])
            outcomes.append(outcome)
        told = {name: torch.stack(x).any(0).float().mean() for name, x in (("ended", walk.ended), ("left", walk.left))}
        return walk.states, torch.stack(outcomes[::-1])[torch.stack(walk.lives)], {"outcome": outcome.mean(), **told}

    def _starts(self, step: int) -> Tensor:
        """(N, O) states: where the round before ended, and first ones, ones of high V, and any of the log, one to two
        to two."""
        rng, rows = self._rollouts.rng(step), self._rollouts.rows(self._config.starts)
        carried = min(len(self._ends), int(self._config.carried * rows))
        fresh = rows - carried
        first, frontier = fresh // 5, 2 * fresh // 5
        s = self._rollouts.starts(rng, first=first, frontier=frontier, anywhere=fresh - first - frontier)
        return torch.cat([s, self._ends[rng.permutation(len(self._ends))[:carried]]])[rng.permutation(rows)]

    def _teach_values(
        self, observation: Tensor, outcome: Tensor, generator: torch.Generator, *, anchored: bool
    ) -> Tensor:
        """Regress V on what came of the roll-outs; return the mean loss in units of the spread of V."""
        updates, losses = self._config.value_updates, []
        self._critic.v_net.requires_grad_(True)
        for i in range(updates):
            loss = self._value_loss(observation, outcome, _BATCH, generator)
            losses.append(loss.detach())
            if anchored:
                of_log = self._value_loss(self._rollouts.observation, self._v, _LOG_BATCH, generator)
                loss = loss + _LOG_WEIGHT * of_log
            for group in self._critic_optimizer.param_groups:
                group["lr"] = _VALUE_RATE * (1.0 - 0.95 * i / updates)
            self._critic_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._critic_optimizer.step()
        self._critic.v_net.requires_grad_(False)
        return torch.stack(losses).mean()

    def _value_loss(self, observation: Tensor, target: Tensor, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(target), (count,), generator=generator).to(self._device)
        return ((self._critic.v(observation[rows]) - target[rows]) / self._scale).square().mean()

    def _climb(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """One update of the actor; return the mean score of its states."""
        discount, horizon, E = self._discount, self._planner.horizon, self._dynamics.elites
        size = max(1, self._config.batch_size // E)
        state = observation[torch.randint(len(observation), (E, size), generator=generator).to(self._device)]
        mean = plan_score(
            state, lambda _, s: self.actor.act(s), self._dynamics, self._critic.v, horizon=horizon, discount=discount
        ).mean()
        self._actor_optimizer.zero_grad(set_to_none=True)
        (-mean / self._scale).backward()
        torch.nn.utils.clip_grad_norm_(self._changed, 1.0)
        self._actor_optimizer.step()
        averaged: list[Tensor] = list(self._average.change_net.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in self._changed], 1.0 - self._config.ema)
        return mean.detach()

    def state(self) -> dict[str, Tensor]:
        return {
            **prefixed("actor", self.actor.change_net.state_dict()),
            **prefixed("average", self._average.change_net.state_dict()),
            **prefixed("critic", self._critic.v_net.state_dict()),
            **prefixed("adam.actor", optimizer_tensors(self._actor_optimizer)),
            **prefixed("adam.critic", optimizer_tensors(self._critic_optimizer)),
            **prefixed("best", self.best.change_net.state_dict()),
            "best_return": torch.tensor(self.best_return, dtype=torch.float64),
            "best_round": torch.tensor(self.best_round),
            "ends": self._ends,
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.actor.change_net.load_state_dict(stripped("actor", tensors))
        self._average.change_net.load_state_dict(stripped("average", tensors))
        self._critic.v_net.load_state_dict(stripped("critic", tensors))
        load_optimizer(self._actor_optimizer, stripped("adam.actor", tensors))
        load_optimizer(self._critic_optimizer, stripped("adam.critic", tensors))
        self.best.change_net.load_state_dict(stripped("best", tensors))
        self.best_return, self.best_round = float(tensors["best_return"]), int(tensors["best_round"])
        self._ends = tensors["ends"].to(self._device)


def behaviour_policy(rollouts: Rollouts, reach: float) -> Actor:
    """Return an actor that is the behaviour policy."""
    t, values = rollouts.log.transitions, rollouts.values
    net = values.behaviour_net
    width, layers = net.out.weight.shape[1], len(net.hidden)
    actor = Actor(t.observation_dim, t.spec.action_dim, width=width, layers=layers, reach=reach)
    actor.behaviour_net.load_state_dict(net.state_dict())
    for name in ("observation_mean", "observation_std"):
        getattr(actor, name).copy_(getattr(values, name))
    actor.action_unit.copy_(torch.from_numpy(rollouts.log.action_unit))
    return frozen(actor, rollouts.device)


def learn_actor(trainer: ActorTrainer, rounds: int, workspace: Workspace) -> Actor:
    """Train to the end, or go on from the workspace's checkpoint; return the actor that is kept."""
    exhaust(train(trainer, rounds, workspace, log_every=1))
    return trainer.best


def load_actor(tensors: Mapping[str, Tensor], described: Mapping[str, Any], device: str) -> Actor:
    """Rebuild what step 3 left behind, frozen."""
    actor = Actor(**described["actor"])
    actor.load_state_dict(dict(tensors))
    return frozen(actor, device)


def best_reach(found: Sequence[Mapping[str, Any]]) -> int:
    """Index of the reach to take: the largest, or where one gains less by far inside the world model than a smaller
    one, the best of those below it.

    What has more room to act can correct more where the world is not as the model says, and holds what has less: that
    it gains less tells that the log does not support it, and what still larger ones seem to gain is the model's error.
    A reach that lies between goes to the edge of what is supported, and nothing inside the model tells that from
    safety (docs/notes.md). found: diagnostics of the reaches.
    """
    gain = [d["return_mean"] - d["behaviour_return"] for d in found]
    rising = sorted(range(len(found)), key=lambda i: found[i]["reach"])
    best = rising[0]
    for i in rising[1:]:
        if gain[i] < _SHARE * gain[best]:
            return best
        best = max(best, i, key=gain.__getitem__)
    return rising[-1]
