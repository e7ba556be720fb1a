"""The distillation loss by hand, and its sums over workers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Episode, log_of, segments_of
from torch import Tensor

from ipd_ray.config import DistillConfig, PolicyConfig
from ipd_ray.distill.fit import Corpus, DistillTrainer, Material, advantage_weight, critic_spread
from ipd_ray.distill.losses import loss_sums
from ipd_ray.distill.windows import Prompts

# Two windows of two steps, two action dimensions. The first step of the second window is padding.
PI = torch.tensor([[[0.5, 0.0], [0.0, 0.0]], [[9.0, 9.0], [0.0, 1.0]]])
ACTION = torch.tensor([[[0.5, 1.0], [0.0, 0.2]], [[0.0, 0.0], [1.0, 0.0]]])
OBSERVATION = torch.tensor([[[1.0], [2.0]], [[50.0], [3.0]]])
WEIGHT = torch.tensor([[1.0, 2.0], [0.0, 0.5]])


def critic(s: Tensor, a: Tensor) -> Tensor:
    """Q_1 = s * (a_1 + 1), Q_2 = -2 Q_1."""
    q = s[..., 0] * (a[..., 0] + 1.0)
    return torch.stack([q, -2.0 * q])


def test_sums_by_hand():
    # Errors, mean over dimensions: (0 + 1) / 2, .04 / 2, -, (1 + 1) / 2; weighted: .5 + .04 + .5.
    # Q_1: 1 * 1.5, 2 * 1, -, 3 * 1; |Q_2| twice that.
    sums = loss_sums(PI, ACTION, OBSERVATION, WEIGHT, critic, (0, 1))
    assert sums.imitation.item() == pytest.approx(1.04)
    assert (sums.weight.item(), sums.count.item()) == (3.5, 3.0)
    assert (sums.q.item(), sums.q_size.item()) == (6.5, 13.0)


def test_the_critics_can_change_places():
    sums = loss_sums(PI, ACTION, OBSERVATION, WEIGHT, critic, (1, 0))
    assert (sums.q.item(), sums.q_size.item()) == (-13.0, 6.5)


def test_without_a_critic_there_is_no_value_term():
    sums = loss_sums(PI, ACTION, OBSERVATION, WEIGHT, None, (0, 1))
    assert (sums.q.item(), sums.q_size.item(), sums.imitation.item()) == (0.0, 0.0, pytest.approx(1.04))


def test_gradients_by_hand_and_none_on_what_is_masked():
    leaf = PI.clone().requires_grad_(True)
    sums = loss_sums(leaf, ACTION, OBSERVATION, WEIGHT, critic, (0, 1))
    # d/dpi of w * mean over 2 dims of (pi - a)^2 = w (pi - a)
    imitation = torch.autograd.grad(sums.imitation, leaf, retain_graph=True)[0]
    assert imitation.tolist() == [[[0.0, -1.0], [0.0, pytest.approx(-0.4)]], [[0.0, 0.0], [-0.5, 0.5]]]
    # dQ_1/da_1 = s
    value = torch.autograd.grad(sums.q, leaf)[0]
    assert value.tolist() == [[[1.0, 0.0], [2.0, 0.0]], [[0.0, 0.0], [3.0, 0.0]]]
    assert not sums.q_size.requires_grad


def test_advantage_weights_have_mean_one_and_a_limit():
    # mean |A| = 1: e^1, e^-1, over their mean.
    two, four = np.array([1.0, -1.0], np.float32), np.array([4.0, 0.0, 0.0, 0.0], np.float32)
    weight = advantage_weight(two, two, 1.0)
    assert weight.tolist() == pytest.approx([2 / (1 + np.exp(-2)), 2 / (1 + np.exp(2))], rel=1e-5)
    # temperature 10 and A = 2 mean |A| would be e^20; 20 is the limit: 20 over 1, 1, 1.
    weight = advantage_weight(four, four, 10.0)
    assert (weight[0] / weight[1], weight.mean()) == (pytest.approx(20.0), pytest.approx(1.0))
    assert advantage_weight(two, two, 0.0).tolist() == [1.0, 1.0]
    # A plan's step weighs what a step of the log with its advantage weighs.
    plans = advantage_weight(np.array([[1.0, 2.0]], np.float32), two, 1.0)[0]
    assert plans.tolist() == pytest.approx([2 / (1 + np.exp(-2)), 2 * np.e / (1 + np.exp(-2))], rel=1e-5)


@pytest.mark.parametrize("unit", [1.0, 0.1])
def test_the_spread_of_a_linear_critic_over_actions_near_the_log_s(unit: float):
    # Q = 7 s + 3 a: std of a uniform on [-1, 1] is 1 / sqrt 3.
    class Linear:
        def q(self, s: Tensor, a: Tensor) -> Tensor:
            q = 7.0 * s[..., 0] + 3.0 * a[..., 0]
            return torch.stack([q, q + 5.0]) + torch.where(a.abs() > 0.1 + unit, 1e6, 0.0)[..., 0]

        def act(self, s: Tensor) -> Tensor:
            return torch.full_like(s, 0.1)

    states = np.linspace(-9, 9, 500, dtype=np.float32)[:, None]
    spread = critic_spread(Linear(), states, np.array([unit], np.float32), "cpu")  # type: ignore[arg-type]
    assert spread == pytest.approx(unit * 3.0 / np.sqrt(3.0), rel=0.05)


# --- the trainer ------------------------------------------------------------------------------------------------------


def towards(goal: float, slope: float = 1.0) -> Any:
    """Q = -slope (a - goal)^2, the same twice."""

    def q(s: Tensor, a: Tensor) -> Tensor:
        value = -slope * (a[..., 0] - goal) ** 2
        return torch.stack([value, value])

    return q


UNIT = 0.5 / np.sqrt(3.0) / 0.4
"""About what the log's actions, uniform on [-0.5, 0.5], are measured in."""


def trainer(
    q: Any = None, *, reducer: Any = None, weight: Any = None, dropout: float = 0.0, width: Any = 1.0,
    timesteps: Any = "window", **config: Any,
) -> DistillTrainer:
    """A log of random states whose action is half the state times width (of all episodes or each), and two plans."""
    rng = np.random.default_rng(0)
    episodes: list[Episode] = []
    for slope in np.broadcast_to(0.5 * np.asarray(width), 8):
        s = rng.uniform(-1.0, 1.0, (11, 1))
        episodes.append((s, slope * s[:-1], np.zeros(10), False))
    log = log_of(episodes)
    segments = segments_of([3, 25], 3, log, observation=rng.uniform(-1, 1, (2, 4, 1)), action=np.full((2, 3, 1), 0.9))
    material = Material(
        log, segments, np.array([True, True]), np.array([3, 2]), 1.0,
        Prompts(rng.normal(size=80).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)),
        np.ones(80, np.float32) if weight is None else weight, np.ones((2, 3), np.float32), 0.5,
    )
    plain = {
        "updates": 300, "batch_size": 30, "warmup": 10, "learning_rate": 3e-3, "ema": 0.9, "eta": 0.0,
        "imagined_ratio": 0.0, "prompt": "none",
    }
    policy = PolicyConfig(context=3, layers=1, heads=2, width=16, dropout=dropout, timesteps=timesteps)
    distill = DistillConfig.model_validate({**plain, **config})
    corpus = Corpus.of(material, policy, distill)
    return DistillTrainer(corpus, q, policy, distill, seed=0, device="cpu", reducer=reducer)


def learn(t: DistillTrainer, updates: int = 300) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in t.update(step).items()} for step in range(updates)]


def held_out_error(t: DistillTrainer, wanted: Any) -> float:
    """Root mean square of pi - wanted(s) on states that were not learned from, one step each."""
    t.model.load_state_dict(t.policy_state())
    t.model.eval()
    s = torch.linspace(-0.9, 0.9, 41)[:, None, None]
    zero, one = torch.zeros(41, 1), torch.ones(41, 1, dtype=torch.bool)
    with torch.no_grad():
        pi = t.model(zero, s, zero[..., None], zero.long(), one)[:, 0, 0]
    return float((pi - wanted(s[:, 0, 0])).square().mean().sqrt())


def test_imitation_learns_the_actions_of_the_log():
    # 0.5 s; the best constant is 0, wrong by 0.26.
    t = trainer()
    learn(t)
    assert held_out_error(t, lambda s: 0.5 * s) < 0.08 < held_out_error(t, lambda s: 0.0 * s)


def test_the_value_term_draws_the_policy_to_where_q_is_high():
    # L = (pi - s/2)^2 / u^2 + eta / 0.5 (pi - 0.8)^2 with eta u^2 = 2: pi = (s / 2 + 4 * 0.8) / 5.
    t = trainer(towards(0.8), eta=2.0 / UNIT**2, eta_warmup=0.0)
    learn(t)
    assert held_out_error(t, lambda s: (0.5 * s + 3.2) / 5.0) < 0.06


def test_imitation_is_measured_in_units_of_the_log_s_actions():
    # As above, where the log does a tenth of it: a tenth of the unit, and Q draws as much with a hundred times eta.
    t = trainer(towards(0.08, 100.0), eta=2.0 / UNIT**2, eta_warmup=0.0, width=0.1)
    learn(t)
    assert held_out_error(t, lambda s: (0.05 * s + 0.32) / 5.0) < 0.02


def test_steps_that_hardly_an_episode_reaches_are_not_told_apart():
    # Of 8 episodes of 10 steps the longest counts, of a window its own steps.
    assert [int(trainer(timesteps=kind).model.last_timestep) for kind in ("episode", "window")] == [9, 2]


def test_eta_rises_from_zero():
    # eta_warmup 0.5 of 300 updates: update 0 has 1/150 of it. The ratio of the gradients is eta's, at equal policies.
    slow, at_once = (trainer(towards(0.8), eta=2.0, eta_warmup=w).update(0)["gradient_ratio"] for w in (0.5, 0.0))
    assert float(slow / at_once) == pytest.approx(1 / 150, rel=1e-3)


@pytest.mark.parametrize(("scale", "size"), [("std", 0.5), ("mean_abs", None)])
def test_the_value_term_is_divided_by_its_scale(scale: str, size: float | None):
    # Ten times Q: with mean |Q| as scale nothing changes; the spread was given as 0.5 for either, so it is ten times.
    one, ten = (
        trainer(towards(0.8, slope), eta=1.0, eta_warmup=0.0, critic_scale=scale).update(0)["gradient_ratio"]
        for slope in (1.0, 10.0)
    )
    assert float(ten / one) == pytest.approx(10.0 if size else 1.0, rel=1e-3)


def test_plans_are_imitated_where_they_are_mixed_in():
    # The plans act with 0.9 in every state; half of the positions are theirs at a reuse cap that allows it.
    t = trainer(imagined_ratio=0.5, reuse_cap=1000.0)
    learn(t)
    assert t.windows.mixture.imagined_ratio == 0.5
    s, plan = t.windows.gather(t.windows.imagined_ends), t.model.eval()
    with torch.no_grad():
        pi = plan(s.prompt, s.observation, s.action, s.timestep, s.valid)
    assert float((pi[..., 0] - 0.9)[s.weight > 0].abs().mean()) < 0.2


@pytest.mark.parametrize(("weights", "slope"), [([2.0, 0.0], 0.5), ([0.0, 2.0], -0.5)])
def test_weights_choose_what_is_imitated(weights: list[float], slope: float):
    # The second half of the log does the opposite of the first.
    t = trainer(weight=np.repeat(weights, 40).astype(np.float32), width=[1.0] * 4 + [-1.0] * 4)
    learn(t)
    assert held_out_error(t, lambda s: slope * s) < 0.08


def test_the_kept_policy_is_the_moving_average():
    # decay = min(ema, (1 + step) / (10 + step)): after update 0 it is 0.1, so 0.1 old + 0.9 new.
    t = trainer(ema=0.9, warmup=0)
    old = t.model.head.weight.detach().clone()
    t.update(0)
    new = t.model.head.weight.detach()
    assert not torch.equal(old, new)
    assert torch.allclose(t.policy_state()["head.weight"], 0.1 * old + 0.9 * new, atol=1e-7)
    last = trainer(ema=0.0)
    learn(last, 3)
    assert torch.equal(last.policy_state()["head.weight"], last.model.head.weight)


class Pair:
    """Two workers in threads whose sums meet."""

    def __init__(self, world: int):
        self.world = world
        self._barrier = threading.Barrier(world)
        self._parts: list[Tensor] = [torch.empty(0)] * world

    def worker(self, rank: int) -> Any:
        return _Worker(self, rank)

    def sum(self, rank: int, tensor: Tensor) -> Tensor:
        self._parts[rank] = tensor
        self._barrier.wait(30.0)
        total = torch.stack(self._parts).sum(0)
        self._barrier.wait(30.0)
        return total


class _Worker:
    def __init__(self, pair: Pair, rank: int):
        self._pair, self.rank, self.world = pair, rank, pair.world

    def sum(self, tensor: Tensor) -> Tensor:
        return self._pair.sum(self.rank, tensor)


@pytest.mark.parametrize(("scale", "batch_size"), [("std", 31), ("mean_abs", 31), ("std", 1)])
def test_two_workers_learn_what_one_learns(scale: str, batch_size: int):
    # Only the order of sums differs. The batch of 31 is shared unevenly, of the batch of one a worker has nothing.
    config = {
        "eta": 1.0, "imagined_ratio": 0.5, "prompt": "value", "batch_size": batch_size, "critic_scale": scale,
        "weight": np.linspace(0.1, 1.9, 80, dtype=np.float32),
    }
    alone = trainer(towards(0.8), **config)
    lines = learn(alone, 6)
    pair = Pair(2)
    workers = [trainer(towards(0.8), reducer=pair.worker(rank), **config) for rank in range(2)]
    found: list[Any] = [None, None]

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        found[rank] = learn(workers[rank], 6)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    for one, other in zip(lines, found[0], strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-6)
    for name, value in alone.policy_state().items():
        # A key's bias changes nothing: its gradient is rounding, which Adam blows up.
        atol = 1e-2 if name.endswith("qkv.bias") else 2e-5
        assert torch.allclose(value, workers[0].policy_state()[name], atol=atol), name
        assert torch.equal(workers[0].policy_state()[name], workers[1].policy_state()[name]), name
