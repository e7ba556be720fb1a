"""Bringing your own logs: npz, Parquet or D4RL's HDF5 to a Minari dataset. Shapes: N rows, one a step; E episodes.

Columns, under these names or mapped (`--map observations=obs,rewards=r`):

| field             | shape        |          |                                                            |
|-------------------|--------------|----------|------------------------------------------------------------|
| observations      | (N, ...)     | required | what the agent saw before it acted; numbers, no images     |
| actions           | (N, ...)     | required | continuous, in the environment's units                     |
| rewards           | (N,)         | required |                                                            |
| terminals         | (N,) boolean | required | the environment ended the episode here; or terminations    |
| timeouts          | (N,) boolean | optional | the episode was cut off here; or truncations               |
| next_observations | (N, ...)     | optional | what the action led to                                     |
| episode_ids       | (N,)         | optional | an episode ends where the value changes; or episode_id     |

Rows are in order of time, episode after episode. An episode ends at a terminal, a timeout, a change of episode_ids, or
the last row. npz: one array a field. Parquet: one row a step; a vector is a list, a tensor, or numbered columns
(observations_0, observations_1, ...). HDF5: one dataset a field, as D4RL has it.

Without next_observations nobody knows what the last action of an episode led to, and nothing is made up: the last
observation becomes what the action before it led to, and each episode is a step shorter. A truncated one loses its
last reward too, as in D4RL's own reader: V of the last observation stands for it. A terminated one ends a step early,
and the last reward is added to the one before, undiscounted, so that its return stays the same. An episode of a single
step is dropped.
"""

from __future__ import annotations

import importlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
from gymnasium.spaces import Box
from numpy.typing import NDArray

from ipd_ray.data.export import check_id, episode_buffer, write_minari
from ipd_ray.errors import UserError, near_name

Array = NDArray[Any]

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations", "episode_ids")
ALIASES = {"terminals": "terminations", "timeouts": "truncations", "episode_ids": "episode_id"}
USUAL = {
    "observations": ("obs", "observation", "states", "state"), "actions": ("action", "acts", "act"),
    "rewards": ("reward", "rews", "rew"), "terminals": ("terminated", "terminal", "dones", "done"),
}
"""Names that a column may have elsewhere: asked about, never taken for granted."""
OWN_BOUNDS = "the data's own smallest and largest values: the policy can never act beyond them"


@dataclass(frozen=True)
class ImportedLog:
    """A log that was read and found whole; nothing is written yet."""

    source: str
    observations: list[Array]
    """E arrays (steps + 1, ...)."""
    actions: list[Array]
    """E arrays (steps, ...), in the environment's units."""
    rewards: list[Array]
    """E arrays (steps,)."""
    terminated: list[bool]
    action_low: Array
    """Of an action's shape."""
    action_high: Array
    bounds_from: str
    """given, environment or data."""
    env_spec: str | None
    """JSON of the Gymnasium spec of the environment that was named."""
    warnings: list[str]


def parse_mapping(text: str) -> dict[str, str]:
    """Return "observations=obs,rewards=r" as {"observations": "obs", "rewards": "r"}."""
    mapping = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        field, equals, column = (p.strip() for p in part.partition("="))
        if not (field and equals and column):
            raise UserError(f"--map {part!r} must have the form field=column, such as observations=obs.")
        mapping[field] = column
    return mapping


def read(
    path: str | Path,
    *,
    mapping: Mapping[str, str] | None = None,
    env_id: str | None = None,
    action_low: float | Sequence[float] | None = None,
    action_high: float | Sequence[float] | None = None,
) -> ImportedLog:
    """Read and check a log; raises UserError for whatever would make the dataset wrong.

    path: .npz, .parquet or .pq (also a folder of them), .hdf5 or .h5.
    mapping: field to the column's name in the file, for the names that differ.
    env_id: Gymnasium id of the environment the log comes from; recorded, and its spaces compared where it can be made.
    action_low, action_high: bounds, a number or one an action dimension; else the environment's, else the data's.
    """
    path = Path(path)
    columns = _columns(path, dict(mapping or {}))
    log = _check_columns(path.name, columns)
    env_spec, env_spaces, notes = _environment(env_id)
    if env_spaces is not None:
        _check_spaces(path.name, str(env_id), env_spaces, log)
    low, high, bounds_from = _bounds(path.name, log["actions"], action_low, action_high, env_spaces, notes)
    observations, actions, rewards, terminated = _episodes(path.name, log, notes)
    return ImportedLog(str(path), observations, actions, rewards, terminated, low, high, bounds_from, env_spec, notes)


def preview(log: ImportedLog) -> dict[str, Any]:
    """Return what would be written: counts, sizes, returns, bounds and warnings."""
    returns = np.array([r.sum() for r in log.rewards])
    lengths = np.array([len(r) for r in log.rewards])
    return {
        "source": log.source,
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "length": _spread(lengths),
        "terminated": sum(log.terminated),
        "observation_shape": list(log.observations[0].shape[1:]),
        "action_shape": list(log.actions[0].shape[1:]),
        "return": _spread(returns),
        "action_low": log.action_low.ravel().tolist(),
        "action_high": log.action_high.ravel().tolist(),
        "action_bounds_from": log.bounds_from,
        "environment": log.env_spec is not None,
        "warnings": list(log.warnings),
    }


def write(
    log: ImportedLog,
    dataset_id: str,
    *,
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    root: Path | None = None,
) -> str:
    """Create the Minari dataset in root (MINARI_DATASETS_PATH where not given) and return its id.

    ref_min_score, ref_max_score: raw returns that count as 0 and 100; both or none.
    """
    check_id(dataset_id)
    scores = check_scores(ref_min_score, ref_max_score)
    low, high = log.action_low, log.action_high
    dtype: Any = log.actions[0].dtype
    write_minari(
        dataset_id,
        [episode_buffer(*e) for e in zip(log.observations, log.actions, log.rewards, log.terminated, strict=True)],
        observation_space=Box(-np.inf, np.inf, log.observations[0].shape[1:], log.observations[0].dtype.type),
        action_space=Box(low.astype(dtype), high.astype(dtype), dtype=dtype),
        description=f"imported from {Path(log.source).name}",
        root=root,
        env_spec=log.env_spec,
        ref_scores=scores,
    )
    return dataset_id


def check_scores(low: float | None, high: float | None) -> tuple[float, float] | None:
    """Return the reference scores, None where there are none. Raises UserError for one alone, or the wrong order."""
    if low is None and high is None:
        return None
    if low is None or high is None or not low < high:
        raise UserError(f"ref_min_score={low} must be below ref_max_score={high}: give both or none of them.")
    return low, high


def _spread(values: Array) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


# ---- columns of a file


def _columns(path: Path, mapping: dict[str, str]) -> dict[str, Array]:
    """Return the fields that the file has, under the schema's names."""
    formats: dict[str, Callable[[Path, Callable[[list[str]], dict[str, str]]], dict[str, Array]]] = {
        ".npz": _read_npz,
        ".parquet": _read_parquet,
        ".pq": _read_parquet,
        ".hdf5": _read_hdf5,
        ".h5": _read_hdf5,
    }
    for field in mapping:
        if field not in REQUIRED + OPTIONAL:
            raise UserError(
                f"--map {field}={mapping[field]}: {field!r} must be one of {', '.join(REQUIRED + OPTIONAL)}."
                f"{near_name(field, REQUIRED + OPTIONAL)}"
            )
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path of a {', '.join(formats)} file.")
    suffix = ".parquet" if path.is_dir() else path.suffix.lower()
    if suffix not in formats:
        raise UserError(f"{path.name}: {suffix or 'no suffix'} must be one of {', '.join(formats)}: convert the log.")

    def pick(names: list[str]) -> dict[str, str]:
        return _pick(path.name, names, mapping)

    try:
        return formats[suffix](path, pick)
    except (OSError, EOFError, zipfile.BadZipFile, pyarrow.ArrowException) as error:
        raise UserError(f"{path.name} cannot be read as {suffix} ({error}): write it again.") from error


def _pick(file: str, names: list[str], mapping: dict[str, str]) -> dict[str, str]:
    """Return field to column name; numbered columns go by their common name."""
    chosen = {}
    for field in REQUIRED + OPTIONAL:
        candidates = [mapping[field]] if field in mapping else [field, ALIASES.get(field, field)]
        found = next((name for name in candidates if name in names or _numbered(name, names)), None)
        if found is not None:
            chosen[field] = found
        elif field in mapping or field in REQUIRED:
            groups = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == candidates[0]}
            if len(groups) > 1:
                raise UserError(
                    f"{file}: {candidates[0]} lie in {len(groups)} groups ({', '.join(sorted(groups)[:3])}, ...), as "
                    "if grouped by episode: join them into one array a field, with a column of episode_ids."
                )
            usual = next((name for name in USUAL.get(field, ()) if name in names), None)
            near = f" Did you mean {usual!r}?" if usual and field not in mapping else near_name(candidates[0], names)
            raise UserError(
                f"{file}: column {candidates[0]!r} is missing; there are {', '.join(names[:20]) or 'none'}."
                f"{near} Name it with --map {field}=COLUMN."
            )
    return chosen


def _numbered(name: str, names: list[str]) -> list[str]:
    """Return name_0, name_1, ... (also name0, name.0, name[0]; from 0 or 1) in order, without gaps."""
    pattern = re.compile(re.escape(name) + r"[._\[]?(\d+)\]?")
    found = sorted((int(match[1]), n) for n in names if (match := pattern.fullmatch(n)))
    numbers = [number for number, _ in found]
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise UserError(
            f"columns {found[0][1]} to {found[-1][1]} must be numbered without gaps or repeats: add what is missing."
        )
    return [n for _, n in found]


def _read_npz(path: Path, pick: Callable[[list[str]], dict[str, str]]) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("it is no zip archive")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {field: file[name] for field, name in pick(list(file.files)).items()}
    except UserError:
        raise
    except ValueError as error:  # an array of objects needs pickle, which runs code
        raise UserError(f"{path.name}: {error}. Save plain arrays of numbers, no lists or objects.") from error


def _read_hdf5(path: Path, pick: Callable[[list[str]], dict[str, str]]) -> dict[str, Array]:
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        return {field: file[name][()] for field, name in pick(names).items()}


def _read_parquet(path: Path, pick: Callable[[list[str]], dict[str, str]]) -> dict[str, Array]:
    files = sorted(path.glob("*.parquet")) + sorted(path.glob("*.pq")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: there is no .parquet file in the folder.")
    names = pyarrow.parquet.read_schema(files[0]).names
    columns = {}
    for field, name in pick(names).items():
        wanted = [name] if name in names else _numbered(name, names)
        table = pyarrow.concat_tables([pyarrow.parquet.ParquetFile(file).read(columns=wanted) for file in files])
        parts = [_parquet_column(path.name, n, table.column(n)) for n in wanted]
        columns[field] = parts[0] if name in names else np.stack(parts, axis=1)
    return columns


def _parquet_column(file: str, name: str, column: pyarrow.ChunkedArray) -> Array:
    """Return a column as (N,), or (N, ...) for tensors and for lists of one length."""
    if column.null_count:
        raise UserError(
            f"{file}: column {name} is empty in {column.null_count} of {len(column)} rows: fill or drop these rows."
        )
    array = column.combine_chunks()
    if isinstance(array, pyarrow.ChunkedArray):
        array = pyarrow.concat_arrays(array.chunks)
    if isinstance(array.type, pyarrow.FixedShapeTensorType):
        return array.to_numpy_ndarray()
    shape = [len(array)]
    while isinstance(array.type, (pyarrow.ListType, pyarrow.LargeListType, pyarrow.FixedSizeListType)):
        flat = array.flatten()
        width, rest = divmod(len(flat), max(len(array), 1))
        lengths = array.value_lengths().to_numpy() if not isinstance(array.type, pyarrow.FixedSizeListType) else None
        if rest or (lengths is not None and (lengths != width).any()):
            raise UserError(f"{file}: lists of column {name} must all have one length: drop the rows that differ.")
        shape.append(width)
        array = flat
    if array.null_count:
        raise UserError(f"{file}: column {name} holds {array.null_count} empty values: fill or drop these rows.")
    return array.to_numpy(zero_copy_only=False).reshape(shape)


# ---- checks


def _check_columns(file: str, columns: dict[str, Array]) -> dict[str, Array]:
    """Return the columns as numbers and flags, rows first; raise UserError for what cannot be meant."""
    rows = len(np.atleast_1d(columns["rewards"]))
    if rows == 0:
        raise UserError(f"{file}: there is no row: check how it was written.")
    log = {}
    for field, array in columns.items():
        if array.ndim == 0 or len(array) != rows:
            found = len(array) if array.ndim else 0
            raise UserError(f"{file}: {field} has {found} rows, rewards have {rows}: each column needs one row a step.")
        if field != "episode_ids" and array.dtype.kind not in "fiub":
            raise UserError(f"{file}: {field} has dtype {array.dtype}, must be numbers: convert the column.")
        if field in ("rewards", "terminals", "timeouts", "episode_ids"):
            if array.size != rows:
                raise UserError(f"{file}: {field} has shape {array.shape}, must be ({rows},): one number a step.")
            array = array.reshape(rows)
        elif array.ndim == 1:
            array = array[:, None]
        if array.dtype.kind == "f" and (bad := ~np.isfinite(array.reshape(rows, -1)).all(1)).any():
            raise UserError(
                f"{file}: {field} is NaN or infinite in {int(bad.sum())} of {rows} rows, first in row "
                f"{int(np.flatnonzero(bad)[0])}: repair these rows, or drop their episodes."
            )
        log[field] = array
    for field in ("terminals", "timeouts"):
        if field in log:
            if not np.isin(log[field], (0, 1)).all():
                raise UserError(f"{file}: {field} must be true or false (1 or 0), holds {_others(log[field])}.")
            log[field] = log[field].astype(bool)
    if log["actions"].dtype.kind != "f":
        raise UserError(
            f"{file}: actions are {log['actions'].dtype}, must be floating point, since planning needs continuous "
            "actions: convert them if they are, or log another controller."
        )
    if log["observations"].dtype == np.uint8 and log["observations"].ndim >= 3:
        raise UserError(
            f"{file}: observations of shape {log['observations'].shape[1:]}, are images, must be vectors: encode."
        )
    for field in ("observations", "next_observations"):
        if field in log and log[field].dtype not in (np.float32, np.float64):
            log[field] = log[field].astype(np.float32)
    if "next_observations" in log and log["next_observations"].shape != log["observations"].shape:
        raise UserError(
            f"{file}: next_observations have shape {log['next_observations'].shape}, observations "
            f"{log['observations'].shape}: they must be equal."
        )
    log["rewards"] = log["rewards"].astype(np.float64)
    return log


def _others(flags: Array) -> str:
    return ", ".join(f"{v:g}" for v in np.unique(flags[~np.isin(flags, (0, 1))])[:3])


def _environment(env_id: str | None) -> tuple[str | None, tuple[Any, Any] | None, list[str]]:
    """Return JSON of the spec, the spaces where the environment can be made, and warnings."""
    if env_id is None:
        return None, None, ["no environment is named: evaluation will need evaluate.environment."]
    package, _, known = env_id.rpartition(":")
    try:
        if package:
            importlib.import_module(package)
        spec = gymnasium.spec(known)
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(
            f"environment {env_id!r} is not known to Gymnasium ({error}).{near_name(known, gymnasium.registry)} "
            f"Install its package, name the module that registers it (package:{known}), or leave the environment out."
        ) from error
    try:
        env = gymnasium.make(env_id)
    except Exception as error:  # whatever the environment's package raises where a part of it is missing
        note = f"environment {env_id} cannot be made here ({error}), so its spaces are not compared."
        return spec.to_json(), None, [note]
    spaces = env.observation_space, env.action_space
    env.close()
    return spec.to_json(), spaces, []


def _check_spaces(file: str, env_id: str, spaces: tuple[Any, Any], log: dict[str, Array]) -> None:
    for field, space in zip(("observations", "actions"), spaces, strict=True):
        if not isinstance(space, Box) or space.shape != log[field].shape[1:]:
            raise UserError(
                f"{file}: {field} have shape {log[field].shape[1:]}, {env_id} has {space}: name the environment the "
                "log comes from, or leave it out."
            )


def _bounds(
    file: str,
    actions: Array,
    low: float | Sequence[float] | None,
    high: float | Sequence[float] | None,
    env_spaces: tuple[Any, Any] | None,
    notes: list[str],
) -> tuple[Array, Array, str]:
    """Return the action bounds and where they come from: given, else the environment's, else the data's."""
    shape = actions.shape[1:]
    if (low is None) != (high is None):
        raise UserError(f"action_low={low}, action_high={high}: give both or none of them.")
    if low is not None and high is not None:
        size = int(np.prod(shape))
        try:
            bounds = [np.broadcast_to(np.asarray(b, float).reshape(-1), (size,)).reshape(shape) for b in (low, high)]
        except ValueError as error:
            raise UserError(
                f"action_low={low}, action_high={high}: give one number, or {size}, one an action dimension."
            ) from error
        source = "given"
    elif env_spaces is not None and np.isfinite([env_spaces[1].low, env_spaces[1].high]).all():
        bounds, source = [env_spaces[1].low, env_spaces[1].high], "environment"
    else:
        bounds, source = [actions.min(0), actions.max(0)], "data"
        notes.append(f"action bounds are {OWN_BOUNDS}; give --action-low and --action-high.")
    least, most = (np.array(b, np.float64) for b in bounds)
    if not (np.isfinite([least, most]).all() and (least < most).all()):
        index = int(np.flatnonzero(~(np.isfinite(least) & np.isfinite(most) & (least < most)).ravel())[0])
        raise UserError(
            f"{file}: bounds of action dimension {index} ({source}) are [{least.ravel()[index]:g}, "
            f"{most.ravel()[index]:g}]; they must be finite, low below high: give other bounds, or drop a "
            "dimension that is constant."
        )
    slack = 1e-4 * (most - least)
    outside = ((actions < least - slack) | (actions > most + slack)).reshape(len(actions), -1).any(1)
    if outside.any():
        notes.append(
            f"{int(outside.sum())} of {len(actions)} actions lie outside the bounds ({source}) and will be clipped; "
            f"the largest is {float(np.abs(actions).max()):g}: check the bounds and the units."
        )
    return least, most, source


def _check_order(file: str, ids: Array) -> None:
    """Raise UserError where rows of several episodes are mixed: ids come back, and most rows change them.

    An id that comes back after many rows is another episode: files that were joined each count from 0.
    """
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    lengths = np.diff(np.append(starts, len(ids)))
    if (lengths == 1).mean() < 0.5:
        return
    first: dict[Any, int] = {}
    for start, name in zip(starts.tolist(), ids[starts].tolist(), strict=True):
        if name in first:
            raise UserError(
                f"{file}: episode_ids {name!r} of row {first[name]} comes back in row {start}, and most rows change "
                "the id: rows of an episode must lie together, in order; sort them by episode and step."
            )
        first[name] = start


def _episodes(
    file: str, log: dict[str, Array], notes: list[str]
) -> tuple[list[Array], list[Array], list[Array], list[bool]]:
    """Cut the rows into episodes of T + 1 observations, each of them logged."""
    rows, terminals = len(log["rewards"]), log["terminals"]
    ends = terminals.copy()
    if "timeouts" in log:
        ends |= log["timeouts"]
    if "episode_ids" in log:
        ids = log["episode_ids"]
        ends[:-1] |= ids[1:] != ids[:-1]
        _check_order(file, ids)
    if ends[-1] and not ends[:-1].any():
        raise UserError(f"{file}: a single episode, of {rows} rows: log at least 2, since one is held out.")
    if not ends[:-1].any():
        raise UserError(
            f"{file}: no episode ends within {rows} rows: add a column of timeouts or episode_ids (or map it, such as "
            "--map timeouts=done_by_limit)."
        )
    if not ends[-1]:
        if "episode_ids" not in log:
            notes.append("the last episode has no end; it counts as truncated at the last row.")
        ends[-1] = True
    stops = np.flatnonzero(ends) + 1
    observations: list[Array] = []
    actions: list[Array] = []
    rewards: list[Array] = []
    terminated: list[bool] = []
    after = log.get("next_observations")
    merged = cut = dropped = jumps = 0
    for start, stop in zip(np.concatenate([[0], stops[:-1]]), stops, strict=True):
        done = bool(terminals[stop - 1])
        seen, earned = log["observations"][start:stop], log["rewards"][start:stop]
        if after is not None:
            close = np.isclose(seen[1:], after[start : stop - 1], rtol=1e-3, atol=1e-4)
            jumps += int((~close).any(tuple(range(1, close.ndim))).sum())
            seen = np.concatenate([seen, after[stop - 1 : stop]])
        elif stop - start == 1:
            dropped += 1
            continue
        else:
            stop -= 1
            merged, cut = merged + done, cut + (not done)
            earned = np.append(earned[:-2], earned[-2:].sum()) if done else earned[:-1]
        observations.append(seen)
        actions.append(log["actions"][start:stop])
        rewards.append(earned)
        terminated.append(done)
    if merged:
        notes.append(
            f"{merged} terminated episodes lack next_observations, and what their last action led to is not known: "
            f"{merged} last steps are merged into the ones before, which now terminate, rewards added undiscounted."
        )
    if cut:
        notes.append(f"{cut} truncated episodes lack next_observations; their last step is left out, with its reward.")
    if dropped:
        notes.append(
            f"{dropped} of {len(stops)} episodes are a single step, lack next_observations, and are dropped."
        )
    if jumps:
        notes.append(
            f"in {jumps} of {rows} rows next_observations differ from the following row's observations: check that "
            "rows are in order and that every episode end is marked; the following row's are used."
        )
    if not rewards:
        raise UserError(
            f"{file}: all {len(stops)} episodes are a single step without next_observations: add these, or mark fewer "
            "episode ends."
        )
    return observations, actions, rewards, terminated
