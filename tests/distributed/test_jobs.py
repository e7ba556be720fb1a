"""Runs as jobs: what travels, what is refused before, and a real head with tokens that carries them out."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_runs import LOG, SETTINGS, ipd_ray, write_log
from typer.testing import CliRunner

from ipd_ray.cli import app
from ipd_ray.distributed import jobs
from ipd_ray.errors import UserError

NOWHERE = "http://127.0.0.1:1"
TOKEN, SECRET = "t" * 64, "vErY-s3cret-value"
ENVIRONMENT = '''
import hashlib, os, uuid
import gymnasium

def make():
    """Pendulum, made where the secret is known; leaves a file that says in which process."""
    digest = hashlib.sha256(os.environ["MY_SECRET"].encode()).hexdigest()
    open(os.path.join(os.environ["MY_MARKS"], f"{os.getpid()}-{digest}"), "w").close()
    return gymnasium.make("Pendulum-v1")
'''


# ---- what travels


def touch(root: Path, *names: str, size: int = 1) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.urandom(size))


def test_data_runs_environments_and_credentials_stay_here(tmp_path: Path) -> None:
    kept = ["my_env.py", "conf/run.yaml", "notes/data/metadata.json"]
    touch(
        tmp_path, *kept, "logs/walk-v0/data/main_data.hdf5", "logs/walk-v0/data/metadata.json", "log.npz", ".env",
        "runs/mine/run.json", "runs/mine/policy/x.json", "runs/store/values/0a/artifact.json",
        "runs/store/data/log.json", "env39/pyvenv.cfg", "env39/lib/x.py", ".git/config", "big/table.csv",
        "src/__pycache__/x.pyc",
    )
    parcel = jobs.Parcel.of(tmp_path, exclude=["big"])
    assert [str(path) for path in parcel.files] == sorted(kept)
    assert parcel.left == {
        "logs/walk-v0": "dataset", "runs/mine": "run", "runs/store": "store", "env39": "environment",
        ".git": "cache or version control", "src/__pycache__": "cache or version control", "big": "excluded",
    }


def test_what_git_ignores_stays_here_but_for_the_config_of_the_command(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    touch(tmp_path, "my_env.py", "scratch/a.txt", "mine.yaml")
    (tmp_path / ".gitignore").write_text("scratch\n*.yaml\n")
    parcel = jobs.Parcel.of(tmp_path, always=[Path("mine.yaml")])
    assert [str(path) for path in parcel.files] == [".gitignore", "mine.yaml", "my_env.py"]


def test_parcel_holds_this_package_and_is_the_same_twice(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "my_env.py", "ipd_ray/api.py")
    for name in ("a.zip", "b.zip"):
        jobs.Parcel.of(root).write(tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
        assert len(set(names)) == len(names) and {"my_env.py", "ipd_ray/presets/demo.yaml"} <= set(names)
        assert archive.read("ipd_ray/api.py") == Path(jobs.ipd_ray.__file__).with_name("api.py").read_bytes()


def test_parcel_above_rays_limit_is_refused_with_what_is_big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "UPLOAD_BYTES", 2**22)
    touch(tmp_path / "root", "tables/a.csv", "tables/b.csv", size=2**21)
    touch(tmp_path / "root", "figure.tif", size=2**20)
    with pytest.raises(UserError, match=r"tables/ \(4\.2 MB\), figure\.tif \(1\.0 MB\): leave it out with --exclude"):
        jobs.Parcel.of(tmp_path / "root").write(tmp_path / "a.zip")


def test_pins_are_what_is_installed_here_without_ray() -> None:
    found = dict(pin.split("==") for pin in jobs.pins())
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert found["torch"] == importlib.metadata.version("torch").partition("+")[0]
    assert found["minari[hdf5,hf]"] == importlib.metadata.version("minari")
    assert not [name for name in found if name.startswith("ray") or name in ("pytest", "ruff", "scipy")]


def test_log_that_is_read_again_from_its_beginning_is_written_once() -> None:
    async def chunks(*parts: str) -> AsyncIterator[str]:
        for part in parts:
            yield part

    written: list[str] = []
    tail = jobs._Tail(written.append)
    asyncio.run(tail.read(chunks("one ", "two ")))
    asyncio.run(tail.read(chunks("one two th", "ree")))
    asyncio.run(tail.read(chunks("one two three")))
    assert "".join(written) == "one two three"


# ---- what is refused before anybody is asked


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["submit", "--address", NOWHERE, *words])
    assert result.exit_code == 2, result.output
    assert SECRET not in result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rn", "demo"], ["'ipd-ray rn' is no command", "Did you mean 'run'"]),
        (["jobs", "ls"], ["'ipd-ray jobs' is no command that a job can run"]),
        (["run"], ["Missing argument 'DATASET'"]),
        (["run", "demo", "--presett", "demo"], ["--presett"]),
        (["run", "demo", "planner.horzion=8"], ["planner.horzion", "planner.horizon"]),
        (["run", "demo", "planner.horizon=0"], ["planner.horizon=0", "greater than 0"]),
        (["run", "demo", "policy.width=30"], ["policy.width=30"]),
        (["run", "demo", "runtime.engine=local", "runtime.address=auto"], ["runtime.address='auto'"]),
        (["run", "demo"], ["--run-dir", "absolute path on storage that every node sees"]),
        (["run", "demo", "--run-dir", "runs/x"], ["--run-dir=runs/x", "absolute path"]),
        (["run", "demo", "--run-dir", "/x", "runtime.store=store"], ["runtime.store=store", "absolute path"]),
        (["run", "demo", "--run-dir", "/x", "--config", "/elsewhere/a.yaml"], ["must lie in the --working-dir"]),
        (["run", "demo", "--run-dir", "/x", "--config", "none.yaml"], ["none.yaml does not exist"]),
        (["tune", "gird.yaml", "--dataset", "demo", "--sweep-dir", "/x"], ["Did you mean 'grid.yaml'"]),
        (["tune", "../grid.yaml", "--dataset", "demo", "--sweep-dir", "/x"], ["QUESTION ../grid.yaml must lie in the"]),
        (["tune", "grid.yaml", "--dataset", "demo"], ["--sweep-dir", "absolute path"]),
        (["tune", "grid.yaml", "--dataset", "demo", "--sweep-dir", "s3://b/x"], ["--sweep-dir=s3://b/x", "every node"]),
        (["tune", "grid.yaml", "--dataset", "demo", "--sweep-dir", "/x", "distill.eta=1"], ["distill.eta is swept"]),
        (["tune", "grid.yaml", "--dataset", "demo", "--sweep-dir", "/x", "policy.contxt=1"], ["'policy.context'"]),
        (["run", "demo", "--run-dir", "/x"], [f"--address {NOWHERE}: no Ray dashboard", "Connection refused"]),
    ],
)
def test_mistakes_in_the_command(
    words: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text("space: {distill.eta: [0.0, 0.5]}\n")
    said = refused("--", *words)
    assert [part for part in parts if part not in said] == [], said


def test_environment_is_named_and_its_values_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--", "run", "demo", "--run-dir", "/x"]
    assert "--env MY_KEY=...: give the name alone" in refused("--env", f"MY_KEY={SECRET}", *words)
    monkeypatch.delenv("MY_KEY", raising=False)
    assert "--env MY_KEY is not set here" in refused("--env", "MY_KEY", *words)


def test_address_of_something_else() -> None:
    for address, part in [("127.0.0.1:8265", "such as http://HOST:8265"), ("ray://head:10001", "dashboard")]:
        result = CliRunner().invoke(app, ["jobs", "ls", "--address", address])
        assert result.exit_code == 2 and part in result.stderr
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port := free_ports(1)[0]), "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: not answers_nobody(port))
        result = CliRunner().invoke(app, ["jobs", "ls", "--address", f"http://127.0.0.1:{port}"])
        assert result.exit_code == 2 and "no Ray dashboard answers there" in result.stderr
    finally:
        server.kill()
        server.wait()


# ---- a real head


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def answers_nobody(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


def until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)


@dataclass(frozen=True)
class Head:
    """A running `ray start --head` and the machine that submits to it."""

    address: str
    ray: Path
    """Where Ray keeps its session: logs, sockets, unpacked folders."""
    place: Path
    """Working directory of who submits."""
    shared: Path
    """Storage that the cluster sees."""
    gcs: str
    """Address of the head's key-value store."""

    def call(self, *words: str, code: int | None = 0, **env: str) -> tuple[str, str]:
        """Run the command line here, as a user of the cluster; return what it printed and said."""
        process = ipd_ray(*words, cwd=self.place, **{**self.environment, **env})
        out, said = process.communicate(timeout=200)
        assert code is None or process.returncode == code, (process.returncode, out, said)
        return out, said

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_API_SERVER_ADDRESS": self.address}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    root = tmp_path_factory.mktemp("head")
    place, shared, broken = (root / name for name in ("place", "shared", "broken"))
    for folder in (place, shared / "marks", broken / "ipd_ray"):
        folder.mkdir(parents=True)
    (broken / "ipd_ray" / "__init__.py").write_text("raise ImportError('not the ipd_ray that was sent')\n")
    (place / "my_env.py").write_text(ENVIRONMENT)
    write_log(shared / "minari")
    options = ["port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
               "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port"]
    ports = dict(zip(options, free_ports(len(options)), strict=True))
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    env |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
            "PYTHONPATH": str(broken), "MINARI_DATASETS_PATH": str(shared / "minari"),
            "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="ipd-", dir="/tmp", ignore_cleanup_errors=True) as ray:  # a short path
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--dashboard-host=127.0.0.1",
             f"--temp-dir={ray}", "--num-cpus=2", f"--object-store-memory={150 * 2**20}",
             *(f"--{name}={port}" for name, port in ports.items())],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        server, store = (f"127.0.0.1:{ports[name]}" for name in ("dashboard-port", "port"))
        found = Head(f"http://{server}", Path(ray), place, shared, store)
        try:
            until(lambda: process.poll() is not None or not answers_nobody(ports["dashboard-port"]))
            until(lambda: "[]" in found.call("jobs", "ls", "--json", code=None)[0])
            yield found
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def memory(head: Head) -> str:
    """All values of the head's key-value store that name an environment, in which submit's are."""
    script = (
        "import sys\nfrom ray._raylet import GcsClient\n"
        "store = GcsClient(address=sys.argv[1])\n"
        "for key in store.internal_kv_keys(b'gcs://ipd-ray-', None, 30):\n"
        "    print(store.internal_kv_get(key, None, 30).decode())\n"
    )
    read = subprocess.run(
        [sys.executable, "-c", script, head.gcs], env={**os.environ, **head.environment}, capture_output=True,
        text=True, check=True,
    )
    return read.stdout


def files_with(text: str, *folders: Path) -> list[str]:
    """Files under the folders that hold a text."""
    found = subprocess.run(["grep", "-rlIsa", text, *map(str, folders)], capture_output=True, text=True)
    return found.stdout.split()


def handed_over(head: Head, name: str, *words: str) -> tuple[dict[str, Any], str, set[str]]:
    """Submit a command with a secret; return what was printed, what was said, and the processes that knew the secret.

    Checks that nothing but these processes ever held it.
    """
    marks = head.shared / "marks" / name
    marks.mkdir(parents=True)
    out, said = head.call(
        "submit", "--no-pins", "--env", "MY_SECRET", "--env", "MY_MARKS", "--submission-id", name, "--json", "--",
        *words, *SETTINGS, "evaluate.environment=my_env:make", "--run-dir", str(head.shared / "runs" / name),
        MY_SECRET=SECRET, MY_MARKS=str(marks),
    )
    shown = head.call("jobs", "status", name)[0] + head.call("jobs", "ls", "--json")[0]
    assert "SUCCEEDED" in shown and SECRET not in shown + out + said + head.call("jobs", "logs", name)[0]
    assert files_with("evaluate.environment=my_env:make", head.ray)  # what looks for it, finds
    assert files_with(SECRET, head.ray, head.shared, head.place) == []
    found = [mark.name.split("-") for mark in marks.iterdir()]
    assert {digest for _, digest in found} == {hashlib.sha256(SECRET.encode()).hexdigest()}
    return json.loads(out), said, {process for process, _ in found}


@pytest.mark.ray
def test_submitted_step_finishes_with_credentials_that_are_stored_nowhere(head: Head) -> None:
    sent, said, _ = handed_over(head, "values", "values", LOG)
    assert sent["submission_id"] == "values" and sent["env"] == ["MY_MARKS", "MY_SECRET"]
    assert sent["entrypoint"].endswith("runtime.engine=ray runtime.address=auto")
    assert "values" in said and "values: SUCCEEDED" in said
    assert list((head.shared / "runs" / "store" / "values").glob("*/artifact.json"))


@pytest.mark.slow
@pytest.mark.ray
def test_submitted_run_finishes_and_its_workers_have_the_credentials(head: Head) -> None:
    _, said, processes = handed_over(head, "whole", "run", LOG, "choose.episodes=0")
    assert "whole: SUCCEEDED" in said and len(processes) >= 2  # the driver and the worker that evaluates
    summary = json.loads((head.shared / "runs" / "whole" / "summary.json").read_text())
    assert summary["policy"]["episodes"] == 2


@pytest.mark.slow
@pytest.mark.ray
def test_submitted_sweep_finishes(head: Head) -> None:
    (head.place / "grid.yaml").write_text(
        "space: {distill.imagined_ratio: [0.25, 0.5]}\nseeds: 1\nfinalists: 1\nobjective: imagined\nconcurrency: 2\n"
    )
    folder = head.shared / "sweeps" / "grid"
    _, said = head.call(
        "submit", "--no-pins", "--submission-id", "sweep", "--json", "--", "tune", "grid.yaml", "--dataset", LOG,
        *SETTINGS, "choose.without_imagination=false", "--sweep-dir", str(folder),
    )
    assert "sweep: SUCCEEDED" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["ranking"]) == 2 and summary["failed"] == {}
    made = Counter(p.parent.parent.name for p in (folder.parent / "store").glob("*/*/artifact.json"))
    assert made["imagine"] == 1 and made["distill"] == 2
    assert (folder / "report.html").exists() and (folder / "best.yaml").exists()


@pytest.mark.ray
def test_job_that_fails_gives_its_exit_code_and_unknown_jobs_the_near_name(head: Head) -> None:
    words = ["--submission-id", "shown", "--env", "MY_SECRET", "--", "data", "show", "test/pendulm-v0"]
    out, said = head.call("submit", "--no-pins", *words, code=2, MY_SECRET=SECRET)
    assert "test/pendulum-v0" in out and "shown: FAILED, exit code 2" in said
    assert "is taken" in head.call("submit", "--no-pins", *words, code=2, MY_SECRET=SECRET)[1]
    assert set(memory(head).splitlines()) == {'{"environment of a job": {}}'}  # what was refused is taken back
    assert head.call("jobs", "logs", "shown", "--follow", code=2)[0] in out
    assert "Did you mean 'shown'" in head.call("jobs", "stop", "show", code=2)[1]


@pytest.mark.slow
@pytest.mark.ray
def test_stopped_job_keeps_what_is_finished(head: Head) -> None:
    out, _ = head.call(
        "submit", "--no-pins", "--detach", "--", "run", LOG, *SETTINGS, "values.updates=10000000",
        "--run-dir", str(head.shared / "runs" / "long"),
    )
    until(lambda: (head.shared / "runs" / "long" / "run.log").exists())
    assert "STOPPED; what is finished is kept" in head.call("jobs", "stop", out.strip())[0]
    log = head.call("jobs", "logs", out.strip(), "--follow", code=143)[0]
    assert "Stopped. What is finished is kept" in log, log
    assert "had ended before" in head.call("jobs", "stop", out.strip())[0]


@pytest.mark.ray
def test_wrong_and_missing_tokens_are_refused_with_the_remedy(head: Head, tmp_path: Path) -> None:
    for env in ({"RAY_AUTH_TOKEN": "x" * 64}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}):
        assert "set RAY_AUTH_TOKEN" in head.call("jobs", "ls", code=2, HOME=str(tmp_path), **env)[1]
    (tmp_path / "token").write_text(TOKEN)
    for place in ("token", "nowhere"):
        env = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(tmp_path / place)}
        said = head.call("jobs", "ls", code=0 if place == "token" else 2, **env)[1]
        assert place == "token" or "nowhere cannot be read" in said
