"""Writing augmented sets, and describing a log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib.image
import minari
import numpy as np
import pytest

from ipd_ray.data.describe import describe, plot
from ipd_ray.data.export import export_minari, write_minari
from ipd_ray.data.minari_source import load
from ipd_ray.data.transitions import Spec, Transitions
from ipd_ray.errors import UserError

SPEC = Spec(
    dataset="test/log-v0",
    observation_space={"type": "Box", "shape": [2], "dtype": "float64"},
    action_low=[-2.0],
    action_high=[6.0],
    action_shape=[1],
    action_dtype="float32",
    env_spec=gymnasium.spec("Pendulum-v1").to_json(),
    ref_min_score=0.0,
    ref_max_score=20.0,
)
ID = "test/augmented-v0"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def log(spec: Spec = SPEC) -> Transitions:
    """Rewards 1, 2, 3, terminated; 4, 5, truncated."""
    observation = np.arange(10, dtype=np.float32).reshape(5, 2)
    return Transitions(
        observation=observation,
        action=np.array([[-0.5], [0.0], [0.5], [1.0], [-1.0]], np.float32),
        reward=np.arange(1, 6, dtype=np.float32),
        next_observation=observation + 2,
        terminal=np.array([False, False, True, False, False]),
        episode_start=np.array([0, 3, 5]),
        spec=spec,
    )


def segment(steps: int, terminated: bool) -> dict[str, Any]:
    return {
        "observations": np.full((steps + 1, 2), 7.0, np.float32),
        "actions": np.full((steps, 1), 0.25, np.float32),
        "rewards": np.full(steps, 10.0, np.float32),
        "terminated": terminated,
    }


def test_an_augmented_set_holds_the_log_then_the_segments():
    export_minari(log(), [segment(2, True), segment(1, False)], ID)
    t = load(ID)
    assert t.episode_length.tolist() == [3, 2, 2, 1]
    assert t.terminal.tolist() == [False, False, True, False, False, False, True, False]
    assert t.reward.tolist() == [1, 2, 3, 4, 5, 10, 10, 10]
    assert np.array_equal(t.observation[:5], log().observation)
    assert np.array_equal(t.next_observation[:5], log().next_observation)
    assert t.action[:5] == pytest.approx(log().action, abs=1e-5)


def test_actions_are_in_the_environments_units():
    export_minari(log(), [segment(2, True)], ID)
    dataset = minari.load_dataset(ID)
    assert dataset[2].actions.tolist() == [[3.0], [3.0]]  # 0.25 of [-2, 6]: 2 + 0.25 * 4
    assert dataset.action_space.high.tolist() == [6.0] and dataset.action_space.dtype == np.float32


def test_what_the_log_says_of_the_environment_goes_along():
    export_minari(log(), [segment(2, True)], ID)
    spec = load(ID).spec
    assert json.loads(spec.env_spec or "")["id"] == "Pendulum-v1" and spec.normalise(10.0) == 50.0
    metadata = minari.load_dataset(ID).storage.metadata
    assert (metadata["log_episodes"], metadata["imagined_segments"]) == (2, 1)


def test_segments_alone():
    export_minari(log(), [segment(2, True)], ID, with_log=False)
    assert len(load(ID)) == 2
    with pytest.raises(UserError, match="no segment to export"):
        export_minari(log(), [], "test/none-v0", with_log=False)


def test_dict_observations_stay_flattened_and_lose_the_environment():
    part = {"type": "Box", "shape": [1], "dtype": "float64"}
    space = {"type": "Dict", "spaces": {"goal": part, "seen": part}}
    export_minari(log(replace(SPEC, observation_space=space)), [segment(2, True)], ID)
    assert load(ID).spec.observation_space == {"type": "Box", "shape": [2], "dtype": "float32"}
    assert load(ID).spec.env_spec is None
    assert minari.load_dataset(ID).storage.metadata["flattened_from"] == space


def test_a_segment_of_the_wrong_shape_is_named(root: Path):
    wrong = segment(2, True) | {"actions": np.zeros((3, 1))}
    with pytest.raises(ValueError, match=r"segments\[1\].actions has shape \(3, 1\), must be \(2, 1\)"):
        export_minari(log(), [segment(2, True), wrong], ID)
    assert not root.exists()


def test_a_write_that_fails_leaves_nothing(root: Path):
    box: Any = gymnasium.spaces.Box(-1, 1)
    broken: Any = object()
    with pytest.raises(AttributeError):
        write_minari(ID, [broken], observation_space=box, action_space=box, description="")
    assert not (root / ID).exists() and list(root.glob(".write-*")) == []


def test_description_by_hand():
    d = describe(log())
    assert (d["episodes"], d["steps"], d["terminated"], d["truncated"]) == (2, 5, 1, 1)
    # returns 6 and 9: mean 7.5, std 1.5, 90 % at 8.7; normalised by [0, 20]
    assert d["return"] == pytest.approx({"mean": 7.5, "std": 1.5, "min": 6, "p50": 7.5, "p90": 8.7, "max": 9})
    assert d["normalised"] == pytest.approx({"mean": 37.5, "p50": 37.5, "p90": 43.5, "max": 45.0})
    assert d["action_saturation"] == 0.4  # 1 and -1 of five
    assert d["observation_max"] == [8.0, 9.0]
    assert json.loads(json.dumps(d)) == d
    assert describe(log(replace(SPEC, ref_min_score=None)))["normalised"] is None


@pytest.mark.parametrize("dims", [1, 3, 6])
def test_the_picture_is_drawn(dims: int, tmp_path: Path):
    spec = replace(SPEC, action_low=[-1.0] * dims, action_high=[1.0] * dims, action_shape=[dims])
    t = replace(log(spec), action=np.tile(log().action, (1, dims)))
    plot(t, tmp_path / "log.png")
    image = matplotlib.image.imread(tmp_path / "log.png")
    assert image.shape[0] > 500 and image[..., :3].std() > 0.05
