"""Fit the ensemble on whole-episode splits, and show that it learned. Shapes as in ensemble.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ipd_ray.artifacts import Workspace, load_optimizer, optimizer_tensors, prefixed, stripped
from ipd_ray.config import WorldModelConfig
from ipd_ray.cuda_graphs import Captured, set_rate
from ipd_ray.data.transitions import Log, rank_correlation, spread
from ipd_ray.layers import block_generator, matrix_products
from ipd_ray.training import exhaust, train
from ipd_ray.world_model.ensemble import Ensemble, WorldModel
from ipd_ray.world_model.termination import UNBOUNDED, ending_bounds, resolve
from ipd_ray.world_model.uncertainty import KINDS, ensemble_uncertainty

VERSION = 6
_BLOCK = 250
_STREAM = 22
_HOLDOUT_ROWS = 20_000
_IMPROVEMENT = 0.99  # a hold-out error counts as better under this share of the best


class WorldModelTrainer:
    """Bounded Gaussians by beta-NLL (Seitzer et al. 2022, arXiv:2203.09168); the best weights of each member on the
    held-out episodes are kept."""

    def __init__(self, log: Log, config: WorldModelConfig, seed: int, device: str):
        t = log.transitions
        torch.manual_seed(seed + 1)
        self.model = Ensemble(config.members, t.observation_dim, t.spec.action_dim, config)
        mean, std = log.observation_moments
        targets = _targets(log)
        known = targets[log.train_steps].astype(np.float64)
        magnitude = np.append(np.abs(t.observation).max(0), np.abs(log.reward).max())
        # Where the std is 0 the model predicts the mean, whatever its networks say: it drifts in no constant column.
        target_mean, target_std = known.mean(0).astype(np.float32), spread(known, magnitude)
        for name, value in (
            ("observation_mean", mean),
            ("observation_std", std),
            ("target_mean", target_mean),
            ("target_std", target_std),
        ):
            getattr(self.model, name).copy_(torch.from_numpy(value))
        self.model.to(device)
        self._config, self._seed, self._device = config, seed, device
        varies = target_std > 0
        wanted = np.where(varies, (targets - target_mean) / np.where(varies, target_std, 1.0), 0.0)
        columns = np.concatenate([(t.observation - mean) / std, t.action, wanted], 1).astype(np.float32)
        self._split = [t.observation_dim + t.spec.action_dim, t.observation_dim + 1]
        self._table = torch.from_numpy(columns[log.train_steps]).to(device)
        held = log.holdout_steps
        if len(held) > _HOLDOUT_ROWS:
            held = held[np.linspace(0, len(held) - 1, _HOLDOUT_ROWS).astype(np.int64)]
        self._held = torch.from_numpy(columns[held]).to(device)
        rows = len(self._table)
        self._bootstrap = torch.randint(rows, (config.members, rows), generator=block_generator(seed, _STREAM, 0)).to(
            device
        )
        self._learn_termination = config.termination == "learned" and _terminates(log)
        self._half = max(1, config.batch_size // 2)
        self._termination_index = torch.zeros(2 * self._half, dtype=torch.int64, device=device)
        if self._learn_termination:
            self._pairs, self._ended, self._prior = _termination_rows(log, mean, std, device)
            steps, ends = log.train_steps, t.terminal[log.train_steps]
            low, high, within = ending_bounds(t.next_observation[steps[~ends]], t.next_observation[steps[ends]])
            self.model.ends_below.copy_(torch.from_numpy(low))
            self.model.ends_above.copy_(torch.from_numpy(high))
            self.model.ends_within.fill_(within)
        decayed = [*self.model.net.parameters(), *self.model.termination_net.parameters()]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": [self.model.max_log_variance, self.model.min_log_variance], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            fused=True,
        )
        self.best = {name: value.clone() for name, value in self.model.of_members.items()}
        self.best_error = torch.full((config.members,), float("inf"), device=device)
        self.stale = 0
        self._block: tuple[int, Tensor] = (-1, torch.empty(0))
        self._drawn = torch.zeros((config.members, config.batch_size), dtype=torch.int64, device=device)
        self._captured = Captured(self._compute, self.state, self._optimizer, device)

    def _draw(self, step: int) -> None:
        block, row = divmod(step, _BLOCK)
        if self._block[0] != block:
            size = (_BLOCK, self._config.members, self._config.batch_size)
            draw = torch.randint(len(self._table), size, generator=block_generator(self._seed, _STREAM, block + 1))
            self._block = (block, draw.to(self._device))
        self._drawn.copy_(self._block[1][row])
        if self._learn_termination:
            generator = block_generator(self._seed, _STREAM + 1, step)
            anywhere = torch.randint(len(self._pairs), (self._half,), generator=generator)
            ending = self._ended[torch.randint(len(self._ended), (self._half,), generator=generator)]
            self._termination_index.copy_(torch.cat([anywhere, ending]))

    def update(self, step: int) -> dict[str, Tensor]:
        config = self._config
        self._draw(step)
        rate = config.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * step / config.max_updates)))
        for group in self._optimizer.param_groups:
            set_rate(group, rate)
        told = self._captured()
        if (step + 1) % config.eval_every == 0 or step + 1 == config.max_updates:
            self._look()
        return told

    def _compute(self) -> dict[str, Tensor]:
        config = self._config
        index = torch.gather(self._bootstrap, 1, self._drawn)
        inputs, target = self._table[index].split(self._split, -1)
        with matrix_products(self._device, config.precision):
            mean, log_variance = self.model.heads(inputs)
            square = (mean - target).square()
            nll = square * torch.exp(-log_variance) + log_variance
            weighted = (nll * torch.exp(config.variance_power * log_variance.detach())).mean((1, 2)).sum()
            bounds = self.model.max_log_variance.sum() - self.model.min_log_variance.sum()
            loss = weighted + 0.01 / config.members * bounds
            if self._learn_termination:
                loss = loss + self._termination_loss()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return {"nll": nll.detach().mean(), "train_mse": square.mean().detach()}

    def _termination_loss(self) -> Tensor:
        """Cross-entropy on half random, half ending steps; the logit is corrected for that, to stay calibrated."""
        rows = self._pairs[self._termination_index]
        s, following = rows[:, :-1].chunk(2, 1)
        label = rows[:, -1]
        share = 0.5 + 0.5 * self._prior
        shift = math.log(share / (1.0 - share)) - math.log(self._prior / (1.0 - self._prior))
        return F.binary_cross_entropy_with_logits(self.model.termination_logit(s, following) + shift, label)

    @torch.no_grad()
    def _look(self) -> None:
        errors = self.holdout_error()
        better = errors < _IMPROVEMENT * self.best_error
        for name, value in self.model.of_members.items():
            self.best[name][better] = value[better]
        self.best_error = torch.where(better, errors, self.best_error)
        self.stale = 0 if bool(better.any()) else self.stale + 1

    @torch.no_grad()
    def holdout_error(self) -> Tensor:
        """Mean squared error (M,) of the means on held-out steps, in normalised units."""
        total = torch.zeros(self._config.members, device=self._device)
        for rows in self._held.split(4096):
            inputs, target = rows.split(self._split, -1)
            mean, _ = self.model.heads(inputs.expand(self._config.members, -1, -1))
            total += (mean - target).square().mean(-1).sum(-1)
        return total / len(self._held)

    def state(self) -> dict[str, Tensor]:
        return {
            **prefixed("model", self.model.state_dict()),
            **prefixed("best", self.best),
            **optimizer_tensors(self._optimizer),
            "stale": torch.tensor(self.stale),
            "best_error": torch.nan_to_num(self.best_error, posinf=torch.finfo(torch.float32).max),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(stripped("model", tensors))
        self.best = {name: value.to(self._device) for name, value in stripped("best", tensors).items()}
        self.best_error = tensors["best_error"].to(self._device)
        self.stale = int(tensors["stale"])
        load_optimizer(self._optimizer, tensors)

    def elites(self, config: WorldModelConfig) -> Ensemble:
        """Return the ensemble of the best members, each at its best weights."""
        keep = torch.argsort(self.best_error)[: config.elites].sort().values
        model = Ensemble(config.elites, self.model.observation_dim, self._split[0] - self.model.observation_dim, config)
        model.load_state_dict({**self.model.state_dict(), **{name: best[keep] for name, best in self.best.items()}})
        return model.to(self._device)


def _targets(log: Log) -> NDArray[np.float32]:
    """(T, O + 1) change of the observation, and reward."""
    t = log.transitions
    return np.concatenate([t.next_observation - t.observation, log.reward[:, None]], 1)


def _terminates(log: Log) -> bool:
    """Whether there are terminations to learn from."""
    return bool(log.transitions.terminal[log.train_steps].any())


def _termination_rows(
    log: Log, mean: NDArray[np.float32], std: NDArray[np.float32], device: str
) -> tuple[Tensor, Tensor, float]:
    """(N, 2 O + 1) normalised s, s' and whether it ended, of the training steps; the rows that ended; their share."""
    t, steps = log.transitions, log.train_steps
    rows = np.concatenate(
        [(t.observation[steps] - mean) / std, (t.next_observation[steps] - mean) / std, t.terminal[steps, None]], 1
    ).astype(np.float32)
    ended = np.flatnonzero(t.terminal[steps])
    share = min(max(len(ended) / len(steps), 1e-6), 1.0 - 1e-6)
    return torch.from_numpy(rows).to(device), torch.from_numpy(ended), share


def fit_world_model(log: Log, config: WorldModelConfig, *, seed: int, device: str, workspace: Workspace) -> None:
    """Step 2: train until the held-out episodes stop improving, measure, leave the artifact in the workspace."""
    trainer = WorldModelTrainer(log, config, seed, device)
    every = min(config.eval_every, config.max_updates)
    exhaust(train(trainer, config.max_updates, workspace, every, stop=lambda: trainer.stale >= config.patience))
    ensemble = trainer.elites(config).eval().requires_grad_(False)
    rule = resolve(config.termination)
    if rule is None and not _terminates(log):
        rule = resolve("never")
    model = WorldModel(ensemble, rule)
    u = holdout_uncertainty(model, log, device)
    tensors = {**ensemble.state_dict(), "holdout_uncertainty": torch.from_numpy(u)}
    workspace.finish(
        tensors,
        diagnose(model, log, u, device),
        world_model=config.model_dump(mode="json"),
        observation_dim=log.transitions.observation_dim,
        action_dim=log.transitions.spec.action_dim,
        terminates=_terminates(log),
    )


def load_world_model(tensors: Mapping[str, Tensor], described: Mapping[str, Any], device: str) -> WorldModel:
    """Rebuild what step 2 left behind, frozen."""
    config = WorldModelConfig.model_validate(described["world_model"])
    ensemble = Ensemble(config.elites, described["observation_dim"], described["action_dim"], config)
    ensemble.load_state_dict({k: v for k, v in tensors.items() if k != "holdout_uncertainty"})
    rule = resolve(config.termination)
    if rule is None and not described["terminates"]:
        rule = resolve("never")
    return WorldModel(ensemble, rule).to(device).eval().requires_grad_(False)


@torch.no_grad()
def holdout_uncertainty(model: WorldModel, log: Log, device: str) -> NDArray[np.float32]:
    """U of every held-out step, (kinds, N), kinds as in KINDS, steps in the order of `log.holdout_steps`."""
    t, held = log.transitions, log.holdout_steps
    parts = []
    for rows in np.array_split(held, max(1, len(held) // 4096)):
        s, a = (torch.from_numpy(c[rows]).to(device) for c in (t.observation, t.action))
        *_, gaussians = model.step_together(s, a)
        parts.append(torch.stack([ensemble_uncertainty(*gaussians, kind) for kind in KINDS]).cpu().numpy())
    return np.concatenate(parts, 1)


@torch.no_grad()
def diagnose(model: WorldModel, log: Log, u: NDArray[np.float32], device: str) -> dict[str, Any]:
    """Show that the model learned: one-step error against trivial predictors, U against error, error by depth.

    Errors are root mean squares over held-out steps in units of the spread of (s' - s, r): 1 is the constant predictor.
    What does not vary is left out.
    """
    t, held = log.transitions, log.holdout_steps
    ensemble = model.ensemble
    mean, std = ensemble.target_mean.cpu().numpy(), ensemble.target_std.cpu().numpy()
    target, varies = _targets(log), std > 0
    lowest = ensemble.min_log_variance[..., ensemble.target_std > 0]
    predicted, floor, done = [], [], []
    for rows in np.array_split(held, max(1, len(held) // 4096)):
        s, a = (torch.from_numpy(c[rows]).to(device) for c in (t.observation, t.action))
        following, reward, p_done, (_, log_variance) = model.step_together(s, a)
        predicted.append(torch.cat([following - s, reward[:, None]], 1).cpu().numpy())
        floor.append(float((log_variance < lowest + 0.5).float().mean()))
        done.append(p_done.cpu().numpy())

    def in_spreads(guess: NDArray[Any]) -> NDArray[Any]:
        return np.square((guess - target[held])[:, varies] / std[varies])

    error = in_spreads(np.concatenate(predicted))
    trained = log.train_steps
    design = np.concatenate([t.observation, t.action, np.ones((len(t), 1), np.float32)], 1)
    weights, *_ = np.linalg.lstsq(design[trained].astype(np.float64), target[trained].astype(np.float64), rcond=None)
    linear, constant = in_spreads(design[held] @ weights), in_spreads(mean)
    per_step = error.mean(1)
    ranks = [rank_correlation(kind, per_step) for kind in u]
    alarm, truth = np.concatenate(done) > 0.5, t.terminal[held]
    sample = np.random.default_rng(0).choice(len(held), min(len(held), 2000), replace=False)
    return {
        "rmse": float(np.sqrt(error.mean())),
        "rmse_linear": float(np.sqrt(linear.mean())),
        "rmse_constant": float(np.sqrt(constant.mean())),
        "reward_rmse": float(np.sqrt(error[:, -1].mean())) if varies[-1] else 0.0,
        "uncertainty_rank_correlation": dict(zip(KINDS, ranks, strict=True)),
        "share_at_variance_floor": float(np.mean(floor)),
        "rollout_rmse_by_depth": rollout_error(model, log, device),
        "termination": {
            "true": int(truth.sum()),
            "found": int((truth & alarm).sum()),
            "false_alarms": int((~truth & alarm).sum()),
            "steps": len(truth),
        },
        "ends": _bounds(ensemble),
        "sample": {
            "uncertainty": u[0][sample].astype(float).tolist(),
            "error": np.sqrt(per_step[sample]).astype(float).tolist(),
        },
    }


def _bounds(ensemble: Ensemble) -> dict[str, Any]:
    """The bounds beyond which episodes end, {observation: value}, and the share of endings that lie within."""
    below, above = ensemble.ends_below.tolist(), ensemble.ends_above.tolist()
    return {
        "below": {str(i): x for i, x in enumerate(below) if x > -UNBOUNDED},
        "above": {str(i): x for i, x in enumerate(above) if x < UNBOUNDED},
        "within": float(ensemble.ends_within),
    }


@torch.no_grad()
def rollout_error(
    model: WorldModel, log: Log, device: str, depth: int = 20, starts: int = 2000
) -> dict[str, list[float]]:
    """Error of open-loop roll-outs along held-out actions, by depth, against standing still.

    In units of the spread of observations, of which those count that vary; a start takes part as long as its episode
    lasts.
    """
    t, held = log.transitions, log.holdout_steps
    left = log.episode_end[held] - held + 1
    rng = np.random.default_rng(0)
    begin = rng.choice(held, min(starts, len(held)), replace=False)
    remaining = left[np.searchsorted(held, begin)]
    scale = log.observation_moments[1][log.varying]
    s0 = t.observation[begin]
    s = torch.from_numpy(s0).to(device)
    errors: list[float] = []
    still: list[float] = []
    for k in range(depth):
        alive = remaining > k
        if alive.sum() < 20:
            break
        index = np.minimum(begin + k, len(t) - 1)
        s, *_ = model.step_together(s, torch.from_numpy(t.action[index]).to(device))
        truth = t.next_observation[index]
        for guess, into in ((s.cpu().numpy(), errors), (s0, still)):
            into.append(float(np.sqrt(np.square((guess - truth)[alive][:, log.varying] / scale).mean())))
    return {"model": errors, "still": still}
