"""What people read: numbers and tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ipd_ray.cli.data import _log_table
from ipd_ray.cli.run import _summary_table
from ipd_ray.data.describe import describe, plot
from ipd_ray.steps import LogRef
from ipd_ray.text import counted, readable, table


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (-1234.5, "−1,234"), (0.12345, "0.123"), (20.0, "20"), (-250.04, "−250.0"),
     (0.04, "0.04"), (-0.0, "0"), (-0.02, "−0.02"), (12_345, "12,345")],
)
def test_numbers_are_readable(value: float | None, text: str):
    assert readable(value) == text


def test_counts():
    assert [counted(n, "episode") for n in (0, 1, 2000)] == ["0 episodes", "1 episode", "2,000 episodes"]


def test_numbers_stand_to_the_right_in_a_table():
    rows = [["a", "−0.02"], ["long", "12,345"], ["b", "–"]]
    assert table(["run", "mean"], rows).splitlines() == [
        "run     mean", "------------", "a      −0.02", "long  12,345", "b          –"
    ]


SCORES = {"return_mean": 0.04, "return_std": 0.2, "normalised": None, "episodes": 1, "value_at_start": -0.0,
          "discounted_mean": 0.0123}


def test_a_log_of_small_returns(tiny_log: LogRef, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    log = tiny_log.load().transitions
    log = replace(log, reward=np.where(np.arange(len(log)) == 5, np.float32(0.6), np.float32(0.0)))
    found = describe(log)  # 0.6 in one of 12 episodes: 0.05 on average
    assert "return" in _log_table(found) and " 0.05 " in _log_table(found)
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    plot(log, tmp_path / "log.png")
    legend = drawn[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["mean 0.05", "best 0.6"]


def test_small_returns_are_not_rounded_away(tmp_path: Path):
    data = {"return_mean": -0.0213, "return_max": -0.0, "normalised": None, "episodes": 8, "steps": 320}
    offline = {"value_mean": -0.0512, "value_sem": None, "log_value": 0.001, "episodes": 1}
    shown = _summary_table({
        "dataset": "test/log-v0", "seed": 0, "data": data, "policy": SCORES, "fitted_q": offline, "seconds": {},
        "run_dir": str(tmp_path),
    }).replace("−", "-")
    for part in (
        "return mean -0.0213, best 0\n", "return 0.04 ± 0.2 over 1 episode\n", "0 expected at the start, 0.0123 coll",
        "-0.0512 ± –, 0.001 in the log (discounted, 1 held-out episode; a proxy)",
    ):
        assert part in shown, shown
