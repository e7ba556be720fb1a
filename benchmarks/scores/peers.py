"""Peers nobody here wrote: d3rlpy's algorithms on an exported log, evaluated as we evaluate.

    .venv-peers/bin/python benchmarks/scores/peers.py hopper.npz --algorithm iql --seed 0 --updates 20000 \\
        --tier small --episodes 20 --evaluation-seed 1000 --evaluations 4 --out results

Runs in an environment of its own (peers-constraints.txt), since d3rlpy pins Gymnasium; the log comes from
export_npz.py. Hyperparameters are those of d3rlpy 2.8's scripts reproductions/offline/*.py (MIT), written at each
algorithm below; BC has no script there, so d3rlpy's defaults stand. Three settings follow the budget or the data, and
each result says so under `extra.adapted`: schedules span the updates of the run, actions are scaled by the
environment's bounds where these are not [-1, 1], and Decision Transformer is asked for the best return in the data.

d3rlpy trains on every episode (none is held out) except the last step of a truncated one, which has no next
observation there. One run is the unit: a run that was cut short starts anew. d3rlpy is imported where it is used, so
that the rest can be tested without it. Shapes: N episodes side by side, C context, O observation, A action.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import results
import torch
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Act = Callable[[Floats, Floats], Floats]
"""Observations (N, O) and the last rewards (N,), zero at first -> actions (N, A) in the environment's units."""

STEP_LIMIT = 100_000
"""Steps after which an episode counts as over where nothing else limits it."""
REPORT_SECONDS = 15.0
EPOCH = 1000
"""Updates over which d3rlpy averages its losses, as in its scripts; fewer where it must divide the interval."""


# ---- the log


@dataclass(frozen=True)
class Data:
    """An exported log: see export_npz.py."""

    observations: Floats
    actions: Floats
    rewards: Floats
    terminals: NDArray[np.bool_]
    timeouts: NDArray[np.bool_]
    metadata: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Data:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return cls(metadata=json.loads(str(arrays.pop("metadata"))), **arrays)

    @cached_property
    def episode_start(self) -> NDArray[np.int64]:
        """(E + 1,) first step of each episode, and T."""
        return np.concatenate([[0], np.flatnonzero(self.terminals | self.timeouts) + 1])

    @cached_property
    def episode_return(self) -> NDArray[np.float64]:
        """(E,) raw, undiscounted."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.episode_start[:-1])

    @property
    def longest(self) -> int:
        """Steps of the longest episode."""
        return int(np.diff(self.episode_start).max())

    def make(self) -> gym.Env[Any, Any]:
        """Return the environment that the log comes from."""
        return gym.make(EnvSpec.from_json(self.metadata["env_spec"]))


# ---- evaluation


def play(act: Act, make: Callable[[], gym.Env[Any, Any]], episodes: int, seed: int) -> list[float]:
    """Return raw returns of whole episodes that advance together; the i-th starts from seed + i.

    The protocol of ipd_ray.evaluate.episodes (a test holds the two equal): observations in float32, one batched forward
    a step, actions clipped to the environment's bounds. An ended episode starts anew and no longer counts.
    """
    envs = gym.vector.SyncVectorEnv([make for _ in range(episodes)])
    try:
        space = envs.single_action_space
        observation, _ = envs.reset(seed=[seed + i for i in range(episodes)])
        total, running = np.zeros(episodes), np.ones(episodes, bool)
        reward = np.zeros(episodes)
        steps = 0
        while running.any() and steps < STEP_LIMIT:
            action = act(np.asarray(observation, np.float32), np.asarray(reward, np.float32))
            if not np.isfinite(action[running]).all():
                raise FloatingPointError(f"the policy's action is NaN or infinite at step {steps}: training diverged.")
            action = np.clip(action.reshape(episodes, *space.shape), space.low, space.high).astype(space.dtype)
            observation, reward, terminated, truncated, _ = envs.step(action)
            total += reward * running
            running &= ~(terminated | truncated)
            steps += 1
    finally:
        envs.close()
    return total.tolist()


class Prompt:
    """d3rlpy's Decision Transformer acting in N environments at once.

    Does for a batch what d3rlpy's stateful wrapper does for one environment, with the same model and scalers (a test
    holds the two equal): contexts are padded in front, time counts from 1, the current action's slot is zero, and the
    return asked for falls by every reward.
    """

    def __init__(self, algo: Any, target_return: float, device: str):
        self._algo, self._target, self._device = algo, target_return, device
        self._rest: NDArray[np.float64] | None = None

    def act(self, observation_NO: Floats, reward_N: Floats) -> Floats:
        """Return actions (N, A); the first call begins the episodes."""
        if self._rest is None:
            n, context = len(observation_NO), self._algo.config.context_size
            self._rest = np.full(n, self._target)
            self._observation = np.zeros((n, context, observation_NO.shape[1]), np.float32)
            self._action = np.zeros((n, context, self._algo.impl.action_size), np.float32)
            self._return = np.zeros((n, context, 1), np.float32)
            self._time, self._mask = np.zeros((n, context), np.int64), np.zeros((n, context), np.float32)
        self._rest -= reward_N
        time_now = min(int(self._time[0, -1]) + 1, self._algo.config.max_timestep)
        for column, value in (
            (self._observation, observation_NO), (self._action, 0.0), (self._return, self._rest[:, None]),
            (self._time, time_now), (self._mask, 1.0),
        ):  # fmt: skip
            column[:, :-1] = column[:, 1:]
            column[:, -1] = value
        self._action[:, -1] = self._forward()
        return self._action[:, -1]

    @torch.no_grad()
    def _forward(self) -> Floats:
        config, modules = self._algo.config, self._algo.impl.modules
        observation, action, target, when, mask = (
            torch.tensor(column, device=self._device)
            for column in (self._observation, self._action, self._return, self._time, self._mask)
        )
        if config.observation_scaler:
            observation = config.observation_scaler.transform(observation)
        if config.action_scaler:
            action = config.action_scaler.transform(action)
        if config.reward_scaler:
            target = config.reward_scaler.transform(target)
        modules.set_eval()  # d3rlpy's update sets it back
        chosen = modules.transformer(observation, action, target, when, 1 - mask)[:, -1]
        if config.action_scaler:
            chosen = config.action_scaler.reverse_transform(chosen)
        return chosen.cpu().numpy()


# ---- the peers


@dataclass(frozen=True)
class Peer:
    """An algorithm as d3rlpy publishes it, for one log and one budget."""

    config: Any
    """d3rlpy's config; its scalers are fitted when training begins."""
    published_updates: int | None
    """Updates in d3rlpy's script."""
    adapted: tuple[str, ...] = ()
    """What differs from d3rlpy's script, in words."""
    target_return: float | None = None
    """What Decision Transformer is asked for, raw."""


def _bc(data: Data, updates: int, scaled: dict[str, Any]) -> Peer:
    from d3rlpy.algos import BCConfig

    return Peer(BCConfig(**scaled), None, ("no script published; d3rlpy's defaults",))


def _iql(data: Data, updates: int, scaled: dict[str, Any]) -> Peer:
    from d3rlpy.algos import IQLConfig
    from d3rlpy.optimizers import AdamFactory, CosineAnnealingLRFactory
    from d3rlpy.preprocessing import ReturnBasedRewardScaler

    config = IQLConfig(
        batch_size=256,
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        actor_optim_factory=AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=updates)),
        expectile=0.7,
        weight_temp=3.0,
        max_weight=100.0,
        reward_scaler=ReturnBasedRewardScaler(multiplier=1000.0),
        **scaled,
    )
    return Peer(config, 500_000, (f"actor's cosine schedule over {updates} updates",))


def _td3bc(data: Data, updates: int, scaled: dict[str, Any]) -> Peer:
    from d3rlpy.algos import TD3PlusBCConfig
    from d3rlpy.preprocessing import StandardObservationScaler

    config = TD3PlusBCConfig(
        batch_size=256,
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        alpha=2.5,
        target_smoothing_sigma=0.2,
        target_smoothing_clip=0.5,
        update_actor_interval=2,
        observation_scaler=StandardObservationScaler(),
        **scaled,
    )
    return Peer(config, 500_000)


def _cql(data: Data, updates: int, scaled: dict[str, Any]) -> Peer:
    from d3rlpy.algos import CQLConfig
    from d3rlpy.models import VectorEncoderFactory

    config = CQLConfig(
        batch_size=256,
        actor_learning_rate=1e-4,
        critic_learning_rate=3e-4,
        temp_learning_rate=1e-4,
        alpha_learning_rate=0.0,
        actor_encoder_factory=VectorEncoderFactory([256, 256, 256]),
        critic_encoder_factory=VectorEncoderFactory([256, 256, 256]),
        n_action_samples=10,
        # d3rlpy's rule, by the dataset's name, which our names happen to meet.
        conservative_weight=10.0 if "medium-v0" in data.metadata["dataset"] else 5.0,
        **scaled,
    )
    return Peer(config, 500_000)


def _dt(data: Data, updates: int, scaled: dict[str, Any]) -> Peer:
    from d3rlpy import PositionEncodingType
    from d3rlpy.algos import DecisionTransformerConfig
    from d3rlpy.models import VectorEncoderFactory
    from d3rlpy.optimizers import AdamWFactory, WarmupSchedulerFactory
    from d3rlpy.preprocessing import MultiplyRewardScaler, StandardObservationScaler

    warmup = min(10_000, max(1, updates // 10))  # 10,000 of 100,000 as published
    target = float(data.episode_return.max())
    config = DecisionTransformerConfig(
        batch_size=64,
        learning_rate=1e-4,
        optim_factory=AdamWFactory(
            weight_decay=1e-4, clip_grad_norm=0.25, lr_scheduler_factory=WarmupSchedulerFactory(warmup_steps=warmup)
        ),
        encoder_factory=VectorEncoderFactory([128], exclude_last_activation=True),
        observation_scaler=StandardObservationScaler(),
        reward_scaler=MultiplyRewardScaler(0.001),
        position_encoding_type=PositionEncodingType.SIMPLE,
        context_size=20,
        num_heads=1,
        num_layers=3,
        max_timestep=max(1000, data.longest),
        **scaled,
    )
    adapted = (f"warmup over {warmup} updates", f"target return {target:.6g}, the best in the data")
    return Peer(config, 100_000, adapted, target)


PEERS: dict[str, Callable[[Data, int, dict[str, Any]], Peer]] = {
    "bc": _bc, "iql": _iql, "td3bc": _td3bc, "cql": _cql, "dt": _dt,
}  # fmt: skip


def peer_of(algorithm: str, data: Data, updates: int) -> Peer:
    """Return an algorithm's published settings for a log and a budget."""
    from d3rlpy.preprocessing import MinMaxActionScaler

    low, high = np.float32(data.metadata["action_low"]), np.float32(data.metadata["action_high"])
    if (low == -1.0).all() and (high == 1.0).all():
        return PEERS[algorithm](data, updates, {})
    peer = PEERS[algorithm](data, updates, {"action_scaler": MinMaxActionScaler(minimum=low, maximum=high)})
    adapted = (*peer.adapted, "actions scaled by the environment's bounds")
    return Peer(peer.config, peer.published_updates, adapted, peer.target_return)


# ---- training


def epoch_of(interval: int) -> int:
    """Return the largest divisor of `interval` up to EPOCH: losses are averaged over it, and end where scores lie."""
    return next(n for n in range(min(EPOCH, interval), 0, -1) if interval % n == 0)


@dataclass
class Training:
    """What one run leaves behind."""

    curve: list[results.Score]
    losses: dict[str, list[float]]
    """By name, one mean over the last `epoch_of` updates for each point of the curve."""
    seconds: dict[str, float]


def train(peer: Peer, data: Data, options: argparse.Namespace) -> Training:
    """Train with d3rlpy's own loop, and score at equally spaced points, the last update among them."""
    import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))  # d3rlpy's INFO says nothing new
    d3rlpy.seed(options.seed)
    begun = time.perf_counter()
    log = d3rlpy.dataset.MDPDataset(
        data.observations, data.actions, data.rewards, data.terminals.astype(np.float32),
        data.timeouts.astype(np.float32), action_space=d3rlpy.ActionSpace.CONTINUOUS,
    )  # fmt: skip
    done = Training([], {}, {"load": time.perf_counter() - begun, "train": 0.0, "evaluate": 0.0})
    algo = peer.config.create(device=options.device)
    interval = options.updates // options.evaluations

    class Recorder(d3rlpy.logging.NoopAdapter):
        """Keeps the losses at the points of the curve; also the factory of itself."""

        def create(self, algo: Any, experiment_name: str, n_steps_per_epoch: int) -> Recorder:
            return self

        def write_metric(self, epoch: int, step: int, name: str, value: float) -> None:
            if not np.isfinite(value):
                raise FloatingPointError(f"{name} is {value} in the updates up to {step}: training diverged.")
            if step % interval == 0 and not name.startswith("time_"):
                done.losses.setdefault(name, []).append(float(value))

    first = reported = 0.0

    def after_update(algo: Any, epoch: int, step: int) -> None:
        nonlocal first, reported
        now = time.perf_counter()
        first, reported = first or now, reported or now
        if step == 1:
            done.seconds["prepare"] = now - begun - done.seconds["load"]  # d3rlpy fits its scalers here
        elif now - reported > REPORT_SECONDS or step == options.updates:
            reported = now
            rate = (step - 1) / max(now - first - done.seconds["evaluate"], 1e-9)
            left = (options.updates - step) / rate
            print(f"  update {step}/{options.updates}, {rate:.1f} updates/s, {left:.0f} s left", flush=True)
        if step % interval == 0:
            if peer.target_return is None:
                act: Act = lambda observation, reward: algo.predict(observation)  # noqa: E731
            else:
                act = Prompt(algo, peer.target_return, options.device).act
            score = results.Score(step, play(act, data.make, options.episodes, options.evaluation_seed))
            done.curve.append(score)
            took = time.perf_counter() - now
            done.seconds["evaluate"] += took
            print(f"  update {step}: return {score.mean:.1f}, {options.episodes} episodes in {took:.1f} s", flush=True)

    algo.fit(
        log, n_steps=options.updates, n_steps_per_epoch=epoch_of(interval), show_progress=False, with_timestamp=False,
        logger_adapter=Recorder(), callback=after_update,
    )  # fmt: skip
    done.seconds["train"] = time.perf_counter() - first - done.seconds["evaluate"]
    return done


def versions() -> dict[str, str]:
    """Return what the numbers were made with."""
    names = [n for n in ("d3rlpy", "gymnasium", "mujoco", "numpy", "torch") if _installed(n)]
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for a setting that cannot be run."""
    for name in ("updates", "evaluations", "episodes", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)} must be at least 1.")
    if options.updates % options.evaluations:
        raise ValueError(
            f"--updates={options.updates} must be a multiple of --evaluations={options.evaluations}, whose points are "
            "equally spaced: change either."
        )


def check_same(path: Path, content_hash: str, options: argparse.Namespace) -> None:
    """Raise ValueError where a result is there, but of other settings than the ones asked for."""
    there = results.read(path)
    asked = {
        "updates": options.updates, "evaluations": options.evaluations, "episodes": options.episodes,
        "evaluation seed": options.evaluation_seed, "data": content_hash,
    }  # fmt: skip
    found = {
        "updates": there.curve[-1].step, "evaluations": len(there.curve), "episodes": there.evaluation["episodes"],
        "evaluation seed": there.evaluation["seed"], "data": there.extra["data"]["content_hash"],
    }  # fmt: skip
    if differ := [f"{k}={found[k]}, asked for {asked[k]}" for k in asked if asked[k] != found[k]]:
        raise ValueError(f"{path} has {'; '.join(differ)}: use another --tier, or remove the file.")


def run(options: argparse.Namespace) -> Path:
    """Carry one run out, or find it done; return its result's file."""
    check_options(options)
    torch.set_num_threads(options.threads)
    data = Data.read(options.dataset)
    dataset, method = data.metadata["dataset"], f"d3rlpy-{options.algorithm}"
    path = results.path_of(options.tier, dataset, method, options.seed, options.out)
    if path.exists():
        check_same(path, data.metadata["content_hash"], options)
        print(f"{path} is there")
        return path
    print(f"{method} on {dataset}, seed {options.seed}", flush=True)
    peer = peer_of(options.algorithm, data, options.updates)
    done = train(peer, data, options)
    settings = json.loads(peer.config.serialize())  # with the scalers as fitted: d3rlpy cannot write them before
    result = results.Result(
        dataset=dataset, method=method, tier=options.tier, seed=options.seed, curve=done.curve,
        reference=(data.metadata["ref_min_score"], data.metadata["ref_max_score"]),
        config={"updates": options.updates, "evaluations": options.evaluations, **settings},
        seconds=done.seconds, evaluation={"episodes": options.episodes, "seed": options.evaluation_seed},
        commit=results.commit(), versions=versions(),
        extra={
            "losses": done.losses,
            "adapted": list(peer.adapted),
            "published_updates": peer.published_updates,
            "target_return": peer.target_return,
            "updates_per_second": (options.updates - 1) / done.seconds["train"],
            "threads": options.threads,
            "device": options.device,
            "data": {
                "content_hash": data.metadata["content_hash"],
                "steps": len(data.rewards),
                "episodes": len(data.episode_return),
                "return_mean": float(data.episode_return.mean()),
                "return_max": float(data.episode_return.max()),
            },
        },
    )  # fmt: skip
    path = results.write(result, options.out)
    print(f"{path}: last {result.last:.1f}, best checkpoint {result.best:.1f} (normalised)")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="npz file of export_npz.py")
    parser.add_argument("--algorithm", choices=tuple(PEERS), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True, help="gradient updates")
    parser.add_argument("--tier", required=True, help="folder of results that are compared with each other")
    parser.add_argument("--episodes", type=int, default=20, help="whole episodes at every evaluation")
    parser.add_argument("--evaluation-seed", type=int, required=True, help="seed of the first episode")
    parser.add_argument("--evaluations", type=int, default=4, help="equally spaced, the last at the end")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="root of the results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    try:
        run(parser.parse_args())
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
