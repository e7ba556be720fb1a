"""What Ray costs imagination: one actor against a plain loop, two actors against two bare processes.

The same shards by the same planner, a thread a worker, in steady state: shards that came while workers started or ended
do not count. The four ways take turns, run after run, and medians are compared.

    python benchmarks/scale/overhead.py --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from driver import planner_tasks
from nodes import QUIET, driver_environment
from record import RESULTS, read, write

from ipd_ray.config import PlannerConfig, RuntimeConfig
from ipd_ray.engine import Task

PLANNER, LENGTH = PlannerConfig(candidates=4096, horizon=5), 5
TRIAL = 4
"""Starts of the shard that others are sized by."""
WAYS = ("loop", "one_actor", "two_processes", "two_actors")
BARE = """
import pickle, sys, time
tasks, times = pickle.load(open(sys.argv[1], "rb")), []
for task in tasks:
    task.function(**task.arguments)
    times.append(time.time())
print(times)
"""


def bare(tasks: list[Task], folder: Path, processes: int) -> float:
    """Shards a second of processes that know nothing of Ray, each with its share of the shards."""
    started = []
    for i in range(processes):
        file = folder / f"tasks-{i}"
        file.write_bytes(pickle.dumps(tasks[i::processes]))
        started.append(subprocess.Popen([sys.executable, "-c", BARE, file], env=driver_environment(),
                                        stdout=subprocess.PIPE, text=True))
    ended: list[float] = []
    for process in started:
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a bare process ended with {process.returncode}")
        ended += json.loads(said)
    return steady(ended, processes)


def on_ray(tasks: list[Task], actors: int) -> float:
    """Shards a second through the engine, on a cluster of this machine."""
    from ipd_ray.distributed.engine import RayEngine

    engine, ended = RayEngine(RuntimeConfig(engine="ray", actors=actors), "cpu"), []
    try:
        failed = engine.map_shards(tasks, lambda *_: ended.append(time.time()), lambda: None)
    finally:
        engine.close()
    assert not failed, failed
    return steady(ended, actors)


def steady(ended: list[float], workers: int) -> float:
    """Shards a second from each worker's first shard until the first of them has no more."""
    times = sorted(ended)[workers - 1 : len(ended) - workers + 1]
    return (len(times) - 1) / (times[-1] - times[0])


def sized(root: Path, shards: int, seconds: float) -> list[Task]:
    """Shards that take about so many seconds each in one process."""
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    def make(size: int, count: int) -> list[Task]:
        return planner_tasks(work, count, root, size=size, length=LENGTH, planner=PLANNER)

    trial = make(TRIAL, 4)
    trial[0].function(**trial[0].arguments)
    took = []
    for task in trial[1:]:
        begun = time.perf_counter()
        task.function(**task.arguments)
        took.append(time.perf_counter() - begun)
    tasks = make(max(1, round(seconds * TRIAL / min(took))), shards)
    if len(tasks) < shards:
        raise SystemExit(f"the log has starts for {len(tasks)} such shards only: lower --shards or --seconds")
    return tasks


def main() -> None:
    """Measure, compare and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shards", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=2.2, help="of a shard in one process")
    parser.add_argument("--more", action="store_true", help="add to the runs in the result file")
    parser.add_argument("--work", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.update(QUIET, OMP_NUM_THREADS="1")
    root = args.work.absolute()
    tasks = sized(root, args.shards, args.seconds)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    loads: list[float] = []
    if args.more and (before := read("overhead", args.out)):
        rates, loads = before["shards_per_second"], before["load_before_each_run"]
    for run in range(args.runs):
        loads.append(os.getloadavg()[0])
        for way in WAYS[run % 4 :] + WAYS[: run % 4]:
            workers = 1 + way.startswith("two")
            rate = on_ray(tasks, workers) if way.endswith(("actor", "actors")) else bare(tasks, root, workers)
            rates[way].append(round(rate, 4))
        found = summary(rates)
        write("overhead", {"shards": len(tasks), "starts_a_shard": len(tasks[0].arguments["spec"].index), **found,
                           "shards_per_second": rates, "load_before_each_run": loads}, args.out)
        print("  ".join(f"{way} {rates[way][-1]:.3f}/s" for way in WAYS), f"load {loads[-1]:.1f}", flush=True)
    print("  ".join(f"{name}: {value}" for name, value in found.items()))


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """The two numbers that count, by medians."""
    loop, one, bare_two, two = (statistics.median(rates[way]) for way in WAYS)
    return {
        "runs": len(rates["loop"]), "seconds_a_shard": round(1.0 / loop, 2),
        "overhead_of_one_actor": round(loop / one - 1.0, 4),
        "gain_of_two_processes": round(bare_two / loop, 3), "gain_of_two_actors": round(two / loop, 3),
        "two_actors_over_two_processes": round(two / bare_two, 3),
    }


if __name__ == "__main__":
    main()
