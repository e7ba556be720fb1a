"""Peers see the log that we see, and are scored as we are. What needs d3rlpy itself runs in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import export_npz
import gymnasium as gym
import numpy as np
import peers
import pytest
import results

from ipd_ray.config import EvaluateConfig
from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.errors import UserError
from ipd_ray.evaluate.episodes import evaluate

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
needs_peers = pytest.mark.skipif(
    not PYTHON.exists(), reason="NOT TESTED: d3rlpy's environment .venv-peers is not there; `make peers` makes it"
)


def two_episodes(**changes: Any) -> Transitions:
    """Three steps that end in a termination, then two that are cut; actions between 0 and 10."""
    space = {"type": "Box", "shape": [1], "dtype": "float32"}
    columns: dict[str, Any] = {
        "dataset": "test/two-v0", "observation_space": space, "action_low": [0.0], "action_high": [10.0],
        "action_shape": [1], "action_dtype": "float32", "env_spec": gym.spec("Pendulum-v1").to_json(),
        "ref_min_score": -1200.0, "ref_max_score": -150.0,
    }
    observed = np.array([[1], [2], [3], [4], [10], [20], [30]], np.float32)
    return Transitions(
        observation=observed[[0, 1, 2, 4, 5]], next_observation=observed[[1, 2, 3, 5, 6]],
        action=np.array([[-0.5], [0.0], [0.5], [0.2], [-0.2]], np.float32),
        reward=np.array([1, 2, 3, 10, -4], np.float32), terminal=np.array([0, 0, 1, 0, 0], bool),
        episode_start=np.array([0, 3, 5]), spec=Spec(**{**columns, **changes}),
    )


@pytest.fixture
def data(tmp_path: Path) -> peers.Data:
    export_npz.export(two_episodes(), tmp_path / "log.npz")
    return peers.Data.read(tmp_path / "log.npz")


def test_actions_come_back_in_the_units_of_the_environment(data: peers.Data) -> None:
    # 0 + (a + 1) / 2 * 10
    np.testing.assert_allclose(data.actions[:, 0], [2.5, 5.0, 7.5, 6.0, 4.0], rtol=1e-6)
    assert data.actions.dtype == np.float32 and data.actions.shape == (5, 1)


def test_an_episode_ends_by_a_terminal_or_by_a_timeout(data: peers.Data) -> None:
    assert data.terminals.tolist() == [False, False, True, False, False]
    assert data.timeouts.tolist() == [False, False, False, False, True]
    assert data.episode_start.tolist() == [0, 3, 5]


def test_observations_and_rewards_are_raw(data: peers.Data) -> None:
    assert data.observations[:, 0].tolist() == [1, 2, 3, 10, 20]
    assert data.rewards.tolist() == [1, 2, 3, 10, -4]
    assert data.episode_return.tolist() == [6, 6] and data.longest == 3
    assert (data.metadata["ref_min_score"], data.metadata["ref_max_score"]) == (-1200.0, -150.0)
    assert data.metadata["content_hash"] == two_episodes().content_hash


def test_the_file_names_the_environment(data: peers.Data) -> None:
    env = data.make()
    assert env.spec is not None and env.spec.id == "Pendulum-v1"


@pytest.mark.parametrize(
    "changes",
    [
        {"env_spec": None},
        {"ref_max_score": None},
        {"observation_space": {"type": "Box", "shape": [1, 1], "dtype": "float32"}},
    ],
)
def test_a_log_that_cannot_be_scored_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test/two-v0"):
        export_npz.export(two_episodes(**changes), tmp_path / "log.npz")
    assert not list(tmp_path.iterdir())


class Swing:
    """A policy for Pendulum that pushes along the velocity: 2 * tanh(velocity)."""

    def __init__(self) -> None:
        self.spec = Spec(
            "test/pendulum-v0", {"type": "Box", "shape": [3], "dtype": "float32"}, [-2.0], [2.0], [1], "float32",
            env_spec=gym.spec("Pendulum-v1").to_json(),
        )
        self.discount = 0.99

    def reset(self) -> None: ...

    def act(self, observation: Any, reward: Any) -> Any:
        return 2.0 * np.tanh(np.asarray(observation, np.float32)[:, 2:])

    def value(self, observation: Any) -> Any:
        return np.zeros(len(observation))


def test_peers_are_evaluated_by_our_protocol() -> None:
    policy = Swing()
    ours = evaluate(policy, EvaluateConfig(episodes=3, seed=1000))["returns"]  # type: ignore[arg-type]
    assert peers.play(policy.act, lambda: gym.make("Pendulum-v1"), episodes=3, seed=1000) == ours


def test_a_diverged_policy_is_not_scored() -> None:
    with pytest.raises(FloatingPointError, match="diverged"):
        peers.play(lambda o, r: np.full((2, 1), np.nan, np.float32), lambda: gym.make("Pendulum-v1"), 2, 0)


@pytest.mark.parametrize(("interval", "epoch"), [(5000, 1000), (2500, 625), (300, 300), (1, 1)])
def test_losses_are_averaged_over_a_divisor_of_the_interval(interval: int, epoch: int) -> None:
    assert peers.epoch_of(interval) == epoch


def options_of(tmp_path: Path, **changes: Any) -> Namespace:
    settings: dict[str, Any] = {
        "dataset": tmp_path / "log.npz", "algorithm": "bc", "seed": 0, "updates": 200, "tier": "t", "episodes": 2,
        "evaluation_seed": 1000, "evaluations": 2, "out": tmp_path / "results", "threads": 1, "device": "cpu",
    }
    return Namespace(**{**settings, **changes})


def test_uneven_evaluations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--updates=200 must be a multiple of --evaluations=3"):
        peers.run(options_of(tmp_path, evaluations=3))


def write_result(data: peers.Data, tmp_path: Path) -> Path:
    scores = [results.Score(100, [0.0, 0.0]), results.Score(200, [0.0, 0.0])]
    result = results.Result(
        dataset="test/two-v0", method="d3rlpy-bc", tier="t", seed=0, curve=scores, reference=(-1200.0, -150.0),
        config={}, seconds={}, evaluation={"episodes": 2, "seed": 1000}, commit="", versions={},
        extra={"data": {"content_hash": data.metadata["content_hash"]}},
    )
    return results.write(result, tmp_path / "results")


def test_what_is_there_is_not_run_again(data: peers.Data, tmp_path: Path) -> None:
    # Running it would need d3rlpy, which is not in this environment.
    path = write_result(data, tmp_path)
    before = path.read_bytes()
    assert peers.run(options_of(tmp_path)) == path
    assert path.read_bytes() == before


def test_a_result_of_other_settings_is_not_taken_for_this_one(data: peers.Data, tmp_path: Path) -> None:
    write_result(data, tmp_path)
    with pytest.raises(ValueError, match="updates=200, asked for 400"):
        peers.run(options_of(tmp_path, updates=400))


# ---- with d3rlpy


def pendulum(path: Path, episodes: int = 4) -> None:
    """Export episodes of random pushes."""
    env, rng = gym.make("Pendulum-v1"), np.random.default_rng(0)
    observed, acted, rewards = [], [], []
    for episode in range(episodes):
        observed.append([env.reset(seed=episode)[0]])
        for _ in range(200):
            acted.append(rng.uniform(-2, 2, 1).astype(np.float32))
            observation, reward, *_ = env.step(acted[-1])
            observed[-1].append(observation)
            rewards.append(float(reward))
    spec = Swing().spec
    columns = {**json.loads(spec.to_json()), "ref_min_score": -1200.0, "ref_max_score": -150.0}
    export_npz.export(
        Transitions(
            observation=np.concatenate([o[:-1] for o in observed]).astype(np.float32),
            next_observation=np.concatenate([o[1:] for o in observed]).astype(np.float32),
            action=spec.rescale_action(np.array(acted)), reward=np.array(rewards, np.float32),
            terminal=np.zeros(len(acted), bool), episode_start=np.arange(episodes + 1) * 200, spec=Spec(**columns),
        ),
        path,
    )


def with_peers(*arguments: str, cwd: Path) -> str:
    """Run Python in the peers' environment, and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(PYTHON), *arguments], capture_output=True, text=True, env=environment, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_peers
@pytest.mark.slow
def test_a_peer_runs_from_the_log_to_its_result(tmp_path: Path) -> None:
    pendulum(tmp_path / "log.npz")
    arguments = [
        str(ROOT / "benchmarks" / "scores" / "peers.py"), str(tmp_path / "log.npz"), "--algorithm", "bc", "--seed", "0",
        "--updates", "200", "--tier", "t", "--episodes", "2", "--evaluation-seed", "1000", "--evaluations", "2",
        "--out", str(tmp_path / "results"),
    ]  # fmt: skip
    with_peers(*arguments, cwd=tmp_path)
    (result,) = results.read_all("t", tmp_path / "results")
    assert [score.step for score in result.curve] == [100, 200]
    assert [len(score.returns) for score in result.curve] == [2, 2]
    assert result.method == "d3rlpy-bc" and result.reference == (-1200.0, -150.0)
    scaler = result.config["action_scaler"]["params"]
    assert (scaler["minimum"], scaler["maximum"]) == ([-2.0], [2.0])
    assert result.extra["losses"]["loss"][1] < result.extra["losses"]["loss"][0]
    assert "is there" in with_peers(*arguments, cwd=tmp_path)


SAME_AS_WRAPPER = """
import sys
from pathlib import Path

import numpy as np

import peers

data = peers.Data.read(Path(sys.argv[1]))
peer = peers.peer_of("dt", data, 100)
peer.config.context_size = 4
import d3rlpy

d3rlpy.seed(0)
ends = data.terminals * 1.0, data.timeouts * 1.0
log = d3rlpy.dataset.MDPDataset(data.observations, data.actions, data.rewards, *ends)
algo = peer.config.create(device="cpu")
quiet = d3rlpy.logging.NoopAdapterFactory()
algo.fit(log, n_steps=5, n_steps_per_epoch=5, show_progress=False, logger_adapter=quiet)
prompt = peers.Prompt(algo, peer.target_return, "cpu")
alone = [algo.as_stateful_wrapper(target_return=peer.target_return) for _ in range(3)]
for one in alone:
    one.reset()
rng = np.random.default_rng(0)
reward = np.zeros(3, np.float32)
for step in range(9):  # more than twice the context
    observation = rng.normal(size=(3, 3)).astype(np.float32)
    expected = [one.predict(observation[i], float(reward[i])) for i, one in enumerate(alone)]
    np.testing.assert_allclose(prompt.act(observation, reward), expected, atol=1e-5)
    reward = rng.normal(size=3).astype(np.float32) * 100
assert np.std(expected) > 0
print("equal")
"""


@needs_peers
@pytest.mark.slow
def test_the_batched_prompt_equals_the_stateful_wrapper_of_d3rlpy(tmp_path: Path) -> None:
    pendulum(tmp_path / "log.npz")
    out = with_peers("-c", SAME_AS_WRAPPER, str(tmp_path / "log.npz"), cwd=ROOT / "benchmarks" / "scores")
    assert out.splitlines()[-1] == "equal"
