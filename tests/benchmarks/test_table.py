"""Tables of scores from a handful of made-up results, with the arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import table
from results import Result, Score, read_all, write

LOW, HIGH = 0.0, 200.0
"""References: a raw return of 2 x is a score of x."""


def put(root: Path, dataset: str, method: str, seed: int, *scores: float, **changes: object) -> None:
    """Write a result whose checkpoints have these normalised scores, two episodes each, 2 points around the mean."""
    curve = [Score(10 * (i + 1), [2.0 * s - 4.0, 2.0 * s + 4.0]) for i, s in enumerate(scores)]
    content: dict = {
        "config": {"planner": {"horizon": 5}}, "seconds": {"values": 60.0, "distill": 30.0, "this_run": 7.0},
        "evaluation": {"episodes": 2, "seed": 0}, "commit": "made-up", "versions": {"torch": "2.13.0"},
        "reference": (LOW, HIGH), "extra": {"date": "2026-01-02T03:04:05"}, **changes,
    }  # fmt: skip
    write(Result(dataset, method, "small", seed, curve, **content), root)


def scores_of(root: Path) -> table.Scores:
    return table.Scores("small", read_all("small", root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two datasets, two seeds; `value_guided` has not run seed 1 of b, `greedy_q` has not run b at all."""
    results = tmp_path / "results"
    for method, rows in {
        "ipd": {"a": (60, 70), "b": (90, 80)},
        "value_guided": {"a": (50, 64), "b": (81,)},
        "greedy_q": {"a": (61, 65)},
        "bc": {"a": (20, 30), "b": (40, 50)},
        "d3rlpy-bc": {"a": (10, 10), "b": (10, 10)},
        "d3rlpy-iql": {"a": (40, 60), "b": (70, 80)},
        "d3rlpy-cql": {"a": (99, 99)},
    }.items():
        for dataset, seeds in rows.items():
            for seed, score in enumerate(seeds):
                put(results, dataset, method, seed, 75.0, float(score))
    return results


def cells(found: table.Table, row: str) -> list[str]:
    return [main for line in found.rows if line[0][0].strip("`") == row for main, _ in line[1:]]


def test_headline_is_the_last_checkpoint_normalised_and_the_best_stands_beside_it(root: Path) -> None:
    # ipd on a: last (60 + 70) / 2 = 65, best (75 + 75) / 2 = 75; on b: 85 and (90 + 80) / 2; over both 75 and 80
    found = table.score_table(scores_of(root), ["ipd"], best=True)
    assert cells(found, "ipd") == ["**65.0** (75.0)", "**85.0** (85.0)", "**75.0** (80.0)"]
    assert [small for _, small in found.rows[0]] == ["", "60.0 · 70.0", "90.0 · 80.0", ""]


def test_missing_cells_and_seeds_are_shown_and_no_mean_is_made_of_them(root: Path) -> None:
    found = table.score_table(scores_of(root), ["value_guided", "greedy_q", "dt"], best=False)
    assert cells(found, "value_guided") == ["57.0", "**81.0**", "**69.0**"]
    assert cells(found, "greedy_q") == ["**63.0**", "missing", "1 of 2 sets"]
    assert cells(found, "dt") == ["missing", "missing", "missing"]
    assert found.rows[0][2][1] == "81.0 · –"


def test_raw_returns_are_in_the_environments_units(root: Path) -> None:
    assert cells(table.raw_table(scores_of(root)), "ipd") == ["130", "170"]


def test_pairs_are_by_dataset_and_seed_and_halves_are_dropped(root: Path) -> None:
    found = table.difference(scores_of(root), "ipd", "value_guided")
    assert found.gaps == {"a": {0: pytest.approx(10.0), 1: pytest.approx(6.0)}, "b": {0: pytest.approx(9.0)}}
    assert found.mean == pytest.approx(8.5)  # (mean(10, 6) + 9) / 2, not mean(10, 6, 9)
    assert (found.pairs, found.complete) == (3, True)


def test_every_dataset_counts_alike_however_many_seeds_it_has() -> None:
    # (mean(1, 2, 3) + 10) / 2 = 6, not mean(1, 2, 3, 10) = 4
    assert table.mean_of_means(np.array([1.0, 2.0, 3.0]), np.array([10.0])) == pytest.approx(6.0)


def test_a_single_pair_gives_no_interval_and_says_so(root: Path) -> None:
    found = table.difference(scores_of(root), "ipd", "value_guided")
    assert found.interval is None
    row = table.difference_table(scores_of(root)).rows[0]
    assert row[1] == ("+8.5", "3 pairs on 2 of 2 sets; no interval can be given: a single seed on b")


def test_the_best_peer_has_all_sets_and_the_highest_mean(root: Path) -> None:
    # d3rlpy-cql has 99, but on one set alone; d3rlpy-iql (50 + 75) / 2 beats d3rlpy-bc with 10
    assert scores_of(root).best_peer() == "d3rlpy-iql"


def test_interval_of_two_pairs_a_set_is_from_worst_to_best_draw() -> None:
    pytest.importorskip("scipy")
    # draws of each stratum: (0, 0), (0, 4) twice, (4, 4), means 0, 2, 4; the mean over both strata lies at 0 or at 5
    # with 1/16 each, so the 2.5 and 97.5 percentiles are the ends: (0 + 0) / 2 = 0 and (4 + 6) / 2 = 5
    assert table.interval([[0.0, 4.0], [0.0, 6.0]], table.mean_of_means) == (0.0, 5.0)
    assert table.interval([[0.0, 4.0], [1.0]], table.mean_of_means) is None


def test_interval_moves_with_runs_within_a_set_and_not_with_the_sets_own_level() -> None:
    pytest.importorskip("scipy")
    assert table.interval([[5.0, 5.0], [50.0, 50.0]], table.mean_of_means) == (27.5, 27.5)


def test_interquartile_mean_leaves_out_a_quarter_at_either_end() -> None:
    runs = [1.0, 9.0, 2.0, 100.0, 3.0, -50.0, 4.0, 5.0]
    assert table.iqm(np.array(runs[:3]), np.array(runs[3:])) == pytest.approx(3.5)  # of 2, 3, 4, 5
    stats = pytest.importorskip("scipy.stats")
    for count in range(4, 9):
        assert table.iqm(np.array(runs[:count])) == pytest.approx(stats.trim_mean(runs[:count], 0.25))


def test_chance_of_improvement_counts_ties_half_and_takes_the_mean_over_sets() -> None:
    # set 1: 3 > 1, 3 > 2, 2 > 1, 2 = 2 gives 3.5 / 4; set 2: 0 < 1 gives 0
    x, y = [np.array([3.0, 2.0]), np.array([0.0])], [np.array([1.0, 2.0]), np.array([1.0])]
    assert table.better(*x, *y) == pytest.approx(0.4375)


def words(root: Path) -> list[str]:
    return [verdict.word for verdict in table.verdicts(scores_of(root))]


def test_goals_are_open_while_something_is_missing(root: Path) -> None:
    assert words(root) == ["open", "met", "not met"]  # d3rlpy-cql is 34 points better on a, whatever else is missing


def test_a_set_is_lost_by_pairs_alone(tmp_path: Path) -> None:
    # Means over other seeds are equal; on the seed that both have, the method is 10 points behind.
    for method, scores in {"ipd": {0: 60.0, 1: 40.0}, "ipd_last": {1: 50.0}}.items():
        for seed, score in scores.items():
            put(tmp_path, "a", method, seed, score)
    lost = table.verdicts(scores_of(tmp_path))[-1]
    assert lost.met is False and "-10.00 against ipd_last on a" in lost.figures


def full(root: Path, gaps: dict[str, tuple[float, float]], spread: float = 1.0) -> None:
    """All rungs and peers on two sets and two seeds; the method has 50, the others 50 minus the gap on each set."""
    for method in [*table.RUNGS, *table.PEERS]:
        for dataset, gap in zip("ab", gaps.get(method, (6.0, 6.0)), strict=True):
            for seed in (0, 1):
                shift = spread * (seed - 0.5)
                put(root, dataset, method, seed, 50.0 if method == "ipd" else 50.0 - gap + shift)


@pytest.mark.parametrize(
    ("gaps", "spread", "expected"),
    [
        ({}, 1.0, ["met", "met", "met"]),
        ({"value_guided": (6.0, 3.9)}, 1.0, ["not met", "met", "met"]),  # mean 4.95
        ({"value_guided": (6.0, 4.0)}, 1.0, ["met", "met", "met"]),  # mean 5
        ({"d3rlpy-iql": (6.0, 3.9)}, 1.0, ["met", "not met", "met"]),  # the best peer
        ({}, 20.0, ["not met", "not met", "met"]),  # gaps 16 and -4 on both sets: the lower bound is below 0
        ({"d3rlpy-cql": (40.0, -3.0)}, 1.0, ["met", "met", "met"]),
        ({"d3rlpy-cql": (40.0, -3.1)}, 1.0, ["met", "met", "not met"]),
    ],
)
def test_goals_by_hand(
    tmp_path: Path, gaps: dict[str, tuple[float, float]], spread: float, expected: list[str]
) -> None:
    pytest.importorskip("scipy")
    full(tmp_path, gaps, spread)
    assert words(tmp_path) == expected


def test_without_scipy_all_but_the_intervals_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(tmp_path, {"bc": (4.0, 2.0)})
    monkeypatch.setattr(table, "_bootstrap", None)
    text = table.as_text(table.tier_blocks(scores_of(tmp_path), {}))
    assert table.HOW_TO_INTERVALS in text and "no interval: scipy is not installed" in text
    assert "+3.0" in text and words(tmp_path) == ["open", "open", "met"]


def test_variations_are_split_and_grouped_by_the_fields_they_change(root: Path) -> None:
    assert table.variation("ipd+planner.horizon=8") == ("ipd", {"planner.horizon": "8"})
    assert table.variation("ipd+a.b=1e+3+distill.eta=0.5") == ("ipd", {"a.b": "1e+3", "distill.eta": "0.5"})
    assert table.variation("d3rlpy-iql") == ("d3rlpy-iql", {})
    for method in ("ipd+planner.horizon=12", "ipd+planner.horizon=3", "bc+distill.eta=1", "ipd_last+accept.share=0.5"):
        put(root, "a", method, 0, 55.0)
    assert table.variations(scores_of(root)) == {
        "accept.share": ["ipd_last+accept.share=0.5"],
        "distill.eta": ["bc+distill.eta=1"],
        "planner.horizon": ["ipd+planner.horizon=12", "ipd+planner.horizon=3"],
    }


def test_a_variation_stands_between_its_neighbours_with_its_paired_difference(root: Path) -> None:
    put(root, "a", "ipd+planner.horizon=12", 1, 72.0)
    put(root, "a", "ipd+planner.horizon=3", 0, 55.0)
    scores = scores_of(root)
    found = table.variation_table(scores, "planner.horizon", table.variations(scores)["planner.horizon"])
    # 5 is the config's; 72 - 70 of seed 1 and 55 - 60 of seed 0
    assert [(row[1][0], row[2][0], row[-1][0]) for row in found.rows] == [
        ("3", "55.0", "-5.0"), ("5 (as is)", "65.0", ""), ("12", "72.0", "+2.0"),
    ]  # fmt: skip


def test_variations_are_no_peers_and_no_rungs(root: Path) -> None:
    put(root, "a", "ipd+planner.horizon=12", 7, 500.0)
    scores = scores_of(root)
    assert "ipd+planner.horizon=12" not in scores.methods and scores.seeds == [0, 1]
    assert words(root) == ["open", "met", "not met"]


def test_volume_runs_from_no_imagination_to_the_method(root: Path) -> None:
    for dataset, seeds in {"a": (60, 70), "b": (90, 80)}.items():
        for seed, score in enumerate(seeds):
            put(root, dataset, "ipd_last", seed, float(score))
    put(root, "a", "ipd_last+accept.share=0.5", 0, 58.0)
    scores = scores_of(root)
    assert table.volume_of(scores) == {0.0: "value_guided", 0.5: "ipd_last+accept.share=0.5", 1.0: "ipd_last"}
    found = table.variation_table(scores, "accept.share", ["ipd_last+accept.share=0.5"])
    # value_guided - ipd is -(10, 6) on a and -9 on b; the variation has one pair, 58 - 60
    assert [(row[1][0], row[-1][0]) for row in found.rows] == [
        ("0 (as is)", "-8.5"), ("0.5", "-2.0"), ("1 (as is)", ""),
    ]  # fmt: skip


def test_curves_are_over_the_share_of_updates(root: Path) -> None:
    # checkpoints at updates 10 and 20
    found = table.curve_of(scores_of(root), "ipd", "a")
    assert found == [(0.5, [pytest.approx(75.0)] * 2), (1.0, [pytest.approx(60.0), pytest.approx(70.0)])]


def test_minutes_are_the_sum_of_the_parts(root: Path) -> None:
    assert table.minutes(scores_of(root).cell("ipd", "a")[0]) == pytest.approx(1.5)  # 60 s + 30 s, this_run is no part
    assert cells(table.minutes_table(scores_of(root)), "ipd") == ["1.5", "1.5", ""]


def test_each_table_says_where_its_numbers_come_from(root: Path) -> None:
    (row,) = table.origin_table(scores_of(root)).rows
    assert [main for main, _ in row[1:]] == ["23", "2026-01-02", "`made-up`", "torch 2.13.0", "episodes 2, seed 0"]


def test_only_what_is_between_the_markers_is_replaced() -> None:
    before = f"# Name\n\ntext\n{table.BEGIN}\nold\nolder\n{table.END}\n\nmore\n"
    after = table.replaced(before, "new\n")
    assert after == f"# Name\n\ntext\n{table.BEGIN}\nnew\n{table.END}\n\nmore\n"
    assert table.replaced(after, "new\n") == after


@pytest.mark.parametrize("text", ["", table.BEGIN, f"{table.END}{table.BEGIN}", f"{table.BEGIN}{table.END}{table.END}"])
def test_markers_that_are_missing_doubled_or_swapped_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        table.replaced(text, "new")


def test_results_that_cannot_be_compared_are_named(root: Path) -> None:
    put(root, "a", "iql", 0, 50.0, reference=(0.0, 100.0))
    with pytest.raises(ValueError, match=r"a has the references.*100\.0.*200\.0"):
        scores_of(root)


def test_a_return_that_is_not_finite_is_named(root: Path) -> None:
    put(root, "a", "iql", 3, float("nan"))
    with pytest.raises(ValueError, match="a, iql, seed 3 has a return that is not finite"):
        scores_of(root)


def test_the_same_results_give_the_same_files(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(root, "a", "ipd_last+accept.share=0.5", 0, 58.0)
    written = []
    for name in ("one", "two"):
        place = tmp_path / name
        (place / "docs").mkdir(parents=True)
        (place / "README.md").write_text(f"{table.BEGIN}\n{table.END}\n")
        table.main(["--results", str(root), "--root", str(place), "--write"])
        files = sorted(p for p in place.rglob("*") if p.is_file())
        written.append({str(p.relative_to(place)): p.read_bytes() for p in files})
    assert written[0] == written[1]
    plots = {f"docs/scores/small-{kind}.svg" for kind in table.KINDS}
    assert set(written[0]) == {"README.md", "docs/scores.md", *plots}
    assert b"scores/small-points.svg" in written[0]["docs/scores.md"]
    assert "Tier `small`" in capsys.readouterr().out


def test_a_tier_without_results_is_named_with_those_that_have_some(root: Path) -> None:
    with pytest.raises(SystemExit, match=r"--tier=ful has no results.*small"):
        table.main(["--results", str(root), "--tier", "ful"])


def test_what_was_kept_is_the_headline_where_it_is_not_the_last(root: Path) -> None:
    from dataclasses import replace

    result = next(r for r in read_all("small", root) if (r.method, r.dataset, r.seed) == ("ipd", "a", 0))
    assert result.headline == result.curve[-1]
    kept = replace(result, kept=result.curve[0])
    write(kept, root)
    again = next(r for r in read_all("small", root) if (r.method, r.dataset, r.seed) == ("ipd", "a", 0))
    assert again == kept and again.last == pytest.approx(75.0)
    assert cells(table.raw_table(scores_of(root)), "ipd")[0] == "145"  # (150 + 140) / 2
