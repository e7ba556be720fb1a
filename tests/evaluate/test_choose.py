"""Policies play inside a world model that is known, and the better one is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Line, log_of

from ipd_ray.config import ChooseConfig
from ipd_ray.data.transitions import Log
from ipd_ray.evaluate.choose import behind_the_best, first_as_good, imagined_returns
from ipd_ray.world_model.uncertainty import Trust


class Always:
    """The same action everywhere."""

    def __init__(self, action: float):
        self.action = action

    def reset(self, mask: Any = None) -> None:
        """Nothing is remembered."""

    def act_flat(self, observation: Any, reward: Any = None) -> np.ndarray:
        return np.full((len(observation), 1), self.action, np.float32)


def line_log(scale: float = 1.0, reward: float = 1.0, width: float = 1.0, ended: bool = False) -> Log:
    """x from 0 and from 0.1, in ten steps of 0.1, by actions that use the bounds' width; each step earns `reward`."""
    actions = np.resize([1.0, -0.8], (10, 1)) * width
    episodes = [
        (first + np.arange(11)[:, None] / 10, actions, np.full(10, reward), ended and first > 0) for first in (0, 0.1)
    ]
    return log_of(episodes, reward_scale=scale)


CLEAN = ChooseConfig(episodes=4, length=50, noise_std=0.0)


def play(
    action: float, world: Line, log: Log, config: ChooseConfig = CLEAN, seed: int = 0, threshold: float = 1e9,
    policy: Always | None = None,
) -> Any:
    trust = Trust("spread", threshold, 0.05)
    return imagined_returns(policy or Always(action), log, world, config, trust, seed=seed, device="cpu")  # type: ignore


def test_first_observations_are_those_of_the_episodes():
    log = line_log()
    assert log.transitions.observation[log.first_steps(4), 0].tolist() == pytest.approx([0.0, 0.0, 0.1, 0.1])


def test_returns_by_hand():
    # 1 a step, ended beyond 0.75: from 0 eight steps of 0.1, from 0.1 seven; at half the scale returns are twice that.
    world = Line(lambda s, s2: torch.ones_like(s), ended=lambda s2: (s2 > 0.75).float())
    returns, ended, halted = play(0.1, world, line_log(scale=0.5))
    assert returns.tolist() == [16.0, 16.0, 14.0, 14.0] and (ended, halted) == (1.0, 0.0)
    # An episode is no longer than the log's longest, 10 steps; standing still it does not end.
    returns, ended, halted = play(0.0, world, line_log())
    assert returns.tolist() == [10.0] * 4 and (ended, halted) == (0.0, 0.0)


def test_policies_hear_what_they_earn_in_raw_units():
    # prompt=fixed lowers its target by it.
    heard: list[Any] = []

    class Hears(Always):
        def act_flat(self, observation: Any, reward: Any = None) -> np.ndarray:
            heard.append(reward)
            return super().act_flat(observation)

    play(0.1, Line(lambda s, s2: s2), line_log(scale=0.5), policy=Hears(0.1))
    assert heard[0] is None and heard[1].tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4])


def test_states_are_held_near_the_range_of_the_log():
    # The log lies in [0, 1.1]; 5 % over it is where a policy that runs away is held.
    world = Line(lambda s, s2: torch.ones_like(s))
    where: list[float] = []

    class Watched(Always):
        def act_flat(self, observation: Any, reward: Any = None) -> np.ndarray:
            where.append(float(observation.max()))
            return super().act_flat(observation)

    play(0.9, world, line_log(), policy=Watched(0.9))
    assert where[:3] == pytest.approx([0.1, 1.0, 1.155], rel=1e-4) and max(where) == pytest.approx(1.155, rel=1e-4)


@pytest.mark.parametrize(("poorest", "after"), [(-1.0, -1.0), (1.0, 0.0)])
def test_an_episode_is_halted_where_the_model_does_not_know_and_earns_the_poorest_reward(poorest: float, after: float):
    # Two earned a step in the model; beyond 0.45 the elites differ. From 0 the steps from 0, .1, .2, .3, .4 are known,
    # from 0.1 those from .1 to .4; of ten steps the others earn the log's only reward, but no more than an end would:
    # where each step is paid, to leave what is known at once would be as good as to stay for ever.
    class Unsure(Line):
        def step_together(self, observation: Any, action: Any) -> Any:
            following, reward, ended, (mean, log_variance) = super().step_together(observation, action)
            unsure = torch.where(observation > 0.45, 5.0, 0.0)
            return following, reward, ended, (torch.zeros_like(mean), log_variance.clone().fill_(-20.0) + 4 * unsure)

    world = Unsure(lambda s, s2: 2.0 * torch.ones_like(s))
    returns, ended, halted = play(0.1, world, line_log(reward=poorest), threshold=0.1)
    wanted = [5 * 2.0 + 5 * after] * 2 + [4 * 2.0 + 6 * after] * 2
    assert returns.tolist() == wanted and (ended, halted) == (0.0, 1.0)


def test_noise_is_the_same_for_every_policy_and_finds_the_fragile_one():
    # Both stay between 0 and 1 undisturbed; one stands at the edge, where a push ends it.
    edge = Line(lambda s, s2: torch.ones_like(s), ended=lambda s2: (s2 < -0.15).float())
    log = line_log()
    clean = [play(a, edge, log)[0].mean() for a in (0.0, 0.05)]
    assert clean[0] == clean[1] == 10.0
    noisy = ChooseConfig(episodes=100, length=50, noise_std=0.1)
    standing, leaving = (play(a, edge, log, noisy)[0].mean() for a in (0.0, 0.05))
    assert standing < leaving - 0.5
    again = play(0.0, edge, log, noisy)[0].mean()
    assert again == standing != play(0.0, edge, log, noisy, seed=1)[0].mean()


def test_an_episode_is_as_long_as_asked_for_where_the_log_s_longest_ended_by_itself():
    # 10 steps are no limit of time if one of them ended there.
    world = Line(lambda s, s2: torch.ones_like(s))
    assert play(0.0, world, line_log(ended=True))[0].tolist() == [10.0] * 4
    both = log_of([(np.zeros((11, 1)), np.zeros((10, 1)), np.ones(10), True)] * 2)
    assert play(0.0, world, both)[0].tolist() == [50.0] * 4


def test_noise_is_small_where_the_log_s_actions_are():
    # Within a hundredth of its bounds an action of 0.1 would be no noise, but another world.
    edge = Line(lambda s, s2: torch.ones_like(s), ended=lambda s2: (s2 < -0.05).float())
    noisy = ChooseConfig(episodes=100, length=50, noise_std=0.1)
    wide, narrow = (play(0.0, edge, line_log(width=width), noisy)[1] for width in (1.0, 0.01))
    assert narrow == 0.0 < 0.4 < wide


STARTS = np.array([0.0, 100.0, 200.0, 300.0])
SWINGS = np.array([4.0, -6.0, 4.0, -6.0])


def test_candidates_are_compared_by_pairs_of_episodes():
    # Episodes differ by hundreds; the second candidate earns one less in each, the third now more, now less.
    lack, error = behind_the_best(np.stack([STARTS, STARTS - 1.0, STARTS + SWINGS]))
    assert lack.tolist() == [0.0, 1.0, 1.0]
    assert error.tolist() == [0.0, 0.0, 2.5]


def test_the_first_policy_is_kept_unless_another_is_surely_better():
    assert first_as_good(np.stack([STARTS - 1.0, STARTS]), 2.0) == 1
    assert first_as_good(np.stack([STARTS + SWINGS, STARTS]), 2.0) == 0
    assert first_as_good(np.stack([STARTS + SWINGS, STARTS]), 0.1) == 1
    assert first_as_good(np.stack([STARTS - 50.0, STARTS + SWINGS, STARTS]), 2.0) == 1


def test_episodes_are_rounded_up_to_the_elites():
    config = ChooseConfig(episodes=3, length=5, noise_std=0.0)
    assert len(play(0.0, Line(lambda s, s2: torch.ones_like(s)), line_log(), config)[0]) == 4


@pytest.mark.usefixtures("one_process")
def test_what_a_run_keeps_is_the_candidate_that_did_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from small_runs import LOG, SETTINGS, write_log

    from ipd_ray import Policy, run
    from ipd_ray.artifacts import Artifact
    from ipd_ray.config import load
    from ipd_ray.runs import open_run

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    write_log(tmp_path / "minari")
    folder = tmp_path / "runs" / "one"
    run(LOG, load("demo", None, [*SETTINGS, "choose.tolerance=0"]), run_dir=folder)
    opened = open_run(str(folder))
    choose = Artifact(opened.artifact("choose"))
    found = choose.diagnostics["candidates"]
    assert len(found) == 8 and {c["variant"] for c in found} == {"ipd", "no_imagination"}
    assert [c["variant"] for c in found] == ["ipd"] * 4 + ["no_imagination"] * 4
    assert [c["step"] for c in found] == [40, 30, 20, 10] * 2
    best = next(c for c in found if all(c[name] == choose.diagnostics[name] for name in ("variant", "step")))
    assert best["return_mean"] == max(c["return_mean"] for c in found)
    part = "distill" if best["variant"] == "ipd" else "distill:no_imagination"
    source = Artifact(opened.artifact(part))
    wanted = dict(source.snapshots()).get(best["step"], source.tensors())
    kept = choose.tensors()
    assert all(torch.equal(kept[name], value) for name, value in wanted.items())
    assert Policy.load(folder).act(np.zeros((2, 3), np.float32)).shape == (2, 1)
    scores = Artifact(opened.artifact("evaluate")).diagnostics
    assert len(scores["curve"]) == 4
    if best["variant"] == "ipd":
        assert scores["returns"] in [point["returns"] for point in scores["curve"]]
