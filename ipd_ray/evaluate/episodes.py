"""The policy in vectorised environments: episodes advance together, one batched forward a step."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from ipd_ray.config import EvaluateConfig
from ipd_ray.data.transitions import Spec
from ipd_ray.errors import UserError, near_name
from ipd_ray.world_model.termination import import_dotted

logger = logging.getLogger(__name__)

VERSION = 2
STEP_LIMIT = 100_000
"""Steps after which an episode counts as over where nothing else limits it."""


class NoEnvironment(RuntimeError):
    """There is no environment to evaluate in; the message says why."""


def environment_maker(spec: Spec, name: str | None, max_steps: int | None = None) -> Callable[..., gym.Env[Any, Any]]:
    """Return what makes the environment: the user's, or the log's own. It takes `render_mode` where that can be had.

    name: a Gymnasium id (also `package:Name-v0`) or `package.module:function`. max_steps: truncates episodes there
    instead of at the environment's own limit. Raises UserError where the user named one that cannot be had,
    NoEnvironment where the log names none or one that is not installed.
    """
    if name and ":" in name and not re.search(r"-v\d+$", name):
        module, _, function = name.partition(":")
        users = import_dotted("evaluate.environment", module, function)
        if max_steps is None:
            return users
        return lambda **kwargs: gym.wrappers.TimeLimit(users(**kwargs), max_steps)
    limit: dict[str, Any] = {} if max_steps is None else {"max_episode_steps": max_steps}
    if name:
        if name not in gym.registry and ":" not in name:
            raise UserError(f"evaluate.environment={name!r} is no Gymnasium id here.{near_name(name, gym.registry)}")
        return lambda **kwargs: gym.make(name, **limit, **kwargs)
    if spec.env_spec is None:
        raise NoEnvironment(
            f"dataset {spec.dataset} names no environment; give one with evaluate.environment=ID or "
            "package.module:function"
        )
    if "mujoco" in spec.env_spec:
        _warn_once()
    try:
        env_spec = EnvSpec.from_json(spec.env_spec)
        gym.make(env_spec).close()
    except Exception as error:  # whatever a third party's environment raises, the log is still good
        raise NoEnvironment(
            f"the environment of {spec.dataset} cannot be made here ({type(error).__name__}: {error})"
        ) from error
    return lambda **kwargs: gym.make(env_spec, **limit, **kwargs)


@cache
def _warn_once() -> None:
    """Log each of MuJoCo's warnings once: left alone, it prints them for every environment that is made, and into a
    MUJOCO_LOG.TXT in the user's folder."""
    try:
        import mujoco
    except ImportError:
        return
    seen: set[str] = set()

    def warn(text: str) -> None:
        if text not in seen:
            seen.add(text)
            logger.info("MuJoCo: %s", text)

    if hasattr(mujoco, "set_mju_user_warning"):  # MuJoCo 3 and later
        mujoco.set_mju_user_warning(warn)


class Acting(Protocol):
    """What episodes need of a policy; see ipd_ray.evaluate.acting.Policy."""

    spec: Spec
    discount: float

    def reset(self, mask: Any = None) -> None: ...

    def act(self, observation: Any, reward: Any = None) -> Any: ...

    def value(self, observation: Any) -> Any: ...


def evaluate(
    policy: Acting, config: EvaluateConfig, *, progress: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Run the policy for `episodes` whole episodes in float32 and return raw and normalised scores.

    progress: called now and then with (steps done, share of episodes ended).
    """
    make = environment_maker(policy.spec, config.environment, config.max_steps)
    n = config.episodes
    envs = gym.vector.SyncVectorEnv(
        [make for _ in range(n)]  # an ended episode starts anew; its rows no longer count
    )
    try:
        _check_spaces(policy.spec, envs)
        observation, _ = envs.reset(seed=[config.seed + i for i in range(n)])
        policy.reset()
        total, discounted, length = np.zeros(n), np.zeros(n), np.zeros(n, np.int64)
        running = np.ones(n, bool)
        reward: Any = None
        value_at_start = policy.value(observation)
        steps = 0
        while running.any() and steps < (config.max_steps or STEP_LIMIT):
            action = policy.act(observation, reward)
            observation, reward, terminated, truncated, _ = envs.step(action)
            total += reward * running
            discounted += policy.discount**steps * reward * running
            length += running
            running &= ~(terminated | truncated)
            steps += 1
            if progress and steps % 50 == 0:
                progress(steps, 1.0 - float(running.mean()))
    finally:
        envs.close()
    normalised = [policy.spec.normalise(float(x)) for x in total]
    known = [x for x in normalised if x is not None]
    return {
        "return_mean": float(total.mean()),
        "return_std": float(total.std()),
        "returns": total.tolist(),
        "lengths": length.tolist(),
        "episodes": n,
        "normalised": float(np.mean(known)) if known else None,
        "discounted_mean": float(discounted.mean()),
        "value_at_start": float(value_at_start.mean()),
    }


def _check_spaces(spec: Spec, envs: gym.vector.VectorEnv[Any, Any, Any]) -> None:
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Box) or list(space.shape) != list(spec.action_shape):
        raise UserError(
            f"evaluate.environment: its action space is {space}, the log's has shape {tuple(spec.action_shape)}: "
            "evaluate in the environment that the log comes from."
        )
