"""The command line as a user meets it: what each command prints, leaves and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_runs import LOG, SETTINGS, ipd_ray, write_log
from typer.testing import CliRunner, Result

from ipd_ray.cli import app
from ipd_ray.cli.run import _summary_table
from ipd_ray.config import as_yaml, field_names, load
from ipd_ray.data.minari_source import load as load_log


def call(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    return result


def document(*words: str) -> Any:
    """The one JSON document on standard output."""
    return json.loads(call(*words, "--json").stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the log, a run `runs/mine` made from a shell, and what that printed."""
    root = tmp_path_factory.mktemp("cli")
    write_log(root / "minari")
    process = ipd_ray(
        "run", LOG, *SETTINGS, "ablations=[bc]", "--run-dir", "runs/mine", "--json", cwd=root,
        MINARI_DATASETS_PATH=str(root / "minari"),
    )
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    (root / "stdout").write_text(out)
    (root / "stderr").write_text(said)
    return root


@pytest.fixture(autouse=True)
def _place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(place / "minari"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(place)


def test_help_imports_nothing_heavy() -> None:
    heavy = "import sys, ipd_ray.cli; print(sorted({'torch', 'ray', 'minari', 'pydantic', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", heavy], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_run_prints_one_document_on_stdout_and_the_rest_on_stderr(place: Path) -> None:
    summary = json.loads((place / "stdout").read_text())
    assert summary == json.loads((place / "runs" / "mine" / "summary.json").read_text())
    said = (place / "stderr").read_text()
    for part in ("values", "world_model", "imagine", "distill", "choose", "evaluate", "distill:bc", "evaluate:bc"):
        assert f"\n{part:<22} done in" in said
    for label in ("data  ", "policy  ", "bc  ", "imagined  ", "value  ", "time  ", "report  "):
        assert f"\n{label}" in said
    assert "\x1b" not in said and 'Policy.load("runs/mine")' in said


def test_the_share_of_episodes_that_succeed_is_beside_the_return(place: Path) -> None:
    summary = json.loads((place / "stdout").read_text())
    assert "success" not in _summary_table(summary)
    summary["policy"]["success"] = 0.45
    line = next(line for line in _summary_table(summary).splitlines() if line.startswith("policy "))
    assert line.endswith("success 45 %")


def test_dry_run_says_what_is_reused_and_does_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    words = ["run", LOG, *SETTINGS, "distill.eta=0.2", "--run-dir", "runs/mine", "--dry-run"]
    planned = document(*words)
    assert {row["step"]: row["state"] for row in planned["steps"]} == {
        "values": "reused", "world_model": "reused", "imagine": "reused", "distill": "to do",
        "distill:no_imagination": "to do", "choose": "to do", "evaluate": "to do",
    }
    shown = call(*words).stdout
    assert "in all" in shown and "nothing was run" in shown
    assert sorted(place.rglob("*")) == before


def test_a_step_ends_where_its_name_says() -> None:
    steps = [row["step"] for row in document("world-model", LOG, *SETTINGS, "--dry-run")["steps"]]
    assert steps == ["values", "world_model"]


def test_config_prints_what_config_reads(tmp_path: Path) -> None:
    text = call("config", "--preset", "demo", "planner.horizon=7").stdout
    assert text == as_yaml(load("demo", overrides=["planner.horizon=7"]))
    (tmp_path / "mine.yaml").write_text(text)
    printed = document("config", "--config", str(tmp_path / "mine.yaml"), "seed=4")
    assert list(printed) == list(field_names()) and printed["planner.horizon"] == 7 and printed["seed"] == 4
    assert yaml.safe_load(text)["planner"]["horizon"] == 7


def test_data_show(tmp_path: Path) -> None:
    found = document("data", "show", LOG)
    assert (found["episodes"], found["steps"], found["observation_dim"]) == (8, 320, 3)
    shown = call("data", "show", LOG, "--plot", str(tmp_path / "log.png")).stdout
    assert "8 episodes, 320 steps" in shown and "normalised return" in shown
    assert (tmp_path / "log.png").stat().st_size > 10_000


def test_data_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert "ipd-ray run demo --preset demo" in call("data", "demo").stdout
    assert document("data", "show", "demo")["return"]["max"] <= -350


def test_data_import_previews_then_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "robot.npz", obs=rng.normal(size=(30, 2)), actions=rng.uniform(-1, 1, (30, 1)), r=np.ones(30),
        terminals=np.arange(30) % 10 == 9,
    )
    words = ["data", "import", str(tmp_path / "robot.npz"), "--id", "my/robot-v0", "--map", "observations=obs",
             "--map", "rewards=r", "--action-low", "-1", "--action-high", "1"]
    shown = call(*words, "--dry-run").stdout
    assert "3, 3 terminated" in shown and "nothing was written" in shown
    assert not Path("minari/my").exists()
    call(*words, code=2)  # nobody can answer here
    call(*words, "--yes")
    assert document("data", "show", "my/robot-v0")["terminated"] == 3


def test_data_export_writes_raw_rewards_in_the_logs_units(place: Path) -> None:
    accepted = json.loads((place / "runs/mine/summary.json").read_text())["imagined"]["accepted"]
    assert accepted > 0
    assert f"{accepted} imagined segments and the log" in call("data", "export", "mine", "--id", "my/more-v0").stdout
    more, log = load_log("my/more-v0"), load_log(LOG)
    assert more.episodes == log.episodes + accepted
    np.testing.assert_allclose(more.reward[: len(log)], log.reward, rtol=1e-5)
    imagined = more.reward[len(log) :]
    assert log.reward.min() - 1e-3 <= imagined.min() and imagined.max() <= log.reward.max() + 1e-3
    call("data", "export", "mine", "--id", "my/segments-v0", "--only-imagined")
    assert load_log("my/segments-v0").episodes == accepted


def test_runs_are_listed_compared_and_removed(place: Path) -> None:
    call("run", LOG, *SETTINGS, "distill.eta=0.1", "--run-dir", "runs/other")
    rows = document("runs", "ls")
    assert [Path(row["run"]).name for row in rows] == ["mine", "other"] and rows[0]["policy_mean"] is not None
    assert "policy mean" in call("runs", "ls").stdout
    found = document("runs", "diff", "mine", "other")
    assert found["config"] == {"ablations": [["bc"], []], "distill.eta": [0.5, 0.1]}
    assert found["shared"] == ["values", "world_model", "imagine"] and "distill" in found["different"]
    assert "distill.eta" in call("runs", "diff", "mine", "other").stdout

    assert document("store", "ls")[0].keys() >= {"step", "state", "bytes", "runs"}
    assert call("store", "prune", "--yes").stdout == "nothing to prune\n"
    call("runs", "rm", "other", "--yes")
    assert not Path("runs/other").exists() and Path("runs/mine/run.json").exists()
    unused = [item for item in document("store", "ls") if not item["runs"]]
    assert sorted(item["step"] for item in unused) == ["choose", "distill", "distill", "evaluate"]
    assert "nothing was deleted" in call("store", "prune", "--dry-run").stdout
    call("store", "prune", "--yes")
    left = document("store", "ls")
    assert all(item["runs"] for item in left) and {item["step"] for item in left} >= {"values", "imagine", "distill"}


def test_prune_leaves_what_came_into_use_while_it_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run, keys = tmp_path / "runs" / "store", tmp_path / "runs" / "new", ("a" * 24, "b" * 24)
    for key in keys:
        (store / "values" / key).mkdir(parents=True)
        (store / "values" / key / "artifact.json").write_text("{}")
    (store / "data").mkdir()
    for key in keys:
        (store / "data" / f"{key}.safetensors").write_text("")

    def meanwhile(*_: object) -> None:
        run.mkdir()
        identity = {"schema": 1, "dataset": LOG, "content_hash": "a" * 64, "seed": 0, "store": str(store)}
        (run / "run.json").write_text(json.dumps(identity))
        (run / "links.json").write_text(json.dumps({"values": {"key": "a" * 64, "path": ""}}))
        (store / "values" / ("c" * 24)).mkdir()  # nobody was asked about it

    monkeypatch.setattr("ipd_ray.cli.runs.confirm", meanwhile)
    said = call("store", "prune", "--runs-dir", str(tmp_path / "runs")).stdout
    assert said.endswith("freed 2 B; the other 2 are in use or gone by now\n")
    left = sorted(item["name"] for item in document("store", "ls", "--runs-dir", str(tmp_path / "runs")))
    assert left == ["a" * 24, "a" * 24 + ".safetensors", "c" * 24]


def test_report_of_one_run_and_of_several(tmp_path: Path) -> None:
    call("report", "runs/mine", "--output", str(tmp_path / "one.html"))
    call("report", "mine", "mine", "--output", str(tmp_path / "two.html"))
    assert (tmp_path / "one.html").stat().st_size > 10_000 and (tmp_path / "two.html").exists()


@pytest.mark.parametrize(("question", "more", "said"), [
    ("space: {distil.eta: [0.0]}", (), "Did you mean 'distill.eta'"),
    ("space: {distill.eta: [0.0]}", ("distill.eta=0.5",), "distill.eta is swept"),
    ("space: {distill.eta: [0.0]}", ("planer.horizon=3",), "Did you mean 'planner.horizon'"),
    ("space: {distill.eta: [-1.0]}", (), "distill.eta=-1.0 is not valid"),
    ("space: {policy.width: [30]}", (), "policy.width=30 must be a multiple of policy.heads=4"),
    ("space: {distill.eta: [0.0]}\nobjective: imagined", ("choose.episodes=0",), "set choose.episodes above 0"),
    ("space: {distill.updates: [10]}\nscheduler: asha", (), "take distill.updates out of space"),
    ("space: {distill.eta: [0.0]}\nscheduler: asha", ("distill.snapshots=1",), "set distill.snapshots to 4"),
    ("space: {distill.eta: [0.0]}\nscheduler: asha", ("runtime.workers=2",), "set runtime.workers=1"),
])
def test_a_sweep_that_cannot_be_is_refused_before_any_work(
    place: Path, question: str, more: tuple[str, ...], said: str
) -> None:
    (place / "question.yaml").write_text(question)
    words = ("tune", "question.yaml", "--dataset", LOG, "--sweep-dir", "runs/refused", *more)
    assert said in call(*words, code=2).output
    assert not (place / "runs" / "refused").exists()


def test_a_sweep_does_not_take_a_uri_for_a_path(place: Path) -> None:
    (place / "question.yaml").write_text("space: {distill.eta: [0.0]}")
    said = call("tune", "question.yaml", "--dataset", LOG, "--sweep-dir", "s3://bucket/sweep", code=2).output
    assert "--sweep-dir=s3://bucket/sweep: a sweep's folder must be a path" in said
    assert not (place / "s3:").exists()


def test_resume_begins_no_sweep(place: Path) -> None:
    (place / "question.yaml").write_text("space: {distill.eta: [0.0]}")
    said = call("tune", "question.yaml", "--dataset", LOG, "--sweep-dir", "runs/new", "--resume", code=2).output
    assert "--resume: runs/new holds no sweep: correct --sweep-dir" in said and not (place / "runs" / "new").exists()


def test_a_sweep_writes_into_no_folder_of_something_else(place: Path) -> None:
    (place / "question.yaml").write_text("space: {distill.eta: [0.0]}")
    said = call("tune", "question.yaml", "--dataset", LOG, "--sweep-dir", "runs/mine", code=2).output
    assert "runs/mine" in said
