"""Episodes in an environment whose returns are known."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from method_fixtures import log_of, spec_of

from ipd_ray.config import EvaluateConfig
from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.errors import UserError
from ipd_ray.evaluate.episodes import NoEnvironment, arena_of, environment_maker, evaluate, portable

ID = "IpdTestStairs-v0"


class Stairs(gym.Env[Any, Any]):
    """Observation: the step. Step t rewards t + action. It ends after 2 + seed % 3 steps, by termination."""

    def __init__(self, action_dim: int = 1, longest: int | None = None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self._longest = longest

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._length = self._longest or 2 + (seed or 0) % 3
        self._step = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self._step += 1
        ended = self._step >= self._length
        return np.full(1, self._step, np.float32), self._step + float(action[0]), ended, False, {}


class Goal(Stairs):
    """Step 3 reaches the goal, step 4 has left it. Whoever begins says that of the goal before."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0], {"is_success": np.bool_(True)}

    def step(self, action: Any) -> Any:
        observation, reward, ended, _, _ = super().step(action)
        told = {"is_success": np.bool_(self._step == 3)} if self._step > 1 else {}
        return observation, reward, ended, False, told


class Half:
    """A policy that always acts with 0.5, and notes what it is told."""

    def __init__(self, spec: Spec):
        self.spec, self.discount, self.rewards = spec, 0.5, []
        self.observations: list[Any] = []

    def reset(self) -> None:
        self.rewards, self.observations = [], []

    def act(self, observation: Any, reward: Any) -> np.ndarray:
        self.observations.append(np.array(observation))
        self.rewards.append(reward)
        return np.full((len(observation), 1), 0.5, np.float32)

    def value(self, observation: Any) -> np.ndarray:
        return np.full(len(observation), 8.0)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gym.register(ID, entry_point="test_episodes:Stairs")
    yield
    del gym.registry[ID]


def half(**changes: Any) -> Any:
    return Half(spec_of(1, 1, **changes))


def run(policy: Any, **config: Any) -> dict[str, Any]:
    return evaluate(policy, EvaluateConfig.model_validate({"environment": ID, "episodes": 3, "seed": 0, **config}))


def test_returns_by_hand_where_episodes_differ_in_length():
    # 2, 3 and 4 steps of 1.5, 2.5, 3.5, 4.5.
    scores = run(half())
    assert scores["lengths"] == [2, 3, 4]
    assert scores["returns"] == [4.0, 7.5, 12.0]
    assert scores["return_mean"] == pytest.approx(23.5 / 3)
    assert scores["return_std"] == pytest.approx(np.std([4.0, 7.5, 12.0]))
    # gamma 0.5: 2.75, 2.75 + .875, 3.625 + .5625
    assert scores["discounted_mean"] == pytest.approx((2.75 + 3.625 + 4.1875) / 3)
    assert (scores["value_at_start"], scores["normalised"], scores["episodes"]) == (8.0, None, 3)


def test_scores_are_normalised_by_the_references_of_the_log():
    # (23.5 / 3 - 4) / (8 - 4)
    scores = run(half(ref_min_score=4.0, ref_max_score=8.0))
    assert scores["normalised"] == pytest.approx(100.0 * (23.5 / 3 - 4.0) / 4.0)


def test_seeds_are_consecutive():
    # Seeds 2, 3, 4: lengths 2 + (2, 0, 1).
    assert run(half(), seed=2)["lengths"] == [4, 2, 3]


def test_the_policy_sees_each_observation_with_the_reward_before_it():
    policy = half()
    run(policy, episodes=1, seed=2)
    assert [o.tolist() for o in policy.observations] == [[[0]], [[1]], [[2]], [[3]]]
    assert [None if r is None else r.tolist() for r in policy.rewards] == [None, [1.5], [2.5], [3.5]]


def test_an_episode_may_be_cut():
    assert run(half(), max_steps=3, seed=2)["lengths"] == [3, 2, 3]


def test_v_follows_where_time_is_up_and_nothing_where_an_episode_ends_itself():
    # Rewards 1.5, 2.5, 3.5, gamma 0.5. The first is cut after 3 steps, where V says 24 of observation 3, worth
    # 24 / 8; the second ends itself after 2, the third after 3, in the step that would have cut it.
    policy = half()
    policy.value = lambda observation: 8.0 * observation[:, 0]
    scores = run(policy, max_steps=3, seed=2)
    assert scores["lengths"] == [3, 2, 3] and scores["length_mean"] == pytest.approx(8 / 3)
    assert scores["discounted_mean"] == pytest.approx((3.625 + 3.0 + 2.75 + 3.625) / 3)


def test_a_goal_counts_if_the_episode_ever_reaches_it():
    # Lengths 2, 3, 4: the first is too short, the last leaves its goal again.
    scores = run(half(), environment="test_episodes:Goal")
    assert scores["successes"] == [False, True, True]
    assert scores["success"] == pytest.approx(2 / 3)
    plain = run(half())
    assert plain["success"] is None and plain["successes"] is None


def test_the_environment_of_the_log_is_found_again():
    policy = half(env_spec=gym.spec(ID).to_json())
    assert run(policy, environment=None)["returns"] == [4.0, 7.5, 12.0]


def test_a_users_environment_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_stairs.py").write_text(
        "from test_episodes import Stairs\n\ndef make(**kwargs):\n    return Stairs(longest=3)\n\nsize = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(half(), environment="my_stairs:make")["lengths"] == [3, 3, 3]
    with pytest.raises(UserError, match="my_stairs:maker cannot be imported"):
        run(half(), environment="my_stairs:maker")
    with pytest.raises(UserError, match="is int, not a function"):
        run(half(), environment="my_stairs:size")


def test_a_log_without_an_environment_says_how_to_give_one():
    with pytest.raises(NoEnvironment, match=r"by-hand-v0 names no environment; give one with evaluate\.environment="):
        environment_maker(half().spec, None)


def log(*lengths: int, ended: bool = False, **changes: Any) -> Transitions:
    """Episodes of these lengths, of one entry and one action; ended: by themselves."""
    found = log_of([(np.zeros((n + 1, 1)), np.zeros((n, 1)), np.ones(n), ended) for n in lengths]).transitions
    return replace(found, spec=spec_of(1, 1, **changes))


def test_an_environment_that_is_not_installed_is_no_environment():
    gone = gym.spec(ID).to_json().replace("Stairs", "Gone")
    with pytest.raises(NoEnvironment, match="the environment of test/by-hand-v0 cannot be made here"):
        arena_of(log(3, 4, env_spec=gone), EvaluateConfig())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("Pendulum-v1", r"its observation space is Box\(.*\(3,\).*, the log's is Box of shape \(1,\)"),
        ("CartPole-v1", r"its action space is Discrete\(2\), the log's has shape \(1,\)"),
    ],
)
def test_an_environment_that_is_not_the_log_s_own_is_no_environment(other: str, said: str):
    strange = log(3, 4, env_spec=gym.spec(other).to_json())
    with pytest.raises(NoEnvironment, match=f"test/by-hand-v0 does not fit the log: {said}: set evaluate.environment"):
        arena_of(strange, EvaluateConfig())
    with pytest.raises(UserError, match=f"evaluate.environment={other} does not fit the log: {said}"):
        arena_of(log(3, 4, env_spec=gym.spec(ID).to_json()), EvaluateConfig(environment=other))


@pytest.mark.parametrize(
    ("own", "ended", "asked", "steps"),
    [
        (None, False, None, 7),  # the log's
        (10**6, False, None, 7),  # as good as none
        (None, True, None, 1000),  # of the log's nothing is known
        (50, False, None, 50),
        (50, True, None, 50),
        (None, False, 9, 9),
        (50, False, 90, 90),
    ],
)
def test_an_episode_s_limit_is_the_user_s_or_the_environment_s_or_the_log_s(
    own: int | None, ended: bool, asked: int | None, steps: int
):
    spec = copy.deepcopy(gym.spec(ID))
    spec.max_episode_steps = own
    found = arena_of(log(4, 7, ended=ended, env_spec=spec.to_json()), EvaluateConfig(max_steps=asked))
    assert found.config.max_steps == steps
    assert found.own_limit == (own if own == 50 else None)


def limited() -> Any:
    return gym.wrappers.TimeLimit(Stairs(longest=30), 12)


def test_a_users_own_limit_of_time_is_seen():
    found = arena_of(log(4, 7), EvaluateConfig(environment="test_episodes:limited"))
    assert (found.own_limit, found.config.max_steps, found.config.environment) == (12, 12, "test_episodes:limited")


def test_what_is_registered_here_alone_is_found_by_who_knows_nothing_of_it():
    gym.register("IpdTestHere-v0", entry_point="test_episodes:Stairs", kwargs={"longest": 3})
    arena = arena_of(log(4, 7), EvaluateConfig(environment="IpdTestHere-v0", episodes=2))
    del gym.registry["IpdTestHere-v0"]
    assert evaluate(Half(arena.spec), arena.config)["lengths"] == [3, 3]


@pytest.mark.parametrize(
    ("entry", "arguments"), [(Stairs, {}), ("__main__:Stairs", {}), ("test_episodes:Stairs", {"longest": {1, 2}})]
)
def test_what_workers_cannot_have_is_refused(entry: Any, arguments: dict[str, Any]):
    gym.register("IpdTestHere-v0", entry_point=entry, kwargs=arguments)
    try:
        with pytest.raises(UserError, match=r"IpdTestHere-v0 is registered with .*=module:function, or =package:Na"):
            portable(None, "IpdTestHere-v0")
    finally:
        del gym.registry["IpdTestHere-v0"]
    with pytest.raises(UserError, match="environment=__main__:make: workers have no part in this script"):
        portable(None, "__main__:make")


def test_a_mistyped_environment_names_the_near_one():
    with pytest.raises(UserError, match=f"'IpdTestStair-v0' is no Gymnasium id here.*'{ID}'.*package:IpdTestStair-v0"):
        environment_maker(half().spec, "IpdTestStair-v0")


def test_the_package_that_registers_an_environment_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ipd_test_package.py").write_text(
        "import gymnasium\n\ngymnasium.register('IpdTestPackage-v0', entry_point='test_episodes:Stairs')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(half(), environment="ipd_test_package:IpdTestPackage-v0")["lengths"] == [2, 3, 4]
    del gym.registry["IpdTestPackage-v0"]


def test_another_action_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wide_stairs.py").write_text(
        "from test_episodes import Stairs\n\ndef make(**kwargs):\n    return Stairs(action_dim=2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"its action space is Box\(.*\), the log's has shape \(1,\)"):
        run(half(), environment="wide_stairs:make")
    with pytest.raises(UserError, match="its action space is Discrete"):
        run(half(), environment="CartPole-v1")


def test_max_steps_cuts_a_users_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "long_stairs.py").write_text(
        "from test_episodes import Stairs\n\ndef make():\n    return Stairs(longest=30)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(half(), environment="long_stairs:make", max_steps=3)["lengths"] == [3, 3, 3]


def test_a_users_class_by_dotted_path():
    assert run(half(), environment="test_episodes:Stairs")["lengths"] == [2, 3, 4]
