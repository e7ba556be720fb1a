"""`ipd-ray doctor`: whether the machines are fit for a run, before it begins. Looks, measures, changes nothing.

`look` and `calibrate` run on each machine; `judge` turns what they say into findings, each with its remedy.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

import ipd_ray
from ipd_ray.api import plan, processes, run_folder, store_of
from ipd_ray.artifacts import numeric_platform
from ipd_ray.checks import check_config
from ipd_ray.config import RunConfig, label_selector
from ipd_ray.errors import UserError
from ipd_ray.estimate import Sizes, sizes_of, work_seconds
from ipd_ray.on_ray import ray_part
from ipd_ray.pipeline import Context
from ipd_ray.runs import human_bytes
from ipd_ray.storage import marked, troubles
from ipd_ray.storage import probe as probe_folder
from ipd_ray.training import cores, memory, resolve_device

PACKAGES = ("ray", "torch", "numpy")
MEASURED_FOR = 2.0
"""Seconds of each of the measurements, about five, that make up the calibration."""
ANSWER_SECONDS = 120.0
"""For a node to start a worker, import torch and measure, on a busy machine."""
GPU_SHARE = 0.01
"""Of a GPU, to see which one it is."""
HERE = "this machine"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "error"]
    check: str
    text: str
    """What was found; where it is not well, what helps."""


@dataclass(frozen=True)
class Machine:
    """What a node offers, and what it said when it was asked."""

    name: str
    cpus: float
    gpus: float
    memory: float
    """Bytes for workers."""
    object_store: float | None
    facts: Mapping[str, Any] | Exception
    """What `look` returned there."""
    actors: int
    """Imagination actors that fit at a time."""


@dataclass(frozen=True)
class Report:
    """The whole answer."""

    machines: tuple[Machine, ...]
    findings: tuple[Finding, ...]
    plan: Mapping[str, Any] | None
    """As `ipd_ray.api.plan` returns it, for the machine that would do the work; None where no dataset is named."""

    @property
    def exit_code(self) -> int:
        """0 all well, 2 something must be mended, 3 warnings only."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else 3 if "warning" in levels else 0

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        def plain(facts: Mapping[str, Any] | Exception) -> Any:
            return {"error": repr(facts)} if isinstance(facts, Exception) else facts

        return {
            "machines": [{**asdict(replace(m, facts={})), "facts": plain(m.facts)} for m in self.machines],
            "findings": [asdict(f) for f in self.findings], "plan": self.plan, "exit_code": self.exit_code,
        }


# ---- what runs on each machine


def look(places: Mapping[str, str], probe: Callable[[str], None], device: str) -> dict[str, Any]:
    """Return what this machine is where it computes on `device`, and per place "" or what is wrong with it.

    places: {folder: name of a file in it that the asking machine wrote, or "" where it wrote none}.
    """
    return {
        "python": platform.python_version(),
        "ipd_ray": f"{ipd_ray.__version__} ({_source_digest()})",
        **{name: _version(name) for name in PACKAGES},
        "platform": numeric_platform(device), "cores": cores(), "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "storage": troubles(places, probe),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _source_digest() -> str:
    """Of this package's source: an older image may have the same version."""
    digest, root = hashlib.sha256(), Path(ipd_ray.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def calibrate(steps: Sequence[str], config: RunConfig, sizes: Sizes, device: str) -> dict[str, float]:
    """Return the seconds of each step on this machine, measured for about ten."""
    return work_seconds(steps, config, sizes, device, MEASURED_FOR)


# ---- the examination


def examine(
    dataset: str | None, config: RunConfig, run_dir: str | Path | None = None,
    *, probe: Callable[[str], None] = probe_folder,
) -> Report:
    """Look at the machines that `config` would use, and at the dataset where one is named.

    Raises UserError where the cluster cannot be joined.
    """
    device = resolve_device(config.runtime.device)
    folder = run_folder(dataset or "doctor", config, run_dir)
    places = [str(store_of(config, folder)), str(folder)]
    findings = list(_settings(config))
    if any(finding.level == "error" for finding in findings):
        return Report((), tuple(findings), None)
    site: Site = _Here(config, device) if config.runtime.engine == "local" else _Cluster(config, device)
    with site:
        with marked(places) as marks:
            machines = site.machines(marks, probe)
        findings += [*judge(machines, config), *site.fit()]
        planned = _planned(dataset, config, run_dir, site, machines, findings) if dataset is not None else None
    return Report(tuple(machines), tuple(findings), planned)


def judge(machines: Sequence[Machine], config: RunConfig) -> Iterator[Finding]:
    """Yield what is well and what is not with the machines' answers."""
    well: dict[str, Mapping[str, Any]] = {}
    for machine in machines:
        if isinstance(machine.facts, Exception):
            yield Finding("error", "answer", f"{machine.name} cannot be used: {_reason(machine.facts)}")
        else:
            well[machine.name] = machine.facts
    for name in ("ipd_ray", "python", *PACKAGES):
        yield _same(name, {m: str(facts[name]) for m, facts in well.items()},
                    "give every node the same image, or submit with `ipd-ray submit --pins`")
    workers = {m.name: ", ".join(well[m.name]["platform"].values()) for m in machines if m.name in well and m.actors}
    yield _same("numeric platform", workers, "results would depend on who computes what: use one type of node")
    broken = {(m, folder, text) for m, facts in well.items() for folder, text in facts["storage"].items() if text}
    for name, folder, text in sorted(broken):
        yield Finding(
            "error", "storage", f"{name}, {folder}: {text}: mount it there for writing, or name storage that every "
            "node reaches with --run-dir and runtime.store",
        )
    if well and not broken:
        folders = ", ".join(next(iter(well.values()))["storage"])
        yield Finding("ok", "storage", f"{folders}: written, read back and deleted from {_shown(well)}")
    yield from _threads(machines, well, config)


def _same(name: str, values: Mapping[str, str], remedy: str) -> Finding:
    by_value: dict[str, list[str]] = {}
    for machine, value in values.items():
        by_value.setdefault(value, []).append(machine)
    if len(by_value) > 1:
        told = "; ".join(f"{value} on {', '.join(names)}" for value, names in by_value.items())
        return Finding("error", name, f"differs: {told}: {remedy}")
    return Finding("ok", name, next(iter(by_value), "-"))


def _threads(
    machines: Sequence[Machine], well: Mapping[str, Mapping[str, Any]], config: RunConfig
) -> Iterator[Finding]:
    """Threads against the CPUs that a worker holds, and CPUs against cores."""
    most, over = config.runtime.threads, False
    for machine in machines:
        if (facts := well.get(machine.name)) is None:
            continue
        if machine.cpus > facts["cores"]:
            over = True
            yield Finding(
                "warning", "threads", f"{machine.name} gives out {machine.cpus:g} CPUs and has {facts['cores']} cores: "
                "workers will slow each other down; start the node with --num-cpus, or use fewer runtime.actors",
            )
        if facts["threads"].isdigit() and int(facts["threads"]) > most:
            over = True
            yield Finding(
                "warning", "threads", f"OMP_NUM_THREADS={facts['threads']} on {machine.name}, where a worker holds "
                f"runtime.threads={most}: unset it there, or raise runtime.threads",
            )
    if well and not over:
        yield Finding("ok", "threads", f"{most} a worker, no more than the CPUs it holds")


def _shown(machines: Iterable[str]) -> str:
    """One machine by name, more by number."""
    names = list(machines)
    return f"{len(names)} nodes" if len(names) > 1 else "".join(names)


def _reason(error: Exception) -> str:
    """The last line says it, with the remedy for the likeliest cause."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
    missing = "ModuleNotFoundError" in f"{type(error).__name__} {error}" or "ImportError" in str(error)
    return f"{last}: install this version of ipd_ray there, or give the node the same image" if missing else last


def _settings(config: RunConfig) -> Iterator[Finding]:
    try:
        check_config(config)
    except UserError as error:
        yield Finding("error", "settings", str(error))
    else:
        yield Finding("ok", "settings", "no value contradicts another, and what they name is installed")


def _planned(
    dataset: str, config: RunConfig, run_dir: str | Path | None, site: Site, machines: Sequence[Machine],
    findings: list[Finding],
) -> dict[str, Any] | None:
    """The plan, measured where it would be carried out; what it finds goes to `findings`."""
    def work(context: Context) -> dict[str, float] | None:
        steps = sorted({part.step for part in context.parts.until("evaluate")})
        seconds, finding = site.calibrated(steps, sizes_of(context, "evaluate"))
        findings.append(finding)
        return seconds

    try:
        planned = plan(dataset, config, run_dir=run_dir, workers=site.workers(), work=work)
    except UserError as error:
        findings.append(Finding("error", "dataset", str(error)))
        return None
    findings.append(Finding("ok", "dataset", f"{planned['dataset']}: found, and the settings go with it"))
    findings += [Finding("warning", "settings", remark) for remark in planned["remarks"]]
    room = max((m.memory for m in machines if m.cpus), default=0.0)
    for row in planned["steps"] if config.runtime.engine == "ray" else ():  # of this machine a remark says it
        if row["memory"] > room:
            findings.append(Finding(
                "warning", "memory", f"{row['step']} may need {human_bytes(row['memory'])} in one worker, the largest "
                f"machine has {human_bytes(room)}: add a larger one, or take a smaller preset",
            ))
    return planned


# ---- where a run would take place


class Site(Protocol):
    """The machines that an engine would use; a context in which they can be asked."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def machines(self, places: Mapping[str, str], probe: Callable[[str], None]) -> list[Machine]:
        """Have every machine `look`."""

    def fit(self) -> Iterator[Finding]:
        """Yield whether the settings fit the machines."""

    def workers(self) -> int:
        """Return how many imagination workers there would be."""

    def calibrated(self, steps: Sequence[str], sizes: Sizes) -> tuple[dict[str, float] | None, Finding]:
        """Return the seconds of each step for one worker, of the slowest machine; None where none could be measured."""


class _Here:
    """The local engine's machine."""

    def __init__(self, config: RunConfig, device: str):
        self._config, self._device = config, device

    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None: ...

    def machines(self, places: Mapping[str, str], probe: Callable[[str], None]) -> list[Machine]:
        gpus = float(torch.cuda.device_count())
        return [Machine(HERE, cores(), gpus, memory(), None, look(places, probe, self._device), self.workers())]

    def fit(self) -> Iterator[Finding]:
        actors, threads = self.workers(), self._config.runtime.threads
        if actors * threads > cores():
            yield Finding(
                "warning", "threads", f"{actors} workers with runtime.threads={threads} each on {cores()} cores: lower "
                "runtime.actors or runtime.threads",
            )

    def workers(self) -> int:
        return processes(self._config, self._device)

    def calibrated(self, steps: Sequence[str], sizes: Sizes) -> tuple[dict[str, float] | None, Finding]:
        seconds = calibrate(steps, self._config, sizes, self._device)
        return seconds, Finding("ok", "calibration", f"measured on {HERE}, as busy as it is now")


class _Cluster:
    """The nodes of a Ray cluster."""

    def __init__(self, config: RunConfig, device: str):
        self._config, self._device, self._ours = config, device, False
        self._gpus = config.runtime.gpus_per_actor if device.startswith("cuda") else 0.0
        self._cluster = ray_part("cluster", "runtime.engine=ray")
        self._nodes = ray_part("nodes", "runtime.engine=ray")

    def __enter__(self) -> object:
        self._ours = self._cluster.connect(self._config.runtime.address)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._cluster.disconnect()

    def machines(self, places: Mapping[str, str], probe: Callable[[str], None]) -> list[Machine]:
        answers = self._everywhere(look, places, probe, self._device)
        return [
            Machine(m.name, m.offers.cpus, m.offers.gpus, m.memory, m.object_store, answers[m.id], self._actors(m))
            for m in self._nodes.members() if m.id in answers
        ]

    def fit(self) -> Iterator[Finding]:
        runtime, found = self._config.runtime, self._cluster.inspect()
        try:
            self._cluster.check(runtime, self._device, found)
        except UserError as error:
            yield Finding("error", "fit", str(error))
            return
        room = self._room(found)
        more = ", more where the autoscaler adds nodes" if found.autoscaled else ""
        yield Finding("ok", "fit", f"{found}: {room} imagination workers at a time{more}")
        if runtime.actors > room and not found.autoscaled:
            yield Finding(
                "warning", "fit", f"runtime.actors={runtime.actors}, but at most {room} are ever scheduled: lower "
                "runtime.actors or add nodes",
            )
        if sum(node.gpus for node in found.nodes) and not self._gpus:
            yield Finding(
                "warning", "fit", f"runtime.device={runtime.device} is {self._device} on {HERE}, so the cluster's GPUs "
                "stay idle: set runtime.device=cuda and start the run where there is a GPU",
            )

    def workers(self) -> int:
        room = self._room(self._cluster.inspect())
        return max(1, min(self._config.runtime.actors or room, room))

    def calibrated(self, steps: Sequence[str], sizes: Sizes) -> tuple[dict[str, float] | None, Finding]:
        answers = self._everywhere(calibrate, list(steps), self._config, sizes, self._device)
        measured = {m.name: answers[m.id] for m in self._nodes.members() if m.id in answers and self._actors(m)}
        well = {name: seconds for name, seconds in measured.items() if not isinstance(seconds, Exception)}
        failed = [f"{name}: {_reason(error)}" for name, error in measured.items() if isinstance(error, Exception)]
        if failed or not well:
            said = "; ".join(failed) or "no node has room for a worker now"
            finding = Finding("warning", "calibration", f"{said}: times are those of {_shown(well) or HERE}")
        else:
            finding = Finding("ok", "calibration", f"measured on {_shown(well)}, as busy as now; the slowest counts")
        return {step: max(seconds[step] for seconds in well.values()) for step in steps} if well else None, finding

    def _room(self, found: Any) -> int:
        """Imagination workers that fit a cluster at a time."""
        runtime = self._config.runtime
        return int(found.where(label_selector(runtime.actor_labels)).slots(runtime.threads, self._gpus))

    def _actors(self, member: Any) -> int:
        return self._room(self._cluster.Cluster((member.offers,), autoscaled=False))

    def _everywhere(self, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        gpus = GPU_SHARE if self._gpus else 0.0
        return dict(self._nodes.on_every_node(function, *args, seconds=ANSWER_SECONDS, gpus=gpus))
