"""One JSON file a run: what was scored, on what, with which settings, how long it took.

Shared by our runs and by peers in an environment of their own, so this file needs nothing but the standard library.
A result lies at results/<tier>/<dataset, / as _>/<method>-seed<seed>.json; a run whose file is there is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SCHEMA = 1
RUNGS = {
    "bc": "imitation of the log, nothing else",
    "dt": "Decision Transformer: the prompt is a target return",
    "iql": "implicit Q-learning: step 1's own policy",
    "v_prompt": "imitation with the learned value as prompt",
    "value_guided": "the preset's weighting of log and Q, without imagination",
    "value_guided_chosen": "its policy that does best inside the world model",
    "greedy_q": "imagination without look-ahead: the candidate action with the best Q",
    "ipd_last": "the method, the last policy that was distilled",
    "ipd": "the method: the policy that does best inside the world model",
    "ipd_ranked": "the method, its actions ranked by Q at run time",
}
PEERS = {
    "d3rlpy-bc": "d3rlpy's behaviour cloning",
    "d3rlpy-iql": "d3rlpy's IQL",
    "d3rlpy-td3bc": "d3rlpy's TD3+BC",
    "d3rlpy-cql": "d3rlpy's CQL",
    "d3rlpy-dt": "d3rlpy's Decision Transformer",
}
"""Methods in the order of the tables: what each rung of the ladder adds to the one before, and peers."""


@dataclass(frozen=True)
class Score:
    """Whole episodes of one policy."""

    step: int
    """Gradient updates of the policy when it was scored."""
    returns: list[float]
    """Raw return of each episode."""

    @property
    def mean(self) -> float:
        return sum(self.returns) / len(self.returns)


@dataclass(frozen=True)
class Result:
    """One run: a method on a dataset with a seed."""

    dataset: str
    method: str
    """A rung of the ladder (`ipd`), a variation of one (`ipd+eta=0.5`), or a peer (`d3rlpy-iql`)."""
    tier: str
    seed: int
    curve: list[Score]
    """The policy as it was scored on the way."""
    reference: tuple[float, float]
    """Raw returns that count as 0 and as 100."""
    config: dict[str, Any]
    """Every setting of the method."""
    seconds: dict[str, float]
    """Wall time by part of the run."""
    evaluation: dict[str, int]
    """episodes, and the seed of the first one."""
    commit: str
    versions: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the method reports of itself."""
    kept: Score | None = None
    """The policy that the run leaves, where it is not the last of the curve: the headline."""
    schema: int = SCHEMA

    def normalise(self, raw: float) -> float:
        """100 * (raw - min) / (max - min), as D4RL does."""
        low, high = self.reference
        return 100.0 * (raw - low) / (high - low)

    @property
    def headline(self) -> Score:
        """The policy that the run leaves: the last of the curve, or the one that was kept instead, without a look at
        the scores."""
        return self.kept or self.curve[-1]

    @property
    def last(self) -> float:
        """Normalised mean of the headline."""
        return self.normalise(self.headline.mean)

    @property
    def best(self) -> float:
        """Normalised mean of the best checkpoint: chosen by the scores themselves, so it flatters."""
        return max(self.normalise(score.mean) for score in self.curve)


def path_of(tier: str, dataset: str, method: str, seed: int, root: Path = RESULTS) -> Path:
    """Return where a run's result lies."""
    return root / tier / dataset.replace("/", "_") / f"{method}-seed{seed}.json"


def write(result: Result, root: Path = RESULTS) -> Path:
    """Write a result, atomically; return its file."""
    path = path_of(result.tier, result.dataset, result.method, result.seed, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(result), indent=1) + "\n")
    os.replace(temporary, path)
    return path


def read(path: Path) -> Result:
    """Read a result. Raises ValueError for an unknown schema."""
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')!r}, this code reads {SCHEMA}: remove it and rerun.")
    content["curve"] = [Score(**score) for score in content["curve"]]
    content["kept"] = Score(**content["kept"]) if content.get("kept") else None
    content["reference"] = tuple(content["reference"])
    return Result(**content)


def read_all(tier: str, root: Path = RESULTS) -> Iterator[Result]:
    """Read all results of a tier, in order of file name."""
    for path in sorted((root / tier).glob("*/*.json")):
        yield read(path)


def commit() -> str:
    """Return the commit that the numbers belong to; `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
