"""What a reader must know before the figures: the diagnostics that say that something did not work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ipd_ray.report.source import VARIANTS, View, number
from ipd_ray.runs import MUCH_LONGER
from ipd_ray.text import readable

MIN_UNCERTAINTY_RANK = 0.2
MIN_ACCEPT_RATE = 0.02
MAX_DECILE_GAP = 1.0
"""V - G of the most promising tenth, in spreads of the return."""
MAX_START_GAP = 1.0
"""V(s_0) over the discounted return of the policy (V of what follows where time was up), in spreads of the data's."""
MIN_EPISODES = 10
MAX_HALTED = 0.5
"""Of the episodes inside the world model, of the candidate that is halted least."""


@dataclass(frozen=True)
class Finding:
    """One thing to know. warning: it puts the result in doubt; else it is a remark."""

    warning: bool
    where: str
    """Id of the section to look at."""
    text: str


def findings(view: View) -> list[Finding]:
    """All findings of a run, in the order of the method, warnings first."""
    steps = (_scores, _values, _world_model, _actor, _imagination, _corrections, _distillation, _choice)
    found = [finding for step in steps for finding in step(view)]
    return sorted(found, key=lambda f: not f.warning)


def _scores(view: View) -> list[Finding]:
    out = []
    summary = view.summary
    policy, data = summary.get("policy", {}), summary.get("data", {})
    mean, std, episodes = number(policy, "return_mean"), number(policy, "return_std"), number(policy, "episodes")
    if mean is None:
        return [Finding(False, "returns", "The policy has no score: everything below is offline evidence only.")]
    base, length, longest = number(data, "return_mean"), number(policy, "length_mean"), number(data, "longest_cut")
    if length is not None and longest is not None and length > MUCH_LONGER * longest:
        remedy = f": set evaluate.max_steps={longest:.0f}" if number(data, "time_limit") else ""
        out.append(
            Finding(
                True,
                "returns",
                f"The policy's returns do not compare with those of its data: evaluated episodes last {length:,.0f} "
                f"steps, the log's {longest:,.0f} at most{remedy}.",
            )
        )
    elif base is not None and mean <= base:
        out.append(
            Finding(
                True,
                "returns",
                f"The policy ({readable(mean)}) is no better than the mean of its data ({readable(base)}).",
            )
        )
    error = (std or 0.0) / np.sqrt(max(episodes or 1.0, 1.0))
    for name in ("bc", "no_imagination"):
        other = summary.get(name, {})
        theirs, spread, count = (number(other, k) for k in ("return_mean", "return_std", "episodes"))
        if theirs is None:
            continue
        noise = float(np.hypot(error, (spread or 0.0) / np.sqrt(max(count or 1.0, 1.0))))
        if mean - theirs <= noise:
            said = "is behind" if theirs - mean > noise else "is not told apart from"
            out.append(
                Finding(
                    theirs - mean > noise,
                    "returns",
                    f"The policy ({readable(mean)}) {said} its ablation {VARIANTS[name]} ({readable(theirs)}); "
                    "the difference has a "
                    f"standard error of {readable(noise)}.",
                )
            )
    if episodes is not None and episodes < MIN_EPISODES:
        out.append(Finding(False, "returns", f"Scores are of {episodes:.0f} episodes only (evaluate.episodes)."))
    promised, collected = number(policy, "value_at_start"), number(policy, "discounted_mean")
    spread = discounted_spread(view)
    if promised is not None and collected is not None and spread and abs(promised - collected) > MAX_START_GAP * spread:
        more = "more" if promised > collected else "less"
        out.append(
            Finding(
                True,
                "values",
                f"V promises {more} than the policy collects: V at the start is {readable(promised)}, the "
                "discounted return, where time was up with V of what follows, "
                f"{readable(collected)}, which is {abs(promised - collected) / spread:.1f} times the spread of "
                "the data's.",
            )
        )
    return out


def discounted_spread(view: View) -> float | None:
    """Std of the data's discounted episode returns, raw; the undiscounted one's where the log is not there."""
    if view.log is not None:
        starts = view.log.transitions.episode_start[:-1]
        return float(view.log.return_parts[0][starts].std()) / view.log.reward_scale
    return number(view.summary.get("data", {}), "return_std")


def _values(view: View) -> list[Finding]:
    d, out = view.diagnostics("values"), []
    rank, clock, linear = (number(d, f"rank_correlation{k}") for k in ("", "_timestep", "_linear"))
    if rank is not None and clock is not None and rank <= clock:
        out.append(
            Finding(
                True,
                "values",
                f"V ranks held-out states no better ({rank:.2f}) than the time step alone ({clock:.2f}).",
            )
        )
    elif rank is not None and linear is not None and rank <= linear:
        out.append(
            Finding(
                False, "values", f"V ranks held-out states no better ({rank:.2f}) than a linear fit ({linear:.2f})."
            )
        )
    gaps = d.get("gap_by_decile") or []
    if gaps and gaps[-1] > MAX_DECILE_GAP:
        out.append(
            Finding(
                True,
                "values",
                f"V overestimates the states that it likes best by {gaps[-1]:.1f} spreads of the return: plans "
                "will head there. "
                "Lower values.expectile.",
            )
        )
    return out


def _world_model(view: View) -> list[Finding]:
    d, out = view.diagnostics("world_model"), []
    error, linear = number(d, "rmse"), number(d, "rmse_linear")
    if error is not None and linear is not None and error >= linear:
        out.append(
            Finding(
                True,
                "world-model",
                f"The world model predicts a step no better (error {error:.3f}) than a linear fit ({linear:.3f}): "
                "nothing "
                "imagined in it can be trusted. Raise world_model.max_updates.",
            )
        )
    depth = d.get("rollout_rmse_by_depth") or {}
    worse = [
        k + 1 for k, (a, b) in enumerate(zip(depth.get("model", []), depth.get("still", []), strict=False)) if a >= b
    ]
    length = int(view.settings.get("imagine.length") or 0)
    if worse and worse[0] <= max(length, 1):
        out.append(
            Finding(
                True,
                "world-model",
                f"At depth {worse[0]} a roll-out is further off than standing still, within "
                f"imagine.length={length}: lower it.",
            )
        )
    kind = str(view.settings.get("imagine.uncertainty") or "spread")
    rank = number(d.get("uncertainty_rank_correlation") or {}, kind)
    if rank is not None and rank < MIN_UNCERTAINTY_RANK:
        out.append(
            Finding(
                True,
                "world-model",
                f"U ({kind}) hardly follows the true error (rank correlation {rank:.2f}, below "
                f"{MIN_UNCERTAINTY_RANK}): "
                "acceptance does not know a good segment from a bad one.",
            )
        )
    ended = d.get("termination") or {}
    true, hit = number(ended, "true") or 0.0, number(ended, "found") or 0.0
    if true >= 5 and hit < 0.5 * true:
        out.append(
            Finding(
                True,
                "world-model",
                f"The model sees {hit:.0f} of {true:.0f} held-out terminations: imagined plans live on past "
                "their end. Give the rule with world_model.termination where it is known.",
            )
        )
    return out


def _imagination(view: View) -> list[Finding]:
    d, out = view.imagined, []
    rate, accepted, segments = (number(d, k) for k in ("accept_rate", "accepted", "segments"))
    if rate is not None and segments and rate < MIN_ACCEPT_RATE:
        out.append(
            Finding(
                True,
                "imagination",
                f"{accepted or 0:.0f} of {segments:.0f} imagined segments were accepted ({100 * rate:.1f} %): the "
                "policy is "
                "distilled from the log almost alone. The reasons for rejection say what to change.",
            )
        )
    flagged, control = number(d, "accept_rate_flagged"), number(d, "accept_rate_control")
    beats = view.settings.get("accept.margin") is not None  # else accepted is what is known, not what is repaired
    if beats and rate and flagged is not None and control and flagged < control:
        out.append(
            Finding(
                False,
                "imagination",
                f"Starts of high regret and of high V pass less often ({100 * flagged:.1f} %) than starts drawn at "
                f"random ({100 * control:.1f} %): to choose them does not pay here.",
            )
        )
    imagined, own = number(d, "imagined_mean"), number(d, "own_mean")
    spread = number(view.diagnostics("values"), "v_std")
    if accepted and imagined is not None and own is not None and spread and imagined - own > 3.0 * spread:
        out.append(
            Finding(
                True,
                "imagination",
                f"Accepted segments are worth {(imagined - own) / spread:.1f} spreads of V more than what the log "
                "did from the "
                "same states: more likely an error of the model that plans exploit than a find.",
            )
        )
    return out


def _actor(view: View) -> list[Finding]:
    d = view.diagnostics("actor")
    before, after = number(d, "behaviour_return"), number(d, "return_mean")
    if before is None or after is None:
        return []
    if number(d, "round") == 0:
        return [Finding(
            True, "curves",
            f"Inside the world model no round of the actor earned more than the behaviour policy ({readable(before)}), "
            "whose steps are imagined instead: lower actor.reaches, or improve the world model.",
        )]  # fmt: skip
    worth = {float(reach): value for reach, value in (d.get("reaches") or {}).items()}
    reach = number(d, "reach") or 0.0
    said = (
        f"Inside the world model the actor of reach {reach:g} earns {readable(after)}, the behaviour policy that it "
        f"changes {readable(before)}"
    )
    if others := ", ".join(f"{readable(value)} with {r:g}" for r, value in sorted(worth.items()) if r != reach):
        end = "smallest" if reach == min(worth) else "largest" if reach == max(worth) else ""
        said += f"; {others}"
        said += f". It is the {end} one: actor.reaches may go on there" if end else ""
    return [Finding(False, "curves", f"{said}.")]


def _corrections(view: View) -> list[Finding]:
    walks = sorted((name for name in view.links if name.startswith("walk:")), key=lambda n: int(n.partition(":")[2]))
    errors = [e for name in walks if (e := number(view.diagnostics(name), "imitation_rmse")) is not None]
    if not errors:
        return []
    ended, left = (100 * (number(view.diagnostics(walks[-1]), name) or 0.0) for name in ("ended", "left"))
    said = (
        "Where drafts of the policy walked inside the world model, they were "
        f"{' and then '.join(map(readable, errors))} from what their actor would have done there (root mean square, of "
        f"actions in [-1, 1]); of the last one's walks {ended:.0f} % ended and {left:.0f} % left what is known"
    )
    if len(errors) > 1 and errors[-1] >= errors[0]:
        return [Finding(True, "curves", f"{said}. They do not come closer: raise correct.updates or policy.width.")]
    return [Finding(False, "curves", f"{said}.")]


def _distillation(view: View) -> list[Finding]:
    d = view.diagnostics("distill")
    got, asked = number(d, "imagined_ratio"), number(view.settings, "distill.imagined_ratio")
    if got is not None and asked and got < 0.5 * asked:
        passed = number(d.get("imagined", {}), "accept_rate") or 0.0
        why = (
            f"it is never more than the share of segments that passed, {100 * passed:.0f} %" if got >= 0.99 * passed
            else "no imagined step is drawn more often than distill.reuse_cap allows"
        )  # fmt: skip
        return [
            Finding(
                False,
                "imagination",
                f"{100 * got:.0f} % of what was imitated is imagined, {100 * asked:.0f} % were asked for "
                f"(distill.imagined_ratio): {why}.",
            )
        ]
    return []


def _choice(view: View) -> list[Finding]:
    candidates = view.diagnostics("choose").get("candidates") or []
    halted = min((float(c["halted"]) for c in candidates), default=0.0)
    if halted <= MAX_HALTED:
        return []
    return [Finding(
        True, "returns",
        f"The choice is all but blind: at least {100 * halted:.0f} % of each policy's episodes inside the world model "
        "were halted where it does not know. Lower choose.noise_std or choose.length, or improve the world model.",
    )]  # fmt: skip
