"""Acting: the same function as in training, in the environment's own units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import log_of, spec_of

from ipd_ray.artifacts import Store, Workspace, prefixed
from ipd_ray.config import PolicyConfig, ValuesConfig
from ipd_ray.data.transitions import Spec
from ipd_ray.distill.policy import TransformerPolicy
from ipd_ray.errors import UserError
from ipd_ray.evaluate.acting import Policy
from ipd_ray.values.networks import ValueFunctions

K, O, A = 4, 3, 2  # noqa: E741
BOX = spec_of(O, A, action_low=[-2.0, 0.0], action_high=[2.0, 10.0], action_shape=[A])


def parts(
    prompt: str = "value", spec: Spec = BOX, target: float | None = None, **policy: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a policy artifact holds, with random weights."""
    torch.manual_seed(0)
    values_config = ValuesConfig(width=8, layers=1)
    policy_config = PolicyConfig.model_validate({"context": K, "layers": 2, "heads": 2, "width": 16, **policy})
    values = ValueFunctions(O, A, values_config)
    values.return_std.fill_(5.0)
    model = TransformerPolicy(O, A, policy_config, prompted=prompt != "none")
    torch.nn.init.normal_(model.head.weight, std=0.5)
    model.prompt_std.fill_(2.0)
    described = {
        "spec": spec.__dict__, "reward_scale": 0.5, "discount": 0.99, "prompt": prompt, "target_return": target,
        "policy": policy_config.model_dump(mode="json"),
        "values": {"values": values_config.model_dump(mode="json"), "observation_dim": O, "action_dim": A},
    }
    return described, {**prefixed("policy", model.state_dict()), **prefixed("values", values.state_dict())}


def policy_of(**options: Any) -> Policy:
    return Policy(*parts(**options), device="cpu")


def walk(steps: int = 7, n: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, n, O)).astype(np.float32)


def trained_forward(policy: Policy, s: np.ndarray, actions: np.ndarray, prompt: torch.Tensor) -> np.ndarray:
    """Action at the last of these steps of one environment, the way training sees its window. All (T, .), actions
    in [-1, 1]."""
    T = len(s)
    begin = max(0, T - K)
    pad = K - (T - begin)

    def left(column: torch.Tensor) -> torch.Tensor:
        window = column[begin:]
        return torch.cat([torch.zeros(pad, *window.shape[1:], dtype=window.dtype), window])[None]

    taken = torch.cat([torch.from_numpy(actions), torch.zeros(1, A)])
    valid = torch.arange(K)[None] >= pad
    with torch.no_grad():
        out = policy._model(left(prompt), left(torch.from_numpy(s)), left(taken), left(torch.arange(T)), valid)
    return out[0, -1].numpy()


def rescaled(action: np.ndarray) -> np.ndarray:
    """Back from [-2, 2] and [0, 10] to [-1, 1]."""
    return (action / np.array([2.0, 5.0], np.float32) - np.array([0.0, 1.0], np.float32)).astype(np.float32)


@pytest.mark.parametrize("prompt", ["value", "outcome", "fixed", "none"])
def test_acting_step_by_step_is_the_forward_of_training(prompt: str):
    policy, s = policy_of(prompt=prompt, target=4.0), walk()
    rewards = np.random.default_rng(1).normal(size=(len(s), 3))
    taken: list[np.ndarray] = []
    for t in range(len(s)):
        taken.append(rescaled(policy.act(s[t], rewards[t - 1] if t else None)))
    for i in range(3):
        states = torch.from_numpy(s[:, i])
        asked = {
            "value": policy._values.v(states), "outcome": policy._values.return_expectiles(states)[1],
            # 4, less the rewards so far
            "fixed": torch.from_numpy(4.0 - np.concatenate([[0.0], np.cumsum(rewards[:-1, i])])).float(),
            "none": torch.zeros(len(s)),
        }[prompt]
        for t in range(len(s)):
            past = np.stack([a[i] for a in taken[:t]]) if t else np.zeros((0, A), np.float32)
            expected = trained_forward(policy, s[: t + 1, i], past, asked[: t + 1])
            assert taken[t][i] == pytest.approx(expected, abs=1e-4), (i, t)


@pytest.mark.parametrize("prompt", ["value", "outcome", "fixed", "none"])
def test_along_episodes_that_it_acted_itself_a_policy_does_what_it_did(prompt: str):
    lengths, episodes = (7, 3), []
    taken, at_ends = [], []
    for i, length in enumerate(lengths):
        policy, s = policy_of(prompt=prompt, target=4.0), walk(steps=length + 1, n=1, seed=i)[:, 0]
        rewards = np.random.default_rng(i).normal(size=length).astype(np.float32)
        acted = [rescaled(policy.act(s[t], rewards[t - 1] if t else None)) for t in range(length + 1)]
        episodes.append((s, acted[:length], rewards, False))
        taken += acted[:length]
        at_ends.append(acted[length])
    along, ends = policy_of(prompt=prompt, target=4.0).along(log_of(episodes).transitions, rows=4)
    assert along == pytest.approx(np.stack(taken), abs=1e-4) and ends == pytest.approx(np.stack(at_ends), abs=1e-4)


def test_a_batch_of_environments_is_many_single_ones():
    batch, s = policy_of(), walk()
    together = np.stack([batch.act(x) for x in s])
    for i in range(3):
        single = policy_of()
        alone = np.stack([single.act(x[i]) for x in s])
        assert alone.shape == (len(s), A)
        assert np.allclose(alone, together[:, i], atol=1e-4)


def test_the_past_matters_and_reset_forgets_it():
    policy, s = policy_of(), walk()
    fresh = policy.act(s[5])
    policy.reset()
    for x in s[:5]:
        policy.act(x)
    assert np.abs(policy.act(s[5]) - fresh).max() > 1e-3
    policy.reset()
    assert np.array_equal(policy.act(s[5]), fresh)


def test_reset_with_a_mask_restarts_those_rows_alone():
    s = walk()
    whole, masked, fresh = policy_of(), policy_of(), policy_of()
    for x in s[:5]:
        whole.act(x)
        masked.act(x)
    masked.reset(np.array([False, True, False]))
    for x in s[5:]:
        undisturbed, mixed, begun = whole.act(x), masked.act(x), fresh.act(x)
        assert np.allclose(mixed[[0, 2]], undisturbed[[0, 2]], atol=1e-4)
        assert np.allclose(mixed[1], begun[1], atol=1e-4)
        assert np.abs(begun[1] - undisturbed[1]).max() > 1e-3


def test_the_number_of_environments_may_change_after_a_reset():
    policy = policy_of()
    assert policy.act(walk(n=3)[0]).shape == (3, A)
    with pytest.raises(UserError, match=r"2 environments after 3: call reset\(\)"):
        policy.act(walk(n=2)[0])
    with pytest.raises(UserError, match=r"mask has shape \(2,\), but 3 environments"):
        policy.reset([True, False])
    policy.reset()
    assert policy.act(walk(n=2)[0]).shape == (2, A)


@pytest.mark.parametrize(
    ("changes", "shape", "dtype"),
    [
        ({}, (3, 2), np.float32),
        ({"action_shape": [2, 1], "action_dtype": "float64"}, (3, 2, 1), np.float64),
        ({"action_dtype": "int64"}, (3, 2), np.int64),
    ],
)
def test_actions_have_the_shape_dtype_and_bounds_of_the_environment(changes: Any, shape: Any, dtype: Any):
    spec = spec_of(O, A, **{"action_low": [-2.0, 0.0], "action_high": [2.0, 10.0], "action_shape": [2], **changes})
    policy = policy_of(spec=spec)
    action = np.stack([policy.act(x * 30.0) for x in walk(40)])
    assert action.shape == (40, *shape) and action.dtype == dtype
    flat = action.reshape(-1, A)
    assert (flat >= [-2.0, 0.0]).all() and (flat <= [2.0, 10.0]).all()
    assert (flat.max(0) > [0.0, 5.0]).all() and (flat.min(0) < [0.0, 5.0]).all()


def test_dict_observations_are_read_in_sorted_order():
    space = {
        "type": "Dict",
        "spaces": {"z": {"type": "Box", "shape": [1], "dtype": "float32"},
                   "a": {"type": "Box", "shape": [2], "dtype": "float32"}},
    }
    flat, nested = policy_of(), policy_of(spec=spec_of(O, A, observation_space=space, action_low=[-2.0, 0.0],
                                                        action_high=[2.0, 10.0]))
    for x in walk():
        named = {"z": x[:, 2:], "a": x[:, :2].astype(np.float64)}
        assert np.array_equal(flat.act(x), nested.act(named))


def test_values_are_in_raw_reward_units():
    # The reward transform is 0.5: raw is twice the learned unit.
    policy, s = policy_of(), walk()[0]
    assert policy.value(s) == pytest.approx(policy._values.v(torch.from_numpy(s)).numpy() * 2.0)


def test_a_policy_is_loaded_from_a_run_and_nothing_else_is(tmp_path: Path):
    described, tensors = parts()
    store, key = Store(tmp_path / "store"), "0" * 64
    Workspace(store.folder("distill", key)).finish(tensors, {}, **described)
    made = store.commit("distill", key, version=1, parts={})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "policy").symlink_to(made.path)
    s = walk()[0]
    for path in (made.path, tmp_path / "run", tmp_path / "run" / "policy"):
        assert np.array_equal(Policy.load(path, device="cpu").act(s), policy_of().act(s))
    with pytest.raises(UserError, match="holds no policy"):
        Policy.load(tmp_path)
    Workspace(store.folder("values", key)).finish({"w": torch.ones(1)}, {})
    with pytest.raises(UserError, match="artifact of step 'values', not a policy"):
        Policy.load(store.commit("values", key, version=1, parts={}).path)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 2)])
def test_an_observation_of_another_size_is_refused(shape: Any):
    with pytest.raises(UserError, match="the policy knows 3"):
        policy_of().act(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("observation", "said"),
    [
        ((np.zeros(3), {}), "as reset\\(\\) returns them: give the first"),
        (np.zeros((2, 5, 3)), "of shape \\(2, 5, 3\\)"),
        ([[0.0, 1.0], [2.0]], "of type list"),
        (["a", "b", "c"], "of shape \\(3,\\)"),
        ([0.0, np.inf, 0.0], "entry \\(1,\\) is inf"),
        ([[0.0, 0.0, 0.0], [0.0, np.nan, 0.0]], "entry \\(1, 1\\) is nan"),
    ],
)
@pytest.mark.parametrize("method", ["act", "value"])
def test_what_is_no_observation_is_refused_and_leaves_no_trace(observation: Any, said: str, method: str):
    policy, fresh = policy_of(), policy_of()
    steps = walk(3, 1)[:, 0]
    first = policy.act(steps[0])
    with pytest.raises(UserError, match=rf"{method}\(observation\): .*{said}"):
        getattr(policy, method)(observation)
    assert np.array_equal(first, fresh.act(steps[0]))
    assert np.array_equal(policy.act(steps[1]), fresh.act(steps[1]))


def test_rewards_are_one_for_each_environment():
    policy = policy_of(prompt="fixed", target=9.0)
    policy.act(walk(1, 2)[0])
    with pytest.raises(UserError, match=r"act\(reward\): of shape \(3,\) for 2 environments"):
        policy.act(walk(1, 2)[0], reward=[1.0, 2.0, 3.0])


def test_a_new_episode_begins_with_the_whole_target():
    # A loop over vectorised environments: act(observation, reward) with the reward of the step that ended an episode.
    s = walk()
    masked, single, fresh = (policy_of(prompt="fixed", target=4.0) for _ in range(3))
    begun = fresh.act(s[1])
    masked.act(s[0])
    masked.reset(np.array([True, False, False]))
    assert np.allclose(masked.act(s[1], reward=np.array([3.0, 0.0, 0.0]))[0], begun[0], atol=1e-4)
    single.act(s[0][0])
    single.reset()
    assert np.allclose(single.act(s[1][0], reward=3.0), begun[0], atol=1e-4)


def test_q_picks_among_the_policy_and_its_neighbours():
    s = walk(steps=2)
    own = rescaled(policy_of().act(s[0]))
    target = torch.from_numpy(own) - 0.15 * torch.from_numpy(own).sign()

    def q(observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        near = -(action - target).square().sum(-1)
        return torch.stack([near, near + 1.0])

    ranked = Policy(*parts(), device="cpu", candidates=64, candidate_std=0.1)
    ranked._values.q = q  # type: ignore[method-assign]
    chosen = rescaled(ranked.act(s[0]))
    before, after = (np.linalg.norm(a - target.numpy(), axis=1) for a in (own, chosen))
    assert (after < 0.5 * before).all()
    ranked.act(s[1])
    ranked.reset()
    assert np.array_equal(rescaled(ranked.act(s[0])), chosen)  # the same noise after a reset
    # Where Q says that nothing is better than the policy's own action, that is taken.
    target = torch.from_numpy(own)
    ranked.reset()
    assert rescaled(ranked.act(s[0])) == pytest.approx(own, abs=1e-6)


def test_a_policy_saved_before_there_were_choices_has_three_tokens_a_step_and_timesteps_of_the_episode():
    described, tensors = parts(tokens="separate", timesteps="episode", max_timestep=30)
    expected = Policy(described, tensors, device="cpu").act(walk()[0])
    del described["policy"]["tokens"], described["policy"]["timesteps"]
    assert np.array_equal(Policy(described, tensors, device="cpu").act(walk()[0]), expected)
