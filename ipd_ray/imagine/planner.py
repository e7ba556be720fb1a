"""Step 4: MPC inside the world model. Shapes: B states, E elites, R candidates an elite, H horizon, O, A."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ipd_ray.config import PlannerConfig
from ipd_ray.layers import matrix_products


class Dynamics(Protocol):
    """What the planner needs of a world model."""

    @property
    def elites(self) -> int: ...

    def step(self, observation_EBO: Tensor, action_EBA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next observation, transformed reward and termination probability; elite e for row group e."""


class ImaginationDynamics(Dynamics, Protocol):
    """A world model that segments and whole episodes can be rolled out in."""

    def step_together(
        self, observation_BO: Tensor, action_BA: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Mean transition of the elites and their Gaussians."""


class Values(Protocol):
    """What the planner needs of the values."""

    def v(self, observation: Tensor) -> Tensor: ...

    def q(self, observation: Tensor, action: Tensor) -> Tensor: ...

    def act(self, observation: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """What was decided for B states."""

    action: Tensor
    """(B, A), to execute now."""
    best_score: Tensor
    """(B,) of the best candidate or the last iterate, in transformed reward units."""
    mean_score: Tensor
    """(B,) over the candidates or the iterates."""


ROWS = 1 << 17
"""Rows that are simulated at once: bounds memory. Constants, since results must not depend on the machine's."""
CACHED_ROWS = 1 << 12
"""The same on a CPU, where activations that fit the cache are worth twice the speed."""
GRADIENT_ROWS = 1 << 12
"""The same where a whole plan's gradient is kept."""
_CLIMB = 0.3
"""Root mean square of one step of the climb, before tanh: a plan comes near its reach in `iterations` steps."""


def candidates_per_elite(config: PlannerConfig, elites: int) -> int:
    """R: config.candidates shared among the elites, rounded up."""
    return -(-config.candidates // elites)


@torch.no_grad()
def plan(
    observation_BO: Tensor,
    dynamics: Dynamics,
    values: Values,
    config: PlannerConfig,
    *,
    discount: float,
    generator: torch.Generator,
    action_unit: Tensor | float = 1.0,
) -> Plan:
    """Decide the next action of each state.

    action_unit: (A,) what noise and reach are measured in; see `Log.action_unit`.
    gradient: see `_gradient`. mpc: candidates follow the behaviour policy plus Gaussian noise for H steps, each inside
    one elite (mean transitions), and are scored by `plan_score`. The action is the average of the candidates' first
    actions, weighted by softmax(standardised score / temperature) (MPPI). The first candidate of each elite carries no
    noise.
    precision=bfloat16: matrix products take bfloat16; states and scores stay float32.
    """
    assert config.kind != "actor", "an actor acts by itself"
    with matrix_products(observation_BO.device.type, config.precision):
        if config.kind == "gradient":
            chunk = max(1, GRADIENT_ROWS // dynamics.elites)
            reach = config.reach * action_unit
            plans = [_gradient(part, dynamics, values, config, discount, reach) for part in observation_BO.split(chunk)]
        else:
            noise_std = config.noise_std * action_unit
            plans = _sampled(observation_BO, dynamics, values, config, discount, generator, noise_std)
    return Plan(*(torch.cat(c) for c in zip(*((p.action, p.best_score, p.mean_score) for p in plans), strict=True)))


def plan_score(
    state: Tensor, act: Callable[[int, Tensor], Tensor], dynamics: Dynamics, v: Callable[[Tensor], Tensor], *,
    horizon: int, discount: float,
) -> Tensor:
    """What a plan is worth, by state (E, B): sum_h gamma^h c_h r_h + gamma^H c_H V(s_H), c_h the probability of not
    having ended before.

    state: (E, B, O), elite e for row group e. act: the step h and its states -> actions (E, B, A).
    """
    score = state.new_zeros(state.shape[:-1])
    alive = torch.ones_like(score)
    for h in range(horizon):
        state, reward, ended = dynamics.step(state, act(h, state))
        score = score + discount**h * alive * reward
        alive = alive * (1.0 - ended)
    return score + discount**horizon * alive * v(state)


def _sampled(
    observation_BO: Tensor,
    dynamics: Dynamics,
    values: Values,
    config: PlannerConfig,
    discount: float,
    generator: torch.Generator,
    noise_std: Tensor | float,
) -> list[Plan]:
    """Plans of mpc and greedy_q, chunk by chunk; the noise does not depend on the chunks."""
    R = candidates_per_elite(config, dynamics.elites)
    depth = config.horizon if config.kind == "mpc" else 1
    B, device = len(observation_BO), observation_BO.device
    action_dim = values.act(observation_BO[:1]).shape[-1]
    noise = torch.randn((depth, dynamics.elites, B, R, action_dim), generator=generator).to(device) * noise_std
    noise[:, :, :, 0] = 0.0
    chunk = max(1, (CACHED_ROWS if device.type == "cpu" else ROWS) // (dynamics.elites * R))
    plans = []
    for begin in range(0, B, chunk):
        part = slice(begin, begin + chunk)
        decide = _mpc if config.kind == "mpc" else _greedy_q
        plans.append(decide(observation_BO[part], noise[:, :, part], dynamics, values, config, discount))
    return plans


def _gradient(
    observation_BO: Tensor, dynamics: Dynamics, values: Values, config: PlannerConfig, discount: float,
    reach: Tensor | float,
) -> Plan:
    """First-order MPC: climb the score from the behaviour policy's own plan, and take the plan's first action.

    A plan is a change of the behaviour policy's action at each of H steps, a_h = pi(s_h) + reach * tanh(x_h), and is
    scored in every elite, and by the mean over them. x climbs by steps of one size along the gradient, each state by
    itself. Without noise, plans are a function of the state, which a policy can learn.
    """
    E = dynamics.elites
    first_BA = values.act(observation_BO)
    x_HBA = observation_BO.new_zeros(config.horizon, *first_BA.shape)
    scores = []

    def act(h: int, state: Tensor) -> Tensor:
        base = values.act(state) if h else first_BA.expand(E, -1, -1)
        return (base + reach * torch.tanh(x_HBA[h])).clamp(-1.0, 1.0)

    for i in range(config.iterations + 1):
        with torch.enable_grad():
            x_HBA.requires_grad_(i < config.iterations)
            score = plan_score(
                observation_BO.expand(E, -1, -1), act, dynamics, values.v, horizon=config.horizon, discount=discount
            )
            total = score.mean(0)
            if config.disagreement_penalty > 0:
                total = total - config.disagreement_penalty * score.std(0)
            scores.append(total.detach())
            if i == config.iterations:
                break
            (gradient,) = torch.autograd.grad(total.sum(), x_HBA)
        x_HBA = x_HBA.detach()
        size = gradient.square().mean((0, 2), keepdim=True).sqrt() + 1e-8
        x_HBA = x_HBA + _CLIMB * gradient / size
    _require_finite(torch.stack(scores, 1))
    action = act(0, observation_BO)[0].detach()
    return Plan(action, scores[-1], torch.stack(scores, 1).mean(1))


def _mpc(
    observation_BO: Tensor,
    noise_HEBRA: Tensor,
    dynamics: Dynamics,
    values: Values,
    config: PlannerConfig,
    discount: float,
) -> Plan:
    H, E, B, R, A = noise_HEBRA.shape
    state = observation_BO[None, :, None].expand(E, B, R, -1).reshape(E, B * R, -1)
    # All candidates of a state begin with one action of the behaviour policy's.
    first = (values.act(observation_BO)[:, None] + noise_HEBRA[0]).clamp(-1.0, 1.0).reshape(E, B * R, A)

    def act(h: int, state: Tensor) -> Tensor:
        return first if h == 0 else (values.act(state) + noise_HEBRA[h].reshape(E, B * R, A)).clamp(-1.0, 1.0)

    score = plan_score(state, act, dynamics, values.v, horizon=H, discount=discount)
    if config.disagreement_penalty > 0:
        score -= config.disagreement_penalty * _disagreement(
            observation_BO, first.reshape(E, B, R, A), dynamics, values, discount
        )
    score_BN = score.reshape(E, B, R).transpose(0, 1).reshape(B, E * R)
    first_BNA = first.reshape(E, B, R, A).transpose(0, 1).reshape(B, E * R, A)
    _require_finite(score_BN)
    best = score_BN.amax(1, keepdim=True)
    spread = score_BN.std(1, keepdim=True).clamp(min=1e-6)
    weight = torch.softmax((score_BN - best) / spread / config.temperature, 1)
    return Plan((weight[..., None] * first_BNA).sum(1), best[:, 0], score_BN.mean(1))


def _disagreement(
    observation_BO: Tensor, first_EBRA: Tensor, dynamics: Dynamics, values: Values, discount: float
) -> Tensor:
    """Std over the elites of r + gamma c V(s') of every candidate's first action: (E, B * R)."""
    E, B, R, A = first_EBRA.shape
    state = observation_BO[None, :, None].expand(E, B, R, -1).reshape(1, E * B * R, -1).expand(dynamics.elites, -1, -1)
    action = first_EBRA.reshape(1, E * B * R, A).expand(dynamics.elites, -1, -1)
    following, reward, ended = dynamics.step(state, action)
    return (reward + discount * (1.0 - ended) * values.v(following)).std(0).reshape(E, B * R)


def _greedy_q(
    observation_BO: Tensor,
    noise_HEBRA: Tensor,
    dynamics: Dynamics,
    values: Values,
    config: PlannerConfig,
    discount: float,
) -> Plan:
    _, E, B, R, A = noise_HEBRA.shape
    offset_BNA = noise_HEBRA[0].transpose(0, 1).reshape(B, E * R, A)
    action_BNA = (values.act(observation_BO)[:, None] + offset_BNA).clamp(-1.0, 1.0)
    score_BN = values.q(observation_BO[:, None].expand(-1, E * R, -1), action_BNA).amin(0)
    _require_finite(score_BN)
    best = score_BN.argmax(1)
    rows = torch.arange(B, device=best.device)
    return Plan(action_BNA[rows, best], score_BN[rows, best], score_BN.mean(1))


def _require_finite(score_BN: Tensor) -> None:
    bad = int((~torch.isfinite(score_BN)).sum())
    if bad:
        raise FloatingPointError(
            f"{bad} of {score_BN.numel()} planner scores are not finite: the world model or V diverged on imagined "
            "states; look at their learning curves, or shorten planner.horizon."
        )
