"""What steps hand back while they run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipd_ray.artifacts import numeric_platform
from ipd_ray.checks import check_device
from ipd_ray.config import AcceptConfig
from ipd_ray.engine import Task
from ipd_ray.errors import UserError
from ipd_ray.steps import gate_of
from ipd_ray.training import device_here


def test_accepted_counts_of_shards_add_up_to_the_verdict_of_the_run(tiny_method, tmp_path: Path):
    config = AcceptConfig(min_length=1, margin=0.0, range_margin=10.0)  # kappa from held-out windows
    job = replace(tiny_method.job(tmp_path / "job"), accept=config)
    _, verdict, _ = job.imagined(job.log.load())
    gate = gate_of(
        config, job.log, job.values, str(job.world_model), uncertainty=job.uncertainty, regret_share=job.regret_share,
        length=4, device="cpu",
    )
    tasks: list[Task] = tiny_method.shard_tasks(tmp_path / "shards")
    shards = [task.function(**task.arguments, gate=gate) for task in tasks]
    accepted = verdict.accepted.reshape(len(tasks), -1).sum(1).tolist()
    assert [shard["accepted"] for shard in shards] == accepted
    assert all(shard["platform"] == numeric_platform("cpu") for shard in shards)  # of who computed, not who commits
    assert 0 < sum(accepted) < len(verdict.accepted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_drives_a_cluster_of_gpus():
    check_device("cuda", here=False)
    assert device_here("cuda") == device_here("cuda:1") == "cpu"
    with pytest.raises(UserError, match=r"runtime.device='cuda' cannot be used"):
        check_device("cuda")
