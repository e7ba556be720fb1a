"""A world model learned where the world is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Episode, content, described, log_of, tensors_of
from torch import Tensor

from ipd_ray.artifacts import Workspace
from ipd_ray.config import WorldModelConfig
from ipd_ray.data.transitions import Log
from ipd_ray.errors import UserError
from ipd_ray.training import set_threads
from ipd_ray.world_model.ensemble import WorldModel
from ipd_ray.world_model.fit import WorldModelTrainer, fit_world_model, load_world_model
from ipd_ray.world_model.termination import RULES, UNBOUNDED, ending_bounds, resolve
from ipd_ray.world_model.uncertainty import KINDS, ensemble_uncertainty

NOISE = 0.02
LIMIT = 1.0
"""The point leaves the field, and the episode ends, beyond this."""


def drifting_point() -> Log:
    """(x, v): v' = 0.8 v + 0.3 a + noise, x' = x + 0.3 v'; reward x' - 0.5 a; ends where |x'| > LIMIT."""
    rng = np.random.default_rng(0)
    episodes: list[Episode] = []
    for _ in range(60):
        s = [np.array([rng.uniform(-0.6, 0.6), rng.uniform(-0.3, 0.3)])]
        a, r, ended = [], [], False
        bias = rng.uniform(-0.4, 0.4)
        while len(a) < 25 and not ended:
            a.append(np.clip(bias + rng.normal(0.0, 0.4, 1), -0.99, 0.99))
            v = 0.8 * s[-1][1] + 0.3 * a[-1][0] + rng.normal(0.0, NOISE)
            x = s[-1][0] + 0.3 * v
            s.append(np.array([x, v]))
            r.append(x - 0.5 * a[-1][0])
            ended = abs(x) > LIMIT
        episodes.append((s, a, r, ended))
    return log_of(episodes, discount=0.9, holdout=range(0, 60, 4))


def fit(log: Log, folder: Path, **changes: Any) -> tuple[WorldModel, dict[str, Any], np.ndarray]:
    set_threads(1)
    plain = {"members": 4, "elites": 3, "width": 32, "layers": 2, "batch_size": 64}
    config = WorldModelConfig.model_validate({**plain, "max_updates": 1500, "eval_every": 250, **changes})
    fit_world_model(log, config, seed=0, device="cpu", workspace=Workspace(folder))
    artifact = described(folder)
    tensors = tensors_of(artifact)
    model = load_world_model(tensors, content(artifact), "cpu")
    return model, content(artifact)["diagnostics"], tensors["holdout_uncertainty"].numpy()


@lru_cache(maxsize=1)
def learned() -> tuple[Log, WorldModel, dict[str, Any], np.ndarray]:
    log = drifting_point()
    with TemporaryDirectory() as folder:
        return log, *fit(log, Path(folder))


def noise_share(log: Log) -> float:
    """What no model can predict: root mean square over (dx, dv, r), in units of their spread."""
    t = log.transitions
    spread = np.concatenate([t.next_observation - t.observation, log.reward[:, None]], 1)[log.train_steps].std(0)
    return float(np.sqrt(np.mean((np.array([0.3 * NOISE, NOISE, 0.3 * NOISE]) / spread) ** 2)))


def test_it_predicts_held_out_steps_down_to_the_noise():
    log, _, shown, _ = learned()
    assert 0.8 < shown["rmse_constant"] < 1.2  # the spread itself
    assert shown["rmse_linear"] == pytest.approx(noise_share(log), rel=0.15)  # the world is linear
    assert shown["rmse"] < 1.3 * noise_share(log)


def test_learning_in_bfloat16_predicts_as_well(tmp_path: Path):
    log, exact, shown, _ = learned()
    model, rounded, _ = fit(log, tmp_path, precision="bfloat16")
    assert not torch.equal(next(exact.parameters()), next(model.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert rounded["rmse"] < 1.02 * shown["rmse"]


def test_it_knows_how_noisy_the_world_is():
    # In units of the spread of dv, the variance of v' is NOISE^2 / spread^2.
    log, model, _, _ = learned()
    t, held = log.transitions, log.holdout_steps
    *_, (_, log_variance) = model.step_together(torch.from_numpy(t.observation[held]), torch.from_numpy(t.action[held]))
    predicted = float(log_variance[..., 1].exp().mean().sqrt() * model.ensemble.target_std[1])
    assert predicted == pytest.approx(NOISE, rel=0.4)


def test_one_step_by_hand():
    # x = 0.1, v = 0.2, a = 0.5: v' = 0.16 + 0.15 = 0.31; x' = 0.1 + 0.093 = 0.193; r = 0.193 - 0.25 = -0.057.
    _, model, _, _ = learned()
    following, reward, ended, _ = model.step_together(torch.tensor([[0.1, 0.2]]), torch.tensor([[0.5]]))
    assert following[0].tolist() == pytest.approx([0.193, 0.31], abs=0.03)
    assert reward.item() == pytest.approx(-0.057, abs=0.05) and ended.item() < 0.1


def test_elites_apart_average_to_the_step_together():
    _, model, _, _ = learned()
    s, a = torch.tensor([[0.1, 0.2], [-0.3, 0.0]]), torch.tensor([[0.5], [-0.5]])
    apart = model.step(s.expand(3, -1, -1), a.expand(3, -1, -1))
    together = model.step_together(s, a)
    assert apart[0].shape == (3, 2, 2)
    assert torch.allclose(apart[0].mean(0), together[0], atol=1e-6)
    assert torch.allclose(apart[1].mean(0), together[1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_less_certain_off_the_data(kind: str):
    log, model, _, held = learned()
    far = torch.tensor([[6.0, 4.0], [-6.0, -4.0], [6.0, -4.0], [0.0, 8.0]])
    *_, gaussians = model.step_together(far, torch.zeros(4, 1))
    u = ensemble_uncertainty(*gaussians, kind)
    assert float(u.min()) > float(np.quantile(held[KINDS.index(kind)], 0.9))
    assert held.shape == (len(KINDS), len(log.holdout_steps))


def test_it_finds_the_ends_of_held_out_episodes():
    shown = learned()[2]["termination"]
    assert shown["true"] >= 5
    assert shown["found"] >= 0.7 * shown["true"]
    assert shown["false_alarms"] <= 0.02 * shown["steps"]


def test_the_learned_end_is_where_the_world_ends():
    _, model, _, _ = learned()
    inside, outside = torch.tensor([[0.7, 0.1], [-0.7, -0.1]]), torch.tensor([[1.15, 0.4], [-1.15, -0.4]])
    before = outside - torch.tensor([[0.12, 0.0], [-0.12, 0.0]])
    assert float(model.ended(inside, inside).max()) < 0.5 < float(model.ended(before, outside).min())


def test_roll_outs_stay_far_better_than_standing_still():
    depth = learned()[2]["rollout_rmse_by_depth"]
    assert len(depth["model"]) >= 5
    assert depth["model"][4] < 0.4 * depth["still"][4]


def test_scales_far_apart_and_what_never_changes_are_learned_as_well(tmp_path: Path):
    # The same points with x a millionth of its size and rewards a thousand times theirs, beside 5 everywhere.
    t = learned()[0].transitions
    last = t.episode_start[1:] - 1

    def seen(e: int) -> np.ndarray:
        steps = slice(t.episode_start[e], t.episode_start[e + 1])
        s = np.concatenate([t.observation[steps], t.next_observation[[last[e]]]])
        return np.stack([1e-6 * s[:, 0], s[:, 1], np.full(len(s), 5.0)], 1)

    episodes: list[Episode] = [
        (seen(e), t.action[t.episode == e], 1e3 * t.reward[t.episode == e], bool(t.terminal[last[e]]))
        for e in range(t.episodes)
    ]
    log = log_of(episodes, discount=0.9, holdout=range(0, 60, 4))
    model, shown, _ = fit(log, tmp_path)
    assert 0.8 < shown["rmse_constant"] < 1.2
    assert shown["rmse"] < 1.15 * learned()[2]["rmse"]
    s = torch.tensor([[1e-7, 0.2, 5.0]])
    for _ in range(50):
        s, *_, (mean, _) = model.step_together(s, torch.tensor([[0.1]]))
    assert s[0, 2] == 5.0 and mean.shape[-1] == 3  # x, v, r


def test_without_an_end_to_learn_from_none_is_made_up(tmp_path: Path):
    # The one episode that terminates is held out.
    log = learned()[0]
    t = log.transitions
    first = int(np.flatnonzero(t.terminal & log.holdout)[0])
    alone = replace(log, transitions=replace(t, terminal=np.arange(len(t)) == first))
    model, shown, _ = fit(alone, tmp_path, max_updates=20, eval_every=20)
    assert shown["termination"] == {"true": 1, "found": 0, "false_alarms": 0, "steps": len(log.holdout_steps)}
    _, _, ended, _ = model.step_together(torch.tensor([[9.0, 9.0]]), torch.zeros(1, 1))
    assert ended.item() == 0.0


def test_a_log_without_an_end_never_ends(tmp_path: Path):
    log = drifting_point()
    log.transitions.terminal[:] = False
    model, shown, _ = fit(log, tmp_path, max_updates=4, eval_every=2)
    assert shown["termination"] == {"true": 0, "found": 0, "false_alarms": 0, "steps": len(log.holdout_steps)}
    assert model.ended(torch.zeros(2, 2), torch.full((2, 2), 99.0)).tolist() == [0.0, 0.0]


def trainer(members: int = 3, elites: int = 2) -> WorldModelTrainer:
    config = WorldModelConfig(members=members, elites=elites, width=4, layers=1, max_updates=10, batch_size=4)
    return WorldModelTrainer(drifting_point(), config, 0, "cpu")


def fill(model: Any, values: Sequence[float]) -> None:
    """Set all weights and bounds of member i to values[i]."""
    for state in model.of_members.values():
        state.copy_(torch.tensor(values).reshape(-1, *[1] * (state.ndim - 1)).expand_as(state))


def member_values(state: dict[str, Tensor]) -> list[float]:
    """What all weights and bounds of each member are."""
    every = torch.cat([value.flatten(1) for value in state.values()], 1)
    assert (every == every[:, :1]).all()
    return every[:, 0].tolist()


def test_each_member_keeps_the_weights_of_its_own_best_look(monkeypatch: pytest.MonkeyPatch):
    t = trainer()
    # Better is under 0.99 of the best: 0.995 is not, for member 2.
    looks = {
        (1.0, 2.0, 3.0): [1.0, 1.0, 1.0], (4.0, 5.0, 6.0): [0.5, 2.0, 0.995], (7.0, 8.0, 9.0): [0.6, 0.5, 2.0],
    }
    for weights, errors in looks.items():
        fill(t.model, weights)
        monkeypatch.setattr(t, "holdout_error", lambda e=errors: torch.tensor(e))
        t._look()
    assert member_values(t.best) == [4.0, 8.0, 3.0]
    assert t.best_error.tolist() == [0.5, 0.5, 1.0] and t.stale == 0
    monkeypatch.setattr(t, "holdout_error", lambda: torch.tensor([0.5, 0.5, 1.0]))
    t._look()
    assert t.stale == 1


def test_the_elites_are_the_members_of_least_error_at_their_best():
    t = trainer()
    fill(t.model, [1.0, 2.0, 3.0])
    t.best = {name: value.clone() for name, value in t.model.of_members.items()}
    fill(t.model, [9.0, 9.0, 9.0])
    t.best_error = torch.tensor([0.2, 0.9, 0.1])
    assert member_values(t.elites(t._config).of_members) == [1.0, 3.0]


def test_members_see_different_steps():
    index = trainer()._bootstrap
    assert not torch.equal(index[0], index[1])
    # A bootstrap of N rows holds about 1 - 1/e of them.
    assert len(index[0].unique()) / index.shape[1] == pytest.approx(0.632, abs=0.03)


def test_the_edge_beyond_which_episodes_end_is_found():
    log, model, shown, _ = learned()
    found = shown["ends"]
    assert (found["below"]["0"], found["above"]["0"]) == pytest.approx((-LIMIT, LIMIT), abs=0.02)
    assert not {"1"} & {*found["below"], *found["above"]} and found["within"] == 0.0
    t, held = log.transitions, log.holdout_steps
    s, following = (torch.from_numpy(x[held]) for x in (t.observation, t.next_observation))
    assert (model.ended(s, following).numpy() == t.terminal[held]).mean() > 0.995


def test_where_bounds_decide_the_way_back_from_the_edge_is_the_network_s():
    _, model, _, _ = learned()
    following = torch.tensor([[0.9, 0.3], [-0.9, -0.3], [1.1, 0.3]], requires_grad=True)
    ended = model.ended(following.detach() * 0.9, following)
    assert ended.tolist() == [0.0, 0.0, 1.0]
    (slope,) = torch.autograd.grad(ended.sum(), following)
    assert slope[0, 0] > 0.0 > slope[1, 0]


def test_ending_bounds_by_hand():
    # x ends above 1, six times: halfway between 1 and 1.2. y is beyond what went on four times, which is too few.
    went_on = np.array([[0.0, 0.0], [1.0, 1.0], [-3.0, -1.0]], np.float32)
    ended = np.array([[1.2, 2.0], [1.5, 2.0], [2.0, 2.0], [2.0, 2.0], [1.3, 0.5], [1.4, 0.0]], np.float32)
    low, high, within = ending_bounds(went_on, ended)
    assert low.tolist() == [-UNBOUNDED, -UNBOUNDED] and within == 0.0
    assert high.tolist() == [pytest.approx(1.1), UNBOUNDED]
    # Turned around, with an end in the midst of what went on: one of seven is explained by no bound.
    low, high, within = ending_bounds(-went_on, np.concatenate([-ended, [[0.0, 0.0]]]).astype(np.float32))
    assert low.tolist() == [pytest.approx(-1.1), -UNBOUNDED] and high.tolist() == [UNBOUNDED, UNBOUNDED]
    assert within == pytest.approx(1 / 7)


def test_where_every_step_ends_there_is_no_bound(tmp_path: Path):
    rng = np.random.default_rng(0)
    episodes: list[Episode] = [([*rng.normal(size=(2, 2))], [rng.uniform(-1, 1, 1)], [0.0], True) for _ in range(60)]
    model, shown, _ = fit(log_of(episodes, holdout=range(0, 60, 4)), tmp_path, max_updates=20, eval_every=10)
    assert shown["ends"] == {"below": {}, "above": {}, "within": 1.0}
    assert 0.0 < float(model.ended(torch.zeros(1, 2), torch.zeros(1, 2))) < 1.0


def test_a_bound_lies_between_neighbours_of_float32():
    last = np.float32(0.2)
    first = np.nextafter(last, np.float32(1.0))
    _, high, _ = ending_bounds(np.array([[last]]), np.full((5, 1), first))
    assert last <= high[0] < first


def test_ends_that_no_bound_explains_are_left_to_the_network(tmp_path: Path):
    # Beyond |x| > LIMIT as before, and in a strip inside: a goal that ends the episode.
    log = drifting_point()
    t = log.transitions
    inside = np.abs(t.next_observation[:, 0] - 0.5) < 0.1
    model, shown, _ = fit(replace(log, transitions=replace(t, terminal=t.terminal | inside)), tmp_path)
    assert 0.0 < shown["ends"]["within"] < 1.0 and shown["ends"]["above"]["0"] == pytest.approx(LIMIT, abs=0.02)
    s = torch.tensor([[0.45, 0.1], [-0.5, 0.0], [0.95, 0.3]])
    ended = model.ended(s, s + torch.tensor([[0.05, 0.0], [0.02, 0.0], [0.1, 0.0]]))
    assert ended[0] > 0.5 > ended[1] and ended[2] == 1.0


def test_termination_rules_by_hand():
    hopper = torch.zeros(7, 11)
    hopper[:, 0] = 1.25
    hopper[1, 0], hopper[2, 0] = 0.69, 0.71  # height over 0.7
    hopper[3, 1], hopper[4, 1] = -0.21, 0.19  # angle within 0.2
    hopper[5, 7], hopper[6, 7] = 101.0, -99.0  # the rest within 100
    assert RULES["hopper"](hopper).tolist() == [False, True, False, True, False, True, False]
    walker = torch.zeros(7, 17)
    walker[:, 0] = 1.25
    walker[1, 0], walker[2, 0], walker[3, 0] = 0.79, 2.01, 1.99  # height in (0.8, 2)
    walker[4, 1], walker[5, 1], walker[6, 1] = 1.01, -1.01, 0.99  # angle within 1
    assert RULES["walker2d"](walker).tolist() == [False, True, True, False, True, True, False]
    assert not RULES["never"](hopper).any()


def test_a_known_rule_replaces_the_learned_head(tmp_path: Path):
    (tmp_path / "my_rules.py").write_text("def far(observation):\n    return observation[:, 0] > 0.25\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        model, _, _ = fit(drifting_point(), tmp_path / "work", max_updates=4, eval_every=2, termination="my_rules:far")
    before = torch.zeros(2, 2)
    assert model.ended(before, torch.tensor([[0.2, 0.0], [0.3, 0.0]])).tolist() == [0.0, 1.0]


def test_a_mistyped_rule_names_the_near_one():
    with pytest.raises(UserError, match="Did you mean 'hopper'"):
        resolve("hoper")
    with pytest.raises(UserError, match=r"no_such_module:rule cannot be imported .*PYTHONPATH"):
        resolve("no_such_module:rule")
    with pytest.raises(UserError, match="is float, not a function"):
        resolve("math:pi")
    assert resolve("learned") is None
