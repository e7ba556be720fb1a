"""The page of a sweep: the answer, the points, what each setting does, how the trials learned, and what was shared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ipd_ray.artifacts import Artifact, read_jsonl
from ipd_ray.errors import UserError
from ipd_ray.report import figures
from ipd_ray.report.markup import escape, panel, panels_of, percent, remark
from ipd_ray.report.page import write_page
from ipd_ray.runs import CURVES, RunFolder, human_seconds
from ipd_ray.sweep import Row, Sweep, rank_agreement, ranked, reuse, rows_of
from ipd_ray.text import readable

_AFTER = ("policy", "distill", "choose", "fitted_q", "evaluate")
"""Sections that come after acceptance."""
_MEASURES = {
    "return": "mean return", "imagined": "return inside the world model",
    "fitted_q": "value on held-out episodes (fitted Q)",
}


@dataclass(frozen=True)
class Answer:
    """A sweep, read as far as it is there."""

    sweep: Sweep

    @cached_property
    def described(self) -> dict[str, Any]:
        return self.sweep.described

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return self.sweep.records()

    @cached_property
    def trials(self) -> list[dict[str, Any]]:
        """The records without the finalists' second evaluations."""
        return [r for r in self.records if not r.get("fresh")]

    @cached_property
    def rows(self) -> list[Row]:
        return rows_of(self.records, int(self.described["question"]["seeds"]))

    @cached_property
    def best(self) -> Row | None:
        return next(iter(ranked(self.rows)), None)

    @property
    def swept(self) -> list[str]:
        return list(self.described["question"]["space"])

    @property
    def measure(self) -> str:
        return _MEASURES[self.described["question"]["objective"]]


def build_sweep_report(folder: Path, output: Path) -> Path:
    """Write the report of a sweep's folder and return its path. Raises UserError for a folder that is no sweep."""
    answer = Answer(Sweep(Path(folder).absolute()))
    made = [
        ("answer", "Answer", "", _answer(answer)),
        ("points", "Points", "Mean and 95 % interval of the objective, over seeds, or over episodes where there is one "
         "seed. <b>Bad:</b> intervals that all overlap: what was swept decides nothing here, or needs more seeds.",
         _points(answer)),
        ("settings", "What each setting does", "All points over one setting; the line joins the means. <b>Bad:</b> the "
         "best value at the edge of what was tried: try beyond it.", _settings(answer)),
        ("together", "All settings together", "A line is a point, from setting to setting to its score. <b>Bad:</b> "
         "lines that cross everywhere: no setting decides alone.", _parallel(answer)),
        ("curves", "Learning curves by trial", "Distillation of every trial, the best point's in colour. <b>Bad:</b> "
         "returns that fall with training: fewer updates, or another setting.", _curves(answer)),
        ("proxies", "Other measures", "How measures that need no environment rank the points. <b>Bad:</b> a rank "
         "correlation near 0: where there is no environment, that measure would have misled.", _proxies(answer)),
        ("work", "What was shared", "Trials that need the same result share it: it is made once. Saved is the time "
         "that the same trials would have taken apart.", _work(answer)),
        ("failed", "Failed trials", "They stop no other, and are tried again by the same command.", _failed(answer)),
    ]
    sections = [(id, title, read, html) for id, title, read, html in made if html]
    body = [
        f'<section><h2 id="{id}">{title}</h2>{f"""<p class="read">{read}</p>""" if read else ""}{html}</section>'
        for id, title, read, html in sections
    ]
    subtitle = f"sweep of {', '.join(answer.swept)} · {answer.described['dataset']}"
    return write_page(Path(output), folder.name, subtitle, [(id, title) for id, title, _, _ in sections], body)


def _score(row: Row | None) -> str:
    if row is None or math.isnan(row.mean):
        return "–"
    return readable(row.mean) + ("" if math.isnan(row.half) else f" ± {readable(row.half)}")


def _answer(answer: Answer) -> str:
    best, question = answer.best, answer.described["question"]
    if best is None:
        return remark("No point has ended whole.")
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in best.settings.items()
    )
    rule = (
        "It has the best lower bound among the finalists, evaluated again on environment seeds that no trial had seen."
        if best.fresh else "It has the best lower bound of all points."
    )
    fresh = f'<tr><th scope="row">on fresh seeds</th><td>{_score(best.fresh)}</td></tr>' if best.fresh else ""
    over = "seeds" if question["seeds"] > 1 else "episodes: one seed says nothing of the luck of training"
    return (
        f'<div class="cards"><div><h4>Point {best.point}</h4><table>{lines}<tr class="strong"><th scope="row">'
        f"{answer.measure}</th><td>{_score(best)}</td></tr>{fresh}</table></div></div><p>{rule} "
        f"Intervals are over {over}. <code>best.yaml</code> holds its settings: "
        "<code>ipd-ray run --config best.yaml</code> finds all its results in the store.</p>"
    )


def _points(answer: Answer) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in answer.swept)
    order = ranked(answer.rows)
    lines = []
    for row in [*order, *(r for r in answer.rows if r not in order)]:
        cells = "".join(f"<td>{escape(value)}</td>" for value in row.settings.values())
        state = row.state + (f" at {row.stopped_at:,}" if row.stopped_at else "")
        lines.append(
            f'<tr{" class=strong" if row is answer.best else ""}><th scope="row">{row.point}</th>{cells}'
            f"<td>{_score(row)}</td><td>{_score(row.fresh)}</td><td>{percent(row.accepted)}</td><td>{state}</td></tr>"
        )
    return (
        f'<div class="scroll"><table class="many"><thead><tr><th>point</th>{head}<th>{answer.measure}</th>'
        f'<th>on fresh seeds</th><th>accepted</th><th>state</th></tr></thead>{"".join(lines)}</table></div>'
    )


def _settings(answer: Answer) -> str:
    done = [row for row in answer.rows if row.state == "done"]
    space, panels = answer.described["question"]["space"], []
    if not done:
        return ""
    for name in answer.swept:
        log = isinstance(space[name], Mapping) and bool(space[name]["log"])
        scores = [(row.settings[name], row.mean, row.half) for row in done]
        alt = f"{answer.measure} against {name}"
        panels.append(panel(escape(alt), figures.intervals(scores, x=name, y="", alt=alt, log=log)))
        shares = [(row.settings[name], row.accepted, math.nan) for row in done if row.accepted is not None]
        if shares and name.partition(".")[0] not in _AFTER:
            alt = f"share of imagined segments accepted against {name}"
            panels.append(
                panel(escape(alt), figures.intervals(shares, x=name, y="", alt=alt, percent=True, log=log))
            )
    kappas = [(r["kappa"], r["accepted"], math.nan) for r in answer.trials if r.get("kappa") and r["state"] == "done"]
    if len({kappa for kappa, _, _ in kappas}) > 1:
        alt = "share of imagined segments accepted against the threshold kappa"
        panels.append(panel(alt, figures.intervals(sorted(kappas), x="kappa, units of U", y="", alt=alt, percent=True)))
        scored = sorted((r["kappa"], r["score"], math.nan) for r in answer.trials
                        if r.get("kappa") and r["score"] is not None)
        alt = f"{answer.measure} against the threshold kappa"
        panels.append(panel(alt, figures.intervals(scored, x="kappa, units of U", y="", alt=alt), "One dot a trial."))
    return panels_of(panels, wide=True)


def _parallel(answer: Answer) -> str:
    done = [row for row in answer.rows if row.state == "done"]
    if len(answer.swept) < 2 or len(done) < 2 or answer.best is None:
        return ""
    axes = {name: [row.settings[name] for row in done] for name in answer.swept}
    best = next(i for i, row in enumerate(done) if row is answer.best)
    alt = f"Parallel coordinates of {', '.join(answer.swept)} and {answer.measure}"
    drawn = figures.parallel(axes, [row.mean for row in done], best=best, score=answer.measure, alt=alt)
    return panel("", drawn)


def _curves(answer: Answer) -> str:
    best = answer.best.point if answer.best else None
    losses: list[tuple[int, Any]] = []
    returns: list[tuple[int, Any]] = []
    for record in answer.trials:
        run = RunFolder(answer.sweep.run_dir(record["trial"]))
        rows = [r for r in read_jsonl(run.path / CURVES) if r.get("part") == "distill" and "imitation" in r]
        if rows:
            losses.append((record["point"], ([r["step"] for r in rows], [r["imitation"] for r in rows])))
        if curve := _score_curve(run):
            returns.append((record["point"], curve))
        elif record["rungs"]:
            returns.append((record["point"], ([s for s, _ in record["rungs"]], [v for _, v in record["rungs"]])))
    panels = []
    for title, y, found in (
        ("Imitation loss", "weighted square error", losses), ("Policies kept on the way", answer.measure, returns)
    ):
        if found:
            coloured = [i for i, (point, _) in enumerate(found) if point == best]
            drawn = figures.bundle(
                [line for _, line in found], best=coloured, named=f"point {best}", x="updates", y=y,
                alt=f"{title} of every trial",
            )
            panels.append(panel(title, drawn))
    return panels_of(panels)


def _score_curve(run: RunFolder) -> tuple[list[float], list[float]] | None:
    """Updates and mean return of the policies that a trial's distillation kept."""
    try:
        curve = Artifact(run.artifact("evaluate")).diagnostics["curve"]
    except UserError:  # not there
        return None
    return [float(p["step"]) for p in curve], [float(p["return_mean"]) for p in curve]


def _proxies(answer: Answer) -> str:
    panels = []
    done = [row for row in answer.rows if row.state == "done"]
    for name, correlation in rank_agreement(answer.rows).items():
        pairs = [(row.also[name], row.mean, row.half) for row in done if row.also and name in row.also]
        alt = f"{answer.measure} against {_MEASURES[name]}"
        drawn = figures.intervals(sorted(pairs), x=_MEASURES[name], y=answer.measure, alt=alt)
        said = f"Rank correlation {correlation:.2f}, {len(pairs)} points."
        panels.append(panel(escape(_MEASURES[name]), drawn, said))
    return panels_of(panels)


def _work(answer: Answer) -> str:
    rows = reuse(answer.trials)
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("step", "needed by trials", "made", "reused", "time", "saved"))
    return f'<div class="scroll"><table class="many"><thead><tr>{head}</tr></thead>{_lines(rows)}</table></div>'


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    total = {name: sum(row[name] for row in rows) for name in ("needed", "made", "reused", "seconds", "saved")}
    return "".join(
        f'<tr><th scope="row">{escape(row["step"])}</th><td>{row["needed"]}</td><td>{row["made"]}</td>'
        f"<td>{row['reused']}</td><td>{human_seconds(row['seconds'])}</td><td>{human_seconds(row['saved'])}</td></tr>"
        for row in [*rows, {"step": "in all", **total}]
    )


def _failed(answer: Answer) -> str:
    return "".join(
        f"<details><summary>{escape(r['trial'])}: {escape(r['traceback'].strip().splitlines()[-1])}</summary>"
        f"<pre>{escape(r['traceback'])}</pre></details>"
        for r in answer.records if r["state"] == "failed"
    )
