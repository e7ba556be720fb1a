"""What a run will take in time, memory and disk, before it begins. Estimates: right within a factor of two or so.

Time: floating-point operations of a step, counted from the config and the log's sizes, over the rate of this machine's
matrix product at the step's own sizes, measured in 0.3 s, and over a share for what is no matrix product (EFFICIENCY);
then small operations an update at the measured cost of one (OPERATIONS). Both were fitted on two busy CPU cores
against the presets demo and gym-small on Pendulum and Hopper; distillation least well, it suffers most from a busy
machine. What the machine does beside is in the measured rates, as it is at this moment. How long an evaluated episode
lasts is not known: its limit is assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ipd_ray.artifacts import read_jsonl
from ipd_ray.config import RunConfig
from ipd_ray.data.columns import columns_file
from ipd_ray.data.transitions import Ints, Transitions
from ipd_ray.imagine.planner import CACHED_ROWS, GRADIENT_ROWS
from ipd_ray.pipeline import TO_COME, Context, Part, corrections, judge_of, state_of, train_threads
from ipd_ray.storage import METRICS

EFFICIENCY = {"values": 0.4, "world_model": 0.36, "actor": 0.4, "imagine": 0.6, "distill": 0.4, "act": 0.5}
"""Share of the matrix product's rate that a step's operations reach; act: of a policy that acts."""
OPERATIONS = {"values": 700, "world_model": 200, "actor": 400, "distill": 1200, "act": 300}
"""Small operations an update, or a step of episodes side by side."""
SECOND_CORE = 0.8
"""What each further thread of distillation adds, in threads."""
STARTUP_SECONDS = 3.0
"""A worker process until it works."""
ENVIRONMENT_SECONDS = 1e-4
"""One step of one environment."""
MEASURE_SECONDS = 0.06
"""Of one measurement."""
_SIDE_BY_SIDE = {"values": "first", "world_model": "first", "reach": "reaches"}
"""Steps that are made at the same time."""
PROCESS_BYTES = 400e6
"""A worker before it has read anything."""


@dataclass(frozen=True)
class Sizes:
    """What the counts depend on."""

    steps: int
    observation: int
    action: int
    lengths: Ints
    """(E,) steps of the episodes."""
    limit: int | None
    """Of an episode's time, where the log shows one."""
    terminates: bool
    held: int
    """Steps held out, as the world model looks at them."""
    horizon: int = 0
    """Steps of an evaluated episode at most; 0 where none is evaluated."""

    @classmethod
    def of(cls, t: Transitions, holdout_fraction: float) -> Sizes:
        held = min(20_000, int(len(t) * holdout_fraction))
        return cls(
            len(t), t.observation_dim, t.spec.action_dim, t.episode_length, t.longest_cut, bool(t.terminal.any()), held
        )

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def within(self, steps: int) -> int:
        return steps if self.limit is None else min(steps, self.limit)


@dataclass(frozen=True)
class Speed:
    """This machine, at this moment."""

    product: Callable[[int, int, int], float]
    """(groups, rows, width) to floating-point operations a second."""
    operation: float
    """Seconds of a small operation."""


def estimate(
    context: Context, until: str, processes: int, work: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return a row a part: step, key, state, and what is still to come in seconds, bytes of memory and of disk.

    Memory is a worker's; imagination has `processes` of them. work: `work_seconds` of the machine that will do it; of
    this one where not given.
    """
    config, sizes = context.config, sizes_of(context, until)
    parts = {part.name: part for part in context.parts.until(until)}
    if work is None:
        work = work_seconds({part.step for part in parts.values()}, config, sizes, context.here.device)
    rows = []
    for row in state_of(context, until):
        part = parts[row["step"]]
        left = 1.0 - _done(context, part) if row["state"] in TO_COME else 0.0
        workers = processes if part.step == "imagine" else 1
        seconds = work[part.step] * _share(part, config) * left / workers + (STARTUP_SECONDS if left else 0.0)
        rows.append({
            "step": row["step"], "key": row["key"], "state": row["state"], "seconds": round(seconds, 1),
            "memory": round(_memory(part.step, config, sizes)) if left else 0,
            "disk": round(_disk(part.step, config, sizes)) if left else 0,
        })
    return rows


def _share(part: Part, config: RunConfig) -> float:
    """Of a step's work that a part of it is: a corrected policy has fewer updates."""
    return float(part.sections["distill"].updates / config.distill.updates) if part.step == "distill" else 1.0


def work_seconds(
    steps: Iterable[str], config: RunConfig, sizes: Sizes, device: str, measured_for: float = MEASURE_SECONDS
) -> dict[str, float]:
    """Return the seconds that each of the steps takes one worker on this machine, which is measured.

    measured_for: seconds a measurement; there are about five.
    """
    speed = measure(device, measured_for)
    return {step: _seconds(step, config, sizes, speed) for step in steps}


def total(context: Context, rows: list[dict[str, Any]], processes: int) -> dict[str, float]:
    """Return the whole run's seconds, peak memory and disk, with `processes` workers."""
    seconds, peak = _together(rows, processes)
    sizes = sizes_of(context)
    disk = sum(row["disk"] for row in rows) + _data_left(context, sizes)
    return {"seconds": seconds, "memory": _driver_bytes(sizes) + peak, "disk": disk}


def _together(rows: list[dict[str, Any]], processes: int) -> tuple[float, float]:
    """Seconds of all rows, and peak bytes of the workers."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_SIDE_BY_SIDE.get(row["step"].partition(":")[0], row["step"]), []).append(row)
    took, peak = 0.0, 0.0
    for name, group in groups.items():
        seconds = [row["seconds"] for row in group]
        took += max([*seconds, sum(seconds) / processes])
        memory = sorted((row["memory"] for row in group), reverse=True)[:processes]
        peak = max(peak, memory[0] * processes if name == "imagine" else sum(memory))
    return took, peak


def estimate_disk(context: Context, until: str) -> int:
    """Return the bytes that the run will write to the store."""
    sizes = sizes_of(context)
    need = sum(_disk(part.step, context.config, sizes) for part in _to_come(context, until))
    return round(need) + _data_left(context, sizes)


def estimate_memory(context: Context, until: str, processes: int) -> tuple[float, str]:
    """Return the bytes of memory that the run will need at its peak, with `processes` workers, and for which step."""
    sizes = sizes_of(context)
    rows: list[dict[str, Any]] = [
        {"step": part.name, "seconds": 0.0, "memory": _memory(part.step, context.config, sizes)}
        for part in _to_come(context, until)
    ]
    most = max(rows, key=lambda row: _together([row], processes)[1], default={"step": ""})
    return _driver_bytes(sizes) + _together(rows, processes)[1], most["step"]


def _to_come(context: Context, until: str) -> list[Part]:
    parts = {part.name: part for part in context.parts.until(until)}
    return [parts[row["step"]] for row in state_of(context, until) if row["state"] in TO_COME]


def _data_left(context: Context, sizes: Sizes) -> int:
    there = columns_file(context.store.root, context.transitions.content_hash).exists()
    return 0 if there else round(_log_bytes(sizes))


def _done(context: Context, part: Part) -> float:
    """Share of a stopped part that is done."""
    folder = context.store.folder(part.step, part.key)
    if part.step == "imagine":
        shards = max(1, -(-_starts(context.config, sizes_of(context)) // context.config.imagine.shard_size))
        there = sum(name.startswith("shard-") and name.endswith(".json") for name in folder.sizes())
        return min(1.0, there / shards)
    folder.pull([METRICS])
    rows = read_jsonl(folder.path / METRICS)
    return rows[-1]["step"] / rows[-1]["total"] if rows and part.step != "evaluate" else 0.0


# ---- this machine


def measure(device: str, seconds: float = MEASURE_SECONDS) -> Speed:
    """Time small operations and, as they are asked for, matrix products on one thread."""
    threads = torch.get_num_threads()
    known: dict[tuple[int, int, int], float] = {}

    def product(groups: int, rows: int, width: int) -> float:
        size = (groups, min(rows, 8192), width)
        if size not in known:
            x = torch.randn(size, device=device)
            w = torch.randn(groups, width, width, device=device)
            known[size] = 2.0 * groups * size[1] * width * width / _timed(lambda: torch.bmm(x, w), device, seconds)
        return known[size]

    torch.set_num_threads(1)
    try:
        small = torch.randn(64, 32, device=device, requires_grad=True)
        operation = _timed(lambda: (small * 2.0).relu(), device, seconds) / 2
    finally:
        torch.set_num_threads(threads)

    def product_on_one_thread(groups: int, rows: int, width: int) -> float:
        torch.set_num_threads(1)
        try:
            return product(groups, rows, width)
        finally:
            torch.set_num_threads(threads)

    return Speed(product_on_one_thread, operation)


def _timed(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of a call, the first one left out."""
    def finish() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    call()
    finish()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or count == 0:
        call()
        count += 1
    finish()
    return (time.perf_counter() - began) / count


# ---- counts


def _mlp(inputs: int, outputs: int, width: int, layers: int) -> int:
    """Weights of a perceptron: multiply-adds of one row."""
    return inputs * width + (layers - 1) * width * width + width * outputs


@dataclass(frozen=True)
class _Weights:
    """Of one network each."""

    q: int
    v: int
    behaviour: int
    returns: int
    model: int
    termination: int
    policy: int

    @classmethod
    def of(cls, config: RunConfig, sizes: Sizes) -> _Weights:
        o, a = sizes.observation, sizes.action
        v, m, p = config.values, config.world_model, config.policy
        learned = sizes.terminates and m.termination == "learned"
        return cls(
            q=_mlp(o + a, 1, v.width, v.layers), v=_mlp(o, 1, v.width, v.layers),
            behaviour=_mlp(o, a, v.width, v.layers), returns=_mlp(o, 2, v.width, v.layers),
            model=_mlp(o + a, 2 * (o + 1), m.width, m.layers), termination=_mlp(2 * o, 1, 128, 2) if learned else 0,
            policy=12 * p.width**2 * p.layers + p.width * (o + 2 * a + 1 + p.told_apart),
        )

    @property
    def actor(self) -> int:
        return 2 * self.behaviour

    @property
    def values(self) -> int:
        return 2 * self.q + self.v + self.returns + self.behaviour


def sizes_of(context: Context, until: str = "choose") -> Sizes:
    """Return the sizes of a run's log; up to step evaluate, of its evaluated episodes too."""
    evaluated = until == "evaluate" and not context.no_environment
    horizon = context.arena.config.max_steps if evaluated else None
    return replace(Sizes.of(context.transitions, context.config.data.holdout_fraction), horizon=horizon or 0)


def _starts(config: RunConfig, sizes: Sizes) -> int:
    """Start states that there is room for: see `select_starts`."""
    cap = max(1, int(config.select.episode_cap * config.select.starts))
    room = np.minimum(-(-sizes.lengths // sizes.within(config.imagine.length)), cap).sum()
    return min(config.select.starts, int(room))


def operations(step: str, config: RunConfig, sizes: Sizes) -> float:
    """Floating-point operations of one update (values, world_model, distill) or of one planned state (plan).

    Of matrix products alone; a gradient to weights and inputs costs two more passes.
    """
    w = _Weights.of(config, sizes)
    if step == "values":
        # target, forward; Q, V, behaviour, and every fourth time the return expectiles, forward and back (three times)
        return 2.0 * config.values.batch_size * (2 * w.q * 4 + w.v * 4.25 + w.behaviour * 3 + w.returns * 0.75)
    if step == "world_model":
        return 6.0 * config.world_model.batch_size * (config.world_model.members * w.model + w.termination)
    if step == "plan":
        elites, planner = config.world_model.elites, config.planner
        if planner.kind == "actor":
            return 2.0 * w.actor
        plans = elites * -(-planner.candidates // elites)
        if planner.kind == "greedy_q":
            return 2.0 * (w.behaviour + 2 * plans * w.q)
        if planner.kind == "gradient":  # to the actions alone: one more pass
            plans = elites * (2 * planner.iterations + 1)
        mean = w.model - config.world_model.width * (sizes.observation + 1)  # the variance is not asked for
        depth = planner.horizon
        return 2.0 * (w.behaviour + plans * (depth * (mean + w.termination) + (depth - 1) * w.behaviour + w.v))
    d = config.distill
    flops = 6.0 * d.batch_size * _policy_weights(config)
    return flops + (8.0 * d.batch_size * config.policy.context * w.q if d.eta > 0 else 0.0)


def _seconds(step: str, config: RunConfig, sizes: Sizes, speed: Speed) -> float:
    w = _Weights.of(config, sizes)
    if step == "values":
        v = config.values
        rate = speed.product(2, v.batch_size, v.width)
        return v.updates * _update("values", operations("values", config, sizes), rate, speed)
    if step == "world_model":
        m = config.world_model
        rate = speed.product(m.members, m.batch_size, m.width)
        each = _update("world_model", operations("world_model", config, sizes), rate, speed)
        look = 2.0 * sizes.held * m.members * w.model / rate / EFFICIENCY["world_model"]
        return m.max_updates * (each + look / min(m.eval_every, m.max_updates))
    if step == "actor":  # one of the reaches is copied
        return 0.0
    if step == "reach":
        a, elites = config.actor, config.world_model.elites
        rate = speed.product(elites, a.batch_size // elites, config.world_model.width)
        look = config.planner.horizon * (w.model + w.termination + w.actor) + w.v
        climbed = a.updates * _update("actor", 4.0 * a.batch_size * look, rate, speed)
        rolled = 2.0 * a.starts * a.length * _imagined_weights(config, w) / rate / EFFICIENCY["actor"]
        learned = a.value_updates * _update("actor", 6.0 * 512 * w.v, rate, speed)
        played = sizes.within(judge_of(config).length) * _imagined_step(a.episodes, config, w, speed)
        return a.rounds * (climbed + rolled + learned + played)
    if step == "imagine":
        elites = config.world_model.elites
        planned = operations("plan", config, sizes) + 2.0 * elites * w.model
        rate = EFFICIENCY["imagine"] * speed.product(elites, CACHED_ROWS // elites, config.world_model.width)
        return _starts(config, sizes) * sizes.within(config.imagine.length) * planned / rate
    if step == "walk":
        walks = config.correct.walks
        each = _policy_step(walks, config, speed) + _imagined_step(walks, config, w, speed)
        return sizes.within(config.correct.length) * each
    if step == "distill":
        p, d = config.policy, config.distill
        threads = 1 + SECOND_CORE * (train_threads(config) - 1)
        rate = speed.product(1, d.batch_size * _tokens(config), p.width) * threads
        return d.updates * _update("distill", operations("distill", config, sizes), rate, speed)
    if step == "choose":
        played = config.choose.episodes
        policies = config.distill.snapshots * (2 if config.choose.without_imagination else 1)
        each = _policy_step(played, config, speed) + _imagined_step(played, config, w, speed)
        return policies * sizes.within(config.choose.length) * each
    if step == "fitted_q":
        v = config.values
        flops = 2.0 * v.batch_size * 2 * w.q * 4  # target, forward; Q, forward and back
        return config.fitted_q.updates * _update("values", flops, speed.product(2, v.batch_size, v.width), speed)
    episodes = config.evaluate.episodes
    each = _policy_step(episodes, config, speed) + episodes * ENVIRONMENT_SECONDS
    return config.distill.snapshots * sizes.horizon * each


def _policy_step(episodes: int, config: RunConfig, speed: Speed) -> float:
    """Seconds that the policy takes to act in so many episodes: the window is read anew at each step."""
    p, tokens = config.policy, _tokens(config)
    rate = speed.product(1, episodes * tokens, p.width)
    return _update("act", 2.0 * episodes * _policy_weights(config), rate, speed)


def _imagined_step(episodes: int, config: RunConfig, w: _Weights, speed: Speed) -> float:
    """Seconds of a step of so many episodes inside the world model."""
    elites = config.world_model.elites
    rate = speed.product(elites, max(1, episodes // elites), config.world_model.width)
    return _update("act", 2.0 * episodes * _imagined_weights(config, w), rate, speed)


def _imagined_weights(config: RunConfig, w: _Weights) -> int:
    """Multiply-adds of a step inside the world model: one elite answers, all say U, an actor acts or corrects."""
    return (config.world_model.elites + 1) * w.model + w.termination + w.actor


def _policy_weights(config: RunConfig) -> int:
    """Multiply-adds of the Transformer for one window."""
    p, tokens = config.policy, _tokens(config)
    return tokens * p.layers * (12 * p.width**2 + 2 * tokens * p.width)


def _tokens(config: RunConfig) -> int:
    """Tokens of a window."""
    if config.policy.tokens == "step":
        return config.policy.context
    return (3 if config.distill.prompt != "none" else 2) * config.policy.context - 1


def _update(step: str, flops: float, rate: float, speed: Speed) -> float:
    return flops / rate / EFFICIENCY[step] + OPERATIONS[step] * speed.operation


def _memory(step: str, config: RunConfig, sizes: Sizes) -> float:
    """Peak bytes of one worker: the process, the log, tables or activations."""
    o, a, steps = sizes.observation, sizes.action, sizes.steps
    w, log = _Weights.of(config, sizes), PROCESS_BYTES + _log_bytes(sizes)
    if step in ("values", "fitted_q"):
        return log + 4.0 * steps * (3 * o + a + 4) * 2 + 4.0 * 5 * w.values
    if step == "world_model":
        m = config.world_model
        return log + 4.0 * steps * (2 * o + a + 1) * 3 + 8.0 * steps * m.members + 4.0 * 6 * m.members * w.model
    if step == "actor":
        return PROCESS_BYTES
    if step == "reach":  # roll-outs, and every activation of the climb
        c, m = config.actor, config.world_model
        climb = c.batch_size * config.planner.horizon * (3 * m.layers * m.width + 6 * config.values.width + 8 * o)
        return log + 4.0 * (3 * c.starts * c.length * (o + a + 7) + climb + steps)
    if step == "walk":
        return log + 2.0 * _walk_bytes(config, sizes)
    if step == "imagine":
        m, elites = config.world_model, config.world_model.elites
        width, planner = max(m.width, config.values.width), config.planner
        if planner.kind == "gradient":  # every activation of a plan is kept
            rows = min(config.imagine.shard_size * elites, GRADIENT_ROWS)
            return log + 4.0 * rows * planner.horizon * (3 * m.layers * m.width + 6 * config.values.width + 8 * o)
        plans = 1 if planner.kind == "actor" else -(-planner.candidates // elites)
        rows = config.imagine.shard_size * elites * plans
        return log + 4.0 * (rows * a * planner.horizon + min(rows, CACHED_ROWS) * (3 * o + 4 * width))
    if step == "distill":
        p, d = config.policy, config.distill
        tokens = _tokens(config)
        activations = 4.0 * d.batch_size * tokens * p.width * 20 * p.layers
        corpus, policy = _corpus_bytes(config, sizes), 4.0 * 6 * w.policy
        imagined = _segment_bytes(config, sizes) + corrections(config) * _walk_bytes(config, sizes)
        prepared = log + 4.0 * steps * 3 + imagined * 2 + corpus
        if config.runtime.engine == "local":
            return prepared + activations + policy
        # One process prepares; then a worker holds its slices, and while it reads them, twice.
        fewest = config.runtime.min_workers or config.runtime.workers
        return max(prepared, PROCESS_BYTES + (2 * corpus + activations) / fewest + policy)
    return PROCESS_BYTES + 4.0 * 2 * (w.policy + w.values)


def _disk(step: str, config: RunConfig, sizes: Sizes) -> float:
    """Bytes of the artifact, and of the largest checkpoint and what workers read on the way."""
    w = _Weights.of(config, sizes)
    if step == "values":
        return 4.0 * (w.values * 5)
    if step == "world_model":
        return 4.0 * (config.world_model.members * w.model * 5 + w.termination + 3 * sizes.held)
    if step == "actor":
        return 4.0 * w.actor
    if step == "reach":
        return 4.0 * (6 * w.actor + 3 * w.v + config.actor.starts * sizes.observation)
    if step == "imagine":
        return _segment_bytes(config, sizes)
    if step == "walk":
        return _walk_bytes(config, sizes)
    if step == "distill":
        corpus = _corpus_bytes(config, sizes) if config.runtime.engine == "ray" else 0.0
        return 4.0 * (w.policy * (4 + config.distill.snapshots) + 2 * w.values) + corpus
    return 4e3


def _segment_bytes(config: RunConfig, sizes: Sizes) -> float:
    return _starts(config, sizes) * _one_segment(sizes, sizes.within(config.imagine.length))


def _walk_bytes(config: RunConfig, sizes: Sizes) -> float:
    """Of a round of corrections."""
    return config.correct.walks * _one_segment(sizes, sizes.within(config.correct.length))


def _one_segment(sizes: Sizes, length: int) -> float:
    return 4.0 * ((length + 1) * (sizes.observation + 2) + length * (2 * sizes.action + 4) + 10)


def _corpus_bytes(config: RunConfig, sizes: Sizes) -> float:
    """What distillation draws windows from: the log, and plans behind the real steps that they look back on."""
    plans = 0
    if config.distill.imagined_ratio > 0:
        plans = _starts(config, sizes) * (sizes.within(config.imagine.length) + config.policy.context - 1)
        plans += corrections(config) * config.correct.walks * sizes.within(config.correct.length)
    log = sizes.steps + len(sizes.lengths) * (config.policy.context - 1)
    return 4.0 * ((log + plans) * (sizes.observation + sizes.action + 3) + plans * sizes.action)


def _driver_bytes(sizes: Sizes) -> float:
    """Of the process that starts the workers: it reads the log."""
    return PROCESS_BYTES + _log_bytes(sizes)


def _log_bytes(sizes: Sizes) -> float:
    return 4.0 * sizes.steps * (2 * sizes.observation + sizes.action + 2)


__all__ = [
    "Sizes", "estimate", "estimate_disk", "estimate_memory", "measure", "operations", "sizes_of", "total",
    "work_seconds",
]
