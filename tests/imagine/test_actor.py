"""The actor that learns the planner's score inside the world model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Line, learned_pendulum, log_of
from torch import Tensor

from ipd_ray.artifacts import Workspace
from ipd_ray.config import ActorConfig, ChooseConfig, ImagineConfig, PlannerConfig, ValuesConfig
from ipd_ray.evaluate.choose import imagined_returns
from ipd_ray.imagine.actor import Actor, ActorTrainer, Rollouts, best_reach, learn_actor, load_actor
from ipd_ray.imagine.rollout import ShardSpec, imagine_shard
from ipd_ray.steps import _Memoryless
from ipd_ray.values.fit import frozen
from ipd_ray.values.networks import ValueFunctions
from ipd_ray.world_model.uncertainty import KINDS, Trust

SMALL = ActorConfig(
    rounds=8,
    starts=100,
    length=20,
    discount=0.9,
    value_updates=100,
    updates=60,
    batch_size=64,
    learning_rate=3e-3,
    ema=0.95, reaches=(0.4,),
)
PLANNER = PlannerConfig(kind="actor", horizon=3)
REACH = SMALL.reaches[0]
# On a line from -1 to 1; the log goes right by 0.05 a step in the mean, and earns nothing.
EPISODE = (np.linspace(-1, 1, 41)[:, None], np.resize([1.0, -0.9], (40, 1)), np.zeros(40), False)
LOG = log_of([EPISODE] * 3, discount=0.9)


def values_of(log: Any) -> ValueFunctions:
    """Values that have learned nothing: the behaviour policy stands still, and V is the same everywhere."""
    torch.manual_seed(0)
    t = log.transitions
    values = ValueFunctions(t.observation_dim, t.spec.action_dim, ValuesConfig(width=16))
    for net in (values.behaviour_net, values.v_net):
        for parameter in net.out.parameters():
            torch.nn.init.zeros_(parameter)
    return frozen(values, "cpu")


def rollouts(world: Any, log: Any = LOG, config: ActorConfig = SMALL, **options: Any) -> Rollouts:
    trust = Trust("spread", options.pop("threshold", float("inf")), options.pop("range_margin", 0.05))
    plain = {"seed": 0, "device": "cpu"}
    return Rollouts(log, options.pop("values", None) or values_of(log), world, config, trust, **{**plain, **options})


def last_round(actor: Actor) -> float:
    """A judge who likes the last round best."""
    return float(actor.change_net.out.weight.abs().sum())


def trainer(world: Any, *args: Any, judge: Any = last_round, **options: Any) -> ActorTrainer:
    return ActorTrainer(rollouts(world, *args, **options), PLANNER, judge, REACH)


def test_it_begins_as_the_behaviour_policy():
    learned = learned_pendulum()
    actor = trainer(learned.world_model, learned.log, values=learned.values).actor
    s = torch.from_numpy(learned.log.transitions.observation[:50])
    assert torch.equal(actor.act(s), learned.values.act(s))


def learned_in(world: Line) -> Actor:
    learner = trainer(world)
    for step in range(SMALL.rounds):
        learner.update(step)
    return learner.best


def test_it_goes_where_the_reward_is_and_stays_within_reach():
    # Reward is highest at 0.3: from the left it goes right, from the right left.
    action = learned_in(Line(lambda s, s2: 1.0 - (s2 - 0.3).abs())).act(torch.tensor([[-0.8], [0.9]]))
    assert action[0] > 0.2 and action[1] < -0.2
    assert action.abs().max() <= REACH + 1e-6


def test_reach_and_noise_are_in_units_of_what_the_log_does():
    # Actions of a hundredth of their bounds: std 0.0095, in units of 0.4.
    observation, action, *rest = EPISODE
    narrow = log_of([(observation, action / 100, *rest)] * 3, discount=0.9)
    unit = float(narrow.action_unit[0])
    assert unit == pytest.approx(0.0095 / 0.4)
    learner = trainer(Line(lambda s, s2: s2), narrow)
    for step in range(2):
        learner.update(step)
    s = torch.tensor([[-0.8], [0.9]])
    assert 0.0 < learner.actor.act(s).abs().max() <= REACH * unit + 1e-6
    generator = torch.Generator().manual_seed(0)
    still = learner._rollouts.walk(lambda s, _: torch.zeros_like(s), torch.zeros(200, 1), 1, generator)
    moved = still.observations[1][1::2]
    assert float(moved.std()) == pytest.approx(SMALL.noise_std * unit, rel=0.25)


def test_the_actor_looks_as_far_ahead_as_the_values_at_least():
    far = log_of([EPISODE] * 3, discount=0.95)
    assert trainer(Line(lambda s, s2: s2), far)._discount == 0.95
    assert trainer(Line(lambda s, s2: s2))._discount == SMALL.discount


def test_what_ends_is_avoided_though_the_log_knows_no_end():
    # The reward grows to the right; where all ends beyond 0.5, it stays this side of it.
    def reward(s: Tensor, s2: Tensor) -> Tensor:
        return 1.0 + 0.5 * s2

    s = torch.tensor([[0.4]])
    assert learned_in(Line(reward)).act(s) > 0.2
    assert learned_in(Line(reward, ended=lambda s2: torch.sigmoid(50.0 * (s2 - 0.5)))).act(s) < 0.1


def test_what_is_not_known_is_worth_no_more_than_the_worst_of_the_log():
    # Everything is more uncertain than the threshold: the first step of every roll-out leaves what is known.
    learner = trainer(Line(lambda s, s2: torch.ones_like(s)), threshold=-1.0)
    _, outcome, told = learner._roll_out(0)
    worst = float(np.quantile(values_of(LOG).v(torch.from_numpy(LOG.transitions.observation)).numpy(), 0.001))
    assert told["left"] == 1.0
    assert outcome.max() <= 1.0 + LOG.discount * worst + 1e-5


@pytest.mark.parametrize(("returns", "kept"), [([1.0, 9.0, 3.0, 2.0], 2), ([5.0, 9.0, 4.5, 3.0], 0)])
def test_the_round_that_does_best_is_kept_or_else_the_behaviour_policy(returns: list[float], kept: int):
    # The judge says what the behaviour policy and rounds 1 to 3 are worth; the first round comes too early.
    said = iter(returns)
    config = SMALL.model_copy(update={"rounds": 3})
    learner = trainer(Line(lambda s, s2: s2), config=config, judge=lambda _: next(said))
    s, seen = torch.tensor([[0.2]]), [learner.actor.act(torch.tensor([[0.2]])).detach()]
    for step in range(3):
        learner.update(step)
        seen.append(learner._average.act(s))
    assert learner.best_round == kept
    assert torch.equal(learner.best.act(s), seen[kept])


@pytest.mark.parametrize(
    ("returns", "kept"),
    [
        ({0.1: 30.0, 0.2: 28.0, 0.4: 27.4}, 0.4),  # of a gain of 20, 17.4 is nearly as much, 16.6 is not
        ({0.1: 30.0, 0.2: 27.4, 0.4: 26.6}, 0.1),  # and what lies between is not asked for
        ({0.1: 27.0, 0.2: 30.0, 0.4: 10.0}, 0.2),
        ({0.4: 30.0, 0.2: 30.0}, 0.4),
        ({0.1: 30.0, 0.2: 15.0, 0.4: 31.0}, 0.1),  # more room that earns less: what still more earns is not believed
        ({0.4: 31.0, 0.1: 30.0, 0.2: 15.0}, 0.1),  # in whatever order
        ({0.1: 20.0, 0.2: 25.0, 0.4: 30.0}, 0.4),
        ({0.1: 10.0, 0.2: 10.0}, 0.2),  # nothing is gained: all are the behaviour policy
    ],
)
def test_the_largest_reach_is_kept_unless_more_room_gains_less(returns: dict[float, float], kept: float):
    found = [{"reach": r, "return_mean": value, "behaviour_return": 10.0} for r, value in returns.items()]
    assert found[best_reach(found)]["reach"] == kept


def test_it_does_better_in_the_learned_world_than_the_behaviour_policy():
    learned = learned_pendulum()
    config = SMALL.model_copy(
        update={"starts": 150, "length": 60, "rounds": 10, "discount": 0.97, "value_updates": 200}
    )
    threshold = float(np.quantile(learned.holdout_uncertainty[KINDS.index("spread")], 0.999))
    trust = Trust("spread", threshold, 0.05)
    learner = trainer(learned.world_model, learned.log, config, values=learned.values, threshold=threshold)
    for step in range(config.rounds):
        learner.update(step)
    returns = {}
    for name, acts in (("behaviour", learned.values), ("actor", learner.best)):
        player = _Memoryless(acts, learned.log, "cpu")
        judge = ChooseConfig(episodes=60)
        played = imagined_returns(player, learned.log, learned.world_model, judge, trust, seed=0, device="cpu")
        returns[name] = played[0]
    gain = returns["actor"] - returns["behaviour"]
    assert gain.mean() > 2.0 * gain.std() / np.sqrt(len(gain))


def test_a_training_that_was_cut_off_comes_to_the_same_bits(tmp_path: Path):
    world = Line(lambda s, s2: s2)
    config = SMALL.model_copy(update={"rounds": 3})
    whole = learn_actor(trainer(world, config=config), 3, Workspace(tmp_path / "whole"))
    cut = trainer(world, config=config)
    for step in range(2):
        cut.update(step)
    Workspace(tmp_path / "cut").checkpoint(2, cut.state())
    resumed = learn_actor(trainer(world, config=config), 3, Workspace(tmp_path / "cut"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_what_it_leaves_is_read_back_and_imagines(tmp_path: Path):
    world = Line(lambda s, s2: s2)
    actor = learn_actor(trainer(world), SMALL.rounds, Workspace(tmp_path))
    again = load_actor(actor.state_dict(), {"actor": actor.sizes}, "cpu")
    spec = ShardSpec(0, np.array([3, 50]), np.zeros(2, bool))
    segments = imagine_shard(
        spec, LOG, world, values_of(LOG), PLANNER, ImagineConfig(length=2), seed=0, device="cpu", actor=again
    )
    s = torch.from_numpy(LOG.transitions.observation[[3, 50]])
    assert segments.imitated[:, 0].tolist() == pytest.approx(actor.act(s).numpy())
    assert isinstance(again, Actor)
