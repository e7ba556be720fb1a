"""The policy in vectorised environments: episodes advance together, one batched forward a step."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from ipd_ray.config import EvaluateConfig
from ipd_ray.data.transitions import Bools, Spec, Transitions
from ipd_ray.errors import UserError, first_line, near_name
from ipd_ray.world_model.termination import import_dotted

logger = logging.getLogger(__name__)

VERSION = 3
STEP_LIMIT = 100_000
"""Steps after which an episode counts as over where nothing else limits it; a limit beyond is none."""
_UNENDING = 10
"""Lengths of the log's longest episode, and a thousand steps at least, after which an episode is cut where neither log
nor environment shows a limit of time."""
_SUCCESS = ("success", "is_success")
"""What environments with goals call it in their infos."""
NO_SPEC = Spec("", {}, [], [], [], "")
"""For an environment by name, without a log."""


class NoEnvironment(RuntimeError):
    """There is no environment to evaluate in; the message says why."""


def portable(env_spec: str | None, name: str | None) -> tuple[str | None, str | None]:
    """Return what stands for an environment in any process, whatever only this one has registered.

    env_spec: JSON of the log's own Gymnasium spec, which holds where no name is given. name: of the user's, see
    `environment_maker`; an id gives way to the JSON of its spec. Raises UserError for what no other process can have.
    """
    if name is None:
        return env_spec, None
    remedy = (
        "workers have no part in this script or notebook. Put what makes it into a module of its own and set "
        "evaluate.environment=module:function, or =package:Name-v0 where importing the package registers it."
    )
    module = name.rpartition(":")[0]
    if module == "__main__":
        raise UserError(f"evaluate.environment={name}: {remedy}")
    if module:
        return None, name
    try:
        spec = gym.spec(name)
    except gym.error.Error:
        raise UserError(
            f"evaluate.environment={name!r} is no Gymnasium id here.{near_name(name, gym.registry)} Install its "
            f"package, or name the module that registers it: package:{name}."
        ) from None
    if callable(spec.entry_point) or str(spec.entry_point).startswith("__main__:"):
        raise UserError(f"evaluate.environment={name} is registered with {spec.entry_point!r}: {remedy}")
    try:
        return spec.to_json(), None
    except Exception as error:  # its arguments may be anything
        raise UserError(
            f"evaluate.environment={name} is registered with what JSON cannot hold ({first_line(error)}): {remedy}"
        ) from error


def environment_maker(spec: Spec, name: str | None, max_steps: int | None = None) -> Callable[..., gym.Env[Any, Any]]:
    """Return what makes the environment: the user's, or the log's own. It takes `render_mode` where that can be had.

    name: a Gymnasium id (also `package:Name-v0`) or `package.module:function`. max_steps: truncates episodes there
    instead of at the environment's own limit. Raises UserError where the user named one that cannot be had,
    NoEnvironment where the log names none.
    """
    env_spec, name = portable(spec.env_spec, name)
    if name and not re.search(r"-v\d+$", name):
        module, _, function = name.partition(":")
        users = import_dotted("evaluate.environment", module, function)
        if max_steps is None:
            return users
        return lambda **kwargs: gym.wrappers.TimeLimit(users(**kwargs), max_steps)
    limit: dict[str, Any] = {} if max_steps is None else {"max_episode_steps": max_steps}
    if name:
        return lambda **kwargs: gym.make(name, **limit, **kwargs)
    if env_spec is None:
        raise NoEnvironment(
            f"dataset {spec.dataset} names no environment; give one with evaluate.environment=ID or "
            "package.module:function"
        )
    if "mujoco" in env_spec:
        _warn_once()
    return lambda **kwargs: gym.make(EnvSpec.from_json(env_spec), **limit, **kwargs)


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


@dataclass(frozen=True)
class Arena:
    """The environment that a log is evaluated in, made once to be looked at."""

    spec: Spec
    """Of the log; its environment is this one where that goes by an id."""
    config: EvaluateConfig
    """With which any process evaluates there: `environment` is left where it is a function's, `max_steps` is set."""
    actions: gym.spaces.Box
    own_limit: int | None
    """Steps after which it ends an episode itself; None where that is not to be seen, or practically never."""


def arena_of(transitions: Transitions, config: EvaluateConfig) -> Arena:
    """Look at the environment before any work.

    Raises UserError where the user named one that cannot be had or is not the log's, NoEnvironment where the log names
    none, one that cannot be made here, or one that is not its own: that log is still good.
    """
    log, name = transitions.spec, config.environment
    env_spec, function = portable(log.env_spec, name)
    kind: type[Exception] = UserError if name else NoEnvironment
    what = f"evaluate.environment={name}" if name else f"the environment of {log.dataset}"
    try:
        actions, observations, own_limit = _look(env_spec, function, log.dataset)
    except (UserError, NoEnvironment):
        raise
    except Exception as error:  # whatever a third party's environment raises
        raise kind(
            f"{what} cannot be made here ({type(error).__name__}: {error}): install what it needs, or set "
            "evaluate.environment to another"
        ) from error
    if misfit := _misfit(log, actions, observations):
        raise kind(
            f"{what} does not fit the log: {misfit}: set evaluate.environment to the one that was logged "
            "(package.module:function, where it was wrapped)"
        )
    longest = int(transitions.episode_length.max())
    fallback = transitions.longest_cut or max(1000, _UNENDING * longest)
    settled = {"environment": function, "max_steps": config.max_steps or own_limit or min(fallback, STEP_LIMIT)}
    return Arena(replace(log, env_spec=env_spec), config.model_copy(update=settled), actions, own_limit)


@lru_cache(maxsize=2)
def _look(env_spec: str | None, function: str | None, dataset: str) -> tuple[Any, Any, int | None]:
    """Action space, observation space and limit of time; kept, since some environments take seconds to make."""
    env = environment_maker(replace(NO_SPEC, dataset=dataset, env_spec=env_spec), function)()
    own = [env.spec.max_episode_steps] if env.spec else []
    if env.has_wrapper_attr("_max_episode_steps"):  # Gymnasium's TimeLimit, and who imitates it
        own.append(env.get_wrapper_attr("_max_episode_steps"))
    env.close()
    limits = [int(steps) for steps in own if steps is not None and 0 < steps < STEP_LIMIT]
    return env.action_space, env.observation_space, min(limits, default=None)


def _misfit(spec: Spec, actions: gym.Space[Any], observations: gym.Space[Any]) -> str:
    """Say why the policy of a log cannot act with these spaces; empty where it can."""
    if not isinstance(actions, gym.spaces.Box) or list(actions.shape) != list(spec.action_shape):
        return f"its action space is {actions}, the log's has shape {tuple(spec.action_shape)}"
    try:
        fits = spec.flatten_observation(observations.sample()).ndim == 1
    except (ValueError, KeyError, TypeError, IndexError):
        fits = False
    return "" if fits else f"its observation space is {observations}, the log's is {_shown(spec.observation_space)}"


def _shown(space: Mapping[str, Any]) -> str:
    if space["type"] == "Dict":
        return f"Dict({', '.join(f'{name}: {_shown(part)}' for name, part in space['spaces'].items())})"
    return f"{space['type']} of shape {tuple(space['shape'])}"


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

    `success` is the share of episodes in which the environment's infos ever say so, None where they never speak of it.
    `discounted_mean` is of what `value_at_start` promises: where time is up, V of the last observation is what follows.
    progress: called now and then with (steps done, share of episodes ended).
    """
    make = environment_maker(policy.spec, config.environment, config.max_steps)
    n, limit = config.episodes, config.max_steps or STEP_LIMIT
    envs = gym.vector.SyncVectorEnv(
        [make for _ in range(n)]  # an ended episode starts anew a step later; its rows no longer count
    )
    try:
        if misfit := _misfit(policy.spec, envs.single_action_space, envs.single_observation_space):
            raise UserError(f"evaluate.environment: {misfit}: evaluate in the environment that the log comes from.")
        observation, _ = envs.reset(seed=[config.seed + i for i in range(n)])
        policy.reset()
        total, discounted, length = np.zeros(n), np.zeros(n), np.zeros(n, np.int64)
        running, successes, has_goals = np.ones(n, bool), np.zeros(n, bool), False
        reward: Any = None
        value_at_start = policy.value(observation)
        steps = 0
        while running.any() and steps < limit:
            action = policy.act(observation, reward)
            observation, reward, terminated, truncated, infos = envs.step(action)
            total += reward * running
            discounted += policy.discount**steps * reward * running
            length += running
            steps += 1
            cut = running & ~terminated & (truncated | (steps == limit))
            if cut.any():
                discounted += policy.discount**steps * np.where(cut, policy.value(observation), 0.0)
            told, reached = _goals(infos, n)
            has_goals |= bool((told & running).any())  # the rows of ended episodes have the infos of another
            successes |= told & running & reached
            running &= ~(terminated | truncated)
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
        "length_mean": float(length.mean()),
        "max_steps": config.max_steps,
        "episodes": n,
        "normalised": float(np.mean(known)) if known else None,
        "success": float(successes.mean()) if has_goals else None,
        "successes": successes.tolist() if has_goals else None,
        "discounted_mean": float(discounted.mean()),
        "value_at_start": float(value_at_start.mean()),
    }


def _goals(infos: Mapping[str, Any], n: int) -> tuple[Bools, Bools]:
    """Return which of n rows say whether their goal is reached, and which say yes."""
    told, reached = np.zeros(n, bool), np.zeros(n, bool)
    for name in _SUCCESS:
        if isinstance(found := infos.get(name), np.ndarray):
            told |= infos[f"_{name}"]
            reached |= infos[f"_{name}"] & found.reshape(n, -1).astype(bool).any(1)
    return told, reached
