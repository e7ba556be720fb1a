"""Sweeps on Ray Tune: shared work once, kills and resumes, failures kept, trials ended midway, rooms refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from small_runs import LOG, SETTINGS, write_log

from ipd_ray.config import build, load, parse_overrides
from ipd_ray.errors import UserError
from ipd_ray.progress import Listeners
from ipd_ray.runs import RunFolder
from ipd_ray.sweep import Question, Range, Sweep

pytestmark = pytest.mark.ray
COMMON = {**parse_overrides(SETTINGS), "choose.without_imagination": False, "runtime.train_threads": 1}
SHARED = ("values", "world_model", "imagine")


@pytest.fixture(scope="module", autouse=True)
def _minari(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> Any:
    """The log, where the driver alone finds it: the cluster is up already, trials read the converted one."""
    root = tmp_path_factory.mktemp("minari")
    write_log(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        yield root


def swept(question: Question, folder: Path, *, listener: Any = Listeners, **more: Any) -> dict[str, Any]:
    from ipd_ray.distributed.sweep import sweep

    common = {**COMMON, **{name.replace("__", "."): value for name, value in more.items()}}
    return sweep(question, LOG, common, sweep_dir=folder, listener=listener)


def made(folder: Path) -> Counter[str]:
    """How often the driver and the trials say that they computed each part."""
    summary = json.loads((folder / "summary.json").read_text())
    parts = [*summary["shared"], *(p for r in Sweep(folder).records() for p in r.get("parts", ()))]
    return Counter(p["name"] for p in parts if not p["reused"])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, _minari: Path) -> tuple[Path, dict[str, Any]]:
    """A grid of four points, two trials at a time, to its end."""
    question = Question(
        space={"distill.eta": (0.0, 0.5), "accept.threshold": (0.3, 1000.0)}, seeds=1, finalists=1, also=("imagined",)
    )
    folder = tmp_path_factory.mktemp("sweep") / "grid"
    return folder, swept(question, folder)


def test_two_trials_at_a_time_compute_what_they_share_once(done: tuple[Path, dict[str, Any]]):
    folder, answer = done
    stored = Counter(p.parent.parent.name for p in (folder.parent / "store").glob("*/*/artifact.json"))
    assert {step: stored[step] for step in SHARED} == dict.fromkeys(SHARED, 1)
    assert {step: made(folder)[step] for step in SHARED} == dict.fromkeys(SHARED, 1)
    assert stored["distill"] == made(folder)["distill"] == 4 and stored["evaluate"] == 5  # one finalist again
    assert {r["step"]: r["reused"] for r in answer["reuse"]}["imagine"] == 3
    assert len(answer["ranking"]) == 4 and answer["best"]["fresh"] is not None
    assert answer["points"][0]["accepted"] < answer["points"][1]["accepted"]
    assert -1.0 <= answer["agreement"]["imagined"] <= 1.0


def test_the_best_config_runs_and_finds_every_key(done: tuple[Path, dict[str, Any]], tmp_path: Path):
    from ipd_ray import run

    folder, answer = done
    heard: dict[str, bool] = {}

    class Heard(Listeners):
        def end(self, step: str, seconds: float, reused: bool) -> None:
            heard[step] = reused

    summary = run(LOG, load(path=folder / "best.yaml"), run_dir=tmp_path / "best", listeners=[Heard()])
    assert set(heard) >= {*SHARED, "distill", "choose", "evaluate"} and all(heard.values())
    assert summary["policy"]["return_mean"] == answer["best"]["mean"]


def test_the_report_shows_what_was_asked(done: tuple[Path, dict[str, Any]]):
    page = (done[0] / "report.html").read_text()
    for said in (
        "Learning curves by trial", "mean return against accept.threshold", "accepted against accept.threshold",
        "Parallel coordinates", "What was shared", "best.yaml",
    ):
        assert said in page
    assert "accepted against distill.eta" not in page and "Failed trials" not in page


def test_the_same_question_again_goes_on_and_another_one_is_refused(done: tuple[Path, dict[str, Any]]):
    folder, answer = done
    question = Question.model_validate(Sweep(folder).described["question"])
    with pytest.raises(UserError, match=r"another sweep: distill\.updates differs"):
        swept(question, folder, distill__updates=41)
    again = swept(question, folder)
    assert again["seconds"] < answer["seconds"] and again["shared"] and all(p["reused"] for p in again["shared"])
    assert [again[k] for k in ("points", "ranking", "best")] == [answer[k] for k in ("points", "ranking", "best")]


def test_trials_read_the_converted_log_of_a_store_beside_the_driver(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The cluster's workers have another current folder. On their nodes there may be no other log: here it is gone when
    the first one begins."""
    monkeypatch.chdir(done[0].parent)
    root = tmp_path / "minari"
    write_log(root)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))

    class Gone(Listeners):
        def end(self, step: str, seconds: float, reused: bool) -> None:
            shutil.rmtree(root, ignore_errors=True)

    question = Question(space={"distill.eta": (0.5,)}, seeds=1, finalists=0)
    answer = swept(question, tmp_path / "sweep", listener=Gone, runtime__store="store")
    assert not root.exists() and answer["failed"] == {} and answer["ranking"] == [0]
    assert made(tmp_path / "sweep") == Counter()
    assert load(path=tmp_path / "sweep" / "best.yaml").runtime.store == str(done[0].parent / "store")


def test_a_mistake_about_the_cluster_blocks_no_corrected_command(tmp_path: Path):
    """Nor does a beginning without trials, of whatever."""
    too_many = Question(space={"distill.eta": (0.0,)}, concurrency=99)
    with pytest.raises(UserError, match="concurrency=99 must be at most 2"):
        swept(too_many, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    Sweep(tmp_path / "sweep").describe({"question": {}, "settings": {}, "dataset": "other", "content_hash": ""})
    with pytest.raises(UserError, match="concurrency=99 must be at most 2"):
        swept(too_many, tmp_path / "sweep")
    assert Sweep(tmp_path / "sweep").described["dataset"] == "other"


def test_nodes_that_cannot_reach_the_store_are_named_before_any_work(bucket: str, tmp_path: Path):
    """The cluster was started without the credentials and the endpoint that this process has."""
    with pytest.raises(UserError, match=rf"node .*, {bucket}/store: .*give --sweep-dir a mount that every node has"):
        swept(Question(space={"distill.eta": (0.0,)}), tmp_path / "sweep", runtime__store=f"{bucket}/store")
    assert not (tmp_path / "sweep").exists()


def test_a_mistake_that_all_trials_share_is_refused_and_not_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr("ipd_ray.checks.shutil", full)
    with pytest.raises(UserError, match=r"the store .* needs about .* the disk has 0 B left"):
        swept(Question(space={"distill.eta": (0.0,)}, seeds=1), tmp_path / "sweep")
    assert Sweep(tmp_path / "sweep").records() == []


def test_a_measure_that_the_sweep_changes_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.discount=\[0\.9, 0\.99\] changes what fitted_q measures"):
        swept(Question(space={"data.discount": (0.9, 0.99)}, objective="fitted_q"), tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_an_environment_that_this_process_alone_knows_is_refused_before_any_work(tmp_path: Path):
    gymnasium.register("IpdTestMine-v0", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv")
    try:
        with pytest.raises(UserError, match=r"IpdTestMine-v0 is registered in this script.*=package:IpdTestMine-v0"):
            swept(
                Question(space={"distill.eta": (0.0,)}), tmp_path / "sweep", evaluate__environment="IpdTestMine-v0"
            )
    finally:
        del gymnasium.registry["IpdTestMine-v0"]
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(("asked", "said"), [
    ({"space": {"data.discount": (0.9, 0.99)}}, "changes what fitted_q measures"),
    ({"space": {"choose.length": (10, 20)}, "scheduler": "asha"}, r"changes what imagined .*scheduler: none"),
])
def test_without_an_environment_the_measures_that_are_taken_instead_are_looked_at(asked: dict[str, Any], said: str):
    from ipd_ray.distributed.sweep import _decided
    from ipd_ray.evaluate.episodes import NO_SPEC

    log: Any = SimpleNamespace(spec=NO_SPEC)
    with pytest.raises(UserError, match=said):
        _decided(Question(**asked), build({}), log)


def test_a_failed_trial_stops_no_other_and_is_tried_again(done: tuple[Path, dict[str, Any]], tmp_path: Path):
    question = Question(
        space={"evaluate.environment": ("ipd_ray.testing:broken_pendulum", "Pendulum-v1")}, seeds=1, finalists=0
    )
    kept: list[int] = []
    for _ in range(2):
        answer = swept(question, tmp_path / "sweep", runtime__store=str(done[0].parent / "store"))
        assert list(answer["failed"]) == ["000-seed0"] and "the motor is gone" in answer["failed"]["000-seed0"]
        assert answer["ranking"] == [1]
        failed, whole = Sweep(tmp_path / "sweep").records()
        assert (failed["state"], whole["state"]) == ("failed", "done")
        assert "Traceback" in failed["traceback"] and "arena_of" in failed["traceback"]
        kept.append((tmp_path / "sweep" / "trials" / "001-seed0.json").stat().st_mtime_ns)
    assert kept[0] == kept[1]  # what is done is not done again
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "Failed trials" in page and "the motor is gone" in page


@pytest.mark.slow
def test_the_scheduler_ends_a_trial_in_the_middle_of_distillation(done: tuple[Path, dict[str, Any]], tmp_path: Path):
    """A later trial that is worse than the first at a quarter of its updates goes no further: here the one that learns,
    since the log is of random torques and doing nothing is better."""
    question = Question(
        space={"distill.learning_rate": (1e-9, 1e-3)}, seeds=1, concurrency=1, scheduler="asha", finalists=0
    )
    store = done[0].parent / "store"
    swept(question, tmp_path / "sweep", distill__updates=3000, evaluate__episodes=4, runtime__store=str(store))
    first, second = Sweep(tmp_path / "sweep").records()
    states = {r["trial"]: r["state"] for r in (first, second)}
    assert first["state"] == "done" and len(first["rungs"]) == 3, states
    assert second["state"] == "stopped" and second["rungs"][0][0] == 750, states  # a log line
    distilled = (store / "distill").iterdir()
    [begun] = [folder for folder in distilled if not (folder / "artifact.json").exists()]
    rows = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] < 3000


@pytest.mark.usefixtures("one_process", "without_report")
def test_a_policy_that_is_corrected_is_compared_by_its_first_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Corrections are short: a scheduler that waited for them would end trials that are nearly done.
    from ipd_ray import run
    from ipd_ray.distributed import sweep as sweeps

    told: list[dict[str, float]] = []
    monkeypatch.setattr(sweeps.tune, "report", told.append)
    config = build({
        **COMMON, "planner.kind": "actor", "actor.reaches": [0.3], "actor.rounds": 1, "actor.starts": 20,
        "actor.length": 5, "actor.updates": 4, "actor.value_updates": 4, "correct.walks": 4, "correct.length": 6,
    })
    folder = tmp_path / "run"
    run(LOG, config, run_dir=folder, listeners=[sweeps._Rungs(config, RunFolder(folder))])
    assert [row["step"] for row in told] == [10, 20, 30]  # of 40 updates; each correction has 10
    assert all(np.isfinite(row["score"]) for row in told)


@pytest.mark.slow
def test_tpe_goes_on_from_its_ledger(tmp_path: Path):
    question = Question(
        space={"distill.eta": Range(low=0.0, high=1.0)}, sampler="tpe", points=2, seeds=1, finalists=0
    )
    swept(question, tmp_path / "sweep")
    before = [r["settings"] for r in Sweep(tmp_path / "sweep").records()]
    answer = swept(question.model_copy(update={"points": 3}), tmp_path / "sweep")
    after = [r["settings"] for r in Sweep(tmp_path / "sweep").records()]
    assert len(after) == 3 and after[:2] == before and len({s["distill.eta"] for s in after}) == 3
    assert len(answer["ranking"]) == 3


@pytest.mark.slow
def test_a_killed_driver_loses_no_trial_and_the_table_is_that_of_an_undisturbed_sweep(
    done: tuple[Path, dict[str, Any]], ray_cluster: str, tmp_path: Path
):
    question = tmp_path / "grid.yaml"
    question.write_text("space: {distill.eta: [0.0, 0.5], accept.threshold: [0.3, 1000.0]}\nseeds: 1\n"
                        "finalists: 1\nalso: [imagined]\n")
    swept = ("distill.eta", "accept.threshold")
    settings = [f"{name}={json.dumps(value)}" for name, value in COMMON.items() if name not in swept]
    words = [sys.executable, "-m", "ipd_ray.cli", "tune", str(question), "--dataset", LOG, "--sweep-dir",
             str(tmp_path / "sweep"), *settings, f"runtime.address={ray_cluster}", "runtime.engine=ray"]
    driver = subprocess.Popen(words, start_new_session=True)
    end = time.monotonic() + 120.0
    ended: list[str] = []
    while not ended and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
        ended = [r["trial"] for r in Sweep(tmp_path / "sweep").records() if r["state"] == "done"]
    assert driver.poll() is None
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert 1 <= len(ended) < 4
    assert subprocess.run(words).returncode == 0
    answer = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert [answer[k] for k in ("points", "ranking", "best")] == [done[1][k] for k in ("points", "ranking", "best")]
    stored = Counter(p.parent.parent.name for p in (tmp_path / "store").glob("*/*/artifact.json"))
    assert stored["distill"] == 4 and {step: stored[step] for step in SHARED} == dict.fromkeys(SHARED, 1)


@pytest.mark.slow
def test_two_workers_a_trial_find_room_and_give_it_back(_minari: Path, tmp_path: Path):
    """On a cluster of its own, with the dashboard that Train wants inside a trial."""
    (tmp_path / "eta.yaml").write_text(
        "space: {distill.imagined_ratio: [0.2, 0.8]}\nseeds: 1\nfinalists: 1\nsettings: {runtime: {workers: 2}}\n"
    )
    settings = [f"{name}={json.dumps(value)}" for name, value in COMMON.items() if name != "runtime.workers"]
    words = [sys.executable, "-m", "ipd_ray.cli", "tune", "eta.yaml", "--dataset", LOG, "--sweep-dir", "sweep"]
    done = subprocess.run([*words, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    records = {r["trial"]: r for r in Sweep(tmp_path / "sweep").records()}
    assert len(records) == 3 and {r["state"] for r in records.values()} == {"done"}


# ---- room


def room(
    concurrency: int | None = None, nodes: Sequence[float] | Mapping[str, float] = (2.0,), autoscaled: bool = False,
    **runtime: Any,
) -> Any:
    """nodes: their CPUs; where they have a label `zone`, by that."""
    from ipd_ray.distributed.cluster import Cluster, Node
    from ipd_ray.distributed.sweep import check_room

    question = Question(space={"distill.eta": (0.0,)}, concurrency=concurrency)
    base = build({"runtime.engine": "ray", **{f"runtime.{name}": value for name, value in runtime.items()}})
    labelled = nodes.items() if isinstance(nodes, Mapping) else [("", cpus) for cpus in nodes]
    there = Cluster(tuple(Node(cpus, 0.0, {"zone": zone} if zone else {}) for zone, cpus in labelled), autoscaled)
    return check_room(question, base, "cpu", there)


def test_a_trial_holds_the_cpus_it_uses():
    assert (room().at_once, room().threads, room().cpu) == (2, 1, 1.0)
    assert (room(concurrency=1).at_once, room(concurrency=1).threads, room(concurrency=1).cpu) == (1, 2, 2.0)
    assert (room(nodes=(4.0, 4.0)).at_once, room(nodes=(4.0, 4.0), train_threads=4).at_once) == (8, 2)


def test_a_trial_with_workers_holds_next_to_nothing_and_all_of_them_have_room():
    found = room(nodes=(4.0,), workers=2)
    assert (found.at_once, found.cpu) == (2, 0.01)
    assert found.at_once * (0.01 + 2 * 0.95) <= 4.0


@pytest.mark.parametrize(("asked", "said"), [
    ({"concurrency": 3}, "concurrency=3 must be at most 2: a trial takes 1 worker of 1 CPU"),
    ({"workers": 3}, "concurrency=1 must be at most 0: a trial takes 3 workers of 1 CPU"),
    ({"concurrency": 2, "train_threads": 2}, "concurrency=2 must be at most 1: a trial takes 1 worker of 2 CPUs"),
    ({"nodes": (1.0, 1.0), "train_threads": 2}, "the cluster has 2 CPUs and 0 GPUs on 2 nodes"),
])
def test_what_would_wait_for_ever_is_refused(asked: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        room(**asked)


def test_trials_have_room_where_distillation_has():
    zones = {"a": 4.0, "b": 2.0}
    assert (room(nodes=zones).at_once, room(nodes=zones, worker_labels="zone=b").at_once) == (6, 2)
    with pytest.raises(UserError, match=r"at most 2: .* on 1 node with runtime\.worker_labels=zone=b: lower"):
        room(concurrency=3, nodes=zones, worker_labels="zone=b")


def test_labels_that_no_node_has_are_refused_before_any_work(tmp_path: Path):
    with pytest.raises(UserError, match=r"runtime\.worker_labels=zone=b: no node has these labels"):
        swept(Question(space={"distill.eta": (0.0,)}), tmp_path / "sweep", runtime__worker_labels="zone=b")
    assert not (tmp_path / "sweep").exists()


def test_ray_is_asked_for_nodes_with_the_labels(ray_cluster: str):
    """By the label that every node has, each its own: the room is found on the one there is, on no other."""
    import ray
    from ray.util.placement_group import remove_placement_group

    [node] = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    for name, found in ((node, True), ("f" * len(node), False)):
        asked = room(nodes=(1.0,), autoscaled=True, worker_labels=f"ray.io/node-id={name}").request()
        group = asked.to_placement_group()
        assert group.wait(timeout_seconds=60.0 if found else 1.0) is found
        remove_placement_group(group)


def test_where_machines_may_come_nothing_is_refused():
    assert room(concurrency=8, autoscaled=True).at_once == 8


def test_where_machines_may_come_trials_that_wait_ask_for_them():
    """By the rule of actors: 16 workers beyond what is there, or as many again."""
    there = ((), (2.0,), (20.0,))
    assert [room(nodes=nodes, autoscaled=True, train_threads=1).at_once for nodes in there] == [16, 18, 40]
    assert room(nodes=(), autoscaled=True, train_threads=1, workers=3).at_once == 5
    assert room(nodes=(), autoscaled=True, train_threads=1, workers=32).at_once == 1
