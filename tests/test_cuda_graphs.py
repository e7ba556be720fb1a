"""Captured updates on a pretended GPU, by a recorder that replays operators as a CUDA graph replays kernels.

It cannot show that a GPU takes the capture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Episode, log_of
from pretend_cuda import Recorder, pretend_cuda

from ipd_ray.config import ValuesConfig, WorldModelConfig
from ipd_ray.cuda_graphs import PLAIN_CALLS, Captured, Told, set_rate
from ipd_ray.data.transitions import Log
from ipd_ray.training import Trainer
from ipd_ray.values.fit import ValueTrainer
from ipd_ray.world_model.fit import WorldModelTrainer

UPDATES = 4 * (PLAIN_CALLS + 4)


def short_log() -> Log:
    rng = np.random.default_rng(0)
    episodes: list[Episode] = []
    for i in range(20):
        states = rng.normal(size=(9, 3)).astype(np.float32)
        episodes.append((list(states), rng.uniform(-0.9, 0.9, (8, 2)), list(rng.normal(size=8)), i % 2 == 0))
    return log_of(episodes, discount=0.9)


def values(device: str) -> ValueTrainer:
    config = ValuesConfig.model_validate({"updates": UPDATES, "batch_size": 16, "width": 8})
    return ValueTrainer(short_log(), config, 0, device)


def world_model(device: str) -> WorldModelTrainer:
    small = {"members": 3, "elites": 2, "width": 8, "layers": 2, "batch_size": 16, "max_updates": UPDATES}
    return WorldModelTrainer(short_log(), WorldModelConfig.model_validate({**small, "eval_every": 20}), 0, device)


def run(trainer: Trainer) -> list[dict[str, float]]:
    return [{name: x.item() for name, x in trainer.update(step).items()} for step in range(UPDATES)]


@pytest.mark.parametrize(("make", "variants"), [(values, 2), (world_model, 1)])
def test_replayed_updates_are_the_plain_ones(make: Callable[[str], Any], variants: int):
    plain = make("cpu")
    expected = run(plain)
    with pretend_cuda():
        captured = make("cuda")
        told = run(captured)
        state = {name: x.cpu() for name, x in captured.state().items()}
        recorder = captured._captured._recorder
    assert (recorder.captured, recorder.replayed) == (variants, UPDATES - variants * PLAIN_CALLS)
    for a, b in zip(expected, told, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    for name, x in plain.state().items():
        torch.testing.assert_close(state[name], x, rtol=1e-4, atol=1e-6, msg=name)


class Descent:
    """x -= rate * x * input, in ways that a graph can and cannot follow."""

    def __init__(self, flaw: str):
        self.x, self.input, self.flaw, self.rate = torch.ones(3), torch.ones(3), flaw, 0.0
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
        self.captured = Captured(self.compute, lambda: {"x": self.x}, optimizer, "cuda")
        self.recorder: Any = self.captured._recorder
        assert isinstance(self.recorder, Recorder)

    def update(self, step: int) -> float:
        value = 0.1 + 0.01 * (step % 3)
        if self.flaw == "moves":
            self.input = torch.full((3,), value)
        else:
            self.input.fill_(value)
        self.rate = value if self.flaw == "number" else 0.1
        return float(self.captured()["x"])

    def compute(self) -> Told:
        if self.flaw == "looks" and bool(self.x.sum() < 0):
            return {}
        self.x.sub_(self.rate * self.x * self.input)
        return {"x": self.x.sum()}


@pytest.mark.parametrize("flaw", ["", "number", "moves", "looks"])
def test_a_graph_that_differs_is_told_of_and_not_used(flaw: str, caplog: pytest.LogCaptureFixture):
    expected = torch.ones(3)
    with caplog.at_level(logging.WARNING), pretend_cuda():
        descent = Descent(flaw)
        told = [descent.update(step) for step in range(PLAIN_CALLS + 9)]
    for step in range(PLAIN_CALLS + 9):
        value = 0.1 + 0.01 * (step % 3)
        expected -= (value if flaw == "number" else 0.1) * expected * value
        assert told[step] == pytest.approx(float(expected.sum()), rel=1e-5)
    torch.testing.assert_close(descent.x, expected)
    reason = {"": "", "number": "updates x otherwise", "moves": "updates x otherwise", "looks": "the capture failed"}
    assert descent.recorder.replayed == {"": 9, "number": 1, "moves": 1, "looks": 0}[flaw]
    assert reason[flaw] in caplog.text
    assert bool(caplog.text) == bool(flaw)


def test_a_step_size_is_set_in_place_where_it_is_a_tensor():
    rate = torch.tensor(1.0)
    groups: list[dict[str, Any]] = [{"lr": rate}, {"lr": 1.0}]
    for group in groups:
        set_rate(group, 0.25)
    assert rate.item() == 0.25 and groups[0]["lr"] is rate
    assert groups[1]["lr"] == 0.25
