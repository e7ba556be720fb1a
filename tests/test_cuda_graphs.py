"""Captured updates, by a recorder that replays operators on a CPU as a CUDA graph replays kernels on a GPU.

It keeps each operator with the tensors it was called on and writes what it returns into the memory of the first time.
So it finds what a graph would do otherwise than plain calls: numbers of Python's that were kept, inputs that moved,
values that were looked at. It cannot show that a GPU takes the capture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Episode, log_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipd_ray.config import ValuesConfig, WorldModelConfig
from ipd_ray.cuda_graphs import PLAIN_CALLS, Captured, Replay, Told, set_rate
from ipd_ray.data.transitions import Log
from ipd_ray.training import Trainer
from ipd_ray.values.fit import ValueTrainer
from ipd_ray.world_model.fit import WorldModelTrainer

UPDATES = 4 * (PLAIN_CALLS + 4)


class Operators(TorchDispatchMode):
    """All operators called inside, with what they were given and what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            held, given = tree_leaves(out), tree_leaves((args, kwargs))
            fresh = [] if func.is_view else tree_leaves(func(*args, **kwargs))
            for old, new in zip(held, fresh, strict=not func.is_view):
                if isinstance(old, Tensor) and not any(old is x for x in given):
                    old.copy_(new)


class Recorder:
    """Operators instead of kernels."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def plain(self, call: Callable[[], Told]) -> Told:
        return call()

    def capture(self, call: Callable[[], Told]) -> Replay:
        with Operators() as operators:
            told = call()
        self.captured += 1

        def replay() -> Told:
            self.replayed += 1
            with torch.no_grad():
                operators.replay()
            return told

        return replay


def short_log() -> Log:
    rng = np.random.default_rng(0)
    episodes: list[Episode] = []
    for i in range(20):
        states = rng.normal(size=(9, 3)).astype(np.float32)
        episodes.append((list(states), rng.uniform(-0.9, 0.9, (8, 2)), list(rng.normal(size=8)), i % 2 == 0))
    return log_of(episodes, discount=0.9)


def values() -> ValueTrainer:
    config = ValuesConfig.model_validate({"updates": UPDATES, "batch_size": 16, "width": 8})
    return ValueTrainer(short_log(), config, 0, "cpu")


def world_model() -> WorldModelTrainer:
    small = {"members": 3, "elites": 2, "width": 8, "layers": 2, "batch_size": 16, "max_updates": UPDATES}
    return WorldModelTrainer(short_log(), WorldModelConfig.model_validate({**small, "eval_every": 20}), 0, "cpu")


def run(trainer: Trainer) -> list[dict[str, float]]:
    return [{name: x.item() for name, x in trainer.update(step).items()} for step in range(UPDATES)]


def record(trainer: Any) -> Recorder:
    """Let a trainer's updates be captured, with its step sizes as tensors, which the device's are."""
    recorder = Recorder()
    trainer._captured = Captured(trainer._compute, trainer.state, recorder)
    for group in trainer._optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    return recorder


@pytest.mark.parametrize(("make", "variants"), [(values, 2), (world_model, 1)])
def test_replayed_updates_are_the_plain_ones(make: Callable[[], Trainer], variants: int):
    plain, captured = make(), make()
    recorder = record(captured)
    expected, told = run(plain), run(captured)
    assert recorder.captured == variants
    assert recorder.replayed == UPDATES - variants * PLAIN_CALLS
    for a, b in zip(expected, told, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    state = captured.state()
    for name, x in plain.state().items():
        torch.testing.assert_close(state[name], x, rtol=1e-4, atol=1e-6, msg=name)


class Descent:
    """x -= rate * x * input, in ways that a graph can and cannot follow."""

    def __init__(self, flaw: str):
        self.x, self.input, self.flaw, self.rate = torch.ones(3), torch.ones(3), flaw, 0.0
        self.recorder = Recorder()
        self.captured = Captured(self.compute, lambda: {"x": self.x}, self.recorder)

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
    descent, expected = Descent(flaw), torch.ones(3)
    with caplog.at_level(logging.WARNING):
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
