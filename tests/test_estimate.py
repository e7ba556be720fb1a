"""What an estimate says of memory and operations, against what is held and counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_fixtures import counting_log, log_of, segments_of
from torch.utils.flop_counter import FlopCounterMode

from ipd_ray.config import RunConfig, build
from ipd_ray.distill.policy import TransformerPolicy
from ipd_ray.distill.windows import Prompts, Windows, flatten
from ipd_ray.estimate import Sizes, _corpus_bytes, _memory, _policy_weights, _starts, _together
from ipd_ray.imagine.rollout import segment_length
from ipd_ray.imagine.select import select_starts


def config(**changes: object) -> RunConfig:
    return build({
        "imagine.length": 10, "policy.context": 5, "select.starts": 30, "select.episode_cap": 1.0, **changes,
    })


def test_the_corpus_is_as_large_as_what_one_worker_holds():
    # 30 plans of 10 steps, each behind 4 real ones: 420 positions beside the log's 1000 and the 4 behind each episode.
    # Five numbers each; of a plan, what is to be imitated too.
    c, log, numbers = config(), counting_log([100] * 10), np.ones((30, 10), np.float32)
    plans = segments_of([30 * i + 20 for i in range(30)], 10, log)
    one = np.ones(1000, np.float32)
    columns, mixture = flatten(
        log, plans, np.ones(30, bool), np.full(30, 10), 1.0, Prompts(one, numbers), one, numbers, c.distill, 5
    )
    held = Windows(columns, mixture, batch_size=8, context=5, seed=0, device="cpu").bytes
    sizes = Sizes.of(log.transitions, 0.1)
    assert _corpus_bytes(c, sizes) == (1460 * 5 + 420) * 4 == pytest.approx(held, rel=0.05)  # and where its windows end


def test_a_distillation_worker_needs_less_the_more_there_are():
    hundred = np.full(100, 1000)
    sizes = Sizes(steps=100_000, observation=17, action=6, lengths=hundred, limit=1000, terminates=False, held=100)
    fields = {"distill.batch_size": 4096, "runtime.engine": "ray"}
    needs = [_memory("distill", config(**fields, **{"runtime.workers": n}), sizes) for n in (1, 2, 4)]
    assert needs == sorted(needs, reverse=True) and needs[2] < 0.5 * needs[0]
    elastic = config(**fields, **{"runtime.workers": 4, "runtime.min_workers": 2})
    assert _memory("distill", elastic, sizes) == needs[1]  # a worker's when there are fewest
    # However many, one process at the beginning needs the whole log.
    long = replace(sizes, steps=100_000_000)
    assert _memory("distill", config(**fields, **{"runtime.workers": 64}), long) > 4 * 1e8 * (17 + 6)


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("lengths", [[100] * 10, [7] * 40, [3, 25, 60]])
def test_as_many_starts_are_counted_as_a_log_has_room_for(lengths: list[int], ended: bool):
    log = log_of([(np.zeros((n + 1, 1)), np.zeros((n, 1)), np.ones(n), ended) for n in lengths])
    c = config(**{"select.starts": 50, "select.regret_share": 1.0})
    value = np.arange(len(log.transitions), dtype=np.float32)
    drawn = select_starts(log, value, np.zeros_like(value), c.select, length=segment_length(log, c.imagine), seed=0)
    room = _starts(c, Sizes.of(log.transitions, 0.1))
    assert 0.6 * room <= len(drawn.index) <= room


@pytest.mark.parametrize(
    ("processes", "seconds", "memory"),
    [
        (1, 10 + 6 + 3 * 4 + 2 + 9 + 8, 70),
        (2, 10 + 3 * 4 / 2 + 2 + 9 + 8, 120),  # two of the three reaches
        (4, 10 + 4 + 2 + 9 + 8, 160),  # imagination has a process each
    ],
)
def test_what_is_made_side_by_side_takes_as_long_as_the_longest(processes: int, seconds: float, memory: float):
    steps = {"values": (10, 10), "world_model": (6, 20), "reach:0.1": (4, 30), "reach:0.2": (4, 50),
             "reach:0.3": (4, 70), "actor": (2, 5), "imagine": (9, 40), "distill": (8, 60)}  # fmt: skip
    rows = [{"step": step, "seconds": s, "memory": m} for step, (s, m) in steps.items()]
    assert _together(rows, processes) == (seconds, memory)


@pytest.mark.parametrize("tokens", ["step", "separate"])
def test_a_policy_that_acts_costs_what_torch_counts(tokens: str):
    c = config(**{"policy.tokens": tokens, "policy.layers": 2, "policy.width": 64})
    policy = TransformerPolicy(11, 3, c.policy, prompted=True).eval()
    rows, K = 20, c.policy.context
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        policy(
            torch.zeros(rows, K), torch.zeros(rows, K, 11), torch.zeros(rows, K, 3),
            torch.zeros(rows, K, dtype=torch.long), torch.ones(rows, K, dtype=torch.bool),
        )  # fmt: skip
    assert 2 * rows * _policy_weights(c) == pytest.approx(counted.get_total_flops(), rel=0.1)
