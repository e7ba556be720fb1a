"""Run folders: what lies in one, and how they are listed, compared and removed.

A run folder holds config.yaml (every knob), run.json (which dataset, which store), links.json (its artifacts in the
store), metrics.jsonl (all learning curves), run.log (with times), summary.json (scores), policy/ and report.html.
Reading one needs neither torch nor the dataset.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipd_ray.config import flatten, read_yaml
from ipd_ray.errors import UserError, near_name
from ipd_ray.files import folder_bytes

SCHEMA = 1
"""Version of the folder's layout."""
IDENTITY, LINKS, SUMMARY, CURVES = "run.json", "links.json", "summary.json", "metrics.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def exists(self) -> bool:
        return (self.path / IDENTITY).is_file()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def identity(self) -> dict[str, Any]:
        """Content of run.json. Raises UserError for a folder that is no run, or of an unknown schema."""
        content = _read_json(self.path / IDENTITY)
        if not content:
            raise UserError(f"{self.path} is no run folder (it holds no {IDENTITY}): `ipd-ray runs ls` lists the runs.")
        if content.get("schema") != SCHEMA:
            raise UserError(
                f"{self.path} has schema {content.get('schema')!r}, this version of ipd_ray reads {SCHEMA}: use "
                "another --run-dir, or the version that wrote it."
            )
        return content

    @property
    def links(self) -> dict[str, dict[str, str]]:
        """Part name to key and path of its artifact."""
        return _read_json(self.path / LINKS)

    @property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json; empty for a run that has not ended."""
        return _read_json(self.path / SUMMARY)

    @property
    def config(self) -> dict[str, Any]:
        """{dotted name: value} of the config it ran with."""
        file = self.path / "config.yaml"
        return flatten(read_yaml(file)) if file.exists() else {}

    @property
    def store(self) -> Path:
        return Path(self.identity["store"])

    def artifact(self, part: str, needs: str = "") -> Path:
        """Return the folder of a part's artifact. Raises UserError where it is not there."""
        link = self.links.get(part)
        if link is None or not (Path(link["path"]) / "artifact.json").is_file():
            raise UserError(
                f"{self.path}: its {part} is not in the store{needs and f', and {needs} needs it'}: run it again with "
                "the same settings (`--config` with its config.yaml), or look at `ipd-ray runs ls`."
            )
        return Path(link["path"])


def open_run(name: str, root: Path = Path("runs")) -> RunFolder:
    """Return an existing run by its folder, or by its name in `root`. Raises UserError with the near names."""
    for path in (Path(name), root / name):
        if (path / IDENTITY).is_file():
            return RunFolder(path)
    known = [run.name for run in list_runs(root)]
    raise UserError(
        f"{name!r} is no run folder (with a {IDENTITY} in it).{near_name(name, known)} `ipd-ray runs ls` lists those "
        f"in {root}/, --runs-dir names another place."
    )


def list_runs(root: Path) -> list[RunFolder]:
    """Return the runs in a folder, by name."""
    if not root.is_dir():
        return []
    found = (RunFolder(path) for path in sorted(root.iterdir()) if path.is_dir())
    return [run for run in found if run.exists]


def row(run: RunFolder) -> dict[str, Any]:
    """What `runs ls` says of a run."""
    summary, identity = run.summary, run.identity
    policy = summary.get("policy", {})
    return {
        "run": str(run.path),
        "dataset": identity["dataset"],
        "seed": identity["seed"],
        "data_mean": summary.get("data", {}).get("return_mean"),
        "policy_mean": policy.get("return_mean"),
        "policy_std": policy.get("return_std"),
        "normalised": policy.get("normalised"),
        "accepted": summary.get("imagined", {}).get("accepted"),
        "seconds": sum(summary["seconds"].values()) if "seconds" in summary else None,
        "state": "done" if summary else "not finished",
        "bytes": folder_bytes(run.path),
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
        "runs": [str(a.path), str(b.path)],
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
    registered = user_file(run.store, run.path)
    shutil.rmtree(run.path)
    registered.unlink(missing_ok=True)


# ---- the store


def user_file(store: Path, run: Path) -> Path:
    """The file by which a store knows that a run uses it, wherever that run lies."""
    import hashlib

    return store / "users" / f"{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]}.json"


def users(store: Path, *roots: Path) -> list[RunFolder]:
    """Return every run that uses a store: those that registered themselves, and those in the given folders."""
    found: dict[Path, RunFolder] = {}
    for file in sorted((store / "users").glob("*.json")):
        run = RunFolder(Path(_read_json(file).get("run", "")))
        if run.exists:
            found[run.path.resolve()] = run
    for root in roots:
        for run in list_runs(root):
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


@dataclass(frozen=True)
class Stored:
    """A folder or file of the store."""

    path: Path
    step: str
    """The step that made it; data: a converted log."""
    state: str
    """done, partial (of a run that was stopped) or working (owned by a live process)."""
    bytes: int
    runs: tuple[str, ...]
    """The runs that use it."""


def list_store(store: Path, *roots: Path) -> list[Stored]:
    """Return what lies in a store, and which runs use it."""
    used: dict[str, list[str]] = {}
    for run in users(store, *roots):
        for link in run.links.values():
            used.setdefault(link["key"][:24], []).append(run.name)
        used.setdefault(run.identity["content_hash"][:24], []).append(run.name)
    out = []
    for path in sorted(_artifact_folders(store)):
        key = path.name.removesuffix(".partial")
        state = "done"
        if path.name.endswith(".partial"):
            state = "working" if _owned(path) else "partial"
        out.append(Stored(path, path.parent.name, state, folder_bytes(path), tuple(used.get(key, ()))))
    for path in sorted((store / "data").glob("*.safetensors")):
        out.append(Stored(path, "data", "done", path.stat().st_size, tuple(used.get(path.stem, ()))))
    return out


def prunable(stored: list[Stored]) -> list[Stored]:
    """Return what no run uses and no live process works on."""
    return [item for item in stored if not item.runs and item.state != "working"]


def delete(item: Stored) -> None:
    """Remove one thing from the store."""
    if item.path.is_dir():
        shutil.rmtree(item.path)
    else:
        item.path.unlink(missing_ok=True)


def _artifact_folders(store: Path) -> Iterator[Path]:
    for path in store.glob("*/*"):
        if path.is_dir() and (path.name.endswith(".partial") or (path / "artifact.json").is_file()):
            yield path


def _owned(folder: Path) -> bool:
    from ipd_ray.artifacts import Lease

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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove it, and run again to have it written anew.") from None
