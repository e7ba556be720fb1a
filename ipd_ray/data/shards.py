"""Imagined segments as columns, and the shard files they lie in. Shapes: S segments, L steps, O observation, A action.

A shard is one Parquet file of fixed-shape tensor columns and a manifest entry (JSON) written after it; it counts only
with its entry. It holds no time, host or path: equal identity, equal bytes of content.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ipd_ray.data.transitions import Bools, Floats, Ints, digest
from ipd_ray.errors import UserError
from ipd_ray.storage import Folder

SCHEMA = 2


@dataclass(frozen=True)
class Segments:
    """S imagined segments, accepted or not, with the log's own continuation from the same starts."""

    index: Ints
    """(S,) step of the log that a segment starts from."""
    episode: Ints
    timestep: Ints
    control: Bools
    """(S,) start drawn uniformly, not by regret."""
    observation: Floats
    """(S, L + 1, O), raw; repeated after the segment ended."""
    action: Floats
    """(S, L, A), in [-1, 1]; taken."""
    imitated: Floats
    """(S, L, A), what a policy is to do there: `action`, but where a policy walked what its actor would have done."""
    reward: Floats
    """(S, L), transformed."""
    terminal: Bools
    """(S, L), true at the step that is predicted to end the episode."""
    uncertainty: Floats
    """(S, L), U of each step."""
    value: Floats
    """(S, L + 1), V; 0 after predicted termination."""
    own_reward: Floats
    """(S, L), the log's, transformed."""
    own_terminal: Bools
    """(S, L)"""
    own_length: Ints
    """(S,) steps that the log has from the start, at most L."""
    own_value: Floats
    """(S, L + 1), V along the log."""

    @classmethod
    def none(cls, observation_dim: int, action_dim: int) -> Segments:
        """No segment at all."""
        none, no = np.zeros(0, np.int64), np.zeros(0, bool)
        one, two = np.zeros((0, 1), np.float32), np.zeros((0, 2), np.float32)
        action, ends = np.zeros((0, 1, action_dim), np.float32), np.zeros((0, 1), bool)
        return cls(
            index=none, episode=none, timestep=none, control=no,
            observation=np.zeros((0, 2, observation_dim), np.float32), action=action, imitated=action, reward=one,
            terminal=ends, uncertainty=one, value=two, own_reward=one, own_terminal=ends, own_length=none,
            own_value=two,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.index)

    @property
    def length(self) -> int:
        return int(self.action.shape[1])

    def padded(self, length: int) -> Segments:
        """The same segments with as many steps; what is added repeats the last one, and is unknown: U is infinite."""
        more = length - self.length
        if more == 0:
            return self
        columns = {
            name: np.concatenate([column, np.repeat(column[:, -1:], more, 1)], 1) if column.ndim > 1 else column
            for name, column in self.columns().items()
        }
        columns["uncertainty"][:, self.length :] = np.inf
        return Segments(**columns)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def digest(self) -> str:
        return digest(self.columns())


def concatenate(parts: Sequence[Segments]) -> Segments:
    """Return all segments as one. The last step of shorter ones is repeated, with an infinite U: it is cut off."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.length for part in parts)
    columns = [part.padded(length).columns() for part in parts]
    return Segments(**{name: np.concatenate([c[name] for c in columns]) for name in columns[0]})


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.parquet"


def write_shard(folder: Folder, shard: int, segments: Segments, summary: dict[str, Any]) -> dict[str, Any]:
    """Write a shard and then its manifest entry, both atomically; return the entry."""
    columns: dict[str, pa.Array] = {}
    for name, values in segments.columns().items():
        if values.ndim == 1:
            columns[name] = pa.array(values)
        else:  # Arrow tensors hold no booleans
            plain = values.astype(np.uint8) if values.dtype == np.bool_ else values
            columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(plain))
    path = shard_path(folder.path, shard)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        pq.write_table(pa.table(columns), temporary, compression="none")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if folder.remote:
        folder.push([path.name])
        path.unlink()  # it is read where the policy is distilled, not here
    entry = {"schema": SCHEMA, "shard": shard, "segments": len(segments), "digest": segments.digest, **summary}
    folder.write_text(path.with_suffix(".json").name, json.dumps(entry))
    return entry


def shard_curve(folder: Folder) -> list[dict[str, Any]]:
    """Return a line a shard, as a learning curve has them."""
    entries = sorted(read_entries(folder).items())
    return [{"step": i + 1, "total": len(entries), "reward_gain": entry["reward_gain"]} for i, entry in entries]


def read_entry(folder: Path, shard: int) -> dict[str, Any] | None:
    """Return a shard's manifest entry, or None where the shard is not there as a whole."""
    path = shard_path(folder, shard)
    return _parsed(path.with_suffix(".json")) if path.exists() else None


def _parsed(path: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return entry if entry.get("schema") == SCHEMA else None


def read_entries(folder: Folder) -> dict[int, dict[str, Any]]:
    """Return the manifest entries of the shards that are there as a whole, by shard."""
    there = folder.sizes() if folder.exists() else {}
    names = [n for n in there if n.startswith("shard-") and n.endswith(".json")]
    names = [n for n in names if n.removesuffix(".json") + ".parquet" in there]
    folder.pull(names)
    found = (_parsed(folder.path / name) for name in names)
    return {int(entry["shard"]): entry for entry in found if entry is not None}


def read_shard(folder: Path, shard: int, verify: bool = True) -> Segments:
    """Read a shard. Raises UserError where it does not match its manifest entry."""
    path = shard_path(folder, shard)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}): remove the folder it lies in and run again.") from error
    values = {}
    for f in fields(Segments):
        column = table.column(f.name).combine_chunks()
        if isinstance(column, pa.FixedShapeTensorArray):
            array = column.to_numpy_ndarray()
        else:
            array = column.to_numpy(zero_copy_only=False)
        values[f.name] = array.astype(np.bool_) if f.name in _BOOLEANS else array
    segments = Segments(**values)
    entry = read_entry(folder, shard)
    if verify and (entry is None or entry["digest"] != segments.digest):
        raise UserError(f"{path} does not match its manifest entry: remove the folder it lies in and run again.")
    return segments


_BOOLEANS = frozenset({"control", "terminal", "own_terminal"})


def manifest_digest(digests: Sequence[str]) -> str:
    """Return the digest of a whole set of shards, in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
