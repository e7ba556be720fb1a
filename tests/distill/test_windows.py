"""Windows of the log and of spliced plans, counted by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import counting_log, segments_of

from ipd_ray.config import DistillConfig, PolicyConfig
from ipd_ray.data.shards import Segments
from ipd_ray.data.transitions import Log
from ipd_ray.distill.fit import (
    Corpus,
    Material,
    imagined_advantage,
    imagined_outcome,
    raw_outcome,
    raw_return_to_go,
)
from ipd_ray.distill.windows import Batch, Prompts, Windows, flatten

LOG = counting_log([6, 4])  # steps 0-5 and 6-9, in windows of 4 at positions 0-5 and 9-12


def imagined(index: list[int], length: int, log: Log = LOG) -> Segments:
    """Segments whose step k has observation 1000 (i + 1) + k, i the segment, and action -k / 100."""
    k = np.arange(length + 1)
    observation = np.stack([1000.0 * (i + 1) + k for i in range(len(index))])[..., None]
    action = np.broadcast_to(-k[:-1, None] / 100.0, (len(index), length, 1))
    return segments_of(index, length, log, observation=observation, action=action)


def windows(
    segments: Segments, lengths: list[int], *, accepted: list[bool] | None = None, context: int = 4, log: Log = LOG,
    weight: Any = None, plan_weight: Any = None, pass_rate: float | None = None, seed: int = 0, rank: int = 0,
    world: int = 1, **config: Any,
) -> Windows:
    T = len(log.transitions)
    prompts = Prompts(
        np.arange(T, dtype=np.float32) + 0.5, np.full((len(segments), segments.length), 77.0, np.float32)
    )
    distill = DistillConfig.model_validate(config)
    counts = np.array([True] * len(lengths) if accepted is None else accepted)
    columns, mixture = flatten(
        log, segments, counts, np.array(lengths), counts.mean() if pass_rate is None else pass_rate, prompts,
        np.ones(T, np.float32) if weight is None else weight,
        np.ones_like(segments.reward) if plan_weight is None else plan_weight, distill, context,
    )
    return Windows(
        columns, mixture, batch_size=distill.batch_size, context=context, seed=seed, device="cpu", rank=rank,
        world=world,
    )


def test_what_lies_before_an_episode_is_not_valid():
    w = windows(imagined([2], 3), [3])
    batch = w.gather(torch.tensor([0, 2, 3, 9, 11]))
    assert batch.observation[..., 0].tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 6], [0, 6, 7, 8]]
    F, T = False, True
    assert batch.valid.tolist() == [[F, F, F, T], [F, T, T, T], [T, T, T, T], [F, F, F, T], [F, T, T, T]]
    assert batch.timestep.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 2]]
    assert torch.equal(batch.weight, batch.valid.float())
    assert batch.prompt[0].tolist() == [0.0, 0.0, 0.0, 0.5]


def test_what_lies_behind_an_episode_is_not_imitated():
    # Windows may end up to three positions behind the last step, so that it lies in four of them, as all steps do.
    w = windows(imagined([2], 3), [3])
    batch = w.gather(torch.tensor([6, 8, 15]))
    assert batch.observation[..., 0].tolist() == [[3, 4, 5, 0], [5, 0, 0, 0], [9, 0, 0, 0]]
    assert batch.weight.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.timestep.tolist() == [[3, 4, 5, 6], [5, 6, 7, 8], [3, 4, 5, 6]]
    assert batch.valid.all()


@pytest.mark.parametrize("context", [1, 2, 4, 20])
def test_every_step_of_the_log_lies_in_as_many_windows_as_positions(context: int):
    w = windows(imagined([2], 3), [3], context=context)
    assert w.mixture.log_windows == 10 + 2 * (context - 1)
    batch = w.gather(torch.arange(w.mixture.log_windows))
    counted = Counter(batch.observation[..., 0][batch.weight > 0].tolist())
    assert counted == {step: context for step in range(10)}


def test_a_plan_is_spliced_onto_its_real_past():
    # Start at step 4 of the log, context 4: steps 1, 2, 3, then the plan's five, the first of which ends a window.
    w = windows(imagined([4], 5), [5])
    first, last = w.imagined_ends.tolist()
    assert last == first + 4
    batch = w.gather(torch.tensor([first, first + 2]))
    assert batch.observation[..., 0].tolist() == [[1, 2, 3, 1000], [3, 1000, 1001, 1002]]
    assert batch.action[0, :, 0].tolist() == pytest.approx([0.01, 0.02, 0.03, 0.0])
    assert batch.action[1, :, 0].tolist() == pytest.approx([0.03, 0.0, -0.01, -0.02])
    assert batch.timestep.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert batch.weight.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert batch.prompt.tolist() == [[1.5, 2.5, 3.5, 77.0], [3.5, 77.0, 77.0, 77.0]]
    assert batch.valid.all()


def test_a_policy_sees_what_it_did_and_imitates_what_its_actor_would_have_done():
    walked = imagined([4], 5)
    wanted = replace(walked, imitated=walked.action + 7.0)
    w = windows(wanted, [5])
    batch = w.gather(w.imagined_ends)
    assert batch.action[-1, :, 0].tolist() == pytest.approx([-0.01, -0.02, -0.03, -0.04])
    assert batch.imitated[-1, :, 0].tolist() == pytest.approx([6.99, 6.98, 6.97, 6.96])
    of_log = w.gather(torch.tensor([3, 9]))
    assert torch.equal(of_log.imitated, of_log.action)


def test_a_plan_near_the_beginning_has_what_past_there_is():
    # Start at the second step of episode 1: one real step before it, then padding.
    w = windows(imagined([7], 3), [3])
    batch = w.gather(w.imagined_ends)
    assert batch.observation[0, :, 0].tolist() == [6, 1000, 1001, 1002]
    assert batch.timestep[0].tolist() == [0, 1, 2, 3]
    first = w.gather(w.imagined_ends - 2)
    assert first.valid[0].tolist() == [False, False, True, True] and first.observation[0, 2:, 0].tolist() == [6, 1000]


def test_only_the_steps_that_were_kept_of_accepted_plans_are_imitated():
    w = windows(imagined([1, 4, 8], 5), [5, 2, 3], accepted=[False, True, True], context=3)
    batch = w.gather(w.imagined_ends)
    seen = batch.observation[..., 0][batch.weight > 0].tolist()
    assert sorted(seen) == [2000, 2001, 3000, 3001, 3002]
    assert w.mixture.imagined_steps == 5


@pytest.mark.parametrize("context", [1, 2, 3, 5, 20])
def test_each_imagined_step_is_imitated_in_exactly_one_window(context: int):
    lengths = [7, 3, 1, 6]
    w = windows(imagined([5, 0, 6, 9], 7), lengths, context=context)
    batch = w.gather(w.imagined_ends)
    counted = Counter(batch.observation[..., 0][batch.weight > 0].tolist())
    assert counted == {1000.0 * (i + 1) + k: 1 for i, n in enumerate(lengths) for k in range(n)}


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_the_imagined_share_of_imitated_positions_is_the_configured_one(ratio: float):
    log = counting_log([30, 50, 20, 40])
    index = list(range(0, 140, 4))
    lengths = [3 + i % 8 for i in range(len(index))]
    w = windows(imagined(index, 10, log), lengths, context=8, log=log, imagined_ratio=ratio, batch_size=512)
    plans = total = 0.0
    for step in range(10):
        batch = w.draw(step)
        is_plan = batch.observation[..., 0] >= 1000
        plans += float(batch.weight[is_plan].sum())
        total += float(batch.weight.sum())
    assert plans / total == pytest.approx(ratio, abs=0.02)


def test_no_imagined_step_is_drawn_far_more_often_than_a_real_one():
    # 4 imagined steps, 140 real ones, at most 3 times as often: 3 * 4 / (140 + 12) = 0.079 of the positions.
    log = counting_log([30, 50, 20, 40])
    w = windows(
        imagined([10], 4, log), [4], context=8, log=log, imagined_ratio=0.9, reuse_cap=3.0, batch_size=2048
    )
    assert w.mixture.imagined_ratio == pytest.approx(12 / 152)
    batch = w.draw(0)
    is_plan = batch.observation[..., 0] >= 1000
    each_plan = float(batch.weight[is_plan].sum()) / 4
    each_real = float(batch.weight[~is_plan].sum()) / 140
    assert each_plan / each_real == pytest.approx(3.0, rel=0.1)


def test_without_accepted_plans_only_the_log_is_drawn():
    w = windows(imagined([2], 3), [3], accepted=[False], imagined_ratio=0.5)
    m = w.mixture
    assert (m.imagined_ratio, m.imagined_steps, m.imagined_per_batch) == (0.0, 0, 0.0)
    assert float(w.draw(0).observation.max()) < 10


def test_weights_are_those_given():
    weight = np.arange(10, dtype=np.float32) / 4.5
    plan_weight = np.array([[0.5, 2.0, 3.0]], np.float32)
    w = windows(imagined([2], 3), [2], weight=weight, plan_weight=plan_weight)
    assert w.gather(torch.tensor([3, 11])).weight.tolist() == [weight[0:4].tolist(), [0.0, *weight[6:9].tolist()]]
    assert w.gather(w.imagined_ends).weight.tolist() == [[0.0, 0.0, 0.5, 2.0]]
    assert w.mixture.imagined_steps == 2


def test_few_plans_are_drawn_as_often_as_the_log_though_a_batch_holds_less_than_one():
    log = counting_log([30, 50, 20, 40])
    w = windows(imagined([10], 4, log), [4], context=4, log=log, imagined_ratio=0.5, reuse_cap=1.0, batch_size=16)
    assert 0.0 < w.mixture.imagined_per_batch < 0.5
    batches = [w.draw(step) for step in range(4000)]
    each_plan = sum(float((b.weight * (b.observation[..., 0] >= 1000)).sum()) for b in batches) / 4
    each_real = sum(float((b.weight * (b.observation[..., 0] < 1000)).sum()) for b in batches) / 140
    assert each_plan / each_real == pytest.approx(1.0, abs=0.1)
    assert {len(b.weight) for b in batches} == {16}


# --- slices -----------------------------------------------------------------------------------------------------------

LONG = counting_log([70, 30, 100, 7])
MANY = imagined(list(range(0, 200, 5)), 6, LONG)
MANY_LENGTHS = [1 + i % 6 for i in range(40)]


def drawn(batch: Batch) -> Counter[Any]:
    """Everything that a batch holds, window by window."""
    columns = [c for f in fields(batch) if (c := getattr(batch, f.name)) is not None]
    return Counter(tuple(tuple(c[i].flatten().tolist()) for c in columns) for i in range(len(batch.weight)))


@pytest.mark.parametrize("world", [1, 2, 3, 64])
@pytest.mark.parametrize("batch_size", [1, 16, 64, 100, 200])
@pytest.mark.parametrize("data", ["long", "short"])
def test_the_global_batch_is_the_same_whatever_the_number_of_workers(world: int, batch_size: int, data: str):
    # short: 10 steps and 2 windows over plans, fewer than slices.
    plans: Any = (MANY, MANY_LENGTHS) if data == "long" else (imagined([2, 7], 3), [3, 2])
    config = {"log": LONG if data == "long" else LOG, "batch_size": batch_size, "reuse_cap": 1000.0}
    whole, workers = windows(*plans, **config), [windows(*plans, **config, rank=r, world=world) for r in range(world)]
    for step in range(8):
        parts = [w.draw(step) for w in workers]
        sizes = [len(p.weight) for p in parts]
        assert sum(sizes) == batch_size
        # Real windows and those over plans, each to within one of the share; 64 slices do not divide by three.
        assert max(sizes) - min(sizes) <= 2 + 2 + batch_size / 64 * (world == 3)
        assert sum((drawn(p) for p in parts), Counter()) == drawn(whole.draw(step))


@pytest.mark.parametrize("log", [LOG, LONG, counting_log([1, 2])], ids=["10 steps", "207 steps", "3 steps"])
@pytest.mark.parametrize("batch_size", [16, 100])
def test_every_window_of_the_log_is_drawn_as_often_as_any_other(log: Log, batch_size: int):
    # So few windows fall unevenly into 64 slices: to draw alike from each slice would be off by half.
    w = windows(imagined([1], 2, log), [2], log=log, batch_size=batch_size, imagined_ratio=0.0)
    W = w.mixture.log_windows
    place = {window: i for i, window in enumerate(drawn(w.gather(torch.arange(W))))}
    assert len(place) == W
    updates = 300 * W // batch_size
    count = np.zeros(W)
    for step in range(updates):
        for window, times in drawn(replace(w.draw(step), noise=None)).items():
            count[place[window]] += times
    expected = updates * batch_size / W
    # Stratified, so the spread is at most that of independent draws; chi-square of W - 1 degrees, five deviations.
    assert ((count - expected) ** 2 / expected).sum() < W - 1 + 5 * np.sqrt(2 * W)
    assert count.sum() == updates * batch_size


def test_every_window_over_plans_is_drawn_as_often_as_any_other():
    w = windows(MANY, MANY_LENGTHS, log=LONG, batch_size=100, imagined_ratio=0.5, reuse_cap=1000.0)
    ends = w.gather(w.imagined_ends).observation[:, -1, 0].tolist()
    counted: Counter[float] = Counter()
    for step in range(400):
        counted.update(x for x in w.draw(step).observation[:, -1, 0].tolist() if x >= 1000)
    assert counted.keys() == set(ends)
    found, expected = np.array(list(counted.values())), counted.total() / len(ends)
    assert ((found - expected) ** 2 / expected).sum() < len(ends) - 1 + 5 * np.sqrt(2 * len(ends))


def test_each_slice_has_its_share_of_every_batch():
    # 128 real windows: two of each slice, so that of 6400 steps each hundred ends two.
    log = counting_log([64, 6336])
    w = windows(imagined([1], 2, log), [2], log=log, batch_size=128, imagined_ratio=0.0, context=1)
    for step in range(5):
        slices = w.draw(step).observation[:, -1, 0].long() // 100
        assert slices.bincount(minlength=64).tolist() == [2] * 64


def test_what_a_worker_holds_falls_with_their_number():
    log = counting_log([500] * 20)
    plans = imagined(list(range(0, 9900, 20)), 6, log)
    sizes = [
        [windows(plans, [6] * 495, log=log, rank=rank, world=world).bytes for rank in range(world)]
        for world in (1, 2, 4, 64)
    ]
    whole = sizes[0][0]
    for held in sizes[1:]:  # a share, and at most the K - 1 = 3 steps before it and a border on either side, twice
        assert max(held) < whole / len(held) + 2 * (3 + 10) * whole / 10_000


def test_a_part_of_what_passed_is_mixed_in_as_all_of_it_would_be():
    log = counting_log([50, 50])
    shared: dict[str, Any] = {"log": log, "imagined_ratio": 0.9, "reuse_cap": 1000.0}
    half = windows(imagined([10, 60], 4, log), [4, 4], accepted=[True, False], pass_rate=0.6, **shared)
    assert half.mixture.imagined_ratio == pytest.approx(0.6) and half.mixture.imagined_steps == 4


def test_a_slice_of_a_file_is_that_of_memory(tmp_path: Path):
    prompts = Prompts(np.arange(207, dtype=np.float32), np.zeros((40, 6), np.float32))
    config = DistillConfig(batch_size=64, imagined_ratio=0.5)
    material = Material(
        LONG, MANY, np.ones(40, bool), np.array(MANY_LENGTHS), 1.0, prompts, np.ones(207, np.float32),
        np.ones((40, 6), np.float32), 0.7,
    )
    corpus = Corpus.of(material, PolicyConfig(context=4), config, {"target_return": None, "imagined": {"kappa": 0.1}})
    corpus.write(tmp_path / "corpus.safetensors")
    again = Corpus.open(tmp_path / "corpus.safetensors")
    shared: Any = {"batch_size": 64, "context": 4, "seed": 0, "device": "cpu", "rank": 1, "world": 3}
    for step in range(3):
        one, other = (Windows(c.columns, c.mixture, **shared).draw(step) for c in (corpus, again))
        assert drawn(one) == drawn(other)
    assert (again.mixture, again.moments, again.critic_scale, again.notes) == (
        corpus.mixture, corpus.moments, 0.7, corpus.notes
    )


@pytest.mark.parametrize("world", [1, 2, 3, 64])
def test_steps_spread_over_the_log_are_shared_out(world: int):
    every: list[float] = []
    whole = windows(MANY, MANY_LENGTHS, log=LONG)
    for rank in range(world):
        w = windows(MANY, MANY_LENGTHS, log=LONG, rank=rank, world=world)
        every += w.gather(w.spread(50)).observation[:, -1, 0].tolist()
    assert every == whole.gather(torch.arange(0, 219, 4)).observation[:, -1, 0].tolist()


def test_a_batch_depends_on_seed_and_step_alone():
    w, again, other = (windows(imagined([2, 7], 3), [3, 2], seed=s) for s in (0, 0, 1))
    torch.rand(3)
    again.draw(1)
    assert torch.equal(w.draw(5).observation, again.draw(5).observation)
    assert not torch.equal(w.draw(5).observation, w.draw(6).observation)
    assert not torch.equal(w.draw(5).observation, other.draw(5).observation)


# --- prompts of plans -------------------------------------------------------------------------------------------------


def test_the_outcome_of_an_imagined_step_by_hand():
    # gamma 0.5, rewards 1, cut after two of three steps, V = 8 there: 1 + 8/2 = 5; 1 + 5/2 = 3.5.
    segments = segments_of([0], 3, reward=np.ones((1, 3)), value=np.array([[0, 0, 8, 99]]))
    assert imagined_outcome(segments, np.array([2]), 0.5)[0, :2].tolist() == [3.5, 5.0]


def test_the_outcome_ends_with_a_predicted_termination():
    ends = np.array([[False, True]])
    segments = segments_of([0], 2, reward=np.ones((1, 2)), terminal=ends, value=np.full((1, 3), 9.0))
    assert imagined_outcome(segments, np.array([2]), 0.5).tolist() == [[1.5, 1.0]]


def test_the_advantage_of_an_imagined_step_by_hand():
    # gamma 0.5, lambda 1: deltas 1 + 4/2 - 2 = 1 and 1 + 8/2 - 4 = 1, cut after two of three steps: 1 + 1/2, 1, 0.
    segments = segments_of([0], 3, reward=np.ones((1, 3)), value=np.array([[2, 4, 8, 99]]))
    assert imagined_advantage(segments, np.array([2]), 0.5, 1.0).tolist() == [[1.5, 1.0, 0.0]]
    assert imagined_advantage(segments, np.array([2]), 0.5, 0.0).tolist() == [[1.0, 1.0, 0.0]]
    ends = np.array([[False, True, False]])
    segments = segments_of([0], 3, reward=np.ones((1, 3)), terminal=ends, value=np.array([[2, 4, 8, 99]]))
    assert imagined_advantage(segments, np.array([2]), 0.5, 1.0).tolist() == [[-0.5, -3.0, 0.0]]


def test_raw_return_to_go_by_hand():
    # Rewards are the step numbers: 0 + 1 + 2 + 3 + 4 + 5, ... and 6 + 7 + 8 + 9, ...
    assert raw_return_to_go(LOG).tolist() == [15, 15, 14, 12, 9, 5, 30, 24, 17, 9]


def shown_outcome(segments: Segments, lengths: list[int]) -> list[float]:
    """The raw return-to-go that prompt=fixed shows for the kept steps of one segment."""
    return raw_outcome(LOG, segments, np.array(lengths))[0, : lengths[0]].tolist()


def test_the_raw_outcome_of_a_whole_plan_by_hand():
    # From step 2 the log brings 14, of which 2 + 3 on the next two steps; the plan brings 10 + 20 instead: 39, then 29.
    segments = segments_of([2], 2, LOG, reward=np.array([[10, 20]]), own_reward=np.array([[2, 3]]))
    assert shown_outcome(segments, [2]) == [39.0, 29.0]


def test_the_raw_outcome_of_a_plan_that_was_cut_by_hand():
    # Cut after two of four steps: what the uncertain ones promise (1000) does not count. Still 39, then 29.
    segments = segments_of(
        [2], 4, LOG, reward=np.array([[10, 20, 1000, 1000]]), own_reward=np.array([[2, 3, 4, 5]])
    )
    assert shown_outcome(segments, [2]) == [39.0, 29.0]


def test_the_raw_outcome_of_a_plan_that_ends_the_episode_by_hand():
    # 10 + 20, and no more: the log's later 4 + 5 are not to be had.
    segments = segments_of(
        [2], 2, LOG, reward=np.array([[10, 20]]), own_reward=np.array([[2, 3]]), terminal=np.array([[False, True]])
    )
    assert shown_outcome(segments, [2]) == [30.0, 20.0]
