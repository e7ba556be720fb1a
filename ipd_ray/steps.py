"""What a worker process does: read what a step needs, run the pure step, leave the artifact in its workspace.

Every function here takes picklable arguments and paths, and may run in any process that sees the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from ipd_ray.artifacts import Artifact, Workspace, numeric_platform, prefixed, stripped
from ipd_ray.config import (
    AcceptConfig,
    ActorConfig,
    ChooseConfig,
    CorrectConfig,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    FittedQConfig,
    ImagineConfig,
    PlannerConfig,
    PolicyConfig,
    SelectConfig,
    ValuesConfig,
    WorldModelConfig,
)
from ipd_ray.data.columns import fetch_columns
from ipd_ray.data.shards import Segments, concatenate, manifest_digest, read_entries, read_shard, write_shard
from ipd_ray.data.transitions import Bools, Floats, Ints, Log, Spec, prepare
from ipd_ray.distill.fit import (
    Corpus,
    DistillTrainer,
    Material,
    Reducer,
    advantage_weight,
    critic_spread,
    fit_policy,
    imagined_advantage,
    imagined_outcome,
    raw_outcome,
    raw_return_to_go,
)
from ipd_ray.distill.windows import Prompts
from ipd_ray.evaluate.acting import Policy
from ipd_ray.evaluate.choose import first_as_good, imagined_returns
from ipd_ray.evaluate.episodes import evaluate
from ipd_ray.evaluate.fitted_q import fit_q
from ipd_ray.imagine.accept import Accepted, accept, accept_walks, kappa, summarise
from ipd_ray.imagine.actor import Actor, ActorTrainer, Rollouts, best_reach, learn_actor, load_actor
from ipd_ray.imagine.rollout import ShardSpec, imagine_shard, segment_length, shard_specs
from ipd_ray.imagine.select import select_starts
from ipd_ray.imagine.walk import Player, walk
from ipd_ray.storage import Folder
from ipd_ray.training import set_threads
from ipd_ray.values.fit import (
    bootstrapped_returns,
    evaluate_in_chunks,
    fit_values,
    generalised_advantage,
    load_values,
    value_at_ends,
)
from ipd_ray.values.networks import ValueFunctions
from ipd_ray.world_model.ensemble import WorldModel
from ipd_ray.world_model.fit import fit_world_model, load_world_model
from ipd_ray.world_model.uncertainty import KINDS, Trust, known_threshold


@dataclass(frozen=True)
class LogRef:
    """Where a converted log lies, and how it is prepared."""

    path: str
    """Path or URI of the file."""
    data: DataConfig
    seed: int

    def load(self) -> Log:
        """Return the log; kept in this process."""
        return _load_log(self)


@lru_cache(maxsize=2)
def _load_log(ref: LogRef) -> Log:
    found = fetch_columns(Folder.of(ref.path))
    if found is None:
        raise FileNotFoundError(f"the converted log {ref.path} is gone or damaged: run again, it is converted anew.")
    return prepare(found, ref.data, ref.seed)


@dataclass(frozen=True)
class Place:
    """Where and how a worker computes. Changes no result on one numeric platform, but for distillation's `threads`."""

    device: str
    threads: int
    checkpoint_seconds: float

    def workspace(self, path: str) -> Workspace:
        set_threads(self.threads)
        return Workspace(path, self.checkpoint_seconds, self.device)


@lru_cache(maxsize=2)
def values_of(path: str, device: str) -> ValueFunctions:
    """Step 1's result, kept in this process."""
    artifact = Artifact(path)
    return load_values(artifact.tensors(), artifact.described, device)


@lru_cache(maxsize=2)
def world_model_of(path: str, device: str) -> WorldModel:
    """Step 2's result, kept in this process."""
    artifact = Artifact(path)
    return load_world_model(artifact.tensors(), artifact.described, device)


def holdout_uncertainty(world_model: str, kind: str) -> np.ndarray:
    """(H,) U of the held-out steps, of one kind."""
    return Artifact(world_model).tensors()["holdout_uncertainty"][KINDS.index(kind)].numpy()


@lru_cache(maxsize=1)
def logged_values(values: str, log: LogRef, device: str) -> tuple[Floats, Floats]:
    """V(s_t) and bootstrapped G_t of every step of the log, (T,) each; kept in this process."""
    data, model = log.load(), values_of(values, device)
    v = evaluate_in_chunks(model.v, data.transitions.observation, device=device)
    return v, bootstrapped_returns(data, model.v, device)


def run_values(work: str, place: Place, log: LogRef, config: ValuesConfig, seed: int) -> None:
    """Step 1."""
    fit_values(log.load(), config, seed=seed, device=place.device, workspace=place.workspace(work))


def run_world_model(work: str, place: Place, log: LogRef, config: WorldModelConfig, seed: int) -> None:
    """Step 2."""
    fit_world_model(log.load(), config, seed=seed, device=place.device, workspace=place.workspace(work))


@dataclass(frozen=True)
class Inside:
    """Where whole episodes are played without an environment: inside the world model, as far as it knows."""

    log: LogRef
    world_model: str
    config: ChooseConfig
    uncertainty: str
    range_margin: float
    seed: int

    @cached_property  # read from the artifact; asked for at each round of an actor
    def trust(self) -> Trust:
        """How far the world model is believed."""
        known = known_threshold(holdout_uncertainty(self.world_model, self.uncertainty), self.config.known)
        return Trust(self.uncertainty, known, self.range_margin)

    def play(self, player: Player, device: str) -> tuple[Floats, float, float]:
        """Returns of whole episodes, the shares that ended and were halted; as `imagined_returns`."""
        dynamics = world_model_of(self.world_model, device)
        return imagined_returns(
            player, self.log.load(), dynamics, self.config, self.trust, seed=self.seed, device=device
        )


@lru_cache(maxsize=1)
def actor_of(path: str, device: str) -> Actor:
    """The actor of step 3, kept in this process."""
    artifact = Artifact(path)
    return load_actor(artifact.tensors(), artifact.described, device)


@dataclass(frozen=True)
class Imagination:
    """What the actor's steps share: all that has been learned."""

    inside: Inside
    values: str
    config: ActorConfig

    def rollouts(self, device: str) -> Rollouts:
        """Where an actor is rolled out."""
        inside = self.inside
        return Rollouts(
            inside.log.load(), values_of(self.values, device), world_model_of(inside.world_model, device), self.config,
            inside.trust, seed=inside.seed, device=device,
        )  # fmt: skip

    def play(self, actor: Actor, device: str) -> tuple[Floats, float, float]:
        """Returns of whole episodes; as `Inside.play`."""
        return self.inside.play(_Memoryless(actor, self.inside.log.load(), device), device)


def run_reach(work: str, place: Place, imagination: Imagination, planner: PlannerConfig, reach: float) -> None:
    """Step 3, where planner.kind=actor: the actor of one reach."""
    workspace, device = place.workspace(work), place.device
    trainer = ActorTrainer(
        imagination.rollouts(device), planner, lambda actor: float(imagination.play(actor, device)[0].mean()), reach
    )
    actor = learn_actor(trainer, imagination.config.rounds, workspace)
    returns, ended, halted = imagination.play(actor, device)
    workspace.finish(actor.state_dict(), {
        "reach": reach, "round": trainer.best_round, "behaviour_return": trainer.behaviour_return,
        "return_mean": float(returns.mean()), "return_sem": float(returns.std() / np.sqrt(len(returns))),
        "ended": ended, "halted": halted,
    }, actor=actor.sizes)


def run_actor(work: str, place: Place, reaches: Sequence[str]) -> None:
    """Step 3, where planner.kind=actor: the actor of the best reach.

    reaches: folders that `run_reach` left.
    """
    workspace = place.workspace(work)
    workspace.rewind({})
    found = [Artifact(folder) for folder in reaches]
    best = found[best_reach([artifact.diagnostics for artifact in found])]
    workspace.finish(best.tensors(), {
        **best.diagnostics, "reaches": {str(a.diagnostics["reach"]): a.diagnostics["return_mean"] for a in found},
    }, actor=best.described["actor"])


def run_walk(
    work: str, place: Place, imagination: Imagination, config: CorrectConfig, actor: str, policy: str
) -> None:
    """Step 5, where planner.kind=actor: what the actor would do where a distilled policy walks.

    actor, policy: artifacts of theirs.
    """
    workspace, artifact = place.workspace(work), Artifact(policy)
    walks = Policy(artifact.described, artifact.tensors(), place.device)
    rollouts = imagination.rollouts(place.device)
    segments, told = walk(walks, actor_of(actor, place.device), rollouts, config)
    write_shard(workspace.folder, 0, segments, _summary(segments, place.device))
    finish_imagination(workspace, 1, told)


@dataclass(frozen=True)
class _Memoryless:
    """What acts on states alone, as a player of whole episodes."""

    acts: Actor
    log: Log
    device: str

    def reset(self, mask: Any = None) -> None:
        """Nothing is remembered."""

    def act_flat(self, observation: Floats, reward: Any = None) -> Any:
        action = self.acts.act(torch.from_numpy(observation).to(self.device))
        return self.log.transitions.spec.unscale_action(action.cpu().numpy())


def run_select(
    work: str, place: Place, log: LogRef, values: str, select: SelectConfig, imagine: ImagineConfig, seed: int
) -> list[ShardSpec]:
    """Step 3: return the shards to imagine, the same for the same identity."""
    place.workspace(work)
    v, returns = logged_values(values, log, place.device)
    data = log.load()
    starts = select_starts(data, v, returns, select, length=segment_length(data, imagine), seed=seed)
    return shard_specs(starts.index, starts.control, imagine.shard_size)


@dataclass(frozen=True)
class Gate:
    """What decides whether a segment counts. Nothing of it is written with a shard: another gate may read it."""

    config: AcceptConfig
    threshold: float
    """kappa"""
    value_std: float

    def accept(self, segments: Segments, log: LogRef) -> Accepted:
        """Return the verdict on some segments of the log."""
        return accept(
            segments, self.config, threshold=self.threshold, discount=log.load().discount, value_std=self.value_std,
            ranges=log.load().step_ranges,
        )


def gate_of(
    config: AcceptConfig, log: LogRef, values: str, world_model: str, *, uncertainty: str, regret_share: float,
    length: int, device: str,
) -> Gate:
    """Return the gate of a run. kappa is the user's own, or lets `accept.survival` of the held-out windows of `length`
    steps pass: those that begin in the share of the steps with the most regret, of which starts are drawn too.
    """
    threshold = config.threshold
    if threshold is None:
        v, returns = logged_values(values, log, device)
        data = log.load()
        regret, held = v - returns, data.holdout_steps
        threshold = kappa(
            holdout_uncertainty(world_model, uncertainty), data.transitions.episode[held], length=length,
            survival=config.survival, begins=regret[held] >= np.quantile(regret, 1.0 - regret_share),
        )
    return Gate(config, threshold, float(Artifact(values).diagnostics["v_std"]))


def run_shard(
    work: str,
    place: Place,
    log: LogRef,
    values: str,
    world_model: str,
    planner: PlannerConfig,
    imagine: ImagineConfig,
    seed: int,
    spec: ShardSpec,
    actor: str | None = None,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """Step 4: imagine one shard and write it; return its manifest entry, and with `gate` how many it would accept."""
    workspace = place.workspace(work)
    segments = imagine_shard(
        spec,
        log.load(),
        world_model_of(world_model, place.device),
        values_of(values, place.device),
        planner,
        imagine,
        seed=seed,
        device=place.device,
        actor=actor_of(actor, place.device) if actor else None,
    )
    entry = write_shard(workspace.folder, spec.shard, segments, _summary(segments, place.device))
    return entry if gate is None else {**entry, "accepted": int(gate.accept(segments, log).passed.sum())}


def _summary(segments: Segments, device: str) -> dict[str, Any]:
    """What a shard's manifest entry says of it."""
    return {
        "steps": int(segments.action.shape[0] * segments.length),
        "reward_gain": float((segments.reward.sum(1) - segments.own_reward.sum(1)).mean()),
        "terminated": int(segments.terminal.any(1).sum()),
        "platform": numeric_platform(device),
    }


def finish_imagination(workspace: Workspace, shards: int, told: Mapping[str, float] | None = None) -> None:
    """Describe a folder whose shards are all there. told: more to report of them."""
    entries = read_entries(workspace.folder)
    missing = [i for i in range(shards) if i not in entries]
    if missing:
        raise FileNotFoundError(f"shards {missing} are missing in {workspace.folder}")
    known = [entries[i] for i in range(shards)]
    manifest = {
        "shards": shards,
        "segments": sum(e["segments"] for e in known),
        "steps": sum(e["steps"] for e in known),
        **(told or {}),
    }
    workspace.folder.write_text("manifest.json", "\n".join(str(e["digest"]) for e in known))
    made_on = {"platform": known[0]["platform"]} if "platform" in known[0] else {}
    workspace.describe(manifest_digest([e["digest"] for e in known]), manifest, **made_on)


def read_segments(path: str) -> Segments:
    """All segments of step 4."""
    artifact = Artifact(path)
    artifact.pull_all()
    return concatenate([read_shard(artifact.path, i) for i in range(int(artifact.diagnostics["shards"]))])


@dataclass(frozen=True)
class DistillJob:
    """Step 5, wherever it runs."""

    work: str
    place: Place
    log: LogRef
    values: str
    world_model: str | None
    """None with `imagination`, where nothing imagined is distilled."""
    imagination: str | None
    uncertainty: str
    regret_share: float
    accept: AcceptConfig
    policy: PolicyConfig
    distill: DistillConfig
    seed: int
    of_actor: bool = field(default=False, kw_only=True)
    """What is imitated is what one actor does: each imagined step counts alike, whatever came of it."""
    corrections: tuple[str, ...] = field(default=(), kw_only=True)
    """Artifacts of the walks of policies before this one."""
    begin: str | None = field(default=None, kw_only=True)
    """Artifact of the policy to go on from."""

    def prepare(self) -> Corpus:
        """Return what is distilled, ready for any number of workers. The one part that needs all of the data."""
        log, device = self.log.load(), self.place.device
        values = values_of(self.values, device)
        v, _ = logged_values(self.values, self.log, device)
        segments, verdict, imagined = self.imagined(log)
        segments, accepted, lengths = self._with_corrections(segments, verdict)
        lam, temperature = self.distill.advantage_lambda, self.distill.data_temperature
        of_log = generalised_advantage(log, v, value_at_ends(log, values.v, device), lam)
        plan_weight = np.ones_like(segments.reward)
        if not self.of_actor:
            of_plans = imagined_advantage(segments, lengths, log.discount, lam)
            plan_weight = advantage_weight(of_plans, of_log, temperature)
        material = Material(
            log,
            segments,
            accepted,
            lengths,
            float(verdict.passed.mean()) if len(verdict.passed) else 0.0,
            self._prompts(log, segments, lengths),
            advantage_weight(of_log, of_log, temperature),
            plan_weight,
            critic_spread(values, log.transitions.observation, log.action_unit, device),
        )
        return Corpus.of(material, self.policy, self.distill, {"imagined": imagined, "log": self._about(log)})

    def trainer(self, corpus: Corpus, reducer: Reducer | None = None) -> DistillTrainer:
        """Return the trainer of one worker, ready for its first update."""
        critic, device = values_of(self.values, self.place.device).q, self.place.device
        trainer = DistillTrainer(
            corpus, critic, self.policy, self.distill, seed=self.seed, device=device, reducer=reducer
        )
        if self.begin is not None:
            trainer.begin_from(stripped("policy", Artifact(self.begin).tensors()))
        return trainer

    def train(self, corpus: Corpus, workspace: Workspace, reducer: Reducer | None = None) -> None:
        """Carry out one worker's part; the first one leaves the policy artifact: everything that acting needs."""
        trainer = self.trainer(corpus, reducer)
        for _ in fit_policy(trainer, self.distill, workspace):
            pass
        diagnostics = trainer.diagnose()
        if reducer is not None and reducer.rank > 0:
            return
        tensors, described = self.acting(prefixed("policy", trainer.policy_state()), corpus.notes["log"])
        imagined = {"imagined": corpus.notes["imagined"]}
        workspace.finish(tensors, {**diagnostics, **imagined}, **described, updates=self.distill.updates)

    def imagined(self, log: Log) -> tuple[Segments, Accepted, dict[str, Any]]:
        """Return all imagined segments, which of them count and how far, and what a run reports of that."""
        t = log.transitions
        if self.imagination is None or self.world_model is None:
            return Segments.none(t.observation_dim, t.spec.action_dim), Accepted.nothing(), {}
        segments = read_segments(self.imagination)
        gate = gate_of(
            self.accept, self.log, self.values, self.world_model, uncertainty=self.uncertainty,
            regret_share=self.regret_share, length=segments.length, device=self.place.device,
        )
        verdict = gate.accept(segments, self.log)
        summary = summarise(segments, verdict, log)
        u = holdout_uncertainty(self.world_model, self.uncertainty)
        summary["kappa"], summary["kappa_step_quantile"] = gate.threshold, float((u <= gate.threshold).mean())
        return segments, verdict, summary

    def _with_corrections(self, segments: Segments, verdict: Accepted) -> tuple[Segments, Bools, Ints]:
        """Return planned segments and the walks of policies before this one, which of them count, and how far."""
        walks = [read_segments(path) for path in self.corrections]
        counted = [(verdict.accepted, verdict.length), *(accept_walks(walked, self.accept) for walked in walks)]
        accepted, lengths = (np.concatenate(column) for column in zip(*counted, strict=True))
        return concatenate([segments, *walks]), accepted, lengths

    def accepted_segments(self) -> list[dict[str, Any]]:
        """Return what counts of the imagined segments, cut, rewards raw again: the form that `export_minari` takes."""
        log = self.log.load()
        segments, verdict, _ = self.imagined(log)
        out = []
        for i in np.flatnonzero(verdict.accepted):
            cut = int(verdict.length[i])
            out.append(
                {
                    "observations": segments.observation[i, : cut + 1],
                    "actions": segments.action[i, :cut],
                    "rewards": segments.reward[i, :cut] / np.float32(log.reward_scale),
                    "terminated": bool(segments.terminal[i, :cut].any()),
                }
            )
        return out

    def _prompts(self, log: Log, segments: Segments, lengths: Ints) -> Prompts:
        scheme = self.distill.prompt
        v, returns = logged_values(self.values, self.log, self.place.device)
        if scheme == "outcome":
            return Prompts(returns, imagined_outcome(segments, lengths, log.discount))
        if scheme == "fixed":
            return Prompts(raw_return_to_go(log), raw_outcome(log, segments, lengths))
        if scheme == "none":
            return Prompts(np.zeros(len(log.transitions), np.float32), np.zeros_like(segments.reward))
        return Prompts(v, segments.value[:, :-1])

    def acting(
        self, policy: dict[str, torch.Tensor], about_log: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and description with which a policy of this distillation acts.

        policy: its own tensors, prefixed. about_log: what a corpus notes of the log, which is loaded where not given.
        """
        values = Artifact(self.values)
        return {**policy, **prefixed("values", values.tensors())}, {
            **(about_log or self._about(self.log.load())),
            "prompt": self.distill.prompt,
            "policy": self.policy.model_dump(mode="json"),
            "values": {k: values.described[k] for k in ("values", "observation_dim", "action_dim")},
        }

    def _about(self, log: Log) -> dict[str, Any]:
        """What acting needs to know of the log."""
        target = self.distill.target_return
        if self.distill.prompt == "fixed" and target is None:
            target = float(log.transitions.episode_return.max())
        return {
            "spec": asdict(log.transitions.spec), "reward_scale": log.reward_scale, "discount": log.discount,
            "target_return": target,
        }


def run_distill(work: str, place: Place, job: DistillJob) -> None:
    """Step 5 in one process."""
    workspace = place.workspace(work)
    job.train(job.prepare(), workspace)


def policies_of(artifact: Artifact) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """The policies that a distillation kept along the way, the last one included: updates and tensors of each."""
    tensors = artifact.tensors()
    last = (int(artifact.described["updates"]), tensors)
    return [*((step, {**tensors, **changed}) for step, changed in artifact.snapshots()), last]


def run_choose(work: str, place: Place, inside: Inside, distilled: dict[str, str]) -> None:
    """Step 6: keep one of the policies that distillations left.

    distilled: artifacts by variant. In this order, and of each the latest policy first, they are preferred.
    """
    workspace = place.workspace(work)
    workspace.rewind({})  # it takes a minute or two: what was cut off begins anew
    policies = [
        (variant, artifact, step, tensors)
        for variant, artifact in ((name, Artifact(path)) for name, path in distilled.items())
        for step, tensors in reversed(policies_of(artifact))
    ]
    found: list[dict[str, Any]] = []
    earned: list[Floats] = []
    for i, (variant, artifact, step, tensors) in enumerate(policies):
        acting = Policy(artifact.described, tensors, place.device)
        returns, ended, halted = inside.play(acting, place.device)
        earned.append(returns)
        found.append({
            "variant": variant, "step": step, "return_mean": float(returns.mean()), "ended": ended, "halted": halted,
            "return_sem": float(returns.std() / np.sqrt(len(returns))),
        })
        shown = {name: found[-1][name] for name in ("return_mean", "ended", "halted")}
        workspace.log(i + 1, len(policies), shown)
    variant, artifact, step, tensors = policies[first_as_good(np.stack(earned), inside.config.tolerance)]
    kept = ("spec", "reward_scale", "prompt", "discount", "policy", "values", "target_return")
    workspace.finish(
        tensors, {"candidates": found, "variant": variant, "step": step},
        **{name: artifact.described[name] for name in kept}, updates=step, variant=variant,
    )


def run_fitted_q(
    work: str, place: Place, log: LogRef, values: str, policy: str, config: FittedQConfig, seed: int
) -> None:
    """Step 7 without an environment: the value of the policy on held-out episodes."""
    artifact = Artifact(policy)
    acting = Policy(artifact.described, artifact.tensors(), place.device)
    described = values_of(values, place.device), ValuesConfig.model_validate(Artifact(values).described["values"])
    fit_q(
        log.load(), acting, *described, updates=config.updates, seed=seed, device=place.device,
        workspace=place.workspace(work),
    )


def run_evaluate(
    work: str, place: Place, policy: str, config: EvaluateConfig, spec: Spec, chosen: str | None = None
) -> None:
    """Step 7. Always float32. policy: a distillation, all of whose policies are scored; chosen: the policy that is kept
    where it is not the last one of these. spec: of the log as it is now; its environment and reference scores are no
    part of what the policy learned."""
    workspace = place.workspace(work)
    workspace.rewind({})  # an evaluation that was cut off begins anew
    artifact = Artifact(policy)
    described = artifact.described
    along = policies_of(artifact)
    own = [step for step, _ in along]
    policies = [(described, tensors) for _, tensors in along]
    headline = len(policies) - 1
    if chosen is not None:
        kept = Artifact(chosen)
        if kept.described["variant"] == "ipd":
            headline = own.index(kept.described["updates"])
        else:
            headline = len(policies)
            policies.append((kept.described, kept.tensors()))
    every: list[dict[str, Any]] = []
    begun = 0  # environment steps of the policies before
    for described, tensors in policies:
        acting = Policy(
            {**described, "spec": asdict(spec)}, tensors, place.device, candidates=config.candidates,
            candidate_std=config.candidate_std,
        )  # fmt: skip

        def report(steps: int, share: float, begun: int = begun) -> None:
            done = begun + steps
            workspace.log(done, done, {"episodes_ended": (len(every) + share) / len(policies)})

        scores = evaluate(acting, config, progress=report)
        every.append(scores)
        begun += max(scores["lengths"])
    shown = ("return_mean", "normalised", "returns")
    curve = [{"step": step, **{name: e[name] for name in shown}} for step, e in zip(own, every, strict=False)]
    scores = every[headline]
    scores["curve"] = curve
    scores["best"] = max(curve, key=lambda point: point["return_mean"])
    workspace.finish({"returns": torch.tensor(scores["returns"], dtype=torch.float64)}, scores)
