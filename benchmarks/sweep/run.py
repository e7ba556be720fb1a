"""What a sweep costs, and whether it computes anything twice: 8 trials of loss weights on bench/pendulum/medium-v0.

    python benchmarks/sweep/run.py alone    WORK    # the shared steps once, then 8 trials one after another, no Tune
    python benchmarks/sweep/run.py together WORK    # `ipd-ray tune`, two trials at a time
    python benchmarks/sweep/run.py killed   WORK    # the same, killed with half of its trials done, and resumed
    python benchmarks/sweep/run.py verdict  WORK    # the goals, from what the others left in WORK

Each of the first three takes minutes on two idle cores (the first one trains with a thread a core, which another load
stalls), begins with an empty store, and leaves one JSON file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ipd_ray import api
from ipd_ray.config import build, flatten, preset
from ipd_ray.sweep import Sweep, common_settings, known_points, read_question

QUESTION = Path(__file__).with_name("pendulum.yaml")
DATASET, PRESET = "bench/pendulum/medium-v0", "demo"
SHARED = ("values", "world_model", "imagine")
OVER, START = 1.3, 30.0
"""The sweep may take this multiple of the back-to-back time, and this many seconds a trial over the concurrency."""


def alone(work: Path) -> dict[str, Any]:
    """Every trial by `run` on all cores, one after another, in one store: nothing is computed twice here either."""
    question = read_question(QUESTION)
    common = common_settings(question, flatten(preset(PRESET)), None, {})
    seconds: list[float] = []
    for number, point in enumerate(known_points(question) or ()):
        began = time.perf_counter()
        api.run(DATASET, build(common, point), run_dir=work / f"run-{number}")
        seconds.append(time.perf_counter() - began)
    return {"seconds": sum(seconds), "each": seconds, "store": stored(work)}


def together(work: Path) -> dict[str, Any]:
    """`ipd-ray tune`, undisturbed."""
    began = time.perf_counter()
    subprocess.run(command(work), check=True)
    return {"seconds": time.perf_counter() - began, **outcome(work)}


def killed(work: Path) -> dict[str, Any]:
    """`ipd-ray tune`, killed when half of its trials have ended, with all its processes; then gone on with."""
    trials = len(known_points(read_question(QUESTION)) or ())
    process = subprocess.Popen(command(work), start_new_session=True)
    ended = 0
    while process.poll() is None and ended < trials // 2:
        time.sleep(0.5)
        ended = sum(r["state"] == "done" for r in ledger(work))
    os.killpg(process.pid, signal.SIGKILL)  # the driver; the cluster it started ends with it
    process.wait()
    before = {r["trial"] for r in ledger(work) if r["state"] == "done"}
    time.sleep(5.0)
    subprocess.run(command(work), check=True)
    return {"done_before": sorted(before), **outcome(work)}


def command(work: Path) -> list[str]:
    words = [sys.executable, "-m", "ipd_ray.cli", "tune", str(QUESTION), "--dataset", DATASET, "--preset", PRESET]
    return [*words, "--sweep-dir", str(work / "sweep")]


def ledger(work: Path) -> list[dict[str, Any]]:
    return Sweep(work / "sweep").records()


def stored(work: Path) -> dict[str, int]:
    """Finished artifacts by step."""
    return dict(Counter(p.parent.parent.name for p in (work / "store").glob("*/*/artifact.json")))


def outcome(work: Path) -> dict[str, Any]:
    """The table, what the store holds, and how often each shared key was computed."""
    summary = json.loads((work / "sweep" / "summary.json").read_text())
    parts = [p for r in ledger(work) for p in r.get("parts", ())] + summary["shared"]
    made = Counter(p["name"] for p in parts if not p["reused"])
    shown = ("point", "settings", "mean", "half", "also", "accepted")
    return {
        "points": [{k: p[k] for k in shown} for p in summary["points"]],
        "ranking": summary["ranking"], "store": stored(work), "made": {name: made[name] for name in SHARED},
        "reuse": summary["reuse"], "agreement": summary["agreement"],
    }


def verdict(work: Path) -> None:
    """Print the goals and whether they are met."""
    found = {name: json.loads((work / f"{name}.json").read_text()) for name in ("alone", "together", "killed")
             if (work / f"{name}.json").exists()}
    mine = found["together"]
    for name in SHARED:
        print(f"{name}: {mine['store'][name]} in the store, computed {mine['made'][name]} time(s) by the sweep")
    print(json.dumps({r["step"]: f"needed {r['needed']}, made {r['made']}" for r in mine["reuse"]}))
    print(f"proxies rank the points: {mine['agreement']}")
    # As if two cores had halved what the trials did one by one: no run back to back is faster than that.
    spent = {r["step"]: r["seconds"] for r in mine["reuse"]}
    first = max(spent["values"], spent["world_model"]) + spent["imagine"]
    least = first + sum(seconds for step, seconds in spent.items() if step not in SHARED) / 2
    _bound("the parts' own seconds on two cores without a gap", least, mine)
    if "alone" in found:
        _bound("back to back", found["alone"]["seconds"], mine)
    if "killed" in found:
        same = all(found["killed"][k] == mine[k] for k in ("points", "ranking"))
        print(f"killed after {len(found['killed']['done_before'])} trials and resumed: "
              f"{'the same table' if same else 'ANOTHER TABLE'}; computed {found['killed']['made']} after the kill")


def _bound(what: str, apart: float, mine: dict[str, Any]) -> None:
    bound = OVER * apart + START * len(mine["points"]) / 2
    seconds = mine["seconds"]
    print(
        f"{what}: {apart:.0f} s; the sweep: {seconds:.0f} s, ratio {seconds / apart:.2f}; bound {bound:.0f} s: "
        f"{'met' if seconds <= bound else 'MISSED'}"
    )


def main() -> None:
    what, work = sys.argv[1], Path(sys.argv[2]).absolute()
    if what == "verdict":
        verdict(work)
        return
    place = work / what
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    result = {"alone": alone, "together": together, "killed": killed}[what](place)
    (work / f"{what}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
