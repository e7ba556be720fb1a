"""Training that was interrupted goes on bit for bit, for every trainer of the method."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_fixtures import Episode, content, described, log_of, segments_of
from torch import Tensor

from ipd_ray.artifacts import Workspace, read_jsonl
from ipd_ray.config import DistillConfig, PolicyConfig, RunConfig, ValuesConfig, WorldModelConfig
from ipd_ray.data.transitions import Log
from ipd_ray.distill.fit import Corpus, DistillTrainer, Material, fit_policy
from ipd_ray.distill.windows import Prompts
from ipd_ray.training import Trainer, memory, train
from ipd_ray.values.fit import ValueTrainer, fit_values
from ipd_ray.world_model.fit import WorldModelTrainer, fit_world_model


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/", {}, None),  # outside of any container
        ("0::/a/b", {"a/memory.max": "3000", "a/b/memory.max": "max"}, 3000.0),  # of a group above
        ("0::/", {"memory.max": "5000"}, 5000.0),  # in a container
        ("4:memory:/docker/x", {"memory/memory.limit_in_bytes": "7000"}, 7000.0),  # v1: its path is the host's
        ("5:cpu:/a\n4:cpuacct,memory:/a", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, None),  # no limit
        (None, {}, None),  # no Linux
    ],
)
def test_memory_is_the_machines_or_its_containers(
    groups: str | None, limits: dict[str, str], expected: float | None, tmp_path: Path
):
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, limit in limits.items():
        (tmp_path / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / name).write_text(limit + "\n")
    whole = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    assert memory(tmp_path) == (expected or whole)


def random_log() -> Log:
    """Six episodes of 12 random steps; every second one terminates."""
    rng = np.random.default_rng(0)
    episodes: list[Episode] = [
        (rng.normal(size=(13, 2)), rng.uniform(-0.9, 0.9, (12, 1)), rng.normal(size=12), i % 2 == 0) for i in range(6)
    ]
    return log_of(episodes, discount=0.9, holdout=[1, 2])


def value_trainer() -> ValueTrainer:
    return ValueTrainer(random_log(), ValuesConfig(updates=20, batch_size=8, width=8), 0, "cpu")


def world_model_trainer() -> WorldModelTrainer:
    config = WorldModelConfig(members=3, elites=2, batch_size=8, width=8, layers=1, max_updates=20, eval_every=4)
    return WorldModelTrainer(random_log(), config, 0, "cpu")


def distill_trainer() -> DistillTrainer:
    log = random_log()
    rng = np.random.default_rng(1)
    segments = segments_of(
        [5, 30], 4, log, observation=rng.normal(size=(2, 5, 2)), action=rng.uniform(-0.9, 0.9, (2, 4, 1))
    )
    prompts = Prompts(rng.normal(size=len(log.reward)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32))

    def critic(s: Tensor, a: Tensor) -> Tensor:
        q = s.sum(-1) * a.sum(-1)
        return torch.stack([q, q - 1.0])

    weight = np.ones(len(log.reward), np.float32)
    plans = np.array([True, True]), np.array([4, 3]), 1.0
    material = Material(log, segments, *plans, prompts, weight, np.ones((2, 4), np.float32), 1.0)
    policy = PolicyConfig(context=3, layers=1, heads=2, width=8, dropout=0.3)
    config = DistillConfig(updates=20, batch_size=8, warmup=5, eta=0.5)
    return DistillTrainer(Corpus.of(material, policy, config), critic, policy, config, seed=0, device="cpu")


TRAINERS = pytest.mark.parametrize("make", [value_trainer, world_model_trainer, distill_trainer])


def finish(trainer: Trainer, workspace: Workspace | None) -> list[tuple[int, dict[str, float]]]:
    return list(train(trainer, 20, workspace, log_every=4))


def curve(folder: Path) -> list[dict[str, Any]]:
    timing = {"time", "updates_per_second"}
    return [{k: v for k, v in row.items() if k not in timing} for row in read_jsonl(folder / "metrics.jsonl")]


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@TRAINERS
@pytest.mark.parametrize("stop", [4, 12, 16])
def test_resumed_training_equals_undisturbed_training(make: Callable[[], Trainer], stop: int, tmp_path: Path):
    """Bit for bit."""
    undisturbed = make()
    finish(undisturbed, Workspace(tmp_path / "whole", 0.0))
    cut = Workspace(tmp_path / "cut", 0.0)
    lines = train(make(), 20, cut, log_every=4)
    while next(lines)[0] < stop:
        pass
    due = iter([True])  # a checkpoint of this line, and one more line of which no checkpoint knows
    cut.due = lambda: next(due, False)  # type: ignore[method-assign]
    next(lines)
    lines.close()
    resumed = make()
    finish(resumed, Workspace(tmp_path / "cut", 0.0))
    assert_equal(undisturbed.state(), resumed.state())
    if isinstance(undisturbed, DistillTrainer) and isinstance(resumed, DistillTrainer):
        assert_equal(undisturbed.policy_state(), resumed.policy_state())  # the moving average, which is what is kept
    assert [row["step"] for row in curve(tmp_path / "cut")] == [4, 8, 12, 16, 20]
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@TRAINERS
def test_a_seed_and_nothing_else_decides_what_is_learned(make: Callable[[], Trainer]):
    one = make()
    finish(one, None)
    torch.manual_seed(12345)
    torch.rand(7)
    other = make()
    torch.rand(3)
    finish(other, None)
    assert_equal(one.state(), other.state())


def test_a_line_is_the_mean_since_the_line_before():
    class Counting:
        def update(self, step: int) -> dict[str, Tensor]:
            return {"loss": torch.tensor(float(step))}

        def state(self) -> dict[str, Tensor]:
            return {}

        def load_state(self, tensors: Mapping[str, Tensor]) -> None:
            pass

    # updates 0 1 2 | 3 4 5 | 6: means 1, 4, 6
    assert list(train(Counting(), 7, None, log_every=3)) == [(3, {"loss": 1.0}), (6, {"loss": 4.0}), (7, {"loss": 6.0})]


class Killed(Workspace):
    """Dies after the checkpoint of one step."""

    def __init__(self, path: Path, step: int):
        super().__init__(path, 0.0)
        self._last = step

    def checkpoint(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
        super().checkpoint(step, tensors, meta)
        if step == self._last:
            raise KeyboardInterrupt


def fit_killed_at(fit: Callable[[Workspace], None], folder: Path, step: int) -> dict[str, Any]:
    with pytest.raises(KeyboardInterrupt):
        fit(Killed(folder, step))
    fit(Workspace(folder, 0.0))
    return content(described(folder))


def test_a_value_fit_killed_and_resumed_leaves_the_same_artifact(tmp_path: Path):
    def fit(workspace: Workspace) -> None:
        config = ValuesConfig(updates=20, batch_size=8, width=8)
        fit_values(random_log(), config, seed=0, device="cpu", workspace=workspace)

    fit(Workspace(tmp_path / "whole"))
    whole, resumed = content(described(tmp_path / "whole")), fit_killed_at(fit, tmp_path / "cut", 7)
    assert (resumed["digest"], resumed["diagnostics"]) == (whole["digest"], whole["diagnostics"])
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def stopping_early(workspace: Workspace) -> None:
    # Nothing is learned: the first look is the best, and after 3 stale ones training stops, at update 16 of 40.
    config = WorldModelConfig(
        members=2, elites=2, batch_size=8, width=8, layers=1, max_updates=40, eval_every=4, patience=3,
        learning_rate=1e-9,
    )
    fit_world_model(random_log(), config, seed=0, device="cpu", workspace=workspace)


def test_patience_counts_on_over_a_resume(tmp_path: Path):
    stopping_early(Workspace(tmp_path / "whole"))
    assert [row["step"] for row in curve(tmp_path / "whole")] == [4, 8, 12, 16]
    resumed = fit_killed_at(stopping_early, tmp_path / "cut", 12)
    assert resumed["digest"] == content(described(tmp_path / "whole"))["digest"]
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_fit_killed_after_it_stopped_early_stays_stopped(tmp_path: Path):
    stopping_early(Workspace(tmp_path / "whole"))
    fit_killed_at(stopping_early, tmp_path / "cut", 16)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_policies_kept_on_the_way_are_the_same_after_a_kill(tmp_path: Path):
    def kept(workspace: Workspace) -> dict[str, bytes]:
        trainer = distill_trainer()
        for _ in fit_policy(trainer, trainer._config, workspace):
            pass
        return {p.name: p.read_bytes() for p in sorted(workspace.path.glob("snapshot-*"))}

    whole = kept(Workspace(tmp_path / "whole"))
    # 20 updates, 4 snapshots: after 5, 10 and 15; the policy itself is the last one.
    assert list(whole) == [f"snapshot-{step:09d}.safetensors" for step in (5, 10, 15)]
    assert len(set(whole.values())) == 3
    for step in (5, 9, 14):
        folder = tmp_path / f"cut-{step}"
        with pytest.raises(KeyboardInterrupt):
            kept(Killed(folder, step))
        assert kept(Workspace(folder)) == whole


def test_every_seed_that_the_config_takes_can_be_trained_with():
    RunConfig(seed=2**32 - 1)
    trainer = distill_trainer()
    trainer._seed = 2**32 - 1
    trainer.update(0)
