"""Peak memory of one step on a log of some length, with few updates, in the processes that really do it.

    python benchmarks/speed/footprint.py world_model made-up/steps-v0 DIR

DIR holds a run, whose earlier steps are reused; prints a line of JSON: bytes of the process that drives and of the
largest worker.
"""

from __future__ import annotations

import json
import resource
import sys

from contest import peak_memory

from ipd_ray.config import RunConfig, load

FEW = (
    "values.updates=60", "world_model.max_updates=30", "world_model.eval_every=30", "actor.reaches=[0.15]",
    "actor.rounds=2", "actor.updates=5", "actor.value_updates=5", "actor.episodes=20", "correct.updates=1.0",
    "select.starts=250", "distill.updates=20", "choose.episodes=20", "choose.length=50",
    "choose.without_imagination=false", "distill.snapshots=1", "runtime.engine=local", "runtime.actors=1",
)  # fmt: skip
"""What shortens a run of gym-small; sizes that memory depends on stay."""
STEPS = ("values", "world_model", "reach", "actor", "imagine", "distill", "choose")


def settings() -> RunConfig:
    return load("gym-small", overrides=FEW)


def main(step: str, dataset: str, folder: str) -> None:
    from ipd_ray.api import run

    run(dataset, settings(), run_dir=folder, until=step)
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"driver": peak_memory(), "worker": worker}))


if __name__ == "__main__":
    main(*sys.argv[1:])
