"""The ladder: one more part of the method a rung, and peers that nobody here wrote, on the same data and episodes.

    python benchmarks/scores/run.py                                    # the small tier, every dataset, rung and peer
    python benchmarks/scores/run.py --tier short --datasets bench/hopper/mixed-v0 --seeds 0,1,2 --methods ipd,d3rlpy-iql
    python benchmarks/scores/run.py --methods ipd --vary planner.horizon=8 --vary distill.eta=0.1
    python benchmarks/scores/run.py --d4rl hopper_medium-v2.hdf5 --tier full     # whoever has D4RL's own files

Every run is one JSON file in benchmarks/scores/results; what is there is not run again, a run that was cut off goes on.
Runs share values, world model and imagination through one store. `table.py` draws tables and plots from the files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from results import PEERS, RESULTS, RUNGS, Result, Score, commit, path_of, write

from ipd_ray import config as configs
from ipd_ray import run
from ipd_ray.artifacts import Artifact, numeric_platform
from ipd_ray.data import importer
from ipd_ray.data.minari_source import load, local_ids
from ipd_ray.data.transitions import Log, Spec, prepare
from ipd_ray.errors import UserError
from ipd_ray.evaluate.episodes import evaluate
from ipd_ray.runs import RunFolder
from ipd_ray.steps import values_of
from ipd_ray.training import resolve_device

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

LAST = {"choose.episodes": 0}
LOG_ALONE = {"distill.imagined_ratio": 0.0}
PLAIN = {**LOG_ALONE, **LAST, "distill.eta": 0.0, "distill.data_temperature": 0.0}
CHANGES: dict[str, dict[str, Any]] = {
    "bc": {**PLAIN, "distill.prompt": "none"},
    "dt": {**PLAIN, "distill.prompt": "fixed", "policy.timesteps": "episode"},
    "iql": {},
    "v_prompt": {**PLAIN, "distill.prompt": "value"},
    "value_guided": {**LOG_ALONE, **LAST},
    "value_guided_chosen": LOG_ALONE,
    "greedy_q": {**LAST, "planner.kind": "greedy_q"},
    "ipd_last": LAST,
    "ipd": {},
    "ipd_ranked": {"evaluate.candidates": 32},
}
"""What each rung changes of the preset."""

DATASETS = (
    "bench/hopper/mixed-v0",
    "bench/hopper/medium-v0",
    "bench/halfcheetah/medium-replay-v0",
    "bench/pendulum/medium-v0",
)


@dataclass(frozen=True)
class Tier:
    """Sizes that make numbers comparable."""

    presets: Mapping[str, str]
    """Preset by a part of the dataset's id; "" is for all others."""
    seeds: tuple[int, ...]
    peer_updates: Mapping[str, int]
    """Gradient updates of each peer; "" is for all others."""
    datasets: tuple[str, ...] = DATASETS
    overrides: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""

    def preset(self, dataset: str) -> str:
        return _by_part(self.presets, dataset)


SMALL_PRESETS = {"pendulum": "demo", "": "gym-small"}
TIERS = {
    "demo": Tier(
        {"": "demo"}, (0, 1, 2, 3, 4), {"": 20_000}, ("demo",), about="the embedded demo data, its preset: minutes"
    ),
    "small": Tier(
        SMALL_PRESETS, (0, 1, 2), {"d3rlpy-dt": 5_000, "": 20_000},
        about="presets as shipped for two cores; peers 20,000 updates (Decision Transformer 5,000)",
    ),
    "unseen": Tier(
        {"reacher": "demo", "mountain-car": "demo", "": "gym-small"}, (0, 1, 2), {"d3rlpy-dt": 5_000, "": 20_000},
        (
            "unseen/reacher/mixed-v0", "unseen/mountain-car/mixed-v0", "unseen/double-pendulum/mixed-v0",
            "unseen/walker2d/mixed-v0", "unseen/hopper/random-v0",
        ),
        about="sets that unseen.py makes, on which nothing was ever chosen; presets as shipped",
    ),
    "short": Tier(
        SMALL_PRESETS, (0, 1, 2), {"": 20_000},
        ("bench/hopper/mixed-v0", "bench/pendulum/medium-v0"), {"distill.updates": 20_000},
        about="two sets, 20,000 updates of policy and peers: a night on two cores",
    ),
    "full": Tier(
        {"": "gym"}, (0, 1, 2, 3, 4), {"d3rlpy-dt": 100_000, "": 500_000},
        about="full sizes and published budgets: for a GPU",
    ),
}


def _by_part(table: Mapping[str, Any], text: str) -> Any:
    return next((value for part, value in table.items() if part and part in text), table[""])


# ---- our own rungs


def score_rung(tier_name: str, dataset: str, method: str, seed: int, args: Any) -> Result:
    """Run one rung, or go on with it."""
    tier, rung = TIERS[tier_name], method.split("+")[0]
    runtime = {"runtime.train_threads": args.threads, "runtime.actors": args.actors}
    values = {"ablations": [], **tier.overrides, **CHANGES[rung], **runtime, "seed": seed}  # rungs are their own
    overrides = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    config = configs.load(args.preset or tier.preset(dataset), None, [*overrides, *args.vary])
    place = args.runs / tier_name
    transitions = load(dataset, cache=place / "store" / "data")
    reference = _reference(transitions.spec)
    folder = place / f"{dataset.replace('/', '_')}-{method}-seed{seed}"
    began = time.monotonic()
    summary = run(dataset, config, run_dir=folder, until="values" if rung == "iql" else "evaluate")
    found = RunFolder(folder)
    if rung == "iql":
        artifact = found.artifact("values")
        scores = evaluate(BehaviourPolicy(artifact, prepare(transitions, config.data, seed)), config.evaluate)
        curve, kept = [Score(config.values.updates, scores["returns"])], None
    else:
        scores = Artifact(found.artifact("evaluate")).diagnostics
        curve = [Score(point["step"], point["returns"]) for point in scores["curve"]]
        kept = Score(summary["chosen"]["step"], scores["returns"]) if "chosen" in summary else None
    sections = config.model_dump(mode="json", exclude={"runtime", "ablations"})
    said = {k: summary[k] for k in ("data", "imagined", "chosen") if k in summary}
    extra = {"date": date.today().isoformat(), **said}
    extra |= {k: scores[k] for k in ("discounted_mean", "value_at_start")}
    return Result(
        dataset, method, tier_name, seed, curve, reference=reference, config=sections,
        seconds={**summary["seconds"], "this_run": round(time.monotonic() - began, 1)},
        evaluation={"episodes": config.evaluate.episodes, "seed": config.evaluate.seed},
        commit=commit(), versions=numeric_platform(resolve_device(config.runtime.device)), extra=extra, kept=kept,
    )


class BehaviourPolicy:
    """IQL's own policy: what step 1 learned by advantage-weighted regression, acting."""

    def __init__(self, values: Path, log: Log):
        self.spec, self.discount, self._scale = log.transitions.spec, log.discount, log.reward_scale
        self._values = values_of(str(values), "cpu")

    def reset(self, mask: Any = None) -> None:
        """Nothing is remembered."""

    def act(self, observation: Any, reward: Any = None) -> Any:
        s = torch.from_numpy(self.spec.flatten_observation(observation))
        return self.spec.unscale_action(self._values.act(s).numpy())

    def value(self, observation: Any) -> Any:
        return self._values.v(torch.from_numpy(self.spec.flatten_observation(observation))).numpy() / self._scale


def _reference(spec: Spec) -> tuple[float, float]:
    if spec.ref_min_score is None or spec.ref_max_score is None:
        raise SystemExit(f"{spec.dataset} has no reference scores: give them to `ipd-ray data import`.")
    return spec.ref_min_score, spec.ref_max_score


# ---- peers


def score_peer(tier_name: str, dataset: str, method: str, seed: int, args: Any) -> None:
    """Run a peer in its own environment; it writes the result itself."""
    if not PEERS_PYTHON.exists():
        raise SystemExit(f"{method} needs an environment of its own: run `make peers` first.")
    archive = args.runs / tier_name / "npz" / f"{dataset.replace('/', '_')}.npz"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, HERE / "export_npz.py", dataset, archive], check=True)
    updates = _by_part(TIERS[tier_name].peer_updates, method)
    evaluation = configs.load(args.preset or TIERS[tier_name].preset(dataset), None, []).evaluate
    command = [
        PEERS_PYTHON, HERE / "peers.py", archive, "--algorithm", method.removeprefix("d3rlpy-"), "--seed", seed,
        "--updates", updates, "--tier", tier_name, "--episodes", evaluation.episodes,
        "--evaluation-seed", evaluation.seed, "--threads", args.threads, "--out", args.out,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    subprocess.run([str(part) for part in command], check=True, env=environment)


# ---- D4RL's own files

D4RL_ENVIRONMENTS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
"""The environments of D4RL's v2 files, as Gymnasium still has them."""
D4RL_REFERENCES = {
    "hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0), "walker2d": (1.629008, 4592.3),
}


def import_d4rl(path: Path) -> str:
    """Import one of D4RL's HDF5 files, such as hopper_medium-v2.hdf5, as d4rl/hopper/medium-v2; return its id."""
    task, _, rest = path.stem.partition("_")
    if task not in D4RL_ENVIRONMENTS:
        raise SystemExit(f"{path}: the name must begin with one of {', '.join(D4RL_ENVIRONMENTS)}, as D4RL names them.")
    dataset = f"d4rl/{task}/{rest.replace('_', '-')}"
    if dataset not in local_ids():
        low, high = D4RL_REFERENCES[task]
        log = importer.read(path, env_id=D4RL_ENVIRONMENTS[task])
        importer.write(log, dataset, ref_min_score=low, ref_max_score=high)
    return dataset


# ---- command line


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=TIERS, default="small")
    parser.add_argument("--datasets", help="comma-separated Minari ids; the tier's where not given")
    parser.add_argument("--d4rl", type=Path, nargs="*", default=[], help="D4RL's HDF5 files, imported first")
    parser.add_argument("--seeds", help="comma-separated; the tier's where not given")
    parser.add_argument("--methods", default=",".join([*RUNGS, *PEERS]), help="rungs and peers, comma-separated")
    parser.add_argument("--vary", action="append", default=[], help="section.field=value: a variation of every rung")
    parser.add_argument("--preset", help="instead of the tier's: for datasets of your own")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of policy training and peers")
    parser.add_argument("--actors", type=int, default=1, help="processes that share values, world model, imagination")
    parser.add_argument("--runs", type=Path, default=Path("runs/scores"), help="where runs and their store go")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    tier = TIERS[args.tier]
    datasets = [import_d4rl(path) for path in args.d4rl] or (args.datasets or ",".join(tier.datasets)).split(",")
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else tier.seeds
    methods = args.methods.split(",")
    if unknown := [m for m in methods if m not in RUNGS and m not in PEERS]:
        raise SystemExit(f"--methods: {', '.join(unknown)} unknown; there are {', '.join([*RUNGS, *PEERS])}.")
    for seed in seeds:
        for dataset in datasets:
            for method in methods:
                name = "+".join([method, *args.vary]) if method in RUNGS else method
                if path_of(args.tier, dataset, name, seed, args.out).exists():
                    continue
                print(f"---- {args.tier} {dataset} {name} seed {seed}", flush=True)
                if method in PEERS:
                    score_peer(args.tier, dataset, method, seed, args)
                else:
                    result = score_rung(args.tier, dataset, name, seed, args)
                    print(f"---- {name}: {result.headline.mean:.0f} raw, {result.last:.1f} normalised", flush=True)
                    write(result, args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
