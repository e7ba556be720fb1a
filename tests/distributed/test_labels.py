"""Node labels: imagination on some nodes, distillation on others, of a cluster of three raylets on this machine."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ipd_ray.testing import LocatedJob

pytestmark = pytest.mark.ray

SCRIPT = """
import json, os, pickle, ray
from ray.cluster_utils import Cluster
from ipd_ray.config import RuntimeConfig
from ipd_ray.distributed.engine import RayEngine
from ipd_ray.engine import Task
from ipd_ray.errors import UserError

def engine(**fields):
    return RayEngine(RuntimeConfig(engine="ray", train_threads=1, **fields), "cpu")

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = {name: cluster.add_node(num_cpus=2, labels={"ray.io/market-type": name}) for name in ("spot", "on-demand")}
raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in nodes.items()}
ray.init(address=cluster.address, log_to_driver=False)
chosen = engine(actor_labels="ray.io/market-type=spot", worker_labels="ray.io/market-type=on-demand")
found, sizes = {}, []
tasks = [Task(f"where {i}", os.getenv, {"key": "RAY_RAYLET_PID"}) for i in range(6)]
chosen.map_shards(tasks, found.__setitem__, lambda: sizes.append(len(chosen._pool)))
chosen.distill(pickle.load(open("job", "rb")), lambda: None)
chosen.close()
refused = []
for field in ("actor_labels", "worker_labels"):
    try:
        engine(**{field: "ray.io/market-type=reserved"})
    except UserError as error:
        refused.append(str(error))
print(json.dumps({"raylets": raylets, "found": sorted(set(found.values())), "most": max(sizes), "refused": refused}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_work_goes_where_the_labels_say_and_labels_nobody_has_are_refused(tiny_method, tmp_path: Path):
    """In a process of its own: this one may be connected to another cluster."""
    (tmp_path / "found").mkdir()
    job = tiny_method.job(tmp_path / "work", LocatedJob, found=str(tmp_path / "found"))
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["found"] == [str(said["raylets"]["spot"])]
    assert said["most"] == 2  # the CPUs of the node that counts, not of both
    assert [path.name for path in (tmp_path / "found").iterdir()] == [str(said["raylets"]["on-demand"])]
    assert (tmp_path / "work" / "result.json").exists()
    for field, message in zip(("actor_labels", "worker_labels"), said["refused"], strict=True):
        assert message.startswith(f"runtime.{field}=ray.io/market-type=reserved: no node has these labels, there are ")
        assert "ray.io/market-type=on-demand, ray.io/market-type=spot: start one with" in message
