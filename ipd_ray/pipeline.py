"""The method, top to bottom: values and world model, imagination, distillation, evaluation.

Every step is looked up by key first; what is missing is claimed, computed by an engine, and committed to the store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from ipd_ray.artifacts import TENSORS, Artifact, Store, Workspace, make_key
from ipd_ray.config import ChooseConfig, DistillConfig, RunConfig
from ipd_ray.data.columns import keep_columns
from ipd_ray.data.shards import read_entries
from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.distill import fit as distill_fit
from ipd_ray.engine import Engine, Task
from ipd_ray.errors import PartialError
from ipd_ray.evaluate import choose as evaluate_choose
from ipd_ray.evaluate import episodes, fitted_q
from ipd_ray.evaluate.episodes import Arena, NoEnvironment, arena_of
from ipd_ray.imagine import actor as actor_fit
from ipd_ray.imagine import walk as policy_walk
from ipd_ray.imagine.rollout import ShardSpec
from ipd_ray.progress import NOTE, Crew, CurveTail, Listener, ShardProgress
from ipd_ray.steps import (
    DistillJob,
    Imagination,
    Inside,
    LogRef,
    Place,
    finish_imagination,
    gate_of,
    run_actor,
    run_choose,
    run_evaluate,
    run_fitted_q,
    run_reach,
    run_select,
    run_shard,
    run_values,
    run_walk,
    run_world_model,
)
from ipd_ray.storage import ARTIFACT, METRICS, Folder
from ipd_ray.training import cores, device_here, resolve_device
from ipd_ray.values import fit as values_fit
from ipd_ray.world_model import fit as world_model_fit

IMAGINE_VERSION = 6
STEPS = ("values", "world_model", "reach", "actor", "imagine", "distill", "choose", "fitted_q", "evaluate")


@dataclass(frozen=True)
class Part:
    """One artifact of a run: its step, its key, and what the key was made of."""

    name: str
    """Unique in the run: the step, or step:variant for an ablation."""
    step: str
    version: int
    seed: int
    sections: Mapping[str, Any]
    upstream: Mapping[str, str]

    @cached_property
    def key(self) -> str:
        return make_key(self.step, self.version, seed=self.seed, sections=self.sections, upstream=self.upstream)

    @property
    def described(self) -> dict[str, Any]:
        plain = {k: v.model_dump(mode="json") if hasattr(v, "model_dump") else v for k, v in self.sections.items()}
        return {"seed": self.seed, "config": plain, "upstream": dict(self.upstream)}


def variants(config: RunConfig) -> dict[str, DistillConfig]:
    """What is distilled: the policy itself ("ipd"), the ablations that were asked for, and what it is chosen from."""
    plain = {"imagined_ratio": 0.0}
    changes: dict[str, dict[str, Any]] = {
        "bc": {**plain, "eta": 0.0, "prompt": "none", "data_temperature": 0.0},
        "no_imagination": plain,
    }
    out = {"ipd": config.distill}
    choose, imagines = config.choose, config.distill.imagined_ratio > 0
    also = ("no_imagination",) if choose.episodes > 0 and choose.without_imagination and imagines else ()
    for name in (*config.ablations, *also):
        out[name] = config.distill.model_copy(update=changes[name])
    return out


def corrections(config: RunConfig) -> int:
    """Times that the policy walks and learns what its actor would have done."""
    imitates = config.planner.kind == "actor" and config.distill.imagined_ratio > 0
    return config.correct.rounds if imitates else 0


def draft_name(k: int) -> str:
    """Of the policy that walks for the k-th time."""
    return f"distill:draft-{k}"


def correction(config: RunConfig) -> DistillConfig:
    """How the policy goes on after a walk."""
    return config.distill.model_copy(update={"updates": max(1, round(config.correct.updates * config.distill.updates))})


class Parts:
    """Keys of everything that a run makes."""

    def __init__(self, config: RunConfig, content_hash: str, spec: Spec):
        """content_hash, spec: of the log's transitions."""
        c, data = config, {"data": content_hash}
        self.values = Part("values", "values", values_fit.VERSION, c.seed, {"data": c.data, "values": c.values}, data)
        self.world_model = Part(
            "world_model",
            "world_model",
            world_model_fit.VERSION,
            c.seed,
            {"data": c.data, "world_model": c.world_model},
            data,
        )
        learned = {"values": self.values.key, "world_model": self.world_model.key}
        self.reaches: dict[float, Part] = {}
        self.actor: Part | None = None
        """None where plans are found anew for each state."""
        if c.planner.kind == "actor":
            about: dict[str, Any] = {"planner": c.planner.read_by_kind(), "uncertainty": c.imagine.uncertainty}
            judged = {"judge": judge_of(c), "range_margin": c.accept.range_margin}
            alone = {**about, **judged, "actor": c.actor.model_dump(mode="json", exclude={"reaches"})}
            for reach in c.actor.reaches:
                sections = {**alone, "reach": reach}
                self.reaches[reach] = Part(f"reach:{reach}", "reach", actor_fit.VERSION, c.seed, sections, learned)
            upstream = {**learned, **{part.name: part.key for part in self.reaches.values()}}
            self.actor = Part("actor", "actor", actor_fit.TAKEN_VERSION, c.seed, {**about, "actor": c.actor}, upstream)
            learned = {**learned, "actor": self.actor.key}
        sections = {"select": c.select, "planner": c.planner.read_by_kind(), "imagine": c.imagine}
        self.imagine = Part("imagine", "imagine", IMAGINE_VERSION, c.seed, sections, learned)
        self._choice_is_wide = c.choose.without_imagination
        self._imagines = any(v.imagined_ratio > 0 for v in variants(c).values())
        self.distill: dict[str, Part] = {}
        self.drafts: list[Part] = []
        """Where an actor corrects: the policies before the last one, in order; each goes on from the one before."""
        self.walks: list[Part] = []
        """Where these drafts get to."""
        for k in range(1, corrections(c) + 1):
            self.drafts.append(self._distilled(c, draft_name(k), c.distill))
            self.walks.append(self._walk(c, f"walk:{k}", learned))
        self.evaluate: dict[str, Part] = {}
        for variant, distill in variants(c).items():
            suffix = "" if variant == "ipd" else f":{variant}"
            self.distill[variant] = self._distilled(c, f"distill{suffix}", distill)
        self.choose: Part | None = None
        """None where the last policy of the distillation is kept."""
        if c.choose.episodes > 0:
            candidates = {name: self.distill[name].key for name in self.candidates}
            upstream = {"world_model": self.world_model.key, **candidates}
            about = {
                "choose": c.choose, "uncertainty": c.imagine.uncertainty, "range_margin": c.accept.range_margin
            }  # fmt: skip
            self.choose = Part("choose", "choose", evaluate_choose.VERSION, c.seed, about, upstream)
        self.fitted_q: Part | None = None
        """None where it is not asked for."""
        if c.fitted_q.updates > 0:
            upstream = {"values": self.values.key, "policy": self.policy.key}
            self.fitted_q = Part("fitted_q", "fitted_q", fitted_q.VERSION, c.seed, {"fitted_q": c.fitted_q}, upstream)
        for variant in ("ipd", *c.ablations):
            suffix = "" if variant == "ipd" else f":{variant}"
            chosen = {"choose": self.choose.key} if self.choose and variant == "ipd" else {}
            self.evaluate[variant] = Part(
                f"evaluate{suffix}",
                "evaluate",
                episodes.VERSION,
                c.evaluate.seed,
                {"evaluate": c.evaluate, "environment": spec.acting},
                {"distill": self.distill[variant].key, **chosen},
            )

    def _distilled(self, c: RunConfig, name: str, distill: DistillConfig) -> Part:
        """A policy, which goes on from the draft before it where it is corrected."""
        sections: dict[str, Any] = {"policy": c.policy, "distill": distill}
        upstream = {"values": self.values.key}
        if distill.imagined_ratio > 0:
            sections["accept"], upstream["imagine"] = c.accept, self.imagine.key
            if self.drafts:
                sections["distill"] = correction(c)
                upstream.update({part.name: part.key for part in (*self.walks, self.drafts[-1])})
        return Part(name, "distill", distill_fit.VERSION, c.seed, sections, upstream)

    def _walk(self, c: RunConfig, name: str, learned: Mapping[str, str]) -> Part:
        """How the last draft walks."""
        about = {
            **c.correct.model_dump(mode="json", include={"walks", "length"}), "noise_std": c.actor.noise_std,
            "uncertainty": c.imagine.uncertainty, "known": c.choose.known, "range_margin": c.accept.range_margin,
        }  # fmt: skip
        upstream = {**learned, "policy": self.drafts[-1].key}
        return Part(name, "walk", policy_walk.VERSION, c.seed, {"walk": about}, upstream)

    @property
    def candidates(self) -> list[str]:
        """The variants whose policies are chosen from; what roll-outs cannot tell apart goes to the first."""
        offered = ("ipd", "no_imagination") if self._choice_is_wide else ("ipd",)
        return [name for name in offered if name in self.distill]

    @property
    def policy(self) -> Part:
        """What the run leaves as its policy."""
        return self.choose or self.distill["ipd"]

    def until(self, last: str) -> list[Part]:
        """All parts that a run up to and including a step needs, in order."""
        actor = [*self.reaches.values(), self.actor] if self.actor else []
        ahead, order = [self.world_model, *actor, self.imagine], STEPS.index(last)
        if order >= STEPS.index("distill") and not self._imagines:
            ahead = [self.world_model] if order > STEPS.index("distill") and self.choose else []
        after = [part for part in (self.choose, self.fitted_q) if part]
        corrected = [part for pair in zip(self.drafts, self.walks, strict=True) for part in pair]
        parts = [self.values, *ahead, *corrected, *self.distill.values(), *after, *self.evaluate.values()]
        return [p for p in parts if STEPS.index("distill" if p.step == "walk" else p.step) <= order]


@dataclass(frozen=True)
class Context:
    """A run in progress."""

    config: RunConfig
    transitions: Transitions
    store: Store
    engine: Engine
    listener: Listener

    @cached_property
    def parts(self) -> Parts:
        return Parts(self.config, self.transitions.content_hash, self.transitions.spec)

    @cached_property
    def device(self) -> str:
        return resolve_device(self.config.runtime.device)

    def place(self, threads: int | None = None) -> Place:
        runtime = self.config.runtime
        return Place(self.device, threads or runtime.threads, runtime.checkpoint_seconds)

    @cached_property
    def here(self) -> Place:
        """Where this process computes the little that is no worker's: a cluster's GPUs are on other machines."""
        return replace(self.place(), device=device_here(self.device))

    @cached_property
    def arena(self) -> Arena:
        """What the policy is evaluated in. Raises NoEnvironment where there is none."""
        return arena_of(self.transitions, self.config.evaluate)

    @cached_property
    def no_environment(self) -> str:
        """Why nothing can be evaluated; empty where it can."""
        try:
            _ = self.arena
        except NoEnvironment as error:
            return str(error)
        return ""

    @cached_property
    def log(self) -> LogRef:
        """The converted log in the store, written where it is missing."""
        return LogRef(str(keep_columns(self.store.root, self.transitions)), self.config.data, self.config.seed)

    def path(self, part: Part) -> str:
        artifact = self.store.find(part.step, part.key)
        if artifact is None:
            raise FileNotFoundError(f"{part.name} {part.key[:24]} is not in the store {self.store.root}")
        return str(artifact.folder)

    def obtain(self, parts: Mapping[str, Part], compute: Callable[[dict[str, Folder]], None]) -> None:
        """Have the parts in the store: reuse what is there, compute the rest in claimed work folders."""
        ready = {n for n, p in parts.items() if self.store.find(p.step, p.key)}
        missing = {n: p for n, p in parts.items() if n not in ready}
        with ExitStack() as stack:
            folders: dict[str, Folder] = {}
            for name, part in sorted(missing.items(), key=lambda item: (item[1].step, item[1].key)):  # see claim
                folder = stack.enter_context(self.store.claim(part.step, part.key, waiting=self._waiting))
                if folder is not None:
                    folders[name] = folder
            if folders:
                compute(folders)
            for name in folders:
                part = parts[name]
                self.store.commit(part.step, part.key, version=part.version, parts=part.described)
            for name, part in parts.items():
                self.listener.end(part.name, Artifact(self.path(part)).seconds, reused=name not in folders)

    def _waiting(self, step: str, owner: Mapping[str, Any]) -> None:
        self.listener.note(
            f"{step}: another run (host {owner.get('host')}, process {owner.get('pid')}) is computing it; "
            "waiting for it"
        )


def run_until(context: Context, last: str, learned: Callable[[], None]) -> None:
    """The method. Each step is reused where its key is in the store. learned: called once there is a policy, before it
    is scored."""
    needed = {part.step for part in context.parts.until(last)}
    learn_values_and_world_model(context, also_world_model="world_model" in needed)
    if "reach" in needed:
        learn_reaches(context)
    if "actor" in needed:
        learn_actor(context)
    if "imagine" in needed:
        imagine(context)
    if "distill" in needed:
        correct(context)
    for variant in variants(context.config) if "distill" in needed else ():
        distill(context, context.parts.distill[variant])
    if "choose" in needed:
        choose(context)
    if "distill" in needed:
        learned()
    if "fitted_q" in needed:
        evaluate_offline(context)
    for variant in context.parts.evaluate if "evaluate" in needed else ():
        evaluate(context, variant)


def learn_values_and_world_model(context: Context, also_world_model: bool = True) -> None:
    """Steps 1 and 2, side by side."""
    config, parts = context.config, context.parts

    def arguments(section: Any) -> Callable[[], dict[str, Any]]:
        return lambda: {"log": context.log, "config": section, "seed": config.seed}

    jobs = [Job(parts.values, run_values, arguments(config.values))]
    if also_world_model:
        jobs.append(Job(parts.world_model, run_world_model, arguments(config.world_model)))
    _obtain(context, jobs)


def learn_reaches(context: Context) -> None:
    """Step 3, where planner.kind=actor: an actor for each reach, side by side."""

    def arguments(reach: float) -> Callable[[], dict[str, Any]]:
        return lambda: {"imagination": _imagination(context), "planner": context.config.planner, "reach": reach}

    _obtain(context, [Job(part, run_reach, arguments(reach)) for reach, part in context.parts.reaches.items()])


def learn_actor(context: Context) -> None:
    """Step 3, where planner.kind=actor: the best of the reaches."""
    part = context.parts.actor
    assert part is not None  # part of the run
    _obtain(context, [Job(part, run_actor, lambda: {
        "reaches": [context.path(reach) for reach in context.parts.reaches.values()],
    })])


def _imagination(context: Context) -> Imagination:
    config, parts = context.config, context.parts
    inside = inside_of(config, judge_of(config), context.log, context.path(parts.world_model))
    return Imagination(inside, context.path(parts.values), config.actor)


def inside_of(config: RunConfig, judge: ChooseConfig, log: LogRef, world_model: str) -> Inside:
    """Where a run plays whole episodes inside its world model, by the rules of `judge`."""
    return Inside(log, world_model, judge, config.imagine.uncertainty, config.accept.range_margin, config.seed)


def judge_of(config: RunConfig) -> ChooseConfig:
    """Whole episodes that actors play inside the world model: as policies do in step 6 where nothing else is asked for,
    in numbers of their own."""
    return ChooseConfig(
        episodes=config.actor.episodes, noise_std=config.choose.noise_std, known=config.choose.known
    )


def imagine(context: Context) -> None:
    """Steps 3 and 4: choose starts, plan from them, one shard a task. Shards that are there are not made again."""
    config, part = context.config, context.parts.imagine

    def compute(folders: dict[str, Folder]) -> None:
        folder = folders["imagine"]
        workspace = Workspace(folder)
        shared: dict[str, Any] = {
            "work": str(folder),
            "log": context.log,
            "values": context.path(context.parts.values),
            "imagine": config.imagine,
            "seed": config.seed,
        }
        specs: list[ShardSpec] = run_select(**shared, place=context.here, select=config.select)
        found, wanted = sum(len(s.index) for s in specs), config.select.starts
        if 10 * found < wanted:
            context.listener.note(
                f"{NOTE}{found:,} start states for select.starts={wanted:,}: those of an episode are a segment "
                f"apart (imagine.length={config.imagine.length}, or the longest episode), and at most "
                f"select.episode_cap={config.select.episode_cap:g} of all; shorter segments, or a larger cap, leave "
                "room for more."
            )
        there = read_entries(folder)
        missing = [s for s in specs if s.shard not in there]
        if done := len(specs) - len(missing):
            context.listener.note(f"imagine: {done} of {len(specs)} shards are there already")
        world_model = context.path(context.parts.world_model)
        gate = gate_of(
            config.accept, context.log, shared["values"], world_model, uncertainty=config.imagine.uncertainty,
            regret_share=config.select.regret_share, length=config.imagine.length, device=context.here.device,
        )
        actor = context.path(context.parts.actor) if context.parts.actor else None
        arguments = {
            **shared, "place": context.place(), "world_model": world_model, "planner": config.planner, "actor": actor,
            "gate": gate,
        }  # fmt: skip
        tasks = [Task(f"shard {s.shard}", run_shard, {**arguments, "spec": s}) for s in missing]
        progress = ShardProgress(done, len(specs), context.engine.crew, context.listener)
        failed = context.engine.map_shards(tasks, lambda _, shard: progress.add(shard), progress.tick)
        if failed:
            lines = [f"shard {missing[i].shard}:\n{text}" for i, text in failed.items()]
            raise PartialError(
                f"imagine: {len(failed)} of {len(specs)} shards failed three times and were set aside; the others are "
                f"kept in {folder} and a new run tries only these again:\n" + "\n".join(lines)
            )
        finish_imagination(workspace, len(specs))

    context.obtain({"imagine": part}, compute)


def correct(context: Context) -> None:
    """Step 5, where planner.kind=actor: drafts of the policy, each of which walks inside the world model."""
    config, parts = context.config, context.parts

    def arguments(draft: Part) -> Callable[[], dict[str, Any]]:
        assert parts.actor is not None  # it corrects
        actor = parts.actor
        return lambda: {
            "imagination": _imagination(context), "config": config.correct, "actor": context.path(actor),
            "policy": context.path(draft),
        }

    for draft, walks in zip(parts.drafts, parts.walks, strict=True):
        distill(context, draft)
        _obtain(context, [Job(walks, run_walk, arguments(draft))])


def distill(context: Context, part: Part) -> None:
    """Step 5, one policy."""
    config, parts = context.config, context.parts
    section: DistillConfig = part.sections["distill"]
    imagined = section.imagined_ratio > 0
    before = [draft for draft in parts.drafts if draft.name in part.upstream]
    walks = [walk for walk in parts.walks if walk.name in part.upstream]

    def compute(folders: dict[str, Folder]) -> None:
        folder = folders[part.name]
        job = distill_job(
            config, section, work=str(folder), place=context.place(train_threads(config)), log=context.log,
            values=context.path(parts.values),
            world_model=context.path(parts.world_model) if imagined else None,
            imagination=context.path(parts.imagine) if imagined else None,
            corrections=[context.path(walk) for walk in walks], begin=context.path(before[-1]) if before else None,
        )  # fmt: skip
        context.engine.distill(job, _tick(context, {part.name: folder}))

    context.obtain({part.name: part}, compute)


def distill_job(
    config: RunConfig, section: DistillConfig, *, work: str, place: Place, log: LogRef, values: str,
    world_model: str | None, imagination: str | None, corrections: Sequence[str] = (), begin: str | None = None,
) -> DistillJob:  # fmt: skip
    """A distillation of a run. section: of one of its variants, or of a correction; begin: the policy to go on from."""
    return DistillJob(
        work, place, log, values, world_model, imagination, config.imagine.uncertainty, config.select.regret_share,
        config.accept, config.policy, section, config.seed, of_actor=config.planner.kind == "actor",
        corrections=tuple(corrections), begin=begin,
    )


def choose(context: Context) -> None:
    """Step 6, the policy that is kept."""
    config, part = context.config, context.parts.choose
    assert part is not None  # part of the run
    _obtain(context, [Job(part, run_choose, lambda: {
        "inside": inside_of(config, config.choose, context.log, context.path(context.parts.world_model)),
        "distilled": {name: context.path(context.parts.distill[name]) for name in context.parts.candidates},
    })])


def evaluate_offline(context: Context) -> None:
    """Step 7 without an environment: the value of the policy that is left, on held-out episodes."""
    config, part = context.config, context.parts.fitted_q
    assert part is not None  # part of the run
    _obtain(context, [Job(part, run_fitted_q, lambda: {
        "log": context.log,
        "values": context.path(context.parts.values),
        "policy": context.path(context.parts.policy),
        "config": config.fitted_q,
        "seed": config.seed,
    })])


def evaluate(context: Context, variant: str = "ipd") -> None:
    """Step 7, one policy; skipped with a line where there is no environment."""
    part = context.parts.evaluate[variant]
    if reason := context.no_environment:
        context.listener.note(f"evaluation skipped: {reason}. The offline diagnostics stand.")
        return

    chosen = context.parts.choose if variant == "ipd" else None
    _obtain(context, [Job(part, run_evaluate, lambda: {
        "policy": context.path(context.parts.distill[variant]),
        "config": context.arena.config,
        "spec": context.arena.spec,
        "chosen": context.path(chosen) if chosen else None,
    })])


@dataclass(frozen=True)
class Job:
    """A part that one worker makes."""

    part: Part
    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    """Beside where it works; asked for only where it is to be made."""


def _obtain(context: Context, jobs: Sequence[Job]) -> None:
    """Have the parts, made side by side."""

    def compute(folders: dict[str, Folder]) -> None:
        tasks = []
        for job in jobs:
            if folder := folders.get(job.part.name):
                arguments = {"work": str(folder), "place": context.place(), **job.arguments()}
                tasks.append(Task(job.part.name, job.function, arguments))
        context.engine.run_steps(tasks, _tick(context, folders))

    context.obtain({job.part.name: job.part for job in jobs}, compute)


def train_threads(config: RunConfig) -> int:
    """CPU threads of one distillation worker."""
    return config.runtime.train_threads or max(1, cores() // config.runtime.workers)


def _tick(context: Context, folders: Mapping[str, Folder]) -> Callable[[], None]:
    """What says how steps get on, by where they are made."""
    tails = [CurveTail(name, folder, context.listener) for name, folder in folders.items()]
    crew = Crew(", ".join(folders), context.engine.crew, context.listener)

    def tick() -> None:
        for tail in tails:
            tail()
        crew()

    return tick


def summarise(context: Context) -> dict[str, Any]:
    """What a run came to, for people and machines: the content of summary.json."""
    t, store, parts = context.transitions, context.store, context.parts
    found = {p.name: a for p in parts.until("evaluate") if (a := store.find(p.step, p.key))}
    returns = t.episode_return
    summary: dict[str, Any] = {
        "dataset": t.spec.dataset,
        "seed": context.config.seed,
        "key": parts.distill["ipd"].key,
        "data": {
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
            "return_max": float(returns.max()),
            "normalised": t.spec.normalise(float(returns.mean())),
            "episodes": t.episodes,
            "steps": len(t),
            "longest_cut": t.longest_cut,
            "time_limit": t.time_limit,
        },
        "seconds": {name: artifact.seconds for name, artifact in found.items()},
    }
    if distilled := found.get("distill"):
        imagined = distilled.diagnostics["imagined"]
        keep = (
            "segments",
            "accepted",
            "accept_rate",
            "accepted_steps",
            "accept_rate_control",
            "accept_rate_flagged",
            "imagined_mean",
            "own_mean",
            "kappa",
        )
        summary["imagined"] = {k: imagined[k] for k in keep if k in imagined}
    if chosen := found.get("choose"):
        summary["chosen"] = {k: chosen.diagnostics[k] for k in ("variant", "step")}
    if offline := found.get("fitted_q"):
        summary["fitted_q"] = {k: offline.diagnostics[k] for k in ("value_mean", "value_sem", "log_value", "episodes")}
    for variant, part in parts.evaluate.items():
        if part.name in found:
            scores = found[part.name].diagnostics
            where = "policy" if variant == "ipd" else variant
            shown = ("return_mean", "return_std", "normalised", "success", "episodes", "length_mean")
            summary[where] = {k: scores[k] for k in (*shown, "discounted_mean", "value_at_start")}
            best = scores["best"]
            summary[where]["best"] = {k: best[k] for k in ("step", "return_mean", "normalised")}
    return summary


def copy_policy(context: Context, folder: Folder) -> None:
    """Put the policy into the run folder, where `Policy.load` finds it without the store."""
    part = context.parts.policy
    if context.store.find(part.step, part.key) is None:
        part = context.parts.distill["ipd"]  # a run that ends before its choice
    artifact = Artifact(context.path(part))
    kept = [name for name in (ARTIFACT, TENSORS, METRICS) if artifact.folder.exists(name)]
    artifact.pull(kept)
    described = {**artifact.described, "spec": asdict(context.transitions.spec)}  # as it is now
    target, fresh = folder.path / "policy", folder.path / ".policy.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name in kept:
        shutil.copy2(artifact.path / name, fresh / name)
    (fresh / ARTIFACT).write_text(json.dumps(described, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    folder.push([f"policy/{name}" for name in kept if name != ARTIFACT])
    folder.push([f"policy/{ARTIFACT}"])


TO_COME = ("to do", "goes on")
"""States of work that is still to be done; the others are `reused`, and `left out` for want of an environment."""


def state_of(context: Context, last: str = "evaluate") -> list[dict[str, Any]]:
    """What a run would reuse, what it would do, and what it leaves out, without doing it."""
    rows = []
    for part in context.parts.until(last):
        artifact = context.store.find(part.step, part.key)
        begun = context.store.folder(part.step, part.key).exists()
        state = "reused" if artifact else "goes on" if begun else "to do"
        if part.step == "evaluate" and context.no_environment:
            state = "left out"
        size = artifact.folder.bytes if artifact else 0
        rows.append({"step": part.name, "key": part.key[:24], "state": state, "bytes": size})
    return rows

