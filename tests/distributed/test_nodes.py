"""Every node is asked, each for itself: what one cannot do, import or say in time is told of that one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import LOG, SETTINGS, write_log

from ipd_ray import testing

pytestmark = pytest.mark.ray

PROGRAM = '''
import json, sys
from ray.cluster_utils import Cluster

root, log, *settings = sys.argv[1:]
if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    for env in ({}, {"IPD_RAY_TEST_READ_ONLY": "1"}, {"PYTHONPATH": f"{root}/broken"}):
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, env_vars=env)
    from ipd_ray import testing
    from ipd_ray.config import load
    from ipd_ray.doctor import examine

    config = load(overrides=[*settings, "runtime.engine=ray", f"runtime.address={cluster.address}", "runtime.actors=9"])
    report = examine(log, config, f"{root}/runs/mine", probe=testing.probe_where_writable)
    print(json.dumps(report.document()))
    cluster.shutdown()
'''


@pytest.mark.slow
def test_what_one_node_cannot_do_is_told_of_that_node(tmp_path: Path) -> None:
    """Three nodes with a CPU each: one is well, one cannot write, one has a broken ipd_ray; nine actors never fit."""
    (tmp_path / "broken" / "ipd_ray").mkdir(parents=True)
    (tmp_path / "broken" / "ipd_ray" / "__init__.py").write_text("raise ImportError('an old image')\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    write_log(tmp_path / "minari")
    done = subprocess.run(
        [sys.executable, "program.py", str(tmp_path), LOG, *SETTINGS], cwd=tmp_path, capture_output=True, text=True,
        timeout=200, env={**os.environ, "MINARI_DATASETS_PATH": str(tmp_path / "minari")},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    wrong = {(f["check"], f["level"]): f["text"] for f in report["findings"] if f["level"] != "ok"}
    assert sorted(wrong) == [
        ("answer", "error"), ("calibration", "warning"), ("fit", "warning"), ("storage", "error")
    ], report["findings"]
    assert "an old image" in wrong["answer", "error"]
    assert "an old image" in wrong["calibration", "warning"] and "those of 2 nodes" in wrong["calibration", "warning"]
    assert all(row["seconds"] > 0 for row in report["plan"]["steps"])
    assert "Permission denied" in wrong["storage", "error"]
    assert "runtime.actors=9, but at most 3" in wrong["fit", "warning"]
    assert report["exit_code"] == 2
    assert sorted(m["cpus"] for m in report["machines"]) == [0, 1, 1, 1]
    assert not (tmp_path / "runs").exists()


def test_node_that_does_not_answer_in_time_is_named(ray_cluster: str) -> None:
    from ipd_ray.distributed.nodes import members, on_every_node

    [member] = members()
    assert on_every_node(testing.square, 3) == {member.id: 9}
    [late] = on_every_node(testing.square, 3, 600.0, seconds=1.0).values()
    assert isinstance(late, TimeoutError) and member.name in str(late)
    [failed] = on_every_node(testing.fail, "no disk").values()
    assert "no disk" in str(failed)
