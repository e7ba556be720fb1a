"""One dataset and preset over several seeds: return of the policy, of its ablations and of the data.

    python benchmarks/seeds.py demo --preset demo --seeds 0,1,2,3,4
    python benchmarks/seeds.py bench/hopper/mixed-v0 --preset gym-small --seeds 0,1,2 [section.field=value ...]

Runs go to runs/seeds/, one JSON a seed to benchmarks/results/; what is done is not done again. The table shows every
seed's number, the median, and the paired differences with their standard errors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev

from ipd_ray import config as configs
from ipd_ray import run
from ipd_ray.artifacts import numeric_platform
from ipd_ray.files import write_atomic

HERE = Path(__file__).resolve().parent


def commit() -> str:
    """Return the commit that the numbers belong to."""
    command = ["git", "describe", "--always", "--dirty"]
    out = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return out.stdout.strip()


def one(dataset: str, preset: str, seed: int, overrides: list[str], label: str) -> dict:
    """Run one seed, or read what it came to."""
    name = f"{dataset.replace('/', '_')}-{label}-seed{seed}"
    result = HERE / "results" / f"{name}.json"
    if result.exists():
        return json.loads(result.read_text())
    config = configs.load(preset, None, [*overrides, f"seed={seed}"])
    summary = run(dataset, config, run_dir=Path("runs/seeds") / name)
    del summary["run_dir"]  # of this machine alone
    summary |= {"preset": preset, "overrides": overrides, "commit": commit(), "platform": numeric_platform()}
    write_atomic(result, json.dumps(summary, indent=1))
    return summary


def difference(rows: list[dict], other: str) -> str:
    """Paired difference of the policy and an ablation, with its standard error."""
    gaps = [r["policy"]["return_mean"] - r[other]["return_mean"] for r in rows]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    return f"policy - {other}: {mean(gaps):+.0f} +- {error:.0f} (standard error over {len(gaps)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--preset", required=True)
    parser.add_argument("--label", help="name of the variation in file names; the preset where not given")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    args = parser.parse_intermixed_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rows = [one(args.dataset, args.preset, seed, args.overrides, args.label or args.preset) for seed in seeds]
    others = [name for name in ("bc", "no_imagination") if all(name in r for r in rows)]
    data = rows[0]["data"]
    print(f"{args.dataset}, {args.preset}: data mean {data['return_mean']:.0f}, best {data['return_max']:.0f}")
    for name in ("policy", *others):
        scores = [r[name]["return_mean"] for r in rows]
        print(f"{name:16s} median {median(scores):7.0f}  mean {mean(scores):7.0f}  seeds {[round(s) for s in scores]}")
    for name in others:
        print(difference(rows, name))
    minutes = [sum(r["seconds"].values()) / 60 for r in rows]
    print(f"minutes of steps, back to back: {[round(m, 1) for m in minutes]}", file=sys.stdout)


if __name__ == "__main__":
    main()
