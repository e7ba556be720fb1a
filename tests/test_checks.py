"""What is said of a run before it begins, where it is allowed but hardly meant."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from method_fixtures import log_of

from ipd_ray.checks import remarks
from ipd_ray.config import RunConfig, load
from ipd_ray.data.transitions import Transitions, log_remarks


def transitions(
    lengths: list[int], *, reward: float | None = None, terminated: bool = True, low: float = -2.0, high: float = 2.0
) -> Transitions:
    rng = np.random.default_rng(0)
    return replace_bounds(
        log_of([
            (
                rng.normal(size=(n + 1, 3)), rng.uniform(-1, 1, (n, 1)),
                rng.normal(size=n) if reward is None else np.full(n, reward), terminated,
            )
            for n in lengths
        ]).transitions, low, high,
    )  # fmt: skip


def replace_bounds(t: Transitions, low: float, high: float) -> Transitions:
    return replace(t, spec=replace(t.spec, action_low=[low], action_high=[high], action_shape=[1]))


@pytest.mark.parametrize(
    ("lengths", "terminated", "said"),
    [
        ([30] * 19 + [12], True, "95% of the episodes that terminate do so after exactly 30 steps"),
        ([30] * 17 + [12] * 3, True, None),  # some fail before
        ([30] * 20, False, None),
        ([30] * 9, True, None),  # too few to tell
        ([1] * 20, True, None),  # bandits
    ],
)
def test_limits_of_time_that_are_logged_as_terminations(lengths: list[int], terminated: bool, said: str | None):
    found = log_remarks(transitions(lengths, terminated=terminated))
    assert found == [] if said is None else said in " ".join(found)


@pytest.mark.parametrize(
    ("reward", "terminated", "said"),
    # 1 a step until a failure: who lives longer is better.
    [(0.0, True, True), (0.0, False, True), (1.0, False, True), (1.0, True, False), (None, False, False)],
)
def test_rewards_that_tell_nothing(reward: float | None, terminated: bool, said: bool):
    found = log_remarks(transitions([20, 30, 25], reward=reward, terminated=terminated))
    assert ("nothing tells a good action from a bad one" in " ".join(found)) == said


@pytest.mark.parametrize(
    ("entry", "said"), [(lambda t: 1.7e9 + t, True), (lambda t: 0.01 * t, False), (lambda t: 5.0 + 0 * t, False)]
)
def test_what_float32_rounds_away_is_said(entry: Callable[[np.ndarray], np.ndarray], said: bool):
    t = transitions([200])
    t.observation[:, 1] = entry(np.arange(200.0))
    found = " ".join(log_remarks(t))
    assert ("entry 1 of the observation, of size 1.7e+09, varies no more than float32 rounds it" in found) == said


@pytest.mark.parametrize(("bounds", "said"), [((0.0, 1.0), True), ((-2.0, 2.0), False), ((-3.0, 3.0), False)])
def test_an_environment_whose_actions_reach_farther_than_the_log_s(bounds: tuple[float, float], said: bool):
    config = load("demo", overrides=["evaluate.environment=Pendulum-v1"])
    found = " ".join(remarks(config, transitions([20, 30], low=bounds[0], high=bounds[1])))
    assert ("takes actions from -2 to 2, the log's lie from 0 to 1" in found) == said


def own(t: Transitions, **changes: Any) -> Transitions:
    """The log with Pendulum as its own environment."""
    spec = copy.deepcopy(gymnasium.spec("Pendulum-v1"))  # the registry's own is everybody's
    spec.max_episode_steps = changes.pop("max_episode_steps", 200)
    return replace(t, spec=replace(t.spec, env_spec=spec.to_json()))


def test_the_log_s_own_environment_is_looked_at_like_another():
    found = " ".join(remarks(load("demo"), own(transitions([20, 30], low=0.0, high=1.0))))
    assert "the log's environment takes actions from -2 to 2, the log's lie from 0 to 1" in found
    strange = own(transitions([20, 30]))
    strange = replace(strange, spec=replace(strange.spec, action_shape=[1, 1]))
    found = " ".join(remarks(load("demo"), strange))
    assert "there will be no evaluation: the environment of test/by-hand-v0 does not fit the log" in found


@pytest.mark.parametrize(
    ("limit", "terminated", "asked", "said"),
    [
        (None, False, [], "shows no limit of time: evaluated episodes are cut after 30 steps, as the log's are"),
        (10**6, False, [], "shows no limit of time: evaluated episodes are cut after 30 steps, as the log's are"),
        (None, True, [], "are cut after 1,000 steps, the log's longest ended itself after 30"),
        (200, False, [], "cuts episodes after 200 steps, the log's last 30 at most: the returns will not compare"),
        (200, True, [], None),
        (31, False, [], None),
        (200, False, ["evaluate.max_steps=200"], None),
    ],
)
def test_other_limits_of_time_than_the_log_s(limit: int | None, terminated: bool, asked: list[str], said: str | None):
    t = own(transitions([20, 30], terminated=terminated), max_episode_steps=limit)
    found = " ".join(remarks(load("demo", overrides=asked), t))
    assert said in found if said else "cut" not in found


def test_where_cuts_are_no_limit_of_time_none_is_recommended():
    t = own(transitions(list(range(11, 31)), terminated=False), max_episode_steps=200)
    found = " ".join(remarks(load("demo"), t))
    assert "cuts episodes after 200 steps, the log's last 30 at most: the returns will not compare." in found


def test_full_sizes_on_a_cpu_are_remarked_on():
    t = transitions([20, 30])
    assert "--preset gym-small" in " ".join(remarks(RunConfig.model_validate({"runtime": {"device": "cpu"}}), t))
    assert "--preset gym-small" not in " ".join(remarks(load("gym-small", overrides=["runtime.device=cpu"]), t))


def test_who_stops_reading_gets_no_traceback():
    command = f"{sys.executable} -m ipd_ray.cli config | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141) and done.stderr == "" and done.stdout.count("\n") == 1
