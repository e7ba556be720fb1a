"""A run killed with SIGKILL, and started again, ends as one that was not; an interrupt leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_runs import LOG, SETTINGS, ipd_ray, write_log

from ipd_ray.api import plan, run
from ipd_ray.artifacts import Artifact, read_jsonl
from ipd_ray.config import load

ENOUGH = {  # of a step to be killed in its middle
    "values": ["values.updates=600", "world_model.max_updates=300"],
    "imagine": ["select.starts=60", "imagine.shard_size=2"],
    "distill": ["distill.updates=400"],
    "evaluate": ["evaluate.max_steps=200", "evaluate.episodes=6"],
}


def _digests(folder: Path) -> dict[str, str]:
    links = json.loads((folder / "links.json").read_text())
    return {part: Artifact(Path(link["path"])).digest for part, link in links.items()}


def _curves(folder: Path) -> list[tuple[str, int, object]]:
    """Learning curves without rates, which are the machine's."""
    shown = ("q_loss", "nll", "reward_gain", "imitation")
    rows = read_jsonl(folder / "metrics.jsonl")
    return [(r["part"], r["step"], [r[name] for name in shown if name in r]) for r in rows]


def _start(place: Path, *words: str) -> subprocess.Popen[str]:
    return ipd_ray("run", LOG, *words, cwd=place, MINARI_DATASETS_PATH=str(place / "minari"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    write_log(root / "minari", episodes=12)
    return root


@pytest.mark.usefixtures("one_process", "without_report")
@pytest.mark.parametrize("steps", [
    ("distill",),
    pytest.param(("values", "imagine", "distill", "evaluate"), marks=pytest.mark.slow),
], ids="-".join)  # fmt: skip
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(
    place: Path, steps: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "-".join(steps)
    store = place / name / "store"
    begun = {  # the world model is trained beside the values
        "values": "values/*/checkpoint.safetensors", "imagine": "imagine/*/shard-*.json",
        "distill": "distill/*/checkpoint.safetensors", "evaluate": "evaluate/*/lease.json",
    }
    words = [*SETTINGS, *(word for step in steps for word in ENOUGH[step]), "runtime.checkpoint_seconds=0.1"]
    killed_in = []
    for step in steps:
        process = _start(place, *words, "--run-dir", f"{name}/mine")
        while process.poll() is None and not any(store.glob(begun[step])):
            time.sleep(0.005)
        assert process.poll() is None, f"{step}: over before it could be killed: {process.communicate()[1]}"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not any(store.glob(f"{step}/*/artifact.json")):
            killed_in.append(step)
    assert len(killed_in) >= min(len(steps), 3), killed_in  # the shortest may have slipped through
    process = _start(place, *words, "--run-dir", f"{name}/mine")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(place / "minari"))
    undisturbed = place / f"{name}-undisturbed" / "mine"  # all of it in this process
    run(LOG, load(overrides=words), run_dir=undisturbed)
    assert _digests(place / name / "mine") == _digests(undisturbed)
    assert _curves(place / name / "mine") == _curves(undisturbed)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_leaves_no_process_and_says_how_to_go_on(
    place: Path, number: signal.Signals, code: int
) -> None:
    name = f"interrupted-{code}"
    more = [
        "values.updates=1000000", "runtime.checkpoint_seconds=0.1", "runtime.actors=2", "--run-dir", f"{name}/mine",
    ]
    process = _start(place, *SETTINGS, *more)
    while not any((place / name / "store").glob("values/*/checkpoint.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) >= 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends Ctrl-C to all of them
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert "the same command goes on" in said and "values.updates=1000000" in said and "Traceback" not in said
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    assert not (place / name / "mine" / "lease.json").exists()


def test_shard_that_fails_three_times_is_set_aside_and_tried_again_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where shard 1 is to be written lies a folder: the others are made, the exit code is 3. On Ray: test_pool.py."""
    write_log(tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    folder = tmp_path / "runs" / "mine"
    planned = plan(LOG, load(overrides=SETTINGS), run_dir=folder, until="imagine")
    key = next(row["key"] for row in planned["steps"] if row["step"] == "imagine")
    blocked = tmp_path / "runs" / "store" / "imagine" / key / "shard-00001.parquet"
    blocked.mkdir(parents=True)
    said = []
    for code in (3, 0):
        process = ipd_ray("imagine", LOG, *SETTINGS, "--run-dir", str(folder), cwd=tmp_path)
        said.append(process.communicate(timeout=120)[1])
        assert process.returncode == code, said
        if code:
            assert len(list(blocked.parent.glob("shard-*.json"))) == 2
            blocked.rmdir()
    assert "imagine: 1 of 3 shards failed three times and were set aside" in said[0]
    assert "shard 1:" in said[0] and "IsADirectoryError" in said[0] and "in write_shard" in said[0]
    assert "imagine: 2 of 3 shards are there already" in said[1]
