"""Machines that come and go: what is killed on a cluster of several raylets changes no shard, no step and no policy."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import drill
import pytest
from nodes import Nodes, driver_environment

pytestmark = pytest.mark.ray
SHORT = (*drill.SETTINGS, "select.starts=96", "values.updates=100", "world_model.max_updates=50")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of one undisturbed run's rounds lie."""
    return tmp_path_factory.mktemp("drill")


def test_a_round_has_every_kind_of_kill_and_its_number_decides_the_moments():
    kills = drill.draw(random.Random(3))
    assert [kill.what for kill in kills] == list(drill.KINDS)
    assert kills == drill.draw(random.Random(3)) != drill.draw(random.Random(4))
    assert {kill.what for kill in drill.draw(random.Random(3), "imagine")} == {"actor", "node", "driver"}


def test_comparison_sees_a_changed_shard():
    wanted = {"shards": ["a", "b"], "policy": "p"}
    assert drill.compare({"shards": ["a", "c"], "policy": "p"}, wanted) == {"shards": False, "policy": True}


@pytest.mark.slow
def test_actor_node_and_driver_lost_during_imagination_leave_the_same_shards(nodes: Nodes, root: Path):
    found = drill.round_(nodes, root, 1, "imagine", SHORT)
    assert found["same"] == {"dataset": True, "shards": True}
    assert not found["missed"] and {kill["what"] for kill in found["killed"]} == {"actor", "node", "driver"}


@pytest.mark.slow
def test_round_of_the_drill_ends_in_the_same_policy(nodes: Nodes, root: Path):
    found = drill.round_(nodes, root, 0)
    assert found["same"] == dict.fromkeys(("dataset", "shards", "steps", "losses", "policy"), True)
    assert not found["missed"] and len(found["killed"]) == 4


@pytest.mark.slow
def test_autoscaler_brings_nodes_under_load_and_takes_them_away_after(tmp_path: Path):
    """In a process of its own: this one may be connected elsewhere."""
    script = Path(drill.__file__).with_name("autoscale.py")
    words = [sys.executable, str(script), "--nodes", "2", "--shards", "16", "--work", str(tmp_path / "work")]
    said = subprocess.run([*words, "--out", str(tmp_path)], env=driver_environment(), capture_output=True, text=True,
                          timeout=240)
    assert said.returncode == 0, said.stderr
    rows = json.loads((tmp_path / "autoscale.json").read_text())["timeline"]
    assert rows[0]["nodes"] == 0 and max(row["nodes"] for row in rows) == 2 and rows[-1]["nodes"] == 0
    assert max(row["actors"] for row in rows) == 2 and rows[-1]["shards_done"] == 16
