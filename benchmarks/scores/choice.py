"""Does the world model know which policy is better? Imagined against real return of every policy a run chose from.

    python benchmarks/scores/choice.py RUN_FOLDER... [--out FILE.json]

RUN_FOLDERs are runs that chose (`ipd`) and, for policies without imagination, runs of these (`value_guided`): every
policy is scored in the real environment by the run that it belongs to. For each choice: rank correlation (Spearman),
the real return of what was kept, of the last policy with plans, and of the best.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ipd_ray.artifacts import Artifact
from ipd_ray.data.transitions import rank_correlation
from ipd_ray.errors import UserError
from ipd_ray.files import write_atomic
from ipd_ray.runs import RunFolder, open_run


def real_returns(runs: list[RunFolder]) -> dict[tuple[str, int], float]:
    """Mean return in the real environment by (key of the distillation, updates)."""
    found: dict[tuple[str, int], float] = {}
    for run in runs:
        for part in run.links:
            if part.partition(":")[0] == "evaluate":
                key = run.links[part.replace("evaluate", "distill")]["key"]
                for point in Artifact(run.artifact(part)).diagnostics["curve"]:
                    found[key, point["step"]] = point["return_mean"]
    return found


def compare(run: RunFolder, real: dict[tuple[str, int], float]) -> dict[str, Any]:
    """A run's candidates with both returns, and what they say of its choice."""
    choose = Artifact(run.artifact("choose")).diagnostics
    rows = []
    for candidate in choose["candidates"]:
        part = "distill" if candidate["variant"] == "ipd" else f"distill:{candidate['variant']}"
        scored = real.get((run.links[part]["key"], candidate["step"]))
        if scored is not None:
            rows.append({**candidate, "real": scored})
    if len(rows) < 2:
        raise UserError(f"{run.path}: fewer than two of its candidates were scored: give their runs, too.")
    imagined, actual = ([row[name] for row in rows] for name in ("return_mean", "real"))
    kept = [row for row in rows if (row["variant"], row["step"]) == (choose["variant"], choose["step"])]
    last = [row for row in rows if row["variant"] == "ipd"]
    return {
        "dataset": run.identity["dataset"], "seed": run.identity["seed"], "candidates": rows,
        "rank_correlation": rank_correlation(imagined, actual),
        "kept": kept[0]["real"] if kept else None,
        "last": max(last, key=lambda row: row["step"])["real"] if last else None,
        "best": max(actual),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    runs = [open_run(name) for name in args.runs]
    real = real_returns(runs)
    found = [compare(run, real) for run in runs if "choose" in run.links]
    for row in found:
        kept, last = (f"{row[name]:.0f}" if row[name] is not None else "not scored" for name in ("kept", "last"))
        print(
            f"{row['dataset']} seed {row['seed']}: rank correlation {row['rank_correlation']:.2f} over "
            f"{len(row['candidates'])} policies; kept {kept}, last with plans {last}, best {row['best']:.0f}"
        )
    if args.out:
        write_atomic(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
