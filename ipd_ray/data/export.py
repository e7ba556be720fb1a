"""Writing Minari datasets: the demo's, imported logs and augmented sets. Shapes: l steps, O observation, A action."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import minari
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE

from ipd_ray.errors import UserError

ROOT_VARIABLE = "MINARI_DATASETS_PATH"


def datasets_path() -> Path:
    """Return the folder of local Minari datasets: MINARI_DATASETS_PATH, or Minari's own default. Creates nothing."""
    root = os.environ.get(ROOT_VARIABLE)
    return Path(root) if root else Path.home() / ".minari" / "datasets"


def write_minari(
    dataset_id: str,
    episodes: Sequence[EpisodeBuffer],
    *,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    description: str,
    root: Path | None = None,
    env_spec: str | None = None,
    ref_scores: tuple[float, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Create a Minari dataset and return its folder. It appears whole or not at all.

    root: folder of datasets; datasets_path() where not given.
    env_spec: JSON of the Gymnasium spec; the environment is not made, so its package need not be installed.
    ref_scores: raw returns that count as 0 and 100.
    metadata: further entries of Minari's metadata.json.
    """
    root = datasets_path() if root is None else root
    target = root / check_id(dataset_id)
    if target.exists() and not replace:
        raise UserError(
            f"dataset {dataset_id} exists in {root}: choose another id (such as the next -v number) or delete it."
        )
    extra: dict[str, Any] = dict(metadata or {})
    if env_spec is not None:
        extra["env_spec"] = env_spec
    if ref_scores is not None:
        extra["ref_min_score"], extra["ref_max_score"] = (float(score) for score in ref_scores)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".write-", dir=root) as work:
        with _minari_root(work), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields that Minari's public collection asks for
            dataset = minari.create_dataset_from_buffers(
                dataset_id,
                list(episodes),
                observation_space=observation_space,
                action_space=action_space,
                author="ipd_ray",
                algorithm_name=description,
                description=description,
            )
            dataset.storage.update_metadata(extra)
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(work) / dataset_id, target)
    for folder in target.relative_to(root).parents:
        mark = root / folder / "namespace_metadata.json"
        if folder != Path() and not mark.exists():
            mark.write_text("{}")
    return target


def check_id(dataset_id: str) -> str:
    """Return a valid Minari id of the form (namespace/)name-vN; else raise UserError."""
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match["version"] is None:
        name = re.sub(r"[^-\w/]+", "-", dataset_id).strip("-/") or "my/log"
        name = name if re.search(r"-v\d+$", name) else f"{name}-v0"
        raise UserError(f"dataset id {dataset_id!r} must have the form (namespace/)name-vN: use {name!r}.")
    return dataset_id


@contextmanager
def _minari_root(root: str | Path) -> Iterator[None]:
    """Point Minari at another folder; it reads the variable at every call. Not for use from two threads at once."""
    before = os.environ.get(ROOT_VARIABLE)
    os.environ[ROOT_VARIABLE] = str(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ[ROOT_VARIABLE]
        else:
            os.environ[ROOT_VARIABLE] = before
