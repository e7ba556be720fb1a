"""`run`: from a dataset to a policy, from Python. Everything that can be refused is refused before any work."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium.spaces.utils import flatdim

from ipd_ray.artifacts import Artifact, Lease, Store, write_atomic
from ipd_ray.config import RunConfig, as_yaml
from ipd_ray.data.minari_source import load
from ipd_ray.data.shards import read_entry
from ipd_ray.data.transitions import Spec, Transitions, prepare
from ipd_ray.engine import Engine, LocalEngine
from ipd_ray.errors import UserError
from ipd_ray.estimate import estimate_disk
from ipd_ray.evaluate.episodes import NoEnvironment, environment_maker
from ipd_ray.listeners import recorders
from ipd_ray.pipeline import STEPS, Context, copy_policy, run_until, state_of, summarise
from ipd_ray.progress import Listener, Listeners
from ipd_ray.runs import CURVES, IDENTITY, LINKS, SCHEMA, SUMMARY, RunFolder, human_bytes, user_file
from ipd_ray.training import resolve_device
from ipd_ray.world_model.termination import resolve

NO_SPEC = Spec("", {}, [], [], [], "")
"""For looking up an environment by name, before any log is read."""


def run(
    dataset: str,
    config: RunConfig | None = None,
    *,
    run_dir: str | Path | None = None,
    until: str = "evaluate",
    listeners: Sequence[Listener] = (),
) -> dict[str, Any]:
    """Run the method on a dataset and return what `summary.json` holds.

    dataset: a Minari id, local or remote, or `demo`.
    run_dir: where config, links, learning curves, policy and report go; runs/<dataset>-seed<seed> where not given. The
        artifacts themselves go to `runtime.store`, or to `store` beside the run folder, and are shared by all runs there.
    until: the last step: values, world_model, imagine, distill or evaluate.
    listeners: hear of the run beside its own files; see ipd_ray.progress.Listener.

    Call it again with the same arguments and it goes on where it stopped: what is finished is reused.

    Raises:
        UserError: a mistake that the message tells how to mend.
        PartialError: some shards could not be imagined; the rest is kept.
    """
    config = config or RunConfig()
    if until not in STEPS:
        raise UserError(f"until={until!r} must be one of {', '.join(STEPS)}.")
    folder = run_folder(dataset, config, run_dir)
    check_config(config)
    check_folder(folder)
    with holding(folder):
        store = store_of(config, folder)
        transitions = load(dataset, cache=store / "cache")
        check_data(config, transitions)
        check_identity(folder, transitions)
        context = Context(config, transitions, Store(store), LocalEngine(1), Listeners(listeners))
        check_disk(context, until)
        begun = Begun(folder, context, until)
        engine = make_engine(config, begun.context.device) if begun.work_left else LocalEngine(1)
        try:
            return begun.carry_out(engine, listeners)
        finally:
            engine.close()


# ---- where


def run_folder(dataset: str, config: RunConfig, run_dir: str | Path | None) -> Path:
    """Return the absolute run folder: the given one, or one named after dataset and seed."""
    return Path(run_dir or Path("runs") / f"{dataset.replace('/', '_')}-seed{config.seed}").absolute()


def store_of(config: RunConfig, folder: Path) -> Path:
    """Return the absolute folder of the artifacts that runs share."""
    return Path(config.runtime.store).absolute() if config.runtime.store else folder.parent / "store"


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Own the run folder. Raises UserError naming who does, where another process works in it."""
    fresh = not folder.exists()
    lease = Lease(folder)
    owner = lease.acquire()
    if owner is not None:
        raise UserError(
            f"run folder {folder} is in use by process {owner.get('pid')} on host {owner.get('host')}: wait for it, end "
            "it, or give this run a --run-dir of its own (what both need is computed once)."
        )
    try:
        yield
    finally:
        lease.release()
        if fresh:
            with suppress(OSError):
                folder.rmdir()  # only where nothing was written


# ---- checks, before any work


def check_config(config: RunConfig) -> None:
    """Raise UserError for what no dataset could mend: values that contradict each other, things that cannot be had."""
    policy, distill, runtime = config.policy, config.distill, config.runtime
    if policy.context > policy.max_timestep:
        raise UserError(
            f"policy.context={policy.context} must be at most policy.max_timestep={policy.max_timestep}: lower "
            "policy.context or raise policy.max_timestep."
        )
    if distill.target_return is not None and distill.prompt != "fixed":
        raise UserError(
            f"distill.target_return={distill.target_return:g} is asked for by prompt=fixed only, but distill.prompt="
            f"{distill.prompt}: set distill.prompt=fixed, or leave distill.target_return out."
        )
    if runtime.address and runtime.engine == "local":
        raise UserError(
            f"runtime.address={runtime.address!r} names a Ray cluster, but runtime.engine=local: set runtime.engine=ray, "
            "or leave runtime.address out."
        )
    check_device(runtime.device)
    resolve(config.world_model.termination)
    if config.evaluate.environment:
        environment_maker(NO_SPEC, config.evaluate.environment)
    if runtime.engine == "ray":
        _ray_engine()


def check_device(name: str) -> None:
    """Raise UserError for a torch device that is not there."""
    import torch

    if name == "auto":
        return
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"runtime.device={name!r} cannot be used ({reason}): set runtime.device=auto or cpu.") from None


def check_folder(folder: Path) -> None:
    """Raise UserError where the run folder cannot be written, or holds something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run folder {folder} is a file: give another --run-dir.")
    run = RunFolder(folder)
    if run.exists:
        _ = run.identity  # refuses an unknown schema
    elif folder.exists() and any(p.name != "lease.json" and not p.name.startswith(".lease") for p in folder.iterdir()):
        raise UserError(
            f"run folder {folder} holds other things and no {IDENTITY}: give a --run-dir that is empty, new, or a run's."
        )
    probe = folder / f".write-{os.getpid()}"
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"run folder: {explain_os_error(error) or error}") from error
    finally:
        if fresh:
            with suppress(OSError):
                folder.rmdir()


def check_identity(folder: Path, transitions: Transitions) -> None:
    """Raise UserError for a run folder of another dataset."""
    run = RunFolder(folder)
    if not run.exists:
        return
    before, name = run.identity, transitions.spec.dataset
    if before["dataset"] != name:
        raise UserError(
            f"run folder {folder} is of dataset {before['dataset']}, not of {name}: give another --run-dir, or remove it "
            f"with `ipd-ray runs rm {folder}`."
        )
    if before["content_hash"] != transitions.content_hash:
        raise UserError(
            f"run folder {folder} is of another content of {name}: the dataset has changed since. Give another --run-dir, "
            f"or remove it with `ipd-ray runs rm {folder}`."
        )


def check_data(config: RunConfig, transitions: Transitions) -> None:
    """Raise UserError where the dataset and the config do not go together."""
    prepare(transitions, config.data, config.seed)
    if config.evaluate.environment:
        check_environment(config.evaluate.environment, transitions)


def check_environment(name: str, transitions: Transitions) -> None:
    """Raise UserError where the environment that the user named cannot be made, or is not the one of the log."""
    try:
        env = environment_maker(transitions.spec, name)()
    except Exception as error:  # whatever a third party's environment raises
        raise UserError(
            f"evaluate.environment={name} cannot be made ({type(error).__name__}: {error}): install what it needs, or name "
            "another."
        ) from error
    action, observation = env.action_space, env.observation_space
    env.close()
    wanted = tuple(transitions.spec.action_shape)
    if action.shape != wanted:
        raise UserError(
            f"evaluate.environment={name}: its actions are {action}, the log's have shape {wanted}: evaluate in the "
            "environment that the log comes from."
        )
    size = flatdim(observation)
    if size != transitions.observation_dim:
        raise UserError(
            f"evaluate.environment={name}: its observations have {size} entries, the log's {transitions.observation_dim}: "
            "evaluate in the environment that the log comes from."
        )


def check_disk(context: Context, until: str) -> None:
    """Raise UserError where the disk of the store is too full for what the run will write."""
    need = estimate_disk(context, until)
    place = context.store.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f"the store {context.store.root} needs about {human_bytes(need)}, the disk has {human_bytes(free)} left: free "
            "some (`ipd-ray store prune`), or name another disk with runtime.store=FOLDER."
        )


def remarks(config: RunConfig, transitions: Transitions) -> list[str]:
    """What is allowed but hardly meant."""
    out = []
    longest = int(transitions.episode_length.max())
    if longest > config.policy.max_timestep:
        out.append(
            f"policy.max_timestep={config.policy.max_timestep}, but episodes last up to {longest} steps: later steps share "
            "one embedding; raise it to tell them apart."
        )
    if config.distill.warmup >= config.distill.updates:
        out.append(
            f"distill.warmup={config.distill.warmup} is not below distill.updates={config.distill.updates}: the step size "
            "never gets to distill.learning_rate."
        )
    if config.distill.imagined_ratio == 0 and "no_imagination" in config.ablations:
        out.append("ablations: no_imagination is the policy itself, since distill.imagined_ratio=0.")
    try:
        environment_maker(transitions.spec, config.evaluate.environment)
    except NoEnvironment as error:
        out.append(f"no evaluation: {error}.")
    return out


def explain_os_error(error: OSError) -> str | None:
    """Return what a user can do about a full disk or a missing permission; None for other errors."""
    what = error.filename or "the disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the device ({what}): free some (`ipd-ray store prune` removes what no run uses), then run the "
            "same command again; it goes on."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {what}: choose a place of your own with --run-dir, and runtime.store=FOLDER for artifacts."
    if error.errno in (errno.ENOTDIR, errno.ENOENT) and error.filename:
        return f"{what} cannot be made ({error.strerror}): choose another --run-dir."
    return None


# ---- engines


def make_engine(config: RunConfig, device: str) -> Engine:
    """Return the engine that `runtime` asks for. Raises UserError where it cannot be had."""
    runtime = config.runtime
    if runtime.engine == "ray":
        return _ray_engine()(runtime, device)
    return LocalEngine(1 if device.startswith("cuda") else runtime.actors or cores())


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ray_engine() -> Any:
    try:
        from ipd_ray.distributed.engine import RayEngine
    except ImportError as error:
        if (error.name or "").split(".")[0] != "ray":
            raise
        raise UserError(
            f"runtime.engine=ray, but ray cannot be imported ({error}): `pip install ipd_ray` brings it, or set "
            "runtime.engine=local, which needs none."
        ) from None
    return RayEngine


# ---- the run folder


@dataclass(frozen=True)
class Begun:
    """A run whose checks are behind it."""

    folder: Path
    context: Context
    until: str

    @property
    def work_left(self) -> bool:
        return any(row["state"] != "reused" for row in state_of(self.context, self.until))

    def carry_out(self, engine: Engine, listeners: Sequence[Listener]) -> dict[str, Any]:
        """Do the steps, keep the run folder's files up to date, return the summary."""
        config, transitions, folder = self.context.config, self.context.transitions, self.folder
        self._describe()
        records = recorders(config, folder, transitions.spec.dataset)
        for row in self._curves():  # what is reused is in the curves as if it had been made now
            for record in records:
                record.progress(row["part"], row["step"], row["total"], _numbers(row))
        heard = Listeners([*records, *listeners])
        context = Context(config, transitions, self.context.store, engine, heard)
        try:
            heard.note(
                f"{transitions.spec.dataset}: {transitions.episodes:,} episodes, {len(transitions):,} steps; seed "
                f"{config.seed}, {config.runtime.engine} engine, {context.device}; run folder {_near(folder)}"
            )
            for remark in remarks(config, transitions):
                heard.note(f"note: {remark}")
            try:
                run_until(context, self.until)
            finally:
                self._links()
            summary = self._finish(context)
        except BaseException as error:
            with suppress(OSError):
                heard.note(f"stopped: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}".strip())
            raise
        finally:
            with suppress(OSError):
                heard.close()
        with suppress(OSError):
            write_atomic(folder / CURVES, "".join(json.dumps(row) + "\n" for row in self._curves()))
        return summary

    def _finish(self, context: Context) -> dict[str, Any]:
        with suppress(FileNotFoundError):  # until is before distill
            copy_policy(context, self.folder)
        summary = {**summarise(context), "run_dir": str(self.folder)}
        write_atomic(self.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        try:
            from ipd_ray.report import build_report

            build_report([self.folder], self.folder / "report.html")
        except Exception as error:  # a report is looked at; the run is what took the time
            context.listener.note(
                f"the report could not be made ({type(error).__name__}: {error}); the run is whole, `ipd-ray report "
                f"{_near(self.folder)}` tries again."
            )
        return summary

    def _describe(self) -> None:
        """Write what the run is, before it works."""
        config, transitions, folder, store = self.context.config, self.context.transitions, self.folder, self.context.store
        write_atomic(folder / "config.yaml", as_yaml(config))
        identity = {
            "schema": SCHEMA, "dataset": transitions.spec.dataset, "content_hash": transitions.content_hash,
            "seed": config.seed, "store": str(store.root),
        }
        write_atomic(folder / IDENTITY, json.dumps(identity, indent=1) + "\n")
        user = user_file(store.root, folder)
        user.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(user, json.dumps({"run": str(folder)}) + "\n")
        (folder / SUMMARY).unlink(missing_ok=True)  # of another config, or of less; written again at the end
        self._links()

    def _links(self) -> None:
        """Link what is there, and what this run is to make: `store prune` leaves both alone."""
        store, wanted = self.context.store, {p.name for p in self.context.parts.until(self.until)}
        links = {}
        for part in self.context.parts.until("evaluate"):
            if part.name in wanted or store.find(part.step, part.key):
                path = store.partial(part.step, part.key)
                links[part.name] = {"key": part.key, "path": str(path.with_name(path.name.removesuffix(".partial")))}
        write_atomic(self.folder / LINKS, json.dumps(links, indent=1) + "\n")

    def _curves(self) -> Iterator[dict[str, Any]]:
        """All learning curves of what is finished, in the order of the method."""
        for part in self.context.parts.until("evaluate"):
            artifact = self.context.store.find(part.step, part.key)
            if artifact is not None:
                for row in _curve(artifact):
                    yield {"part": part.name, **{name: value for name, value in row.items() if name != "time"}}


def _curve(artifact: Artifact) -> Iterator[dict[str, Any]]:
    if (artifact.path / "metrics.jsonl").exists():
        yield from artifact.curve()
        return
    shards = int(artifact.diagnostics.get("shards", 0))
    for shard in range(shards):
        if entry := read_entry(artifact.path, shard):
            yield {"step": shard + 1, "total": shards, "reward_gain": entry["reward_gain"]}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("part", "step", "total")}


def _near(path: Path) -> str:
    """The path as a user would type it."""
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
