"""`run`: from a dataset to a policy, from Python. Everything that can be refused is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipd_ray.artifacts import Artifact, Store
from ipd_ray.checks import (
    check_config,
    check_data,
    check_disk,
    check_folder,
    check_identity,
    check_writable,
    memory_remarks,
    ray_engine,
    remarks,
)
from ipd_ray.config import RunConfig, as_yaml, build, flatten
from ipd_ray.data.columns import columns_file, fetch_columns, keep_columns
from ipd_ray.data.export import export_minari
from ipd_ray.data.minari_source import load
from ipd_ray.data.shards import shard_curve
from ipd_ray.data.transitions import Transitions
from ipd_ray.engine import Engine, LocalEngine
from ipd_ray.errors import TaskError, UserError
from ipd_ray.estimate import estimate, total
from ipd_ray.files import write_atomic
from ipd_ray.lease import Lease
from ipd_ray.listeners import Logged, recorders
from ipd_ray.pipeline import STEPS, TO_COME, Context, copy_policy, distill_job, run_until, state_of, summarise
from ipd_ray.progress import NOTE, Listener, Listeners
from ipd_ray.runs import CURVES, IDENTITY, LINKS, SCHEMA, SUMMARY, RunFolder, register
from ipd_ray.steps import DistillJob, LogRef, Place
from ipd_ray.storage import ARTIFACT, Folder, near
from ipd_ray.training import cores


def run(
    dataset: str | Transitions,
    config: RunConfig | None = None,
    *,
    run_dir: str | Path | None = None,
    until: str = "evaluate",
    listeners: Sequence[Listener] = (),
) -> dict[str, Any]:
    """Run the method on a dataset and return what `summary.json` holds.

    dataset: a Minari id, local or remote, or `demo`; or a log that is loaded already.
    config: the full sizes where not given; `load_config("gym-small")` gives those of a preset.
    run_dir: where config, links, learning curves, policy and report go; runs/<dataset>-seed<seed> where not given.
        The artifacts themselves go to `runtime.store`, or to `store` beside the run folder; all runs there share them.
    until: the last step: values, world_model, reach, actor, imagine, distill, choose, fitted_q or evaluate.
    listeners: hear of the run beside its own files, and are closed at its end; see ipd_ray.progress.Listener. Where
        there is none, remarks are warnings of `logging`; `[ipd_ray.listeners.terminal()]` shows what the command does.

    Call it again with the same arguments and it goes on where it stopped: what is finished is reused.

    Raises:
        UserError: a mistake; the message tells how to mend it.
        PartialError: some shards could not be imagined; the rest is kept.
        TaskError: a step failed, and not by a mistake that is known; the message holds its traceback.
    """
    config = config or RunConfig()
    if not isinstance(config, RunConfig):
        raise UserError(f"config={config!r} must be a RunConfig: load_config({config!r}) if that is a preset's name.")
    folder = run_folder(dataset if isinstance(dataset, str) else dataset.spec.dataset, config, run_dir)
    store = store_of(config, folder)
    others = Listeners(listeners or [Logged()])
    try:
        _check_before_loading(config, folder, store, until, others)
        with holding(folder), _tidy(store):
            context = _prepared(dataset, config, folder, store, until, others, cache=(store / "data").path)
            check_disk(context, until)
            work_left = any(row["state"] in TO_COME for row in state_of(context, until))
            engine = make_engine(config, context.device) if work_left else LocalEngine(1)
            try:
                engine.require_storage([str(store), str(folder)])
                return _Begun(folder, replace(context, engine=engine), until).carry_out(others)
            except TaskError as error:
                if error.mistake is None:
                    raise
                raise UserError(error.mistake) from error
            finally:
                engine.close()
    finally:
        others.close()


def plan(
    dataset: str, config: RunConfig | None = None, *, run_dir: str | Path | None = None, until: str = "evaluate",
    workers: int | None = None, work: Callable[[Context], Mapping[str, float] | None] | None = None,
) -> dict[str, Any]:
    """Return what `run` would reuse and do, with estimates of time, memory and disk; does nothing of it.

    workers: of imagination; as many as the local engine would have where not given. work: seconds of each step on the
    machine that will do it; this machine is measured where not given.
    """
    config = config or RunConfig()
    folder = run_folder(dataset, config, run_dir)
    store = store_of(config, folder)
    _check_before_loading(config, folder, store, until, Listeners())
    cache = (store / "data").path if store.exists() else None
    context = _prepared(dataset, config, folder, store, until, Listeners(), cache=cache)
    workers = workers or processes(config, context.device)
    rows = estimate(context, until, workers, work(context) if work else None)
    return {
        "dataset": context.transitions.spec.dataset, "run_dir": str(folder), "store": str(store), "steps": rows,
        "total": total(context, rows, workers),
        "remarks": [
            *_replaced(folder, config), *remarks(config, context.transitions, until),
            *memory_remarks(context, until, workers),
        ],
    }


def _check_before_loading(config: RunConfig, folder: Folder, store: Folder, until: str, listener: Listener) -> None:
    if until not in STEPS:
        raise UserError(f"until={until!r} must be one of {', '.join(STEPS)}.")
    if until in ("reach", "actor") and config.planner.kind != "actor":
        raise UserError(
            f"planner.kind={config.planner.kind} learns no actor: set planner.kind=actor, or go on to the next step, "
            "imagine."
        )
    check_config(config)
    if remote := [str(place) for place in (folder, store) if place.remote]:
        listener.note(f"looks whether {' and '.join(remote)} can be written")
    with _tidy(folder), _tidy(store):
        check_folder(folder)
        check_writable(store)


def _prepared(
    dataset: str | Transitions, config: RunConfig, folder: Folder, store: Folder, until: str, listener: Listener,
    cache: Path | None,
) -> Context:
    transitions = load(dataset, cache=cache) if isinstance(dataset, str) else dataset
    check_data(config, transitions)
    check_identity(folder, transitions)
    return Context(config, transitions, Store(store), LocalEngine(1), listener)


def export(run: RunFolder, dataset_id: str, *, root: Path | None = None, with_log: bool = True) -> tuple[Path, int]:
    """Write a run's log and its accepted segments as a Minari dataset; return its folder and how many segments.

    root: folder of datasets; MINARI_DATASETS_PATH where not given. with_log: False writes the segments alone.
    """
    job = job_of(run)
    if fetch_columns(Folder.of(job.log.path)) is None:
        keep_columns(run.store, load(run.identity["dataset"]))
    segments, transitions = job.accepted_segments(), job.log.load().transitions
    return export_minari(transitions, segments, dataset_id, root=root, with_log=with_log), len(segments)


def job_of(run: RunFolder, *, imagined: bool = True) -> DistillJob:
    """Return a run's distillation, which knows its own verdict on its segments. Writes nothing.

    imagined: False leaves the segments out, which need not be there then.
    """
    config = build(run.config)
    columns = columns_file(run.store, run.identity["content_hash"])
    return distill_job(
        config, config.distill, work="", place=Place("cpu", 1, config.runtime.checkpoint_seconds),
        log=LogRef(str(columns), config.data, config.seed), values=str(run.artifact("values")),
        world_model=str(run.artifact("world_model")) if imagined else None,
        imagination=str(run.artifact("imagine")) if imagined else None,
    )  # fmt: skip


# ---- where


def run_folder(dataset: str, config: RunConfig, run_dir: str | Path | None) -> Folder:
    """Return the run folder: the given path or URI, or one named after dataset and seed."""
    return Folder.of(run_dir or f"runs/{dataset.replace('/', '_')}-seed{config.seed}")


def store_of(config: RunConfig, folder: Folder) -> Folder:
    """Return the folder of the artifacts that runs share."""
    return Folder.of(config.runtime.store) if config.runtime.store else folder.parent / "store"


@contextmanager
def holding(folder: Folder) -> Iterator[None]:
    """Own the run folder. Raises UserError naming who does, where another process works in it."""
    with _tidy(folder):
        lease = Lease(folder)
        owner = lease.acquire()
        if owner is not None:
            raise UserError(
                f"run folder {folder} is in use by process {owner.get('pid')} on host {owner.get('host')}: wait for "
                "it, end it, or give this run a --run-dir of its own (what both need is computed once)."
            )
        try:
            yield
        finally:
            lease.release()


@contextmanager
def _tidy(folder: Folder) -> Iterator[None]:
    """Remove folders that were made on the way to this one and stayed empty."""
    missing = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()


# ---- engines


def make_engine(config: RunConfig, device: str) -> Engine:
    """Return the engine that `runtime` asks for. Raises UserError where it cannot be had."""
    runtime = config.runtime
    if runtime.engine == "ray":
        return ray_engine()(runtime, device)
    return LocalEngine(processes(config, device))


def processes(config: RunConfig, device: str) -> int:
    """Workers of the local engine: one on a GPU, else `runtime.actors` or as many as there are cores."""
    return 1 if device.startswith("cuda") else config.runtime.actors or cores()


# ---- the run folder


@dataclass(frozen=True)
class _Begun:
    """A run whose checks are behind it."""

    folder: Folder
    context: Context
    until: str

    def carry_out(self, others: Listener) -> dict[str, Any]:
        """Do the steps, keep the run folder's files up to date, return the summary."""
        config, transitions, folder = self.context.config, self.context.transitions, self.folder
        folder.pull(["run.log"])  # this run writes on
        folder.path.mkdir(parents=True, exist_ok=True)
        records = recorders(config, folder.path, transitions.spec.dataset)  # may be refused, before anything is removed
        replaced = _replaced(folder, config)
        self._describe()
        if folder.remote:
            records.append(_Sender(folder))
        for row in self._curves():  # what is reused is in the curves as if it had been made now
            for record in records:
                record.progress(row["part"], row["step"], row["total"], _numbers(row))
        heard = Listeners([*records, others])
        context = replace(self.context, listener=heard)
        kept = False

        def keep_policy() -> None:
            nonlocal kept
            copy_policy(context, folder)
            kept = True

        try:
            heard.note(
                f"{transitions.spec.dataset}: {transitions.episodes:,} episodes, {len(transitions):,} steps; seed "
                f"{config.seed}, {config.runtime.engine} engine, {context.device}; run folder {near(folder)}"
            )
            fits = memory_remarks(context, self.until, processes(config, context.device))
            for remark in [*replaced, *remarks(config, transitions, self.until), *fits]:
                heard.note(NOTE + remark)
            try:
                run_until(context, self.until, keep_policy)
            finally:
                self._links()
            summary = self._finish(context)
        except BaseException as error:
            if kept:
                error.__notes__ = [  # as add_note does, from Python 3.11 on
                    f'The policy is there all the same: Policy.load("{near(folder)}"). The same command goes on with '
                    "what is left, its scores; `ipd-ray choose` (until=choose) ends without them."
                ]
            with suppress(OSError):
                records[0].note(f"stopped by {type(error).__name__}: {error}")
            raise
        finally:
            with suppress(OSError):
                Listeners(records).close()
        with suppress(OSError):
            folder.write_text(CURVES, "".join(json.dumps(row) + "\n" for row in self._curves()))
        return summary

    def _finish(self, context: Context) -> dict[str, Any]:
        summary = {**summarise(context), "run_dir": str(self.folder)}
        write_atomic(self.folder.path / SUMMARY, json.dumps(summary, indent=1) + "\n")
        self.folder.push([SUMMARY])
        try:
            from ipd_ray.report import build_report

            build_report([self.folder], self.folder.path / "report.html")
            self.folder.push(["report.html"])
        except Exception as error:  # a report is looked at; the run is what took the time
            context.listener.note(
                f"{NOTE}the report could not be made ({type(error).__name__}: {error}); the run is whole, `ipd-ray "
                f"report {near(self.folder)}` tries again."
            )
        return summary

    def _describe(self) -> None:
        """Write what the run is, before it works."""
        config, transitions, store = self.context.config, self.context.transitions, self.context.store
        folder = self.folder
        write_atomic(folder.path / "config.yaml", as_yaml(config))
        folder.push(["config.yaml"])
        identity = {
            "schema": SCHEMA, "dataset": transitions.spec.dataset, "content_hash": transitions.content_hash,
            "seed": config.seed, "store": str(store.root),
        }
        folder.write_text(IDENTITY, json.dumps(identity, indent=1) + "\n")
        register(store.root, folder)
        folder.remove_file(SUMMARY)  # of another config, or of less; written again at the end
        policy, parts = folder / "policy", self.context.parts
        described = policy.read_text(ARTIFACT)
        if described and json.loads(described).get("key") not in (parts.policy.key, parts.distill["ipd"].key):
            policy.remove()
            folder.remove_file("report.html")
        self._links()

    def _links(self) -> None:
        """Link what is there, and what this run is to make: `store prune` leaves both alone."""
        store, wanted = self.context.store, {p.name for p in self.context.parts.until(self.until)}
        links = {}
        for part in self.context.parts.until("evaluate"):
            if part.name in wanted or store.find(part.step, part.key):
                links[part.name] = {"key": part.key, "path": str(store.folder(part.step, part.key))}
        self.folder.write_text(LINKS, json.dumps(links, indent=1) + "\n")

    def _curves(self) -> Iterator[dict[str, Any]]:
        """All learning curves of what is finished, in the order of the method."""
        for part in self.context.parts.until("evaluate"):
            artifact = self.context.store.find(part.step, part.key)
            if artifact is not None:
                for row in _curve(artifact):
                    yield {"part": part.name, **{name: value for name, value in row.items() if name != "time"}}


def _replaced(folder: Folder, config: RunConfig) -> list[str]:
    """What a run that is finished loses to one of other settings."""
    if not folder.exists(SUMMARY):
        return []
    before, now = RunFolder(folder).config, flatten(config.model_dump(mode="json"))
    changed = [f"{n} {before.get(n)} before, now {now[n]}" for n in now
               if not n.startswith("runtime.") and before.get(n) != now[n]]  # fmt: skip
    if not changed:
        return []
    more = f" and {len(changed) - 2} more" * (len(changed) > 2)
    return [f"{near(folder)} holds a finished run of other settings ({'; '.join(changed[:2])}{more}): its summary and "
            "policy are replaced; another --run-dir keeps both."]  # fmt: skip


def _curve(artifact: Artifact) -> list[dict[str, Any]]:
    return shard_curve(artifact.folder) if artifact.diagnostics.get("shards") else artifact.curve()


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("part", "step", "total")}


class _Sender:
    """Sends log and curves of a run to its object store whenever a step is over, and at the end."""

    def __init__(self, folder: Folder):
        self._folder = folder

    def note(self, text: str) -> None:
        return

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        return

    def end(self, step: str, seconds: float, reused: bool) -> None:
        self._folder.push(["run.log", CURVES])

    def close(self) -> None:
        self._folder.push(["run.log", CURVES])
