"""Fit V, Q and the behaviour policy, and show that they learned. Shapes: B batch, O observation, A action."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ipd_ray.artifacts import (
    Workspace,
    load_optimizer,
    optimizer_tensors,
    prefixed,
    stripped,
)
from ipd_ray.config import ValuesConfig
from ipd_ray.cuda_graphs import Captured, set_rate
from ipd_ray.data.transitions import Log, rank_correlation
from ipd_ray.layers import EnsembleMLP, block_generator, matrix_products
from ipd_ray.training import exhaust, train
from ipd_ray.values.losses import advantage_weights, expectile_loss
from ipd_ray.values.networks import ValueFunctions

VERSION = 5
_BLOCK = 1000  # updates whose batches are drawn together
_STREAM = 11
M = TypeVar("M", bound=nn.Module)


class ValueTrainer:
    """One update of V, Q and the behaviour policy (IQL, eqs. 5-7, with targets of n steps), and every fourth one of the
    return expectiles."""

    def __init__(self, log: Log, config: ValuesConfig, seed: int, device: str):
        t = log.transitions
        torch.manual_seed(seed)
        self.model = ValueFunctions(t.observation_dim, t.spec.action_dim, config)
        mean, std = log.observation_moments
        self.model.observation_mean.copy_(torch.from_numpy(mean))
        self.model.observation_std.copy_(torch.from_numpy(std))
        self.model.return_mean.fill_(log.return_moments[0])
        self.model.return_std.fill_(log.return_moments[1])
        self.model.to(device)
        self._config, self._seed, self._device = config, seed, device
        self._target = [p.detach().clone() for p in self.model.q_net.parameters()]
        self._target_net = EnsembleMLP(
            2,
            t.observation_dim + t.spec.action_dim,
            1,
            width=config.width,
            layers=config.layers,
            layer_norm=config.layer_norm,
        ).to(device)
        for parameter, value in zip(self._target_net.parameters(), self._target, strict=True):
            parameter.data = value
        self._optimizer = torch.optim.Adam(
            [
                {
                    "params": [
                        *self.model.q_net.parameters(),
                        *self.model.v_net.parameters(),
                        *self.model.return_net.parameters(),
                    ]
                },
                {"params": list(self.model.behaviour_net.parameters())},
            ],
            lr=config.learning_rate,
            fused=True,
        )
        partial, weight = log.return_parts
        reward_n, last_n, weight_n = log.n_step(config.n_step)
        shift, scale = log.return_moments
        columns = [
            (t.observation - mean) / std,
            t.action,
            (t.next_observation[last_n] - mean) / std,
            reward_n[:, None] / scale,
            weight_n[:, None],
            (partial[:, None] - shift) / scale,
            weight[:, None],
            (t.next_observation[log.episode_end] - mean) / std,
        ]
        self._widths = [c.shape[1] for c in columns]
        table = np.concatenate(columns, 1).astype(np.float32)[log.train_steps]
        self._table = torch.from_numpy(table).to(device)
        self._offset = shift / scale
        self._block: tuple[int, Tensor] = (-1, torch.empty(0))
        self._index = torch.zeros(config.batch_size, dtype=torch.int64, device=device)
        self._captured = Captured(self._compute, self.state, self._optimizer, device)

    def _draw(self, step: int) -> None:
        block, row = divmod(step, _BLOCK)
        if self._block[0] != block:
            size = (_BLOCK, self._config.batch_size)
            index = torch.randint(len(self._table), size, generator=block_generator(self._seed, _STREAM, block))
            self._block = (block, index.to(self._device))
        self._index.copy_(self._block[1][row])

    def update(self, step: int) -> dict[str, Tensor]:
        config = self._config
        self._draw(step)
        behaviour_rate = config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / config.updates))
        set_rate(self._optimizer.param_groups[1], behaviour_rate)
        return self._captured(step % 4 == 0)

    def _compute(self, with_returns: bool) -> dict[str, Tensor]:
        config, model = self._config, self.model
        with matrix_products(self._device, config.precision):
            s, a, s_n, r_n, weight_n, partial, weight, s_end = self._table[self._index].split(self._widths, 1)
            sa = torch.cat([s, a], 1).expand(2, -1, -1)
            with torch.no_grad():
                # y = r_n + gamma^n (1 - done) V(s_n) in units of the returns' spread, V = offset + v there
                y = r_n + weight_n * (model.v_net(s_n[None])[0] + self._offset) - self._offset
                q_min = self._target_net(sa).amin(0)
            q = model.q_net(sa)
            v = model.v_net(s[None])[0]
            q_loss = (q - y).square().mean(1).sum()
            v_loss = expectile_loss(q_min, v, tau=config.expectile, huber=config.loss == "huber")
            advantage = y - v.detach()  # of what the log went on to bring: Q's own is mostly its error (docs/notes.md)
            action = torch.tanh(model.behaviour_net(s[None])[0])
            weights = advantage_weights(advantage, temperature=config.advantage_temperature)
            behaviour_loss = (weights * (action - a).square()).sum(1).mean()
            loss = q_loss + v_loss + behaviour_loss
            if with_returns:
                with torch.no_grad():
                    returns = partial + weight * (model.v_net(s_end[None])[0] + self._offset)
                expectiles = model.return_net(s[None])[0]
                loss = loss + expectile_loss(returns, expectiles[:, :1], tau=0.5)
                loss = loss + expectile_loss(returns, expectiles[:, 1:], tau=config.prompt_expectile)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        online = [p.data for p in model.q_net.parameters()]
        torch._foreach_lerp_(self._target, online, config.polyak)
        told = {
            "q_loss": q_loss,
            "v_loss": v_loss,
            "behaviour_loss": behaviour_loss,
            "v_mean": v.mean(),
            "advantage_mean": advantage.mean(),
        }
        return {name: value.detach() for name, value in told.items()}

    def state(self) -> dict[str, Tensor]:
        target = {str(i): value for i, value in enumerate(self._target)}
        return {
            **prefixed("model", self.model.state_dict()),
            **prefixed("target", target),
            **optimizer_tensors(self._optimizer),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(stripped("model", tensors))
        for i, value in enumerate(self._target):
            value.copy_(tensors[f"target.{i}"])
        load_optimizer(self._optimizer, tensors)


def fit_values(log: Log, config: ValuesConfig, *, seed: int, device: str, workspace: Workspace) -> None:
    """Step 1: train to the end, measure on the held-out episodes, leave the artifact in the workspace."""
    trainer = ValueTrainer(log, config, seed, device)
    exhaust(train(trainer, config.updates, workspace, log_every=min(1000, max(1, config.updates // 20))))
    model = trainer.model.eval()
    workspace.finish(
        model.state_dict(),
        diagnose(model, log, device),
        values=config.model_dump(mode="json"),
        observation_dim=log.transitions.observation_dim,
        action_dim=log.transitions.spec.action_dim,
    )


def load_values(tensors: Mapping[str, Tensor], described: Mapping[str, Any], device: str) -> ValueFunctions:
    """Rebuild what step 1 left behind, frozen."""
    config = ValuesConfig.model_validate(described["values"])
    model = ValueFunctions(described["observation_dim"], described["action_dim"], config)
    model.load_state_dict(dict(tensors))
    return frozen(model, device)


def frozen(model: M, device: str) -> M:
    """Return the module on the device, in evaluation mode, without gradients of its own."""
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def evaluate_in_chunks(fn: Any, *columns: NDArray[np.float32], device: str, chunk: int = 65_536) -> NDArray[np.float32]:
    """Apply a function of tensors to long columns (T, .), chunk by chunk; the last axis of the result is T."""
    parts = []
    for begin in range(0, len(columns[0]), chunk):
        inputs = [torch.from_numpy(np.ascontiguousarray(c[begin : begin + chunk])).to(device) for c in columns]
        parts.append(fn(*inputs).cpu().numpy())
    return np.concatenate(parts, -1)


def bootstrapped_returns(log: Log, v: Any, device: str) -> NDArray[np.float32]:
    """G_t (T,): discounted return to the episode's end, V of the last observation added after a truncation."""
    partial, weight = log.return_parts
    v_end = value_at_ends(log, v, device)
    return (partial + weight * v_end[log.transitions.episode]).astype(np.float32)


def value_at_ends(log: Log, v: Any, device: str) -> NDArray[np.float32]:
    """V (E,) of the observation after each episode's last step."""
    ends = log.transitions.episode_start[1:] - 1
    return evaluate_in_chunks(v, log.transitions.next_observation[ends], device=device)


def generalised_advantage(
    log: Log, v: NDArray[np.float32], v_end: NDArray[np.float32], lam: float
) -> NDArray[np.float32]:
    """A_t (T,) of the log's own steps: sum_k (gamma lam)^k delta_{t+k} (GAE, Schulman et al. 2016, arXiv:1506.02438).

    delta_t = r_t + gamma (1 - done_t) V(s_{t+1}) - V(s_t). v: (T,) V of every step's observation; v_end: (E,) V of the
    observation after each episode's last step. Transformed reward units.
    """
    t = log.transitions
    last = t.episode_start[1:] - 1
    following = np.append(v[1:], np.float32(0.0))
    following[last] = np.where(t.terminal[last], 0.0, v_end)
    delta = log.reward + log.discount * following - v
    return t.discounted_sums(delta, log.discount * lam).astype(np.float32)


def diagnose(model: ValueFunctions, log: Log, device: str) -> dict[str, Any]:
    """Show that the values learned: against returns of held-out episodes, and against trivial predictors.

    Rows whose return is mostly bootstrap are left out, where enough remain; `mc_rows` says how many do, and
    `mc_bootstrap` how much of their returns is V's own estimate of what follows a cut, on average.
    """
    t = log.transitions
    held, trained = log.holdout_steps, log.train_steps
    weight = log.return_parts[1]
    limit = 0.25 if (weight[held] <= 0.25).sum() >= 50 else 1.0
    rows = held[weight[held] <= limit]
    returns = bootstrapped_returns(log, model.v, device)
    v_all = evaluate_in_chunks(model.v, t.observation, device=device)
    v, g = v_all[rows], returns[rows]
    mc = evaluate_in_chunks(lambda s: model.return_expectiles(s)[0], t.observation[rows], device=device)
    fit_rows = trained[weight[trained] <= limit]
    linear = _linear_prediction(t.observation[fit_rows], returns[fit_rows], t.observation[rows])
    clock = np.stack([t.timestep, t.timestep**2], 1).astype(np.float32)
    timestep = _linear_prediction(clock[fit_rows], returns[fit_rows], clock[rows])
    order = np.array_split(np.argsort(v), 10)
    spread = float(g.std()) or 1.0
    q = evaluate_in_chunks(lambda s, a: model.q(s, a).amin(0), t.observation[rows], t.action[rows], device=device)
    sample = np.random.default_rng(0).choice(len(v), min(len(v), 2000), replace=False)
    return {
        "mc_rows": len(rows),
        "mc_bootstrap": float(weight[rows].mean()),
        "rank_correlation": rank_correlation(v, g),
        "rank_correlation_q": rank_correlation(q, g),
        "rank_correlation_linear": rank_correlation(linear, g),
        "rank_correlation_timestep": rank_correlation(timestep, g),
        "mc_rmse": float(np.sqrt(np.square(mc - g).mean())) / spread,
        "mc_rmse_linear": float(np.sqrt(np.square(linear - g).mean())) / spread,
        "gap_by_decile": [float((v[i] - g[i]).mean()) / spread for i in order if len(i)],
        "regret_mean_holdout": float((v_all[held] - returns[held]).mean()) / spread,
        "regret_mean_train": float((v_all[trained] - returns[trained]).mean()) / spread,
        "v_std": float(v_all.std()),
        "sample": {"value": np.round(v[sample], 4).tolist(), "return": np.round(g[sample], 4).tolist()},
    }


def _linear_prediction(x: NDArray[Any], y: NDArray[Any], x_new: NDArray[Any]) -> NDArray[Any]:
    design = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)
    solution, *_ = np.linalg.lstsq(design, y.astype(np.float64), rcond=None)
    return np.concatenate([x_new, np.ones((len(x_new), 1))], 1) @ solution
