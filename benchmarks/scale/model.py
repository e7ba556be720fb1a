"""A model of the imagination stage: one driver, actors that come and go, machines that are taken back.

Simulated event by event, with the rules of ipd_ray/distributed/pool.py and engine.py: one shard in flight an actor, a
driver that serves one event after another, demand that doubles the room (or is all at once where runtime.actors says
so), lost shards started again at the end of the queue. What it does not know: the network, and cores that driver and
workers share.

    python benchmarks/scale/model.py            # checks it against results/driver.json, then asks it for 1,000 GPUs
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from record import RESULTS, read, write

from ipd_ray.distributed.engine import AHEAD, LOOK_SECONDS
from ipd_ray.engine import MACHINES

WAITS = 0.7e-3
"""Seconds that the driver's two looks at 1,000 calls in flight take beyond those at a few (ray.wait, measured)."""
READY, DONE, DIED, NOTICED, LOOK, NODE = range(6)


@dataclass(frozen=True)
class Stage:
    """What the stage is made of. Times in seconds."""

    shards: int
    shard: float
    """A worker's time for one shard."""
    actors: int
    """Actors that there are at most."""
    driver: float = 1e-3
    """The driver's time for one shard: it hands out, collects and counts one after another."""
    call: float = 0.0
    """What a call takes an actor beside its work, the driver's time included."""
    spread: float = 0.1
    """Standard deviation of a shard's time, as a share of it."""
    actors_a_node: int = 8
    at_once: bool = True
    """All actors are asked for at the start (runtime.actors); else room doubles."""
    lag: float = 0.0
    """From demand to an actor that is up: autoscaler, machine, image, imports."""
    begin: int = 0
    """Actors that there is room for at the start, without lag."""
    lifetime: float = float("inf")
    """Mean time until a node is taken back (spot), exponential."""
    notice: float = 14.0
    """From the end of a node until its calls are known to be lost."""


@dataclass(frozen=True)
class Course:
    """What became of it."""

    seconds: float
    lost: int
    """Shards that were computed again."""
    most_losses: int
    """Machines lost under one and the same shard."""
    driver_busy: float
    """Share of the time."""
    actors_busy: float
    """Share of the actors' time from the first shard on, all `actors` counted."""
    full_after: float
    """Seconds until 95 % of the actors were up; 0 where they never were."""


def simulate(stage: Stage, seed: int = 0) -> Course:
    """Carry the stage out, once."""
    rng = random.Random(seed)
    events: list[tuple[float, int, int]] = []
    waiting: deque[int] = deque(range(stage.shards))
    losses = [0] * stage.shards
    running: dict[int, int] = {}  # actor to shard
    node_of: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    finish: dict[int, float] = {}
    actors = nodes = lost = done = asked = 0
    driver_free = driver_busy = worked = full_after = now = 0.0

    def bring(count: int, at: float) -> None:
        nonlocal nodes, asked
        asked += count
        while count > 0:
            size = min(count, stage.actors_a_node)
            heapq.heappush(events, (at, NODE, nodes))
            members[nodes] = [0] * size
            nodes, count = nodes + 1, count - size

    bring(stage.begin, 0.0)
    heapq.heappush(events, (0.0, LOOK, 0))
    up: set[int] = set()
    while done < stage.shards:
        now, kind, which = heapq.heappop(events)
        if kind == LOOK:
            ahead = stage.actors if stage.at_once else max(AHEAD, len(up))
            wanted = min(len(waiting) + len(running), stage.actors, len(up) + ahead)
            if wanted > asked:
                bring(wanted - asked, now + stage.lag)
            heapq.heappush(events, (now + LOOK_SECONDS, LOOK, 0))
        elif kind == NODE:
            members[which] = list(range(actors, actors + len(members[which])))
            for actor in members[which]:
                node_of[actor] = which
                up.add(actor)
                heapq.heappush(events, (now, READY, actor))
            actors += len(members[which])
            if len(up) >= 0.95 * stage.actors and not full_after:
                full_after = now
            if stage.lifetime < float("inf"):
                heapq.heappush(events, (now + rng.expovariate(1.0 / stage.lifetime), DIED, which))
        elif kind == DIED:
            held = [a for a in members[which] if a in up]
            up.difference_update(held)
            for actor in held:
                heapq.heappush(events, (now + stage.notice, NOTICED, actor))
        elif kind == NOTICED:
            asked -= 1
            if (shard := running.pop(which, None)) is not None:
                lost += 1
                losses[shard] += 1
                waiting.append(shard)
        elif which in up:  # READY or DONE, at the driver
            driver_free = max(driver_free, now) + stage.driver
            driver_busy += stage.driver
            if kind == DONE:
                del running[which]
                worked += finish.pop(which)
                done += 1
            if waiting:
                running[which] = waiting.popleft()
                finish[which] = max(0.0, rng.gauss(stage.shard, stage.spread * stage.shard))
                end = driver_free + max(0.0, stage.call - stage.driver) + finish[which]
                heapq.heappush(events, (end, DONE, which))
            else:
                up.discard(which)
                asked -= 1
    return Course(round(driver_free, 1), lost, max(losses), round(driver_busy / driver_free, 4),
                  round(worked / (stage.actors * driver_free), 4), round(full_after, 1))


def check(measured: dict[str, Any]) -> dict[str, Any]:
    """The model's rate for what driver.py measured, from its parts: a shard's work, a call, the driver's time."""
    stage = Stage(
        measured["shards"], measured["worker_milliseconds_a_shard"] / 1e3, measured["actors"],
        driver=measured["driver_milliseconds_a_shard"] / 1e3, call=measured["call_milliseconds"] / 1e3,
        begin=measured["actors"],
    )
    said = measured["shards"] / simulate(stage).seconds
    return {"stage": asdict(stage), "simulated_per_second": round(said, 1), "measured_per_second":
            measured["per_second"], "simulated_over_measured": round(said / measured["per_second"], 3)}


def thousand(driver: float) -> dict[str, Any]:
    """1e10 imagined steps on 1,000 GPUs, for several sizes of a shard, and what lag, spot and driver do to it.

    spot: nodes of 8 GPUs that are taken back after 2 hours on average; 3 minutes until a new one works.
    """
    steps, rate = 1e10, 2_000.0  # imagined steps a second and GPU: an assumption, times go with it
    out: dict[str, Any] = {"assumed_steps_per_second_and_gpu": rate, "ideal_hours": steps / rate / 1000 / 3600,
                           "cases": {}}
    for seconds in (5.0, 30.0, 120.0, 600.0):
        base = Stage(round(steps / rate / seconds), seconds, 1000, driver=driver, call=driver + 2e-3, begin=1000)
        spot = replace(base, begin=0, lag=180.0, lifetime=2 * 3600.0)
        cases = {
            "nothing lost": base, "spot": spot, "spot, doubling": replace(spot, at_once=False, begin=8),
            "spot of half an hour": replace(spot, lifetime=1800.0),
        }
        ideal = base.shards * seconds / 1000
        for name, stage in cases.items():
            course = simulate(stage)
            out["cases"][f"{seconds:g} s, {name}"] = {
                "shards": stage.shards, **asdict(course), "over_ideal": round(course.seconds / ideal, 3),
                "shards_per_second": round(stage.shards / course.seconds, 1),
            }
    return out


def main() -> None:
    """Check, ask, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--driver", type=float, help="its milliseconds a shard; the measured ones and WAITS if absent")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    measured = read("driver", args.out)
    found: dict[str, Any] = {"check": {kind: check(m) for kind, m in measured.items() if kind != "machine"}}
    cost = args.driver or measured["planner"]["driver_milliseconds_a_shard"] + 1e3 * WAITS
    found |= {"driver_milliseconds": round(cost, 3), "machines_a_shard_may_lose": MACHINES}
    found["thousand"] = thousand(cost / 1e3)
    write("model", found, args.out)
    for kind, row in found["check"].items():
        print(f"check, {kind}: simulated {row['simulated_per_second']}/s, measured {row['measured_per_second']}/s")
    print(f"1e10 steps, 1,000 GPUs, driver {cost:.2f} ms a shard; ideal {found['thousand']['ideal_hours']:.2f} h:")
    for name, case in found["thousand"]["cases"].items():
        print(f"  {name:<34}", "  ".join(f"{k} {v}" for k, v in case.items()))


if __name__ == "__main__":
    main()
