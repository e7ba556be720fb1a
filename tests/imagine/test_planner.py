"""MPC where the best action is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_fixtures import KnownValues, Line, learned_pendulum
from torch import Tensor

from ipd_ray.config import PlannerConfig
from ipd_ray.imagine import planner
from ipd_ray.imagine.planner import Plan, candidates_per_elite, plan


def decide(
    dynamics: Line, values: KnownValues, *, at: tuple[float, ...] = (0.0,), seed: int = 0, **config: Any
) -> Plan:
    """Plan for points on the line; gamma 0.9."""
    plain = {"kind": "mpc", "candidates": 2048, "horizon": 1, "noise_std": 0.5, "temperature": 0.01}
    return plan(
        torch.tensor(at)[:, None], dynamics, values, PlannerConfig.model_validate({**plain, **config}), discount=0.9,
        generator=torch.Generator().manual_seed(seed),
    )


def nearness_to(goal: float) -> Any:
    """Reward -(s' - goal)^2."""
    return lambda s, s2: -((s2 - goal) ** 2)


def test_the_planned_action_has_the_best_reward():
    # s' = s + a: to be at 0.6, the points at 0 and 0.9 move by 0.6 and -0.3.
    planned = decide(Line(nearness_to(0.6)), KnownValues(), at=(0.0, 0.9))
    assert planned.action[:, 0].tolist() == pytest.approx([0.6, -0.3], abs=0.03)
    assert planned.best_score.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
    assert (planned.mean_score < -0.1).all()


def test_an_action_out_of_bounds_is_clipped():
    planned = decide(Line(nearness_to(5.0)), KnownValues(), noise_std=1.0)
    assert 0.99 < planned.action.item() <= 1.0
    # At the bound, -(1 - 5)^2 = -16.
    assert planned.best_score.item() == pytest.approx(-16.0)


@pytest.mark.parametrize("kind", ["mpc", "greedy_q", "gradient"])
def test_plans_keep_to_the_unit_of_the_log_s_actions(kind: str):
    # All is better to the right; of two actions the log hardly ever changed the second.
    class Plane(Line):
        def step(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            following = observation + action.sum(-1, keepdim=True)
            return following, following[..., 0], torch.zeros_like(following[..., 0])

    class Values(KnownValues):
        def act(self, observation: Tensor) -> Tensor:
            return torch.zeros(*observation.shape[:-1], 2)

        def q(self, observation: Tensor, action: Tensor) -> Tensor:
            return action.sum(-1).expand(2, *action.shape[:-1])

    config = PlannerConfig.model_validate({"kind": kind, "candidates": 512, "horizon": 2, "noise_std": 0.3})
    action = plan(
        torch.zeros(4, 1), Plane(lambda s, s2: s2), Values(), config, discount=0.9,
        generator=torch.Generator().manual_seed(0), action_unit=torch.tensor([1.0, 0.01]),
    ).action
    assert (action[:, 0] > 0.1).all() and (action[:, 1].abs() < 0.015).all()


def test_the_terminal_value_counts_discounted():
    # No reward on the way; V(s') = -(s' + 0.4)^2 - 2: best at -0.4 with 0.9 * -2 = -1.8.
    planned = decide(Line(lambda s, s2: 0.0 * s2), KnownValues(value=lambda s: -((s + 0.4) ** 2) - 2.0))
    assert planned.action.item() == pytest.approx(-0.4, abs=0.03)
    assert planned.best_score.item() == pytest.approx(-1.8, abs=1e-3)


def test_scores_of_a_plan_by_hand():
    # No noise to speak of, policy a = 0.5: s 0, .5, 1, 1.5. Reward s': .5 + .9 * 1 + .81 * 1.5; V = 10: .729 * 10.
    values = KnownValues(value=lambda s: torch.full_like(s, 10.0), policy=lambda s: torch.full_like(s, 0.5))
    planned = decide(Line(lambda s, s2: s2), values, candidates=2, horizon=3)
    assert planned.best_score.item() == pytest.approx(0.5 + 0.9 + 1.215 + 7.29, rel=1e-5)


def test_reward_after_a_likely_end_counts_by_the_chance_of_getting_there():
    # The end comes with 3/4 at each step; a = 0.5. Reward 1 a step: 1 + .9 / 4 + .81 / 16; V = 10: .729 / 64 * 10.
    values = KnownValues(value=lambda s: torch.full_like(s, 10.0))
    dynamics = Line(lambda s, s2: torch.ones_like(s2), ended=lambda s2: torch.full_like(s2, 0.75))
    planned = decide(dynamics, values, candidates=2, horizon=3)
    assert planned.best_score.item() == pytest.approx(1.0 + 0.225 + 0.050625 + 7.29 / 64, rel=1e-5)


def cliff(s2: Tensor) -> Tensor:
    return (s2 > 0.25).float()


def test_a_cliff_is_avoided_where_the_future_is_worth_more_than_the_jump():
    # Reward s', the world ends beyond 0.25, V = 3: at most 0.25 + 2.7 on this side against 1 + 0 on that.
    values = KnownValues(value=lambda s: torch.full_like(s, 3.0))
    with_end = decide(Line(lambda s, s2: s2, ended=cliff), values)
    without_end = decide(Line(lambda s, s2: s2), values)
    assert with_end.action.item() == pytest.approx(0.25, abs=0.03)
    assert without_end.action.item() > 0.9


def test_a_sure_reward_behind_the_end_is_not_chosen():
    # +1 lies at s' > 1.5, two steps away, and no two steps get there but over the end at 0.25; V = 0.81 * 0.5 is all
    # that is left on this side.
    def reward(s: Tensor, s2: Tensor) -> Tensor:
        return (s2 > 1.5).float()

    values = KnownValues(value=lambda s: torch.full_like(s, 0.5))
    planned = decide(Line(reward, ended=cliff), values, horizon=2)
    assert planned.action.item() < 0.25
    assert planned.best_score.item() == pytest.approx(0.405)
    # Without the end it is what they go for: 0.9 * 1 + 0.81 * 0.5.
    assert decide(Line(reward), values, horizon=2).best_score.item() == pytest.approx(1.305)


def test_two_steps_reach_what_one_step_cannot():
    # From 0 the reward at 1.5 and beyond is two steps away: a horizon of 1 sees nothing to choose.
    dynamics = Line(lambda s, s2: (s2 >= 1.5).float())
    assert decide(dynamics, KnownValues(), horizon=1).best_score.item() == 0.0
    two = decide(dynamics, KnownValues(), horizon=2)
    assert two.best_score.item() == pytest.approx(0.9) and two.action.item() > 0.5


def test_low_temperature_takes_the_best_and_high_temperature_the_mean():
    dynamics = Line(lambda s, s2: (s2 > 0.999).float() + s2)
    cold = decide(dynamics, KnownValues(), temperature=1e-4, noise_std=1.0)
    warm = decide(dynamics, KnownValues(), temperature=1e6, noise_std=0.2)
    assert cold.action.item() == pytest.approx(1.0)
    assert warm.action.item() == pytest.approx(0.0, abs=0.03)


def test_weights_are_a_softmax_of_standardised_scores():
    # Two elites, one candidate each without noise, rewarded 0 and 1 and acting alike: any weights give that action;
    # with lambda = 1, standardising makes the weights free of the unit of reward.
    one, thousand = (
        decide(Line(lambda s, s2, k=k: k * s2), KnownValues(), temperature=1.0, candidates=64) for k in (1.0, 1000.0)
    )
    assert torch.allclose(one.action, thousand.action, atol=1e-5)


def test_the_first_candidate_of_each_elite_is_the_behaviour_policy():
    policy = KnownValues(policy=lambda s: torch.full_like(s, 0.3))
    only = decide(Line(nearness_to(0.9)), policy, candidates=2)  # one candidate an elite
    assert only.action.item() == pytest.approx(0.3, abs=1e-6)
    # Anything but 0.3 is worse: with any noise in every candidate the best score would be below 0.
    assert decide(Line(nearness_to(0.3)), policy, candidates=8).best_score.item() == pytest.approx(0.0, abs=1e-12)


def test_candidates_are_shared_among_elites_and_rounded_up():
    assert candidates_per_elite(PlannerConfig(candidates=256), 5) == 52
    assert candidates_per_elite(PlannerConfig(candidates=10), 5) == 2


class Quarrel(Line):
    """Elites agree on the way left and part on the way right: reward s' + 4 e max(s', 0) - 2 max(s', 0)."""

    def __init__(self) -> None:
        super().__init__(lambda s, s2: s2)

    def step(self, observation_EBO: Tensor, action_EBA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        following, reward, ended = super().step(observation_EBO, action_EBA)
        e = torch.arange(2.0)[:, None]
        return following, reward + (4.0 * e - 2.0) * following[..., 0].clamp(min=0.0), ended


def test_disagreement_takes_its_multiple_off_the_score():
    # Right by 1 the elites say -1 and 3; std (correction 1) = 4 / sqrt 2. A penalty of 2 costs 5.7, more than 3 brings.
    free, wary = (decide(Quarrel(), KnownValues(), disagreement_penalty=p, noise_std=1.0) for p in (0.0, 2.0))
    assert free.action.item() > 0.9 and free.best_score.item() == pytest.approx(3.0)
    assert wary.action.item() == pytest.approx(0.0, abs=0.05) and wary.best_score.item() == pytest.approx(0.0, abs=1e-3)
    half = decide(Quarrel(), KnownValues(), disagreement_penalty=0.5, noise_std=1.0)
    assert half.best_score.item() == pytest.approx(3.0 - 0.5 * 4.0 / math.sqrt(2.0), rel=1e-5)


def test_greedy_q_takes_the_candidate_of_highest_q():
    values = KnownValues(action_value=lambda s, a: -((a - 0.4 - s) ** 2), policy=lambda s: torch.zeros_like(s))
    planned = decide(Line(nearness_to(-1.0)), values, at=(0.0, -0.7), kind="greedy_q")
    assert planned.action[:, 0].tolist() == pytest.approx([0.4, -0.3], abs=0.01)
    # The smaller of the two critics (the second says 1 more) is what counts.
    assert planned.best_score.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)


def test_plans_climb_to_the_best_reward_within_their_reach():
    # To be at 0.6 the points at 0 and 0.5 move by 0.6 and 0.1; a reach of 0.3 about the policy's 0.2 ends at 0.5.
    policy = KnownValues(policy=lambda s: torch.full_like(s, 0.2))
    far, near = decide(Line(nearness_to(0.6)), policy, at=(0.0, 0.5), kind="gradient", reach=0.3).action[:, 0].tolist()
    assert 0.45 < far <= 0.5
    assert near == pytest.approx(0.1, abs=0.08)
    planned = decide(Line(nearness_to(5.0)), policy, kind="gradient", reach=2.0)
    assert 0.9 < planned.action.item() <= 1.0  # clipped at the bound


def test_a_climb_ends_above_where_the_behaviour_policy_begins():
    # Policy a = 0.5, V = 10: .5 + .9 * 1 + .81 * 1.5 + .729 * 10 at the start, +1 of reach at each of 3 steps at most.
    values = KnownValues(value=lambda s: torch.full_like(s, 10.0), policy=lambda s: torch.full_like(s, 0.5))
    planned = decide(Line(lambda s, s2: s2), values, horizon=3, kind="gradient", reach=0.1)
    start = 0.5 + 0.9 + 1.215 + 7.29
    assert planned.mean_score.item() > start
    assert start + 0.4 < planned.best_score.item() <= start + 0.1 + 0.9 * 0.2 + 0.81 * 0.3 + 1e-5


def test_a_climb_sees_the_value_behind_its_horizon_and_the_end_before_it():
    # V falls with s, so it goes left; where the world ends on the left for sure, V there counts for nothing.
    values = KnownValues(value=lambda s: 5.0 - s)
    left = decide(Line(lambda s, s2: 0.0 * s2), values, horizon=2, kind="gradient").action.item()
    assert left < -0.2
    ending = Line(lambda s, s2: 0.0 * s2, ended=lambda s2: torch.sigmoid(-50.0 * (s2 + 0.1)))
    assert decide(ending, values, horizon=2, kind="gradient").action.item() > left + 0.1


def test_a_climb_is_wary_of_what_elites_disagree_on():
    free, wary = (
        decide(Quarrel(), KnownValues(), at=(0.1,), kind="gradient", disagreement_penalty=p).action.item()
        for p in (0.0, 2.0)
    )
    assert free > 0.2 and wary < 0.0


def test_a_climb_is_a_function_of_the_state():
    values = KnownValues(value=torch.cos)
    one, other = (decide(Line(nearness_to(0.3)), values, kind="gradient", horizon=3, seed=s).action for s in (0, 1))
    assert torch.equal(one, other) and not one.requires_grad


@pytest.mark.parametrize("kind", ["gradient", "mpc", "greedy_q"])
def test_states_planned_in_pieces_get_the_same_plans(kind: str, monkeypatch: pytest.MonkeyPatch):
    at = tuple(torch.linspace(-1.0, 1.0, 7).tolist())
    values = KnownValues(value=lambda s: torch.cos(s), action_value=lambda s, a: -((a - s) ** 2))
    config = {"at": at, "horizon": 3, "candidates": 16, "temperature": 0.3, "kind": kind, "disagreement_penalty": 0.1}
    whole = decide(Line(nearness_to(0.3)), values, **config)
    for rows in (1, 16, 48):  # 1, 1 and 3 states at a time
        monkeypatch.setattr(planner, "CACHED_ROWS", rows)
        monkeypatch.setattr(planner, "GRADIENT_ROWS", rows)
        pieces = decide(Line(nearness_to(0.3)), values, **config)
        assert torch.allclose(whole.action, pieces.action, atol=1e-6)
        assert torch.allclose(whole.best_score, pieces.best_score, atol=1e-6)


@pytest.mark.parametrize(("kind", "apart"), [("gradient", 0.05), ("mpc", 0.3)])
def test_plans_in_bfloat16_are_worth_those_in_float32(kind: str, apart: float):
    # Of a learned pendulum, by what one step is worth in float32. Sampled plans are nearly the best of many samples, so
    # rounding may let another one win that is as good; `apart` is in units of a plan's distance from the policy.
    learned = learned_pendulum()
    states = torch.from_numpy(learned.log.transitions.observation[::6])
    model, values = learned.world_model, learned.values

    def planned(precision: str) -> Plan:
        config = PlannerConfig.model_validate({"kind": kind, "candidates": 240, "precision": precision})
        return plan(states, model, values, config, discount=0.97, generator=torch.Generator().manual_seed(0))

    def worth(action: Tensor) -> Tensor:
        following, reward, ended, _ = model.step_together(states, action)
        return (reward + 0.97 * (1.0 - ended) * values.v(following)).mean()

    exact, rounded, policy = planned("float32"), planned("bfloat16"), values.act(states)
    assert rounded.action.dtype == rounded.best_score.dtype == torch.float32
    assert not torch.equal(exact.action, rounded.action)
    assert (exact.action - rounded.action).abs().mean() < apart * (exact.action - policy).abs().mean()
    gain = worth(exact.action) - worth(policy)
    assert gain > 0 and worth(rounded.action) - worth(policy) > 0.95 * gain


def test_the_first_action_is_decided_once_a_state_as_if_for_every_candidate():
    # One member at a time, one candidate at a time, as the score is defined, with the noise that the generator gives.
    learned = learned_pendulum()
    states = torch.from_numpy(learned.log.transitions.observation[::500])
    config, model, values = PlannerConfig(horizon=3, candidates=6), learned.world_model, learned.values
    found = plan(states, model, values, config, discount=0.9, generator=torch.Generator().manual_seed(0))
    shape = (3, model.elites, len(states), 2, 1)
    noise = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise[:, :, :, 0] = 0.0
    for b, state in enumerate(states):
        scores, firsts = [], []
        for e in range(model.elites):
            for r in range(2):
                s, score, alive = state.expand(model.elites, 1, -1), 0.0, 1.0
                for h in range(3):
                    action = (values.act(s) + noise[h, e, b, r]).clamp(-1.0, 1.0)
                    if h == 0:
                        firsts.append(action[e, 0])
                    following, reward, ended = model.step(s, action)
                    s = following[e : e + 1].expand(model.elites, -1, -1)
                    score, alive = score + 0.9**h * alive * reward[e], alive * (1.0 - ended[e])
                scores.append((score + 0.9**3 * alive * values.v(s)[e])[0])
        score_N, first_NA = torch.stack(scores), torch.stack(firsts)
        weight = torch.softmax((score_N - score_N.max()) / score_N.std() / config.temperature, 0)
        assert torch.allclose(found.action[b], weight @ first_NA, atol=1e-3)
        assert found.best_score[b].item() == pytest.approx(score_N.max().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["mpc", "greedy_q"])
def test_non_finite_scores_stop_the_run_with_their_count(kind: str):
    def bad(s: Tensor) -> Tensor:
        return torch.where(s > 0.5, torch.nan, s)

    # Of two states one is bad, with all its 4 candidates.
    values = KnownValues(value=bad, action_value=lambda s, a: bad(s))
    with pytest.raises(FloatingPointError, match="4 of 8 planner scores are not finite"):
        decide(Line(nearness_to(0.0)), values, at=(-3.0, 3.0), candidates=4, noise_std=0.1, kind=kind)


def test_a_climb_that_is_not_finite_stops_the_run_with_its_count():
    # Of two states one is bad, in all its 7 iterates.
    values = KnownValues(value=lambda s: torch.where(s > 0.5, torch.nan, s))
    with pytest.raises(FloatingPointError, match="7 of 14 planner scores are not finite"):
        decide(Line(nearness_to(0.0)), values, at=(-3.0, 3.0), kind="gradient")


def test_noise_comes_from_the_generator_alone():
    torch.manual_seed(1)
    one = decide(Line(nearness_to(0.6)), KnownValues(), candidates=8, temperature=1.0)
    torch.manual_seed(2)
    assert torch.equal(one.action, decide(Line(nearness_to(0.6)), KnownValues(), candidates=8, temperature=1.0).action)
    assert not torch.equal(
        one.action, decide(Line(nearness_to(0.6)), KnownValues(), candidates=8, temperature=1.0, seed=1).action
    )
