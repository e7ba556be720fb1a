"""The local engine: no task is lost with its process, and no process outlives the engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipd_ray import testing
from ipd_ray.engine import MACHINES, LocalEngine, Outcome, Task, drive
from ipd_ray.errors import TaskError


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(2)
    yield engine
    engine.close()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: object, seconds: float = 20.0) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def test_killed_worker_loses_no_task_and_a_poison_task_is_set_aside(engine: LocalEngine, tmp_path: Path):
    tasks = [Task(f"square {i}", testing.square, {"value": i}) for i in range(6)]
    tasks.append(Task("mortal", testing.die_once, {"value": 7, "marker": str(tmp_path / "died")}))
    tasks.append(Task("poison", testing.fail, {"message": "bad shard"}))
    tasks.append(Task("deadly", testing.die, {}))
    results: dict[int, int] = {}
    failed = engine.map_shards(tasks, results.__setitem__, lambda: None)
    assert {i: results[i] for i in range(7)} == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16, 5: 25, 6: 49}
    assert set(failed) == {7, 8}
    assert "ValueError: bad shard" in failed[7] and "in fail" in failed[7]
    assert failed[8] == "deadly: its worker died 3 times: killed, most likely for want of memory"


@pytest.mark.parametrize(
    ("function", "value", "said"),
    [
        (os._exit, {"status": 7}, "exit code 7"),
        pytest.param(testing.die, {"number": signal.SIGTERM}, "signal 15 (Terminated)", marks=pytest.mark.slow),
    ],
)
def test_how_a_worker_died_is_said(engine: LocalEngine, function: Callable[..., Any], value: dict[str, int], said: str):
    with pytest.raises(TaskError, match=rf"values: its worker died 3 times: {re.escape(said)}$"):
        engine.run_steps([Task("values", function, value)], lambda: None)


class Fates:
    """Workers of which each task meets its fates in order, one at a time, and then succeeds."""

    def __init__(self, fates: dict[int, list[Outcome]]):
        self._fates, self._running = fates, []

    def capacity(self, waiting: int) -> int:
        return 1 - len(self._running)

    def start(self, number: int, task: Task) -> None:
        self._running.append(number)

    def wait(self, seconds: float) -> list[Outcome]:
        number = self._running.pop()
        return [self._fates[number].pop(0) if self._fates[number] else Outcome(number, result=number)]


def test_machines_that_are_taken_back_are_not_the_tasks_failures():
    worker, machine, error = (
        Outcome(0, error="killed", lost="worker"), Outcome(0, error="gone", lost="machine"), Outcome(0, error="raised")
    )

    def end(fates: list[Outcome], retry: bool = True) -> dict[int, str]:
        results: dict[int, int] = {}
        failed = drive([Task("shard 0", testing.square, {})], Fates({0: fates}), done=results.__setitem__,
                       retry_errors=retry)
        assert results == ({} if failed else {0: 0})
        return failed

    assert not end([machine] * (MACHINES - 1) + [worker] * 2)
    assert not end([worker, error])
    assert end([machine, worker, error, machine, worker]) == {0: "shard 0: its worker died 3 times: killed"}
    assert end([worker, worker, error]) == {0: "raised"}
    assert end([machine] * MACHINES) == {0: f"shard 0: its machine died {MACHINES} times: gone"}
    assert end([error], retry=False) == {0: "raised"}


def test_failed_step_raises_with_its_traceback(engine: LocalEngine):
    with pytest.raises(TaskError, match=r"values failed:\n(.*\n)*ValueError: no such column"):
        engine.run_steps([Task("values", testing.fail, {"message": "no such column"})], lambda: None)


def test_workers_end_with_their_parent(tmp_path: Path):
    script = (
        "from ipd_ray.engine import LocalEngine, Task; from ipd_ray import testing\n"
        "if __name__ == '__main__':\n"
        f"    task = Task('long', testing.write_pid, {{'path': {str(tmp_path / 'pid')!r}, 'seconds': 600.0}})\n"
        "    LocalEngine(1).run_steps([task], lambda: None)\n"
    )
    (tmp_path / "main.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")])
    try:
        assert until((tmp_path / "pid").exists, 60.0)
        assert until(lambda: (tmp_path / "pid").read_text())
        worker = int((tmp_path / "pid").read_text())
        assert alive(worker)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert until(lambda: not alive(worker))
