"""The page of a sweep, from its folder alone: every part where there is something to show, and what failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ipd_ray.errors import UserError
from ipd_ray.report import build_sweep_report
from ipd_ray.sweep import Sweep

SPACE: dict[str, list[Any]] = {"accept.survival": [0.1, 0.5, 0.9], "planner.kind": ["mpc", "gradient"]}


def record(point: int, seed: int, **more: Any) -> dict[str, Any]:
    survival, kind = SPACE.values()
    settings = {"accept.survival": survival[point % 3], "planner.kind": kind[point // 3]}
    return {
        "trial": f"{point:03d}-seed{seed}", "point": point, "settings": settings, "seed": seed, "fresh": False,
        "state": "done", "rungs": [[10, 1.0]], "score": float(10 * point + seed), "sem": 1.0,
        "accepted": 0.1 * point, "kappa": 0.01 * point + 0.001, "also": {"imagined": float(point)},
        "parts": [{"name": "values", "key": f"v{seed}", "seconds": 60.0, "reused": bool(point)}], **more,
    }


def page(folder: Path, records: list[dict[str, Any]], **question: Any) -> str:
    sweep = Sweep(folder)
    sweep.describe({
        "dataset": "test/log-v0", "question": {"space": SPACE, "seeds": 2, "objective": "return", **question}
    })
    for each in records:
        sweep.write(each)
    for each in records[:2]:
        run = sweep.run_dir(each["trial"])
        run.mkdir(parents=True)
        rows = [{"part": "distill", "step": s, "total": 20, "imitation": 1.0 / s} for s in (10, 20)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_sweep_report(folder, folder / "report.html").read_text()


def part(text: str, name: str) -> str:
    begin = text.index(f'<h2 id="{name}">')
    return text[begin : text.index("</section>", begin)]


def test_a_page_has_every_part(tmp_path: Path) -> None:
    trials = [record(p, s) for p in range(4) for s in range(2)]
    fresh = [record(3, s, fresh=True, trial=f"003-seed{s}-fresh", score=25.0 + s) for s in range(2)]
    failed = [record(5, s, state="failed", score=None, traceback="Traceback\nValueError: <no> motor") for s in range(2)]
    stopped = [record(4, s, state="stopped", score=None, rungs=[[10, 1.0], [20, 0.5]]) for s in range(2)]
    text = page(tmp_path, [*trials, *fresh, *failed, *stopped])
    assert "Point 3" in part(text, "answer") and "fresh seeds" in part(text, "answer")
    rows = part(text, "points")
    assert rows.count("<tr") == 7 and "stopped at 20" in rows and ">failed<" in rows
    # score over both settings, accepted share over both, and both over kappa
    assert part(text, "settings").count("<svg") == 6
    assert part(text, "together").count("<svg") == 1 and part(text, "curves").count("<svg") == 2
    assert "Rank correlation 1.00, 4 points" in part(text, "proxies")
    # two seeds' values, each needed by six of the twelve trials
    assert "<td>12</td><td>2</td><td>10</td>" in part(text, "work")
    assert "ValueError: &lt;no&gt; motor" in part(text, "failed")


def test_a_sweep_of_which_nothing_has_ended_says_so(tmp_path: Path) -> None:
    text = page(tmp_path, [record(0, 0, state="running", score=None, also={}, parts=[], rungs=[])])
    assert "No point has ended whole" in text
    assert all(f'id="{name}"' not in text for name in ("settings", "together", "proxies", "work", "failed"))


def test_one_seed_is_said_to_say_nothing_of_training(tmp_path: Path) -> None:
    text = page(tmp_path, [record(p, 0) for p in range(3)], seeds=1)
    assert "one seed says nothing of the luck of training" in part(text, "answer")


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no sweep folder"):
        build_sweep_report(tmp_path, tmp_path / "report.html")
