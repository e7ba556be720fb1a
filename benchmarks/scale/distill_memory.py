"""Memory of a distillation worker against the number of workers: it falls, since each holds its slices alone.

A random log and random plans are prepared once; then the first of N workers opens the file, reads its slices and draws.
Each runs in a process of its own.

    python benchmarks/scale/distill_memory.py [--steps 1000000] [--workers 1 2 4 8] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ipd_ray.config import DistillConfig, PolicyConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Log, Spec, Transitions
from ipd_ray.distill.fit import Corpus, Material
from ipd_ray.distill.windows import Prompts, Windows
from ipd_ray.files import write_atomic

OBSERVATION, ACTION, EPISODE, LENGTH = 17, 6, 1000, 10
"""Of HalfCheetah; steps of an episode and of a plan."""
DRAWS = 20


def material(steps: int) -> Material:
    """A random log, and a plan for every fiftieth step of it."""
    rng, episodes = np.random.default_rng(0), -(-steps // EPISODE)
    T = episodes * EPISODE
    spec = Spec(
        "bench/random-v0", {"type": "Box", "shape": [OBSERVATION], "dtype": "float32"}, [-1.0] * ACTION,
        [1.0] * ACTION, [ACTION], "float32",
    )
    observation = rng.normal(size=(T, OBSERVATION)).astype(np.float32)
    transitions = Transitions(
        observation=observation, action=rng.uniform(-1, 1, (T, ACTION)).astype(np.float32),
        reward=np.ones(T, np.float32), next_observation=observation, terminal=np.zeros(T, bool),
        episode_start=np.arange(episodes + 1) * EPISODE, spec=spec,
    )
    log = Log(transitions, 0.99, 1.0, np.arange(episodes) % 10 == 0)
    S, index = T // 50, np.arange(T // 50) * 50
    numbers, beyond = np.ones((S, LENGTH), np.float32), np.ones((S, LENGTH + 1), np.float32)
    segments = Segments(
        index=index, episode=transitions.episode[index], timestep=transitions.timestep[index],
        control=np.zeros(S, bool), observation=rng.normal(size=(S, LENGTH + 1, OBSERVATION)).astype(np.float32),
        action=rng.uniform(-1, 1, (S, LENGTH, ACTION)).astype(np.float32), reward=numbers,
        terminal=np.zeros((S, LENGTH), bool), uncertainty=numbers, value=beyond, own_reward=numbers,
        own_terminal=np.zeros((S, LENGTH), bool), own_length=np.full(S, LENGTH), own_value=beyond,
    )
    prompts = Prompts(np.ones(T, np.float32), numbers)
    return Material(
        log, segments, np.ones(S, bool), np.full(S, LENGTH), 1.0, prompts, np.ones(T, np.float32), numbers, 1.0
    )


def prepare(path: Path, steps: int) -> dict[str, Any]:
    """Write the corpus; what that one process takes."""
    before = _peak()
    Corpus.of(material(steps), PolicyConfig(), DistillConfig()).write(path)
    return {"peak": _peak() - before, "file": path.stat().st_size}


def worker(path: Path, world: int) -> dict[str, Any]:
    """What the first of `world` workers holds, and the most that it takes on the way; bytes."""
    before = _peak()
    corpus, config = Corpus.open(path), DistillConfig()
    windows = Windows(
        corpus.columns, corpus.mixture, batch_size=config.batch_size, context=PolicyConfig().context, seed=0,
        device="cpu", rank=0, world=world,
    )
    drawn = sum(len(windows.draw(step).weight) for step in range(DRAWS))
    return {"workers": world, "held": windows.bytes, "peak": _peak() - before, "windows": drawn / DRAWS}


def _peak() -> int:
    """The most memory that this process has had; bytes."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        sys.exit("this system does not tell a process's peak memory in /proc/self/status")
    return int(found[1]) * 1024


def main(steps: int, workers: list[int], out: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.safetensors"
        context = multiprocessing.get_context("spawn")

        def alone(function: Any, *arguments: Any) -> dict[str, Any]:
            with context.Pool(1) as pool:
                return dict(pool.apply(function, arguments))

        once = alone(prepare, path, steps)
        print(f"{steps:,} steps: prepared once in {once['peak'] / 1e6:.0f} MB, file {once['file'] / 1e6:.0f} MB")
        print(f"{'workers':>7} {'held MB':>8} {'peak MB':>8} {'windows of a batch':>19}")
        rows = [alone(worker, path, world) for world in workers]
    for row in rows:
        print(f"{row['workers']:>7} {row['held'] / 1e6:>8.1f} {row['peak'] / 1e6:>8.1f} {row['windows']:>19.1f}")
    if out:
        write_atomic(out, json.dumps({"steps": steps, "prepare": once, "workers": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the log")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of workers")
    parser.add_argument("--out", type=Path, help="file for the numbers")
    given = parser.parse_args()
    main(given.steps, given.workers, given.out)
