"""Do imagined returns come true? A run's plans, replayed from the same start states in the real simulator.

    python benchmarks/scores/replay.py RUN_FOLDER [--segments 1000] [--out FILE.json] [--plot FILE.png]

RUN_FOLDER is a folder of `ipd-ray run` (or `ipd-ray imagine`) whose imagination is in its store. Per segment of l
steps: I is imagined, sum_{k<l} gamma^k r_k + gamma^l V(s_l); `real` is the same sum where the simulator answers to the
same actions; `own` (B) is along the log; `behaviour` is the run's behaviour policy, acting in the simulator for as many
steps: what is to be had without a plan. V is the run's own in all four, so `follow` lets the behaviour policy act on
from where plan and log end: then hardly anything of V is left in the sums. Where an actor planned (planner.kind=actor)
it acts there too, from the same starts: its segments are the same actions without its eyes, and where the dynamics
are unstable, as a hopper's, the same actions lead elsewhere after some dozen steps.

Shapes: R replayed segments, L imagined steps, K steps, O observation, A action.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from ipd_ray.api import job_of
from ipd_ray.artifacts import Artifact
from ipd_ray.config import build
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Bools, Floats, Ints, Log, Spec, rank_correlation
from ipd_ray.errors import UserError
from ipd_ray.evaluate.episodes import environment_maker
from ipd_ray.files import write_atomic
from ipd_ray.imagine.accept import value_of
from ipd_ray.imagine.actor import Actor
from ipd_ray.imagine.rollout import own_steps
from ipd_ray.runs import RunFolder, open_run
from ipd_ray.steps import DistillJob, actor_of, values_of
from ipd_ray.training import set_threads
from ipd_ray.values.fit import evaluate_in_chunks
from ipd_ray.values.networks import ValueFunctions

_STREAM = 91
DEPTHS = (1, 2, 3, 5, 10, 15, 20, 30, 50, 100, 150, 200, 500, 1000)
"""Imagined steps at which errors are printed."""
POINTS = 500
"""Segments at most that a result keeps for the plot."""
Act = Callable[[int, int, Floats], Floats]
"""(row, step, observation (O,)) -> action (A,) in [-1, 1]."""


# ---- putting a simulator into the state that an observation describes


@dataclass(frozen=True)
class StateRule:
    """How an environment's state is read back from an observation."""

    put: Callable[[Any, NDArray[np.float64]], None]
    """Set the unwrapped environment to the state that an observation (O,) describes."""
    hidden: Callable[[Floats], Bools]
    """Observations (N, O) that do not tell the whole state: (N,)."""


def _put_mujoco(env: Any, qpos: NDArray[np.float64], qvel: NDArray[np.float64]) -> None:
    import mujoco

    mujoco.mj_resetData(env.model, env.data)  # time, warm start and actuators at zero: no trace of the last segment
    env.set_state(qpos, qvel)


def _put_runner(env: Any, observation: NDArray[np.float64]) -> None:
    """Hopper, Walker2d, HalfCheetah: qpos[1:] and qvel. The root's x is free (the ground is flat), 0 here."""
    joints = env.model.nq - 1
    _put_mujoco(env, np.concatenate([[0.0], observation[:joints]]), observation[joints:])


def _put_inverted_pendulum(env: Any, observation: NDArray[np.float64]) -> None:
    _put_mujoco(env, observation[:2], observation[2:4])


def _put_double_pendulum(env: Any, observation: NDArray[np.float64]) -> None:
    """Cart, sines, cosines, velocities, and a constraint force, which follows from the others."""
    angles = np.arctan2(observation[1:3], observation[3:5])
    _put_mujoco(env, np.concatenate([observation[:1], angles]), observation[5:8])


def _put_pendulum(env: Any, observation: NDArray[np.float64]) -> None:
    cos, sin, velocity = observation
    env.state = np.array([np.arctan2(sin, cos), velocity])


def _nothing_hidden(observation: Floats) -> Bools:
    return np.zeros(len(observation), np.bool_)


def _clipped(first: int, last: int | None = None) -> Callable[[Floats], Bools]:
    """Velocities from column `first` on are shown clipped to +-10."""
    return lambda observation: np.asarray((np.abs(observation[:, first:last]) >= 10.0).any(1))


RULES = {
    "HalfCheetah-v5": StateRule(_put_runner, _nothing_hidden),
    "Hopper-v5": StateRule(_put_runner, _clipped(5)),
    "InvertedDoublePendulum-v5": StateRule(_put_double_pendulum, _clipped(5, 8)),
    "InvertedPendulum-v5": StateRule(_put_inverted_pendulum, _nothing_hidden),
    "Pendulum-v1": StateRule(_put_pendulum, _nothing_hidden),
    "Walker2d-v5": StateRule(_put_runner, _clipped(8)),
}
"""By Gymnasium id, with the observation that the environment shows by default."""


@dataclass(frozen=True)
class Starts:
    """States to start from: R observations that tell the whole state, and the actions that lead on from there."""

    observation: Floats
    """(R, O)"""
    lead: list[Floats]
    """R times (n, A), n most often 0."""

    @classmethod
    def at(cls, log: Log, rows: Ints, origin: Ints) -> Starts:
        """Steps `rows` (R,) of the log, reached along its own actions from the last step that hid nothing."""
        t = log.transitions
        return cls(t.observation[origin[rows]], [t.action[origin[i] : i] for i in rows])


def origins(log: Log, rule: StateRule) -> Ints:
    """Return for every step (T,) the last one up to it, in its episode, that hides no part of the state; or -1."""
    t = log.transitions
    open_steps = np.where(rule.hidden(t.observation), -1, np.arange(len(t)))
    last = np.maximum.accumulate(open_steps)
    return np.where(last >= t.episode_start[t.episode], last, -1)


@dataclass(frozen=True)
class Rolled:
    """What the simulator did, row by row."""

    observation: Floats
    """(R, K + 1, O); repeated after a termination."""
    reward: NDArray[np.float64]
    """(R, K), raw; 0 after a termination."""
    terminal: Bools
    """(R, K), true at the step that ended the episode."""

    @property
    def alive(self) -> Bools:
        """(R, K) steps that were taken."""
        return np.cumsum(self.terminal, 1) - self.terminal == 0


@dataclass(frozen=True)
class Simulator:
    """The real environment without its time limit, that can be put into a state."""

    env: Any
    """Unwrapped."""
    spec: Spec
    rule: StateRule

    def put(self, observation: Floats) -> Floats:
        """Set the state that an observation (O,) describes; return the observation that the simulator then shows."""
        self.rule.put(self.env, observation.astype(np.float64))
        return self.spec.flatten_observation(self.env._get_obs())

    def roll(self, starts: Starts, act: Act, steps: int) -> Rolled:
        """Act for `steps` steps from every start, to the episode's end at most."""
        rows, width = starts.observation.shape
        observation = np.empty((rows, steps + 1, width), np.float32)
        reward, terminal = np.zeros((rows, steps)), np.zeros((rows, steps), np.bool_)
        for row in range(rows):
            s = self.put(starts.observation[row])
            for action in starts.lead[row]:
                s, *_ = self._step(action)
            observation[row] = s
            for k in range(steps):
                s, reward[row, k], terminal[row, k] = self._step(act(row, k, s))
                observation[row, k + 1] = s
                if terminal[row, k]:
                    observation[row, k + 1 :] = s
                    break
        return Rolled(observation, reward, terminal)

    def _step(self, action: Floats) -> tuple[Floats, float, bool]:
        observation, reward, terminated, *_ = self.env.step(self.spec.unscale_action(action))
        return self.spec.flatten_observation(observation), float(reward), bool(terminated)


def simulator(spec: Spec, environment: str | None) -> Simulator:
    """Return the simulator of a log. Raises UserError where its state cannot be set from an observation."""
    env = environment_maker(spec, environment)()
    name = env.spec.id if env.spec else type(env.unwrapped).__name__
    if name not in RULES:
        env.close()
        raise UserError(
            f"no rule sets the state of {name} from an observation: known are {', '.join(RULES)}. Add one to RULES in "
            f"{Path(__file__).name}; where an observation leaves out a part of the state, replay cannot be had."
        )
    inner: gym.Env[Any, Any] = env.unwrapped
    inner.reset(seed=0)
    return Simulator(inner, spec, RULES[name])


# ---- is the simulator the one that the log comes from?


def self_check(log: Log, sim: Simulator, rows: Ints, origin: Ints) -> dict[str, Any]:
    """Take the log's own steps `rows` again: errors of the start, of the next observation (largest dimension, in
    spreads of the log) and of the reward (raw).

    led_share: steps whose observation hides a part of the state, so that the log's actions lead to them. Tiny errors
    stay: observations are kept in float32, and MuJoCo's solver starts cold where it was warm.
    """
    t = log.transitions
    reached = rows[origin[rows] >= 0]
    if len(reached) == 0:
        raise UserError("no step of the log shows its whole state: nothing can be replayed.")
    again = sim.roll(Starts.at(log, reached, origin), lambda row, k, s: t.action[reached[row]], 1)
    spread = log.observation_moments[1]
    start = (np.abs(again.observation[:, 0] - t.observation[reached]) / spread).max(1)
    state = (np.abs(again.observation[:, 1] - t.next_observation[reached]) / spread).max(1)
    reward = np.abs(again.reward[:, 0] - t.reward[reached])
    reward_spread = float(t.reward.std())

    def sizes(errors: NDArray[Any]) -> dict[str, float]:
        return {"median": float(np.median(errors)), "99%": float(np.quantile(errors, 0.99))}

    return {
        "steps": len(reached),
        "led_share": float((origin[reached] < reached).mean()),
        "unreachable_share": 1.0 - len(reached) / len(rows),
        "start_error": sizes(start),
        "state_error": sizes(state),
        "reward_error": sizes(reward),
        "reward_spread": reward_spread,
        "termination_agrees": float((again.terminal[:, 0] == t.terminal[reached]).mean()),
        "trusted": bool(np.median(state) < 0.01 and np.median(reward) < 0.01 * reward_spread),
    }


# ---- imagined, real, own


@dataclass(frozen=True)
class Outcomes:
    """What R segments of `length` steps came to. Worth is discounted, transformed, V at the end included."""

    length: Ints
    episode: Ints
    imagined: Floats
    real: Floats
    own: Floats
    behaviour: Floats
    start_value: Floats
    """V(s_0)."""
    imagined_reward: Floats
    """Raw, undiscounted, over `length` steps; so are the next three."""
    real_reward: Floats
    own_reward: Floats
    behaviour_reward: Floats
    reward_gap: Floats
    """Discounted transformed imagined rewards minus real ones."""
    imagined_end: Bools
    """Termination predicted within `length` steps."""
    real_end: Bools
    own_short: Bools
    """The log stops before `length` steps without a termination."""

    def __len__(self) -> int:
        return len(self.length)

    def take(self, rows: NDArray[Any]) -> Outcomes:
        """Return some rows."""
        return Outcomes(*(getattr(self, f.name)[rows] for f in fields(self)))


def outcomes(
    segments: Segments, length: Ints, real: Rolled, behaviour: Rolled, v: Callable[[Floats], Floats], log: Log
) -> Outcomes:
    """Compare `length` steps (R,) of each segment with the simulator's answer to the same actions.

    v: V of observations (N, O) -> (N,).
    """
    inside = np.arange(segments.length) < length[:, None]
    discounts = log.discount ** np.arange(segments.length)
    scale = np.float32(log.reward_scale)

    def worth(rolled: Rolled) -> Floats:
        shape = rolled.observation.shape
        value = v(rolled.observation.reshape(-1, shape[-1])).reshape(shape[:-1])
        return value_of((rolled.reward * scale).astype(np.float32), rolled.terminal, value, length, log.discount)

    def total(reward: NDArray[Any]) -> NDArray[Any]:
        return np.where(inside, reward, 0.0).sum(1)

    own_length = np.minimum(length, segments.own_length)
    return Outcomes(
        length=length,
        episode=segments.episode,
        imagined=value_of(segments.reward, segments.terminal, segments.value, length, log.discount),
        real=worth(real),
        own=value_of(segments.own_reward, segments.own_terminal, segments.own_value, own_length, log.discount),
        behaviour=worth(behaviour),
        start_value=segments.value[:, 0],
        imagined_reward=total(segments.reward / scale),
        real_reward=total(real.reward),
        own_reward=total(segments.own_reward / scale),
        behaviour_reward=total(behaviour.reward),
        reward_gap=total((segments.reward - real.reward * scale) * discounts),
        imagined_end=np.asarray((segments.terminal & inside).any(1)),
        real_end=np.asarray((real.terminal & inside).any(1)),
        own_short=(segments.own_length < length) & ~segments.own_terminal.any(1),
    )


def compare(o: Outcomes, value_std: float) -> dict[str, Any]:
    """The numbers of one group of segments; gains and lies in units of V's spread, as acceptance counts them.

    lie: mean I - real, split into what terminations that were missed or wrongly predicted bring, and on the segments
    without such, what rewards and what V at the end bring; the four sum to the total. Standard errors count episodes,
    not segments.
    """
    if len(o) == 0:
        return {"segments": 0}
    gain = {name: (getattr(o, name) - o.own) / value_std for name in ("imagined", "real", "behaviour")}
    lie = (o.imagined - o.real) / value_std
    missed, wrongly = o.real_end & ~o.imagined_end, o.imagined_end & ~o.real_end
    agree, reward_gap = ~(missed | wrongly), o.reward_gap / value_std
    return {
        "segments": len(o),
        "episodes": len(np.unique(o.episode)),
        "length": o.length.mean(),
        "reward_sum": {n: getattr(o, f"{n}_reward").mean() for n in ("imagined", "real", "own", "behaviour")},
        "worth": {n: getattr(o, n).mean() for n in ("imagined", "real", "own", "behaviour", "start_value")},
        "gain": {
            **{name: values.mean() for name, values in gain.items()},
            "real_error": clustered_error(gain["real"], o.episode),
            "behaviour_error": clustered_error(gain["behaviour"], o.episode),
            "real_over_behaviour": (gain["real"] - gain["behaviour"]).mean(),
            "real_over_behaviour_error": clustered_error(gain["real"] - gain["behaviour"], o.episode),
            "real_median": np.median(gain["real"]),
        },
        "share": {
            "imagined_beats_own": (o.imagined > o.own).mean(),
            "real_beats_own": (o.real > o.own).mean(),
            "real_beats_start_value": (o.real > o.start_value).mean(),
            "real_beats_behaviour": (o.real > o.behaviour).mean(),
            "behaviour_beats_own": (o.behaviour > o.own).mean(),
            "real_reward_beats_own": (o.real_reward > o.own_reward).mean(),
            "own_stops_short": o.own_short.mean(),
        },
        "correlation": {
            "worth_pearson": pearson(o.imagined, o.real),
            "worth_spearman": spearman(o.imagined, o.real),
            "gain_pearson": pearson(gain["imagined"], gain["real"]),
            "gain_spearman": spearman(gain["imagined"], gain["real"]),
            "reward_pearson": pearson(o.imagined_reward, o.real_reward),
        },
        "lie": {
            "total": lie.mean(),
            "missed_termination": (lie * missed).mean(),
            "wrong_termination": (lie * wrongly).mean(),
            "reward": (reward_gap * agree).mean(),
            "end_value": ((lie - reward_gap) * agree).mean(),
            "spread": lie.std(),
        },
        "termination": {
            "both": (o.imagined_end & o.real_end).mean(),
            "real_only": missed.mean(),
            "imagined_only": wrongly.mean(),
        },
    }


def clustered_error(values: NDArray[Any], cluster: Ints) -> float:
    """Standard error of a mean whose rows are independent between clusters only; NaN for a single one."""
    _, member = np.unique(cluster, return_inverse=True)
    sums = np.bincount(member, values - values.mean())
    if len(sums) < 2:
        return float("nan")
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))


def pearson(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Correlation; NaN where one side is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else float("nan")


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Rank correlation; NaN where one side is constant."""
    return rank_correlation(a, b) if len(a) > 1 and a.std() > 0 and b.std() > 0 else float("nan")


def by_depth(segments: Segments, length: Ints, real: Rolled, log: Log) -> list[dict[str, Any]]:
    """Errors of imagined states and rewards at depth 1..L, over the steps that both sides took.

    State error is the root mean square over dimensions, in spreads of the log; `still` is what it would be had the
    state stayed where it was: the size of what there is to predict. Rewards are raw; bias is imagined minus real.
    """
    scale = np.float32(log.reward_scale)
    spread = log.observation_moments[1]
    state, still = (
        _distance(segments.observation, real.observation, spread),
        _distance(real.observation[:, :1], real.observation, spread),
    )
    gap = segments.reward / scale - real.reward
    counts = (np.arange(segments.length) < length[:, None]) & real.alive
    out = []
    for k in range(segments.length):
        rows = counts[:, k]
        if rows.any():
            out.append(
                {
                    "depth": k + 1,
                    "segments": int(rows.sum()),
                    "state": np.median(state[rows, k]),
                    "state_90%": np.quantile(state[rows, k], 0.9),
                    "still": np.median(still[rows, k]),
                    "reward": np.abs(gap[rows, k]).mean(),
                    "reward_bias": gap[rows, k].mean(),
                }
            )
    return out


def floor_by_depth(segments: Segments, own: Rolled, log: Log) -> list[dict[str, Any]]:
    """The same for the log's own actions: what a simulator started from a float32 observation cannot tell apart."""
    logged = own_steps(log, segments.index, segments.length).observation
    state = _distance(logged, own.observation, log.observation_moments[1])
    counts = (np.arange(segments.length) < segments.own_length[:, None]) & own.alive
    return [
        {"depth": k + 1, "state": np.median(state[rows, k]), "state_90%": np.quantile(state[rows, k], 0.9)}
        for k, rows in enumerate(counts.T) if rows.any()
    ]


def _distance(a: Floats, b: Floats, spread: Floats) -> NDArray[np.float64]:
    """Root mean square over dimensions after each step: (R, K)."""
    return np.sqrt((((a - b) / spread).astype(np.float64) ** 2).mean(-1))[:, 1:]


# ---- the replay of a run


@dataclass(frozen=True)
class Drawn:
    """Segments to replay, and which of them stand for which group."""

    rows: Ints
    """(R,) segments of the run."""
    groups: dict[str, Bools]
    """(R,) each; a uniform draw from its group."""


def draw(accepted: Bools, control: Bools, allowed: Bools, segments: int, seed: int) -> Drawn:
    """Draw up to `segments` of all, of the accepted and of the control group."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM]))
    picked = {}
    for name, members in (("all", allowed), ("accepted", allowed & accepted), ("control", allowed & control)):
        rows = np.flatnonzero(members)
        picked[name] = rng.choice(rows, min(segments, len(rows)), replace=False)
    rows = np.unique(np.concatenate(list(picked.values())))
    groups = {name: np.isin(rows, some) for name, some in picked.items()}
    kept = accepted[rows]
    groups["rejected"] = groups["all"] & ~kept
    groups["accepted_control"] = groups["control"] & kept
    return Drawn(rows, groups)


def replay(run: RunFolder, segments: int, *, follow: int = 200, followed: int = 200) -> dict[str, Any]:
    """Replay up to `segments` imagined segments of each group in the simulator and say what came true.

    follow: steps that the behaviour policy acts on after `followed` accepted segments; 0 leaves that out.

    Returns numbers alone: `self_check`, `groups` (see `compare`; `whole` is all segments uncut, to the predicted end),
    `depth`, `follow`, and points for `plot`. Raises UserError where the run has no imagination yet, or its environment
    cannot be put into a state.
    """
    job, config = job_of(run), build(run.config)
    actor = actor_of(str(run.artifact("actor")), "cpu") if config.planner.kind == "actor" else None
    sim = simulator(job.log.load().transitions.spec, config.evaluate.environment)
    with closing(sim.env):
        return dict(_tidy(_replay(job, sim, segments, follow, followed, actor)))


def _replay(
    job: DistillJob, sim: Simulator, segments: int, follow: int, followed: int, actor: Actor | None
) -> dict[str, Any]:
    log = job.log.load()
    everything, verdict, summary = job.imagined(log)
    accepted, cut = verdict.accepted, verdict.length
    t, values = log.transitions, values_of(job.values, "cpu")
    value_std = float(Artifact(Path(job.values)).diagnostics["v_std"])
    rng = np.random.default_rng(np.random.SeedSequence([job.seed, _STREAM, 1]))
    origin = origins(log, sim.rule)
    check = self_check(log, sim, rng.choice(len(t), min(2000, len(t)), replace=False), origin)

    began = origin[everything.index]
    drawn = draw(accepted, everything.control, began >= 0, segments, job.seed)
    some, length, ok = take(everything, drawn.rows), cut[drawn.rows], accepted[drawn.rows]
    starts = Starts.at(log, some.index, origin)

    def acting(policy: Actor | ValueFunctions) -> Act:
        @torch.no_grad()
        def act(row: int, k: int, observation: Floats) -> Floats:
            return policy.act(torch.from_numpy(observation)).numpy()

        return act

    act = acting(values)

    def v(observation: Floats) -> Floats:
        with torch.no_grad():
            return evaluate_in_chunks(values.v, observation, device="cpu")

    real = sim.roll(starts, lambda row, k, s: some.action[row, k], some.length)
    behaviour = sim.roll(starts, act, some.length)
    own_rows = np.flatnonzero(drawn.groups["all"])
    own_some = take(some, own_rows)
    own_starts = Starts.at(log, own_some.index, origin)
    own = sim.roll(own_starts, switch(own_some.own_length, logged(log, own_some), act), some.length)

    at_cut = outcomes(some, length, real, behaviour, v, log)
    to_end = np.where(some.terminal.any(1), some.terminal.argmax(1) + 1, some.length)
    groups = {name: compare(at_cut.take(rows & (length > 0)), value_std) for name, rows in drawn.groups.items()}
    whole = drawn.groups["all"]
    groups["whole"] = compare(outcomes(some, to_end, real, behaviour, v, log).take(whole), value_std)

    def depth(rows: Bools, steps: Ints) -> list[dict[str, Any]]:
        return by_depth(take(some, rows), steps[rows], _rows(real, rows), log)

    result = {
        "dataset": t.spec.dataset, "run_seed": job.seed, "environment": sim.env.spec.id if sim.env.spec else None,
        "imagined_steps": some.length, "discount": log.discount, "reward_scale": log.reward_scale, "v_std": value_std,
        "segments": len(everything), "accepted": int(accepted.sum()), "kappa": summary["kappa"],
        "cut_to_nothing": (cut == 0).mean(), "led_starts": (began < everything.index).mean(),
        "self_check": check,
        "groups": groups,
        "depth": {
            "accepted": depth(drawn.groups["accepted"], length),
            "all": depth(whole, to_end),
            "floor": floor_by_depth(own_some, own, log),
        },
        "points": points(at_cut, ok, length > 0, value_std),
    }
    if follow:
        rows = np.flatnonzero(drawn.groups["accepted"])
        rows = np.sort(rng.choice(rows, min(followed, len(rows)), replace=False))
        plans = take(some, rows)
        starts = Starts.at(log, plans.index, origin)
        who = {"behaviour": act, **({"actor": acting(actor)} if actor else {})}
        result["follow"] = _follow(log, sim, plans, length[rows], starts, who, v, follow, value_std)
    return result


def _follow(
    log: Log, sim: Simulator, segments: Segments, length: Ints, starts: Starts, who: Mapping[str, Act],
    v: Callable[[Floats], Floats], steps: int, value_std: float,
) -> dict[str, Any]:
    """Plan or log for l steps and then the behaviour policy, or one of `who` all along: does V at the end hold good?

    worth: discounted real rewards over L + steps steps, plus V there. promised: V of where the l steps end (of s_0 for
    the behaviour policy), kept: what the behaviour policy then got there, discounted to that step. gain_by_value: the
    plan's real gain as acceptance would count it, V after l steps; gain_correlation: its ranks against the gain itself.
    """
    if len(segments) == 0:
        return {"segments": 0}
    horizon = segments.length + steps
    own_length = np.minimum(length, segments.own_length)
    act, never = who["behaviour"], np.zeros_like(length)
    cases: dict[str, tuple[Ints, Act]] = {
        "plan": (length, switch(length, lambda row, k, s: segments.action[row, k], act)),
        "own": (own_length, switch(own_length, logged(log, segments), act)),
        **{name: (never, acts) for name, acts in who.items()},
    }
    rows = np.arange(len(segments))
    worth: dict[str, NDArray[np.float64]] = {}
    by_value: dict[str, NDArray[np.float64]] = {}
    out: dict[str, Any] = {"segments": len(segments), "steps": horizon}
    out |= {"promised": {}, "kept": {}, "survived": {}, "reward_sum": {}}
    for name, (until, acts) in cases.items():
        rolled = sim.roll(starts, acts, horizon)
        reward = rolled.reward * log.reward_scale
        ended = rolled.terminal.any(1)
        tail = np.where(ended, 0.0, v(rolled.observation[:, -1]))
        discounts = log.discount ** np.arange(horizon)
        worth[name] = (reward * discounts).sum(1) + log.discount**horizon * tail
        before = (np.where(np.arange(horizon) < until[:, None], reward, 0.0) * discounts).sum(1)
        reached = rolled.alive[rows, until]
        promised, kept = v(rolled.observation[rows, until]), (worth[name] - before) / log.discount**until
        by_value[name] = before + log.discount**until * np.where(reached, promised, 0.0)
        out["promised"][name] = promised[reached].mean() / value_std if reached.any() else None
        out["kept"][name] = kept[reached].mean() / value_std if reached.any() else None
        out["survived"][name] = (~ended).mean()
        out["reward_sum"][name] = rolled.reward.sum(1).mean()
    gain = {name: (worth[name] - worth["own"]) / value_std for name in ("plan", *who)}
    over = gain["plan"] - gain["behaviour"]
    judged = (by_value["plan"] - by_value["own"]) / value_std
    return out | {
        "gain": {name: values.mean() for name, values in gain.items()},
        "gain_error": {name: clustered_error(values, segments.episode) for name, values in gain.items()},
        "gain_by_value": judged.mean(),
        "gain_correlation": spearman(judged, gain["plan"]),
        "plan_over_behaviour": over.mean(),
        "plan_over_behaviour_error": clustered_error(over, segments.episode),
        **{f"{name}_beats_own": (values > 0).mean() for name, values in gain.items()},
    }


def switch(until: Ints, first: Act, then: Act) -> Act:
    """Act by one for `until` (R,) steps, by the other from there on."""
    return lambda row, k, s: first(row, k, s) if k < until[row] else then(row, k, s)


def logged(log: Log, segments: Segments) -> Act:
    """The log's own actions from each start."""
    return lambda row, k, s: log.transitions.action[segments.index[row] + k]


def take(segments: Segments, rows: NDArray[Any]) -> Segments:
    """Return some segments."""
    return Segments(*(getattr(segments, f.name)[rows] for f in fields(Segments)))


def _rows(rolled: Rolled, rows: NDArray[Any]) -> Rolled:
    return Rolled(rolled.observation[rows], rolled.reward[rows], rolled.terminal[rows])


def points(o: Outcomes, accepted: Bools, usable: Bools, value_std: float) -> dict[str, list[list[float]]]:
    """Up to POINTS segments as [I, real, B] in units of V's spread: accepted ones first, the rest rejected ones."""
    good, bad = np.flatnonzero(accepted & usable), np.flatnonzero(~accepted & usable)
    good = good[:: max(1, -(-len(good) // (POINTS * 3 // 5)))]
    bad = bad[:: max(1, -(-len(bad) // (POINTS - len(good))))]
    triples = np.stack([o.imagined, o.real, o.own], 1) / value_std
    return {"accepted": triples[good].round(3).tolist(), "rejected": triples[bad].round(3).tolist()}


def _tidy(content: Any) -> Any:
    """Plain JSON: five significant digits, None for what is not finite."""
    if isinstance(content, dict):
        return {name: _tidy(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_tidy(value) for value in content]
    if isinstance(content, (float, np.floating)):
        return float(f"{content:.5g}") if np.isfinite(content) else None
    return content


# ---- for people


def describe(result: dict[str, Any]) -> str:
    """The result as a few lines of text."""
    check = result["self_check"]
    state, reward = check["state_error"], check["reward_error"]
    lines = [
        f"{result['dataset']} ({result['environment']}), seed {result['run_seed']}: {result['segments']} segments of "
        f"{result['imagined_steps']} steps, {result['accepted']} accepted; std of V {result['v_std']:.4g}",
        f"self-check {'passed' if check['trusted'] else 'FAILED (the numbers below mean little)'}: {check['steps']} "
        f"steps of the log taken again; error of state {state['median']:.2g} (99 %: {state['99%']:.2g}) spreads, of "
        f"reward {reward['median']:.2g} (99 %: {reward['99%']:.2g}) of a spread of {check['reward_spread']:.2g}; "
        f"termination agrees {check['termination_agrees']:.2%}; {check['led_share']:.1%} hide a part of the state and "
        "are reached by the log's actions",
        f"{'':17s}{'':11s} | raw reward{'':22s} | gain over own, std of V{'':7s} | beats own      | correlation",
        f"{'group':17s}{'n':>5s}{'steps':>6s} |{'I':>9s}{'real':>8s}{'own':>8s}{'behav.':>8s} |"
        f"{'I':>8s}{'real':>8s}{'+-':>7s}{'behav.':>8s} |{'real':>7s}{'behav.':>8s} |{'worth':>6s}{'gain':>6s}",
    ]
    groups = {name: g for name, g in result["groups"].items() if g["segments"]}
    for name, g in groups.items():
        raw, gain, share, r = g["reward_sum"], g["gain"], g["share"], g["correlation"]
        lines.append(
            f"{name:17s}{g['segments']:5d}{g['length']:6.1f} |{raw['imagined']:9.2f}{raw['real']:8.2f}"
            f"{raw['own']:8.2f}{raw['behaviour']:8.2f} |{gain['imagined']:8.3f}{gain['real']:8.3f}"
            f"{_number(gain['real_error'], '7.3f')}{gain['behaviour']:8.3f} |{share['real_beats_own']:7.1%}"
            f"{share['behaviour_beats_own']:8.1%} |{_number(r['worth_pearson'], '6.2f')}"
            f"{_number(r['gain_pearson'], '6.2f')}"
        )
    lines.append("lie (I - real, std of V) = missed + wrong termination + reward + V at the end")
    for name, g in groups.items():
        lie, ends = g["lie"], g["termination"]
        lines.append(
            f"{name:17s}{lie['total']:8.3f} ={lie['missed_termination']:7.3f} +{lie['wrong_termination']:7.3f} +"
            f"{lie['reward']:7.3f} +{lie['end_value']:7.3f}   ends: both {ends['both']:.1%}, real only "
            f"{ends['real_only']:.1%}, imagined only {ends['imagined_only']:.1%}"
        )
    shown = {name: [step for step in steps if step["depth"] in DEPTHS] for name, steps in result["depth"].items()}
    row = " ".join(f"{step['depth']:6d}" for step in shown["all"])
    lines.append(f"by depth {'':22s}{row}")
    for name in ("accepted", "all"):
        for what in ("state", "state_90%", "still", "reward", "reward_bias"):
            row = " ".join(f"{step[what]:6.3f}" for step in shown[name])
            lines.append(f"by depth, {name:9s}{what:12s}{row}")
    row = " ".join(f"{step['state']:6.3f}" for step in shown["floor"])
    lines.append(f"by depth, {'log again':9s}{'state':12s}{row}")
    f = result.get("follow", {})
    if f.get("segments"):
        gain, error = f["gain"], f["gain_error"]
        over, over_error = f["plan_over_behaviour"], f["plan_over_behaviour_error"]
        lines += [
            f"behaviour policy acting on to step {f['steps']} after {f['segments']} accepted segments, std of V: gain "
            f"over the log's steps: plan {gain['plan']:+.3f} +- {_number(error['plan'], '.3f')}, behaviour policy "
            f"{gain['behaviour']:+.3f} +- {_number(error['behaviour'], '.3f')}; plan - behaviour policy {over:+.3f} +- "
            f"{_number(over_error, '.3f')}; the plan's gain by V was {f['gain_by_value']:+.3f}, its ranks correlate "
            f"{_number(f['gain_correlation'], '.2f')} with the gain",
            "  V promised where the steps end / what was then got: "
            + ", ".join(f"{n} {_number(f['promised'][n], '.3f')} / {_number(f['kept'][n], '.3f')}" for n in f["kept"]),
        ]
        if "actor" in gain:
            sums = ", ".join(f"{n} {value:.1f}" for n, value in f["reward_sum"].items())
            lines.append(
                f"  the actor acting all along: gain over the log's steps {gain['actor']:+.3f} +- "
                f"{_number(error['actor'], '.3f')}, better than the log from {f['actor_beats_own']:.1%} of the starts; "
                f"raw reward of {f['steps']} steps: {sums}"
            )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return format(float("nan") if value is None else value, form)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw imagined against real worth, imagined against real gain, and state error by depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.2), layout="constrained")
    worth, gain, depth = figure.subplots(1, 3)
    colours = {"rejected": "#b8bcc4", "accepted": "#1f6fb2"}
    for name, colour in colours.items():
        rows = np.array(result["points"][name], float).reshape(-1, 3)
        look: dict[str, Any] = {"s": 9, "alpha": 0.65, "color": colour, "linewidths": 0}
        worth.scatter(rows[:, 0], rows[:, 1], label=name, **look)
        gain.scatter(rows[:, 0] - rows[:, 2], rows[:, 1] - rows[:, 2], **look)
    for axes, what in ((worth, "worth: rewards + V at the end"), (gain, "gain over the log's own steps")):
        low, high = _view(axes)
        axes.plot([low, high], [low, high], color="#444444", linewidth=0.8, zorder=0)
        axes.set(xlim=(low, high), ylim=(low, high), title=what, xlabel="imagined (std of V)", ylabel="real (std of V)")
    gain.axhline(0.0, color="#444444", linewidth=0.8, linestyle=":", zorder=0)
    worth.legend(frameon=False, loc="upper left")
    blue, grey = colours["accepted"], "#8a8f99"
    for name, what, style, colour, label in (
        ("all", "still", "-", grey, "had nothing moved"),
        ("all", "state", "--", blue, "all, uncut"),
        ("accepted", "state", "-", blue, "accepted"),
        ("floor", "state", ":", blue, "log's own actions"),
    ):
        steps = result["depth"][name]
        depth.plot([r["depth"] for r in steps], [r[what] for r in steps], style, color=colour, label=label)
    depth.set(title="state error, median", xlabel="imagined step", ylabel="in spreads of the log", yscale="log")
    depth.legend(frameon=False)
    group = result["groups"]["accepted"]
    if group["segments"]:
        figure.suptitle(
            f"{result['dataset']}: {group['share']['real_beats_own']:.1%} of accepted segments beat the log in the "
            f"simulator; gain {group['gain']['imagined']:.2f} imagined, {group['gain']['real']:.2f} real", fontsize=11,
        )
    figure.savefig(path, dpi=110)


def _view(axes: Any) -> tuple[float, float]:
    """One range for both axes, without the outermost hundredth."""
    shown = np.concatenate([np.asarray(c.get_offsets(), float) for c in axes.collections] or [np.zeros((1, 2))])
    if len(shown) == 0:
        return -1.0, 1.0
    low, high = np.quantile(shown, 0.005), np.quantile(shown, 0.995)
    pad = 0.08 * max(high - low, 1e-3)
    return float(low - pad), float(high + pad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run that has imagined")
    parser.add_argument("--segments", type=int, default=1000, help="replayed at most, of each group")
    parser.add_argument("--follow", type=int, default=200, help="steps the behaviour policy acts on; 0: none")
    parser.add_argument("--followed", type=int, default=200, help="accepted segments that it does so after, at most")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--plot", type=Path, help="picture of imagined against real")
    args = parser.parse_args()
    for name, least in (("segments", 1), ("follow", 0), ("followed", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}={getattr(args, name)} must be at least {least}.")
    set_threads(1)
    try:
        result = replay(open_run(args.run), args.segments, follow=args.follow, followed=args.followed)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(describe(result))
    if args.out:
        write_atomic(args.out, json.dumps(result) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
