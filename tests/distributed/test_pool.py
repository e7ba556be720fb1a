"""The pool of actors: a killed actor loses nothing, a poison task is set aside, actors come and go with the work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipd_ray import testing
from ipd_ray.engine import Task, drive
from ipd_ray.errors import TaskError

pytestmark = pytest.mark.ray


@pytest.fixture
def pool(ray_cluster: str) -> Iterator[object]:
    from ipd_ray.distributed.pool import ActorPool

    pool = ActorPool(lambda: 2, threads=1, gpus=0.0)
    yield pool
    pool.clear()


def test_killed_actor_loses_no_task_and_a_poison_task_is_set_aside(pool, tmp_path: Path):
    tasks = [Task(f"square {i}", testing.square, {"value": i}) for i in range(6)]
    tasks.append(Task("mortal", testing.die_once, {"value": 7, "marker": str(tmp_path / "died")}))
    tasks.append(Task("poison", testing.fail, {"message": "bad shard"}))
    tasks.append(Task("deadly", testing.die, {}))
    results: dict[int, int] = {}
    failed = drive(tasks, pool, done=results.__setitem__)
    assert results == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16, 5: 25, 6: 49}
    assert set(failed) == {7, 8}
    assert "ValueError: bad shard" in failed[7] and "in fail" in failed[7]
    assert failed[8].startswith("deadly: its worker died 3 times: ") and "actor died" in failed[8]


def test_tasks_run_side_by_side_and_an_idle_actor_goes_while_a_straggler_works(pool, tmp_path: Path):
    first, straggler, alone = (str(tmp_path / name) for name in ("first", "straggler", "alone"))
    tasks = [
        Task("first", testing.meet, {"mine": first, "other": straggler}),
        Task("straggler", testing.meet, {"mine": straggler, "other": alone}),
    ]
    sizes: list[int] = []

    def tick() -> None:
        sizes.append(len(pool))
        if 2 in sizes and len(pool) == 1:
            Path(alone).touch()

    assert not drive(tasks, pool, tick=tick)
    assert max(sizes) == 2 and Path(alone).exists()


def test_least_actors_stay_though_nothing_waits(pool, tmp_path: Path):
    mine, other = str(tmp_path / "mine"), str(tmp_path / "other")
    pool.least = 2
    sizes: list[int] = []

    def tick() -> None:
        sizes.append(len(pool))
        if len(sizes) == 4:
            Path(other).touch()

    assert not drive([Task("alone", testing.meet, {"mine": mine, "other": other})], pool, tick=tick)
    assert set(sizes) == {2}


def test_call_that_cannot_be_sent_back_is_an_error_not_a_death(pool):
    failed = drive([Task("lock", testing.unpicklable, {})], pool)
    assert "pickle" in failed[0]


def test_actors_that_cannot_start_end_the_run_with_the_cause(pool, monkeypatch: pytest.MonkeyPatch):
    import ray

    class Broken:
        def __init__(self) -> None:
            raise ModuleNotFoundError("No module named 'ipd_ray'")

        def hello(self, device: str) -> None: ...

    monkeypatch.setattr(pool, "_make", ray.remote(Broken))
    with pytest.raises(TaskError, match="installed on every node"):
        drive([Task("square", testing.square, {"value": 2})], pool)
