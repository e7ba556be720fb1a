"""Run folders: what lies in one, and how they are listed, compared and removed.

A run folder holds config.yaml (every knob), run.json (which dataset, which store), links.json (its artifacts in the
store), metrics.jsonl (all learning curves), run.log (with times), summary.json (scores), policy/ and report.html.
Reading one needs neither torch nor the dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipd_ray.config import flatten, read_yaml
from ipd_ray.errors import UserError, near_name
from ipd_ray.lease import Lease
from ipd_ray.storage import ARTIFACT, Folder

SCHEMA = 1
"""Version of the folder's layout."""
IDENTITY, LINKS, SUMMARY, CURVES = "run.json", "links.json", "summary.json", "metrics.jsonl"
MUCH_LONGER = 1.1
"""Length of evaluated episodes, in lengths at which the log's are cut, from which on their returns do not compare."""


def plans_in(summary: Mapping[str, Any]) -> str:
    """Say whether the policy that a run keeps, by its summary, was distilled `with` plans or `without`."""
    return "with" if summary["chosen"]["variant"] == "ipd" and summary.get("imagined") else "without"


class RunFolder:
    """The folder of one run."""

    def __init__(self, place: str | Path | Folder):
        self.folder = Folder.of(place)

    @property
    def path(self) -> Path:
        """Where its files are on this machine; of an object store, those that were pulled."""
        return self.folder.path

    @property
    def exists(self) -> bool:
        return self.folder.exists(IDENTITY)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> dict[str, Any]:
        """Content of run.json. Raises UserError for a folder that is no run, or of an unknown schema."""
        content = self._read(IDENTITY)
        if not content:
            raise UserError(
                f"{self.folder} is no run folder (it holds no {IDENTITY}): `ipd-ray runs ls` lists the runs."
            )
        if content.get("schema") != SCHEMA:
            raise UserError(
                f"{self.folder} has schema {content.get('schema')!r}, this version of ipd_ray reads {SCHEMA}: use "
                "another --run-dir, or the version that wrote it."
            )
        return content

    @property
    def links(self) -> dict[str, dict[str, str]]:
        """Part name to key and path of its artifact."""
        return self._read(LINKS)

    @property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json; empty for a run that has not ended."""
        return self._read(SUMMARY)

    @property
    def config(self) -> dict[str, Any]:
        """{dotted name: value} of the config it ran with."""
        self.folder.pull(["config.yaml"])
        file = self.path / "config.yaml"
        return flatten(read_yaml(file)) if file.exists() else {}

    @property
    def store(self) -> Folder:
        return Folder.of(self.identity["store"])

    def pull(self) -> None:
        """Have all its files on this machine."""
        if self.folder.remote:
            self.folder.pull(sorted(self.folder.sizes()))

    def artifact(self, part: str) -> Folder:
        """Return the folder of a part's artifact. Raises UserError where it is not there."""
        link = self.links.get(part)
        if link is None or not Folder.of(link["path"]).exists(ARTIFACT):
            raise UserError(
                f"{self.folder}: its {part} is not in the store: run it again "
                "with the same settings (`--config` with its config.yaml), or look at `ipd-ray runs ls`."
            )
        return Folder.of(link["path"])

    def _read(self, name: str) -> dict[str, Any]:
        return _parsed(self.folder.read_text(name), f"{self.folder}/{name}")


def open_run(name: str, root: str | Folder = "runs") -> RunFolder:
    """Return an existing run by its folder, or by its name in `root`. Raises UserError with the near names."""
    for place in (Folder.of(name), Folder.of(root) / name):
        if place.exists(IDENTITY):
            return RunFolder(place)
    known = [run.name for run in list_runs(root)]
    raise UserError(
        f"{name!r} is no run folder (with a {IDENTITY} in it).{near_name(name, known)} `ipd-ray runs ls` lists those "
        f"in {root}/, --runs-dir names another place."
    )


def list_runs(root: str | Path | Folder) -> list[RunFolder]:
    """Return the runs in a folder, by name."""
    found = (RunFolder(folder) for folder in Folder.of(root).folders())
    return [run for run in found if run.exists]


def row(run: RunFolder) -> dict[str, Any]:
    """What `runs ls` says of a run."""
    summary, identity = run.summary, run.identity
    policy = summary.get("policy", {})
    return {
        "run": str(run.folder),
        "dataset": identity["dataset"],
        "seed": identity["seed"],
        "data_mean": summary.get("data", {}).get("return_mean"),
        "policy_mean": policy.get("return_mean"),
        "policy_std": policy.get("return_std"),
        "normalised": policy.get("normalised"),
        "accepted": summary.get("imagined", {}).get("accepted"),
        "seconds": sum(summary["seconds"].values()) if "seconds" in summary else None,
        "state": "done" if summary else "not finished",
        "bytes": run.folder.bytes,
    }


def difference(a: RunFolder, b: RunFolder) -> dict[str, Any]:
    """Return what two runs differ in: settings, keys of artifacts, scores."""
    mine, other = a.config, b.config
    names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
    keys_a, keys_b = a.links, b.links
    parts = list({**keys_a, **keys_b})
    same = [p for p in parts if p in keys_a and p in keys_b and keys_a[p]["key"] == keys_b[p]["key"]]
    scores_a, scores_b = _scores(a.summary), _scores(b.summary)
    return {
        "runs": [str(a.folder), str(b.folder)],
        "dataset": [a.identity["dataset"], b.identity["dataset"]],
        "same_data": a.identity["content_hash"] == b.identity["content_hash"],
        "config": {name: [mine.get(name), other.get(name)] for name in names},
        "shared": same,
        "different": [p for p in parts if p not in same],
        "scores": {name: [scores_a.get(name), scores_b.get(name)] for name in {**scores_a, **scores_b}},
    }


def _scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("return_mean", "return_std", "normalised", "accepted", "accept_rate")
    sections = ("data", "policy", "bc", "no_imagination", "imagined")
    return {
        f"{section}.{name}": summary[section][name]
        for section in sections if section in summary for name in wanted if name in summary[section]
    }


def remove(run: RunFolder) -> None:
    """Delete a run folder; its artifacts stay in the store until `store prune`."""
    _ = run.identity  # refuses what is no run
    users = run.store / USERS
    run.folder.remove()
    users.remove_file(_user_file(run.folder))


# ---- the store

USERS = "users"


def register(store: Folder, run: Folder) -> None:
    """Let a store know that a run uses it, wherever that run lies."""
    (store / USERS).write_text(_user_file(run), json.dumps({"run": str(run)}) + "\n")


def _user_file(run: Folder) -> str:
    return f"{hashlib.sha256(_identity(run).encode()).hexdigest()[:16]}.json"


def _identity(folder: Folder) -> str:
    return folder.uri if folder.remote else str(folder.path.resolve())


def users(store: Folder, *roots: Folder) -> list[RunFolder]:
    """Return every run that uses a store: those that registered themselves, and those in the given folders."""
    found: dict[str, RunFolder] = {}
    registered = store / USERS
    for name in sorted(registered.sizes()):
        said = _parsed(registered.read_text(name), f"{registered}/{name}").get("run")
        if said and (run := RunFolder(said)).exists:
            found[_identity(run.folder)] = run
    for root in roots:
        for run in list_runs(root):
            found.setdefault(_identity(run.folder), run)
    return list(found.values())


@dataclass(frozen=True)
class Stored:
    """A folder or file of the store."""

    folder: Folder
    """Its folder; of a converted log the one that it lies in."""
    name: str
    """Key of the artifact, or name of the log's file."""
    step: str
    """The step that made it; data: a converted log."""
    state: str
    """done, partial (of a run that was stopped) or working (owned by a live process)."""
    bytes: int
    runs: tuple[str, ...] = ()
    """The runs that use it."""


def list_store(place: str | Folder, *roots: str | Folder) -> list[Stored]:
    """Return what lies in a store, and which runs use it."""
    store = Folder.of(place)
    out = []
    for step in store.folders():
        for folder in step.folders():
            sizes = folder.sizes()
            state = "done" if ARTIFACT in sizes else "working" if _owned(folder) else "partial"
            out.append(Stored(folder, folder.name, step.name, state, sum(sizes.values())))
    data = store / "data"
    for name, size in sorted(data.sizes().items()):
        if name.endswith(".safetensors"):
            out.append(Stored(data, name, "data", "done", size))
    used: dict[str, list[str]] = {}  # asked last: of a run that begins meanwhile, too
    for run in users(store, *map(Folder.of, roots)):
        for link in run.links.values():
            used.setdefault(link["key"][:24], []).append(run.name)
        used.setdefault(run.identity["content_hash"][:24], []).append(run.name)
    return [replace(item, runs=tuple(used.get(item.name.removesuffix(".safetensors"), ()))) for item in out]


def prunable(stored: list[Stored]) -> list[Stored]:
    """Return what no run uses and no live process works on."""
    return [item for item in stored if not item.runs and item.state != "working"]


def prune(listed: list[Stored], place: str | Folder, *roots: str | Folder) -> list[Stored]:
    """Delete of what was listed as prunable what still is, and return it: a run may have begun since."""
    before = {(item.folder, item.name) for item in listed}
    items = [item for item in prunable(list_store(place, *roots)) if (item.folder, item.name) in before]
    for item in items:
        if item.step == "data":
            item.folder.remove_file(item.name)
        else:
            item.folder.remove()
    return items


def _owned(folder: Folder) -> bool:
    lease = Lease(folder)
    if lease.acquire() is not None:
        return True
    lease.release()
    return False


def human_bytes(size: float) -> str:
    """Return 1536 as 1.5 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """Return 75 as 1 min 15 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _parsed(text: str | None, where: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"{where} is damaged: remove it, and run again to have it written anew.") from None
