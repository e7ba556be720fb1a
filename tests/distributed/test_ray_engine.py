"""The engine on Ray: shards equal those of local processes bit for bit; what can never run is refused beforehand."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import LOG, SETTINGS, OneProcess, ipd_ray, write_log

from ipd_ray import api, run, testing
from ipd_ray.artifacts import Artifact
from ipd_ray.config import RuntimeConfig, load
from ipd_ray.engine import Engine, LocalEngine, Task
from ipd_ray.errors import TaskError, UserError
from ipd_ray.runs import RunFolder

pytestmark = pytest.mark.ray


def ray_engine(**fields: object) -> Engine:
    from ipd_ray.distributed.engine import RayEngine

    return RayEngine(RuntimeConfig.model_validate({"engine": "ray", **fields}), "cpu")


def test_shards_are_equal_whoever_imagines_them(ray_cluster, tiny_method, tmp_path: Path):
    engines: dict[str, Callable[[], Engine]] = {
        "local": lambda: LocalEngine(2), "one": lambda: ray_engine(actors=1), "two": lambda: ray_engine(actors=2),
    }
    digests: dict[str, dict[int, str]] = {}
    for name, make in engines.items():
        engine, entries = make(), {}
        tasks = tiny_method.shard_tasks(tmp_path / name)
        assert len(tasks) == 4
        assert not engine.map_shards(tasks, entries.__setitem__, lambda: None)
        engine.close()
        digests[name] = {i: entry["digest"] for i, entry in entries.items()}
    assert len(set(digests["local"].values())) == 4
    assert digests["one"] == digests["local"] and digests["two"] == digests["local"]


def test_steps_run_side_by_side_and_one_that_is_killed_is_done_again(ray_cluster, tmp_path: Path):
    engine = ray_engine()
    tasks = [
        Task("values", testing.die_once, {"value": 3, "marker": str(tmp_path / "died")}),
        Task("world model", testing.square, {"value": 2}),
    ]
    engine.run_steps(tasks, lambda: None)
    assert (tmp_path / "died").exists()
    with pytest.raises(TaskError, match="values failed:"):
        engine.run_steps([Task("values", testing.fail, {"message": "no such column"})], lambda: None)
    engine.close()


@pytest.mark.slow
def test_two_runs_at_once_share_the_cluster_and_come_to_what_each_comes_to_alone(ray_cluster: str, tmp_path: Path):
    """Two CPUs, and each run asks for both, for its actors and for its distillation: neither waits for ever."""
    write_log(tmp_path)
    common = ["runtime.engine=ray", f"runtime.address={ray_cluster}", "runtime.actors=2", "runtime.workers=2"]
    runs = {f"{seed}": [f"seed={seed}", "ablations=[]", *SETTINGS] for seed in (0, 1)}
    started = {
        name: ipd_ray("run", LOG, *words, *common, "--run-dir", f"ray/{name}", cwd=tmp_path,
                      MINARI_DATASETS_PATH=str(tmp_path))
        for name, words in runs.items()
    }
    for process in started.values():
        _, said = process.communicate(timeout=280)
        assert process.returncode == 0, said
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        for name, words in runs.items():
            run(LOG, load(overrides=words), run_dir=tmp_path / "local" / name, until="imagine")
            found, alone = (RunFolder(tmp_path / where / name).artifact("imagine") for where in ("ray", "local"))
            assert Artifact(found).digest == Artifact(alone).digest
            assert RunFolder(tmp_path / "ray" / name).artifact("evaluate")


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize(
    ("until", "made"),
    [("imagine", ("actor", "imagine")), pytest.param("distill", ("walk:1", "distill"), marks=pytest.mark.slow)],
)
def test_what_comes_of_an_actor_is_the_same_whoever_makes_it(
    until: str, made: tuple[str, ...], ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_log(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    words = [
        *SETTINGS, "planner.kind=actor", "actor.reaches=[0.2]", "actor.rounds=2", "actor.starts=20", "actor.length=5",
        "actor.value_updates=4", "actor.updates=4", "correct.walks=4", "correct.length=6", "correct.rounds=1",
        "choose.without_imagination=false",
    ]  # fmt: skip
    here, there = tmp_path / "here", tmp_path / "there"
    with monkeypatch.context() as patch:
        patch.setattr(api, "make_engine", lambda *_: OneProcess())
        run(LOG, load(overrides=words), run_dir=here / "run", until="world_model")
        shutil.copytree(here / "store", there / "store")
        run(LOG, load(overrides=words), run_dir=here / "run", until=until)
    on_ray = ["runtime.engine=ray", f"runtime.address={ray_cluster}", "runtime.actors=1"]
    run(LOG, load(overrides=[*words, *on_ray]), run_dir=there / "run", until=until)
    for part in made:
        one, other = (Artifact(RunFolder(place / "run").artifact(part)) for place in (here, there))
        assert one.digest == other.digest, part


def test_interrupt_leaves_nothing_running(ray_cluster, tiny_method, tmp_path: Path):
    """Ctrl-C arrives in a tick; afterwards the cluster is free again. Ticks before saw who was up, and who was not."""
    import ray

    pid, crews = tmp_path / "pid", []

    def interrupt() -> None:
        crews.append(engine.crew())
        if (tmp_path / "work" / "metrics.jsonl").exists() or pid.exists():
            raise KeyboardInterrupt

    engine = ray_engine(train_threads=1)
    with pytest.raises(KeyboardInterrupt):
        engine.run_steps([Task("long", testing.write_pid, {"path": str(pid), "seconds": 600.0})], interrupt)
    assert crews[0] == (0, 1) and crews[-1] == (1, 0)
    pid.unlink()
    crews.clear()
    with pytest.raises(KeyboardInterrupt):
        engine.distill(tiny_method.job(tmp_path / "work", testing.SlowJob, seconds=0.5), interrupt)
    assert crews[0] == (0, 1) and crews[-1] == (1, 0) and engine.crew() == (0, 0)
    engine.close()
    end = time.monotonic() + 20.0
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < end:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0
    assert ray.is_initialized()  # the cluster was not the engine's to stop


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": 8, "min_workers": 3}, r"runtime\.min_workers=3 must be at most 2: each takes 1 CPU"),
        ({"workers": 3}, r"runtime\.workers=3 must be at most 2: each takes 1 CPU, the cluster has 2 CPUs.*on 1 node"),
        ({"workers": 2, "train_threads": 2}, r"runtime\.workers=2 must be at most 1: each takes 2 CPUs.*train_threads"),
        ({"threads": 3}, r"runtime\.threads=3 must be at most 2, the CPUs of the largest node"),
    ],
)
def test_what_the_cluster_can_never_give_is_refused(ray_cluster, fields: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        ray_engine(**fields)


def test_gpu_that_is_not_there_is_refused(ray_cluster):
    from ipd_ray.distributed.engine import RayEngine

    with pytest.raises(UserError, match=r"runtime\.device=cuda needs a GPU .* and 0 GPUs on 1 node"):
        RayEngine(RuntimeConfig(engine="ray"), "cuda")


def test_address_without_a_cluster_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    """In a process of its own: this one is connected."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    script = (
        "from ipd_ray.distributed.cluster import connect\nfrom ipd_ray.errors import UserError\n"
        "for address in ('127.0.0.1:1', 'auto'):\n"
        "    try:\n        connect(address)\n    except UserError as error:\n        print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60).stdout
    assert said.count("ray start") == 2
    assert said.startswith("runtime.address='127.0.0.1:1': no Ray cluster can be joined there (")
    assert "runtime.address='auto': no Ray cluster can be joined at 127.0.0.1:1 (" in said


def test_relative_paths_are_refused(ray_cluster, tiny_method):
    engine = ray_engine()
    with pytest.raises(ValueError, match="must be an absolute path"):
        engine.run_steps([Task("values", testing.square, {"work": "runs/x"})], lambda: None)
    engine.close()


def test_threads_share_the_cores_among_the_workers():
    from ipd_ray.distributed.cluster import Cluster, Node

    cluster = Cluster((Node(8, 1), Node(4, 0)), autoscaled=False)
    # threads t a worker, floor(8 / t) + floor(4 / t) workers fit
    assert [cluster.threads(w, 0.0) for w in (1, 2, 3, 6, 12, 13)] == [8, 4, 4, 2, 1, 1]
    assert cluster.threads(1, 1.0) == 8
    assert cluster.slots(1, 0.5) == 2
    assert Cluster((Node(64, 2),), autoscaled=False).slots(1, 0.3) == 6  # three to a GPU, none across two


def test_demand_doubles_an_autoscaled_cluster_within_what_the_user_allows():
    from ipd_ray.distributed.engine import most_actors

    def most(room: int, autoscaled: bool, **fields: int) -> int:
        return most_actors(RuntimeConfig(engine="ray", **fields), room, autoscaled)

    assert [most(room, True) for room in (0, 8, 16, 40)] == [16, 24, 32, 80]
    assert [most(room, False) for room in (0, 8)] == [0, 8]
    assert most(8, True, actors=3) == 3 and most(8, False, actors=30) == 30
    assert most(2, False, min_actors=4) == 4
