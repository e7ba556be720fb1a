"""`ipd-ray doctor`: what is not well is found, named and told how to mend, on this machine and on a cluster's nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import LOG, SETTINGS, write_log
from typer.testing import CliRunner, Result

from ipd_ray import doctor
from ipd_ray.cli import app
from ipd_ray.config import load
from ipd_ray.training import cores


def facts(**changes: Any) -> dict[str, Any]:
    platform = {"device": "cpu", "cpu": "x86_64 AVX2", "torch": "2.13.0"}
    return {
        "python": "3.11.7", "ipd_ray": "0.1.0 (abc)", "ray": "2.60.0", "torch": "2.13.0", "numpy": "2.4.6",
        "platform": platform, "cores": 8, "threads": "1", "storage": {"/shared": ""}, **changes,
    }


def machine(name: str, answer: Any = None, cpus: float = 8.0, actors: int = 8) -> doctor.Machine:
    return doctor.Machine(name, cpus, 0.0, 1e9, 1e8, facts() if answer is None else answer, actors)


def judged(*machines: doctor.Machine, settings: tuple[str, ...] = ()) -> list[doctor.Finding]:
    """What is not well."""
    found = doctor.judge(machines, load(overrides=settings))
    return [finding for finding in found if finding.level != "ok"]


def test_equal_machines_are_well() -> None:
    found = list(doctor.judge([machine("a"), machine("b")], load()))
    assert {finding.level for finding in found} == {"ok"}
    assert {finding.check: finding.text for finding in found}["storage"].endswith("deleted from 2 nodes")


@pytest.mark.parametrize(
    ("other", "level", "check", "parts"),
    [
        (facts(torch="2.12.0"), "error", "torch", ["2.13.0 on a", "2.12.0 on b", "the same image"]),
        (facts(ipd_ray="0.1.0 (old)"), "error", "ipd_ray", ["0.1.0 (old) on b"]),
        (facts(platform={"cpu": "arm64"}), "error", "numeric platform", ["arm64 on b", "one type of node"]),
        (facts(storage={"/shared": "No permission"}), "error", "storage", ["b, /shared: No permission", "mount"]),
        (facts(threads="8"), "warning", "threads", ["OMP_NUM_THREADS=8 on b", "runtime.threads=1"]),
        (facts(cores=4), "warning", "threads", ["b gives out 8 CPUs and has 4 cores", "--num-cpus"]),
        (ModuleNotFoundError("No module named 'ipd_ray'"), "error", "answer", ["b cannot be used", "install"]),
        (TimeoutError("node b has not answered within 60 s: why?"), "error", "answer", ["within 60 s"]),
    ],
)
def test_machine_that_is_not_like_the_other(other: Any, level: str, check: str, parts: list[str]) -> None:
    [finding] = judged(machine("a"), machine("b", other))
    assert (finding.level, finding.check) == (level, check)
    assert [part for part in parts if part not in finding.text] == [], finding.text


def test_platform_of_a_machine_without_workers_does_not_matter() -> None:
    assert judged(machine("head", facts(platform={"cpu": "arm64"}), cpus=0.0, actors=0), machine("a")) == []


def test_storage_that_is_each_machines_own(tmp_path: Path) -> None:
    (tmp_path / "mark").write_text("")
    for file, part in [("mark", ""), ("", ""), ("other", "no storage that the nodes share")]:
        assert part in doctor.look({str(tmp_path): file}, doctor.probe_folder, "cpu")["storage"][str(tmp_path)]
    (tmp_path / "file").write_text("")
    [said] = doctor.look({str(tmp_path / "file" / "x"): ""}, doctor.probe_folder, "cpu")["storage"].values()
    assert "Not a directory" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mark"]


def call(*words: str, code: int) -> Result:
    result = CliRunner().invoke(app, ["doctor", *words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_log(tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "MEASURED_FOR", 0.01)
    return tmp_path


def test_this_machine_with_a_dataset(place: Path) -> None:
    document = json.loads(call(LOG, *SETTINGS, "--json", code=0).stdout)
    assert document["machines"][0]["cpus"] == cores() and document["machines"][0]["memory"] > 1e8
    assert [row["step"] for row in document["plan"]["steps"]][:2] == ["values", "world_model"]
    assert all(row["seconds"] > 0 and row["memory"] > 0 for row in document["plan"]["steps"])
    shown = call(LOG, *SETTINGS, code=0).stdout
    assert "ok       storage" in shown and "memory of a worker" in shown
    assert [path.name for path in place.iterdir()] == ["minari"]


def test_exit_codes_tell_errors_from_warnings(place: Path) -> None:
    assert "warning  threads" in call(f"runtime.actors={cores() + 1}", code=3).stdout
    assert "error    dataset" in call("test/pendulm-v0", code=2).stdout
    assert "error    settings" in call("runtime.device=cuda:99", code=2).stdout
    (place / "file").write_text("")
    assert "error    storage" in call(f"runtime.store={place}/file/store", code=2).stdout
    assert "name one dataset" in call(LOG, "test/other-v0", code=2).stderr
