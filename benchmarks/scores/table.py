"""Tables and plots of the scores: what each method reached on each dataset, paired differences, goals met or not.

    python benchmarks/scores/table.py [--tier small]     # print: of one tier, or of all that have results
    python benchmarks/scores/table.py --write            # and write docs/scores.md, docs/scores/*.svg, README's table

With --write, docs/scores.md always holds every tier; --tier chooses what is printed and what goes into README.md,
between its markers. Intervals need scipy (`pip install -c constraints.txt -e '.[bench]'`); all else does not.
The same results give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from results import HERE, PEERS, RESULTS, RUNGS, Result, read_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Not `rliable`: 1.2.0 asks for arch<8, and arch 7.2.0 cannot be imported beside pandas 3 (deprecate_kwarg has another
# signature). Its bootstrap also draws from numpy's global state whatever seed it is given, and wants as many seeds of
# one dataset as of the next. scipy's bootstrap draws every stratum again by itself, the same scheme, from a generator.
try:
    from scipy.stats import bootstrap as _bootstrap
except ImportError:
    _bootstrap = None

ROOT = HERE.parents[1]
METHOD = "ipd"
COMPARED = ("value_guided", "value_guided_chosen", "ipd_last", "greedy_q", "bc")
"""What the method is compared with, before the best peer."""
SHORT = ("bc", "dt", "value_guided", "greedy_q", "ipd_last")
"""Of README's table, with the best peer and the method."""
GOAL_AGAINST = "value_guided"
"""The rung that a goal names, beside the best peer: all of the method but imagination."""
GOAL_POINTS, GOAL_SHORTFALL = 5.0, 3.0
VOLUME = "accept.share"
VOLUME_RUNG = "ipd_last"
"""The field whose variations of this rung are the curve of score against augmentation volume: 0 is value_guided, 1 the
rung itself. Its policies are the last ones: a choice would leave out imagination where it harms."""
RESAMPLES = 10_000
OVERALL = ("this_run",)
"""Entries of `seconds` that are no part of the method but the wall time of one call, in which parts were reused."""
MISSING = "missing"
HOW_TO_INTERVALS = "No intervals: scipy is not installed. `pip install -c constraints.txt -e '.[bench]'` brings it."
BEGIN, END = "<!-- scores:begin -->", "<!-- scores:end -->"

Floats = NDArray[np.float64]
Interval = tuple[float, float]


# ---- results by method, dataset and seed


class Scores:
    """The results of one tier. Nothing is filled in: what did not run is not there."""

    def __init__(self, tier: str, results: Iterable[Result]):
        self.tier = tier
        self.runs: dict[str, dict[str, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
        for result in results:
            _check(result)
            self.runs[result.method][result.dataset][result.seed] = result
        self.all = [self.runs[m][d][s] for m in sorted(self.runs) for d in sorted(self.runs[m]) for s in
                    sorted(self.runs[m][d])]  # fmt: skip
        self.datasets = sorted({r.dataset for r in self.all})
        for dataset in self.datasets:
            if len(found := {r.reference for r in self.all if r.dataset == dataset}) > 1:
                raise ValueError(f"tier {tier}: {dataset} has the references {sorted(found)}, but scores of one set "
                                 "must be normalised alike: remove those with the wrong one, run again.")  # fmt: skip
        plain = {m for m in self.runs if not variation(m)[1]}
        self.peers = [*PEERS, *sorted(plain - {*RUNGS, *PEERS})]
        self.methods = [*RUNGS, *self.peers]
        self.seeds = sorted({r.seed for r in self.all if r.method in plain}) or sorted({r.seed for r in self.all})

    def cell(self, method: str, dataset: str) -> dict[int, Result]:
        """Results by seed; empty where none is there."""
        return self.runs.get(method, {}).get(dataset, {})

    def last(self, method: str, dataset: str) -> dict[int, float]:
        """Normalised headline by seed."""
        return {seed: result.last for seed, result in self.cell(method, dataset).items()}

    def mean(self, method: str, dataset: str) -> float | None:
        """Mean over seeds of the normalised headline; None where no seed is there."""
        scores = self.last(method, dataset)
        return fmean(scores.values()) if scores else None

    def covered(self, method: str) -> list[str]:
        """Return the datasets on which the method has a result."""
        return [d for d in self.datasets if self.cell(method, d)]

    def overall(self, method: str) -> float | None:
        """Mean over datasets; None unless all are there, since means over different sets cannot be compared."""
        means = [self.mean(method, d) for d in self.datasets]
        return None if None in means or not means else fmean(m for m in means if m is not None)

    def best_peer(self) -> str | None:
        """Return the peer with the best mean over the sets; None while no peer has all of them."""
        means = {p: mean for p in self.peers if (mean := self.overall(p)) is not None}
        return max(means, key=means.__getitem__) if means else None


def _check(result: Result) -> None:
    where = f"{result.tier}, {result.dataset}, {result.method}, seed {result.seed}"
    if not result.curve or not all(score.returns for score in result.curve):
        raise ValueError(f"{where} has a checkpoint without episodes: remove the file and run it again.")
    if not all(math.isfinite(value) for score in result.curve for value in score.returns):
        raise ValueError(f"{where} has a return that is not finite: remove the file and run it again.")
    if not result.reference[0] < result.reference[1]:
        raise ValueError(f"{where} has reference={result.reference}: the first must be less than the second.")


def variation(method: str) -> tuple[str, dict[str, str]]:
    """Split `ipd+planner.horizon=8` into the rung and its overrides, which are empty for a plain method."""
    rung, *changes = re.split(r"\+(?=[a-z_][\w.]*=)", method)
    return rung, dict(change.split("=", 1) for change in sorted(changes))


def variations(scores: Scores) -> dict[str, list[str]]:
    """Group the varied methods by the names of the fields they change."""
    groups: dict[str, list[str]] = defaultdict(list)
    for method in sorted(scores.runs):
        if changes := variation(method)[1]:
            groups[", ".join(changes)].append(method)
    return dict(sorted(groups.items()))


# ---- statistics


@dataclass(frozen=True)
class Difference:
    """One method minus another, paired by dataset and seed."""

    method: str
    other: str
    gaps: dict[str, dict[int, float]]
    """By dataset, then seed: only where both have a result."""
    sets: int
    """Datasets of the tier."""

    @property
    def mean(self) -> float | None:
        """Mean over datasets of the mean over pairs; None without a pair."""
        return fmean(fmean(gaps.values()) for gaps in self.gaps.values()) if self.gaps else None

    @property
    def complete(self) -> bool:
        return len(self.gaps) == self.sets

    @property
    def interval(self) -> Interval | None:
        """95 % of the mean; None where a dataset has a single pair."""
        return interval([list(gaps.values()) for gaps in self.gaps.values()], mean_of_means)

    @property
    def pairs(self) -> int:
        return sum(len(gaps) for gaps in self.gaps.values())


def difference(scores: Scores, method: str, other: str) -> Difference:
    """Pair two methods; what only one of them has is dropped."""
    gaps = {}
    for dataset in scores.datasets:
        a, b = scores.last(method, dataset), scores.last(other, dataset)
        if both := sorted(a.keys() & b.keys()):
            gaps[dataset] = {seed: a[seed] - b[seed] for seed in both}
    return Difference(method, other, gaps, len(scores.datasets))


def mean_of_means(*strata: Floats, axis: int = -1) -> Floats:
    """Mean over strata of the mean in each: every dataset counts alike, however many seeds it has."""
    return np.mean([np.mean(s, axis=axis) for s in strata], axis=0)


def iqm(*strata: Floats, axis: int = -1) -> Floats:
    """Mean of the middle half of all runs together: a quarter is cut off at either end, rounded down."""
    runs = np.sort(np.concatenate(strata, axis=axis), axis=axis)
    count = runs.shape[axis]
    return np.mean(np.take(runs, np.arange(count // 4, count - count // 4), axis=axis), axis=axis)


def better(*strata: Floats, axis: int = -1) -> Floats:
    """Chance that a run of the first method beats one of the second on the same dataset; a tie counts half.

    strata: the first method's datasets, then the second's in the same order. The mean over datasets is taken.
    """
    half = len(strata) // 2
    chances = []
    for x, y in zip(strata[:half], strata[half:], strict=True):
        a, b = np.moveaxis(x, axis, -1)[..., :, None], np.moveaxis(y, axis, -1)[..., None, :]
        chances.append(((a > b) + 0.5 * (a == b)).mean((-2, -1)))
    return np.mean(chances, axis=0)


def interval(strata: Sequence[Sequence[float]], statistic: Callable[..., Floats]) -> Interval | None:
    """95 % interval of a statistic by the stratified percentile bootstrap: runs are drawn again within each dataset.

    None where a stratum has a single run, of whose spread nothing is known, and where scipy is not there.
    """
    if _bootstrap is None or not strata or min(len(s) for s in strata) < 2:
        return None
    data = tuple(np.asarray(s, np.float64) for s in strata)
    found = _bootstrap(
        data, statistic, n_resamples=RESAMPLES, method="percentile", vectorized=True, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


# ---- goals


@dataclass(frozen=True)
class Verdict:
    """A goal, whether it is met, and the figures that say so."""

    goal: str
    met: bool | None
    """None: cannot be told yet."""
    figures: str

    @property
    def word(self) -> str:
        return {True: "met", False: "not met", None: "open"}[self.met]


def verdicts(scores: Scores) -> list[Verdict]:
    """Judge every goal by the results that are there."""
    goals = [_gain(difference(scores, METHOD, GOAL_AGAINST))]
    if (peer := scores.best_peer()) is None:
        goals.append(Verdict(_gain_goal(METHOD, "the best peer"), None, "no peer has all datasets yet"))
    else:
        goals.append(_gain(difference(scores, METHOD, peer)))
    return [*goals, _no_loss(scores)]


def _gain_goal(method: str, other: str) -> str:
    return f"{method} - {other}: mean at least {GOAL_POINTS:g} points, lower bound above 0"


def _gain(found: Difference) -> Verdict:
    goal = _gain_goal(found.method, found.other)
    if found.mean is None:
        return Verdict(goal, None, "no pair is there")
    figures = f"{signed(found.mean, 2)} {_bounds(found.interval, 2)}, {_count(found)}".replace("  ", " ")
    if not found.complete:
        return Verdict(goal, None, figures)
    if found.mean < GOAL_POINTS - 1e-9:
        return Verdict(goal, False, figures)
    if (bounds := found.interval) is None:
        return Verdict(goal, None, figures)
    return Verdict(goal, bounds[0] > 0, figures)


def _no_loss(scores: Scores) -> Verdict:
    goal = f"{METHOD} on no dataset more than {GOAL_SHORTFALL:g} points below any rung or peer, by pairs"
    gaps, absent = {}, 0
    for other in (method for method in scores.methods if method != METHOD):
        pairs = difference(scores, METHOD, other).gaps
        gaps.update({(other, dataset): fmean(by_seed.values()) for dataset, by_seed in pairs.items()})
        absent += len(scores.datasets) - len(pairs)
    if not gaps:
        return Verdict(goal, None, "nothing to compare is there")
    (other, dataset), worst = min(gaps.items(), key=lambda item: item[1])
    figures = f"the worst is {signed(worst, 2)} against {other} on {dataset}"
    if absent:
        figures += f"; {absent} of {absent + len(gaps)} comparisons are missing"
    if worst < -GOAL_SHORTFALL - 1e-9:
        return Verdict(goal, False, figures)
    return Verdict(goal, None if absent else True, figures)


# ---- numbers as text


def signed(value: float, digits: int = 1) -> str:
    """+5.0, -5.0, and 0.0 without a sign."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def number(value: float, digits: int = 1) -> str:
    """5.0, and never -0.0."""
    text = f"{value:.{digits}f}"
    return text if float(text) else text.lstrip("-")


def _bounds(found: Interval | None, digits: int = 1, show: Callable[[float, int], str] = signed) -> str:
    return f"[{show(found[0], digits)}, {show(found[1], digits)}]" if found else ""


def _count(found: Difference) -> str:
    """How many pairs the difference rests on, and why there is no interval where there is none."""
    text = f"{found.pairs} pair{'s' * (found.pairs != 1)} on {len(found.gaps)} of {found.sets} sets"
    if single := [d for d, gaps in found.gaps.items() if len(gaps) < 2]:
        text += f"; no interval can be given: a single seed on {', '.join(single)}"
    elif _bootstrap is None:
        text += "; no interval: scipy is not installed"
    return text


def _span(values: Iterable[str]) -> str:
    found = sorted(set(values))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in values)


# ---- a page is a list of blocks: paragraphs, tables, pictures


Cell = tuple[str, str]
"""The cell itself, and what stands small below it."""


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Picture:
    path: str
    """Relative to the page."""
    alt: str


Block = str | Table | Picture


def as_markdown(blocks: Iterable[Block]) -> str:
    """Render blocks as GitHub shows them."""
    texts = []
    for block in blocks:
        if isinstance(block, Picture):
            texts.append(f"![{block.alt}]({block.path})")
        elif isinstance(block, Table):
            rows = [[m + (f"<br><sub>{s}</sub>" if s else "") for m, s in row] for row in block.rows]
            lines = [block.header, ["---"] * len(block.header), *rows]
            texts.append("\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines))
        else:
            texts.append(block)
    return "\n\n".join(texts) + "\n"


def as_text(blocks: Iterable[Block]) -> str:
    """Render blocks for a terminal, without pictures."""
    texts = []
    for block in blocks:
        if isinstance(block, Table):
            lines: list[Sequence[str]] = [block.header]
            for row in block.rows:
                lines.append([main.replace("**", "").replace("`", "") for main, _ in row])
                if any(small for _, small in row):
                    lines.append([small.replace("<br>", " ").replace("`", "") for _, small in row])
            widths = [max(len(line[i]) for line in lines) for i in range(len(block.header))]
            shown = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
            texts.append("\n".join([shown[0], "-" * len(shown[0]), *shown[1:]]))
        elif isinstance(block, str):
            texts.append(block)
    return "\n\n".join(texts) + "\n"


# ---- tables


def _seeds(scores: Scores, method: str, dataset: str, value: Callable[[Result], float], digits: int = 1) -> str:
    """Each seed's number in the order of the tier's seeds; a dash where it is missing."""
    cell = scores.cell(method, dataset)
    order = [*scores.seeds, *sorted(cell.keys() - set(scores.seeds))]
    return " · ".join(number(value(cell[s]), digits) if s in cell else "–" for s in order)


def _mean_cell(scores: Scores, method: str, value: Callable[[Result], float]) -> Cell:
    covered = scores.covered(method)
    if not covered:
        return MISSING, ""
    if len(covered) < len(scores.datasets):
        return f"{len(covered)} of {len(scores.datasets)} sets", ""
    return number(fmean(fmean(value(r) for r in scores.cell(method, d).values()) for d in covered)), ""


def score_table(scores: Scores, methods: Sequence[str], *, best: bool, means: bool = True) -> Table:
    """Mean over seeds of the headline, and every seed's number; `best` adds the best checkpoint."""
    tops = {d: max((m for k in methods if (m := scores.mean(k, d)) is not None), default=None) for d in scores.datasets}
    tops[""] = max((m for k in methods if (m := scores.overall(k)) is not None), default=None)
    rows = []
    for method in methods:
        row: list[Cell] = [(f"`{method}`", "")]
        for dataset in scores.datasets:
            if (mean := scores.mean(method, dataset)) is None:
                row.append((MISSING, ""))
                continue
            main = _bold(number(mean), mean == tops[dataset])
            if best:
                main += f" ({number(fmean(r.best for r in scores.cell(method, dataset).values()))})"
            row.append((main, _seeds(scores, method, dataset, lambda r: r.last)))
        if means:
            main, small = _mean_cell(scores, method, lambda r: r.last)
            top = scores.overall(method)
            flattered = _mean_cell(scores, method, lambda r: r.best)[0]
            main = _bold(main, top is not None and top == tops[""]) + (f" ({flattered})" if best and top else "")
            row.append((main, small))
        rows.append(row)
    return Table(["method", *scores.datasets, *(["mean over sets"] if means else [])], rows)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def log_row(scores: Scores) -> list[Cell]:
    """What the logs themselves hold, as far as the results tell: mean return, and the best episode below it."""
    row: list[Cell] = [("the log", "best episode")]
    for dataset in scores.datasets:
        found = _log_of(scores, dataset)
        row.append((number(found[0]), number(found[1])) if found else ("not told", ""))
    logs = [_log_of(scores, d) for d in scores.datasets]
    mean = fmean(log[0] for log in logs if log) if all(logs) else None
    return [*row, (number(mean) if mean is not None else "", "")]


def _log_of(scores: Scores, dataset: str) -> tuple[float, float] | None:
    """Normalised mean return and best episode of the log."""
    for result in scores.all:
        data = result.extra.get("data", {})
        if result.dataset == dataset and {"return_mean", "return_max"} <= data.keys():
            return result.normalise(data["return_mean"]), result.normalise(data["return_max"])
    return None


def raw_table(scores: Scores) -> Table:
    """Raw returns of the headline: mean over seeds, and every seed's mean over episodes."""
    rows = []
    for method in scores.methods:
        row: list[Cell] = [(f"`{method}`", "")]
        for dataset in scores.datasets:
            cell = scores.cell(method, dataset)
            mean = number(fmean(r.headline.mean for r in cell.values()), 0) if cell else MISSING
            row.append((mean, _seeds(scores, method, dataset, lambda r: r.headline.mean, 0) if cell else ""))
        rows.append(row)
    reference: list[Cell] = [("counts as 0 / 100", "")]
    for dataset in scores.datasets:
        low, high = next(r.reference for r in scores.all if r.dataset == dataset)
        reference.append((f"{low:.5g} / {high:.5g}", ""))
    return Table(["method", *scores.datasets], [*rows, reference])


def compared(scores: Scores) -> list[Difference]:
    """The method against its own parts, and against the best peer."""
    peer = scores.best_peer()
    return [difference(scores, METHOD, other) for other in [*COMPARED, *([peer] if peer else [])]]


def difference_table(scores: Scores) -> Table:
    """Paired differences: over all sets with the interval, and by dataset with every pair."""
    rows = []
    for found in compared(scores):
        name = f"{found.method} - {found.other}" + " (best peer)" * (found.other in scores.peers)
        if found.mean is None:
            rows.append([(name, ""), ("no pair", ""), *[(MISSING, "")] * len(scores.datasets)])
            continue
        cells: list[Cell] = []
        for dataset in scores.datasets:
            gaps = found.gaps.get(dataset, {})
            pairs = " · ".join(signed(gap) for gap in gaps.values())
            cells.append((signed(fmean(gaps.values())), f"{pairs}<br>{_pairs(len(gaps))}") if gaps else (MISSING, ""))
        rows.append([(name, ""), (f"{signed(found.mean)} {_bounds(found.interval)}".strip(), _count(found)), *cells])
    return Table(["difference", "mean over sets [95 %]", *scores.datasets], rows)


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"


def aggregate_table(scores: Scores) -> Table | None:
    """Mean, interquartile mean and chance of improvement with intervals; of methods with 2 seeds on every set."""
    def strata(method: str) -> list[list[float]]:
        return [list(scores.last(method, d).values()) for d in scores.datasets]

    whole = [m for m in scores.methods if min(len(s) for s in strata(m)) >= 2]
    rows = []
    for method in whole:
        own = strata(method)
        row: list[Cell] = [(f"`{method}`", "")]
        for statistic in (mean_of_means, iqm):
            value = float(statistic(*(np.asarray(s) for s in own)))
            row.append((f"{number(value)} {_bounds(interval(own, statistic), 1, number)}".strip(), ""))
        if METHOD in whole and method != METHOD:
            both = [*strata(METHOD), *own]
            value = float(better(*(np.asarray(s) for s in both)))
            row.append((f"{number(value, 2)} {_bounds(interval(both, better), 2, number)}".strip(), ""))
        else:
            row.append(("", ""))
        rows.append(row)
    header = ["method", "mean [95 %]", "interquartile mean [95 %]", f"chance that {METHOD} is better [95 %]"]
    return Table(header, rows) if rows else None


def verdict_table(scores: Scores) -> Table:
    """Every goal, the verdict and its figures."""
    return Table(["goal", "verdict", "figures"], [
        [(v.goal, ""), (f"**{v.word}**", ""), (v.figures, "")] for v in verdicts(scores)
    ])  # fmt: skip


def minutes(result: Result) -> float:
    """Minutes of all parts of a run, those included that other runs share with it."""
    return sum(s for part, s in result.seconds.items() if part not in OVERALL) / 60.0


def minutes_table(scores: Scores) -> Table:
    """Total minutes a run, mean over seeds and every seed; and the parts, mean over all runs of a method."""
    rows = []
    for method in sorted(scores.runs, key=lambda m: _place(scores, m)):
        row: list[Cell] = [(f"`{method}`", "")]
        for dataset in scores.datasets:
            cell = scores.cell(method, dataset)
            if not cell:
                row.append((MISSING, ""))
                continue
            mean = number(fmean(minutes(r) for r in cell.values()))
            row.append((mean, _seeds(scores, method, dataset, minutes)))
        runs = [r for d in scores.datasets for r in scores.cell(method, d).values()]
        parts = list(dict.fromkeys(part for r in runs for part in r.seconds if part not in OVERALL))
        shares = {p: fmean(r.seconds.get(p, 0.0) for r in runs) / 60.0 for p in parts}
        row.append(("", _listed(f"{part} {number(share)}" for part, share in shares.items())))
        rows.append(row)
    return Table(["method", *scores.datasets, "mean by part"], rows)


def _place(scores: Scores, method: str) -> tuple[int, str]:
    rung = variation(method)[0]
    return (scores.methods.index(rung) if rung in scores.methods else len(scores.methods), method)


def origin_table(scores: Scores) -> Table:
    """Where the numbers come from: dates, commits, versions, episodes; methods that have all in common are one row."""
    alike: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for method in sorted(scores.runs, key=lambda m: _place(scores, m)):
        runs = [r for r in scores.all if r.method == method]
        origin = (_days(runs), _commits(runs), _merged(r.versions for r in runs), _merged(r.evaluation for r in runs))
        alike[origin].append((method, len(runs)))
    rows = [[(_listed(f"`{m}`" for m, _ in found), ""), (str(sum(n for _, n in found)), ""), *((o, "") for o in origin)]
            for origin, found in alike.items()]  # fmt: skip
    return Table(["methods", "runs", "dates", "commits", "versions", "evaluation"], rows)


def _merged(dictionaries: Iterable[Mapping[str, Any]]) -> str:
    """Name and value, several values of one name side by side."""
    found: dict[str, list[str]] = defaultdict(list)
    for dictionary in dictionaries:
        for name, value in dictionary.items():
            if str(value) not in found[name]:
                found[name].append(str(value))
    return _listed(f"{name} {' / '.join(sorted(values))}" for name, values in found.items())


def _commits(runs: Iterable[Result]) -> str:
    return _listed(f"`{c}`" for c in dict.fromkeys(sorted(r.commit for r in runs)))


def _days(runs: Sequence[Result]) -> str:
    days = [day for r in runs if (day := str(r.extra.get("date", ""))[:10] or commit_day(r.commit))]
    return _span(days) if days else "unknown"


@lru_cache
def commit_day(commit: str) -> str | None:
    """Return the day of a commit; None where git does not know it."""
    if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", commit):
        return None
    command = ["git", "show", "-s", "--format=%cs", commit.removesuffix("-dirty")]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def variation_table(scores: Scores, fields: str, methods: Sequence[str]) -> Table:
    """Variations of the same fields, and the methods they vary, in the order of the values."""
    bases = list(dict.fromkeys(variation(m)[0] for m in methods))
    rows = [(_order(value), method, value) for method in methods
            for value in [_listed(variation(method)[1].values())]]  # fmt: skip
    if fields == VOLUME:
        ends = {"value_guided": "0", VOLUME_RUNG: "1"} if VOLUME_RUNG in bases else {}
        rows += [(_order(value), method, f"{value} (as is)") for method, value in ends.items()]
        bases = [b for b in bases if b not in ends]
    for base in bases:
        value = _listed(_config_value(scores, base, name) for name in fields.split(", "))
        rows.append((_order(value), base, f"{value} (as is)"))
    table = []
    for _, method, value in sorted(rows, key=lambda row: (_place(scores, variation(row[1])[0])[0] if fields != VOLUME
                                                          else 0, row[0], row[1])):  # fmt: skip
        plain = variation(method)[0]
        base = VOLUME_RUNG if fields == VOLUME and plain == "value_guided" else plain
        found = difference(scores, method, base)
        against = f"{signed(found.mean)} {_bounds(found.interval)}".strip() if found.mean is not None else MISSING
        gap: Cell = (against, _count(found) if found.mean is not None else "") if method != base else ("", "")
        (name, _), *cells = score_table(scores, [method], best=False).rows[0]
        row = [(f"`{plain}`" if variation(method)[1] else name, ""), (value, "")]
        table.append([*row, *((main.replace("**", ""), small) for main, small in cells), gap])
    return Table(["method", fields, *scores.datasets, "mean over sets", "minus the method as it is [95 %]"], table)


def _order(value: str) -> tuple[int, float, str]:
    """Numbers in their order, then words."""
    try:
        return 0, float(value.split(" ")[0].rstrip(",")), value
    except ValueError:
        return 1, 0.0, value


def _config_value(scores: Scores, method: str, field: str) -> str:
    """Return the value that the method has of a field; several side by side where presets differ, "?" where unknown."""
    found = set()
    for result in scores.all:
        if result.method == method:
            value: Any = result.config
            for name in field.split("."):
                value = value.get(name, "?") if isinstance(value, dict) else "?"
            found.add(str(value))
    return " / ".join(sorted(found)) or "?"


# ---- pages


SETS = (
    ("bench/hopper/mixed-v0", "Hopper-v5", "868", "200,923",
     "published SAC and TQC actors, Gaussian noise of a scale drawn an episode, a tenth uniform random"),
    ("bench/hopper/medium-v0", "Hopper-v5", "458", "200,563", "a published SAC actor, sampled"),
    ("bench/halfcheetah/medium-replay-v0", "HalfCheetah-v5", "250", "250,000",
     "replay of one SAC run from scratch to the medium level"),
    ("bench/pendulum/medium-v0", "Pendulum-v1", "50", "10,000", "a medium SAC agent, references (-1200, -150)"),
    ("bench/pendulum/replay-v0", "Pendulum-v1", "500", "99,500", "an online agent's replay, no headroom"),
    ("unseen/*", "", "", "", "made on the spot by `benchmarks/scores/unseen.py`"),
)
READING = f"""\
**How to read this.** A score is normalised as D4RL does it: 100 x (return - low) / (high - low), with the two
references of the dataset (they stand below the raw returns). 0 is about a random policy, 100 about an expert. Each
number is the mean over seeds of the policy that a run leaves, which is what a user gets: the *last* checkpoint, or,
of `ipd` and `value_guided_chosen`, the one that does best inside the world model (`choose`), without a look at these
scores; every seed's own number stands small below it, a dash where that seed has not run. The best
checkpoint, in parentheses, is picked by the very scores it reports, so it flatters and is there for comparison only.
In bold: the highest of a column, which says nothing about chance. "{MISSING}" is a run that is not there: nothing is
filled in, and a mean over the sets is given only where all sets are there.

**Differences** are paired: {METHOD} minus the other method, same dataset and same seed; a pair with one half missing
is dropped. The mean takes each dataset alike. The interval (95 %) comes from {RESAMPLES:,} bootstrap resamples, in
which the seeds are drawn again within each dataset: it tells how much another set of seeds might change the mean, not
what happens on other datasets. With few seeds it is too narrow: in a simulation with normal numbers and four sets it
held the truth in 74 % of cases with two seeds, 85 % with three and 90 % with five. Read a bound close to 0 as no
evidence. With a single seed there is no interval. The best peer is chosen by these same scores, which favours the
peer."""
AGGREGATES = f"""\
Aggregates over all sets, of the methods that have at least two seeds on every set. The interquartile mean leaves out
the best and the worst quarter of all runs. The chance of improvement is that a run of {METHOD} beats one of the other
method on the same set, a tie counting half; 0.5 is no difference. An interval of a single number, such as [1.00,
1.00], says only that all runs point the same way, not that this is certain."""
ORIGIN = """\
Dates are those of the runs where a result tells it, else of its commits; `-dirty` is a commit with changes that were
not committed yet."""
MINUTES = """\
Wall minutes of a whole run, evaluation included, mean over seeds with every seed below. Parts that several of our
runs share (values, world model, imagination) are counted in each of them, as if it ran alone. Runs may have shared
their machine with others."""


def tier_blocks(scores: Scores, pictures: Mapping[str, str]) -> list[Block]:
    """All about one tier. pictures: file by kind of plot, relative to the page; those not there are left out."""
    sets = f"{len(scores.datasets)} dataset{'s' * (len(scores.datasets) != 1)}"
    blocks: list[Block] = [
        f"## Tier `{scores.tier}`",
        f"{len(scores.all)} runs on {sets}, seeds {_listed(scores.seeds)}; {_days(scores.all)}; commits "
        f"{_commits(scores.all)}. Versions and minutes stand [below](#where-the-numbers-of-{scores.tier}-come-from).",
        "### Goals", verdict_table(scores),
        "### Scores",
        f"Normalised, of what a run leaves (best checkpoint); below, each seed's own (seeds {_listed(scores.seeds)}).",
    ]  # fmt: skip
    table = score_table(scores, scores.methods, best=True)
    blocks.append(Table(table.header, [*table.rows, log_row(scores)]))
    _picture(blocks, pictures, "points", "Normalised score of every method by dataset, each seed a dot")
    blocks += ["### Paired differences", difference_table(scores)]
    if scores.best_peer() is None:
        blocks.append("No peer has all datasets yet, so the best one cannot be named.")
    if _bootstrap is None:
        blocks.append(HOW_TO_INTERVALS)
    if aggregates := aggregate_table(scores):
        blocks += [AGGREGATES, aggregates]
    else:
        blocks.append("No method has two seeds on every dataset yet: no aggregates and no intervals can be given.")
    if {"ladder", "peers"} & pictures.keys():
        blocks += ["### Learning curves", "Of a policy that an actor corrects the updates of its last correction "
                   "count: it begins where its drafts end."]
    _picture(blocks, pictures, "ladder", "Score against the share of updates, our ladder")
    _picture(blocks, pictures, "peers", "Score against the share of updates, peers")
    groups = variations(scores)
    if VOLUME in groups:
        blocks += ["### Augmentation volume", "Score against the share of the accepted imagined segments that the "
                   "policy is trained on: 0 is `value_guided`, 1 is `ipd_last`."]  # fmt: skip
        _picture(blocks, pictures, "volume", "Score against the share of imagined segments used")
        blocks.append(variation_table(scores, VOLUME, groups.pop(VOLUME)))
    if groups:
        blocks.append("### Variations")
        blocks += [b for fields, methods in groups.items()
                   for b in (f"#### `{fields}`", variation_table(scores, fields, methods))]  # fmt: skip
    blocks += ["### Raw returns", "Of what a run leaves; mean over seeds, each seed below.", raw_table(scores)]
    blocks += ["### Minutes", MINUTES, minutes_table(scores)]
    blocks += [f"### Where the numbers of {scores.tier} come from", ORIGIN, origin_table(scores)]
    return blocks


def _picture(blocks: list[Block], pictures: Mapping[str, str], kind: str, alt: str) -> None:
    if kind in pictures:
        blocks.append(Picture(pictures[kind], alt))


def page_blocks(tiers: Sequence[Scores], pictures: Mapping[str, Mapping[str, str]]) -> list[Block]:
    """The whole of docs/scores.md."""
    blocks: list[Block] = [
        "# Scores",
        "Written by `python benchmarks/scores/table.py --write` from `benchmarks/scores/results/`, never by hand; "
        "`benchmarks/scores/run.py` makes the results. A tier is a set of sizes that makes numbers comparable: compare "
        "within a tier only. The `bench/` datasets are not D4RL's files: published tables do not compare with these.",
        Table(["dataset", "environment", "episodes", "steps", "origin"], [[(c, "") for c in row] for row in SETS]),
        "They are published nowhere; `--datasets` takes any Minari id, `--d4rl` D4RL's own files.",
        READING,
    ]
    about = [[(f"`{name}`", ""), (text, "")] for name, text in {**RUNGS, **PEERS}.items()]
    blocks.append(Table(["method", "what it is"], about))
    if not tiers:
        blocks.append("No results yet.")
    for scores in tiers:
        blocks += tier_blocks(scores, pictures.get(scores.tier, {}))
    return blocks


def readme_blocks(tiers: Sequence[Scores]) -> list[Block]:
    """The short form: the log, the best peer, the rungs that tell parts apart, and goals."""
    blocks: list[Block] = []
    for scores in tiers:
        shown = [m for m in (*SHORT, scores.best_peer(), METHOD) if m and scores.covered(m)]
        blocks.append(
            f"Tier `{scores.tier}`, {_days(scores.all)}, {_minutes_span(scores)}. Normalised return of what a run "
            f"leaves, mean over up to {len(scores.seeds)} seeds:"
        )
        table = score_table(scores, shown, best=False)
        rows = [[(main, "") for main, _ in row] for row in (log_row(scores), *table.rows)]
        blocks.append(Table(table.header, rows))
        blocks.append("Goals:\n\n" + "\n".join(f"- {v.goal}: **{v.word}** ({v.figures})" for v in verdicts(scores)))
    blocks.append("Each seed, all methods, differences, curves, variations: [docs/scores.md](docs/scores.md)."
                  if tiers else "No results yet: `python benchmarks/scores/run.py` makes them.")  # fmt: skip
    return blocks


def _minutes_span(scores: Scores) -> str:
    found = [minutes(r) for r in scores.all]
    return f"{number(min(found))} to {number(max(found))} wall minutes a run"


def replaced(readme: str, text: str) -> str:
    """Put text between the markers; everything else stays. Raises ValueError unless each marker is there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and, after it, {END}, each once: add the two lines where the "
                         "table belongs.")  # fmt: skip
    before, after = readme[: readme.index(BEGIN) + len(BEGIN)], readme[readme.index(END) :]
    return f"{before}\n{text.strip()}\n{after}"


# ---- plots

# The colours of ipd_ray/report/figures.py (Okabe and Ito's), which is not imported: it would bring torch.
INK, MUTED, LINE = "#1b1f24", "#6b7281", "#d8dce3"
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
COLOURS = {
    "bc": ORANGE, "dt": YELLOW, "iql": SKY, "v_prompt": MUTED, "value_guided": GREEN, "greedy_q": PURPLE, "ipd": BLUE,
    "value_guided_chosen": GREEN, "ipd_last": BLUE, "ipd_ranked": INK, "d3rlpy-bc": ORANGE, "d3rlpy-iql": SKY,
    "d3rlpy-td3bc": GREEN, "d3rlpy-cql": PURPLE, "d3rlpy-dt": YELLOW,
}  # fmt: skip
SISTERS = ("value_guided_chosen", "ipd_last")
"""Drawn in the colour of what they differ from in the choice alone, dashed."""
KINDS = ("points", "ladder", "peers", "volume")
_COLUMNS = 5
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "ipd_ray", "font.family": ["DejaVu Sans", "sans-serif"], "font.size": 8.5,
    "axes.titlesize": 8.5, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.7, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.5,
    "legend.frameon": False, "legend.handlelength": 1.6, "lines.linewidth": 1.4, "lines.markersize": 3.5,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.unicode_minus": True,
}  # fmt: skip


def _grid(count: int, height: float, *, share_y: bool) -> tuple[Figure, list[Axes]]:
    """Figure with `count` panels, at most _COLUMNS side by side."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(1.9 * columns + 1.6, 4.5), height * rows), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _titled(ax: Axes, dataset: str) -> None:
    *parents, name = dataset.split("/")
    ax.set_title(f"{'/'.join(parents)}/\n{name}" if parents else f"\n{name}", loc="left")


def points_figure(scores: Scores) -> Figure:
    """One panel a dataset, one row a method: seeds as dots, their mean as a tick; then the mean over sets."""
    from matplotlib.ticker import MaxNLocator

    rows = {m: -i - 0.6 * (m in scores.peers) for i, m in enumerate(scores.methods)}
    figure, axes = _grid(len(scores.datasets) + 1, 0.9 + 0.19 * len(rows), share_y=True)
    for ax, dataset in zip(axes, [*scores.datasets, ""], strict=True):
        means = {m: scores.mean(m, dataset) if dataset else scores.overall(m) for m in rows}
        for method, row in rows.items():
            colour = BLUE if method == METHOD else ORANGE if method in scores.peers else MUTED
            if (mean := means[method]) is None:
                count = len(scores.covered(method))
                told = MISSING if dataset or not count else f"{count} of {len(scores.datasets)} sets"
                ax.text(0.02, row, told, transform=ax.get_yaxis_transform(), color=MUTED, va="center", size=7,
                        style="italic", bbox={"facecolor": "white", "linewidth": 0, "pad": 1})  # fmt: skip
                continue
            seeds = list(scores.last(method, dataset).values()) if dataset else []
            ax.plot(seeds, [row] * len(seeds), "o", color=colour, markersize=3.6, alpha=0.55, markeredgewidth=0)
            ax.plot([mean, mean], [row - 0.36, row + 0.36], color=colour, linewidth=2.2)
        if found := _log_of(scores, dataset):
            ax.axvline(found[0], color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        _titled(ax, dataset or "mean over sets")
        ax.set_yticks(list(rows.values()), list(rows))
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        ax.axhspan(rows[METHOD] - 0.5, rows[METHOD] + 0.5, color=BLUE, alpha=0.07, linewidth=0)
        ax.set_ylim(min(rows.values()) - 0.7, 0.7)
        ax.margins(x=0.08)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    figure.supxlabel("normalised score of what a run leaves: each seed a dot, the mean a tick; dotted: mean of the log",
                     size=8.5)  # fmt: skip
    return figure


def curve_of(scores: Scores, method: str, dataset: str) -> list[tuple[float, list[float]]]:
    """Share of updates and each seed's normalised score there, at the shares that every seed was scored at."""
    curves = []
    for result in scores.cell(method, dataset).values():
        final = max(result.curve[-1].step, 1)
        curves.append({round(s.step / final, 4): result.normalise(s.mean) for s in result.curve})
    shares = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
    return [(share, [c[share] for c in curves]) for share in shares]


def curves_figure(scores: Scores, methods: Sequence[str]) -> Figure:
    """Mean score against the share of updates, one panel a dataset; the band is from the lowest seed to the highest."""
    figure, axes = _grid(len(scores.datasets), 2.5, share_y=False)
    lines = {}
    for ax, dataset in zip(axes, scores.datasets, strict=True):
        everything = [v for m in scores.methods for _, seeds in curve_of(scores, m, dataset) for v in seeds]
        for method in methods:
            if not (curve := curve_of(scores, method, dataset)):
                continue
            shares, seeds = [share for share, _ in curve], np.array([values for _, values in curve])
            colour, own = COLOURS.get(method, MUTED), method == METHOD
            (lines[method],) = ax.plot(
                shares, seeds.mean(1), color=colour, marker="o", markersize=3, zorder=3 if own else 2,
                linewidth=2.4 if own else 1.3, linestyle="--" if method in SISTERS else "-",
            )  # fmt: skip
            ax.fill_between(shares, seeds.min(1), seeds.max(1), color=colour, alpha=0.1, linewidth=0)
        _titled(ax, dataset)
        ax.set_xlim(0.0, 1.04)
        ax.set_xticks([0.0, 0.5, 1.0], ["0", "50 %", "100 %"])
        if not any(curve_of(scores, m, dataset) for m in methods):
            ax.text(0.5, 0.5, MISSING, transform=ax.transAxes, ha="center", color=MUTED, style="italic")
        if everything:
            slack = 0.05 * max(max(everything) - min(everything), 1.0)
            ax.set_ylim(min(everything) - slack, max(everything) + slack)  # the same for the ladder and for peers
    for ax in axes[::_COLUMNS]:
        ax.set_ylabel("normalised score")
    figure.supxlabel("share of updates; line: mean over seeds, band: from the lowest seed to the highest", size=8.5)
    shown = [m for m in methods if m in lines]
    figure.legend([lines[m] for m in shown], shown, loc="outside right center")
    return figure


def volume_of(scores: Scores) -> dict[float, str]:
    """Methods by the share of imagined segments they use: value_guided, variations of ipd_last, ipd_last."""
    found = {0.0: "value_guided", 1.0: VOLUME_RUNG}
    for method in variations(scores).get(VOLUME, []):
        rung, changes = variation(method)
        if rung == VOLUME_RUNG:
            found[float(changes[VOLUME])] = method
    return dict(sorted(found.items()))


def volume_figure(scores: Scores) -> Figure:
    """Score against volume, one panel a dataset, seeds as dots; then the mean over sets, where all sets are there."""
    volumes = volume_of(scores)
    figure, axes = _grid(len(scores.datasets) + 1, 2.3, share_y=False)
    for ax, dataset in zip(axes, [*scores.datasets, ""], strict=True):
        means = {v: scores.mean(m, dataset) if dataset else scores.overall(m) for v, m in volumes.items()}
        there = {v: mean for v, mean in means.items() if mean is not None}
        for volume, method in volumes.items() if dataset else ():
            seeds = list(scores.last(method, dataset).values())
            ax.plot([volume] * len(seeds), seeds, "o", color=BLUE, alpha=0.4, markeredgewidth=0)
        if not there:
            ax.text(0.5, 0.5, MISSING, transform=ax.transAxes, ha="center", color=MUTED, style="italic")
        ax.plot(list(there), list(there.values()), color=BLUE if dataset else INK, marker="_", markersize=9)
        _titled(ax, dataset or "mean over sets")
        ax.set_xlim(-0.06, 1.06)
        ax.set_xticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
    for ax in axes[::_COLUMNS]:
        ax.set_ylabel("normalised score")
    figure.supxlabel("share of the accepted imagined segments that is used; each seed a dot, the line is their mean",
                     size=8.5)  # fmt: skip
    return figure


def figures(scores: Scores) -> dict[str, Callable[[], Figure]]:
    """Plots of one tier by kind; of those there is something to show in."""
    found: dict[str, Callable[[], Figure]] = {"points": lambda: points_figure(scores)}
    if any(len(r.curve) > 1 for r in scores.all if r.method in RUNGS):
        found["ladder"] = lambda: curves_figure(scores, list(RUNGS))
    if any(len(r.curve) > 1 for r in scores.all if r.method in scores.peers):
        found["peers"] = lambda: curves_figure(scores, [METHOD, *scores.peers])
    if len(volume_of(scores)) > 2:
        found["volume"] = lambda: volume_figure(scores)
    return found


def draw(scores: Scores, folder: Path) -> dict[str, str]:
    """Write a tier's plots, remove those that are no longer drawn; return the files relative to the page by kind."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    kinds, written = figures(scores), {}
    for kind in KINDS:
        path = folder / f"{scores.tier}-{kind}.svg"
        if kind not in kinds:
            path.unlink(missing_ok=True)
            continue
        with matplotlib.rc_context(_STYLE):
            kinds[kind]().savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        written[kind] = f"{folder.name}/{path.name}"
    return written


# ---- command line


def tiers_of(root: Path) -> list[str]:
    """Names of the tiers that have results, in order."""
    return sorted(p.name for p in root.iterdir() if any(p.glob("*/*.json"))) if root.is_dir() else []


def write_pages(tiers: Sequence[Scores], chosen: Sequence[Scores], root: Path) -> list[Path]:
    """Write README.md's table of the chosen tiers, docs/scores.md and the plots of all; return what was written."""
    readme, page = root / "README.md", root / "docs" / "scores.md"
    text = replaced(readme.read_text(), as_markdown(readme_blocks(chosen)))  # first: it fails where a marker is missing
    pictures = {scores.tier: draw(scores, page.with_suffix("")) for scores in tiers}
    page.write_text(as_markdown(page_blocks(tiers, pictures)))
    readme.write_text(text)
    return [readme, page, *(page.parent / path for files in pictures.values() for path in files.values())]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", help="print this tier, and put it into README.md; all where not given")
    parser.add_argument("--write", action="store_true", help="write docs/scores.md, docs/scores/*.svg and README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results lie")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with README.md and docs/")
    options = parser.parse_args(arguments)
    names = tiers_of(options.results)
    if options.tier and options.tier not in names:
        raise SystemExit(f"--tier={options.tier} has no results in {options.results}; there are: "
                         f"{_listed(names) or 'none'}.")  # fmt: skip
    try:
        tiers = [Scores(name, read_all(name, options.results)) for name in names]
        chosen = [scores for scores in tiers if options.tier in (None, scores.tier)]
        print(as_text([block for scores in chosen for block in tier_blocks(scores, {})] or ["No results yet."]), end="")
        for path in write_pages(tiers, chosen, options.root) if options.write else ():
            print(f"wrote {path}")
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
