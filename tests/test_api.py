"""`run` from Python: what it returns, what it leaves, what it does again."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from small_runs import LOG, SETTINGS, write_log
from typer.testing import CliRunner

import ipd_ray.api
import ipd_ray.report
from ipd_ray import Policy, RunConfig, run
from ipd_ray.api import plan
from ipd_ray.artifacts import Artifact, read_jsonl
from ipd_ray.cli import app
from ipd_ray.config import load
from ipd_ray.engine import LocalEngine
from ipd_ray.errors import UserError
from ipd_ray.estimate import ENVIRONMENT_SECONDS, STARTUP_SECONDS, Speed
from ipd_ray.imagine.actor import best_reach
from ipd_ray.progress import Crew


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ended: dict[str, bool] = {}
        self.closed = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        assert 0 < done <= total

    def end(self, step: str, seconds: float, reused: bool) -> None:
        self.ended[step] = reused

    def close(self) -> None:
        self.closed += 1


def settings(*more: str) -> RunConfig:
    return load(overrides=[*SETTINGS, *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Path:
    """A folder with the log and one finished run, `runs/first`."""
    root = tmp_path_factory.mktemp("api")
    write_log(root / "minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
        run(LOG, settings("runtime.wandb=offline", "runtime.tensorboard=true"), run_dir=root / "runs" / "first")
    return root


@pytest.fixture(autouse=True)
def _minari(place: Path, without_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(place / "minari"))


PARTS = ["values", "world_model", "imagine", "distill", "distill:no_imagination", "choose", "evaluate"]


def test_a_run_leaves_a_whole_folder(place: Path) -> None:
    folder = place / "runs" / "first"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"return_mean", "return_max"} <= summary["data"].keys()
    assert {"return_mean", "return_std", "normalised", "episodes"} <= summary["policy"].keys()
    assert {"accepted", "accept_rate"} <= summary["imagined"].keys()
    assert list(summary["seconds"]) == PARTS
    assert summary["chosen"]["variant"] in ("ipd", "no_imagination") and 10 <= summary["chosen"]["step"] <= 40
    assert summary["seed"] == 0 and len(summary["key"]) == 64
    identity = json.loads((folder / "run.json").read_text())
    assert identity["dataset"] == LOG and identity["store"] == str(place / "runs" / "store")
    for link in json.loads((folder / "links.json").read_text()).values():
        assert Artifact(Path(link["path"])).described["key"] == link["key"]
    assert load(path=folder / "config.yaml") == settings("runtime.wandb=offline", "runtime.tensorboard=true")
    assert "imagine: done" in (folder / "run.log").read_text()
    assert "Learning curves" in (folder / "report.html").read_text()
    assert not (folder / "lease.json").exists()


@pytest.mark.parametrize("until", ["reach", "actor"])
def test_an_actor_that_no_plan_asks_for_is_refused(tmp_path: Path, until: str) -> None:
    with pytest.raises(UserError, match="learns no actor: set"):
        run(LOG, settings(), run_dir=tmp_path / "run", until=until)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_plans_are_an_actor_s(place: Path) -> None:
    folder = place / "runs" / "actor"
    small = ("actor.reaches=[0.2, 0.1]", "actor.rounds=3", "actor.starts=20", "actor.length=5",
             "actor.value_updates=4", "actor.updates=4", "correct.walks=4", "correct.length=6",
             "correct.rounds=2")  # fmt: skip
    run(LOG, settings("planner.kind=actor", *small), run_dir=folder)
    reaches = ["reach:0.2", "reach:0.1"]
    made = list(json.loads((folder / "summary.json").read_text())["seconds"])
    corrected = ["distill:draft-1", "walk:1", "distill:draft-2", "walk:2"]
    assert made == [*PARTS[:2], *reaches, "actor", PARTS[2], *corrected, *PARTS[3:]]
    rows, links = read_jsonl(folder / "metrics.jsonl"), json.loads((folder / "links.json").read_text())
    found = {part: Artifact(Path(links[part]["path"])).diagnostics for part in [*reaches, "actor"]}
    for reach in reaches:
        rounds = [row for row in rows if row["part"] == reach]
        assert [row["step"] for row in rounds] == [1, 2, 3]
        later = [row["imagined_return"] for row in rounds[1:]]
        assert found[reach]["return_mean"] == pytest.approx(max(found[reach]["behaviour_return"], *later))
    worth = {name[6:]: found[name]["return_mean"] for name in reaches}
    assert found["actor"]["reaches"] == worth
    kept = best_reach([found[name] for name in reaches])
    assert found["actor"]["reach"] == found[reaches[kept]]["reach"]


def test_a_reach_that_is_added_is_all_that_is_learned_anew(place: Path) -> None:
    small = ("actor.rounds=1", "actor.starts=20", "actor.length=5", "actor.value_updates=4", "actor.updates=4",
             "planner.kind=actor")  # fmt: skip
    states = []
    for reaches in ("[0.2]", "[0.2, 0.4]"):
        words = settings(*small, f"actor.reaches={reaches}")
        steps = plan(LOG, words, run_dir=place / "runs" / "reaches", until="actor")["steps"]
        states.append({row["step"]: row["state"] for row in steps})
        run(LOG, words, run_dir=place / "runs" / "reaches", until="actor")
    assert states[0]["reach:0.2"] == "to do" and states[1]["reach:0.2"] == "reused"
    assert states[1]["reach:0.4"] == states[1]["actor"] == "to do"


def test_curves_of_all_parts_are_merged_whoever_logs_them(place: Path) -> None:
    folder = place / "runs" / "first"
    rows = read_jsonl(folder / "metrics.jsonl")
    parts = Counter(row["part"] for row in rows)
    assert parts["values"] == 20 and parts["imagine"] == 3 and parts["distill"] == 20
    assert [row["step"] for row in rows if row["part"] == "distill"] == list(range(2, 41, 2))
    assert list(folder.glob("wandb/offline-run-*")) and list(folder.glob("tensorboard/events.*"))


def test_trials_of_a_sweep_are_one_group_in_wandb(tmp_path: Path) -> None:
    from ipd_ray.listeners import WandbLog

    for group, shown in ((None, "test-log-v0"), ("eta-sweep", "eta-sweep")):
        config = RunConfig.model_validate({"runtime": {"wandb": "offline", "wandb_group": group}})
        log = WandbLog(config, tmp_path, "test/log-v0")
        assert log._run.group == shown
        log.close()


def test_the_policy_acts_without_the_store(place: Path) -> None:
    policy = Policy.load(place / "runs" / "first")
    action = policy.act(np.zeros((3, 3), np.float32))
    assert action.shape == (3, 1) and action.dtype == np.float32 and (np.abs(action) <= 2.0).all()


def test_a_second_run_reuses_everything_and_doubles_nothing(place: Path) -> None:
    folder, heard = place / "runs" / "first", Heard()
    before = {name: (folder / name).read_text() for name in ("metrics.jsonl", "links.json", "summary.json")}
    run(LOG, settings(), run_dir=folder, listeners=[heard])
    assert set(heard.ended.values()) == {True} and heard.closed == 1
    assert {name: (folder / name).read_text() for name in before} == before


def test_a_changed_loss_weight_redoes_only_what_depends_on_it(place: Path) -> None:
    heard = Heard()
    run(LOG, settings("distill.eta=0.1"), run_dir=place / "runs" / "second", listeners=[heard])
    assert heard.ended == {
        "values": True, "world_model": True, "imagine": True, "distill": False, "distill:no_imagination": False,
        "choose": False, "evaluate": False,
    }


def test_steps_say_that_their_workers_wait_for_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crew, "LOOK", 0.0)
    monkeypatch.setattr(Crew, "AGAIN", np.inf)  # a busy machine takes longer than a minute
    monkeypatch.setattr(ipd_ray.api, "make_engine", lambda *_: LocalEngine(1))
    monkeypatch.setattr(LocalEngine, "crew", lambda self: (0, 1))
    heard = Heard()
    run(LOG, settings("distill.eta=0.2"), run_dir=place / "runs" / "waits", until="choose", listeners=[heard])
    waiting = [note.partition(": ")[0] for note in heard.notes if "0 of 1 workers are up" in note]
    assert waiting == ["distill", "distill:no_imagination", "choose"]


def test_filtering_at_reading_equals_imagining_anew_at_that_threshold(place: Path) -> None:
    """A sweep over thresholds imagines once. In a store of its own, the same threshold comes to the same plans and the
    same policy, bit for bit."""
    def imagined(folder: str) -> dict[str, Any]:
        return dict(Artifact(Path(links(folder)["distill"]["path"])).diagnostics["imagined"])

    def links(folder: str) -> dict[str, dict[str, str]]:
        return dict(json.loads((place / folder / "links.json").read_text()))

    middle = imagined("runs/first")["uncertainty_quantiles"]["0.5"]
    at = (f"accept.threshold={middle}", "choose.without_imagination=false", "choose.episodes=0")
    heard = Heard()
    run(LOG, settings(*at), run_dir=place / "runs" / "filtered", until="distill", listeners=[heard])
    run(LOG, settings(*at), run_dir=place / "elsewhere" / "anew", until="distill")
    assert heard.ended == {"values": True, "world_model": True, "imagine": True, "distill": False}
    assert links("runs/first")["imagine"] == links("runs/filtered")["imagine"]
    for part in ("imagine", "distill"):
        one, other = (Artifact(Path(links(folder)[part]["path"])) for folder in ("runs/filtered", "elsewhere/anew"))
        assert one.path != other.path and one.digest == other.digest
    assert 0 < imagined("runs/filtered")["accepted_steps"] < imagined("runs/first")["accepted_steps"]


def test_a_run_leaves_the_value_of_its_policy_on_held_out_episodes(place: Path) -> None:
    heard = Heard()
    run(LOG, settings("fitted_q.updates=20"), run_dir=place / "runs" / "first", listeners=[heard])
    summary = run(LOG, settings("fitted_q.updates=20"), run_dir=place / "runs" / "offline", until="fitted_q")
    assert [name for name, reused in heard.ended.items() if not reused] == ["fitted_q"]
    assert summary["fitted_q"]["episodes"] == 1


def test_a_run_may_end_early_and_go_on_later(place: Path) -> None:
    folder = place / "runs" / "part"
    summary = run(LOG, settings("seed=5"), run_dir=folder, until="values")
    assert list(summary["seconds"]) == ["values"] and "policy" not in summary
    assert not (folder / "policy").exists()
    assert [row["step"] for row in summary_states(place, folder)] == PARTS


def test_another_seed_leaves_no_policy_of_the_one_before(place: Path) -> None:
    folder = place / "runs" / "changed"
    run(LOG, settings(), run_dir=folder)
    run(LOG, settings(), run_dir=folder, until="values")  # the same run, looked at again
    assert (folder / "policy").exists() and (folder / "report.html").exists()
    planned = plan(LOG, settings("seed=6"), run_dir=folder, until="values")["remarks"]
    heard = Heard()
    run(LOG, settings("seed=6"), run_dir=folder, until="values", listeners=[heard])
    for said in (" ".join(planned), " ".join(heard.notes)):
        assert "runs/changed holds a finished run of other settings (seed 0 before, now 6): its summary and" in said
    assert not (folder / "policy").exists()
    with pytest.raises(UserError, match="no policy"):
        Policy.load(folder)


def test_reference_scores_that_come_later_are_those_of_the_policy(place: Path) -> None:
    name = write_log(place / "minari", "test/named-later-v0", seed=3)
    metadata = place / "minari" / name / "data" / "metadata.json"
    whole = json.loads(metadata.read_text())
    bare = {k: v for k, v in whole.items() if k not in ("env_spec", "ref_min_score", "ref_max_score")}
    metadata.write_text(json.dumps(bare))
    folder = place / "runs" / "named-later"
    planned, short = (plan(name, settings(), run_dir=folder, until=until) for until in ("evaluate", "values"))
    assert {row["step"]: row["state"] for row in planned["steps"]}["evaluate"] == "left out"
    assert "no evaluation" in " ".join(planned["remarks"]) and "no evaluation" not in " ".join(short["remarks"])
    assert "policy" not in run(name, settings(), run_dir=folder)
    assert {row["state"] for row in plan(name, settings(), run_dir=folder)["steps"]} == {"reused", "left out"}
    assert Policy.load(folder).spec.env_spec is None
    metadata.write_text(json.dumps(whole))
    heard = Heard()
    summary = run(name, settings(), run_dir=folder, listeners=[heard])
    assert summary["policy"]["normalised"] is not None
    assert [part for part, reused in heard.ended.items() if not reused] == ["evaluate"]
    assert Policy.load(folder).spec.ref_max_score == -150.0


def named(place: Path, name: str, env_spec: EnvSpec) -> str:
    """The log under another name, with another environment as its own."""
    shutil.copytree(place / "minari" / LOG, place / "minari" / name)
    metadata = place / "minari" / name / "data" / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "env_spec": env_spec.to_json(),
                                    "dataset_id": name}))  # fmt: skip
    return name


def test_an_environment_that_does_not_fit_its_log_is_left_out_before_any_work(place: Path) -> None:
    name = named(place, "test/strange-v0", gymnasium.spec("MountainCarContinuous-v0"))
    planned = plan(name, settings(), run_dir=place / "runs" / "strange")
    assert {row["step"]: row["state"] for row in planned["steps"]}["evaluate"] == "left out"
    said = " ".join(planned["remarks"])
    assert "no evaluation: the environment of test/strange-v0 does not fit the log" in said
    assert "set evaluate.environment to the one that was logged" in said


def test_episodes_without_a_limit_of_time_end_with_the_log_s(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipd_ray.estimate.measure", lambda *_: Speed(lambda *_: np.inf, 0.0))  # networks cost nothing
    spec = copy.deepcopy(gymnasium.spec("Pendulum-v1"))  # the registry's own is everybody's
    spec.max_episode_steps = None
    name, free = named(place, "test/endless-v0", spec), settings("evaluate.max_steps=null")
    folder = place / "runs" / "endless"
    planned = plan(name, free, run_dir=folder)
    assert "no limit of time: evaluated episodes are cut after 40 steps, as the log's are" in " ".join(
        planned["remarks"]
    )
    expected = free.distill.snapshots * 40 * free.evaluate.episodes * ENVIRONMENT_SECONDS
    assert planned["steps"][-1]["seconds"] == pytest.approx(expected + STARTUP_SECONDS, abs=0.051)
    summary = run(name, free, run_dir=folder)
    assert (summary["policy"]["length_mean"], summary["data"]["time_limit"]) == (40.0, 40)
    assert summary["policy"]["success"] is None


def test_workers_have_an_environment_that_the_script_registered(place: Path) -> None:
    gymnasium.register("IpdTestMine-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=12)
    mine = settings("evaluate.environment=IpdTestMine-v0", "evaluate.max_steps=null")
    summary = run(LOG, mine, run_dir=place / "runs" / "mine")
    del gymnasium.registry["IpdTestMine-v0"]
    assert summary["policy"]["length_mean"] == 12.0
    with pytest.raises(UserError, match="no Gymnasium id here"):
        run(LOG, mine, run_dir=place / "runs" / "mine")


def test_a_failing_evaluation_leaves_the_policy_and_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "failing_pendulum.py").write_text(
        "from gymnasium.envs.classic_control import PendulumEnv\n\n"
        "class Failing(PendulumEnv):\n    def step(self, action):\n        raise RuntimeError('licence is gone')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(place))  # a worker's error, said as engines do
    monkeypatch.setattr(ipd_ray.api, "make_engine", lambda *_: LocalEngine(1))
    monkeypatch.syspath_prepend(str(place))
    folder = place / "runs" / "failing"
    result = CliRunner().invoke(
        app, ["run", LOG, *SETTINGS, "evaluate.environment=failing_pendulum:Failing", "--run-dir", str(folder)]
    )
    assert result.exit_code == 1 and not (folder / "summary.json").exists()
    *_, error, note = result.stderr.strip().splitlines()
    assert error == "error: RuntimeError: licence is gone"
    assert note.startswith(f'The policy is there all the same: Policy.load("{folder}")')
    assert Policy.load(folder).act(np.zeros(3, np.float32)).shape == (1,)
    assert "ipd-ray choose" in note
    assert "chosen" in run(LOG, settings(), run_dir=folder, until="choose")


def summary_states(place: Path, folder: Path) -> list[dict[str, str]]:
    from ipd_ray.api import plan

    planned = plan(LOG, settings("seed=5"), run_dir=folder)
    states = [row["state"] for row in planned["steps"]]
    assert states == ["reused", *["to do"] * 6]
    assert planned["total"]["seconds"] > 0 and planned["total"]["disk"] > 0
    assert planned["steps"][0]["seconds"] == 0
    return planned["steps"]


def test_a_report_that_fails_loses_no_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise ZeroDivisionError("no axis")

    heard = Heard()
    monkeypatch.setattr(ipd_ray.report, "build_report", fail)
    summary = run(LOG, settings(), run_dir=place / "runs" / "first", listeners=[heard])
    assert "policy" in summary and any("no axis" in note and "ipd-ray report" in note for note in heard.notes)


def test_listeners_are_closed_where_a_run_is_refused(place: Path) -> None:
    heard = Heard()
    with pytest.raises(UserError, match="one of values, world_model"):
        run(LOG, settings(), until="planing", listeners=[heard])
    assert heard.closed == 1
