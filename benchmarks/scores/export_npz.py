"""A log as one npz file, for libraries that live in another environment. Shapes: T steps, O observation, A action.

    python benchmarks/scores/export_npz.py bench/hopper/mixed-v0 hopper.npz

Arrays: observations (T, O) float32, actions (T, A) in the environment's units, rewards (T,) float32 raw, terminals and
timeouts (T,) bool, of which exactly one is set at the last step of every episode; metadata, a JSON string. Nothing is
pickled. The last observation of an episode is left out: d3rlpy's episodes have no place for it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ipd_ray.data.minari_source import load
from ipd_ray.data.transitions import Transitions
from ipd_ray.errors import UserError

SCHEMA = 1


def columns(transitions: Transitions) -> dict[str, Any]:
    """Return the arrays by name.

    Actions are the log's to float32, but for those at a bound: Transitions holds them clipped to 1e-6 within it.
    """
    spec = transitions.spec
    if spec.observation_space["type"] != "Box" or len(spec.observation_space["shape"]) != 1:
        raise UserError(
            f"dataset {spec.dataset}: observation space {spec.observation_space} must be a flat Box for the peers, "
            "which see what the environment returns: leave this dataset out of the comparison."
        )
    if spec.env_spec is None or spec.ref_min_score is None or spec.ref_max_score is None:
        raise UserError(
            f"dataset {spec.dataset}: a score needs env_spec, ref_min_score and ref_max_score in the dataset's "
            "metadata: write them there."
        )
    last = np.zeros(len(transitions), bool)
    last[transitions.episode_start[1:] - 1] = True
    metadata = {
        "schema": SCHEMA,
        "dataset": spec.dataset,
        "content_hash": transitions.content_hash,
        "env_spec": spec.env_spec,
        "action_low": spec.action_low,
        "action_high": spec.action_high,
        "ref_min_score": spec.ref_min_score,
        "ref_max_score": spec.ref_max_score,
    }
    return {
        "observations": transitions.observation,
        "actions": spec.unscale_action(transitions.action).reshape(len(transitions), spec.action_dim),
        "rewards": transitions.reward,
        "terminals": transitions.terminal,
        "timeouts": last & ~transitions.terminal,
        "metadata": np.array(json.dumps(metadata)),
    }


def export(transitions: Transitions, path: Path) -> None:
    """Write the file, atomically."""
    arrays = columns(transitions)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="Minari id, or `demo`")
    parser.add_argument("out", type=Path, help="the npz file; overwritten")
    options = parser.parse_args()
    try:
        transitions = load(options.dataset)
        export(transitions, options.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {len(transitions)} steps of {transitions.episodes} episodes of {options.dataset}")


if __name__ == "__main__":
    main()
