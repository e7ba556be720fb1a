"""Importing logs: what is read, what it becomes, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ipd_ray.data.importer import ImportedLog, parse_mapping, preview, read, write
from ipd_ray.data.minari_source import load
from ipd_ray.errors import UserError

BOUNDS: dict[str, Any] = {"action_low": -2.0, "action_high": 2.0}


def rows(**changes: Any) -> dict[str, Any]:
    """Episode 0: rows 0-2, terminated. Episode 1: rows 3-5, timed out. Episode 2: rows 6-7, timed out."""
    columns: dict[str, Any] = {
        "observations": np.arange(16, dtype=np.float32).reshape(8, 2),
        "actions": np.linspace(-1, 1, 8, dtype=np.float32)[:, None],
        "rewards": np.array([1, 2, 4, 8, 16, 32, 64, 128], np.float32),
        "terminals": np.array([0, 0, 1, 0, 0, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 0, 0, 1, 0, 1], bool),
    }
    return {name: column for name, column in {**columns, **changes}.items() if column is not None}


def following(observations: Any) -> Any:
    return observations + 2  # what arange(16) goes on with


def npz(folder: Path, **changes: Any) -> Path:
    path = folder / "log.npz"
    np.savez(path, **rows(**changes))
    return path


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def equal(a: ImportedLog, b: ImportedLog) -> bool:
    columns = ("observations", "actions", "rewards")
    return a.terminated == b.terminated and all(
        np.array_equal(x, y) for name in columns for x, y in zip(getattr(a, name), getattr(b, name), strict=True)
    )


# ---- what a log becomes


def test_without_next_observations_every_observation_is_a_logged_one(tmp_path: Path):
    log = read(npz(tmp_path), **BOUNDS)
    assert log.terminated == [True, False, False]
    assert [o.tolist() for o in log.observations] == [
        [[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]], [[12, 13], [14, 15]],
    ]
    # terminated: 1, 2 + 4, the return stays 7; truncated: 8, 16 and 64 without the last steps' 32 and 128
    assert [r.tolist() for r in log.rewards] == [[1, 6], [8, 16], [64]]
    assert [a.tolist() for a in log.actions] == [rows()["actions"][part].tolist() for part in np.s_[0:2, 3:5, 6:7]]
    said = " ".join(log.warnings)
    assert "1 last steps are merged into the ones before, which now terminate, rewards added undiscounted" in said
    assert "2 truncated episodes lack next_observations; their last step is left out" in said


def test_without_next_observations_a_single_step_is_dropped_with_a_word(tmp_path: Path):
    # episodes: row 0 alone, terminated; 1-2, terminated; 3-5; 6-7
    log = read(npz(tmp_path, terminals=np.array([1, 0, 1, 0, 0, 0, 0, 0], bool)), **BOUNDS)
    assert [r.tolist() for r in log.rewards] == [[6], [8, 16], [64]] and log.terminated == [True, False, False]
    assert "1 of 4 episodes are a single step, lack next_observations, and are dropped" in " ".join(log.warnings)
    assert "1 last steps are merged" in " ".join(log.warnings)
    with pytest.raises(UserError, match="all 8 episodes are a single step"):
        read(npz(tmp_path, terminals=np.ones(8, bool)), **BOUNDS)


def test_with_next_observations_nothing_is_lost(tmp_path: Path):
    log = read(npz(tmp_path, next_observations=following(rows()["observations"])), **BOUNDS)
    assert [len(r) for r in log.rewards] == [3, 3, 2]
    assert log.observations[0][-1].tolist() == [6, 7] and log.rewards[0].tolist() == [1, 2, 4]
    assert not any("lack next_observations" in note for note in log.warnings)


def test_termination_wins_over_a_timeout(tmp_path: Path):
    log = read(npz(tmp_path, timeouts=np.array([0, 0, 1, 0, 0, 1, 0, 1], bool)), **BOUNDS)
    assert log.terminated == [True, False, False]


def test_episode_ids_mark_ends(tmp_path: Path):
    log = read(npz(tmp_path, timeouts=None, episode_ids=np.array(list("aaabbbcc"))), **BOUNDS)
    assert [len(r) for r in log.rewards] == [2, 2, 1]
    assert not any("has no end" in note for note in log.warnings)


def test_a_last_episode_without_an_end_counts_as_truncated(tmp_path: Path):
    log = read(npz(tmp_path, timeouts=np.array([0, 0, 0, 0, 0, 1, 0, 0], bool)), **BOUNDS)
    assert len(log.rewards) == 3 and any("the last episode has no end" in note for note in log.warnings)


def test_rows_out_of_order_are_reported(tmp_path: Path):
    after = following(rows()["observations"])
    after[[0, 3]] += 5
    log = read(npz(tmp_path, next_observations=after), **BOUNDS)
    assert any("in 2 of 8 rows next_observations differ" in note for note in log.warnings)


def test_numbers_need_no_second_dimension(tmp_path: Path):
    log = read(npz(tmp_path, observations=np.arange(8), actions=np.linspace(-1, 1, 8)), **BOUNDS)
    assert log.observations[0].shape == (3, 1) and log.observations[0].dtype == np.float32
    assert log.actions[0].shape == (2, 1)


# ---- preview and write


def test_preview_sums_up_and_writes_nothing(tmp_path: Path, root: Path):
    summary = preview(read(npz(tmp_path, next_observations=following(rows()["observations"])), **BOUNDS))
    # returns 1 + 2 + 4 = 7; 8 + 16 + 32 = 56; 64 + 128 = 192; mean 85
    assert summary["return"] == {"mean": 85.0, "min": 7.0, "max": 192.0}
    assert (summary["episodes"], summary["steps"], summary["terminated"]) == (3, 8, 1)
    assert (summary["observation_shape"], summary["action_shape"]) == ([2], [1])
    assert (summary["action_low"], summary["action_bounds_from"]) == ([-2.0], "given")
    assert json.loads(json.dumps(summary)) == summary
    assert not root.exists()


def test_what_is_written_is_a_minari_dataset_that_loads(tmp_path: Path):
    log = read(npz(tmp_path), **BOUNDS)
    assert write(log, "my/log-v0", ref_min_score=0.0, ref_max_score=200.0) == "my/log-v0"
    t = load("my/log-v0")
    assert t.episode_length.tolist() == [2, 2, 1] and t.terminal.tolist() == [False, True, False, False, False]
    assert t.reward.tolist() == [1, 6, 8, 16, 64]
    assert t.action[0] == pytest.approx([-0.5])  # -1 of [-2, 2]
    assert t.spec.normalise(100.0) == 50.0 and t.spec.env_spec is None
    assert minari.load_dataset("my/log-v0").total_steps == 5


def test_a_dataset_is_not_written_over(tmp_path: Path):
    log = read(npz(tmp_path), **BOUNDS)
    write(log, "my/log-v0")
    with pytest.raises(UserError, match="dataset my/log-v0 exists"):
        write(log, "my/log-v0")


@pytest.mark.parametrize(
    ("name", "better"), [("my log", "my-log-v0"), ("a/b", "my/b-v0"), ("ab/c", "ab/c-v0"), ("../x-v0", "x-v0")]
)
def test_a_malformed_id_gets_a_proposal(name: str, better: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"use '{better}'"):
        write(read(npz(tmp_path), **BOUNDS), name)


def test_reference_scores_come_in_pairs(tmp_path: Path, root: Path):
    log = read(npz(tmp_path), **BOUNDS)
    pairs: tuple[dict[str, Any], ...] = ({"ref_min_score": 1.0}, {"ref_min_score": 2.0, "ref_max_score": 1.0})
    for scores in pairs:
        with pytest.raises(UserError, match="give both or none"):
            write(log, "my/log-v0", **scores)
    assert not root.exists()


# ---- action bounds and the environment


def test_bounds_from_the_data_come_with_a_warning(tmp_path: Path):
    log = read(npz(tmp_path))
    assert (log.action_low.tolist(), log.action_high.tolist(), log.bounds_from) == ([-1.0], [1.0], "data")
    assert any("--action-low" in note for note in log.warnings)


def test_bounds_from_the_environment(tmp_path: Path):
    path = npz(tmp_path, observations=np.zeros((8, 3), np.float32))
    log = read(path, env_id="Pendulum-v1")
    assert (log.action_high.tolist(), log.bounds_from) == ([2.0], "environment")
    write(log, "my/pendulum-v0")
    assert minari.load_dataset("my/pendulum-v0").recover_environment().spec.id == "Pendulum-v1"


def test_another_environments_log_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"observations have shape \(2,\), Pendulum-v1 has Box"):
        read(npz(tmp_path), env_id="Pendulum-v1")


def test_an_unknown_environment_gets_near_names(tmp_path: Path):
    with pytest.raises(UserError, match=r"Did you mean 'Pendulum-v1'.*name the module .*\(package:Pendulun-v1\)"):
        read(npz(tmp_path), env_id="Pendulun-v1")


def test_the_package_that_registers_an_environment_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = "gymnasium.envs.classic_control:Continuous_MountainCarEnv"
    (tmp_path / "ipd_test_cars.py").write_text(
        f"import gymnasium\n\ngymnasium.register('IpdTestCar-v0', entry_point='{entry}')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    log = read(npz(tmp_path), env_id="ipd_test_cars:IpdTestCar-v0")
    assert entry in str(log.env_spec) and log.bounds_from == "environment"
    with pytest.raises(UserError, match=r"not known to Gymnasium .*no_such_cars"):
        read(npz(tmp_path), env_id="no_such_cars:IpdTestCar-v0")


def test_actions_beyond_the_bounds_are_counted(tmp_path: Path):
    log = read(npz(tmp_path), action_low=-0.5, action_high=0.5)
    # linspace(-1, 1, 8): steps of 2/7; |a| > 0.5 at 1, 5/7 on either side
    assert any("4 of 8 actions lie outside the bounds (given)" in note for note in log.warnings)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"action_low": 0.0}, "give both or none"),
        ({"action_low": 1.0, "action_high": -1.0}, "low below high"),
        ({"action_low": [-1.0, -1.0], "action_high": 1.0}, "give one number, or 1"),
        ({"action_low": -np.inf, "action_high": 1.0}, "must be finite"),
    ],
)
def test_bounds_that_cannot_be_are_refused(bounds: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        read(npz(tmp_path), **bounds)


def test_a_constant_action_has_no_bounds_in_the_data(tmp_path: Path):
    with pytest.raises(UserError, match=r"action dimension 0 \(data\) are \[1, 1\]"):
        read(npz(tmp_path, actions=np.ones((8, 1))))


# ---- file formats


def test_parquet_takes_lists_tensors_and_numbered_columns(tmp_path: Path):
    columns = rows()
    flat = {name: columns[name] for name in ("rewards", "terminals", "timeouts")}
    observations, actions = columns["observations"], columns["actions"]
    fixed = pyarrow.FixedSizeListArray.from_arrays(observations.ravel(), 2)
    tensor = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(observations)
    numbered = {"observations_0": observations[:, 0], "observations_1": observations[:, 1], "actions_0": actions[:, 0]}
    lists: dict[str, Any] = {"actions": actions.tolist(), **flat}
    reference = read(npz(tmp_path), **BOUNDS)
    for index, table in enumerate(
        [
            {"observations": observations.tolist(), **lists},
            {"observations": fixed, **lists},
            {"observations": tensor, **lists},
            {**numbered, **flat},
        ]
    ):
        path = tmp_path / f"{index}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=3)
        assert equal(read(path, **BOUNDS), reference)


def test_a_folder_of_parquet_parts_is_one_log(tmp_path: Path):
    columns = rows()
    parts = tmp_path / "parts"
    parts.mkdir()
    for index, part in enumerate((slice(0, 5), slice(5, 8))):
        table = {name: column[part].tolist() for name, column in columns.items()}
        pyarrow.parquet.write_table(pyarrow.table(table), parts / f"{index}.parquet")
    assert equal(read(parts, **BOUNDS), read(npz(tmp_path, actions=columns["actions"].astype(float)), **BOUNDS))


@pytest.mark.parametrize("after", [None, following(rows()["observations"])], ids=["without", "with next_observations"])
def test_d4rls_hdf5(after: Any, tmp_path: Path):
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        for name, column in rows(next_observations=after).items():
            file[name] = column
        file["infos/qpos"] = np.zeros((8, 3))
    log = read(tmp_path / "d4rl.hdf5", **BOUNDS)
    assert equal(log, read(npz(tmp_path, next_observations=after), **BOUNDS))
    assert log.terminated == [True, False, False]
    assert [len(r) for r in log.rewards] == ([2, 2, 1] if after is None else [3, 3, 2])


def test_names_are_mapped(tmp_path: Path):
    columns = rows()
    path = tmp_path / "log.npz"
    np.savez(path, **{"obs": columns.pop("observations"), "trunc": columns.pop("timeouts"), **columns})
    mapping = parse_mapping("observations=obs, timeouts=trunc")
    assert mapping == {"observations": "obs", "timeouts": "trunc"}
    assert len(read(path, mapping=mapping, **BOUNDS).rewards) == 3


def test_gymnasiums_names_need_no_mapping(tmp_path: Path):
    columns = rows()
    path = tmp_path / "log.npz"
    np.savez(path, terminations=columns.pop("terminals"), truncations=columns.pop("timeouts"), **columns)
    assert len(read(path, **BOUNDS).rewards) == 3


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"observations": None, "observation": np.zeros((8, 2))},
            "Did you mean 'observation'.* --map observations=COL",
        ),
        ({"actions": np.zeros((7, 1))}, "actions has 7 rows, rewards have 8"),
        (
            {"rewards": np.array([0, 1, np.nan, 3, 4, 5, np.nan, 7])},
            "rewards is NaN or infinite in 2 of 8 rows, .*row 2",
        ),
        ({"terminals": np.full(8, 2.0)}, "terminals must be true or false"),
        ({"terminals": np.zeros(8, bool), "timeouts": None}, "no episode ends within 8 rows: add a column of timeouts"),
        (
            {"terminals": np.arange(8) == 7, "timeouts": None},
            "a single episode, of 8 rows: log at least 2",
        ),
        (
            {"episode_ids": np.array([0, 7, 0, 7, 0, 7, 0, 7])},
            "episode_ids 0 of row 0 comes back in row 2, .*sort them by episode and step",
        ),
        ({"rewards": None, "rew": np.zeros(8)}, "Did you mean 'rew'"),
        ({"terminals": None, "done": np.zeros(8)}, "Did you mean 'done'.* --map terminals=COLUMN"),
        ({"actions": np.arange(8)}, "actions are int64, must be floating point"),
        ({"observations": np.zeros((8, 4, 4), np.uint8)}, "are images"),
        ({"observations": np.full((8, 2), "x")}, "must be numbers"),
        ({"next_observations": np.zeros((8, 3))}, "they must be equal"),
        ({"rewards": np.zeros((8, 2))}, r"rewards has shape \(8, 2\), must be \(8,\)"),
        ({name: column[:0] for name, column in rows().items()}, "there is no row"),
    ],
)
def test_a_log_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        read(npz(tmp_path, **changes), **BOUNDS)


@pytest.mark.parametrize(("ids", "message"), [
    (list("abababab"), "episode_ids 'a' of row 0 comes back in row 2, .*sort them"),
    (list("abcdefgh"), "all 8 episodes are a single step"),
])
def test_ids_may_be_text(ids: list[str], message: str, tmp_path: Path):
    columns = {name: column.tolist() for name, column in rows(timeouts=None, terminals=np.zeros(8, bool)).items()}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "episode_ids": ids}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "log.parquet", **BOUNDS)


def test_files_grouped_by_episode_are_told_from_a_typo(tmp_path: Path):
    with h5py.File(tmp_path / "log.h5", "w") as file:
        for episode in range(3):
            for name, column in rows().items():
                file[f"episode_{episode}/{name}"] = column
    with pytest.raises(UserError, match=r"observations lie in 3 groups \(episode_0, episode_1, .*join them"):
        read(tmp_path / "log.h5", **BOUNDS)


def test_an_id_that_comes_back_after_many_rows_is_another_episode(tmp_path: Path):
    log = read(npz(tmp_path, timeouts=None, episode_ids=np.array([0, 0, 0, 1, 1, 1, 0, 0])), **BOUNDS)
    assert log.terminated == [True, False, False]  # two files, each counted from 0, were joined


def test_pickles_are_never_opened(tmp_path: Path):
    path = tmp_path / "log.npz"
    np.savez(path, **rows(observations=np.array([{}] * 8, dtype=object)))
    with pytest.raises(UserError, match="Save plain arrays of numbers"):
        read(path, **BOUNDS)


def test_lists_of_unequal_length_are_refused(tmp_path: Path):
    table = {name: column.tolist() for name, column in rows().items()}
    table["observations"][3] = [1.0]
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "log.parquet")
    with pytest.raises(UserError, match="lists of column observations must all have one length"):
        read(tmp_path / "log.parquet", **BOUNDS)


def test_empty_cells_are_refused(tmp_path: Path):
    table = {name: column.tolist() for name, column in rows().items()}
    table["rewards"][3] = None
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "log.parquet")
    with pytest.raises(UserError, match="column rewards is empty in 1 of 8 rows"):
        read(tmp_path / "log.parquet", **BOUNDS)


def test_a_gap_in_numbered_columns_is_refused(tmp_path: Path):
    columns = {name: column.tolist() for name, column in rows(observations=None).items()}
    table = pyarrow.table({**columns, "observations_0": [0.0] * 8, "observations_2": [0.0] * 8})
    pyarrow.parquet.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(UserError, match="numbered without gaps"):
        read(tmp_path / "log.parquet", **BOUNDS)


@pytest.mark.parametrize(
    ("name", "message"),
    [("log.csv", "must be one of .npz"), ("broken.npz", "cannot be read"), ("none.npz", "not exist")],
)
def test_files_that_cannot_be_read_are_named(name: str, message: str, tmp_path: Path):
    if name != "none.npz":
        (tmp_path / name).write_text("a,b")
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_an_unknown_field_in_the_mapping_gets_a_near_name(tmp_path: Path):
    with pytest.raises(UserError, match="Did you mean 'observations'"):
        read(npz(tmp_path), mapping={"observation": "obs"})
    with pytest.raises(UserError, match="must have the form field=column"):
        parse_mapping("observations")
