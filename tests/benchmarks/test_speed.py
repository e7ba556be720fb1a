"""Contestants take turns and are compared turn by turn; the table says what was reached. Arithmetic by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench
import numpy as np
import ours
import page
import pytest
import torch
from contest import Contestant, Missing, Ratio, interleave
from logs import made_up
from stages import STAGES, Entry, Goal, Stage
from torch.utils.flop_counter import FlopCounterMode

SPEED = Path(bench.__file__).parent


def contestant(program: str) -> Contestant:
    """A process that says and does what the program makes of `serve`."""
    head = f"import sys; sys.path.insert(0, {str(SPEED)!r})\nfrom contest import Missing, Work, serve\n"
    return Contestant("it", [sys.executable, "-c", head + program])


def test_a_contestant_does_so_many_units_and_says_how_many_items_that_were():
    it = contestant("serve(lambda: print('chatter') or Work(lambda units: units * 64, {'flops': 5.0}))")
    try:
        it.ready()
        assert it.about == {"flops": 5.0}
        turn = it.turn(3)
        assert turn.items == 192 and turn.seconds > 0 and turn.peak > 1e6
    finally:
        it.close()


def test_what_is_missing_is_said_and_what_dies_is_shown():
    missing = contestant("def build(): raise Missing('no such library')\nserve(build)")
    dying = contestant("serve(lambda: 1 / 0)")
    try:
        with pytest.raises(Missing, match="no such library"):
            missing.ready()
        with pytest.raises(RuntimeError, match=r"it died .*(?s:.*)ZeroDivisionError"):
            dying.ready()
    finally:
        missing.close()
        dying.close()


class Recorder(Contestant):
    """Keeps the order of turns."""

    def __init__(self, name: str, order: list[str]):
        self.name, self.units, self._order = name, 1, order

    def settle(self, seconds: float) -> None: ...

    def turn(self, units: int | None = None) -> Any:
        self._order.append(self.name)


def test_turns_are_interleaved_and_none_is_always_first():
    order: list[str] = []
    interleave([Recorder(name, order) for name in "abc"], 3, 0.1)
    assert "".join(order) == "abc" + "bca" + "cab"


def test_a_ratio_is_of_the_same_turn():
    # The machine is half as fast in the second turn: 2 in each, while medians of the rates would give 20 / 7.5.
    assert Ratio.of([20.0, 10.0, 30.0], [10.0, 5.0, 15.0]) == Ratio(2.0, 2.0, 2.0)
    assert Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == Ratio(3.0, 2.0, 4.0)


def turns(*rates: float) -> list[dict[str, float]]:
    return [{"seconds": 2.0, "cpu": 1.0, "items": rate, "peak": 0} for rate in rates]


STAGE = Stage(
    "planning", "planning", "states",
    tuple(Entry(n, "ours.py", "plan") for n in ("a", "b", "product")),
    (Goal("", "a", "b", 1.5, 10.0), Goal("absent", "a", "c", 1.0, 1.0)), {"a": "product"}, share=(0.6, 0.4),
)  # fmt: skip


def test_a_row_has_the_ratio_the_goal_and_the_share_of_the_limit():
    # a does 20 states a processor second, b 10: 2x. 20 states of 3 operations, of 100 that the product does: 60 %.
    found = {
        "samples": {"a": turns(20.0, 20.0), "b": turns(10.0, 10.0), "product": turns(100.0, 100.0)},
        "about": {"a": {"flops": 3.0}}, "missing": {"c": "make peers"}, "clock": "cpu",
    }  # fmt: skip
    row, absent = page.race_rows(STAGE, found, cuda=False)
    assert row == page.Row("planning", "b", "2.00x [2.00, 2.00]", "1.5x", True, "60 % (goal 60 %)")
    assert absent.found == "skipped: make peers" and absent.met is None
    on_gpu, _ = page.race_rows(STAGE, {**found, "clock": "seconds"}, cuda=True)
    assert on_gpu.met is False and on_gpu.found.endswith("10 states/s")


def test_memory_is_a_line_with_a_slope():
    # 10 bytes a transition: 1e4 to 1e6 adds 9.9e6; the log between lies 9e4 * 10 higher, or 1e6 off that line.
    each, off = page.slope({"10000": 1e8, "100000": 1e8 + 9e5, "1000000": 1e8 + 9.9e6})
    assert (each, off) == (pytest.approx(10.0), pytest.approx(0.0))
    _, off = page.slope({"10000": 1e8, "100000": 1e8 + 1.9e6, "1000000": 1e8 + 9.9e6})
    assert off == pytest.approx(1e6 / 1.099e8)


def test_start_is_compared_with_bare_ray_turn_by_turn():
    found = {"seconds": {"ipd_ray, local engine": [9.0, 11.0, 9.5], "ipd_ray, ray engine": [12.0, 20.0, 13.0],
                         "bare Ray": [8.0, 15.0, 9.0]}, "missing": {}}  # fmt: skip
    local, ray = page.start_rows(found)
    assert local.met and local.found == "9.5 s [9.0, 11.0]"
    assert ray.met and ray.found == "4.0 s [4.0, 5.0] over"


def test_growth_is_the_exponent_of_the_upper_half():
    assert page.growth([1, 2, 4, 8], [9.0, 9.0, 16.0, 64.0]) == pytest.approx(2.0)


def test_the_page_keeps_what_people_wrote():
    assert page.replaced(f"before\n{page.BEGIN}\nold\n{page.END}\nafter", "new") == (
        f"before\n{page.BEGIN}\nnew\n{page.END}\nafter"
    )
    with pytest.raises(ValueError, match="each once"):
        page.replaced("no markers", "new")


def test_made_up_logs_are_whole_episodes_that_join():
    log = made_up(1000, episode=100)
    assert len(log["rewards"]) == 1000 and log["terminals"].sum() == log["timeouts"].sum() == 5
    inside = ~(log["terminals"] | log["timeouts"])[:-1]
    assert np.array_equal(log["next_observations"][:-1][inside], log["observations"][1:][inside])


SMALL = {
    "device": "cpu", "threads": 1, "members": 2, "candidates": 4, "horizon": 2, "states": 3, "layers": 1, "width": 8,
    "heads": 1, "context": 3, "batch": 4, "tokens": "step", "episodes": 2, "groups": 2, "rows": 3,
}  # fmt: skip
UNITS = {"values": 20, "world_model": 5, "world_model_loop": 1, "plan_one": 1, "product": 2 * 2 * 3 * 8 * 8}
"""Items of one unit, where it is not what SMALL says."""


@pytest.mark.parametrize("name", [*UNITS, "plan", "distill"])
def test_our_contestants_do_what_they_count(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ours, "STEPS", 1000)
    work = ours.CONTESTANTS[name](SMALL)
    expected = {"plan": 3, "distill": 8, **UNITS}[name]
    assert work.run(1) == expected


COUNTED = {
    **SMALL, "candidates": 64, "members": 4, "horizon": 3, "states": 16, "layers": 2, "width": 64, "context": 10,
    "batch": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("values", COUNTED), ("world_model", COUNTED), ("plan", COUNTED), ("distill", COUNTED),
        ("distill", {**COUNTED, "tokens": "separate"}),
    ],
)  # fmt: skip
def test_the_share_of_the_limit_stands_on_the_operations_that_torch_counts(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ours, "STEPS", 1000)
    work = ours.CONTESTANTS[name](options)
    work.run(1)
    with FlopCounterMode(display=False) as counted:
        items = work.run(2)
    assert work.about["flops"] * items == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_the_baseline_plans_as_the_planner_does(monkeypatch: pytest.MonkeyPatch):
    # Without noise and with one candidate a member all candidates are alike, so both take the policy's own action.
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: taken.append(self) or self)
    options = {**SMALL, "candidates": 2, "planner": {"noise_std": 0.01}}
    ours.plan_one(options).run(3)
    *_, values, _, states = ours._planning(options)
    assert torch.allclose(torch.stack(taken), values.act(states[:3]), atol=1e-6)


def test_every_stage_can_be_drawn(tmp_path: Path):
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        names = {entry.name for entry in stage.entries}
        assert names >= {n for g in stage.goals for n in (g.ours, g.other)} | set(stage.limits.values())
    stages: dict[str, Any] = {
        s.name: {
            "samples": {e.name: turns(2.0, 2.0) for e in s.entries}, "about": {}, "missing": {}, "clock": "cpu",
            "threads": 1,
        }
        for s in STAGES
    }  # fmt: skip
    curve = {"x": [1, 2], "seconds": [1.0, 2.0], "bytes": [1, 2]}
    stages["curves"] = {"curves": dict.fromkeys(page.SHOWN, curve)}
    sizes = {str(n): {"driver": 10**8 + n, "worker": 10**8 + n} for n in bench.SIZES}
    stages["memory"] = {"bytes": {"values": sizes, "distill": sizes}}
    about = {"commit": "made-up", "date": "2026-01-02", "load": 0.0, "versions": {"torch": "2.13.0"}}
    stages = {name: {**stage, **about} for name, stage in stages.items()}
    content = {"schema": bench.SCHEMA, "machine": bench.machine("cpu"), "stages": stages}
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text(f"# Mine\n{page.BEGIN}\n{page.END}\n")
    bench.write(tmp_path / "results.json", content)
    written = page.write(tmp_path, [bench.read(tmp_path / "results.json")])
    assert {p.suffix for p in written} == {".md", ".svg"} and all(p.stat().st_size > 500 for p in written)
    text = written[0].read_text()
    assert text.startswith("# Mine") and "1.00x [1.00, 1.00]" in text and "as their power 1.00" in text
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == bench.SCHEMA
