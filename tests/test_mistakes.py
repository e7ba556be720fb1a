"""Mistakes of a user's: each is answered at once, with the remedy, by exit code 2, and leaves no run folder."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from small_runs import LOG, SETTINGS, write_log
from typer.testing import CliRunner

import ipd_ray.api
import ipd_ray.checks
import ipd_ray.report
from ipd_ray import run
from ipd_ray.api import plan
from ipd_ray.cli import app
from ipd_ray.config import load
from ipd_ray.data import minari_source
from ipd_ray.data.export import episode_buffer, write_minari
from ipd_ray.errors import PartialError, TaskError, UserError
from ipd_ray.lease import Lease
from ipd_ray.listeners import PlainTerminal

VECTOR, TORQUE = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (1,), np.float32)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("minari")
    write_log(root)
    write_log(root, "test/other-v0", seed=1)
    _write(root, "test/discrete-v0", action_space=Discrete(3))
    _write(root, "test/nan-v0", observation=np.nan)
    _write(root, "test/one-step-v0", steps=1)
    _write(root, "test/one-episode-v0", episodes=1)
    _write(root, "test/image-v0", observation_space=Box(0, 255, (8, 8, 3), np.uint8))
    return root


def _write(
    root: Path, name: str, *, steps: int = 5, episodes: int = 3, observation: float = 0.0,
    observation_space: Box = VECTOR, action_space: Box | Discrete = TORQUE,
) -> None:
    lead = np.zeros if isinstance(action_space, Discrete) else np.ones
    actions = lead((steps, *action_space.shape), action_space.dtype)
    seen = np.full((steps + 1, *observation_space.shape), observation).astype(observation_space.dtype)
    logged = [episode_buffer(seen, actions, np.arange(steps) + i, terminated=False) for i in range(episodes)]
    write_minari(
        name, logged, observation_space=observation_space, action_space=action_space, description="wrong", root=root
    )


@pytest.fixture(autouse=True)
def _place(logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(logs))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minari_source, "_remote_ids", lambda _: ([], "out of reach: no network"))
    monkeypatch.setattr(ipd_ray.api, "run_until", _never)


def _never(*_: object) -> None:
    raise AssertionError("work was begun")


def refused(*words: str) -> str:
    """Run the command line, check that it is refused as a user's mistake, and return what it says."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["planner.horzion=8"], ["planner.horzion", "planner.horizon"]),
        (["planner.horizon=0"], ["planner.horizon=0", "greater than 0"]),
        (["planner.horizon"], ["section.field=value"]),
        (["--preset", "gym-smal"], ["gym-small"]),
        (["--config", "mine.yaml"], ["mine.yaml", "ipd-ray config"]),
        (["accept.min_length=99"], ["accept.min_length=99", "imagine.length=10"]),
        (
            ["policy.timesteps=episode", "policy.context=30", "policy.max_timestep=20"],
            ["policy.context=30", "policy.max_timestep=20"],
        ),
        (["distill.target_return=500"], ["distill.target_return=500", "distill.prompt=fixed"]),
        (["runtime.workers=2"], ["runtime.workers=2", "runtime.engine=ray"]),
        (["runtime.address=auto"], ["runtime.address='auto'", "runtime.engine=ray"]),
        (["runtime.device=cuda:99"], ["runtime.device='cuda:99'", "runtime.device=auto"]),
        (["runtime.device=gpu", "runtime.engine=ray"], ["runtime.device='gpu'", "runtime.device=auto"]),
        (["runtime.device=gpu"], ["runtime.device='gpu'", "runtime.device=auto"]),
        (["world_model.termination=hoper"], ["hoper", "hopper"]),
        (["world_model.termination=no_such_module:ends"], ["no_such_module", "PYTHONPATH"]),
        (["evaluate.environment=Pendulm-v1"], ["Pendulm-v1", "Pendulum-v1"]),
        (["evaluate.environment=CartPole-v1"], ["evaluate.environment=CartPole-v1", "Discrete(2)"]),
        (["evaluate.environment=MountainCarContinuous-v0"], ["(2,)", "the log's is Box of shape (3,)"]),
    ],
)
def test_a_wrong_setting(words: list[str], parts: list[str]) -> None:
    said = refused("run", LOG, *words)
    assert [part for part in parts if part not in said] == [], said
    assert not list(Path("runs").glob("*-seed0"))


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        ("test/pendulm-v0", ["neither local", "test/pendulum-v0", "ipd-ray data import"]),
        ("test/discrete-v0", ["Discrete(3)", "must be a Box"]),
        ("test/image-v0", ["is an image", "encode the images"]),
        ("test/nan-v0", ["NaN or infinite in 15 of 15 steps", "repair or drop"]),
        ("test/one-step-v0", ["every episode has one step"]),
        ("test/one-episode-v0", ["log at least 2 episodes"]),
    ],
)
def test_a_dataset_that_nothing_can_be_learned_from(dataset: str, parts: list[str]) -> None:
    said = refused("run", dataset, *SETTINGS)
    assert [part for part in parts if part not in said] == [], said
    assert not list(Path("runs").glob("*-seed0"))


def _begin(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder runs/mine of a dataset, without the work."""
    with monkeypatch.context() as patch:
        patch.setattr(ipd_ray.api, "run_until", lambda *_: None)
        patch.setattr(ipd_ray.report, "build_report", lambda *_: None)
        result = CliRunner().invoke(app, ["run", dataset, *SETTINGS, "--run-dir", "runs/mine"])
    assert result.exit_code == 0, result.output


def test_a_run_folder_of_another_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    _begin(LOG, monkeypatch)
    before = Path("runs/mine/config.yaml").read_text()
    said = refused("run", "test/other-v0", *SETTINGS, "seed=3", "--run-dir", "runs/mine")
    assert f"is of dataset {LOG}, not of test/other-v0" in said and "--run-dir" in said
    assert Path("runs/mine/config.yaml").read_text() == before


def test_a_run_folder_of_the_same_dataset_with_other_content(monkeypatch: pytest.MonkeyPatch) -> None:
    _begin(LOG, monkeypatch)
    identity = json.loads(Path("runs/mine/run.json").read_text())
    Path("runs/mine/run.json").write_text(json.dumps({**identity, "content_hash": "0" * 64}))
    assert "before its content changed" in refused("run", LOG, *SETTINGS, "--run-dir", "runs/mine")


def test_a_run_folder_of_a_later_version(monkeypatch: pytest.MonkeyPatch) -> None:
    _begin(LOG, monkeypatch)
    Path("runs/mine/run.json").write_text('{"schema": 99}')
    assert "has schema 99" in refused("run", LOG, *SETTINGS, "--run-dir", "runs/mine")


def test_a_second_run_into_a_folder_in_use(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "runs" / "mine")
    assert lease.acquire() is None
    said = refused("run", LOG, *SETTINGS, "--run-dir", "runs/mine")
    owner = json.loads((tmp_path / "runs" / "mine" / "lease.json").read_text())
    assert f"process {owner['pid']} on host {owner['host']}" in said and "--run-dir" in said
    lease.release()


def test_a_dead_owners_folder_is_free_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lease = Lease(tmp_path / "runs" / "mine")
    assert lease.acquire() is None
    file = tmp_path / "runs" / "mine" / "lease.json"
    owner = json.loads(file.read_text())
    lease.release()
    file.write_text(json.dumps({**owner, "born": "before the last boot"}))
    _begin(LOG, monkeypatch)


def test_a_place_that_is_no_run_folder() -> None:
    Path("a_file").write_text("")
    assert "is a file" in refused("run", LOG, "--run-dir", "a_file")
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("")
    assert "holds other things" in refused("run", LOG, "--run-dir", "thesis")
    assert sorted(p.name for p in Path("thesis").iterdir()) == ["chapter1.tex"]


def test_a_place_that_cannot_be_written() -> None:
    said = refused("run", LOG, "--run-dir", "/proc/ipd_ray/run")
    assert "/proc/ipd_ray" in said and "--run-dir" in said
    said = refused("run", LOG, "runtime.store=/proc/ipd_ray/store")
    assert "/proc/ipd_ray" in said and "runtime.store" in said


def test_a_disk_that_is_too_full(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    said = refused("run", LOG, *SETTINGS)
    assert "1.0 kB left" in said and "runtime.store=FOLDER" in said


def test_a_run_that_may_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "of memory, this machine has 23.0 GB for it: lower actor.starts, actor.length or"
    monkeypatch.setattr(ipd_ray.checks, "memory", lambda: 23e9)
    monkeypatch.setattr(ipd_ray.api, "run_until", lambda *_: None)
    monkeypatch.setattr(ipd_ray.report, "build_report", lambda *_: None)
    small = [*SETTINGS, "planner.kind=actor", "actor.reaches=[0.1]"]
    for words, large in ((small, False), ([*small, "actor.starts=10000000"], True)):
        config = load(overrides=words)
        notes = " ".join(plan(LOG, config, run_dir="runs/mine")["remarks"])
        assert (said in notes) == ("reach:0.1 may need" in notes) == large
        run(LOG, config, run_dir="runs/mine")
        assert (said in Path("runs/mine/run.log").read_text()) == large


def _raise(error: Exception) -> Callable[..., None]:
    def raising(*_: object) -> None:
        raise error

    return raising


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.ENOSPC, "no space is left"), (errno.EACCES, "no permission"), (errno.EROFS, "no permission"),
        (errno.ENOTSUP, "cannot do what a run needs"), (errno.ENOSYS, "cannot do what a run needs"),
    ],
)
def test_a_disk_that_fails_on_the_way(monkeypatch: pytest.MonkeyPatch, number: int, part: str) -> None:
    monkeypatch.setattr(ipd_ray.api, "run_until", _raise(OSError(number, "as the kernel says it", "store/values")))
    said = refused("run", LOG, *SETTINGS)
    assert part in said and "store/values" in said


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (TaskError("distill failed:\nTraceback\nOSError: [Errno 28] No space left on device"), 2, "it goes on."),
        (TaskError("values failed:\nTraceback\nipd_ray.errors.UserError: x=1 must be 2."), 2, "error: x=1 must be 2."),
        (TaskError("values failed:\nTraceback\nFloatingPointError: q not finite"), 1, "error: q not finite"),
        (PartialError("imagine: 1 of 3 shards failed"), 3, "incomplete: imagine: 1 of 3 shards failed"),
        (KeyError("a bug"), 1, "KeyError: 'a bug'"),
    ],
)
def test_exit_codes_of_what_fails_on_the_way(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, last: str
) -> None:
    monkeypatch.setattr(ipd_ray.api, "run_until", _raise(error))
    result = CliRunner().invoke(app, ["run", LOG, *SETTINGS])
    assert result.exit_code == code and result.stderr.strip().endswith(last), result.output
    assert ("Traceback" in result.stderr) == (code == 1)


@pytest.mark.parametrize(
    ("last", "kind"), [("ipd_ray.errors.UserError: x=1 must be 2.", UserError), ("KeyError: 'a bug'", TaskError)]
)
def test_what_a_worker_finds_wrong_is_the_same_from_python(
    monkeypatch: pytest.MonkeyPatch, last: str, kind: type[Exception]
) -> None:
    monkeypatch.setattr(ipd_ray.api, "run_until", _raise(TaskError(f"values failed:\nTraceback\n{last}")))
    with pytest.raises(kind) as raised:
        run(LOG, load(overrides=SETTINGS), run_dir="runs/mine")
    assert ("Traceback" in str(raised.value)) == (kind is TaskError)
    assert "Traceback" in Path("runs/mine/run.log").read_text()


@pytest.mark.parametrize("heard", [True, False])
def test_remarks_are_logged_where_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], heard: bool
) -> None:
    monkeypatch.setattr(ipd_ray.api, "run_until", lambda *_: None)
    monkeypatch.setattr(ipd_ray.report, "build_report", lambda *_: None)
    monkeypatch.setattr(ipd_ray.checks, "memory", lambda: 1e12)
    caplog.set_level(logging.INFO)
    config = load(overrides=["runtime.device=cpu"])
    run(LOG, config, run_dir="runs/full", listeners=[PlainTerminal()] if heard else [])
    remark, shown = "these are full-size settings, for a GPU", capsys.readouterr().err
    assert shown.count(f"note: {remark}") == heard and remark in Path("runs/full/run.log").read_text()
    warned = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert sum(remark in message for message in warned) == (not heard)


@pytest.mark.parametrize(
    ("module", "word", "remedy"),
    [
        ("ray", "runtime.engine=ray", "runtime.engine=local"),
        ("wandb", "runtime.wandb=offline", "runtime.wandb=off"),
        ("tensorboard", "runtime.tensorboard=true", "ipd_ray[tensorboard]"),
    ],
)
def test_what_is_asked_for_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, module: str, word: str, remedy: str
) -> None:
    for name in list(sys.modules):
        if name == module or name.startswith((f"{module}.", "ipd_ray.distributed")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    said = refused("run", LOG, word)
    assert word.partition("=")[0] in said and remedy in said


def test_yaml_that_cannot_be_read_is_named() -> None:
    Path("cut.yaml").write_text("space:\n  distill.eta: [0.1")
    Path("twice.yaml").write_text("planner:\n  horizon: 8\nplanner:\n  kind: mpc\n")
    assert "cut.yaml cannot be read as YAML" in refused("tune", "cut.yaml", "--dataset", LOG)
    said = refused("run", LOG, "--config", "twice.yaml")
    assert "twice.yaml" in said and "'planner' stands there twice" in said


def test_an_unknown_run() -> None:
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/run.json").write_text('{"schema": 1}')
    assert "Did you mean 'mine'" in refused("runs", "rm", "min", "--yes")
    assert "ipd-ray runs ls" in refused("report", "elsewhere")


def test_nobody_can_answer() -> None:
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/run.json").write_text('{"schema": 1, "store": "store"}')
    assert "--yes" in refused("runs", "rm", "mine")
    assert Path("runs/mine").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data", "show", LOG, "--plot", "x.doc"], "png, svg"),
        (["data", "show", LOG, "--plot", "nowhere/x.png"], "does not exist"),
        (["data", "import", "log.npz", "--id", "my log"], "my-log-v0"),
        (["data", "import", "log.npz", "--id", "t/ok-v0"], "two characters or more: use 'my/ok-v0'"),
        (["data", "import", "log.npz", "--id", LOG], "exists in"),
        (["data", "import", "log.npz", "--id", "my/log-v0", "--ref-min-score", "3"], "ref_max_score=None: give both"),
        (["data", "import", "log.npz", "--id", "my/log-v0"], "does not exist"),
        (["data", "import", "log.npz", "--id", "my/log-v0", "--action-low", "a"], "one a dimension"),
        (["data", "import", "log.npz", "--id", "my/log-v0", "--map", "observations"], "field=column"),
    ],
)
def test_mistakes_with_data(words: list[str], part: str) -> None:
    assert part in refused(*words)
