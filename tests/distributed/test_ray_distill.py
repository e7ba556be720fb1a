"""Step 5 on Ray Train: the policy of one process, bit for bit; the same losses from two; no step lost with a worker."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipd_ray.artifacts import read_jsonl
from ipd_ray.config import RuntimeConfig
from ipd_ray.errors import TaskError
from ipd_ray.steps import DistillJob, run_distill
from ipd_ray.testing import ElasticJob, MortalJob, SlowJob

pytestmark = pytest.mark.ray
STEPS = list(range(3, 61, 3))


def on_ray(job: DistillJob, workers: int = 1, **more: int) -> None:
    from ipd_ray.distributed.distill import distill

    distill(job, (workers, workers), lambda: None, **more)


def digest(work: Path) -> str:
    return str(json.loads((work / "result.json").read_text())["digest"])


def losses(work: Path) -> np.ndarray:
    return np.array([row["imitation"] for row in read_jsonl(work / "metrics.jsonl")])


def steps(work: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(work / "metrics.jsonl")]


@pytest.fixture(scope="module")
def local(tiny_method, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the local engine makes, undisturbed."""
    work = tmp_path_factory.mktemp("local")
    job = tiny_method.job(work)
    run_distill(job.work, job.place, job)
    return work


def test_plans_are_distilled_in_these_tests(local: Path):
    assert json.loads((local / "result.json").read_text())["diagnostics"]["imagined_ratio"] > 0


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "killed"])
def test_two_workers_learn_as_one(ray_cluster, tiny_method, local: Path, tmp_path: Path, killed: bool):
    """Updates agree with one to rounding, dropout and all, though the second is killed at update 32."""
    work, died = tmp_path / "work", tmp_path / "died"
    mortal: dict[str, Any] = {"kind": MortalJob, "marker": str(died), "rank": 1, "step": 32} if killed else {}
    on_ray(tiny_method.job(work, every=1e-6, **mortal), workers=2)
    assert died.exists() == killed
    assert steps(work) == STEPS
    np.testing.assert_allclose(losses(work)[:17], losses(local)[:17], rtol=1e-4)  # 50 updates
    np.testing.assert_allclose(losses(work)[-1], losses(local)[-1], rtol=0.02)
    one, other = (json.loads((path / "result.json").read_text())["diagnostics"] for path in (work, local))
    assert one.pop("imagined") == other.pop("imagined")
    assert one == pytest.approx(other, rel=0.02)  # of these two are sums over both workers' parts of the log


def is_that_of(work: Path, local: Path) -> None:
    """Curve, policy and names of files are the same."""
    assert steps(work) == STEPS
    assert losses(work).tolist() == losses(local).tolist()
    assert digest(work) == digest(local)
    assert sorted(p.name for p in work.iterdir()) == sorted(p.name for p in local.iterdir())  # nothing of Ray is left


def test_one_worker_is_the_local_engine_bit_for_bit_though_it_is_killed(
    ray_cluster: str, tiny_method, local: Path, tmp_path: Path
):
    from ipd_ray.distributed.engine import RayEngine

    work, died = tmp_path / "work", tmp_path / "died"
    engine = RayEngine(RuntimeConfig(engine="ray", train_threads=1), "cpu")
    engine.distill(tiny_method.job(work, MortalJob, every=1e-6, marker=str(died), rank=0, step=44), lambda: None)
    assert died.exists()
    is_that_of(work, local)


@pytest.mark.slow
def test_a_new_driver_goes_on_where_one_was_killed(ray_cluster: str, tiny_method, local: Path, tmp_path: Path):
    """Killed near update 18."""
    work = tmp_path / "work"
    (tmp_path / "job").write_bytes(pickle.dumps(tiny_method.job(work, SlowJob, every=1e-6, seconds=0.1)))
    script = (
        "import pickle, ray\n"
        f"ray.init(address={ray_cluster!r}, log_to_driver=False)\n"
        "from ipd_ray.distributed.distill import distill\n"
        "distill(pickle.load(open('job', 'rb')), (1, 1), lambda: None)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    try:
        end = time.monotonic() + 90.0
        while len(steps(work)) < 6 and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    seen = {row["step"]: row["time"] for row in read_jsonl(work / "metrics.jsonl")}
    assert 6 <= len(seen) <= 13 and not (work / "result.json").exists()
    on_ray(tiny_method.job(work, every=1e-6))
    is_that_of(work, local)
    kept = [row["step"] for row in read_jsonl(work / "metrics.jsonl") if seen.get(row["step"]) == row["time"]]
    assert len(kept) >= 3  # it went on, rather than start again


def test_a_corpus_that_cannot_be_made_is_told_and_no_worker_starts(ray_cluster, tiny_method, tmp_path: Path):
    job = replace(tiny_method.job(tmp_path / "work"), values=str(tmp_path / "nowhere"))
    with pytest.raises(TaskError, match="nowhere"):
        on_ray(job)
    assert not (tmp_path / "work" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_come_and_go_with_the_nodes_and_the_curve_stays_whole(tiny_method, local: Path, tmp_path: Path):
    """One of at most two workers starts; a node comes before update 20, and is gone before update 40."""
    job = tiny_method.job(tmp_path / "work", ElasticJob, every=1e-6, gates={20: 2, 40: 1})
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    script = (
        "import pickle, ray\n"
        "from pathlib import Path\n"
        "from ray.cluster_utils import Cluster\n"
        "from ipd_ray.distributed.distill import distill\n"
        "node = {'num_cpus': 1, 'object_store_memory': 80 * 2**20}\n"
        "cluster = Cluster(initialize_head=True, head_node_args={**node, 'include_dashboard': False})\n"
        "ray.init(address=cluster.address, log_to_driver=False, logging_level='WARNING')\n"
        "job, nodes = pickle.load(open('job', 'rb')), []\n"
        "def tick():\n"
        "    curve = Path(job.work) / 'metrics.jsonl'\n"
        "    lines = curve.read_text().count('\\n') if curve.exists() else 0\n"
        "    if lines >= 6 and not nodes:\n"
        "        nodes.append(cluster.add_node(**node))\n"
        "    if lines >= 13 and nodes[0]:\n"
        "        cluster.remove_node(nodes[0], allow_graceful=False)\n"
        "        nodes[0] = None\n"
        "distill(job, (1, 2), tick)\n"
        "ray.shutdown()\n"
        "cluster.shutdown()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    assert steps(work) == STEPS
    np.testing.assert_allclose(losses(work)[:17], losses(local)[:17], rtol=1e-4)
    assert sorted(p.name for p in work.iterdir()) == sorted(p.name for p in local.iterdir())


@pytest.mark.slow
def test_failing_distillation_ends_with_its_traceback(ray_cluster, tiny_method, tmp_path: Path):
    job = tiny_method.job(tmp_path / "work", MortalJob, marker="/nowhere/died", rank=0, step=1)
    with pytest.raises(TaskError, match=r"FileNotFoundError: .*nowhere/died"):
        on_ray(job, failures=0)
