"""V learned on inside a world model that is known, and inside one that was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Line, content, described, learned_pendulum, log_of

from ipd_ray.artifacts import Workspace
from ipd_ray.config import PlannerConfig, RefineConfig, ValuesConfig
from ipd_ray.data.transitions import Log
from ipd_ray.imagine.refine import RefineTrainer, fit_refined
from ipd_ray.training import exhaust, train
from ipd_ray.values.networks import ValueFunctions

GAMMA = 0.9
PLANNER = PlannerConfig(kind="gradient", horizon=2, iterations=2)


def line_log() -> Log:
    """x from 0 to 1 in steps of 0.1, over and over, each episode cut off at 1."""
    episode = (np.arange(11)[:, None] / 10, np.full((10, 1), 0.1), np.ones(10), False)
    return log_of([episode] * 4, discount=GAMMA)


def values_of_log(log: Log) -> ValueFunctions:
    """V of some size everywhere, and a behaviour policy that hardly moves; both untrained."""
    torch.manual_seed(0)
    model = ValueFunctions(1, 1, ValuesConfig(width=64, layers=2))
    model.return_mean.fill_(5.0)
    with torch.no_grad():
        for parameter in model.behaviour_net.parameters():
            parameter.zero_()
        model.behaviour_net.out.bias.fill_(float(np.arctanh(0.1)))
    return model.requires_grad_(False)


def trainer_of(world: Line, log: Log, **settings: Any) -> RefineTrainer:
    config = RefineConfig(**{"starts": 8, "length": 6, "updates": 300, "noise_std": 0.0, "rounds": 1, **settings})
    return RefineTrainer(log, values_of_log(log), world, PLANNER, config, seed=0, device="cpu")


def test_returns_by_hand():
    # a = 0.1 always; x' = x + a earns 1 each; the episode ends beyond 0.75: the step from 0.7 is the last.
    log, world = line_log(), Line(lambda s, s2: torch.ones_like(s), ended=lambda s2: (s2 > 0.75).float())
    trainer = trainer_of(world, log, length=4)
    start = np.array([[0.5], [0.0]], np.float32)  # one start an elite
    observation, outcome = trainer._rolled_out(0, start, trace=1.0)
    found = {round(float(x), 2): float(y) for x, y in zip(observation[:, 0], outcome, strict=True)}
    assert sorted(found) == [0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7]
    assert (found[0.7], found[0.6]) == (pytest.approx(1.0), pytest.approx(1.9))
    assert found[0.5] == pytest.approx(1.0 + 0.9 * 1.9)
    tail = float(trainer.model.v(torch.tensor([[0.4]]))[0].detach())
    assert found[0.0] == pytest.approx(1 + 0.9 + 0.81 + 0.729 + 0.6561 * tail, abs=1e-4)
    # At lambda 0 each state asks V one step on.
    observation, outcome = trainer._rolled_out(0, start, trace=0.0)
    after = trainer.model.v(observation + 0.1)
    ended = observation[:, 0] > 0.65
    wanted = 1.0 + GAMMA * torch.where(ended, 0.0, after)
    torch.testing.assert_close(outcome, wanted, atol=1e-4, rtol=0)


def test_nothing_is_learned_of_a_step_that_leaves_the_range_of_the_log():
    # The log lies in [0, 1], 5 % of slack: from 0.97 the next state, 1.07, is out.
    log, world = line_log(), Line(lambda s, s2: torch.ones_like(s))
    trainer = trainer_of(world, log, length=2)
    observation, _ = trainer._rolled_out(0, np.array([[0.97], [0.2]], np.float32))
    assert sorted(np.round(observation[:, 0].tolist(), 2)) == [0.2, 0.3]


def test_v_learns_of_an_end_that_the_log_never_saw():
    log, world = line_log(), Line(lambda s, s2: torch.ones_like(s), ended=lambda s2: (s2 > 0.75).float())
    trainer = trainer_of(world, log, starts=60, length=12)
    before = trainer._values.v(torch.tensor([[0.7], [0.1]]))
    exhaust(train(trainer, 300, None))
    after = trainer.model.v(torch.tensor([[0.7], [0.1]]))
    assert after[0] < before[0] - 1.5  # one step to live; V of the log holds it back a little
    assert after[1] > after[0] + 1.0
    assert torch.equal(before, trainer._values.v(torch.tensor([[0.7], [0.1]])))  # step 1's own is left alone


def test_a_training_that_was_cut_off_goes_on_bit_for_bit(tmp_path: Path):
    log, world = line_log(), Line(lambda s, s2: torch.ones_like(s))
    settings = {"updates": 10, "rounds": 2, "noise_std": 0.2}
    whole = trainer_of(world, log, **settings)
    exhaust(train(whole, 20, None))
    for cut in (5, 10, 13):
        first = trainer_of(world, log, **settings)
        exhaust(train(first, cut, None))
        second = trainer_of(world, log, **settings)
        second.load_state({k: v.clone() for k, v in first.state().items()})
        for step in range(cut, 20):
            second.update(step)
        assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), second.state().values(), strict=True))


def test_refined_v_knows_the_planner_better_than_the_log_does(tmp_path: Path):
    learned = learned_pendulum()
    config = RefineConfig(starts=120, length=40, updates=300)
    planner = PlannerConfig(kind="gradient", horizon=4, iterations=4, reach=0.6)
    about = {"values": ValuesConfig(width=32).model_dump(mode="json"), "observation_dim": 3, "action_dim": 1}
    fit_refined(
        learned.log, learned.values, learned.world_model, planner, config, about, seed=0, device="cpu",
        workspace=Workspace(tmp_path / "refine"),
    )
    found = content(described(tmp_path / "refine"))["diagnostics"]
    assert found["rmse"] < 0.8 * found["rmse_log"]
    assert found["v_std"] > 0
