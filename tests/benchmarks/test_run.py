"""The ladder: every rung is a valid config, mistakes cost nothing, and the real thing runs at the smallest size."""

from __future__ import annotations

from pathlib import Path

import pytest
import run as ladder
import yaml
from results import read
from small_runs import LOG, SETTINGS, write_log

from ipd_ray import config as configs
from ipd_ray.errors import UserError


@pytest.fixture
def logged(tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "minari")
    return tmp_path


def words(root: Path, methods: str, *more: str) -> list[str]:
    places = ["--runs", str(root / "runs"), "--out", str(root / "results")]
    return ["--datasets", LOG, "--seeds", "0", "--preset", "demo", "--methods", methods, *places, *more]


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_every_rung_is_a_valid_change_of_every_preset(rung: str) -> None:
    import json

    for preset in configs.preset_names():
        configs.load(preset, None, [f"{name}={json.dumps(value)}" for name, value in ladder.CHANGES[rung].items()])


def test_rungs_run_score_and_are_not_run_again(
    logged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {name: yaml.safe_load(value) for name, _, value in (s.partition("=") for s in SETTINGS)}
    monkeypatch.setitem(ladder.TIERS, "tiny", ladder.Tier({"": "demo"}, (0,), {"": 1}, (LOG,), sizes))
    rungs = "iql,value_guided,ipd_ranked"
    ladder.main(words(logged, rungs, "--tier", "tiny"))
    files = sorted((logged / "results" / "tiny").glob("*/*.json"))
    found = {result.method: result for result in map(read, files)}
    assert sorted(found) == sorted(rungs.split(","))
    assert found["ipd_ranked"].config["evaluate"]["candidates"] == 32
    assert found["value_guided"].config["distill"]["imagined_ratio"] == 0.0
    # 40 updates and 4 policies on the way, the last one included; two episodes each.
    assert [point.step for point in found["ipd_ranked"].curve] == [10, 20, 30, 40]
    assert [len(point.returns) for point in found["ipd_ranked"].curve] == [2] * 4
    assert found["iql"].reference == (-1200.0, -150.0)
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    ladder.main(words(logged, rungs, "--tier", "tiny"))
    assert capsys.readouterr().out == ""
    assert [file.read_bytes() for file in files] == before


def test_mistakes_are_named_before_any_work(logged: Path) -> None:
    with pytest.raises(SystemExit, match=r"ipd2 unknown; there are bc, dt"):
        ladder.main(words(logged, "ipd2"))
    with pytest.raises(UserError, match="horizon"):
        ladder.main(words(logged, "ipd", "--vary", "planner.horizn=3"))
    with pytest.raises(SystemExit, match="must begin with one of hopper"):
        ladder.main(["--d4rl", "ant_medium-v2.hdf5"])
    write_log(logged / "minari", name="test/unscored-v0")
    metadata = logged / "minari" / "test" / "unscored-v0" / "data" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("ref_min_score", "unused"))
    with pytest.raises(SystemExit, match="no reference scores"):
        ladder.main([*words(logged, "ipd"), "--datasets", "test/unscored-v0"])
    assert not list(logged.glob("runs/small/*seed0"))
