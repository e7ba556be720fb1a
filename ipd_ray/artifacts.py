"""What a step leaves behind, and the store that finds it again by key.

An artifact is a folder `<store>/<step>/<key>/` with `artifact.json` (schema, key, digest, diagnostics), tensors as
safetensors and the learning curve as `metrics.jsonl`. While it is being made the folder is owned through a lease;
`artifact.json`, written last, makes it an artifact. No format here is a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform as platform_module
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ipd_ray.data.transitions import digest as array_digest
from ipd_ray.errors import UserError
from ipd_ray.files import write_atomic
from ipd_ray.lease import Lease
from ipd_ray.storage import ARTIFACT, METRICS, Folder

SCHEMA = 1
"""Version of the folder layout above; an artifact of another is refused with the remedy."""
RESULT, TENSORS, CHECKPOINT = "result.json", "tensors.safetensors", "checkpoint.safetensors"
"""In a work folder: what the step says of its result, the result, its learning curve, where it goes on after a kill."""
SNAPSHOT = "snapshot-"
"""What the names of tensors that were kept on the way begin with."""


def make_key(step: str, version: int, *, seed: int, sections: Mapping[str, Any], upstream: Mapping[str, str]) -> str:
    """Return the SHA-256 that decides whether a step's result can be reused.

    step, version: the step and its algorithm's version. sections: its config sections (models or plain values).
    upstream: keys or content hashes of all that it reads, by name.
    """
    plain = {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in sections.items()}
    identity = {"step": step, "version": version, "seed": seed, "config": plain, "upstream": dict(upstream)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over each tensor's name, dtype, shape and values."""
    return array_digest({name: value.detach().cpu().numpy() for name, value in tensors.items()})


def numeric_platform(device: str) -> dict[str, str]:
    """Return what bit-equality depends on: within one of these, equal keys give equal digests.

    device: that computes. A GPU that lies idle beside it changes nothing.
    """
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": f"{platform_module.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Write tensors and JSON metadata into one safetensors file, atomically."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(plain, temporary, metadata={"meta": json.dumps(dict(meta or {}))})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, json.loads((file.metadata() or {}).get("meta", "{}"))


def open_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a safetensors file's tensors and metadata without reading it: a slice of a tensor reads those rows."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, json.loads((file.metadata() or {}).get("meta", "{}"))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and metadata of a folder's checkpoint, or None where there is none; a damaged one is removed."""
    try:
        return load_tensors(folder / CHECKPOINT)
    except (SafetensorError, OSError, ValueError):
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSON-lines file; a line cut off by a kill is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Workspace:
    """The folder that one step works in: metrics, checkpoints, and at the end the result."""

    PUSH_SECONDS = 2.0
    """How often the learning curve is sent to an object store."""

    def __init__(self, place: str | Path | Folder, checkpoint_seconds: float = 30.0, device: str = "cpu"):
        """device: where the step computes; the artifact tells."""
        self.folder = Folder.of(place)
        self.path = self.folder.path
        self.device = device
        self._checkpoint_seconds = checkpoint_seconds
        self._began = self._saved = self._pushed = time.monotonic()
        self._spent = 0.0  # seconds before the last resume
        self.path.mkdir(parents=True, exist_ok=True)

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and metadata of the last checkpoint; metrics logged after it are dropped."""
        self.folder.pull([CHECKPOINT])
        restored = load_checkpoint(self.path)
        self.rewind(restored[1] if restored else {})
        return restored

    def rewind(self, meta: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's metadata: drop the metrics logged after it, count the time from there."""
        self.folder.pull([METRICS])
        metrics = self.path / METRICS
        kept = [row for row in read_jsonl(metrics) if row["step"] <= meta.get("step", 0)]
        if kept:
            write_atomic(metrics, "".join(json.dumps(row) + "\n" for row in kept))
            self.folder.push([METRICS])
        else:
            self.folder.remove_file(METRICS)
        self._spent = float(meta.get("seconds", 0.0))

    def due(self) -> bool:
        """Return whether a checkpoint should be written now."""
        return time.monotonic() - self._saved >= self._checkpoint_seconds

    def checkpoint(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
        """Replace the checkpoint. Raises FloatingPointError rather than save a non-finite value."""
        self.write_checkpoint(self.path, step, tensors, meta)
        self.folder.push([name for name in (METRICS, CHECKPOINT) if (self.path / name).exists()])

    def write_checkpoint(
        self, folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Write a checkpoint into a folder, which `load_checkpoint` reads."""
        require_finite(tensors, f"the checkpoint of step {step}")
        save_tensors(folder / CHECKPOINT, tensors, {**(meta or {}), "step": step, "seconds": self.seconds})
        self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on the step so far, over all its resumes."""
        return round(self._spent + time.monotonic() - self._began, 3)

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Append a line to the learning curve. Raises FloatingPointError where a metric is not finite."""
        row = {"step": step, "total": total, "time": round(time.time(), 3), **metrics}
        bad = [name for name, value in metrics.items() if value != value or abs(value) == float("inf")]
        if bad:
            raise FloatingPointError(
                f"{self.path.parent.name}: {', '.join(bad)} not finite at step {step}: lower the learning rate of this "
                "step, or look for outliers in the data with `ipd-ray data show`."
            )
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if time.monotonic() - self._pushed >= self.PUSH_SECONDS:
            self._pushed = time.monotonic()
            self.folder.push([METRICS])

    def keep(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors of an update on the way in the artifact; `Artifact.snapshots` finds them."""
        require_finite(tensors, f"the snapshot of step {step}")
        name = f"{SNAPSHOT}{step:09d}.safetensors"
        save_tensors(self.path / name, tensors, {"step": step})
        self.folder.push([name])

    def finish(self, tensors: Mapping[str, Tensor], diagnostics: Mapping[str, Any], **described: Any) -> None:
        """Write the result; the store's `commit` is what makes it an artifact."""
        require_finite(tensors, "the result")
        save_tensors(self.path / TENSORS, tensors)
        self.folder.push([TENSORS])
        self.describe(tensor_digest(tensors), diagnostics, **described)

    def describe(self, content_digest: str, diagnostics: Mapping[str, Any], **described: Any) -> None:
        """Say that the result is whole: what the step knows of its artifact.json."""
        if (self.path / METRICS).exists():
            self.folder.push([METRICS])
        content = {
            "platform": numeric_platform(self.device), "digest": content_digest, "diagnostics": dict(diagnostics),
            "seconds": self.seconds, **described,
        }  # fmt: skip
        self.folder.write_text(RESULT, json.dumps(content, indent=1))


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise FloatingPointError with the count where any value is NaN or infinite."""
    for name, value in tensors.items():
        if value.is_floating_point():
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise FloatingPointError(
                    f"{what}: {bad} of {value.numel()} values of {name} are not finite; nothing saved."
                )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{i}.{name}": torch.as_tensor(value) for i, item in state.items() for name, value in item.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        kind, _, rest = full.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with `prefix.` before their names."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def stripped(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}


class Artifact:
    """A finished step's folder."""

    def __init__(self, place: str | Path | Folder):
        self.folder = Folder.of(place)
        self._current = not self.folder.remote

    @property
    def path(self) -> Path:
        """Where its files are on this machine, as far as they were asked for."""
        return self.folder.path

    def pull(self, names: Sequence[str]) -> None:
        """Have these files on this machine. Once a machine: those of the same artifact are not fetched again."""
        if not self._current:
            with self.folder.locked():
                self._renew()
        self.folder.have(names)

    def pull_all(self) -> None:
        """Have all its files on this machine."""
        self.pull(sorted(self.folder.sizes()) if self.folder.remote else ())

    def _renew(self) -> None:
        """Drop what the mirror holds of an artifact that was made anew since."""
        text = self.folder.read_text(ARTIFACT)
        mirrored = self.path / ARTIFACT
        if text is not None and (not mirrored.exists() or mirrored.read_text() != text):
            for name in (p for p in self.path.iterdir() if p.is_file() and p.name != ".lock"):
                name.unlink()
            write_atomic(mirrored, text)
        self._current = True

    @property
    def described(self) -> dict[str, Any]:
        """Content of artifact.json. Raises FileNotFoundError, or UserError for an unknown schema."""
        text = self.folder.read_text(ARTIFACT)
        if text is None:
            raise FileNotFoundError(errno.ENOENT, "no artifact", f"{self.folder}/{ARTIFACT}")
        content = json.loads(text)
        if content.get("schema") != SCHEMA:
            raise UserError(
                f"{self.folder} has schema {content.get('schema')!r}, this version of ipd_ray reads {SCHEMA}: remove "
                "the folder to have it made again, or install the version that wrote it."
            )
        return dict(content)

    @property
    def digest(self) -> str:
        return str(self.described["digest"])

    @property
    def diagnostics(self) -> dict[str, Any]:
        return dict(self.described["diagnostics"])

    @property
    def seconds(self) -> float:
        return float(self.described["seconds"])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors. Raises UserError where they cannot be read, or are not those that were written."""
        self.pull([TENSORS])
        try:
            tensors, _ = load_tensors(self.path / TENSORS)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.folder}: {TENSORS} cannot be read ({error}): remove the folder and run again."
            ) from error
        if tensor_digest(tensors) != self.digest:
            raise UserError(f"{self.folder}: the tensors do not match their digest: remove the folder and run again.")
        return tensors

    def snapshots(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (update, tensors) of what was kept on the way, in order."""
        names = sorted(name for name in self.folder.sizes() if name.startswith(SNAPSHOT))
        self.pull(names)
        for name in names:
            tensors, meta = load_tensors(self.path / name)
            yield int(meta["step"]), tensors

    def curve(self) -> list[dict[str, Any]]:
        """Return the learning curve."""
        self.pull([METRICS])
        return read_jsonl(self.path / METRICS)


class Store:
    """Artifacts by step and key, shared by runs and by trials of a sweep."""

    def __init__(self, root: str | Path | Folder):
        self.root = Folder.of(root)

    def folder(self, step: str, key: str) -> Folder:
        """Return the folder in which a key is worked on, and where its artifact lies."""
        return self.root / step / key[:24]

    def find(self, step: str, key: str) -> Artifact | None:
        """Return the finished artifact of a key, if there is one."""
        folder = self.folder(step, key)
        return Artifact(folder) if folder.exists(ARTIFACT) else None

    @contextmanager
    def claim(self, step: str, key: str, waiting: Any = None) -> Iterator[Folder | None]:
        """Own a step's work folder and yield it, or None where the step is done; wait for who owns it.

        Who claims several goes through them in one order, so that no two wait for each other.
        waiting: called once with (step, owner) where somebody owns it.
        """
        folder, told = self.folder(step, key), False
        while self.find(step, key) is None:
            lease = Lease(folder)
            owner = lease.acquire()
            if owner is None:
                try:
                    yield folder if self.find(step, key) is None else None  # its owner before may have been done
                finally:
                    lease.release()
                return
            if waiting and not told:
                waiting(step, owner)
                told = True
            time.sleep(0.5)
        yield None

    def commit(self, step: str, key: str, *, version: int, parts: Mapping[str, Any]) -> Artifact:
        """Turn a finished work folder into the artifact of its key; `parts` says what the key was made of."""
        folder = self.folder(step, key)
        result = folder.read_text(RESULT)
        if result is None:
            raise FileNotFoundError(errno.ENOENT, "the step left no result", f"{folder}/{RESULT}")
        content = {
            "schema": SCHEMA,
            "step": step,
            "version": version,
            "key": key,
            "parts": dict(parts),
            **json.loads(result),
        }
        folder.write_text(ARTIFACT, json.dumps(content, indent=1))
        for name in (CHECKPOINT, RESULT):
            folder.remove_file(name)
        for below in folder.folders():  # an engine's own state, of a run that ended on another engine
            below.remove()
        return Artifact(folder)
