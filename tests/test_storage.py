"""Runs and stores in an object store: a real S3-compatible server, and machines that share nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socketserver
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from small_runs import LOG, SETTINGS, ipd_ray, open_bucket, write_log
from typer.testing import CliRunner

from ipd_ray import Policy, checks, run, storage
from ipd_ray.api import job_of
from ipd_ray.artifacts import Artifact, Store, Workspace
from ipd_ray.cli import app
from ipd_ray.config import load
from ipd_ray.errors import UserError
from ipd_ray.lease import Lease
from ipd_ray.runs import RunFolder
from ipd_ray.storage import Folder, probe
from ipd_ray.sweep import measures

KEY = "0123456789abcdef" * 4

pytestmark = pytest.mark.usefixtures("one_process")


def written_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.getbasetemp() / "storage-minari"
    if not root.exists():
        write_log(root)
    return root


@pytest.fixture(autouse=True)
def _minari(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(written_log(tmp_path_factory)))


@pytest.fixture
def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Call it to go on where nothing is mirrored."""

    def move() -> None:
        monkeypatch.setenv("IPD_RAY_CACHE", str(tmp_path / f"machine-{time.monotonic_ns()}"))

    return move


# ---- places


@pytest.mark.parametrize(
    ("place", "uri", "name", "parent"),
    [
        ("/runs/mine", "/runs/mine", "mine", "/runs"),
        ("file:///runs/mine", "/runs/mine", "mine", "/runs"),
        ("s3://bucket/runs/mine/", "s3://bucket/runs/mine", "mine", "s3://bucket/runs"),
        ("s3://bucket/runs?region=x", "s3://bucket/runs?region=x", "runs", "s3://bucket?region=x"),
        ("gs://bucket/a", "gs://bucket/a", "a", "gs://bucket"),
    ],
)
def test_a_place_is_a_path_or_a_uri(place: str, uri: str, name: str, parent: str):
    folder = Folder.of(place)
    assert (folder.uri, folder.name, folder.parent.uri.rstrip("/")) == (uri, name, parent)
    assert (folder / "x").parent.uri.rstrip("/") == uri.rstrip("/")


def test_options_of_a_uri_stay_with_all_that_is_below():
    assert (Folder.of("s3://b/runs?region=x") / "store" / "values").uri == "s3://b/runs/store/values?region=x"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s4://bucket/x", r"'s4://bucket/x': s4:// is not known: give a path, or s3://bucket/path or gs://bucket/path"),
        ("s3:///x", r"must name a bucket and a path in it: s3://bucket/path"),
        ("s3://bucket/../x", r"must name a bucket"),
    ],
)
def test_an_unknown_place_is_refused(place: str, message: str):
    with pytest.raises(UserError, match=message):
        Folder.of(place)


def test_mirrors_of_different_buckets_and_servers_are_apart():
    places = ["s3://a/x", "s3://b/x", "gs://a/x", "s3://a/x?endpoint_override=one", "s3://a/x?endpoint_override=two"]
    assert len({Folder.of(place).path for place in places}) == len(places)


# ---- files


def test_what_one_machine_pushes_another_pulls(bucket: str, another_machine):
    folder = Folder.of(f"{bucket}/some")
    folder.path.mkdir(parents=True)
    names = [f"{i}.bin" for i in range(40)]
    for i, name in enumerate(names):
        (folder.path / name).write_bytes(bytes([i]) * 1000)
    folder.push(names)
    another_machine()
    there = Folder.of(f"{bucket}/some")
    assert there.path != folder.path and there.sizes() == dict.fromkeys(names, 1000)
    there.pull([*names, "never.bin"])
    assert [(there.path / name).read_bytes()[0] for name in names] == list(range(40))
    assert not (there.path / "never.bin").exists()
    there.remove()
    assert not folder.exists() and folder.sizes() == {} and not there.path.exists()


def test_files_may_be_renamed_and_removed_while_they_are_listed(tmp_path: Path):
    folder, stop = Folder.of(tmp_path), threading.Event()
    folder.write_text("stays", "12345")

    def change() -> None:
        while not stop.is_set():
            folder.write_text("changes", "1")

    writer = threading.Thread(target=change)
    writer.start()
    try:
        found = [folder.sizes() for _ in range(1000)]
    finally:
        stop.set()
        writer.join()
    assert all(sizes["stays"] == 5 for sizes in found)


def test_the_converted_log_reaches_machines_that_never_saw_the_dataset(
    bucket: str, another_machine, monkeypatch: pytest.MonkeyPatch
):
    run(LOG, load(overrides=SETTINGS), run_dir=f"{bucket}/runs/mine", until="values")
    ref = job_of(RunFolder(f"{bucket}/runs/mine"), imagined=False).log
    another_machine()
    monkeypatch.setenv("MINARI_DATASETS_PATH", "/nowhere")
    assert len(ref.load().transitions) > 0


def test_a_bucket_that_is_not_there_is_refused_before_any_work(bucket: str):
    heard = Mock()
    with pytest.raises(UserError, match=r"s3://nowhere-at-all/runs/x cannot be written .*does the bucket exist"):
        run(LOG, load(overrides=SETTINGS), run_dir="s3://nowhere-at-all/runs/x", listeners=[heard])
    places = "s3://nowhere-at-all/runs/x and s3://nowhere-at-all/runs/store"
    heard.note.assert_called_once_with(f"looks whether {places} can be written")
    with pytest.raises(OSError):
        probe("s3://nowhere-at-all/x")
    probe(f"{bucket}/x")
    assert Folder.of(f"{bucket}/x").sizes() == {}


@pytest.mark.parametrize(
    ("place", "variable"),
    [("s3://bucket/x", "AWS_ACCESS_KEY_ID"), ("gs://bucket/x", "GOOGLE_APPLICATION_CREDENTIALS")],
)
def test_an_object_store_that_cannot_be_written_is_told_with_its_own_credentials(
    place: str, variable: str, monkeypatch: pytest.MonkeyPatch
):
    def probe(_: str) -> None:
        raise OSError("no token")

    monkeypatch.setattr(checks, "probe", probe)
    with pytest.raises(UserError, match=rf"{place} cannot be written \(no token\): .*such as {variable}\)"):
        checks.check_writable(Folder.of(place))


def test_requests_to_google_are_tried_for_half_a_minute_unless_the_uri_says_otherwise():
    def limit(place: str) -> float:
        return Folder.of(place).arrow[0].__reduce__()[1][0]["retry_time_limit"].total_seconds()

    assert limit("gs://bucket/x") == 30 and limit("gs://bucket/x?retry_limit_seconds=5") == 5


def test_requests_to_s3_that_fail_are_given_up(bucket: str, monkeypatch: pytest.MonkeyPatch):
    """A server that closes every connection; the options of the URI go there all the same."""
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    came = []

    class Closes(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            came.append(self.request.recv(4096))

    with socketserver.TCPServer(("127.0.0.1", 0), Closes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = f"region=here&scheme=http&endpoint_override=127.0.0.1:{server.server_address[1]}"
        with pytest.raises(OSError):
            Folder.of(f"{bucket}/x?{options}").exists("y")
        server.shutdown()
    assert len(came) == 2 and all(b"/here/s3/aws4_request" in request for request in came)


# ---- leases, workspaces, artifacts


def test_of_two_that_take_a_lease_at_once_one_gets_it(bucket: str, monkeypatch: pytest.MonkeyPatch):
    from concurrent.futures import ThreadPoolExecutor

    leases = [Lease(f"{bucket}/folder") for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        owners = list(threads.map(Lease.acquire, leases))
    assert owners.count(None) == 1
    leases[owners.index(None)].release()
    after = Lease(f"{bucket}/folder")
    assert after.acquire() is None
    after.release()
    assert Folder.of(f"{bucket}/folder").sizes() == {}


def test_a_step_goes_on_on_another_machine(bucket: str, another_machine):
    import torch

    before = Workspace(f"{bucket}/values/k")
    for step in (10, 20):
        before.log(step, 40, {"loss": 1.0 / step})
    before.checkpoint(20, {"w": torch.tensor([2.0])})
    before.log(30, 40, {"loss": 0.1})
    another_machine()
    after = Workspace(f"{bucket}/values/k")
    restored = after.restore()
    assert restored is not None and restored[0]["w"].tolist() == [2.0] and restored[1]["step"] == 20
    assert [json.loads(row)["step"] for row in (after.path / "metrics.jsonl").read_text().splitlines()] == [10, 20]


def test_an_artifact_made_anew_is_fetched_anew(bucket: str, another_machine):
    import torch

    def make(value: float) -> Artifact:
        store = Store(f"{bucket}/store")
        with store.claim("values", KEY) as folder:
            Workspace(folder).finish({"w": torch.tensor([value])}, {})
            return store.commit("values", KEY, version=1, parts={})

    make(1.0)
    first = os.environ["IPD_RAY_CACHE"]
    another_machine()
    found = Store(f"{bucket}/store").find("values", KEY)
    assert found is not None and found.tensors()["w"].tolist() == [1.0]
    second, os.environ["IPD_RAY_CACHE"] = os.environ["IPD_RAY_CACHE"], first
    Folder.of(f"{bucket}/store/values/{KEY[:24]}").remove()
    make(3.0)
    os.environ["IPD_RAY_CACHE"] = second
    found = Store(f"{bucket}/store").find("values", KEY)
    assert found is not None and found.tensors()["w"].tolist() == [3.0]


# ---- runs


def digests(place: str | Path) -> dict[str, str]:
    links = json.loads(Folder.of(place).read_text("links.json") or "{}")
    return {name: Artifact(link["path"]).digest for name, link in links.items()}


@pytest.fixture(scope="module")
def _made_there(s3_server: str, one_process: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(written_log(tmp_path_factory)))
        place = open_bucket(s3_server, __name__, tmp_path_factory.mktemp("made") / "mirror", patch)
        return run(LOG, load(overrides=SETTINGS), run_dir=f"{place}/runs/mine")


@pytest.fixture
def run_there(
    _made_there: dict[str, Any], s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, dict[str, Any]]:
    """A bucket in which another machine made the run `runs/mine`, and its summary."""
    return open_bucket(s3_server, __name__, tmp_path / "mirror", monkeypatch), _made_there


def test_a_run_in_a_bucket_is_the_run_of_a_folder_and_serves_other_machines(
    run_there: tuple[str, dict[str, Any]], another_machine, tmp_path: Path, without_report: None
):
    bucket, remote = run_there
    config = load(overrides=SETTINGS)
    local = run(LOG, config, run_dir=tmp_path / "runs" / "mine")
    assert digests(f"{bucket}/runs/mine") == digests(tmp_path / "runs" / "mine")
    assert remote["policy"] == local["policy"] and remote["run_dir"] == f"{bucket}/runs/mine"
    names = {"config.yaml", "run.json", "links.json", "metrics.jsonl", "run.log", "summary.json", "report.html"}
    there = Folder.of(f"{bucket}/runs/mine").sizes()
    assert names | {"policy/artifact.json", "policy/tensors.safetensors"} <= there.keys()
    left = {name for name in Folder.of(f"{bucket}/runs").sizes() if "checkpoint" in name or "lease" in name}
    assert not left

    measured = [measures(RunFolder(place)) for place in (f"{bucket}/runs/mine", tmp_path / "runs" / "mine")]
    assert measured[0] == measured[1] and measured[0].keys() == {"return", "imagined"}

    another_machine()
    assert not Folder.of(bucket).path.exists()
    seen = np.zeros((2, 3), np.float32)
    policies = [Policy.load(place).act(seen) for place in (f"{bucket}/runs/mine", tmp_path / "runs" / "mine")]
    assert (policies[0] == policies[1]).all()
    shared = load(overrides=[*SETTINGS, f"runtime.store={bucket}/runs/store"])
    again = run(LOG, shared, run_dir=f"{bucket}/others/mine")
    assert again["policy"] == local["policy"]
    other_log = (Folder.of(f"{bucket}/others/mine").read_text("run.log") or "").splitlines()
    assert sum("reused" in line for line in other_log) == 7 and not any("done in" in line for line in other_log)


def test_options_of_a_uri_reach_every_file(bucket: str, another_machine):
    """The region stands in the URI alone."""
    place, config = f"{bucket}/runs/mine?region=us-east-1", load(overrides=[*SETTINGS, "choose.episodes=0"])
    del os.environ["AWS_DEFAULT_REGION"]  # put back by the fixture
    run(LOG, config, run_dir=place, until="distill")
    another_machine()
    assert digests(place).keys() == {"values", "world_model", "imagine", "distill"}
    log = (Folder.of(place).read_text("run.log") or "").splitlines()
    assert sum("done in" in line for line in log) == 4
    assert all("?region" not in name for name in Folder.of(bucket).sizes())


def say(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_commands_read_what_lies_in_a_bucket(
    run_there: tuple[str, dict[str, Any]], another_machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    bucket, _ = run_there
    run(LOG, load(overrides=[*SETTINGS, "seed=1"]), run_dir=f"{bucket}/runs/other", until="values")
    another_machine()
    listed = json.loads(say("runs", "ls", "--runs-dir", f"{bucket}/runs", "--json"))
    assert [row["run"] for row in listed] == [f"{bucket}/runs/mine", f"{bucket}/runs/other"]
    assert "seed" in say("runs", "diff", "mine", "other", "--runs-dir", f"{bucket}/runs")
    written = say("report", f"{bucket}/runs/mine", "-o", "page.html")
    assert "page.html" in written and "accept rate" in (tmp_path / "page.html").read_text().lower()
    used = json.loads(say("store", "ls", "--runs-dir", f"{bucket}/runs", "--json"))
    assert {item["state"] for item in used} == {"done"} and all(item["runs"] for item in used)
    say("runs", "rm", f"{bucket}/runs/other", "--yes")
    freed = say("store", "prune", "--runs-dir", f"{bucket}/runs", "--yes")
    assert freed.count("values") == 1 and "freed" in freed
    assert set(digests(f"{bucket}/runs/mine")) >= {"values", "distill", "evaluate"}  # all still there


@pytest.mark.slow
def test_a_run_killed_on_one_machine_goes_on_on_another(bucket: str, another_machine, tmp_path: Path):
    slow = [*SETTINGS, "values.updates=1500", "runtime.checkpoint_seconds=0.2"]
    command = ["run", LOG, *slow, "--run-dir", f"{bucket}/runs/mine"]
    process = ipd_ray(*command, cwd=tmp_path)
    store = Folder.of(f"{bucket}/runs/store")
    end = time.monotonic() + 60.0
    while not any(n.startswith("values/") and n.endswith("checkpoint.safetensors") for n in store.sizes()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(os.environ["IPD_RAY_CACHE"])
    another_machine()
    steps_before = [n for n in store.sizes() if n.endswith("metrics.jsonl")]
    assert steps_before
    process = ipd_ray(*command, cwd=tmp_path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    undisturbed = run(LOG, load(overrides=slow), run_dir=tmp_path / "undisturbed")
    assert digests(f"{bucket}/runs/mine") == digests(undisturbed["run_dir"])
