"""What can be refused before any work, each with its remedy."""

from __future__ import annotations

import errno
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ipd_ray.config import RunConfig
from ipd_ray.data.transitions import DISCOUNTS, Transitions, fitting_discount, log_remarks, prepare
from ipd_ray.errors import UserError, first_line
from ipd_ray.estimate import estimate_disk, estimate_memory
from ipd_ray.evaluate.episodes import NO_SPEC, Arena, NoEnvironment, arena_of, environment_maker
from ipd_ray.lease import Lease
from ipd_ray.on_ray import ray_part
from ipd_ray.pipeline import Context
from ipd_ray.runs import IDENTITY, MUCH_LONGER, RunFolder, human_bytes
from ipd_ray.storage import Folder, probe
from ipd_ray.training import device_here, memory, resolve_device
from ipd_ray.world_model.termination import resolve


def check_config(config: RunConfig) -> None:
    """Raise UserError for what no dataset could mend: things that cannot be had."""
    runtime = config.runtime
    check_device(runtime.device, here=runtime.engine == "local")
    resolve(config.world_model.termination)
    if config.evaluate.environment:
        environment_maker(NO_SPEC, config.evaluate.environment)
    if runtime.engine == "ray":
        ray_engine()
    if runtime.wandb != "off":
        _importable("wandb", f"runtime.wandb={runtime.wandb}", "`pip install wandb`, or set runtime.wandb=off")
    if runtime.tensorboard:
        _importable(
            "tensorboard", "runtime.tensorboard=true",
            "`pip install ipd_ray[tensorboard]`, or set runtime.tensorboard=false",
        )


def check_device(name: str, *, here: bool = True) -> None:
    """Raise UserError for a torch device that does not exist, or is not `here`: a cluster's nodes may have GPUs which
    the machine that drives them has not."""
    if name == "auto":
        return
    try:
        if not here and torch.device(name).index is not None:
            raise UserError(
                f"runtime.device={name} names one GPU of a machine, but with runtime.engine=ray each worker sees those "
                f"that Ray gives it: set runtime.device={torch.device(name).type}."
            )
        torch.zeros(1, device=name) if here else torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"runtime.device={name!r} cannot be used ({reason}): set runtime.device=auto or cpu.") from None


def ray_engine() -> Any:
    """Return the class RayEngine. Raises UserError where ray is not installed."""
    return ray_part("engine", "runtime.engine=ray", "set runtime.engine=local, which needs none").RayEngine


def _importable(module: str, field: str, remedy: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{field} needs {module}, which cannot be imported ({error}): {remedy}.") from None


def check_folder(folder: Folder) -> None:
    """Raise UserError where the run folder cannot be written, or holds something else."""
    if not folder.remote and folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"run folder {folder} is a file: give another --run-dir.")
    check_writable(folder)
    run = RunFolder(folder)
    if run.exists:
        _ = run.identity  # refuses an unknown schema
    elif any(not _ours(name) for name in folder.sizes()):
        raise UserError(
            f"run folder {folder} holds other things and no {IDENTITY}: give a --run-dir that is new, or empty, or "
            "a run's."
        )


def _ours(name: str) -> bool:
    """Whether a run that was stopped at its very beginning may have left this."""
    return name == Lease.FILE or name.startswith(".")


def check_writable(folder: Folder) -> None:
    """Raise UserError where nothing can be written to a folder; it is made if need be."""
    try:
        probe(folder.uri)
    except OSError as error:
        if folder.remote:
            raise UserError(
                f"{folder} cannot be written ({first_line(error)}): does the bucket exist, and do the environment's "
                f"credentials (such as {folder.credentials}) or this machine's role let you write there?"
            ) from error
        raise UserError(explain_os_error(error) or f"{folder} cannot be written ({error}).") from error


def check_identity(folder: Folder, transitions: Transitions) -> None:
    """Raise UserError for a run folder of another dataset."""
    run = RunFolder(folder)
    if not run.exists:
        return
    before, name = run.identity, transitions.spec.dataset
    remedy = f"give another --run-dir, or remove it with `ipd-ray runs rm {folder}`."
    if before["dataset"] != name:
        raise UserError(f"run folder {folder} is of dataset {before['dataset']}, not of {name}: {remedy}")
    if before["content_hash"] != transitions.content_hash:
        raise UserError(f"run folder {folder} is of {name} as it was before its content changed: {remedy}")


def check_data(config: RunConfig, transitions: Transitions) -> None:
    """Raise UserError where the dataset and the config do not go together."""
    prepare(transitions, config.data, config.seed)
    if config.evaluate.environment:
        arena_of(transitions, config.evaluate)


def check_disk(context: Context, until: str) -> None:
    """Raise UserError where the disk of the store is too full for what the run will write."""
    root = context.store.root
    if root.remote:  # no store of its kind is ever full
        return
    need, free = estimate_disk(context, until), shutil.disk_usage(root.path).free
    if free < need:
        raise UserError(
            f"the store {root} needs about {human_bytes(need)} more, the disk has {human_bytes(free)} left: free some "
            "(`ipd-ray store prune` removes what no run uses), or name another disk with runtime.store=FOLDER."
        )


_SMALLER = {
    "reach": "actor.starts, actor.length or actor.batch_size",
    "imagine": "runtime.actors, imagine.shard_size or planner.candidates",
    "distill": "distill.batch_size or select.starts", "walk": "correct.walks or correct.length",
}
"""Settings that a step's memory grows with."""


def memory_remarks(context: Context, until: str, workers: int) -> list[str]:
    """What is said of a run that may not fit this machine; of a cluster's nodes `doctor` says it.

    workers: of imagination.
    """
    if context.config.runtime.engine != "local":
        return []
    (need, part), here = estimate_memory(context, until, workers), memory()
    if need <= here:
        return []
    smaller = _SMALLER.get(part.partition(":")[0], "how many steps the log has")
    return [
        f"{part} may need {human_bytes(need)} of memory, this machine has {human_bytes(here)} for it: lower {smaller}, "
        "or take a smaller preset or a larger machine."
    ]


def remarks(config: RunConfig, transitions: Transitions, until: str = "evaluate") -> list[str]:
    """What is allowed but hardly meant in a run up to step `until`."""
    out = []
    longest = int(transitions.episode_length.max())
    if config.policy.timesteps == "episode" and longest > config.policy.max_timestep:
        out.append(
            f"policy.max_timestep={config.policy.max_timestep}, but episodes last up to {longest} steps: later steps "
            "share one embedding; raise it to tell them apart."
        )
    if config.data.discount == "auto" and (fitting := fitting_discount(transitions)) != DISCOUNTS[0]:
        out.append(
            f"data.discount=auto is {fitting:g}: by {DISCOUNTS[0]:g} episodes that return far less than others would "
            "count as the best."
        )
    out += log_remarks(transitions)
    full = RunConfig()
    if device_here(resolve_device(config.runtime.device)) == "cpu" and config.runtime.engine == "local" and (
        config.values.updates >= full.values.updates and config.distill.updates >= full.distill.updates
    ):
        out.append("these are full-size settings, for a GPU: --preset gym-small, or demo for small tasks, suit a CPU.")
    if config.distill.warmup >= config.distill.updates:
        out.append(
            f"distill.warmup={config.distill.warmup} is not below distill.updates={config.distill.updates}: the step "
            "size never gets to distill.learning_rate."
        )
    if config.distill.imagined_ratio == 0 and "no_imagination" in config.ablations:
        out.append("ablations: no_imagination is the policy itself, since distill.imagined_ratio=0.")
    if until != "evaluate":
        return out
    try:
        arena = arena_of(transitions, config.evaluate)
    except NoEnvironment as error:
        return [*out, f"there will be no evaluation: {error}."]
    return [*out, *_bounds_remark(arena, config), *_limit_remark(arena, config, transitions)]


def _named(config: RunConfig) -> str:
    return "evaluate.environment" if config.evaluate.environment else "the log's environment"


def _bounds_remark(arena: Arena, config: RunConfig) -> list[str]:
    space, spec = arena.actions, arena.spec
    low, high = (np.asarray(b, np.float64).reshape(spec.action_shape) for b in (spec.action_low, spec.action_high))
    slack = 1e-3 * (high - low)
    if (space.low >= low - slack).all() and (space.high <= high + slack).all():
        return []
    return [
        f"{_named(config)} takes actions from {_short(space.low)} to {_short(space.high)}, the log's lie from "
        f"{_short(low)} to {_short(high)}: the policy never acts beyond these. Import the log with --env, or with "
        "--action-low and --action-high, if they are the data's own."
    ]


def _limit_remark(arena: Arena, config: RunConfig, transitions: Transitions) -> list[str]:
    limit, cut, longest = arena.own_limit, transitions.longest_cut, int(transitions.episode_length.max())
    if config.evaluate.max_steps:
        return []
    if limit is None:
        why = "as the log's are" if cut else f"the log's longest ended itself after {longest:,}"
        return [
            f"{_named(config)} shows no limit of time: evaluated episodes are cut after {arena.config.max_steps:,} "
            f"steps, {why}; evaluate.max_steps sets another limit."
        ]
    if cut and limit > MUCH_LONGER * cut:
        remedy = f"; evaluate.max_steps={cut} makes them" if transitions.time_limit else ""
        return [
            f"{_named(config)} cuts episodes after {limit:,} steps, the log's last {cut:,} at most: the returns "
            f"will not compare{remedy}."
        ]
    return []


def _short(bound: Any) -> str:
    return ", ".join(f"{x:.3g}" for x in np.ravel(bound)[:4]) + (", ..." if np.size(bound) > 4 else "")


def explain_os_error(error: OSError) -> str | None:
    """Return what a user can do about a place that cannot be written; None for other errors."""
    what = error.filename or "the disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space is left ({what}): free some (`ipd-ray store prune` removes what no run uses), then run the same "
            "command again; it goes on."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hidden = isinstance(what, str) and Path(what).name.startswith(".")  # on its way to its own name
        return (
            f"no permission to write {Path(what).parent if hidden else what}: choose a place of your own (--run-dir "
            "for a run, and runtime.store=FOLDER for what runs share; -o for a report; MINARI_DATASETS_PATH for data)."
        )
    if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS) and error.filename:
        return (
            f"the file system of {what} cannot do what a run needs there ({error.strerror}): choose a place on another "
            "one with --run-dir, and runtime.store=FOLDER for what runs share."
        )
    if error.errno in (errno.ENOTDIR, errno.ENOENT, errno.EEXIST) and error.filename:
        return f"{what} cannot be written ({error.strerror}): choose another --run-dir or runtime.store."
    return None
