"""Sweeps on Ray Tune. Tune hands trials out, stops and restarts them; the question, the points, the ledger and the
answer are `ipd_ray.sweep`'s. Every trial is a run like any other, and all share what they have in common by key.

What blocks, and why nothing does. What many trials need (values, world model, imagination) is made before the first one
starts, by actors on the whole cluster. A trial with one worker holds the CPUs of its own process, in which it does
everything; should it wait for a key that another is making, that one has its CPUs already. A trial with N workers holds
0.01 CPU and asks for N workers or for one actor at a time: `check_room` refuses more trials at a time than have room
for all of theirs together. Where an autoscaler may make room, more are asked for, and wait: that is its demand.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from ipd_ray import api
from ipd_ray.artifacts import SNAPSHOT, load_tensors
from ipd_ray.checks import check_config, check_data, check_folder
from ipd_ray.config import RunConfig, as_yaml, build, flatten, label_selector
from ipd_ray.data.columns import columns_file, fetch_columns, keep_columns
from ipd_ray.data.minari_source import load
from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.distributed import cluster
from ipd_ray.distributed.engine import asked_for
from ipd_ray.distributed.nodes import require_storage
from ipd_ray.errors import UserError
from ipd_ray.evaluate.acting import Policy
from ipd_ray.evaluate.episodes import NoEnvironment, arena_of, evaluate
from ipd_ray.files import write_atomic
from ipd_ray.lease import Lease
from ipd_ray.pipeline import Parts, corrections, draft_name, inside_of
from ipd_ray.progress import NOTE, Listener
from ipd_ray.runs import SUMMARY, RunFolder
from ipd_ray.storage import Folder
from ipd_ray.sweep import (
    BEST,
    FRESH_SEEDS,
    RUNS,
    Point,
    Question,
    Row,
    Sweep,
    check_comparable,
    check_points,
    known_points,
    measures,
    points_at_most,
    rank_agreement,
    ranked,
    reuse,
    rows_of,
    sampler_of,
    trial_name,
)
from ipd_ray.training import device_here, resolve_device

TUNE = "ray"
"""Where in the sweep's folder Tune keeps its state while it runs; nothing is read from it later."""
DEATHS = 2
"""Times that a trial whose process died is started again."""
LEAST_CPU = 0.01
"""What a trial holds whose work is done by workers; Tune takes no zero."""


def sweep(
    question: Question,
    dataset: str,
    common: Mapping[str, Any],
    *,
    sweep_dir: str | Path,
    listener: Callable[[], Listener],
) -> dict[str, Any]:
    """Run a sweep to its end; return what its summary.json holds, `failed` trials among it: they stop no other.

    Called again it goes on where it stopped, and tries failed trials again.

    common: {dotted name: value} of what all trials share. listener: makes one that hears of the sweep. Raises UserError
    for a mistake, before any work.
    """
    folder = Sweep.of(sweep_dir)
    common = _runtime(common, folder)
    base = build(common)
    store = api.store_of(base, Folder.of(folder.folder))
    points = check_points(question, common)
    for config in points:
        check_config(config)
    for name in {config.evaluate.environment for config in points} - {None}:
        _check_registered(str(name))
    with api.holding(Folder.of(folder.folder)):
        _check_folder(folder)
        transitions = load(dataset, cache=(store / "data").path)
        check_data(base, transitions)
        question = _decided(question, base, transitions)
        if "fitted_q" in (question.objective, *question.also) and not base.fitted_q.updates:
            common["fitted_q.updates"] = base.values.updates
        described = _described(folder, question, dataset, transitions, common)
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths of the user's are relative to where they are
        ours = cluster.connect(base.runtime.address, dashboard=base.runtime.workers > 1)
        try:
            there, device = cluster.inspect(), resolve_device(base.runtime.device)
            cluster.check(base.runtime, device, there)
            room = check_room(question, build(common), device, there)
            require_storage(
                [str(store), str(folder.folder)], "give --sweep-dir a mount that every node has, and "
                "runtime.store such a mount or a URI such as s3://bucket/store with credentials on every node"
            )
            if not folder.records():
                shutil.rmtree(folder.folder / RUNS, ignore_errors=True)  # of a beginning that asked something else
            folder.describe(described)
            keep_columns(store, transitions)  # what trials read
            work = _Work(folder, question, dataset, transitions, common, room, listener)
            work.make_shared()
            work.try_points()
            work.try_finalists()
        finally:
            shutil.rmtree(folder.folder / TUNE, ignore_errors=True)
            if ours:
                cluster.disconnect()
        return work.answer()


# ---- before any work


def _runtime(common: Mapping[str, Any], folder: Sweep) -> dict[str, Any]:
    """The settings, with the store named as trials and best.yaml find it from anywhere, and the engine they imply."""
    store = Folder.of(common.get("runtime.store") or folder.folder.parent / "store")
    more: dict[str, Any] = {"runtime.store": str(store)}
    if common.get("runtime.address") or common.get("runtime.workers", 1) != 1:
        more["runtime.engine"] = "ray"
    return {**common, **more}


def _check_registered(environment: str) -> None:
    """Raise UserError for an id that this script or notebook has registered: trials look it up in their own process."""
    if ":" in environment:
        return
    command = [sys.executable, "-c", "import gymnasium, sys; gymnasium.spec(sys.argv[1])", environment]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise UserError(
            f"evaluate.environment={environment} is registered in this script or notebook, which trials have no part "
            f"in: set evaluate.environment=package:{environment}, where importing the package registers it."
        )


def _check_folder(folder: Sweep) -> None:
    """Raise UserError where the folder holds something else."""
    if folder.exists:
        return
    if RunFolder(folder.folder).exists:
        raise UserError(f"{folder.folder} is the folder of a run, not of a sweep: give another --sweep-dir.")
    check_folder(Folder.of(folder.folder))


def _decided(question: Question, base: RunConfig, transitions: Transitions) -> Question:
    """The question with its objective. Raises UserError for one that cannot be had, or compares no trials."""
    try:
        arena_of(transitions, base.evaluate)
        missing = None
    except NoEnvironment as error:
        missing = str(error)
    objective = question.objective
    if objective == "auto":
        objective = "fitted_q" if missing else "return"
    wanted = {objective, *question.also}
    if "return" in wanted and missing:
        raise UserError(f"objective: return needs an environment: {missing}. Or set objective: fitted_q, a proxy.")
    if "imagined" in wanted and base.choose.episodes == 0:
        raise UserError("objective: imagined is the return that step `choose` measures: set choose.episodes above 0.")
    if question.scheduler == "asha":
        fixed = [n for n in ("distill.updates", "distill.snapshots") if n in question.space]
        if fixed:
            raise UserError(f"scheduler: asha compares trials at equal updates: take {fixed[0]} out of space.")
        if base.runtime.workers > 1:
            raise UserError(
                "scheduler: asha ends trials in the middle, which leaves the room of all "
                f"runtime.workers={base.runtime.workers} taken: set runtime.workers=1 (trials run side by side), "
                "or scheduler: none."
            )
        if base.distill.snapshots < 2:
            raise UserError("scheduler: asha compares the policies kept along the way: set distill.snapshots to 4.")
        if missing and base.choose.episodes == 0:
            raise UserError(
                "scheduler: asha compares policies inside the world model where there is no environment: set "
                "choose.episodes above 0, so that every trial has one."
            )
    also = tuple(m for m in question.also if m != objective)
    question = question.model_copy(update={"objective": objective, "also": also})
    check_comparable(question, scheduled=question.scheduler == "asha" and missing is not None)
    return question


def _described(
    folder: Sweep, question: Question, dataset: str, transitions: Transitions, common: Mapping[str, Any]
) -> dict[str, Any]:
    """What the sweep is. Raises UserError where the folder holds trials of another."""
    settings = {k: v for k, v in flatten(build(common).model_dump(mode="json")).items() if not k.startswith("runtime.")}
    content: dict[str, Any] = {
        "question": question.model_dump(mode="json"), "dataset": dataset, "content_hash": transitions.content_hash,
        "settings": settings,
    }
    if folder.exists and folder.records():
        before = folder.described
        free = ("concurrency", "finalists", "points")  # change no trial
        old, new = (
            {**{k: v for k, v in c["question"].items() if k not in free}, **c["settings"], "dataset": c["dataset"],
             "the dataset's content": c["content_hash"]}
            for c in (before, content)
        )
        if differ := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            raise UserError(
                f"{folder.folder} is another sweep: {', '.join(differ)} differ{'s' * (len(differ) == 1)}: ask as it "
                "did, or give another --sweep-dir (what both need is computed once)."
            )
    return content


@dataclass(frozen=True)
class Room:
    """What a trial takes, and how many run at a time."""

    at_once: int
    threads: int
    """CPU threads of a distillation worker."""
    cpu: float
    gpu: float
    """What the trial itself holds."""
    labels: Mapping[str, str]
    """Of the nodes where trials run: those of distillation, which a lost node sets back by most."""

    def request(self) -> tune.PlacementGroupFactory:
        """What Tune asks Ray for, for one trial."""
        return tune.PlacementGroupFactory(
            [{"CPU": self.cpu, "GPU": self.gpu}], bundle_label_selector=[dict(self.labels)]
        )


def check_room(question: Question, base: RunConfig, device: str, there: cluster.Cluster) -> Room:
    """Return how many trials run at a time. Raises UserError where they have no room: they would wait for ever."""
    runtime, cuda = base.runtime, device.startswith("cuda")
    labels = label_selector(runtime.worker_labels)
    there = there.where(labels)
    gpus = runtime.gpus_per_actor if cuda and runtime.workers == 1 else float(cuda)
    wanted = question.concurrency
    threads = runtime.train_threads or there.threads((wanted or there.slots(1, gpus)) * runtime.workers, gpus)
    threads = max(threads, runtime.threads)
    slots = there.slots(threads, gpus)
    fit = slots // runtime.workers
    each = f"{runtime.workers} worker{'s' * (runtime.workers > 1)} of {threads} CPU{'s' * (threads > 1)}"
    each += f" and {gpus:g} GPU" * cuda
    labelled = f" with runtime.worker_labels={runtime.worker_labels}" * bool(labels)
    if not there.autoscaled and (wanted or 1) > fit:
        raise UserError(
            f"concurrency={wanted or 1} must be at most {fit}: a trial takes {each}, the cluster has {there}"
            f"{labelled}: lower concurrency, runtime.workers or runtime.train_threads, or add nodes."
        )
    alone, at_once = runtime.workers == 1, asked_for(slots, there.autoscaled) // runtime.workers
    cpu, gpu = (float(threads), gpus) if alone else (LEAST_CPU, 0.0)
    return Room(wanted or max(1, at_once), threads, cpu, gpu, labels)


# ---- the work


class _Work:
    """A sweep in progress: what the driver does."""

    def __init__(
        self, folder: Sweep, question: Question, dataset: str, transitions: Transitions, common: Mapping[str, Any],
        room: Room, listener: Callable[[], Listener],
    ):
        self._folder, self._question, self._dataset, self._transitions = folder, question, dataset, transitions
        self._common, self._room, self._listener = common, room, listener
        self._said = listener()
        self._began = time.monotonic()
        self.shared: list[dict[str, Any]] = []

    def config(self, point: Point, seed: int, fresh: bool = False) -> RunConfig:
        """The config of a trial as a user would run it."""
        base = build(self._common, point)
        more = {"seed": base.seed + seed, "runtime.train_threads": self._room.threads}
        if fresh:
            more["evaluate.seed"] = base.evaluate.seed + FRESH_SEEDS
        return build(self._common, point, more)

    def make_shared(self) -> None:
        """Have in the store what trials are known to need, up to imagination. What fails here is left to these trials,
        which fail by themselves, or do not; so is a point that does not go with the log. Other mistakes are of all,
        such as a full disk: they raise UserError."""
        fronts: dict[tuple[str, ...], tuple[RunConfig, str]] = {}
        for config, until in self._fronts():
            parts = Parts(config, self._transitions.content_hash, self._transitions.spec)
            keys = tuple(part.key for part in parts.until(until))
            fronts.setdefault(keys, (config, until))
        made: set[str] = set()
        for number, (keys, (config, until)) in enumerate(sorted(fronts.items(), key=lambda item: -len(item[0]))):
            if made.issuperset(keys):
                continue
            try:
                check_data(config, self._transitions)
            except UserError:
                continue
            made |= set(keys)
            heard = _Heard()
            runtime = config.runtime.model_copy(update={"engine": "ray", "address": None})
            run_dir = self._folder.run_dir(f"shared-{number}")
            _wait_for_the_dead(run_dir)
            try:
                api.run(
                    self._transitions, config.model_copy(update={"runtime": runtime}), run_dir=run_dir, until=until,
                    listeners=[self._listener(), heard],
                )
                self.shared += heard.parts(RunFolder(run_dir))
            except UserError:
                raise
            except Exception as error:
                self._said.note(f"{NOTE}what trials share could not be made, they try by themselves: {error}")

    def _fronts(self) -> list[tuple[RunConfig, str]]:
        """Configs and the last step up to which they are made beforehand."""
        question = self._question
        seeds = range(question.seeds)
        known = known_points(question)
        if known is not None:
            configs = [self.config(point, seed) for point in known for seed in seeds]
            return [(config, _last_shared(config, self._transitions)) for config in configs]
        swept = {name.partition(".")[0] for name in question.space}
        until = None
        for step, sections in (
            ("values", {"data", "values"}), ("world_model", {"world_model"}),
            ("imagine", {"select", "planner", "actor", "imagine"}),
        ):
            if swept & sections:
                break
            until = step
        base = build(self._common)
        return [(self.config({}, seed), min(until, _last_shared(base, self._transitions), key=_ORDER.index))
                for seed in seeds] if until else []

    def try_points(self) -> None:
        """Run the trials that the ledger does not know as ended."""
        question, before = self._question, [r for r in self._folder.records() if not r.get("fresh")]
        ledger = _Ledger(self._folder, question, before, self._spec, self._said.note)
        scheduler = None
        if question.scheduler == "asha":
            distill = build(self._common).distill
            scheduler = AsyncHyperBandScheduler(
                time_attr="step", metric="score", mode="max", max_t=distill.updates,
                grace_period=max(1, distill.updates // distill.snapshots), reduction_factor=2,
            )
        self._fit(ledger, scheduler, points_at_most(question) * question.seeds)

    def try_finalists(self) -> None:
        """Evaluate the best points again, on environment seeds that none has seen."""
        question = self._question
        if question.objective != "return" or not question.finalists:
            return
        records = self._folder.records()
        best = ranked([replace(row, fresh=None) for row in rows_of(records, question.seeds)])[: question.finalists]
        known = {r["trial"] for r in records if r["state"] == "done"}
        wanted = [
            _record(row.point, row.settings, seed, fresh=True) for row in best for seed in range(question.seeds)
            if trial_name(row.point, seed, fresh=True) not in known
        ]
        ledger = _Ledger(self._folder, question, wanted, self._spec, self._said.note, only=True)
        self._fit(ledger, None, len(wanted))

    def answer(self) -> dict[str, Any]:
        """Write summary, best config and report; return the summary."""
        records, question = self._folder.records(), self._question
        rows = rows_of(records, question.seeds)
        order = ranked(rows)
        failed = {r["trial"]: r["traceback"].strip().splitlines()[-1] for r in records if r["state"] == "failed"}
        summary: dict[str, Any] = {
            "sweep_dir": str(self._folder.folder), "dataset": self._dataset,
            "objective": question.objective, "seeds": question.seeds, "points": [_plain(row) for row in rows],
            "ranking": [row.point for row in order], "best": None, "agreement": rank_agreement(rows),
            "reuse": reuse([r for r in records if not r["fresh"]]), "shared": self.shared,
            "failed": failed,
            "seconds": round(time.monotonic() - self._began, 1),
        }
        if order:
            summary["best"] = _plain(order[0])
            head = f"# Point {order[0].point} of the sweep in {self._folder.folder.name}/, its first seed.\n"
            write_atomic(self._folder.folder / BEST, head + as_yaml(self.config(order[0].settings, 0)))
        write_atomic(self._folder.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        from ipd_ray.report import build_sweep_report

        build_sweep_report(self._folder.folder, self._folder.folder / "report.html")
        self._said.close()
        return summary

    def _spec(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial's process is told."""
        config = self.config(record["settings"], record["seed"], record["fresh"])
        alone = config.runtime.workers == 1
        runtime = config.runtime.model_copy(update={
            "engine": "local" if alone else "ray", "address": None, "actors": config.runtime.workers,
            "device": resolve_device(config.runtime.device),  # here: a trial sees its node's GPUs, taken or not
            "wandb_group": config.runtime.wandb_group or self._folder.folder.name,
        })
        plain = config.model_copy(update={"runtime": runtime}).model_dump(mode="json")
        rungs = self._question.scheduler == "asha" and not record["fresh"]
        return {
            "dataset": self._dataset, "config": json.dumps(flatten(plain)),
            "run_dir": str(self._folder.run_dir(record["trial"])), "objective": self._question.objective,
            "also": list(self._question.also), "rungs": rungs, "content_hash": self._transitions.content_hash,
            "log": self._transitions.spec.to_json(),
            "repeat": json.dumps(record["rungs"]) if record["state"] in _ENDED else "",
        }

    def _fit(self, ledger: _Ledger, scheduler: Any, trials: int) -> None:
        if not ledger.open:
            return
        # Our ledger is the record; a failed trial has no score; Ctrl-C ends the sweep, not just one trial; Tune's newer
        # output ignores verbose=0.
        os.environ.update(
            TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
            TUNE_DISABLE_SIGINT_HANDLER="1", RAY_AIR_NEW_OUTPUT="0",
        )
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # misses Tune's own files
        tuner = tune.Tuner(
            tune.with_resources(run_trial, self._room.request()),
            tune_config=tune.TuneConfig(
                search_alg=ledger, scheduler=scheduler, num_samples=trials,
                max_concurrent_trials=self._room.at_once, trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{os.getpid()}", storage_path=str(self._folder.folder / TUNE), verbose=0,
                failure_config=tune.FailureConfig(max_failures=DEATHS),
            ),
        )
        tuner.fit()


_ENDED = ("done", "stopped")
_ORDER = ("values", "world_model", "imagine")


def _last_shared(config: RunConfig, transitions: Transitions) -> str:
    """The last step before distillation that a run needs."""
    steps = {part.step for part in Parts(config, transitions.content_hash, transitions.spec).until("evaluate")}
    return next(step for step in reversed(_ORDER) if step in steps)


def _record(point: int, settings: Point, seed: int, fresh: bool = False) -> dict[str, Any]:
    return {
        "trial": trial_name(point, seed, fresh), "point": point, "settings": settings, "seed": seed, "fresh": fresh,
        "state": "running", "rungs": [], "score": None,
    }


def _plain(row: Row) -> dict[str, Any]:
    """A row for JSON, which knows neither NaN nor tuples."""
    out = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(row).items()}
    return {**out, "scores": list(row.scores), "fresh": _plain(row.fresh) if row.fresh else None}


class _Ledger(Searcher):
    """Hands trials to Tune and writes down what becomes of them; the only one that writes."""

    def __init__(
        self, folder: Sweep, question: Question, before: Sequence[dict[str, Any]],
        spec: Callable[[Mapping[str, Any]], dict[str, Any]], say: Callable[[str], None], *, only: bool = False,
    ):
        """before: trials that were begun. Those that ended are history, the others go on; a scheduler hears of the
        history again, from trials that only repeat what they once said. only: no others."""
        super().__init__()
        self._folder, self._question, self._spec, self._say = folder, question, spec, say
        self._running: dict[str, tuple[dict[str, Any], bool]] = {}
        self._points: dict[int, list[dict[str, Any]]] = {}
        for record in before:
            self._points.setdefault(record["point"], []).append(record)
            if record["state"] not in _ENDED:
                record.update(state="running", rungs=[], score=None, traceback=None)
        if not only:
            for point, records in self._points.items():
                missing = set(range(question.seeds)) - {r["seed"] for r in records}
                records += [_record(point, records[0]["settings"], seed) for seed in sorted(missing)]
        replayed = question.scheduler == "asha" and not only
        every = (r for _, records in sorted(self._points.items()) for r in records)
        self._waiting = deque(r for r in every if replayed or r["state"] not in _ENDED)
        self._left = 0 if only else points_at_most(question) - len(self._points)
        self._sampler = sampler_of(question, len(self._points))
        for point in self._points:
            self._tell(point)

    @property
    def open(self) -> bool:
        """Whether there is anything to do."""
        return self._left > 0 or any(r["state"] not in _ENDED for r in self._waiting)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # the sampler knows what is maximised

    def suggest(self, trial_id: str) -> Any:
        if not self._waiting and self._left > 0 and (settings := self._sampler.ask()) is not None:
            self._left -= 1
            point = len(self._points)
            self._points[point] = [_record(point, settings, seed) for seed in range(self._question.seeds)]
            self._waiting.extend(self._points[point])
        if not self._waiting:
            return Searcher.FINISHED
        record = self._waiting.popleft()
        repeats = record["state"] in _ENDED
        self._running[trial_id] = record, repeats
        if not repeats:
            self._folder.write(record)
        return self._spec(record)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        record, repeats = self._running[trial_id]
        if not repeats:
            self._hear(record, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        record, repeats = self._running.pop(trial_id)
        if repeats:
            return
        if result and not error:
            self._hear(record, result)
        if record["state"] == "running":
            record["state"] = "failed" if error else "stopped"
            if error:
                record["traceback"] = f"its process died {DEATHS + 1} times, or could not be started"
            self._folder.write(record)
        self._tell(record["point"])
        score = "" if record["score"] is None else f", {self._question.objective} {record['score']:,.4g}"
        where = ", ".join(f"{name}={value}" for name, value in record["settings"].items())
        self._say(f"trial {record['trial']} ({where}): {record['state']}{score}")

    def _hear(self, record: dict[str, Any], result: Mapping[str, Any]) -> None:
        """Write down what a trial reports: its end, or a policy on the way."""
        if "record" in result:
            record.update(json.loads(result["record"]))
        elif "score" in result and (rung := [result["step"], result["score"]]) not in record["rungs"]:
            record["rungs"].append(rung)
        self._folder.write(record)

    def _tell(self, point: int) -> None:
        """Tell the sampler of a point whose trials have all ended."""
        records = self._points[point]
        if any(r["state"] == "running" for r in records):
            return
        stopped = min((r["rungs"][-1] for r in records if r["state"] == "stopped"), default=None)
        if stopped is not None:
            self._sampler.tell(records[0]["settings"], stopped[1], stopped[0])
            return
        scores = [r["score"] for r in records if r["score"] is not None]
        self._sampler.tell(records[0]["settings"], statistics.fmean(scores) if scores else None)

    def save(self, checkpoint_path: str) -> None:
        """Tune's own checkpoint of a sweep: ours is the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its ledger")


# ---- a trial, in a process of its own


def run_trial(spec: dict[str, Any]) -> None:
    """One run, told to Tune: policies on the way where a scheduler compares them, and what it came to."""
    for step, score in json.loads(spec["repeat"] or "[]"):
        tune.report({"step": step, "score": score})
    if spec["repeat"]:
        return
    config, run = build(json.loads(spec["config"])), RunFolder(Path(spec["run_dir"]))
    heard = _Rungs(config, run) if spec["rungs"] else _Heard()
    _wait_for_the_dead(run.path)
    try:
        store = api.store_of(config, Folder.of(run.path))
        kept = fetch_columns(columns_file(store, spec["content_hash"]))
        log = kept.with_spec(Spec.from_json(spec["log"])) if kept else spec["dataset"]
        summary = api.run(log, config, run_dir=run.path, listeners=[heard])
        found = measures(run)
        score, sem = found[spec["objective"]]
        imagined = summary.get("imagined", {})
        record = {
            "state": "done", "score": score, "sem": sem, "also": {m: found[m][0] for m in spec["also"] if m in found},
            "accepted": imagined.get("accept_rate"), "kappa": imagined.get("kappa"), "parts": heard.parts(run),
        }
    except Exception:
        record = {"state": "failed", "traceback": traceback.format_exc()}
    tune.report({"step": config.distill.updates, "record": json.dumps(record)})


def _wait_for_the_dead(folder: Path) -> None:
    """Wait until the process before this one, lost with its machine, owns the run folder no more."""
    end = time.monotonic() + Lease.EXPIRES + Lease.RENEW
    while (lease := Lease(folder)).acquire() is not None and time.monotonic() < end:
        time.sleep(1.0)
    lease.release()


class _Heard:
    """A listener that keeps which parts were made and which were there."""

    def __init__(self) -> None:
        self._ended: dict[str, tuple[float, bool]] = {}

    def note(self, text: str) -> None:
        return

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        return

    def end(self, step: str, seconds: float, reused: bool) -> None:
        self._ended[step] = seconds, reused

    def close(self) -> None:
        return

    def parts(self, run: RunFolder) -> list[dict[str, Any]]:
        """Name, key, seconds of the making, and whether it was there, of every part of the run."""
        return [
            {"name": name, "key": run.links[name]["key"], "seconds": seconds, "reused": reused}
            for name, (seconds, reused) in self._ended.items()
        ]


class _Rungs(_Heard):
    """Scores the policies that distillation leaves on the way, and reports them: there the scheduler may end the trial.

    In the environment; where there is none, inside the world model. The training goes on meanwhile. Of a policy that is
    corrected its first draft is compared, which most of the updates go into.
    """

    def __init__(self, config: RunConfig, run: RunFolder):
        super().__init__()
        self._config, self._run = config, run
        self._compared = draft_name(1) if corrections(config) else "distill"
        self._seen: set[str] = set()

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        if step != self._compared:
            return
        folder = Folder.of(self._run.links[step]["path"])
        names = {name for name in folder.sizes() if name.startswith(SNAPSHOT)} - self._seen
        folder.pull(sorted(names))
        for name in sorted(names):
            self._seen.add(name)
            tensors, meta = load_tensors(folder.path / name)
            tune.report({"step": int(meta["step"]), "score": self._score(tensors)})

    def _score(self, tensors: dict[str, Any]) -> float:
        config, job = self._config, api.job_of(self._run, imagined=False)
        acting, described = job.acting(tensors)
        device, shown = device_here(resolve_device(config.runtime.device)), config.evaluate
        ranked: dict[str, Any] = {"candidates": shown.candidates, "candidate_std": shown.candidate_std}
        try:
            arena = arena_of(job.log.load().transitions, shown)
            policy = Policy({**described, "spec": asdict(arena.spec)}, acting, device, **ranked)
            return float(evaluate(policy, arena.config)["return_mean"])
        except NoEnvironment:
            policy = Policy(described, acting, device, **ranked)
            inside = inside_of(config, config.choose, job.log, str(self._run.artifact("world_model")))
            return float(inside.play(policy, device)[0].mean())
