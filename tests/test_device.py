"""The method on cuda, pretended: see pretend_cuda for what this can and cannot find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_cuda import CUDA, SYNCS, pretend_cuda
from small_runs import SETTINGS, write_log

from ipd_ray import Policy, run
from ipd_ray.artifacts import Artifact, Workspace, numeric_platform
from ipd_ray.checks import check_device
from ipd_ray.config import RunConfig, load
from ipd_ray.data.minari_source import load as load_log
from ipd_ray.data.transitions import prepare
from ipd_ray.errors import UserError
from ipd_ray.estimate import measure
from ipd_ray.runs import RunFolder
from ipd_ray.training import Trainer
from ipd_ray.values.fit import ValueTrainer
from ipd_ray.world_model.fit import WorldModelTrainer

TINY = [
    *SETTINGS, "values.updates=12", "world_model.max_updates=8", "world_model.eval_every=2", "select.starts=8",
    "world_model.members=2", "planner.candidates=4",
    "planner.iterations=2", "actor.reaches=[0.3]", "actor.rounds=3", "actor.starts=6", "actor.length=4",
    "actor.updates=2", "actor.value_updates=2", "actor.episodes=2",
    "correct.walks=4", "correct.length=3",
    "distill.updates=12", "distill.snapshots=2", "choose.episodes=2", "choose.length=3", "fitted_q.updates=4",
    "evaluate.max_steps=3",
]  # fmt: skip
METHODS = {
    "actor": ["planner.kind=actor"],
    "gradient": ["planner.kind=gradient", "planner.disagreement_penalty=0.5", "imagine.uncertainty=primal",
                 "distill.prompt=outcome", "policy.tokens=separate", "distill.critic_scale=mean_abs"],
    "bfloat16": [f"{step}.precision=bfloat16" for step in ("values", "world_model", "planner")]
    + ["values.loss=huber", "distill.prompt=fixed", "evaluate.candidates=3"],
    "greedy_q": ["planner.kind=greedy_q", "distill.prompt=none", "distill.eta=0"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (lambda x: x + torch.ones(3), "same device"),
        (lambda x: torch.cat([x, torch.ones(1)]), "same device"),
        (lambda x: torch.ones(3).add_(x), "same device"),
        (lambda x: torch.zeros(()).add_(x[0]), "same device"),
        (lambda x: torch.ones(3)[x.long()], "indices should be"),
        (lambda x: torch.randn(3, device="cuda", generator=torch.Generator()), "generator"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: np.asarray(x), "numpy"),
    ],
)
def test_what_cuda_refuses_is_refused(refused: Callable[[torch.Tensor], Any], says: str):
    with pretend_cuda(), pytest.raises((RuntimeError, TypeError), match=says):
        refused(torch.tensor([0.0, 1.0, 2.0], device="cuda"))


def test_what_cuda_takes_is_taken():
    with pretend_cuda():
        x = torch.arange(3.0).to("cuda")
        x[x > 1.5] = 5.0
        made = [x * torch.tensor(2.0), x[torch.tensor([0, 2])], torch.zeros(2, device=x.device), x.new_ones(1)]
        assert all(y.device == CUDA for y in made)
        assert x.cpu().numpy().tolist() == [0.0, 1.0, 5.0]


class Cut(Exception):
    """Instead of a kill."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Any:
    """Where the runs of this module share what they have in common; a log lies there. Another process has no GPU."""
    path = tmp_path_factory.mktemp("device")
    write_log(path / "minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path / "minari"))
        yield path


def method(folder: Path, config: RunConfig) -> dict[str, str]:
    """Run all of the method; return the digest of each of its artifacts."""
    for until in ("fitted_q", "evaluate"):
        run("test/pendulum-v0", config, run_dir=folder, until=until)
    return {path.parent.name: Artifact(path.parent).digest for path in folder.parent.glob("store/*/*/artifact.json")}


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "actor" else pytest.mark.slow) for name in METHODS
])  # fmt: skip
def test_a_run_on_cuda_that_was_cut_off_everywhere_equals_one_on_the_cpu(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
):
    words = [*TINY, *METHODS[name], "runtime.checkpoint_seconds=1e-6"]
    expected = method(place / "cpu" / name, load(overrides=[*words, "runtime.device=cpu"]))
    saved, written = Workspace.checkpoint, Counter[Path]()

    def cut_the_second(self: Workspace, *args: Any) -> None:
        written[self.path] += 1
        if written[self.path] <= 2:
            saved(self, *args)
        if written[self.path] == 2:
            raise Cut

    monkeypatch.setattr(Workspace, "checkpoint", cut_the_second)
    folder, config = place / "cuda" / name, load(overrides=[*words, "runtime.device=cuda"])
    found: dict[str, str] = {}
    with pretend_cuda():
        while not found:
            try:
                found = method(folder, config)
            except Cut:
                continue
    assert found == expected
    assert Artifact(RunFolder(folder).artifact("values")).described["platform"]["device"] == "Pretended GPU"
    observation = np.array([1.0, 0.0, 0.0], np.float32)
    acts = []
    for device in ("cpu", "cuda"):
        with pretend_cuda() if device == "cuda" else nullcontext():
            policy = Policy.load(folder, device)
            acts.append([policy.act(observation), policy.value(observation)])
            policy.reset()
            policy.act(np.stack([observation] * 2))
            policy.reset([True, False])
    assert acts[0] == acts[1]
    if name == "actor":  # whose trainings are all there are
        assert {path.parent.name for path in written} >= {"values", "world_model", "reach", "distill", "fitted_q"}


def test_updates_of_values_and_world_model_never_wait_for_the_gpu(place: Path):
    config = load(overrides=TINY)
    log = prepare(load_log("test/pendulum-v0"), config.data, 0)
    with pretend_cuda():
        trainers: list[Trainer] = [
            ValueTrainer(log, config.values, 0, "cuda"), WorldModelTrainer(log, config.world_model, 0, "cuda")
        ]  # fmt: skip
        for trainer in trainers:
            trainer.update(0)  # draws the rows of many updates
            SYNCS.clear()
            trainer.update(2)
            assert not SYNCS


def test_times_are_measured_on_cuda():
    with pretend_cuda():
        speed = measure("cuda", 0.001)
        assert speed.product(2, 8, 4) > 0
        assert speed.operation > 0


def test_a_run_on_the_cpu_is_of_the_same_platform_on_machines_with_and_without_a_gpu():
    plain = numeric_platform("cpu")
    with pretend_cuda():
        assert numeric_platform("cpu") == plain
        assert numeric_platform("cuda") == {**plain, "device": "Pretended GPU"}
        with pytest.raises(UserError, match=r"runtime.device=cuda:1 names one GPU .* set runtime.device=cuda\."):
            check_device("cuda:1", here=False)
