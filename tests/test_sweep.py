"""The question and the answer of a sweep: what is refused, which points there are, which is best, what was shared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ipd_ray.config import build, field_names, load
from ipd_ray.errors import UserError
from ipd_ray.sweep import (
    Question,
    Range,
    Sweep,
    Tpe,
    check_comparable,
    check_points,
    common_settings,
    interval,
    known_points,
    measures,
    points_at_most,
    rank_agreement,
    ranked,
    read_question,
    reuse,
    rows_of,
    sampler_of,
)

CONFIGS = sorted((Path(__file__).parents[1] / "tune_configs").glob("*.yaml"))


def question(tmp_path: Path, text: str) -> Question:
    (tmp_path / "q.yaml").write_text(text)
    return read_question(tmp_path / "q.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_question_is_valid_with_every_preset(path: Path) -> None:
    found = read_question(path)
    assert points_at_most(found) > 1
    for preset in (None, "demo", "gym-small", "gym"):
        base = load(preset).model_dump(mode="json") if preset else {}
        from ipd_ray.config import flatten

        check_points(found, common_settings(found, flatten(base), None, {}))


def test_the_five_questions_are_shipped() -> None:
    assert [p.stem for p in CONFIGS] == ["full", "loss_weights", "planner", "smoke", "uncertainty"]


@pytest.mark.parametrize(("text", "said"), [
    ("space: {distil.eta: [0, 1]}", r"'distil.eta' is no field.*Did you mean 'distill.eta'"),
    ("space: {distill.eta: [0, 1]}\nsampelr: tpe", r"'sampelr' is no part of a sweep.*Did you mean 'sampler'"),
    ("space: {seed: [0, 1]}", "seeds: N"),
    ("space: {runtime.workers: [1, 2]}", "changes nothing that is computed"),
    ("space: {planner.kind: {low: 0, high: 1}}", "space.planner.kind is no number"),
    ("space: {planner.horizon: {low: 1.2, high: 1.8}}\nsampler: tpe\npoints: 2", "holds no whole number"),
    ("space: {distill.eta: 0.1}", "must be a list of values"),
    ("space: {distill.eta: {low: 0.0, high: 1.0}}", "sampler=grid takes lists"),
    ("space: {distill.eta: {low: 1.0, high: 0.0}}\nsampler: random\npoints: 2", "low=1 must be below high=0"),
    ("space: {distill.eta: {low: 0.0, high: 1.0, log: true}}\nsampler: random\npoints: 2", "above 0 with log"),
    ("space: {distill.eta: [0.1, 0.1]}", "names a value twice"),
    ("space: {distill.eta: [0.1]}\nsampler: tpe", "needs points"),
    ("space: {distill.eta: [0.1]}\npoints: 3", "leave it out"),
    ("space: {distill.eta: [0.1]}\nsampler: pbt", "sampler='pbt' is not valid.*'grid', 'random' or 'tpe'"),
    ("space: {distill.eta: [0.1]}\nsettings: {distill: {eta: 0.2}}", "in space and in settings"),
    ("space: {}", "space names no field"),
    ("- 1", "must hold a mapping"),
])
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        question(tmp_path, text)


@pytest.mark.parametrize(("text", "said"), [
    ("space: {distill.eta: [0.1, -1.0]}", "distill.eta=-1.0 is not valid"),
    ("space: {accept.min_length: [3, 40]}", r"accept.min_length=40 must lie in \[1, imagine.length=10\]"),
    ("space: {distill.eta: {low: -1.0, high: 1.0}}\nsampler: random\npoints: 1", "distill.eta=-"),
    ("space: {accept.survival: {low: 0.1, high: 1.5}}\nsampler: tpe\npoints: 1", "accept.survival=1.5"),
    ("space: {planner.kind: [mpc, mcp]}\nsampler: tpe\npoints: 1", "planner.kind='mcp'"),
])
def test_a_point_that_no_run_would_take_is_refused_before_any_work(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_points(question(tmp_path, text), {})


@pytest.mark.parametrize(("asked", "said"), [
    ({"space": {"data.discount": (0.9, 0.99)}, "objective": "fitted_q"},
     r"space.data.discount=\[0.9, 0.99\] changes what fitted_q measures, the discounted value .*: take data.discount "
     r"out of space, or set objective: return \(in an environment\) or imagined\."),
    ({"space": {"data.discount": Range(low=0.9, high=0.99)}, "sampler": "random", "points": 2, "also": ("fitted_q",)},
     r"data.discount=\{low: 0.9, high: 0.99\}.*or leave fitted_q out of also\."),
    ({"space": {"distill.eta": (0.0, 0.1), "fitted_q.updates": (0, 9)}, "objective": "fitted_q"}, "fitted_q.updates="),
    ({"space": {"data.holdout_fraction": (0.1, 0.2)}, "objective": "imagined"},
     r"or set objective: return \(in an environment\)\.$"),
    *(({"space": {name: (1, 2)}, "objective": "imagined"}, rf"take {name} out .* or fitted_q\.$") for name in (
        "choose.episodes", "choose.length", "choose.noise_std", "choose.known", "world_model.members",
        "imagine.uncertainty", "accept.range_margin",
    )),
])
def test_a_field_that_changes_the_measure_itself_is_not_swept(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_comparable(Question(**asked), scheduled=False)


def test_what_leaves_the_measure_alone_is_swept() -> None:
    """All are in raw reward units, the imagined return is not discounted, and these of `choose` decide what is kept."""
    both = {"data.reward_transform": ("range", "std"), "values.expectile": (0.7, 0.9), "choose.tolerance": (0.0, 2.0),
            "choose.without_imagination": (True, False), "imagine.length": (5, 10)}
    check_comparable(Question(space=both, objective="fitted_q", also=("imagined",)), scheduled=True)
    check_comparable(Question(space={"data.discount": (0.9, 0.99)}, objective="imagined"), scheduled=True)
    check_comparable(Question(space={"data.discount": (0.9, 0.99), "choose.length": (1, 2)}), scheduled=False)


def test_a_scheduler_that_compares_inside_the_world_model_needs_one_measure_too() -> None:
    asked = Question(space={"choose.length": (100, 200)}, objective="fitted_q", scheduler="asha")
    check_comparable(asked, scheduled=False)
    with pytest.raises(UserError, match=r"choose.length=\[100, 200\] changes what imagined.*or set scheduler: none\."):
        check_comparable(asked, scheduled=True)


def test_layers_win_in_order_and_a_swept_field_is_not_overridden(tmp_path: Path) -> None:
    found = question(tmp_path, "space: {distill.eta: [0.1]}\nsettings: {distill: {updates: 7, batch_size: 9}}")
    (tmp_path / "c.yaml").write_text("distill: {batch_size: 10, eta: 0.3}")
    common = common_settings(found, {"distill.updates": 5, "seed": 3}, tmp_path / "c.yaml", {"seed": 4})
    assert common == {"distill.updates": 7, "distill.batch_size": 10, "seed": 4}
    with pytest.raises(UserError, match=r"distill\.eta is swept"):
        common_settings(found, {}, None, {"distill.eta": 1.0})


def test_a_grid_is_every_combination() -> None:
    found = Question(space={"distill.eta": (0.0, 0.1), "planner.horizon": (2, 4, 8)})
    points = known_points(found)
    assert points is not None and len(points) == 6 == points_at_most(found)
    assert points[1] == {"distill.eta": 0.0, "planner.horizon": 4}


def drawn(**more: Any) -> list[dict[str, Any]]:
    space = {"distill.eta": Range(low=1e-3, high=1.0, log=True), "planner.horizon": Range(low=2, high=5),
             "planner.kind": ("mpc", "gradient")}
    return known_points(Question(space=space, sampler="random", points=200, **more)) or []


def test_random_draws_are_spread_of_the_fields_kind_and_the_same_again() -> None:
    points = drawn()
    assert points == drawn() != drawn(sampler_seed=1)
    horizons = [p["planner.horizon"] for p in points]
    assert set(horizons) == {2, 3, 4, 5} and all(type(h) is int for h in horizons)
    # evenly in the logarithm: a third of the draws in each of the three decades, 200 * (1/3) +- 3 * 6.7
    eta = np.array([p["distill.eta"] for p in points])
    assert all(46 <= count <= 87 for count in np.histogram(np.log10(eta), [-3, -2, -1, 0])[0])


def test_random_draws_differ_and_end_where_the_space_does() -> None:
    space = {"planner.horizon": (2, 4), "planner.kind": ("mpc", "gradient")}
    found = Question(space=space, sampler="random", points=10)
    points = known_points(found) or []
    assert len(points) == 4 and len({json.dumps(p) for p in points}) == 4


def test_tpe_finds_the_better_half_of_a_range_from_history_alone() -> None:
    space = {"distill.eta": Range(low=0.0, high=1.0), "planner.horizon": Range(low=2, high=8)}
    found = Question(space=space, sampler="tpe", points=60)
    assert known_points(found) is None
    sampler = Tpe(found)
    rng = np.random.default_rng(0)
    for eta in rng.uniform(0.0, 1.0, 30):  # a ledger's: told, never asked for
        sampler.tell({"distill.eta": float(eta), "planner.horizon": 4}, -((eta - 0.8) ** 2))
    asked = []
    for _ in range(20):
        point = sampler.ask()
        assert point is not None and type(point["planner.horizon"]) is int
        asked.append(point["distill.eta"])
        sampler.tell(point, -((point["distill.eta"] - 0.8) ** 2))
    assert np.mean(np.abs(np.array(asked) - 0.8) < 0.2) > 0.7  # 0.4 of them by chance


def test_tpe_takes_a_stopped_point_for_worse_than_one_that_ended() -> None:
    found = Question(space={"distill.eta": Range(low=0.0, high=1.0)}, sampler="tpe", points=60)
    sampler = Tpe(found)
    for eta in np.linspace(0.0, 1.0, 30):
        sampler.tell({"distill.eta": float(eta)}, 5.0, stopped=10 if eta < 0.7 else None)
    asked = [sampler.ask() for _ in range(10)]
    assert np.mean([p["distill.eta"] > 0.6 for p in asked if p]) > 0.7


def test_a_resumed_list_goes_on_after_what_was_begun() -> None:
    found = Question(space={"distill.eta": (0.0, 0.1, 0.2)})
    sampler = sampler_of(found, begun=2)
    assert sampler.ask() == {"distill.eta": 0.2} and sampler.ask() is None


# ---- the answer


def record(point: int, seed: int, score: float | None, **more: Any) -> dict[str, Any]:
    return {"trial": f"{point:03d}-seed{seed}", "point": point, "settings": {"distill.eta": point / 10}, "seed": seed,
            "fresh": False, "state": "done", "rungs": [], "score": score, "sem": 1.0, **more}


def test_the_interval_of_three_seeds_by_hand() -> None:
    # mean 2, standard deviation 1, t(2) = 4.30: 4.30 / sqrt(3) = 2.483
    mean, half, over = interval([1.0, 2.0, 3.0], [9.0, 9.0, 9.0])
    assert (mean, over) == (2.0, "seeds") and half == pytest.approx(2.483, abs=1e-3)


def test_with_one_seed_the_interval_is_over_its_episodes() -> None:
    assert interval([5.0], [0.5]) == (5.0, pytest.approx(0.98), "episodes")


def test_a_lucky_seed_does_not_win() -> None:
    """Point 0 has the higher mean by one seed's luck; point 1 is as good with every seed."""
    lucky = [record(0, s, v) for s, v in enumerate((50.0, 60.0, 100.0))]
    steady = [record(1, s, v) for s, v in enumerate((66.0, 67.0, 68.0))]
    rows = rows_of([*lucky, *steady], seeds=3)
    assert rows[0].mean > rows[1].mean and [r.point for r in ranked(rows)] == [1, 0]


def test_a_point_whose_episodes_all_return_the_same_is_certain() -> None:
    """Its standard error is 0, its lower bound the score itself: 5 against 5.5 - 1.96."""
    rows = rows_of([record(0, 0, 5.5), record(1, 0, 5.0, sem=0.0)], seeds=1)
    assert rows[1].half == 0.0 and rows[1].lower == 5.0 and [r.point for r in ranked(rows)] == [1, 0]


def test_one_episode_has_no_standard_error(tmp_path: Path) -> None:
    scores = {"evaluate": {"return_mean": 7.0, "returns": [7.0]},
              "fitted_q": {"value_mean": 3.0, "value_sem": None}}
    run: Any = SimpleNamespace(links={name: {"path": str(tmp_path / name)} for name in scores})
    for name, found in scores.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "artifact.json").write_text(json.dumps({"schema": 1, "diagnostics": found}))
    assert measures(run) == {"return": (7.0, None), "fitted_q": (3.0, None)}


def test_one_episode_has_no_interval_and_is_ranked_by_its_score() -> None:
    rows = rows_of([record(p, 0, score, sem=None) for p, score in enumerate((5.0, 7.0, 6.0))], seeds=1)
    assert all(math.isnan(row.half) for row in rows) and [r.point for r in ranked(rows)] == [1, 2, 0]


def test_finalists_are_ranked_by_their_fresh_scores() -> None:
    first = [record(p, s, v + s) for p, v in ((0, 10.0), (1, 9.0), (2, 5.0)) for s in range(2)]
    fresh = [record(p, s, v + s, fresh=True, trial=f"{p}-{s}-fresh") for p, v in ((0, 4.0), (1, 8.0)) for s in range(2)]
    rows = rows_of([*first, *fresh], seeds=2)
    assert [r.point for r in ranked(rows)] == [1, 0, 2]
    assert rows[0].fresh is not None and rows[0].fresh.mean == 4.5 and rows[2].fresh is None


def test_only_points_that_ended_whole_are_ranked() -> None:
    records = [
        record(0, 0, 1.0), record(0, 1, 1.0), record(1, 0, 9.0), record(1, 1, None, state="failed", traceback="x"),
        record(2, 0, 9.0), record(2, 1, None, state="stopped", rungs=[[10, 1.0], [20, 2.0]]), record(3, 0, 9.0),
    ]
    rows = rows_of(records, seeds=2)
    assert [r.state for r in rows] == ["done", "failed", "stopped", "open"]
    assert rows[2].stopped_at == 20 and [r.point for r in ranked(rows)] == [0]


def test_agreement_is_spearmans_over_points() -> None:
    proxies = (1.0, 3.0, 2.0, 4.0)  # ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * 2 / (4 * 15) = 0.8
    rows = rows_of([record(p, 0, float(p), also={"imagined": v}) for p, v in enumerate(proxies)], seeds=1)
    assert rank_agreement(rows)["imagined"] == pytest.approx(0.8)


def test_what_was_shared_is_counted_by_key() -> None:
    def part(name: str, key: str, seconds: float) -> dict[str, Any]:
        return {"name": name, "key": key, "seconds": seconds, "reused": True}

    records = [record(p, 0, 1.0, parts=[part("values", "a", 60.0), part("distill", str(p), 10.0)]) for p in range(3)]
    values, distill = reuse(records)
    assert values == {"step": "values", "needed": 3, "made": 1, "reused": 2, "seconds": 60.0, "saved": 120.0}
    assert distill["reused"] == 0 and distill["saved"] == 0.0


def test_a_ledger_survives_a_kill_between_two_writes(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.describe({"question": {}})
    sweep.write(record(0, 0, 1.0))
    (tmp_path / "trials" / ".000-seed1.json.deadbeef").write_text('{"tri')  # what a kill leaves of an atomic write
    assert [r["trial"] for r in sweep.records()] == ["000-seed0"]
    assert math.isfinite(sweep.records()[0]["score"])


def test_a_folder_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match="reads 1"):
        _ = Sweep(tmp_path).described


def test_every_number_of_the_config_can_be_drawn_from_a_range() -> None:
    from ipd_ray.sweep import kind_of

    kinds = {name: kind_of(name) for name in field_names()}
    assert kinds["planner.horizon"] is int and kinds["accept.threshold"] is float and kinds["evaluate.max_steps"] is int
    assert kinds["planner.kind"] is None and kinds["choose.without_imagination"] is None
    assert isinstance(build({"accept.threshold": 0.5}).accept.threshold, float)
