"""Distil: the trainer, one worker or many. Shapes as in policy.py and windows.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ipd_ray.artifacts import (
    Workspace,
    load_optimizer,
    open_tensors,
    optimizer_tensors,
    prefixed,
    save_tensors,
    stripped,
)
from ipd_ray.config import DistillConfig, PolicyConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Bools, Floats, Ints, Log
from ipd_ray.distill.losses import CriticFn, loss_sums
from ipd_ray.distill.policy import TransformerPolicy
from ipd_ray.distill.windows import Mixture, Prompts, Rows, Windows, flatten
from ipd_ray.layers import block_generator
from ipd_ray.training import train
from ipd_ray.values.networks import ValueFunctions

VERSION = 7
_STREAM = 66


class Reducer(Protocol):
    """Sums over workers; the place where parallelism enters."""

    rank: int
    world: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all workers."""


class Alone:
    """One worker."""

    rank, world = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Material:
    """All that is distilled, nothing of how it was made."""

    log: Log
    segments: Segments
    accepted: Bools
    """(S,) those that count."""
    lengths: Ints
    """(S,) steps of each segment that count."""
    pass_rate: float
    """Share of all segments that passed the tests."""
    prompts: Prompts
    weight: Floats
    """(T,) imitation weight of the log's steps, mean 1."""
    imagined_weight: Floats
    """(S, L) imitation weight of imagined steps, by the same rule."""
    critic_scale: float
    """See `critic_spread`."""


@dataclass(frozen=True)
class Corpus:
    """Material as columns, of which each worker reads its slices, and what every worker must know of all of it."""

    columns: Mapping[str, Rows]
    """See `windows.flatten`."""
    mixture: Mixture
    moments: Mapping[str, Any]
    """Buffers of the policy: how it normalises observations and prompts, and which steps it tells apart."""
    critic_scale: float
    action_unit: float
    """Root mean square of `Log.action_unit`: what an error of imitation is measured in beside eta."""
    notes: Mapping[str, Any]
    """What the artifact will say of it; JSON."""

    @classmethod
    def of(
        cls, material: Material, policy: PolicyConfig, config: DistillConfig, notes: Mapping[str, Any] | None = None
    ) -> Corpus:
        """Return it of material. This needs all of the data at once, which training then does not."""
        m = material
        columns, mixture = flatten(
            m.log, m.segments, m.accepted, m.lengths, m.pass_rate, m.prompts, m.weight, m.imagined_weight, config,
            policy.context,
        )
        mean, std = m.log.observation_moments
        low, high = np.quantile(m.prompts.log, [0.001, 0.999])
        moments = {
            "observation_mean": mean.tolist(),
            "observation_std": std.tolist(),
            "prompt_mean": float(m.prompts.log.mean()),
            "prompt_std": max(float(m.prompts.log.std()), 1e-6),
            "prompt_low": float(low),
            "prompt_high": float(high),
            "last_timestep": min(policy.told_apart - 1, m.log.common_timestep),
        }
        unit = float(np.sqrt(np.square(m.log.action_unit).mean()))
        return cls(columns, mixture, moments, m.critic_scale, unit, notes or {})

    def write(self, path: Path) -> None:
        """Write it into one file, atomically."""
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "columns"}
        columns = {name: column[:] for name, column in self.columns.items()}
        save_tensors(path, columns, {**about, "mixture": asdict(self.mixture)})

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Return what `write` wrote; of the columns only the rows asked for are ever read."""
        columns, about = open_tensors(path)
        return cls(columns=columns, **{**about, "mixture": Mixture(**about["mixture"])})


def advantage_weight(advantage: Floats, of_log: Floats, temperature: float) -> Floats:
    """Imitation weights: min(exp(temperature * A / mean|A|), 20), over the weights' mean; means are those of the log.

    advantage: any shape, of steps of the log or imagined; of_log: (T,) of all steps of the log, the yardstick.
    """
    if temperature == 0:
        return np.ones(advantage.shape, np.float32)
    size = max(float(np.abs(of_log).mean()), 1e-8)

    def plain(a: Floats) -> Floats:
        return np.minimum(np.exp(np.minimum(temperature * a / size, 10.0)), 20.0)

    return (plain(advantage) / plain(of_log).mean()).astype(np.float32)


def imagined_advantage(segments: Segments, lengths: Ints, discount: float, lam: float) -> Floats:
    """(S, L) generalised advantage of each imagined step, over the steps that its segment keeps; 0 after the cut."""
    following = np.where(segments.terminal, 0.0, segments.value[:, 1:])
    delta = segments.reward + discount * following - segments.value[:, :-1]
    out = np.zeros(delta.shape, np.float32)
    running = np.zeros(len(segments))
    for k in reversed(range(segments.length)):
        running = np.where(k < lengths, delta[:, k] + discount * lam * running, 0.0)
        out[:, k] = running
    return out


def imagined_outcome(segments: Segments, lengths: Ints, discount: float) -> Floats:
    """(S, L) return-to-go of each imagined step: rewards to the cut, then V of where the segment was cut."""
    S, L = len(segments), segments.length
    outcome = np.zeros((S, L), np.float32)
    running = segments.value[np.arange(S), lengths].astype(np.float64)
    for k in reversed(range(L)):
        inside = k < lengths
        tail = np.where(segments.terminal[:, k], 0.0, running)
        running = np.where(inside, segments.reward[:, k] + discount * tail, running)
        outcome[:, k] = running
    return outcome


def raw_return_to_go(log: Log) -> Floats:
    """Undiscounted raw return-to-go (T,), Decision Transformer's prompt."""
    t = log.transitions
    total = np.cumsum(t.reward.astype(np.float64))
    before = np.concatenate([[0.0], total])[:-1]
    return (total[log.episode_end] - before).astype(np.float32)


def raw_outcome(log: Log, segments: Segments, lengths: Ints) -> Floats:
    """Raw return-to-go (S, L) of imagined steps: imagined rewards to the cut, then what the log still brought.

    After a predicted termination nothing follows.
    """
    S, L = len(segments), segments.length
    if S == 0:
        return np.zeros((0, L), np.float32)
    inside = np.arange(L) < lengths[:, None]
    imagined = np.where(inside, segments.reward, 0.0)
    own = np.where(inside, segments.own_reward, 0.0).sum(1)
    rest = raw_return_to_go(log)[segments.index] - own / log.reward_scale
    rest = np.where((segments.terminal & inside).any(1), 0.0, rest)
    to_cut = np.cumsum(imagined[:, ::-1], 1)[:, ::-1]
    return (to_cut / log.reward_scale + rest[:, None]).astype(np.float32)


class DistillTrainer:
    """One update of the policy on a global batch that is the same whatever the number of workers."""

    def __init__(
        self,
        corpus: Corpus,
        critic: CriticFn | None,
        policy: PolicyConfig,
        config: DistillConfig,
        *,
        seed: int,
        device: str,
        reducer: Reducer | None = None,
    ):
        self._config, self._seed, self._device = config, seed, device
        self._reducer = reducer or Alone()
        torch.manual_seed(seed + 2)
        observation_dim, action_dim = (corpus.columns[f"log.{n}"][:0].shape[1] for n in ("observation", "action"))
        self.model = TransformerPolicy(observation_dim, action_dim, policy, prompted=config.prompt != "none")
        for name, value in corpus.moments.items():
            getattr(self.model, name).copy_(torch.tensor(value))
        self.model.to(device).train()
        self.windows = Windows(
            corpus.columns,
            corpus.mixture,
            batch_size=config.batch_size,
            context=policy.context,
            seed=seed,
            device=device,
            rank=self._reducer.rank,
            world=self._reducer.world,
        )
        self._critic = critic if config.eta > 0 else None
        self._critic_scale = corpus.critic_scale
        # Imitation is a square of actions: in the log's own units it would be larger by this.
        self._eta = config.eta * corpus.action_unit**2
        named = dict(self.model.named_parameters())
        plain = [p for n, p in named.items() if p.ndim < 2 or "timestep" in n]
        decayed = [p for n, p in named.items() if not (p.ndim < 2 or "timestep" in n)]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._parameters = decayed + plain
        self.ema = {name: p.detach().clone() for name, p in named.items()}

    def begin_from(self, policy: Mapping[str, Tensor]) -> None:
        """Go on from a policy of the same shape, by its tensors; how it normalises stays that of this corpus."""
        own = {name: policy[name] for name in self.ema}
        self.model.load_state_dict({**self.model.state_dict(), **own})
        for name, value in own.items():
            self.ema[name].copy_(value)

    def _rate(self, step: int) -> float:
        config = self._config
        warm = min(1.0, (step + 1) / max(1, config.warmup))
        return config.learning_rate * warm * (0.1 + 0.45 * (1.0 + math.cos(math.pi * step / config.updates)))

    def update(self, step: int) -> dict[str, Tensor]:
        config, reduce = self._config, self._reducer
        batch = self.windows.draw(step)
        torch.manual_seed((self._seed * 1_000_003 + step) % (1 << 63))  # dropout, the same whoever holds a window
        pi = self.model(batch.prompt, batch.observation, batch.action, batch.timestep, batch.valid, batch.noise)
        leaf = pi.detach().requires_grad_(True)
        i = int(torch.randint(2, (), generator=block_generator(self._seed, _STREAM, step)))
        sums = loss_sums(leaf, batch.imitated, batch.observation, batch.weight, self._critic, (i, 1 - i))
        total = reduce.sum(torch.stack([sums.imitation, sums.q, sums.q_size, sums.weight, sums.count]).detach())
        imitation, q, q_size, weight, count = total.unbind()
        scale = q_size / count if config.critic_scale == "mean_abs" else torch.full_like(count, self._critic_scale)
        eta = self._eta * min(1.0, (step + 1) / max(1.0, config.eta_warmup * config.updates))
        imitation_grad = torch.autograd.grad(sums.imitation / weight, leaf)[0]
        gradient = imitation_grad
        metrics = {"imitation": imitation / weight}
        if self._critic is not None:
            q_grad = torch.autograd.grad(-eta * sums.q / count / scale, leaf)[0]
            gradient = imitation_grad + q_grad
            sizes = reduce.sum(torch.stack([q_grad.square().sum(), imitation_grad.square().sum()]))
            metrics["q_pi"] = q / count
            metrics["gradient_ratio"] = (sizes[0] / sizes[1].clamp(min=1e-20)).sqrt()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step)
        self._optimizer.zero_grad(set_to_none=True)
        pi.backward(gradient)
        if reduce.world > 1:
            trained = [p for p in self._parameters if p.grad is not None]  # the same ones on every worker
            flat = reduce.sum(torch.cat([p.grad.reshape(-1) for p in trained if p.grad is not None]))
            for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
                p.grad = part.reshape(p.shape).clone()
        torch.nn.utils.clip_grad_norm_(self._parameters, config.grad_clip)
        self._optimizer.step()
        decay = min(config.ema, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.model.parameters()], 1.0 - decay)
        return metrics

    def state(self) -> dict[str, Tensor]:
        return {
            **prefixed("model", self.model.state_dict()),
            **prefixed("ema", self.ema),
            **optimizer_tensors(self._optimizer),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(stripped("model", tensors))
        for name, value in stripped("ema", tensors).items():
            self.ema[name].copy_(value)
        load_optimizer(self._optimizer, tensors)

    def policy_state(self) -> dict[str, Tensor]:
        """The policy that is kept: averaged weights, and the buffers."""
        return {**self.model.state_dict(), **self.ema}

    @torch.no_grad()
    def diagnose(self) -> dict[str, Any]:
        """How far Q trusts the policy over the log, and what was mixed. Watch q_advantage: a run-away is an exploit.

        All workers must call it.
        """
        self.model.load_state_dict(self.policy_state())
        self.model.eval()
        batch = self.windows.gather(self.windows.spread(2048))
        pi = self.model(batch.prompt, batch.observation, batch.action, batch.timestep, batch.valid)[:, -1]
        error = (pi - batch.action[:, -1]).square().mean(-1)
        gain = torch.zeros_like(error)
        if self._critic is not None:
            last = batch.observation[:, -1]
            gain = self._critic(last, pi).amin(0) - self._critic(last, batch.action[:, -1]).amin(0)
        counted = batch.weight[:, -1] > 0
        sums = torch.stack([(error * counted).sum(), (gain * counted).sum(), counted.sum().to(error.dtype)])
        squares, gained, count = self._reducer.sum(sums).tolist()
        out = {
            "imitation_rmse": math.sqrt(squares / count),
            "imagined_ratio": self.windows.mixture.imagined_ratio,
            "imagined_steps": float(self.windows.mixture.imagined_steps),
            "critic_scale": self._critic_scale,
        }
        if self._critic is not None:
            out["q_advantage"] = gained / count / max(self._critic_scale, 1e-8)
        return out


def fit_policy(
    trainer: DistillTrainer, config: DistillConfig, workspace: Workspace | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """Step 5: yield learning curve lines until the policy is done; leave `config.snapshots` - 1 policies on the way."""
    every = min(200, max(1, config.updates // 20))
    for step, metrics in train(trainer, config.updates, workspace, log_every=every):
        before, reached = ((s * config.snapshots) // config.updates for s in (step - every, step))
        if workspace and before < reached < config.snapshots:
            workspace.keep(step, prefixed("policy", trainer.policy_state()))
        yield step, metrics


def critic_spread(values: ValueFunctions, observation: Floats, action_unit: Floats, device: str) -> float:
    """Spread of min Q(s, .) over actions, mean over up to 2000 states: one unit of eta.

    Actions are uniform where the log uses the whole of their bounds, and as near to the behaviour policy's as the log
    is where it does not (`Log.action_unit`): beyond, Q was never told anything.
    """
    rows = np.linspace(0, len(observation) - 1, min(len(observation), 2000)).astype(np.int64)
    s, unit = torch.from_numpy(observation[rows]).to(device), torch.from_numpy(action_unit).to(device)
    shape = (32, len(rows), len(action_unit))
    uniform = torch.rand(shape, generator=block_generator(0, _STREAM, 0)).to(device) * 2.0 - 1.0
    with torch.no_grad():
        q = values.q(s.expand(32, -1, -1), unit * uniform + (1.0 - unit) * values.act(s)).amin(0)
    return max(float(q.std(0).mean()), 1e-6)
