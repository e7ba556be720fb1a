"""The demo log is mediocre, varied, and the same every time."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import minari
import numpy as np
import pytest

from ipd_ray.data.demo import CEILING, DEMO_ID, EPISODES, demo_root, make_demo
from ipd_ray.data.minari_source import load
from ipd_ray.data.transitions import Transitions


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def demo(root: Path, monkeypatch: pytest.MonkeyPatch) -> Transitions:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return load("demo")


def test_no_episode_is_good(demo: Transitions):
    assert demo.episodes == EPISODES and len(demo) == 200 * EPISODES
    assert demo.episode_return.max() <= CEILING
    assert demo.episode_return.mean() <= -500


def test_good_parts_are_there(demo: Transitions):
    # Upright (cos > 0.95) and slow, for a second on end, in a third of the episodes at least.
    still = (demo.observation[:, 0] > 0.95) & (np.abs(demo.observation[:, 2]) < 1.0)
    held = [np.convolve(still[demo.episode == e], np.ones(20), mode="valid").max() == 20 for e in range(demo.episodes)]
    assert np.mean(held) > 1 / 3
    assert np.histogram(demo.action, 10, (-1, 1))[0].min() > 0.02 * len(demo)


def test_nothing_terminates(demo: Transitions):
    assert not demo.terminal.any()


def test_it_is_a_plain_minari_dataset_with_reference_scores(demo: Transitions):
    dataset = minari.load_dataset(DEMO_ID)
    assert dataset.env_spec.id == "Pendulum-v1"
    assert minari.get_normalized_score(dataset, np.array([-150.0])) == pytest.approx(1.0)
    assert demo.spec.normalise(-1200.0) == 0.0


def test_the_same_seed_makes_the_same_log(demo: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_demo(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert load(DEMO_ID).content_hash == demo.content_hash


def test_it_is_made_once(demo: Transitions, root: Path):
    metadata = root / DEMO_ID / "data" / "metadata.json"
    before = metadata.stat().st_mtime_ns
    started = time.perf_counter()
    assert make_demo(root) == DEMO_ID
    assert metadata.stat().st_mtime_ns == before and time.perf_counter() - started < 0.1


def test_another_seed_replaces_it(tmp_path: Path):
    make_demo(tmp_path, seed=0)
    make_demo(tmp_path, seed=1)
    assert json.loads((tmp_path / DEMO_ID / "data" / "metadata.json").read_text())["demo_seed"] == 1


def test_it_lies_in_the_working_folder_where_no_root_is_set_or_the_root_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    assert demo_root() == tmp_path / "demo" / "minari"
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(shared))
    assert demo_root() == shared
    shared.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert demo_root() == tmp_path / "demo" / "minari"
