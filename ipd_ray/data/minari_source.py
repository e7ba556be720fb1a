"""Reading Minari datasets into columns. Shapes: T steps, E episodes, O observation, A action.

The storage is read column by column, without Minari's object an episode (a test holds the two equal). What is refused,
since no step of the method could use it: actions other than a Box, and observations other than a Box or a Dict of them.
Where the Box of the actions has no bounds, the data's own stand for them. An observation of dtype uint8 with two or
more dimensions counts as an image.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from gymnasium import spaces
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import MinariStorage
from minari.storage.hosting import get_cloud_storage
from numpy.typing import NDArray

from ipd_ray.data.columns import columns_path, read_columns, write_columns
from ipd_ray.data.demo import DEMO_ID, demo_root, make_demo
from ipd_ray.data.export import ROOT_VARIABLE, datasets_path
from ipd_ray.data.importer import OWN_BOUNDS
from ipd_ray.data.transitions import Floats, Spec, Transitions, check
from ipd_ray.errors import UserError, near_name
from ipd_ray.files import write_atomic

__all__ = ["datasets_path", "load", "local_ids"]

logger = logging.getLogger(__name__)

DEMO = "demo"
"""Alias of the demo's dataset, which is made where it is missing."""

REMOTE_SECONDS = 5.0
"""How long Minari's remote may take to list a namespace before it counts as out of reach."""

Path_ = tuple[str, ...]
Columns = dict[Path_, list[NDArray[Any]]]
"""Column path to one array an episode: ("actions",), or ("observations", "desired_goal")."""


def load(dataset_id: str, cache: Path | None = None, download: bool = True) -> Transitions:
    """Return a Minari dataset as transitions: the local one, else the remote one where download is set.

    dataset_id: a Minari id, or `demo`.
    cache: folder for the converted columns, a file named by content and an index entry; a second load reads these.
    """
    data = _locate(dataset_id, download) / "data"
    metadata = _metadata(data)
    if cache is None:
        return _convert(data, metadata)[0]
    index = cache / f"{_identity(data, metadata)}.json"
    try:
        entry = json.loads(index.read_text())
        cached = read_columns(columns_path(cache, entry["content_hash"]))
        if cached is not None:
            _report(entry["warnings"])
            return cached.with_spec(Spec(**entry["spec"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, damaged or of another version: convert again
    transitions, warnings = _convert(data, metadata)
    write_columns(columns_path(cache, transitions.content_hash), transitions)
    entry = {"content_hash": transitions.content_hash, "spec": asdict(transitions.spec), "warnings": warnings}
    write_atomic(index, json.dumps(entry))
    return transitions


def local_ids() -> list[str]:
    """Return the ids of the local datasets, sorted."""
    root = datasets_path()
    return sorted(folder.relative_to(root).as_posix() for folder in _dataset_folders(root))


def _dataset_folders(folder: Path) -> Iterator[Path]:
    """Follows links, as Minari does; leaves out hidden folders, where datasets are being written."""
    if (folder / "data" / "metadata.json").is_file():
        yield folder
    elif folder.is_dir():
        for child in folder.iterdir():
            if child.is_dir() and not child.name.startswith("."):
                yield from _dataset_folders(child)


# ---- finding


def _locate(dataset_id: str, download: bool) -> Path:
    """Return the dataset's folder; download it, or say what there is."""
    if dataset_id in (DEMO, DEMO_ID):
        root = demo_root()
        return root / make_demo(root)
    if DATASET_ID_RE.fullmatch(dataset_id) and (datasets_path() / dataset_id / "data").is_dir():
        return datasets_path() / dataset_id
    remote: list[str] = []
    match = DATASET_ID_RE.fullmatch(dataset_id)
    reason = "not asked"
    if match is None or match["version"] is None:
        reason = "not asked, since ids have the form (namespace/)name-vN"
    elif download:
        remote, reason = _remote_ids(dataset_id)
        if dataset_id in remote:
            return _download(dataset_id)
    name = os.environ.get(ROOT_VARIABLE)
    where = f"{ROOT_VARIABLE}={name}" if name else f"{ROOT_VARIABLE} is not set, so {datasets_path()}"
    local = local_ids()
    listed = f" Local: {', '.join([*local[:8], *(['...'] if local[8:] else [])])}." if local else ""
    raise UserError(
        f"dataset {dataset_id!r} is neither local ({where}) nor remote ({reason})."
        f"{near_name(dataset_id, {*local, *remote, DEMO}) or listed} Bring your own logs with `ipd-ray data import`, "
        f"or set {ROOT_VARIABLE} to the folder that holds the dataset; `{DEMO}` is always there."
    )


def _remote_ids(dataset_id: str) -> tuple[list[str], str]:
    """Return the remote ids of the dataset's namespace, and in words what the remote said."""
    found: list[str] = []
    failure: list[BaseException] = []

    def ask() -> None:
        try:
            storage = get_cloud_storage()
            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries say nothing to a user
            found.extend(storage.list_datasets(prefix=dataset_id.split("/")[0]))
        except Exception as error:  # whatever the remote's client raises when it is out of reach
            failure.append(error)

    thread = threading.Thread(target=ask, daemon=True, name="minari-remote")
    thread.start()
    thread.join(REMOTE_SECONDS)
    if thread.is_alive():
        return [], f"no answer in {REMOTE_SECONDS:g} s"
    if failure:
        return [], f"out of reach: {str(failure[0]).splitlines()[0] if str(failure[0]) else type(failure[0]).__name__}"
    return found, f"{len(found)} datasets in its namespace"


def _download(dataset_id: str) -> Path:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            minari.download_dataset(dataset_id)
    except Exception as error:
        raise UserError(
            f"dataset {dataset_id}: the download failed ({error}). Try again, or copy the dataset to {datasets_path()}."
        ) from error
    return datasets_path() / dataset_id


# ---- converting


def _metadata(data: Path) -> dict[str, Any]:
    try:
        metadata = MinariStorage.read_raw_metadata(data)
    except ValueError as error:
        raise UserError(f"dataset in {data.parent} is not whole ({error}): delete it and get it again.") from error
    version = metadata.get("minari_version")
    if version not in minari.supported_dataset_versions:
        raise UserError(
            f"dataset in {data.parent}: minari_version={version} must be one of "
            f"{', '.join(sorted(minari.supported_dataset_versions))}: install the Minari that wrote it, or get the "
            "dataset's newest version."
        )
    return metadata


def _convert(data: Path, metadata: Mapping[str, Any]) -> tuple[Transitions, list[str]]:
    """Read and check a dataset; return it and the warnings, which have been reported."""
    spec, leaves = _spec(data, metadata)
    columns = _read(data, metadata, [("observations", *leaf) for leaf in leaves])
    transitions, notes = _assemble(spec, leaves, columns)
    check(transitions)
    _report(notes)
    return transitions, notes


def _report(notes: list[str]) -> None:
    for note in notes:
        logger.warning(note)


def _spec(data: Path, metadata: Mapping[str, Any]) -> tuple[Spec, list[Path_]]:
    """Return the spec, and the paths of the observation's leaves in flattening order."""
    name = metadata["dataset_id"]
    try:
        storage = MinariStorage.read(data)
    except Exception as error:  # spaces that are not in the file come from the environment
        raise UserError(
            f"dataset {name}: its spaces cannot be read ({error}). Where they come from the environment, "
            "install its package."
        ) from error
    action = _action_box(name, storage.action_space)
    observation, leaves = _observation(name, storage.observation_space, ())
    scores = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return (
        Spec(
            dataset=name,
            observation_space=observation,
            action_low=action.low.ravel().astype(float).tolist(),
            action_high=action.high.ravel().astype(float).tolist(),
            action_shape=list(action.shape),
            action_dtype=str(action.dtype),
            env_spec=_env_spec(metadata),
            ref_min_score=None if scores[0] is None else float(scores[0]),
            ref_max_score=None if scores[1] is None else float(scores[1]),
        ),
        leaves,
    )


def _action_box(name: str, space: gymnasium.Space[Any]) -> spaces.Box:
    if not isinstance(space, spaces.Box):
        raise UserError(
            f"dataset {name}: action space {space} must be a Box, since planning and Q's gradient need continuous "
            "actions: log continuous actions, or choose another dataset."
        )
    if space.shape == () or 0 in space.shape:
        raise UserError(
            f"dataset {name}: action space {space} must have one dimension at least: reshape the actions, import them."
        )
    return space


def _observation(name: str, space: gymnasium.Space[Any], path: Path_) -> tuple[dict[str, Any], list[Path_]]:
    """Return the space's JSON form and its leaves, Dict entries in sorted key order as Spec flattens them."""
    if isinstance(space, spaces.Dict):
        parts = {key: _observation(name, space.spaces[key], (*path, key)) for key in sorted(space.spaces)}
        form = {"type": "Dict", "spaces": {key: part[0] for key, part in parts.items()}}
        return form, [leaf for part in parts.values() for leaf in part[1]]
    where = f"observation space{' at ' + '/'.join(path) if path else ''} {space}"
    if not isinstance(space, spaces.Box):
        raise UserError(
            f"dataset {name}: {where} must be a Box, or a Dict of Boxes: turn it into a vector of numbers (one-hot for "
            "Discrete) and import the log again."
        )
    if space.dtype == np.uint8 and len(space.shape) >= 2:
        raise UserError(
            f"dataset {name}: {where} is an image (uint8, two or more dimensions), and this method plans on state "
            "vectors: encode the images to vectors and import the log again."
        )
    return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype)}, [path]


def _env_spec(metadata: Mapping[str, Any]) -> str | None:
    """Return JSON of the evaluation environment's spec, else of the logged one's, without fields Gymnasium dropped."""
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if not text:
        return None
    fields = json.loads(text)
    for dropped in ("apply_api_compatibility", "autoreset"):
        fields.pop(dropped, None)
    return json.dumps(fields)


def _assemble(spec: Spec, leaves: list[Path_], columns: Columns) -> tuple[Transitions, list[str]]:
    """Join episodes of T + 1 observations each; the second value is what the user should know."""
    name, notes = spec.dataset, []
    rewards = columns[("rewards",)]
    steps = np.array([len(r) for r in rewards], np.int64)
    for key, per_episode in columns.items():
        length = np.array([len(a) for a in per_episode], np.int64)
        wrong = np.flatnonzero(length != steps + (key[0] == "observations"))
        if wrong.size:
            e = int(wrong[0])
            raise UserError(
                f"dataset {name}: {'/'.join(key)} of episode {e} has {length[e]} rows for {steps[e]} rewards; "
                f"observations need one more than rewards, the others as many ({wrong.size} episodes are wrong): "
                "import the log again."
            )
    if empty := int((steps == 0).sum()):
        notes.append(f"dataset {name}: {empty} of {len(steps)} episodes hold no step; they are left out.")
        columns = {key: [a for a, n in zip(arrays, steps, strict=True) if n] for key, arrays in columns.items()}
        steps = steps[steps > 0]
    if not steps.size:
        raise UserError(f"dataset {name} holds no transition: check how it was written.")
    start = np.concatenate([[0], np.cumsum(steps)])
    total, last = int(start[-1]), start[1:] - 1

    def observations(rows: slice) -> Floats:
        parts = [_floats([a[rows] for a in columns[("observations", *leaf)]]) for leaf in leaves]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    terminations = np.concatenate(columns[("terminations",)]).reshape(-1).astype(bool)
    truncations = np.concatenate(columns[("truncations",)]).reshape(-1).astype(bool)
    terminal = np.zeros(total, bool)
    terminal[last] = terminations[last]
    if unflagged := int((~(terminations | truncations)[last]).sum()):
        notes.append(
            f"dataset {name}: {unflagged} of {len(steps)} episodes end neither terminated nor truncated; they count as "
            "truncated."
        )
    if inner := int((terminations | truncations).sum() - (terminations | truncations)[last].sum()):
        notes.append(f"dataset {name}: {inner} termination or truncation flags lie inside episodes; they are ignored.")

    raw = np.concatenate(columns[("actions",)]).reshape(total, spec.action_dim)
    spec = _bounded(spec, raw, notes)
    low, high = np.asarray(spec.action_low), np.asarray(spec.action_high)
    slack = 1e-4 * (high - low)
    if outside := int(((raw < low - slack) | (raw > high + slack)).any(1).sum()):
        notes.append(f"dataset {name}: {outside} of {total} actions lie outside the action bounds; they are clipped.")
    transitions = Transitions(
        observation=observations(slice(None, -1)),
        action=spec.rescale_action(raw.reshape(total, *spec.action_shape)),
        reward=_floats(columns[("rewards",)]).reshape(total),
        next_observation=observations(slice(1, None)),
        terminal=terminal,
        episode_start=start,
        spec=spec,
    )
    return transitions, notes


def _bounded(spec: Spec, actions: NDArray[Any], notes: list[str]) -> Spec:
    """Return the spec with finite action bounds, as actions are rescaled by them; the data's own where it has none.

    actions: (T, A), in the environment's units; those that are not finite count for nothing here.
    """
    low, high = np.asarray(spec.action_low), np.asarray(spec.action_high)
    if (missing := ~(np.isfinite(low) & np.isfinite(high))).any():
        seen = actions[np.isfinite(actions).all(1)]
        if len(seen):
            low, high = np.where(np.isfinite(low), low, seen.min(0)), np.where(np.isfinite(high), high, seen.max(0))
        notes.append(
            f"dataset {spec.dataset}: {int(missing.sum())} of {len(low)} action dimensions have no bounds; taken are "
            f"{OWN_BOUNDS}; where they are others, write the dataset with a Box of these."
        )
    if not (low < high).all():
        index = int(np.flatnonzero(~(low < high))[0])
        raise UserError(
            f"dataset {spec.dataset}: action dimension {index} has low={low[index]:g}, high={high[index]:g}; low must "
            "be below high: drop the dimension and import the log again."
        )
    return replace(spec, action_low=low.tolist(), action_high=high.tolist())


def _floats(per_episode: list[NDArray[Any]]) -> Floats:
    """Join (n, *shape) arrays as float32 (sum of n, prod of shape)."""
    joined = np.concatenate(per_episode)
    with np.errstate(over="ignore"):  # check() counts infinite values
        return joined.reshape(len(joined), -1).astype(np.float32, copy=False)


# ---- storage formats


def _read(data: Path, metadata: Mapping[str, Any], observations: list[Path_]) -> Columns:
    readers: dict[str, Callable[[Path, int, list[Path_]], Columns]] = {
        "hdf5": _read_hdf5,
        "arrow": _read_arrow,
        "parquet": _read_arrow,
    }
    name, form = metadata["dataset_id"], metadata.get("data_format", "hdf5")
    if form not in readers:
        raise UserError(
            f"dataset {name}: data_format={form} must be one of {', '.join(readers)}: convert it with Minari."
        )
    wanted = [*observations, ("actions",), ("rewards",), ("terminations",), ("truncations",)]
    try:
        return readers[form](data, int(metadata["total_episodes"]), wanted)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"dataset {name} cannot be read ({error}): delete it and get it again.") from error


def _read_hdf5(data: Path, episodes: int, wanted: list[Path_]) -> Columns:
    """Read through h5py's low level: opening tens of thousands of small datasets is what takes the time, and next to it
    to find a NumPy dtype for each, which is done once for those that are alike."""
    columns: Columns = {path: [] for path in wanted}
    names = {path: "/".join(path).encode() for path in wanted}
    stored: dict[Path_, tuple[h5py.h5t.TypeID, np.dtype[Any]]] = {}
    with h5py.File(data / "main_data.hdf5", "r") as file:
        for episode in range(episodes):
            group = h5py.h5g.open(file.id, b"episode_%d" % episode)
            for path, name in names.items():
                dataset = h5py.h5d.open(group, name)
                kind = dataset.get_type()
                if path not in stored or not kind.equal(stored[path][0]):
                    stored[path] = kind, dataset.dtype
                array = np.empty(dataset.shape, stored[path][1])
                if array.size:
                    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, array, stored[path][0])
                columns[path].append(array)
    return columns


def _read_arrow(data: Path, episodes: int, wanted: list[Path_]) -> Columns:
    """Read Arrow or Parquet files; there every column has T + 1 rows, and all but observations end in padding."""
    columns: Columns = {path: [] for path in wanted}
    for episode in range(episodes):
        files = sorted(p for p in (data / str(episode)).iterdir() if p.suffix in (".arrow", ".parquet"))
        table = pyarrow.concat_tables([_arrow_table(p) for p in files]).combine_chunks()
        for path, arrays in columns.items():
            column = table.column(path[0])
            array = column.chunk(0)
            for key in path[1:]:
                array = array.field(key)
            arrays.append(_numpy(array) if path[0] == "observations" else _numpy(array)[:-1])
    return columns


def _arrow_table(path: Path) -> pyarrow.Table:
    if path.suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(path).read()
    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_file(source).read_all()


def _numpy(array: pyarrow.Array) -> NDArray[Any]:
    """Return an Arrow column as (n,) or, for lists of one length, (n, size)."""
    if pyarrow.types.is_fixed_size_list(array.type) or pyarrow.types.is_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
    return array.to_numpy(zero_copy_only=False)


# ---- cache of converted columns


def _identity(data: Path, metadata: Mapping[str, Any]) -> str:
    """Return SHA-256 of the id and of every data file's name, size and time of change."""
    sha = hashlib.sha256(str(metadata["dataset_id"]).encode())
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        status = path.stat()
        sha.update(f"|{path.relative_to(data)}|{status.st_size}|{status.st_mtime_ns}".encode())
    return sha.hexdigest()
