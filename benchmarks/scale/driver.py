"""What a shard costs the driver: 10,000 of them through Ray with their manifest entries on local disk.

Two kinds: `trivial` (a shard of one step is written, nothing is planned) for the driver's rate and memory, and
`planner` (the real step 4 with a tiny planner and tiny models), which benchmarks/scale/model.py is checked against.

    python benchmarks/scale/driver.py --shards 10000
"""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from nodes import QUIET
from record import RESULTS, read, write

from ipd_ray import testing
from ipd_ray.artifacts import Store, Workspace
from ipd_ray.config import (
    AcceptConfig,
    DataConfig,
    ImagineConfig,
    PlannerConfig,
    RuntimeConfig,
    SelectConfig,
    ValuesConfig,
    WorldModelConfig,
)
from ipd_ray.data.columns import write_columns
from ipd_ray.data.minari_source import load
from ipd_ray.data.shards import read_entries
from ipd_ray.engine import Engine, Task
from ipd_ray.progress import Listeners, ShardProgress
from ipd_ray.steps import (
    LogRef,
    Place,
    finish_imagination,
    gate_of,
    run_select,
    run_shard,
    run_values,
    run_world_model,
)
from ipd_ray.storage import Folder

PLACE = Place("cpu", 1, 30.0)
DISCARDED = 0.05
"""Share of the shards before the rate is measured: actors start."""


def trivial_tasks(work: Path, shards: int) -> list[Task]:
    """Shards that cost a worker next to nothing."""
    return [Task(f"shard {i}", testing.trivial_shard, {"work": str(work), "shard": i}) for i in range(shards)]


def planner_tasks(
    work: Path, shards: int, root: Path, *, size: int = 1, length: int = 1,
    planner: PlannerConfig = PlannerConfig(candidates=8, horizon=2),  # noqa: B008 (frozen)
) -> list[Task]:
    """The real step 4 on the demo's log, `size` starts of `length` steps a shard, by models learned in seconds."""
    store, key = Store(root / "store"), "0" * 64
    transitions = load("demo")
    columns = root / "log.safetensors"
    write_columns(columns, transitions)
    log = LogRef(str(columns), DataConfig(), 0)

    def path(step: str, learn: Callable[..., Any], config: Any) -> str:
        if store.find(step, key) is None:
            learn(str(store.folder(step, key)), PLACE, log, config, 0)
            store.commit(step, key, version=1, parts={})
        found = store.find(step, key)
        assert found is not None
        return str(found.folder)

    values = path("values", run_values, ValuesConfig(updates=200, width=32))
    model = WorldModelConfig(members=3, elites=2, width=32, layers=2, max_updates=100, eval_every=50)
    world_model = path("world_model", run_world_model, model)
    imagine, accept = ImagineConfig(length=length, shard_size=size), AcceptConfig(min_length=1)
    common: dict[str, Any] = {"work": str(work), "place": PLACE, "log": log, "values": values, "imagine": imagine}
    select = SelectConfig(starts=size * shards, regret_share=1.0, frontier_share=0.0, episode_cap=1.0)
    specs = run_select(**common, select=select, seed=0)
    gate = gate_of(accept, log, values, world_model, uncertainty=imagine.uncertainty, regret_share=1.0,
                   length=length, device="cpu")
    return [
        Task(f"shard {s.shard}", run_shard,
             {**common, "seed": 0, "world_model": world_model, "planner": planner, "gate": gate, "spec": s})
        for s in specs
    ]


def measure(engine: Engine, tasks: list[Task], work: Path) -> dict[str, Any]:
    """Carry the tasks out as the pipeline does; return rate, driver's processor time a shard and memory over time."""
    times: list[float] = []
    memory: list[float] = []
    cpu: list[float] = []
    worked: list[float] = []
    progress = ShardProgress(0, len(tasks), engine.crew, Listeners())
    begun = time.monotonic()

    def done(_: int, entry: dict[str, Any]) -> None:
        progress.add({"accepted": 0, **entry})
        times.append(time.monotonic() - begun)
        if len(times) % max(1, len(tasks) // 20) == 0:
            memory.append(_resident_megabytes())
        cpu.append(time.process_time())
        worked.append(entry["worker_seconds"])

    timed = [Task(t.name, testing.timed, {"function": t.function, **t.arguments}) for t in tasks]
    failed = engine.map_shards(timed, done, progress.tick)
    assert not failed, failed
    assert len(read_entries(Folder.of(work))) == len(tasks)
    since = int(len(tasks) * DISCARDED)
    left = len(times) - 1 - since
    began_finish = time.monotonic()
    finish_imagination(Workspace(work), len(tasks))
    return {
        "shards": len(tasks), "per_second": round(left / (times[-1] - times[since]), 1),
        "driver_milliseconds_a_shard": round(1e3 * (cpu[-1] - cpu[since]) / left, 3),
        "worker_milliseconds_a_shard": round(1e3 * float(np.mean(worked[since:])), 3),
        "seconds": round(times[-1], 1), "first_shard_after_seconds": round(times[0], 1),
        "second_of_each_shard": [round(t, 2) for t in np.quantile(times, np.linspace(0, 1, 21))],
        "resident_megabytes": memory, "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "task_bytes": int(np.mean([len(pickle.dumps(t)) for t in tasks[:100]])),
        "finish_seconds": round(time.monotonic() - began_finish, 2), "load": os.getloadavg(),
    }


def call_milliseconds(engine: Engine, actors: int, calls: int = 1500) -> float:
    """What a call takes an actor beside its work, the driver's share included, where as many actors are busy."""
    times: list[float] = []
    tasks = [Task("nothing", testing.square, {"value": i}) for i in range(calls)]
    engine.map_shards(tasks, lambda *_: times.append(time.monotonic()), lambda: None)
    return round(1e3 * actors * (times[-1] - times[calls // 3]) / (calls - 1 - calls // 3), 3)


def _resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def main() -> None:
    """Measure both kinds and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--kinds", default="trivial,planner")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/driver"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.update(QUIET)
    from ipd_ray.distributed.engine import RayEngine

    root = args.work.absolute()
    found = read("driver", args.out)
    for kind in args.kinds.split(","):
        work = root / kind
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        tasks = trivial_tasks(work, args.shards) if kind == "trivial" else planner_tasks(work, args.shards, root)
        engine = RayEngine(RuntimeConfig(engine="ray", actors=args.actors), "cpu")
        try:
            found[kind] = {"actors": args.actors, "call_milliseconds": call_milliseconds(engine, args.actors),
                           **measure(engine, tasks, work)}
        finally:
            engine.close()
        write("driver", found, args.out)
        shown = {k: v for k, v in found[kind].items() if k != "second_of_each_shard"}
        print(kind, *(f"  {name}: {value}" for name, value in shown.items()), sep="\n", flush=True)
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
