"""Replaying imagined segments in the simulator: states are restored, and the numbers are what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import replay
from replay import Rolled, Simulator, Starts, StateRule
from small_runs import LOG, SETTINGS, write_log

from ipd_ray import run
from ipd_ray.config import load
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Log, Spec, Transitions
from ipd_ray.errors import UserError
from ipd_ray.runs import RunFolder

MUJOCO = ["HalfCheetah-v5", "Hopper-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Walker2d-v5"]


def spec_of(env: gymnasium.Env[Any, Any]) -> Spec:
    observed, acted = env.observation_space, env.action_space
    assert isinstance(acted, gymnasium.spaces.Box) and observed.shape and env.spec
    space = {"type": "Box", "shape": list(observed.shape), "dtype": "float32"}
    low, high = acted.low.tolist(), acted.high.tolist()
    return Spec("test", space, low, high, list(acted.shape), str(acted.dtype), env.spec.to_json())


def steps_of(env: Any, spec: Spec, steps: int) -> list[tuple[Any, ...]]:
    """(observation, action in [-1, 1], next observation, reward) of an episode of random actions."""
    rng = np.random.default_rng(0)
    s, out = spec.flatten_observation(env.reset(seed=0)[0]), []
    for _ in range(steps):
        action = rng.uniform(-0.5, 0.5, spec.action_dim).astype(np.float32)
        shown, reward, *_ = env.unwrapped.step(spec.unscale_action(action))
        following = spec.flatten_observation(shown)
        out.append((s, action, following, float(reward)))
        s = following
    return out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["Pendulum-v1", *MUJOCO])
def test_a_state_set_from_its_observation_shows_it_again_and_steps_as_the_environment_did(name: str) -> None:
    if name in MUJOCO:
        pytest.importorskip("mujoco", reason=f"mujoco is not installed: {name} is not checked")
    env = gymnasium.make(name)
    spec = spec_of(env)
    happened = steps_of(env, spec, 15)
    env.close()
    sim = replay.simulator(spec, None)
    whole = [step for step in happened if not sim.rule.hidden(step[0][None])[0]]
    assert len(whole) >= 6
    for s, action, following, reward in reversed(whole):  # backwards: nothing may be left over from the step before
        columns = slice(0, 8) if name == "InvertedDoublePendulum-v5" else slice(None)  # the last is a force
        np.testing.assert_allclose(sim.put(s)[columns], s[columns], atol=1e-5)
        rolled = sim.roll(Starts(s[None], [s[:0]]), lambda row, k, s, action=action: action, 1)
        np.testing.assert_allclose(rolled.observation[0, 1][columns], following[columns], atol=2e-4, rtol=1e-4)
        assert rolled.reward[0, 0] == pytest.approx(reward, abs=1e-3)
    sim.env.close()


@pytest.mark.parametrize(("name", "column"), [("Hopper-v5", 5), ("Walker2d-v5", 8), ("InvertedDoublePendulum-v5", 5)])
def test_clipped_velocities_count_as_hidden(name: str, column: int) -> None:
    s = np.zeros((3, 17), np.float32)
    s[0, column], s[1, column], s[2, column - 1] = -10.0, 9.99, 10.0  # clipped, not clipped, a position
    assert replay.RULES[name].hidden(s).tolist() == [True, False, False]


def test_an_environment_without_a_rule_is_refused_with_those_that_have_one() -> None:
    spec = Spec("test", {}, [], [], [], "int64", gymnasium.spec("CartPole-v1").to_json())
    with pytest.raises(UserError, match=r"CartPole-v1.*Hopper-v5.*Pendulum-v1"):
        replay.simulator(spec, None)


# ---- a simulator to count by hand: x' = x + a, reward x', over at 4; shows x, but nothing beyond 3.5


class Line:
    """A point on a line."""

    x = 0.0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.x += float(action[0])
        return self._get_obs(), self.x, self.x >= 4.0, False, {}

    def _get_obs(self) -> np.ndarray:
        return np.array([min(self.x, 3.5)], np.float32)


SPEC = Spec("line", {"type": "Box", "shape": [1], "dtype": "float32"}, [-1.0], [1.0], [1], "float32")


def line() -> Simulator:
    rule = StateRule(lambda env, s: setattr(env, "x", float(s[0])), lambda s: s[:, 0] >= 3.5)
    return Simulator(Line(), SPEC, rule)


def log_of(*episodes: list[float], discount: float = 0.5, scale: float = 2.0) -> Log:
    """A log of points: each episode is a list of x, shown as the simulator shows them."""
    x = [np.array(e, np.float32) for e in episodes]

    def column(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)[:, None]

    shown = [np.minimum(e, 3.5) for e in x]
    transitions = Transitions(
        column([e[:-1] for e in shown]), column([np.diff(e) for e in x]), np.concatenate([e[1:] for e in x]),
        column([e[1:] for e in shown]), np.concatenate([e[1:] >= 4.0 for e in x]),
        np.cumsum([0, *(len(e) - 1 for e in x)]), SPEC,
    )
    return Log(transitions, discount, scale, np.zeros(len(x), bool))


def test_a_start_that_hides_its_state_is_reached_by_the_logs_own_actions() -> None:
    log, sim = log_of([2.75, 3.25, 3.75, 3.875, 3.25], [3.75, 3.0]), line()
    origin = replay.origins(log, sim.rule)
    assert origin.tolist() == [0, 1, 1, 1, -1]  # the second episode begins hidden
    rolled = sim.roll(Starts.at(log, np.array([3]), origin), lambda row, k, s: np.array([0.0]), 1)
    assert rolled.reward.tolist() == [[3.875]]  # x itself, where the observation said 3.5


def test_the_self_check_passes_on_the_simulators_own_log_and_fails_on_another() -> None:
    log, sim = log_of([0.0, 0.5, 1.5, 1.0], [3.0, 3.25, 4.0]), line()
    rows, origin = np.arange(5), replay.origins(log, sim.rule)
    check = replay.self_check(log, sim, rows, origin)
    assert check["trusted"] and check["termination_agrees"] == 1.0 and check["state_error"]["99%"] < 1e-5
    log.transitions.reward[:] *= 1.1
    assert not replay.self_check(log, sim, rows, origin)["trusted"]


def two_segments() -> Segments:
    """From x = 0 and from x = 3 one step right, twice. Imagined are a wrong second reward, and that nothing ends."""
    return Segments(
        index=np.array([0, 2]), episode=np.array([0, 1]), timestep=np.array([0, 0]), control=np.array([False, True]),
        observation=np.array([[0, 1, 2], [3, 4, 5]], np.float32)[..., None],
        action=np.ones((2, 2, 1), np.float32), imitated=np.ones((2, 2, 1), np.float32),
        reward=np.array([[2, 6], [8, 10]], np.float32),
        terminal=np.zeros((2, 2), bool), uncertainty=np.zeros((2, 2), np.float32),
        value=np.array([[0, 1, 2], [3, 4, 5]], np.float32),
        own_reward=np.array([[0, 0], [6, 6]], np.float32), own_terminal=np.zeros((2, 2), bool),
        own_length=np.array([2, 2]), own_value=np.array([[0, 0, 0], [3, 3, 3]], np.float32),
    )


@pytest.fixture
def replayed() -> tuple[Log, Segments, Rolled, replay.Outcomes]:
    log, sim, segments = log_of([0, 0, 0], [3, 3, 3]), line(), two_segments()
    starts = Starts.at(log, segments.index, replay.origins(log, sim.rule))
    real = sim.roll(starts, lambda row, k, s: segments.action[row, k], 2)
    idle = sim.roll(starts, lambda row, k, s: np.array([0.0]), 2)
    v: Callable[[np.ndarray], np.ndarray] = lambda s: s[:, 0]  # noqa: E731
    return log, segments, real, replay.outcomes(segments, np.array([2, 2]), real, idle, v, log)


def test_worth_is_discounted_and_ends_with_v_unless_the_episode_did(replayed: tuple[Any, ...]) -> None:
    outcome = replayed[3]
    # 2 + 6/2 + V(2)/4 and 8 + 10/2 + V(5)/4; really 2 + 4/2 + V(2)/4, and 8, where x = 4 ends it
    assert outcome.imagined.tolist() == [5.5, 14.25]
    assert outcome.real.tolist() == [4.5, 8.0]
    # staying: 0, and 6 + 6/2 + V(3)/4; so does the policy that does nothing
    assert outcome.own.tolist() == outcome.behaviour.tolist() == [0.0, 9.75]
    assert outcome.imagined_reward.tolist() == [4.0, 9.0] and outcome.real_reward.tolist() == [3.0, 4.0]
    assert outcome.own_reward.tolist() == [0.0, 6.0]
    assert outcome.real_end.tolist() == [False, True] and not outcome.imagined_end.any()


def test_a_group_is_summed_up_in_units_of_vs_spread_and_its_lie_splits_without_rest(replayed: tuple[Any, ...]) -> None:
    numbers = replay.compare(replayed[3], value_std=0.5)
    assert numbers["gain"]["imagined"] == pytest.approx((5.5 + 4.5) / 2 / 0.5)
    assert numbers["gain"]["real"] == pytest.approx((4.5 - 1.75) / 2 / 0.5)
    assert numbers["share"]["real_beats_own"] == 0.5 and numbers["share"]["imagined_beats_own"] == 1.0
    assert numbers["termination"] == {"both": 0.0, "real_only": 0.5, "imagined_only": 0.0}
    lie = numbers["lie"]
    assert lie["total"] == pytest.approx((1.0 + 6.25) / 2 / 0.5)
    assert lie["missed_termination"] == pytest.approx(6.25 / 2 / 0.5)  # the second, as a whole
    assert lie["reward"] == pytest.approx(1.0 / 2 / 0.5)  # the first: (6 - 4) / 2
    assert lie["end_value"] == lie["wrong_termination"] == 0.0
    assert replay.compare(replayed[3].take(np.array([], int)), 0.5) == {"segments": 0}


def test_errors_by_depth_count_only_steps_that_both_sides_took(replayed: tuple[Any, ...]) -> None:
    log, segments, real, _ = replayed
    first, second = replay.by_depth(segments, np.array([2, 2]), real, log)
    # x is 0 or 3 in the log, spread 1.5; the simulator shows 3.5 where 4 was imagined
    assert first["segments"] == 2 and first["state"] == pytest.approx(np.median([0.0, 0.5 / 1.5])) == 1 / 6
    assert first["still"] == pytest.approx(np.median([1.0, 0.5]) / 1.5)
    assert second["segments"] == 1 and second["state"] == 0.0
    assert second["reward"] == second["reward_bias"] == pytest.approx(1.0)


def test_standard_errors_count_episodes() -> None:
    # sums of deviations -2 and 2: sqrt((4 + 4) * 2 / 1) / 4
    assert replay.clustered_error(np.array([1.0, 1.0, 3.0, 3.0]), np.array([7, 7, 9, 9])) == pytest.approx(1.0)
    assert replay.clustered_error(np.array([1.0, 3.0]), np.array([0, 1])) == pytest.approx(1.0)
    assert np.isnan(replay.clustered_error(np.array([1.0, 3.0]), np.array([0, 0])))


def test_each_group_is_drawn_from_its_own_members_and_none_that_cannot_be_reached() -> None:
    accepted, control, reachable = (np.arange(100) % n == r for n, r in ((2, 0), (5, 0), (3, 0)))
    drawn = replay.draw(accepted, control, ~reachable, 10, seed=3)
    assert not reachable[drawn.rows].any()
    assert [drawn.groups[name].sum() for name in ("all", "accepted", "control")] == [10, 10, 10]
    assert accepted[drawn.rows[drawn.groups["accepted"]]].all() and control[drawn.rows[drawn.groups["control"]]].all()
    assert not accepted[drawn.rows[drawn.groups["rejected"]]].any()
    assert (drawn.rows == replay.draw(accepted, control, ~reachable, 10, seed=3).rows).all()


ACTOR = ("planner.kind=actor", "actor.reaches=[0.2]", "actor.rounds=1", "actor.starts=20", "actor.length=5",
         "actor.value_updates=4", "actor.updates=4", "correct.walks=4", "correct.length=6")  # fmt: skip


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("who", [(), ACTOR], ids=["plans", "an actor"])
def test_a_run_is_replayed_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    write_log(tmp_path / "data")
    folder = tmp_path / "runs" / "one"
    words = [*SETTINGS, *who, "runtime.actors=1", "runtime.threads=1"]
    run(LOG, load("demo", None, words), run_dir=folder, until="imagine")
    result = replay.replay(RunFolder(folder), 10, follow=5, followed=4)
    # the log's rewards are 17 higher than the simulator's: the check must say so, and that the states are right
    assert not result["self_check"]["trusted"] and result["self_check"]["state_error"]["99%"] < 1e-3
    assert result["self_check"]["reward_error"]["median"] == pytest.approx(17.0, rel=1e-3)
    assert result["groups"]["all"]["segments"] <= 10 and result["depth"]["floor"][-1]["state"] < 1e-3
    assert sum(map(len, result["points"].values())) <= replay.POINTS
    said = replay.describe(json.loads(json.dumps(result, allow_nan=False)))
    assert "FAILED" in said
    acted = {"behaviour", "actor"} if who else {"behaviour"}
    if result["follow"]["segments"]:
        assert set(result["follow"]["gain"]) == {"plan", *acted} and ("the actor acting" in said) == bool(who)
    replay.plot(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_run_that_has_not_imagined_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "store": str(tmp_path), "content_hash": "x" * 64}))
    with pytest.raises(UserError, match="not in the store"):
        replay.replay(RunFolder(tmp_path), 10)


