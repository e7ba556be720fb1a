"""The model of the imagination stage, where the answer is known by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model import Stage, simulate

pytestmark = pytest.mark.ray  # its constants are the engine's
PLAIN = Stage(shards=12, shard=10.0, actors=3, driver=0.0, spread=0.0, begin=3)


def test_actors_share_the_shards():
    course = simulate(PLAIN)  # 12 / 3 rounds of 10 s
    assert course.seconds == 40.0 and course.actors_busy == 1.0 and course.lost == 0


def test_a_slow_driver_is_the_limit():
    # 1,000 shards through a driver of 10 ms each, the first 100 starts included: 10 s and one start
    course = simulate(Stage(shards=1000, shard=1e-3, actors=100, driver=10e-3, spread=0.0, begin=100))
    assert course.seconds == pytest.approx(11.0, abs=0.1) and course.driver_busy == pytest.approx(1.0, abs=0.01)


def test_actors_come_after_the_lag_and_by_doubling_where_not_asked_at_once():
    assert simulate(replace(PLAIN, begin=0, lag=60.0)).seconds == 60.0 + 40.0
    many = Stage(shards=100_000, shard=10.0, actors=64, driver=0.0, spread=0.0, begin=16, lag=100.0)
    assert simulate(many).full_after == 100.0
    # 16 are there, seen at 5 s: 32 at 105 s, seen at 110 s: 64 at 210 s
    assert simulate(replace(many, at_once=False)).full_after == 210.0


def test_shards_of_a_lost_machine_are_computed_again():
    # Machines last 100 s on average, a shard 10 s: about one attempt in ten is lost.
    course = simulate(Stage(shards=2000, shard=10.0, actors=20, driver=0.0, begin=20, actors_a_node=1, lifetime=100.0))
    assert 150 < course.lost < 280 and 1 < course.most_losses < 10
    assert course.seconds > 1000.0
