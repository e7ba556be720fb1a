"""Reading Minari datasets: equal to Minari's own reading, and clear about what cannot be used."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from ipd_ray.data import columns, minari_source
from ipd_ray.data.export import write_minari
from ipd_ray.data.minari_source import datasets_path, load, local_ids
from ipd_ray.data.transitions import Transitions
from ipd_ray.errors import UserError

BOX = spaces.Box(-np.inf, np.inf, (2,), np.float64)
ACTION = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32))
ID = "test/log-v0"
REAL_ROOT = os.environ.get("MINARI_DATASETS_PATH")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture(autouse=True)
def remote(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Minari's remote lists; no test asks the network."""
    ids: list[str] = []

    class Storage:
        def list_datasets(self, prefix: str) -> list[str]:
            return [i for i in ids if i.startswith(prefix)]

    monkeypatch.setattr(minari_source, "get_cloud_storage", Storage)
    return ids


def episode(steps: int, first: float = 0.0, terminated: bool = False, truncated: bool = False, **other: Any) -> Any:
    end = np.arange(steps) == steps - 1
    columns = {
        "observations": first + np.arange(2.0 * (steps + 1)).reshape(steps + 1, 2),
        "actions": np.tile(np.array([[0.5, 1.0]], np.float32), (steps, 1)),
        "rewards": first + np.arange(steps, dtype=np.float64),
        "terminations": end & terminated,
        "truncations": end & truncated,
    }
    return EpisodeBuffer(**{**columns, **other})


def create(*episodes: Any, observation: Any = BOX, action: Any = ACTION, **other: Any) -> str:
    write_minari(
        ID, episodes, observation_space=observation, action_space=action, description="test", replace=True, **other
    )
    return ID


def three() -> str:
    return create(episode(3, terminated=True), episode(2, 100.0, truncated=True), episode(4, 200.0, truncated=True))


# ---- what is read


def test_next_observations_come_from_the_episode_itself():
    t = load(three())
    assert t.observation[:, 0].tolist() == [0, 2, 4, 100, 102, 200, 202, 204, 206]
    assert t.next_observation[:, 0].tolist() == [2, 4, 6, 102, 104, 202, 204, 206, 208]
    assert t.episode_start.tolist() == [0, 3, 5, 9]
    assert t.observation.dtype == t.reward.dtype == np.float32


def test_termination_is_told_from_truncation():
    assert load(three()).terminal.tolist() == [False, False, True] + 6 * [False]


def test_with_both_flags_termination_wins():
    t = load(create(episode(2, terminated=True, truncated=True), episode(2, truncated=True)))
    assert t.terminal.tolist() == [False, True, False, False]


def test_an_episode_without_an_end_counts_as_truncated_with_one_warning(caplog: pytest.LogCaptureFixture):
    t = load(create(episode(2), episode(2), episode(2, terminated=True)))
    assert t.terminal.tolist() == 5 * [False] + [True]
    assert [r.message for r in caplog.records] == [
        f"dataset {ID}: 2 of 3 episodes end neither terminated nor truncated; they count as truncated."
    ]


def test_actions_are_rescaled_by_the_space():
    t = load(three())
    assert t.action[0] == pytest.approx([0.5, -0.5])  # 0.5 of [-1, 1]; 1 of [0, 4]
    assert t.spec.action_low == [-1.0, 0.0] and t.spec.action_high == [1.0, 4.0]


def test_actions_out_of_bounds_are_clipped_with_a_count(caplog: pytest.LogCaptureFixture):
    actions = np.array([[0.0, 5.0], [0.0, 4.0]], np.float32)
    t = load(create(episode(2, truncated=True, actions=actions)))
    assert t.action[:, 1] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert "1 of 2 actions lie outside" in caplog.text


def test_where_a_space_has_no_bounds_the_datas_own_are_taken(caplog: pytest.LogCaptureFixture):
    actions = np.array([[0.0, 5.0], [2.0, -3.0], [1.0, 1.0]], np.float32)
    space = spaces.Box(np.array([-4.0, -np.inf], np.float32), np.array([4.0, np.inf], np.float32))
    t = load(create(episode(3, truncated=True, actions=actions), action=space))
    assert (t.spec.action_low, t.spec.action_high) == ([-4.0, -3.0], [4.0, 5.0])
    assert t.action == pytest.approx(np.array([[0.0, 1.0], [0.5, -1.0], [0.25, 0.0]]), abs=1e-5)
    assert "1 of 2 action dimensions have no bounds; taken are the data's own" in caplog.text


def test_action_shape_and_type_are_kept():
    space = spaces.Box(0.0, 1.0, (2, 2), np.float64)
    t = load(create(episode(2, truncated=True, actions=np.full((2, 2, 2), 0.75)), action=space))
    assert t.action.tolist() == [[0.5] * 4] * 2
    assert t.spec.unscale_action(t.action) == pytest.approx(np.full((2, 2, 2), 0.75))
    assert t.spec.action_dtype == "float64"


def goal_space() -> spaces.Dict:
    return spaces.Dict({key: spaces.Box(-9, 9, (n,)) for key, n in (("observation", 2), ("desired_goal", 1))})


def goal_episode() -> Any:
    # Written in unsorted key order: desired_goal comes first all the same.
    observations = {"observation": np.arange(6, dtype=np.float32).reshape(3, 2), "desired_goal": -np.ones((3, 1))}
    return episode(2, truncated=True, observations=observations)


def test_dict_observations_are_flattened_as_the_spec_does():
    t = load(create(goal_episode(), observation=goal_space()))
    assert t.observation.tolist() == [[-1, 0, 1], [-1, 2, 3]]
    assert t.next_observation.tolist() == [[-1, 2, 3], [-1, 4, 5]]
    live = {"observation": np.array([2.0, 3.0]), "desired_goal": np.array([-1.0])}
    assert t.spec.flatten_observation(live).tolist() == t.observation[1].tolist()
    assert t.spec.observation_space["spaces"]["desired_goal"] == {"type": "Box", "shape": [1], "dtype": "float32"}


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("nested", [False, True])
def test_every_storage_format_reads_as_minari_reads_it(data_format: str, nested: bool):
    rng = np.random.default_rng(0)
    space = spaces.Dict({"g": spaces.Dict({"x": BOX}), "a": BOX}) if nested else BOX
    buffers = []
    for steps in (1, 7, 3):
        a, x = rng.normal(size=(2, steps + 1, 2))
        buffers.append(
            episode(
                steps,
                truncated=steps == 7,
                terminated=steps != 7,
                observations={"g": {"x": x}, "a": a} if nested else a,
                actions=rng.uniform(0, 1, (steps, 2)).astype(np.float32),
                rewards=rng.normal(size=steps),
            )
        )
    minari.create_dataset_from_buffers(
        ID, buffers, observation_space=space, action_space=ACTION, data_format=data_format
    )
    assert_equal_to_minari(load(ID), minari.load_dataset(ID))


def assert_equal_to_minari(t: Transitions, dataset: Any) -> None:
    assert t.episodes == dataset.total_episodes and len(t) == dataset.total_steps
    for e, logged in enumerate(dataset.iterate_episodes()):
        steps = slice(t.episode_start[e], t.episode_start[e + 1])
        flat = t.spec.flatten_observation(logged.observations)
        assert np.array_equal(t.observation[steps], flat[:-1])
        assert np.array_equal(t.next_observation[steps], flat[1:])
        assert np.array_equal(t.action[steps], t.spec.rescale_action(logged.actions))
        assert np.array_equal(t.reward[steps], logged.rewards.astype(np.float32))
        assert np.array_equal(t.terminal[steps], logged.terminations)


# ---- what the metadata says


def spec_json(name: str, **other: Any) -> str:
    return json.dumps({"id": name, "entry_point": "nowhere:Env", **other})


def test_the_evaluation_environment_is_preferred():
    create(episode(2, truncated=True), env_spec=spec_json("Train-v0"), metadata={"eval_env_spec": spec_json("Eval-v0")})
    assert json.loads(load(ID).spec.env_spec or "")["id"] == "Eval-v0"


def test_fields_that_gymnasium_dropped_are_left_out():
    create(episode(2, truncated=True), env_spec=spec_json("Old-v0", autoreset=False, apply_api_compatibility=False))
    assert set(json.loads(load(ID).spec.env_spec or "")) == {"id", "entry_point"}


def test_reference_scores_are_read():
    assert load(create(episode(2, truncated=True), ref_scores=(-10.0, 30.0))).spec.normalise(10.0) == 50.0
    assert load(create(episode(2, truncated=True))).spec.ref_min_score is None


# ---- what is refused


def test_discrete_actions_are_refused():
    create(episode(2, truncated=True, actions=np.array([0, 1])), action=spaces.Discrete(2))
    with pytest.raises(UserError, match=r"action space Discrete\(2\) must be a Box, since"):
        load(ID)


def test_an_action_that_never_changes_has_no_bounds_of_its_own():
    create(episode(2, truncated=True), action=spaces.Box(-np.inf, np.inf, (2,)))
    with pytest.raises(UserError, match=r"action dimension 0 has low=0.5, high=0.5"):
        load(ID)


def test_an_action_without_room_is_refused():
    create(episode(2, truncated=True), action=spaces.Box(np.array([0.0, 1.0]), np.array([1.0, 1.0]), dtype=np.float64))
    with pytest.raises(UserError, match="action dimension 1 has low=1, high=1"):
        load(ID)


def test_images_are_refused():
    space = spaces.Box(0, 255, (4, 4), np.uint8)
    create(episode(2, truncated=True, observations=np.zeros((3, 4, 4), np.uint8)), observation=space)
    with pytest.raises(UserError, match="is an image"):
        load(ID)


@pytest.mark.parametrize(
    ("space", "values"),
    [
        (spaces.Discrete(3), np.array([0, 1, 2])),
        (spaces.Dict({"x": spaces.Discrete(3)}), {"x": np.array([0, 1, 2])}),
        (spaces.Tuple((BOX,)), (np.zeros((3, 2)),)),
        (spaces.Text(3), ["a", "b", "c"]),
    ],
)
def test_observations_without_numbers_are_refused(space: Any, values: Any):
    create(episode(2, truncated=True, observations=values), observation=space)
    with pytest.raises(UserError, match="must be a Box, or a Dict of Boxes"):
        load(ID)


def test_a_missing_last_observation_is_refused():
    create(episode(2, truncated=True), episode(2, truncated=True, observations=np.zeros((2, 2))))
    with pytest.raises(UserError, match="observations of episode 1 has 2 rows for 2 rewards"):
        load(ID)


def test_nan_is_refused():
    create(episode(2, truncated=True), episode(2, truncated=True, rewards=np.array([0.0, np.nan])))
    with pytest.raises(UserError, match="reward is NaN or infinite in 1 of 4 steps, first in episode 1, step 1"):
        load(ID)


def test_an_unsupported_minari_version_is_refused(root: Path):
    create(episode(2, truncated=True))
    path = root / ID / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"minari_version": "0.0.1"}))
    with pytest.raises(UserError, match=r"minari_version=0.0.1 must be one of"):
        load(ID)


def test_a_broken_file_is_named(root: Path):
    create(episode(2, truncated=True))
    (root / ID / "data" / "main_data.hdf5").write_bytes(b"not hdf5")
    with pytest.raises(UserError, match=f"dataset {ID} cannot be read"):
        load(ID)


# ---- finding and downloading


def test_local_ids_are_listed(root: Path):
    assert local_ids() == []
    three()
    (root / ".write-x" / "a" / "data").mkdir(parents=True)
    assert local_ids() == [ID] and datasets_path() == root


def test_an_unknown_id_offers_near_names_and_the_way_out(root: Path):
    three()
    with pytest.raises(UserError) as error:
        load("test/lag-v0")
    for part in ("Did you mean 'test/log-v0'?", f"MINARI_DATASETS_PATH={root}", "`ipd-ray data import`", "nor remote"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["no version", "../../x", "plain", ""])
def test_a_malformed_id_is_not_asked_of_the_remote(name: str, remote: list[str]):
    with pytest.raises(UserError, match="ids have the form"):
        load(name)


def test_remote_names_are_offered(remote: list[str]):
    remote.append("D4RL/pen/human-v2")
    with pytest.raises(UserError, match="Did you mean 'D4RL/pen/human-v2'"):
        load("D4RL/pen/human-v1")


def test_a_remote_dataset_is_downloaded_by_minari(remote: list[str], monkeypatch: pytest.MonkeyPatch):
    remote.append(ID)
    asked: list[str] = []

    def download(dataset_id: str) -> None:
        asked.append(dataset_id)
        three()

    monkeypatch.setattr(minari, "download_dataset", download)
    assert len(load(ID)) == 9 and asked == [ID]
    load(ID)
    assert asked == [ID]  # local by now


def test_download_can_be_forbidden(remote: list[str]):
    remote.append(ID)
    with pytest.raises(UserError, match=r"nor remote \(not asked\)"):
        load(ID, download=False)


def test_a_failed_download_is_the_users_to_know(remote: list[str], monkeypatch: pytest.MonkeyPatch):
    remote.append(ID)

    def fail(dataset_id: str) -> None:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(minari, "download_dataset", fail)
    with pytest.raises(UserError, match="the download failed"):
        load(ID)


def test_a_silent_remote_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(minari_source, "REMOTE_SECONDS", 0.05)
    monkeypatch.setattr(minari_source, "get_cloud_storage", lambda: time.sleep(0.5))
    with pytest.raises(UserError, match=r"no answer in 0\.05 s"):
        load(ID)


# ---- the cache


def same(a: Transitions, b: Transitions) -> bool:
    return a.spec == b.spec and a.content_hash == b.content_hash


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one each time a dataset is converted."""
    calls: list[Path] = []
    convert: Callable[..., Any] = minari_source._convert

    def counted(data: Path, metadata: Any) -> Any:
        calls.append(data)
        return convert(data, metadata)

    monkeypatch.setattr(minari_source, "_convert", counted)
    return calls


def test_the_second_load_reads_the_cache(tmp_path: Path, conversions: list[Path], caplog: pytest.LogCaptureFixture):
    create(episode(2), episode(2))
    first = load(ID, tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        again = load(ID, tmp_path / "cache")
        assert same(again, first) and "content_hash" in vars(again)  # known, not computed over all of the log again
    assert len(conversions) == 1 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert "neither terminated nor truncated" in caplog.text  # warnings are repeated


@pytest.mark.parametrize("damage", ["cut", "flip", "version", "empty"])
def test_a_damaged_cache_is_rewritten(
    damage: str, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
):
    three()
    if damage == "version":
        with monkeypatch.context() as older:
            older.setattr(columns, "SCHEMA", 0)
            first = load(ID, tmp_path / "cache")
    else:
        first = load(ID, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    raw = file.read_bytes()
    if damage != "version":
        file.write_bytes({"cut": raw[:-9], "flip": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], "empty": b""}[damage])
    assert same(load(ID, tmp_path / "cache"), first) and len(conversions) == 2
    assert same(load(ID, tmp_path / "cache"), first) and len(conversions) == 2


def test_a_changed_dataset_is_converted_again(tmp_path: Path, conversions: list[Path]):
    three()
    load(ID, tmp_path / "cache")
    create(episode(5, truncated=True))
    assert len(load(ID, tmp_path / "cache")) == 5 and len(conversions) == 2


# ---- real data


def test_benchmark_data_reads_as_minari_reads_it_and_faster_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bench = os.environ.get("IPD_RAY_BENCH_DATA") or REAL_ROOT
    if not bench or not (Path(bench) / "bench/pendulum/medium-v0").is_dir():
        pytest.skip("no benchmark data: set IPD_RAY_BENCH_DATA to a folder that holds bench/pendulum/medium-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", bench)
    t = load("bench/pendulum/medium-v0", tmp_path / "cache")
    assert_equal_to_minari(t, minari.load_dataset("bench/pendulum/medium-v0"))
    assert same(load("bench/pendulum/medium-v0", tmp_path / "cache"), t)
    assert t.episode_return.mean() == pytest.approx(-524, abs=1)
