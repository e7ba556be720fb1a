"""Writing Minari datasets: the demo's, imported logs and augmented sets. Shapes: l steps, O observation, A action."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE
from numpy.typing import NDArray

from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.environment import variables
from ipd_ray.errors import UserError

ROOT_VARIABLE = "MINARI_DATASETS_PATH"


def datasets_path() -> Path:
    """Return the folder of local Minari datasets: MINARI_DATASETS_PATH, or Minari's own default. Creates nothing."""
    root = os.environ.get(ROOT_VARIABLE)
    return Path(root) if root else Path.home() / ".minari" / "datasets"


def export_minari(
    transitions: Transitions,
    segments: Sequence[Mapping[str, Any]],
    dataset_id: str,
    *,
    root: Path | None = None,
    with_log: bool = True,
) -> Path:
    """Write the log's episodes, then every segment as an episode of its own, and return the dataset's folder.

    segments: each observations (l + 1, O) raw, actions (l, A) in [-1, 1], rewards (l,) raw, terminated bool. A segment
        that did not terminate ends truncated.
    with_log: False writes the segments alone.

    Actions are in the environment's units and bounds again. Observations stay flattened, one float32 Box (O,). Where
    the log's own space has another shape (a Dict, say), its JSON form is kept in the metadata as `flattened_from`, and
    the environment's spec is left out: its observations would not fit the dataset.
    """
    spec, size = transitions.spec, transitions.observation_dim
    episodes = [_log_episode(transitions, e) for e in range(transitions.episodes)] if with_log else []
    episodes += [_segment_episode(spec, size, index, segment) for index, segment in enumerate(segments)]
    if not episodes:
        raise UserError(f"dataset {dataset_id}: there is no segment to export: accept some, or export the log too.")
    flat = spec.observation_space["type"] == "Box" and list(spec.observation_space["shape"]) == [size]
    metadata: dict[str, Any] = {"log_episodes": len(episodes) - len(segments), "imagined_segments": len(segments)}
    if not flat:
        metadata["flattened_from"] = spec.observation_space
    least, most = spec.ref_min_score, spec.ref_max_score
    low, high = (np.reshape(bound, spec.action_shape) for bound in (spec.action_low, spec.action_high))
    dtype: Any = np.dtype(spec.action_dtype)
    return write_minari(
        dataset_id,
        episodes,
        observation_space=Box(-np.inf, np.inf, (size,), np.float32),
        action_space=Box(low.astype(dtype), high.astype(dtype), dtype=dtype),
        description=f"{spec.dataset} {'with' if with_log else 'as'} {len(segments)} imagined segments",
        root=root,
        env_spec=spec.env_spec if flat else None,
        ref_scores=None if least is None or most is None else (least, most),
        metadata=metadata,
    )


def _log_episode(transitions: Transitions, episode: int) -> EpisodeBuffer:
    steps = slice(int(transitions.episode_start[episode]), int(transitions.episode_start[episode + 1]))
    observations = np.concatenate([transitions.observation[steps], transitions.next_observation[steps][-1:]])
    terminated = bool(transitions.terminal[steps][-1])
    actions = transitions.spec.unscale_action(transitions.action[steps])
    return episode_buffer(observations, actions, transitions.reward[steps], terminated)


def _segment_episode(spec: Spec, size: int, index: int, segment: Mapping[str, Any]) -> EpisodeBuffer:
    observations = np.asarray(segment["observations"], np.float32)
    actions = np.asarray(segment["actions"], np.float32)
    rewards = np.asarray(segment["rewards"], np.float32)
    length = len(rewards)
    for name, array, shape in (
        ("observations", observations, (length + 1, size)),
        ("actions", actions, (length, spec.action_dim)),
        ("rewards", rewards, (max(length, 1),)),
    ):
        if array.shape != shape:
            raise ValueError(f"segments[{index}].{name} has shape {array.shape}, must be {shape}: rewards set l.")
    return episode_buffer(observations, spec.unscale_action(actions), rewards, bool(segment["terminated"]))


def episode_buffer(
    observations: NDArray[Any], actions: NDArray[Any], rewards: NDArray[Any], terminated: bool
) -> EpisodeBuffer:
    """Return l steps as Minari's buffer; the last one is terminated or truncated."""
    end = np.zeros(len(rewards), bool)
    end[-1] = True
    return EpisodeBuffer(
        observations=observations,
        actions=actions,
        rewards=rewards.astype(np.float64),
        terminations=end & terminated,
        truncations=end & (not terminated),
    )


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
    root = (datasets_path() if root is None else root).absolute()  # minari joins a relative one twice
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
        with variables({ROOT_VARIABLE: str(work)}), warnings.catch_warnings():
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
        form = "the form (namespace/)name-vN"
        if DATASET_ID_RE.fullmatch(name) is None:  # Minari's namespaces have two characters at least
            form, name = f"{form}, a namespace of two characters or more", f"my/{name.rpartition('/')[2]}"
        raise UserError(f"dataset id {dataset_id!r} must have {form}: use {name!r}.")
    return dataset_id
