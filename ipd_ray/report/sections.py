"""The sections that every run has: its figures, how to read them, and what is said where something is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ipd_ray.artifacts import TENSORS, Artifact
from ipd_ray.report import figures
from ipd_ray.report.film import Film, film
from ipd_ray.report.findings import MIN_UNCERTAINTY_RANK
from ipd_ray.report.markup import escape, panel, panels_of, percent, remark
from ipd_ray.report.source import VARIANTS, View, number
from ipd_ray.storage import ARTIFACT
from ipd_ray.text import readable

NO_FILM = "No film:"
_NOT_LEARNT = (
    "step", "total", "time", "part", "updates_per_second", "imagined_steps_per_second", "accept_rate", "actors",
    "episodes_ended",
)
_KINDS = {"spread": "U (spread)", "primal": "U (primal)", "dual": "U (dual)"}


@dataclass(frozen=True)
class Section:
    """A part of the page: the same for every run."""

    id: str
    title: str
    read: str
    """How to read it, and what would be bad; HTML."""
    make: Callable[[View], str]


def _curve_section(view: View) -> str:
    panels = []
    for part in ("values", "world_model", "imagine", "fitted_q"):
        rows = view.curves.get(part, [])
        positive: dict[str, Any] = {}
        signed: dict[str, Any] = {}
        for name in _metrics(rows):
            series = _series(rows, name)
            (positive if min(series[1]) > 0 else signed)[name] = series
        across = "shards" if part == "imagine" else "updates"
        for group in (positive, signed):
            if group:
                what = ", ".join(group)
                panels.append(
                    panel(
                        f"{part.replace('_', ' ')}: {escape(what)}",
                        figures.curves(group, x=across, y="", alt=f"Learning curve of {part}: {what}"),
                    )
                )
    for step, title, across in (("reach", "actor", "rounds"), ("distill", "distill", "updates")):
        parts = [name for name in view.curves if name.partition(":")[0] == step]
        for name in _metrics([row for part in parts for row in view.curves[part]]):
            lines = {}
            for part in parts:
                series, which = _series(view.curves[part], name), part.partition(":")[2]
                if series[0]:
                    named = VARIANTS.get(which or "policy", which.replace("-", " "))
                    lines[f"reach {which}" if step == "reach" else named] = series
            drawn = figures.curves(lines, x=across, y="", alt=f"Learning curves of {title}: {name}")
            panels.append(panel(f"{title}: {escape(name)}", drawn))
    said = [
        remark(f"No learning curve of {part}: {escape(view.why_missing(part))}.")
        for part in ("values", "world_model", "imagine", "distill")
        if part not in view.curves
    ]
    return panels_of(panels) + "".join(said)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(k for row in rows for k in row if k not in _NOT_LEARNT and number(row, k) is not None))


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    pairs = [(float(row["step"]), value) for row in rows if (value := number(row, name)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _returns_section(view: View) -> str:
    groups, said = {}, []
    if view.log is not None:
        groups["data"] = view.log.transitions.episode_return
    else:
        said.append(
            "The data's episodes are not in the store any longer (or the settings cannot be read by this version)."
        )
    for variant, name in VARIANTS.items():
        found = view.returns(variant)
        if found is not None:
            groups[name] = found
    if "policy" not in groups:
        said.append(f"No evaluation: {escape(view.why_missing('evaluate'))}.")
    panels = []
    if groups:
        panels.append(
            panel(
                "Returns of whole episodes",
                figures.histograms(groups, x="return (raw, undiscounted)", alt="Histograms of returns"),
                "Share of episodes in each bin, every row to its own height; the tick is the mean.",
            )
        )
    lines = {name: line for variant, name in VARIANTS.items() if len((line := view.score_curve(variant))[0]) > 1}
    if lines:
        panels.append(
            panel(
                "Score along distillation",
                figures.curves(lines, x="updates", y="return", alt="Return of the policies kept along the way"),
                "The same episodes for each; updates of a policy that was corrected count from its last draft. Picking "
                "the best of them by these scores flatters.",
            )
        )
    candidates = view.diagnostics("choose").get("candidates") or []
    lines = {}
    for variant, name in (("ipd", "policy"), ("no_imagination", VARIANTS["no_imagination"])):
        points = sorted((c["step"], c["return_mean"]) for c in candidates if c["variant"] == variant)
        if len(points) > 1:
            lines[name] = [float(step) for step, _ in points], [float(mean) for _, mean in points]
    if lines:
        kept = view.diagnostics("choose")
        which = "the policy" if kept["variant"] == "ipd" else "the policy without imagination"
        panels.append(
            panel(
                "Inside the world model",
                figures.curves(lines, x="updates", y="imagined return", alt="Imagined return of each candidate"),
                f"What each policy earns in imagined, disturbed episodes. Kept: {which} of {kept['step']:,} updates. "
                "Bad: an order unlike that of the scores beside it.",
            )
        )
    return panels_of(panels, wide=True) + "".join(map(remark, said))


def _own_estimate(d: Mapping[str, Any]) -> str:
    """How much of the returns that V is held against V itself has said."""
    share = number(d, "mc_bootstrap")
    if share is None or share < 0.005:
        return ""
    test = ", so the two can hardly differ" if share > 0.5 else ""
    return f"V of where the episode was cut is a part of the return, weighed {share:.0%} on average{test}. "


def _values_section(view: View) -> str:
    d = view.diagnostics("values")
    if not d:
        return remark(f"No values: {escape(view.why_missing('values'))}.")
    panels = []
    sample = d.get("sample") or {}
    if sample.get("value"):
        pair = view.raw(np.asarray(sample["value"])), view.raw(np.asarray(sample["return"]))
        panels.append(
            panel(
                "V against the return that followed",
                figures.scatter(
                    {"held-out steps": pair},
                    x=f"V(s), {view.unit}",
                    y="discounted return",
                    diagonal="V = return",
                    alt="Scatter of value against return",
                ),
                f"{len(pair[0]):,} of {readable(number(d, 'mc_rows'))} held-out steps. {_own_estimate(d)}"
                "Under the diagonal: V promises more than came.",
            )
        )
    ranks = {
        label: d.get(f"rank_correlation{key}")
        for label, key in (("V", ""), ("Q(s, a)", "_q"), ("linear fit", "_linear"), ("time step", "_timestep"))
    }
    known = {k: float(v) for k, v in ranks.items() if isinstance(v, int | float) and np.isfinite(v)}
    if known:
        panels.append(
            panel(
                "Rank correlation with the return",
                figures.bars(
                    known,
                    x="rank correlation (Spearman)",
                    own=("V", "Q(s, a)"),
                    alt="Rank correlations of values and of trivial predictors",
                ),
                "Grey: what a trivial predictor reaches.",
            )
        )
    if d.get("gap_by_decile"):
        panels.append(
            panel(
                "V − return by decile of V",
                figures.decile_bars(
                    d["gap_by_decile"],
                    x="decile of V",
                    y="gap, spreads of the return",
                    alt="Gap between value and return by decile of value",
                ),
                "Expected: above zero at the left (states that V would repair), near zero at the right.",
            )
        )
    return panels_of(panels)


def _world_model_section(view: View) -> str:
    d = view.diagnostics("world_model")
    if not d:
        return remark(f"No world model: {escape(view.why_missing('world_model'))}.")
    kind = str(view.settings.get("imagine.uncertainty") or "spread")
    length = view.settings.get("imagine.length")
    panels = []
    errors = {
        label: number(d, key)
        for label, key in (
            ("world model", "rmse"),
            ("its reward alone", "reward_rmse"),
            ("linear fit", "rmse_linear"),
            ("constant", "rmse_constant"),
        )
    }
    known = {k: v for k, v in errors.items() if v is not None}
    if known:
        panels.append(
            panel(
                "One-step error",
                figures.bars(
                    known,
                    x="root mean square error",
                    own=("world model", "its reward alone"),
                    shown="{:.3f}",
                    alt="One-step error against trivial predictors",
                ),
                "Held-out steps, in units of the spread of the change of state and of reward.",
            )
        )
    sample = d.get("sample") or {}
    if sample.get("uncertainty"):
        u, error = np.asarray(sample["uncertainty"]), np.asarray(sample["error"])
        keep = (u > 0) & (error > 0)
        if keep.any():
            panels.append(
                panel(
                    "U against the true error",
                    figures.scatter(
                        {"held-out steps": (u[keep], error[keep])},
                        x="U (spread)",
                        y="one-step error",
                        log=True,
                        diagonal="U = error",
                        alt="Scatter of uncertainty against error",
                    ),
                    f"{int(keep.sum()):,} held-out steps, both axes logarithmic.",
                )
            )
    ranks = {
        k: float(v)
        for k, v in (d.get("uncertainty_rank_correlation") or {}).items()
        if v is not None and np.isfinite(v)
    }
    if ranks:
        panels.append(
            panel(
                "Rank correlation of U with the error",
                figures.bars(
                    {_KINDS.get(k, k): v for k, v in ranks.items()},
                    x="rank correlation (Spearman)",
                    own=(_KINDS.get(kind, kind),),
                    alt="Rank correlations of the kinds of uncertainty",
                ),
                f"Coloured: the kind in use (imagine.uncertainty = {escape(kind)}).",
            )
        )
    depth = d.get("rollout_rmse_by_depth") or {}
    if depth.get("model"):
        panels.append(
            panel(
                "Roll-out error by depth",
                figures.depth_lines(
                    {"world model": depth["model"], "standing still": depth.get("still", [])},
                    y="error, spreads of state",
                    mark=int(length) if length else None,
                    alt="Roll-out error by depth",
                ),
                f"Open loop along held-out actions, {len(depth['model'])} steps deep; segments have up to "
                f"{readable(length)}.",
            )
        )
    ended = d.get("termination") or {}
    if number(ended, "true"):
        said = (
            f"Termination on {readable(ended.get('steps'))} held-out steps: {readable(ended.get('found'))} of "
            f"{readable(ended.get('true'))} found, "
            f"{readable(ended.get('false_alarms'))} false alarms."
        )
    else:
        said = "No held-out episode terminates: nothing to say of termination."
    ends = d.get("ends") or {}
    edges = [
        f"observation {i} {side} {readable(bound)}" for side in ("below", "above")
        for i, bound in (ends.get(side) or {}).items()
    ]  # fmt: skip
    if edges:
        said += (
            f" Every logged episode ended, and an imagined one does, with {' or '.join(edges)}: that explains "
            f"{percent(1.0 - ends['within'])} of all ends."
        )
    floor = number(d, "share_at_variance_floor")
    if floor is not None:
        said += f" {percent(floor)} of predicted variances lie at their floor."
    return panels_of(panels) + f'<p class="sub">{said}</p>'


def _imagination_section(view: View) -> str:
    d = view.imagined
    if not d:
        part = "imagine" if view.part("imagine") is None else "distill"
        reason = view.why_missing(part) if view.part(part) is None else "this policy was distilled from the log alone"
        return remark(f"Nothing to say of imagined segments: {escape(reason)}.")
    panels = []
    pairs = _imagined_pairs(view)
    if pairs:
        sampled = len(view.segments) if view.segments is not None else 0
        panels.append(
            panel(
                "Imagined value I against the log's B",
                figures.scatter(
                    pairs,
                    x=f"B, the log from the same start ({view.unit})",
                    y="I, imagined",
                    diagonal="I = B",
                    alt="Scatter of imagined against own value",
                ),
                f"{sampled:,} of {readable(d.get('segments'))} segments. Reward over the steps left, discounted, "
                "plus V of where they end.",
            )
        )
    if d.get("survival_by_depth"):
        panels.append(
            panel(
                "Survival by depth",
                figures.depth_lines(
                    {"imagined segments": d["survival_by_depth"]},
                    y="still certain and in range",
                    percent=True,
                    alt="Share of segments that survive, by depth",
                ),
                f"κ = {readable(number(d, 'kappa'))} lets {percent(number(view.settings, 'accept.survival'))} of "
                "real held-out windows pass whole.",
            )
        )
    rates = {
        label: number(d, f"accept_rate{key}")
        for label, key in (("all", ""), ("chosen by regret", "_flagged"), ("drawn at random", "_control"))
    }
    known = {k: v for k, v in rates.items() if v is not None}
    distance = d.get("by_distance_to_termination") or {}
    for key, label in (
        ("ends_within_10", "log ends within 10"),
        ("ends_within_50", "log ends in 11 to 50"),
        ("later_or_never", "later or never"),
    ):
        if key in distance and len(distance) > 1:
            known[label] = float(distance[key]["accept_rate"])
    if known:
        note = (
            "The log terminates soon after the last rows' starts."
            if len(distance) > 1
            else "No start is near a termination, so there is no rate by distance to it."
        )
        panels.append(
            panel(
                "Accept rate",
                figures.bars(
                    known,
                    x="share of segments accepted",
                    percent=True,
                    alt="Accept rates",
                    own=("all", "chosen by regret", "drawn at random"),
                ),
                note,
            )
        )
    names = {
        "too_short": "too short after the cut",
        "uncertain_first_step": "uncertain at step 1",
        "out_of_range": "out of the log's range",
        "not_over_log": "not over the log's B",
        "not_over_value": "not over V(s₀)",
    }
    reasons = {names.get(k, k): float(v) for k, v in (d.get("rejections") or {}).items()}
    if reasons:
        panels.append(
            panel(
                "Rejections by reason",
                figures.bars(reasons, x="share of segments", percent=True, alt="Rejections by reason"),
                "A segment may fail several tests; a cut by range does not reject by itself.",
            )
        )
    said = "" if pairs else remark("No scatter of I against B: the shards or the log are not in the store any longer.")
    return panels_of(panels) + said


def _imagined_pairs(view: View) -> dict[str, tuple[Any, Any]]:
    verdict = view.judged
    if verdict is None:
        return {}
    imagined, own, ok = view.raw(verdict.imagined), view.raw(verdict.own), verdict.accepted
    rng = np.random.default_rng(0)
    out = {}
    for name, rows in (("rejected", np.flatnonzero(~ok)), ("accepted", np.flatnonzero(ok))):
        rows = rng.permutation(rows)[:4000]
        out[name] = (own[rows].astype(np.float64), imagined[rows].astype(np.float64))
    return {name: pair for name, pair in out.items() if len(pair[0])}


def _film_section(view: View) -> str:
    folder = view.run.path / "policy"
    if not (folder / "artifact.json").is_file():
        if view.part("distill") is None and view.part("choose") is None:
            return remark(f"No policy to show: {escape(view.why_missing('distill'))}.")
        artifact = Artifact(view.links["choose" if view.part("choose") else "distill"]["path"])
        artifact.pull([ARTIFACT, TENSORS])
        folder = artifact.path
    s = view.settings
    returns = view.returns("policy")
    middle = 0 if returns is None else int(np.argsort(returns)[len(returns) // 2])
    seed = int(s.get("evaluate.seed") or 0) + middle
    which = (
        "The first evaluation episode" if returns is None else "The evaluation episode of median return, played again"
    )
    limit = view.diagnostics("evaluate").get("max_steps", s.get("evaluate.max_steps"))
    found = film(
        folder, s.get("evaluate.environment"), seed, limit,
        candidates=s.get("evaluate.candidates", 1), candidate_std=s.get("evaluate.candidate_std", 0.1),
    )
    if not isinstance(found, Film):
        return remark(f"{NO_FILM} {escape(_without_paths(found))}.")
    frames = "".join(
        f'<figure><img alt="frame at step {step}" src="data:image/png;base64,{frame}"><figcaption>step {step}<br>'
        f"return {readable(collected)}</figcaption></figure>"
        for step, collected, frame in zip(found.steps, found.collected, found.frames, strict=True)
    )
    end = f"{found.length} steps" if found.whole else f"the first {found.length} steps (time was up)"
    then = "" if returns is None or not found.whole else _also(found.collected[-1], float(returns[middle]))
    return (
        f'<div class="strip">{frames}</div><p class="sub">{which} (environment seed {found.seed}), {end}, '
        f"return {readable(found.collected[-1])}{then}.</p>"
    )


def _also(now: float, then: float) -> str:
    return "" if abs(now - then) <= 0.01 * max(abs(then), 1.0) else f" (in the evaluation: {readable(then)})"


def _without_paths(text: str) -> str:
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


SECTIONS = (
    Section(
        "curves",
        "Learning curves",
        "Every step's metrics over its updates; a logarithmic axis where they span more than a decade. "
        "<b>Bad:</b> a loss that "
        "still falls steeply at the end (more updates would help), or one that rises.",
        _curve_section,
    ),
    Section(
        "returns",
        "Returns",
        "What the data collected, and what the policy and its ablations collect in the real environment. "
        "<b>Bad:</b> a policy "
        "that sits inside the data's bulk, or that has a second hump at the low end: it fails from some starts.",
        _returns_section,
    ),
    Section(
        "values",
        "Values",
        "V is judged on held-out episodes, in order and in size. <b>Bad:</b> no better than the time step or a "
        "linear fit, or a "
        "gap well above zero in the last decile: V overestimates exactly where plans will go.",
        _values_section,
    ),
    Section(
        "world-model",
        "World model",
        "The model must beat trivial predictors, and U must know where it errs, since acceptance rests on U. "
        "<b>Bad:</b> error "
        f"at or over the linear fit, a rank correlation under {MIN_UNCERTAINTY_RANK}, or roll-outs worse than "
        "standing still before "
        "segments end.",
        _world_model_section,
    ),
    Section(
        "imagination",
        "Imagination",
        "Plans from states of the log, cut where the model is uncertain, kept where they beat both the log and "
        "V. <b>Bad:</b> "
        "almost nothing accepted, starts chosen by regret accepted no more often than random ones, or gains "
        "(over the diagonal) "
        "larger than the data could ever show.",
        _imagination_section,
    ),
    Section(
        "film",
        "The policy at work",
        "Frames of one typical episode, evenly spaced. <b>Bad:</b> a policy that ends early, stands still, or "
        "trembles: a score alone "
        "does not tell.",
        _film_section,
    ),
)
