"""Kills at random moments, round after round, and what became of the result.

Each round is a run of its own on a Ray cluster of several raylets on this machine: imagination and distillation from
the same values and world model. In each, at moments drawn from the round's number, an actor is killed, a node is taken
away (and another added), a training worker is killed, and the driver is killed and started again. At the end its
shards, learning curve and policy are compared with those of a run on the local engine that nobody disturbed.

    python benchmarks/scale/drill.py --rounds 20

Rounds that are in the result file are kept: `--first 10` goes on where ten are done.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes import ACTOR, TRAIN_WORKER, Nodes, driver_environment
from record import RESULTS, read, write

from ipd_ray.artifacts import Artifact, read_jsonl
from ipd_ray.data.shards import read_entries

SETTINGS = (
    "values.updates=300", "values.width=32", "values.batch_size=64",
    "world_model.members=3", "world_model.elites=2", "world_model.width=32", "world_model.layers=2",
    "world_model.max_updates=200", "world_model.eval_every=50", "world_model.batch_size=64",
    "select.starts=160", "select.episode_cap=0.5", "planner.kind=mpc", "planner.candidates=2048",
    "planner.horizon=10", "imagine.length=10", "imagine.shard_size=4",
    "accept.threshold=1000.0", "accept.range_margin=2.0", "accept.min_length=1", "accept.margin=0.0",
    "policy.width=64", "policy.layers=2", "policy.heads=2", "policy.context=10",
    "distill.updates=600", "distill.batch_size=64", "distill.warmup=5", "distill.eta=0.5",
    "choose.episodes=0", "ablations=[]", "runtime.train_threads=1", "runtime.checkpoint_seconds=0.5",
)
SHARED = ("data", "values", "world_model")
KINDS = ("actor", "node", "train worker", "driver")
LIMIT_SECONDS = 400.0


@dataclass(frozen=True)
class Kill:
    """What is killed, in which step, when which share of it is done."""

    what: str
    step: str
    share: float


def draw(rng: random.Random, until: str = "distill") -> list[Kill]:
    """One kill of each kind that the steps up to `until` have."""
    either = ("imagine", "distill")[: 1 + (until == "distill")]
    steps = {"actor": ("imagine",), "train worker": ("distill",), "node": either, "driver": either}
    kinds = [kind for kind in KINDS if set(steps[kind]) <= set(either)]
    return [Kill(kind, rng.choice(steps[kind]), rng.uniform(0.02, 0.9)) for kind in kinds]


class Run:
    """A run in a folder of its own, driven by the command line in a process that can be killed."""

    def __init__(self, folder: Path, until: str, settings: Sequence[str]):
        self.folder, self.until, self._settings = folder, until, list(settings)
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, or go on after a kill."""
        words = [sys.executable, "-m", "ipd_ray.cli", self.until, "demo", *self._settings, "--run-dir", "runs/mine"]
        environment = {**driver_environment(), "MINARI_DATASETS_PATH": str(self.folder.parent / "minari")}
        with (self.folder / "driver.log").open("ab") as log:
            self._process = subprocess.Popen(words, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def kill(self) -> bool:
        """Kill the driver, and start it again."""
        assert self._process is not None
        if self._process.poll() is not None:
            return False
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self.start()
        return True

    def code(self) -> int | None:
        """Exit code of the driver; None while it works."""
        return None if self._process is None else self._process.poll()

    def end(self) -> None:
        """Let nothing go on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def said(self) -> str:
        return (self.folder / "driver.log").read_text(errors="replace")

    def share(self, step: str) -> float:
        """How much of a step is done."""
        store = self.folder / "runs" / "store" / step
        if any(store.glob("*/artifact.json")):
            return 1.0
        if step == "imagine":
            shards = _setting(self._settings, "select.starts") / _setting(self._settings, "imagine.shard_size")
            return len(list(store.glob("*/shard-*.json"))) / shards
        rows = [row for file in store.glob("*/metrics.jsonl") for row in read_jsonl(file)]
        return max((row["step"] / row["total"] for row in rows), default=0.0)

    def result(self) -> dict[str, Any]:
        """What must be the same for every run: digests of shards, learning curve, digest of the policy."""
        links = json.loads((self.folder / "runs" / "mine" / "links.json").read_text())
        imagined = Artifact(Path(links["imagine"]["path"]))
        entries = read_entries(imagined.folder)
        found: dict[str, Any] = {"dataset": imagined.digest, "shards": [entries[i]["digest"] for i in sorted(entries)]}
        if self.until == "distill":
            policy = Artifact(Path(links["distill"]["path"]))
            curve = [(row["step"], row["imitation"]) for row in policy.curve()]
            found |= {"steps": [step for step, _ in curve], "losses": [loss for _, loss in curve],
                      "policy": policy.digest}
        return found


def reference(root: Path, until: str, settings: Sequence[str] = SETTINGS) -> Run:
    """The undisturbed run, on the local engine; made once."""
    run = Run(root / f"undisturbed-{until}", until, settings)
    if not (run.folder / "runs" / "mine" / "summary.json").exists():
        run.start()
        wait(run, lambda: None)
    return run


def play(nodes: Nodes, run: Run, kills: Sequence[Kill], rng: random.Random) -> list[dict[str, Any]]:
    """Carry a run out while things die; return what was killed when."""
    began, done = time.monotonic(), []
    left = list(kills)

    def tick() -> None:
        for kill in [k for k in left if run.share(k.step) >= k.share]:
            share = run.share(kill.step)
            if share >= 1.0:  # over before it could be killed
                left.remove(kill)
            elif _strike(kill.what, nodes, run, rng):
                left.remove(kill)
                done.append({"what": kill.what, "step": kill.step, "share": round(share, 3),
                             "second": round(time.monotonic() - began, 1)})

    run.start()
    wait(run, tick)
    return done


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, bool]:
    """Say of each part of a result whether it is that of the undisturbed run."""
    return {name: found[name] == wanted[name] for name in wanted}


def round_(nodes: Nodes, root: Path, number: int, until: str = "distill",
           settings: Sequence[str] = SETTINGS) -> dict[str, Any]:
    """One round: kills drawn from its number, and what became of the result."""
    rng, undisturbed = random.Random(number), reference(root, until, settings)
    on_ray = ("runtime.engine=ray", f"runtime.address={nodes.address}")
    run = Run(root / f"round-{number}", until, [*settings, *on_ray])
    shutil.rmtree(run.folder)
    for name in SHARED:
        here = Path("runs") / "store" / name
        shutil.copytree(undisturbed.folder / here, run.folder / here)
    kills, began = draw(rng, until), time.monotonic()
    killed = play(nodes, run, kills, rng)
    same = compare(run.result(), undisturbed.result())
    missed = [k.what for k in kills if k.what not in {d["what"] for d in killed}]
    shutil.rmtree(run.folder)
    return {"round": number, "killed": killed, "missed": missed, "seconds": round(time.monotonic() - began, 1),
            "same": same}


def _strike(what: str, nodes: Nodes, run: Run, rng: random.Random) -> bool:
    if what == "driver":
        return run.kill()
    if what == "node":
        taken = nodes.take(rng)
        if taken:
            nodes.add()
        return taken
    return nodes.kill_worker({"actor": ACTOR, "train worker": TRAIN_WORKER}[what], rng)


def wait(run: Run, tick: Callable[[], None]) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    try:
        while (code := run.code()) is None:
            tick()
            time.sleep(0.05)
            if time.monotonic() > end:
                raise RuntimeError(f"not over after {LIMIT_SECONDS:g} s:\n{run.said}")
        if code != 0:
            raise RuntimeError(f"the driver ended with {code}:\n{run.said}")
    finally:
        run.end()


def _setting(settings: Sequence[str], name: str) -> float:
    return float(next(s.partition("=")[2] for s in reversed(settings) if s.startswith(f"{name}=")))


def main() -> None:
    """Play the rounds and write what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--nodes", type=int, default=2, help="nodes of one CPU, beside the head")
    parser.add_argument("--work", type=Path, default=Path("runs/drill"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    root = args.work.absolute()
    undisturbed = reference(root, "distill").result()
    rounds = {r["round"]: r for r in read("drill", args.out).get("rounds", [])}
    with Nodes(args.nodes) as nodes:
        for number in range(args.first, args.first + args.rounds):
            rounds[number] = found = round_(nodes, root, number)
            ordered = [rounds[i] for i in sorted(rounds)]
            kinds = {k: sum(d["what"] == k for r in ordered for d in r["killed"]) for k in KINDS}
            write("drill", {
                "settings": list(SETTINGS), "nodes": args.nodes, "shards": len(undisturbed["shards"]),
                "all_same": sum(all(r["same"].values()) for r in ordered), "of_rounds": len(ordered),
                "killed": kinds, "rounds": ordered,
            }, args.out)
            told = ", ".join(f"{d['what']} at {100 * d['share']:.0f} % of {d['step']}" for d in found["killed"])
            verdict = "same" if all(found["same"].values()) else f"DIFFERS: {found['same']}"
            print(f"round {number:>3}: {verdict}; {found['seconds']:.0f} s; killed {told}"
                  + (f"; missed {', '.join(found['missed'])}" if found["missed"] else ""), flush=True)


if __name__ == "__main__":
    main()
