"""A sweep's question and its answer: what is tried, how it is scored, which is best. Knows nothing of Ray.

A point is one setting of the swept fields; a trial is one run of it, with one seed. The ledger in the sweep's folder
holds one JSON file a trial, written by the driver alone, and is all that going on and the report need.

Best is chosen by a rule that does not reward luck. Points are ranked by the lower 95 % bound of their score: over seeds
where there are several, else over episodes. Where there is an environment, the `finalists` of that ranking are
evaluated again on environment seeds that none has seen, and the best lower bound of these scores wins: the maximum of
many noisy scores is too high, a fresh one is not.

There is no population-based training: it changes loss weights while a policy learns, and what comes of that has no key,
is found again by no config, and depends on which trials happened to run side by side.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, PositiveInt, ValidationError, model_validator
from yaml import YAMLError

from ipd_ray.config import RunConfig, Section, build, field_names, flatten, from_yaml, read_yaml
from ipd_ray.errors import UserError, near_name
from ipd_ray.files import write_atomic
from ipd_ray.runs import RunFolder
from ipd_ray.storage import ARTIFACT

SCHEMA = 1
SWEEP, TRIALS, RUNS, BEST = "sweep.json", "trials", "runs", "best.yaml"
FRESH_SEEDS = 1_000_000
"""Distance of the finalists' environment seeds from those that all trials were scored with."""
_STREAM = 33
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)
"""Student's t at 97.5 %, for 1, 2, ... degrees of freedom."""

Objective = Literal["return", "imagined", "fitted_q"]
Point = dict[str, Any]
"""{dotted name: value} of the swept fields."""
_MEASURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "fitted_q": (
        "the discounted value on held-out episodes", ("data.discount", "data.holdout_fraction", "fitted_q.updates"),
    ),
    "imagined": (
        "the return inside the trial's own world model, as step `choose` plays it",
        ("data.holdout_fraction", "world_model.", "imagine.uncertainty", "accept.range_margin", "choose.episodes",
         "choose.length", "choose.noise_std", "choose.known"),
    ),
}
"""What the measures without an environment are, and the fields, or sections, that change more than the policy. Both are
in raw reward units, whatever data.reward_transform is, and the imagined return is not discounted."""


class Range(Section):
    """An interval to draw from."""

    low: float
    high: float
    log: bool = False
    """Drawn evenly in the logarithm."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low:g} must be above 0 with log: true")
        return self


class Question(Section):
    """What a sweep asks: the content of its YAML file."""

    space: dict[str, tuple[Any, ...] | Range]
    """Swept fields by dotted name: a list of values, or {low, high, log}."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields that every trial has in common; --config and the command line win over them."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """grid: all combinations of lists; random: `points` draws; tpe: Optuna's, which learns from the points before."""
    points: PositiveInt | None = None
    """Points tried, by random and tpe."""
    seeds: PositiveInt = 3
    """Runs of each point, with seeds that count on from the config's `seed`. A trial is one of them."""
    scheduler: Literal["none", "asha"] = "none"
    """asha: at a half, a quarter, ... of distill.updates only the better half of the trials goes on; the policies kept
    there are compared, in the environment, or inside the world model where there is none. Of a policy that is corrected
    (`correct.rounds`) it is the first draft."""
    objective: Literal["auto", "return", "imagined", "fitted_q"] = "auto"
    """What is maximised. return: mean return of evaluation; fitted_q: value on held-out episodes, a proxy that needs no
    environment; imagined: return inside the world model, another one; auto: return where there is an environment, else
    fitted_q. What changes the measure itself is not swept with it, such as data.discount with fitted_q."""
    also: tuple[Objective, ...] = ()
    """Measured beside it, to see how well they rank."""
    finalists: int = 3
    """Points that are evaluated again with fresh environment seeds (objective return); 0: none."""
    concurrency: PositiveInt | None = None
    """Trials at a time; where not given, as many as fit, and where an autoscaler may make room 16 more, or as many."""
    sampler_seed: int = 0
    """Of random and tpe."""

    @model_validator(mode="after")
    def _check(self) -> Question:
        if not self.space:
            raise ValueError("space names no field: give at least one, such as distill.eta: [0.0, 0.1]")
        ranges = [name for name, values in self.space.items() if isinstance(values, Range)]
        if self.sampler == "grid" and ranges:
            raise ValueError(
                f"space.{ranges[0]} is a range, but sampler=grid takes lists of values: list them, or set "
                "sampler: random or tpe"
            )
        if self.sampler != "grid" and self.points is None:
            raise ValueError(f"sampler={self.sampler} needs points, how many it tries")
        if self.sampler == "grid" and self.points is not None:
            raise ValueError(f"points={self.points} has no use with sampler=grid, which tries all: leave it out")
        for name, values in self.space.items():
            if name in self.settings:
                raise ValueError(f"{name} is in space and in settings: leave it out of one")
            if not isinstance(values, Range) and len(values) != len({json.dumps(v) for v in values}):
                raise ValueError(f"space.{name} names a value twice")
        return self


def read_question(path: Path) -> Question:
    """Read a sweep's YAML file. Raises UserError for what is wrong with it, with the near name of a typo."""
    try:
        content = from_yaml(path.read_text())
    except FileNotFoundError:
        near = near_name(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise UserError(f"{path} does not exist: tune_configs/ holds sweeps to start from.{near}") from None
    except (OSError, UnicodeDecodeError, ValueError, YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a mapping with `space`, not {type(content).__name__}.")
    known = list(Question.model_fields)
    for name in content:
        if name not in known:
            raise UserError(
                f"{path}: {name!r} is no part of a sweep ({', '.join(known)}).{near_name(str(name), known)}"
            )
    space = content.get("space") or {}
    if not isinstance(space, Mapping):
        raise UserError(f"{path}: space must name fields, such as `distill.eta: [0.0, 0.1]`.")
    for name, values in space.items():
        _check_swept(str(name), values)
    settings = flatten(content.get("settings") or {})
    try:
        return Question.model_validate({**content, "space": dict(space), "settings": settings})
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {_plain(e)}" for e in error.errors())) from None


def _check_swept(name: str, values: Any) -> None:
    if name not in (valid := list(field_names())):
        raise UserError(
            f"space: {name!r} is no field of the config.{near_name(name, valid)} `ipd-ray config` lists all of them."
        )
    if name == "seed":
        raise UserError("space: seed is not swept: `seeds: N` runs each point with N seeds.")
    if name.startswith("runtime."):
        raise UserError(f"space: {name} changes nothing that is computed: set it on the command line.")
    if not isinstance(values, Mapping | list) or not values:
        raise UserError(f"space.{name}={values!r} must be a list of values, or {{low: ..., high: ..., log: true}}.")
    if isinstance(values, Mapping) and kind_of(name) is None:
        raise UserError(f"space.{name} is no number: give a list of values, not a range.")
    if isinstance(values, Mapping) and kind_of(name) is int:
        low, high = values.get("low"), values.get("high")
        if isinstance(low, int | float) and isinstance(high, int | float) and math.ceil(low) > math.floor(high):
            raise UserError(f"space.{name}={values!r} holds no whole number: widen it, or give a list of values.")


def _plain(error: Any) -> str:
    if error["type"] == "value_error":
        return f"{error['ctx']['error']}."
    return f"{'.'.join(str(x) for x in error['loc'])}={error.get('input')!r} is not valid: {error['msg'].lower()}."


def kind_of(name: str) -> type | None:
    """int or float, for a field that is a number."""
    model: Any = RunConfig
    *sections, leaf = name.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    annotation = model.model_fields[leaf].annotation
    kinds = {annotation, *getattr(annotation, "__args__", ())}
    found = [k for k in (int, float) if k in kinds or any(getattr(x, "__origin__", None) is k for x in kinds)]
    return found[0] if found else None


# ---- the points


class Sampler(Protocol):
    """Where points come from."""

    def ask(self) -> Point | None:
        """Return the next point, or None where there is no other."""

    def tell(self, point: Point, score: float | None, stopped: int | None = None) -> None:
        """Hear what a point came to; None: it failed. stopped: the update at which it was stopped, with this score."""


class Listed:
    """Points known beforehand."""

    def __init__(self, points: Sequence[Point]):
        self._left = iter(points)

    def ask(self) -> Point | None:
        return next(self._left, None)

    def tell(self, point: Point, score: float | None, stopped: int | None = None) -> None:
        return


class Tpe:
    """Optuna's tree-structured Parzen estimator. Points that are told without being asked for are history."""

    def __init__(self, question: Question, begun: int = 0):
        """begun: points drawn before, by a sampler that is gone: this one's draws are others."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._distributions = {name: self._distribution(name, v) for name, v in question.space.items()}
        # constant_liar: a point that is being tried counts as a bad one, or all at a time would be the same
        seed = int(np.random.SeedSequence([question.sampler_seed, _STREAM, begun]).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._open: dict[str, Any] = {}

    def _distribution(self, name: str, values: Any) -> Any:
        of = self._optuna.distributions
        if not isinstance(values, Range):
            return of.CategoricalDistribution(values)
        if kind_of(name) is int:
            return of.IntDistribution(math.ceil(values.low), math.floor(values.high), log=values.log)
        return of.FloatDistribution(values.low, values.high, log=values.log)

    def ask(self) -> Point | None:
        trial = self._study.ask(self._distributions)
        self._open[json.dumps(trial.params, sort_keys=True)] = trial
        return dict(trial.params)

    def tell(self, point: Point, score: float | None, stopped: int | None = None) -> None:
        states = self._optuna.trial.TrialState
        state = states.FAIL if score is None else states.COMPLETE if stopped is None else states.PRUNED
        value = score if state == states.COMPLETE else None
        trial = self._open.pop(json.dumps(point, sort_keys=True), None)
        if trial is None:
            along = {stopped or 0: score or 0.0} if state == states.PRUNED else None
            self._study.add_trial(self._optuna.trial.create_trial(
                params=point, distributions=self._distributions, value=value, state=state, intermediate_values=along
            ))
            return
        if state == states.PRUNED:
            trial.report(score or 0.0, stopped or 0)
        self._study.tell(trial, value, state=state)


def known_points(question: Question) -> list[Point] | None:
    """All points of a grid or of random draws, in order; None where points depend on scores."""
    if question.sampler == "grid":
        every = itertools.product(*(tuple(values) for values in question.space.values()))
        return [dict(zip(question.space, values, strict=True)) for values in every]
    if question.sampler == "random":
        return list(_drawn(question))
    return None


def _drawn(question: Question) -> Iterator[Point]:
    """Draws that differ. Where the space is smaller than what is asked for, as many as are found."""
    seen: set[str] = set()
    for i in range(100 * (question.points or 0)):
        rng = np.random.default_rng([question.sampler_seed, _STREAM, i])
        point = {name: _draw(name, values, rng) for name, values in question.space.items()}
        if (text := json.dumps(point)) not in seen:
            seen.add(text)
            yield point
        if len(seen) == question.points:
            return


def _draw(name: str, values: tuple[Any, ...] | Range, rng: np.random.Generator) -> Any:
    if not isinstance(values, Range):
        return values[int(rng.integers(len(values)))]
    low, high = values.low, values.high
    if kind_of(name) is int:
        low, high = math.ceil(low) - 0.5, math.floor(high) + 0.5
    drawn = math.exp(rng.uniform(math.log(low), math.log(high))) if values.log else rng.uniform(low, high)
    return round(drawn) if kind_of(name) is int else float(f"{drawn:.4g}")


def points_at_most(question: Question) -> int:
    """How many points are tried."""
    known = known_points(question)
    return len(known) if known is not None else question.points or 0


def sampler_of(question: Question, begun: int = 0) -> Sampler:
    """Return where the question's points come from, after the first `begun` of them."""
    points = known_points(question)
    return Tpe(question, begun) if points is None else Listed(points[begun:])


def common_settings(
    question: Question, preset: Mapping[str, Any], file: Path | None, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return {dotted name: value} of what all trials have in common: preset, the question's, --config, command line."""
    common = {**preset, **question.settings, **(flatten(read_yaml(file)) if file else {}), **overrides}
    for name in question.space:
        if name in overrides:
            raise UserError(f"{name} is swept by the question: leave it out of the command line, or out of `space`.")
        common.pop(name, None)
    return common


def check_points(question: Question, common: Mapping[str, Any]) -> list[RunConfig]:
    """Return configs of the sweep: of every known point, and one for each value and each end of a range.

    Raises UserError where one is not valid.
    """
    return [build(common, point) for point in (*(known_points(question) or ()), *_corners(question))]


def _corners(question: Question) -> Iterator[Point]:
    """A point for each value of a list and each end of a range, the other fields at their first one."""
    ends = {
        name: tuple((kind_of(name) or float)(x) for x in (v.low, v.high)) if isinstance(v, Range) else v
        for name, v in question.space.items()
    }
    first = {name: values[0] for name, values in ends.items()}
    for name, values in ends.items():
        for value in values:
            yield {**first, name: value}


def check_comparable(question: Question, *, scheduled: bool) -> None:
    """Raise UserError where a swept field changes a measure itself: then it compares no trials.

    question: with its objective decided. scheduled: the scheduler compares trials by `imagined` too.
    """
    changed = {m: [n for n in question.space if n.startswith(fields)] for m, (_, fields) in _MEASURES.items()}
    objectives = ["return (in an environment)", *(measure for measure, names in changed.items() if not names)]
    uses: dict[str, str] = {measure: f"leave {measure} out of also" for measure in question.also}
    if scheduled:
        uses["imagined"] = "set scheduler: none"
    uses[question.objective] = f"set objective: {' or '.join(objectives)}"
    for measure, remedy in uses.items():
        for name in changed.get(measure, ()):
            values = question.space[name]
            shown = f"{{low: {values.low:g}, high: {values.high:g}}}" if isinstance(values, Range) else list(values)
            raise UserError(
                f"space.{name}={shown} changes what {measure} measures, {_MEASURES[measure][0]}, so that trials cannot "
                f"be compared by it: take {name} out of space, or {remedy}."
            )


# ---- the ledger


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder: sweep.json says what it is, trials/ holds the ledger, runs/ the run folders."""

    folder: Path

    @classmethod
    def of(cls, place: str | Path) -> Sweep:
        """Return the sweep of a folder, where there may be none yet. Raises UserError for a URI."""
        if "://" in str(place):
            raise UserError(
                f"--sweep-dir={place}: a sweep's folder must be a path, on a cluster one that every node mounts; what "
                "its trials share may lie in a bucket (runtime.store=s3://BUCKET/store)."
            )
        return cls(Path(place).absolute())

    @property
    def described(self) -> dict[str, Any]:
        """Content of sweep.json. Raises UserError for a folder that is no sweep, or of an unknown schema."""
        try:
            content = dict(json.loads((self.folder / SWEEP).read_text()))
        except (FileNotFoundError, ValueError):
            raise UserError(f"{self.folder} is no sweep folder (it holds no {SWEEP}).") from None
        if content.get("schema") != SCHEMA:
            raise UserError(
                f"{self.folder} has schema {content.get('schema')!r}, this version of ipd_ray reads {SCHEMA}: use "
                "another --sweep-dir, or the version that wrote it."
            )
        return content

    @property
    def exists(self) -> bool:
        return (self.folder / SWEEP).is_file()

    def describe(self, content: Mapping[str, Any]) -> None:
        """Write sweep.json."""
        (self.folder / TRIALS).mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / SWEEP, json.dumps({"schema": SCHEMA, **content}, indent=1) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The trials that were begun, by name; finalists' second evaluations among them (`fresh` is true)."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / TRIALS).glob("[!.]*.json"))]

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace one trial's file."""
        write_atomic(self.folder / TRIALS / f"{record['trial']}.json", json.dumps(dict(record), indent=1) + "\n")

    def run_dir(self, trial: str) -> Path:
        return self.folder / RUNS / trial


def trial_name(point: int, seed: int, fresh: bool = False) -> str:
    return f"{point:03d}-seed{seed}" + "-fresh" * fresh


def measures(run: RunFolder) -> dict[str, tuple[float, float | None]]:
    """Return what a run's policy is worth, mean and standard error over episodes, by every measure that was taken.

    One episode has no standard error.
    """
    from ipd_ray.artifacts import Artifact

    found: dict[str, tuple[float, float | None]] = {}
    parts = {name: Artifact(link["path"]) for name, link in run.links.items()}
    there = {name: artifact.diagnostics for name, artifact in parts.items() if artifact.folder.exists(ARTIFACT)}
    if scored := there.get("evaluate"):
        returns = scored["returns"]
        sem = float(np.std(returns) / math.sqrt(len(returns)))
        found["return"] = scored["return_mean"], sem if len(returns) > 1 else None
    if chosen := there.get("choose"):
        kept = next(c for c in chosen["candidates"] if all(c[k] == chosen[k] for k in ("variant", "step")))
        found["imagined"] = kept["return_mean"], kept["return_sem"]
    if offline := there.get("fitted_q"):
        found["fitted_q"] = offline["value_mean"], offline["value_sem"]
    return found


# ---- the answer


@dataclass(frozen=True)
class Row:
    """What a point came to."""

    point: int
    settings: Point
    state: str
    """done; stopped: by the scheduler; failed; open: not all of its trials have ended."""
    scores: tuple[float, ...]
    """One a seed that ended."""
    mean: float
    half: float
    """Half of the 95 % interval; NaN where it is not known."""
    over: str
    """What the interval is taken over."""
    fresh: Row | None = None
    """The same on fresh environment seeds, for finalists."""
    accepted: float | None = None
    """Share of the imagined segments that counted, mean over seeds."""
    also: Mapping[str, float] | None = None
    """Mean of other measures."""
    stopped_at: int | None = None
    """The update at which the scheduler stopped the first of its trials."""

    @property
    def lower(self) -> float:
        """Lower end of the interval; without one, nothing."""
        return self.mean - self.half if self.half == self.half else -math.inf


def interval(scores: Sequence[float], sems: Sequence[float]) -> tuple[float, float, str]:
    """Mean, half of its 95 % interval, and what that is over.

    scores: one a seed; sems: standard error of each, over its episodes, which is what is left where there is one seed:
    blind to the luck of training.
    """
    mean = statistics.fmean(scores)
    if len(scores) > 1:
        t = _T[len(scores) - 2] if len(scores) - 2 < len(_T) else 1.96
        return mean, t * statistics.stdev(scores) / math.sqrt(len(scores)), "seeds"
    return mean, 1.96 * sems[0], "episodes"


def rows_of(records: Sequence[Mapping[str, Any]], seeds: int) -> list[Row]:
    """What every point came to, in the order they were tried."""
    points: dict[int, list[Mapping[str, Any]]] = {}
    again: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        (again if record.get("fresh") else points).setdefault(record["point"], []).append(record)
    return [_row(found, seeds, again.get(point, ())) for point, found in sorted(points.items())]


def _row(records: Sequence[Mapping[str, Any]], seeds: int, again: Sequence[Mapping[str, Any]]) -> Row:
    states = {r["state"] for r in records}
    state = next((s for s in ("failed", "stopped") if s in states), "done")
    if "running" in states or len(records) < seeds:
        state = "open"
    scored = [r for r in records if r.get("score") is not None]
    mean, half, over = math.nan, math.nan, "seeds" if seeds > 1 else "episodes"
    if scored:
        sems = [math.nan if r.get("sem") is None else r["sem"] for r in scored]
        mean, half, over = interval([r["score"] for r in scored], sems)
    shares = [r["accepted"] for r in scored if r.get("accepted") is not None]
    names = dict.fromkeys(name for r in scored for name in r.get("also") or {})
    also = {name: statistics.fmean(r["also"][name] for r in scored if name in (r.get("also") or {})) for name in names}
    return Row(
        point=records[0]["point"], settings=records[0]["settings"], state=state, mean=mean, half=half, over=over,
        scores=tuple(r["score"] for r in scored), fresh=_row(again, seeds, ()) if again else None,
        accepted=statistics.fmean(shares) if shares else None, also=also,
        stopped_at=min((r["rungs"][-1][0] for r in records if r["state"] == "stopped"), default=None),
    )


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The points that ended whole, best first: by the lower bound on fresh seeds, then by the lower bound, then by the
    mean."""

    def standing(row: Row) -> tuple[bool, float, float]:
        fresh = row.fresh if row.fresh and row.fresh.state == "done" else None
        return fresh is not None, (fresh or row).lower, (fresh or row).mean

    return sorted((r for r in rows if r.state == "done"), key=standing, reverse=True)


def rank_agreement(rows: Sequence[Row]) -> dict[str, float]:
    """Spearman's correlation of every other measure with the objective, over the points that ended whole."""
    from ipd_ray.data.transitions import rank_correlation

    done = [r for r in rows if r.state == "done"]
    names = dict.fromkeys(name for r in done for name in r.also or {})
    out = {}
    for name in names:
        pairs = [(r.mean, r.also[name]) for r in done if r.also and name in r.also]
        if len(pairs) > 2:
            out[name] = rank_correlation(*(np.asarray(side) for side in zip(*pairs, strict=True)))
    return out


def reuse(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a step: how many trials needed it, how many artifacts that came to, their seconds, and the seconds that the
    same trials would have taken apart."""
    needed: dict[str, list[tuple[str, float]]] = {}
    for record in records:
        for part in record.get("parts") or ():
            needed.setdefault(part["name"], []).append((part["key"], part["seconds"]))
    out = []
    for name, uses in needed.items():
        once = dict(uses)
        alone, spent = sum(s for _, s in uses), sum(once.values())
        out.append({
            "step": name, "needed": len(uses), "made": len(once), "reused": len(uses) - len(once), "seconds": spent,
            "saved": alone - spent,
        })
    return out
