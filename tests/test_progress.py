"""What a run says of its shards while they come in."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ipd_ray import listeners, progress
from ipd_ray.listeners import Pace
from ipd_ray.progress import Crew, Listener, ShardProgress


class Heard(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[tuple[int, int, Mapping[str, float]]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((done, total, metrics))


class Clock:
    """time.monotonic, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        for module in (listeners, progress):
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_rates_count_this_runs_shards_alone(monkeypatch: pytest.MonkeyPatch):
    clock, heard = Clock(monkeypatch), Heard()
    shards = ShardProgress(5, 10, lambda: (3, 2), heard)
    clock.now += 2.0
    shards.add({"steps": 40, "segments": 8, "accepted": 2, "reward_gain": 0.5})
    clock.now += 2.0
    shards.add({"steps": 20, "segments": 4, "accepted": 4, "reward_gain": 0.1})
    # 60 steps in 4 s, 6 of 12 segments
    assert heard.rows[-1] == (
        7, 10, {"imagined_steps_per_second": 15.0, "accept_rate": 0.5, "reward_gain": 0.1, "actors": 3}
    )


def test_workers_that_wait_for_room_are_told_when_that_changes(monkeypatch: pytest.MonkeyPatch):
    clock, heard, crew = Clock(monkeypatch), Heard(), [(2, 0)]
    shards = ShardProgress(0, 10, lambda: crew[0], heard)
    for now in ((2, 0), (0, 4), (0, 4), (3, 1), (4, 0), (4, 0), (2, 0)):
        crew[0] = now
        clock.now += 11.0
        shards.tick()
        shards.tick()
    others = ", the others start or wait for room: `ray status` shows what is asked for"
    assert heard.notes == [f"imagine: {up} of 4 workers are up{others * (up < 4)}" for up in (0, 3, 4)]


def test_that_nobody_is_up_is_said_again_each_minute(monkeypatch: pytest.MonkeyPatch):
    clock, heard, crew = Clock(monkeypatch), Heard(), [(0, 1)]
    says = Crew("values", lambda: crew[0], heard)
    said = []
    for second in range(150):
        clock.now += 1.0
        says()
        said += [second + 1] * (len(heard.notes) - len(said))
    assert said == [10, 70, 130] and heard.notes[0].startswith("values: 0 of 1 workers are up, the others")
    crew[0] = (3, 1)
    for _ in range(150):
        clock.now += 1.0
        says()
    assert len(heard.notes) == 4


def test_pace_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch):
    clock, pace = Clock(monkeypatch), Pace()
    pace.update(500, 2000)  # there before
    for second in range(1, 201):
        clock.now += 1.0
        pace.update(500 + second + 4 * max(0, second - 100), 2000)  # 1 a second, then 5
    assert pace.rate == pytest.approx(5.0)
    assert pace.left == pytest.approx((2000 - 1100) / 5.0)
