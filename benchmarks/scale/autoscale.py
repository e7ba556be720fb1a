"""Ray's autoscaler follows the shards: from no node to all it may start, and back to none.

The cluster is Ray's own fake provider, whose machines are raylets of one CPU on this machine; scheduler and autoscaler
are the real ones. Tasks sleep, so that the nodes need no cores of their own.

    python benchmarks/scale/autoscale.py --nodes 3 --shards 60 --seconds 2
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from nodes import QUIET, AutoscaledNodes
from record import RESULTS, write

from ipd_ray import testing
from ipd_ray.config import RuntimeConfig
from ipd_ray.engine import Task

SHRINK_SECONDS = 120.0


class Watch(threading.Thread):
    """Looks at the cluster every second."""

    def __init__(self, crew: Any):
        super().__init__(daemon=True)
        self._crew, self._over = crew, threading.Event()
        self.begun = time.monotonic()
        self.rows: list[dict[str, float]] = []
        self.done = 0

    def run(self) -> None:
        import ray

        while not self._over.wait(1.0):
            up, starting = self._crew()
            nodes = sum(n["Alive"] and n["Resources"].get("CPU", 0) > 0 for n in ray.nodes())
            self.rows.append({"second": round(time.monotonic() - self.begun, 1), "nodes": nodes, "actors": up,
                              "actors_without_room": starting, "shards_done": self.done})

    def stop(self) -> None:
        self._over.set()
        self.join()


def measure(folder: Path, nodes: int, shards: int, seconds: float, min_actors: int = 0) -> dict[str, Any]:
    """Return node and actor counts over time, before, while and after the shards are carried out."""
    from ipd_ray.distributed import cluster
    from ipd_ray.distributed.engine import RayEngine

    with AutoscaledNodes(folder, nodes) as fake:
        cluster.connect(fake.address)
        end = time.monotonic() + 60.0
        while not cluster.inspect().autoscaled and time.monotonic() < end:
            time.sleep(0.5)
        runtime = RuntimeConfig(engine="ray", address=fake.address, min_actors=min_actors)
        engine = RayEngine(runtime, "cpu")
        watch = Watch(engine.crew)
        watch.start()
        tasks = [Task(f"sleep {i}", testing.square, {"value": i, "seconds": seconds}) for i in range(shards)]
        results: dict[int, int] = {}

        def done(number: int, value: int) -> None:
            results[number], watch.done = value, len(results) + 1

        try:
            failed = engine.map_shards(tasks, done, lambda: None)
            assert not failed and results == {i: i * i for i in range(shards)}
            worked = time.monotonic() - watch.begun
            end = time.monotonic() + SHRINK_SECONDS
            while watch.rows[-1]["nodes"] > 0 and time.monotonic() < end:
                time.sleep(0.5)
        finally:
            watch.stop()
            engine.close()
            cluster.disconnect()
    most = max(row["nodes"] for row in watch.rows)
    return {
        "nodes_allowed": nodes, "shards": shards, "seconds_a_shard": seconds, "work_seconds": round(worked, 1),
        "first_node_after_seconds": next(row["second"] for row in watch.rows if row["nodes"]),
        "most_nodes": most, "all_nodes_after_seconds": next(r["second"] for r in watch.rows if r["nodes"] == most),
        "none_left_after_seconds": round(watch.rows[-1]["second"] - worked, 1), "nodes_left": watch.rows[-1]["nodes"],
        "timeline": watch.rows,
    }


def main() -> None:
    """Measure, print the timeline and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--work", type=Path, default=Path("runs/autoscale"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.update(QUIET)
    shutil.rmtree(args.work, ignore_errors=True)
    found = measure(args.work.absolute(), args.nodes, args.shards, args.seconds)
    write("autoscale", found, args.out)
    for row in found["timeline"][:: max(1, len(found["timeline"]) // 30)]:
        print("  ".join(f"{name} {value:g}" for name, value in row.items()))
    print("  ".join(f"{name}: {value}" for name, value in found.items() if name != "timeline"))


if __name__ == "__main__":
    main()
