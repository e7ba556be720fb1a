"""Step 5 by Ray Train: one worker or many, which survives the death of any of them and of the driver."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from torch import Tensor

from ipd_ray.artifacts import RESULT, Workspace, load_checkpoint
from ipd_ray.distill.fit import Corpus, Reducer
from ipd_ray.distributed.cluster import NODE_ID, cpus
from ipd_ray.errors import TaskError
from ipd_ray.steps import DistillJob
from ipd_ray.storage import Folder
from ipd_ray.training import set_threads

FAILURES = 3
"""Deaths of a worker that a training survives; a machine that was taken back (spot) does not count."""
STOP_SECONDS = 20.0
FOLDER, CORPUS = "ray", "corpus.safetensors"
"""Where in the workspace Ray Train keeps its state, and the corpus lies there that its workers read."""


class TorchReducer:
    """Sums over the workers of a torch process group."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total


class TrainWorkspace(Workspace):
    """A workspace whose checkpoints Ray Train keeps. Each worker has one, the first alone writes the learning curve."""

    def __init__(self, place: str, checkpoint_seconds: float, reducer: Reducer, device: str):
        super().__init__(place, checkpoint_seconds, device)
        self._reducer = reducer
        self._warned = False  # of a node that goes away, and saved for it

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        restored = None
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            with checkpoint.as_directory() as folder:
                restored = load_checkpoint(Path(folder))
        if self._reducer.rank == 0:
            self.rewind(restored[1] if restored else {})
            self.folder.remove_file(RESULT)  # of a worker that died after finishing
        return restored

    def due(self) -> bool:
        """The first worker's clock decides for all: every worker reports, or none. A warning (spot) does not wait."""
        warned = ray.train.get_preemption_info() is not None  # the same for all
        vote = float(self._reducer.rank == 0 and super().due()) + float(warned and not self._warned)
        self._warned = warned
        return bool(self._reducer.sum(torch.tensor(vote, device=self.device)) > 0)

    def checkpoint(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
        if self._reducer.rank > 0:
            ray.train.report({"step": step})
            return
        with tempfile.TemporaryDirectory(prefix="ipd-ray-") as folder:
            self.write_checkpoint(Path(folder), step, tensors, meta)
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def keep(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        if self._reducer.rank == 0:
            super().keep(step, tensors)

    def log(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        if self._reducer.rank == 0:
            super().log(step, total, metrics)


def at_work(job: DistillJob) -> tuple[int, int]:
    """Return how many workers of a training are up, and how many more it has asked for, as they last said themselves.

    They do so in the cluster's key-value store: Ray does not tell that a task or a training waits for room.
    """
    with suppress(RayError):
        up, more = (_internal_kv_get(_roll(job)) or b"0 0").split()
        return int(up), int(more)
    return 0, 0


def _at_work(job: DistillJob, up: int, more: int) -> None:
    with suppress(RayError):
        _internal_kv_put(_roll(job), f"{up} {more}")


def _roll(job: DistillJob) -> str:
    return f"ipd-ray workers of {job.work}"


def prepare(job: DistillJob, workers: int) -> None:
    """Leave the corpus in the workspace, where a driver that died before did not. workers: asked for next."""
    _at_work(job, 1, 0)
    folder = Folder.of(job.work) / FOLDER
    if not folder.exists(CORPUS):
        job.place.workspace(job.work)
        folder.path.mkdir(exist_ok=True)
        job.prepare().write(folder.path / CORPUS)
        folder.push([CORPUS])
    _at_work(job, 0, workers)


def train_worker(job: DistillJob) -> None:
    """What every worker does: its slices of the corpus, sums over all workers, and Ray Train's checkpoints."""
    if job.place.device.startswith("cuda"):
        job = replace(job, place=replace(job.place, device=str(ray.train.torch.get_device())))
    reducer, place = TorchReducer(), job.place
    set_threads(place.threads)
    if reducer.rank == 0:
        _at_work(job, reducer.world, 0)
    workspace = TrainWorkspace(job.work, place.checkpoint_seconds, reducer, place.device)
    folder = Folder.of(job.work) / FOLDER
    folder.have([CORPUS])
    job.train(Corpus.open(folder.path / CORPUS), workspace, reducer)


def fit(
    job: DistillJob, prepared: Sequence[ray.ObjectRef], workers: tuple[int, int], failures: int,
    labels: Mapping[str, str],
) -> None:
    """Run Ray Train to its end; a run of this name that was cut off goes on from its last checkpoint.

    prepared: what has to be done before it; in a sequence, which Ray does not wait for, so that this process starts
    and imports meanwhile.
    Ray ends all workers to change their number, without a warning: what they did since the last checkpoint is done
    again. So it looks for room only every second checkpoint.
    """
    cuda, work = job.place.device.startswith("cuda"), Folder.of(job.work)
    filesystem, path = (work / FOLDER).arrow
    scaling: dict[str, Any] = {  # V2's fields, which type checkers do not see
        "num_workers": workers[1] if workers[0] == workers[1] else workers,
        "elastic_resize_monitor_interval_s": 2.0 * job.place.checkpoint_seconds,
        "label_selector": dict(labels) or None,
    }
    trainer = ray.train.torch.TorchTrainer(
        partial(train_worker, job),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=ray.train.ScalingConfig(use_gpu=cuda, resources_per_worker=_resources(job), **scaling),
        run_config=ray.train.RunConfig(
            name=f"distill-{work.name}",
            storage_path=path,
            storage_filesystem=filesystem if work.remote else None,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=failures),
        ),
    )
    ray.get(list(prepared))
    trainer.fit()


def _resources(job: DistillJob) -> dict[str, float]:
    """What one worker takes."""
    return {"CPU": cpus(job.place.threads), "GPU": float(job.place.device.startswith("cuda"))}


def distill(
    job: DistillJob, workers: tuple[int, int], tick: Callable[[], None], failures: int = FAILURES,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Carry step 5 out with (fewest, most) workers on nodes with `labels`; `tick` is called twice a second.

    `fit` has a process of its own: this one stays free to tick and to be interrupted. Raises TaskError where it fails.
    """
    work, labels = Folder.of(job.work), dict(labels or {})
    if not work.exists(RESULT):  # else a driver died between finishing and committing
        resources = _resources(job)
        once = ray.remote(
            num_cpus=resources["CPU"], num_gpus=resources["GPU"], max_retries=failures, max_calls=1,
            label_selector=labels, scheduling_strategy="DEFAULT",  # not inside what a Tune trial around it holds
        )(prepare)
        _at_work(job, 0, 1)
        prepared = once.remote(job, workers[0])
        here = {NODE_ID: ray.get_runtime_context().get_node_id()}
        start = ray.remote(num_cpus=0, max_retries=0, max_calls=1, label_selector=here)(fit)
        try:
            _finish([prepared, start.remote(job, [prepared], workers, failures, labels)], tick)
        finally:
            with suppress(RayError):
                _internal_kv_del(_roll(job))
    (work / FOLDER).remove()  # Ray's state holds pickles: not for an artifact


def _finish(calls: Sequence[ray.ObjectRef], tick: Callable[[], None]) -> None:
    """Wait for tasks in this order, ticking; end them where one fails or this process is to stop. Raises TaskError."""
    try:
        for call in calls:
            while not ray.wait([call], timeout=0.5)[0]:
                tick()
            ray.get(call)
    except BaseException as error:
        for call in calls:
            ray.cancel(call)  # interrupts fit, which lets go of its workers; killed, it would leave their room taken
        ray.wait(list(calls), num_returns=len(calls), timeout=STOP_SECONDS)
        for call in calls:
            ray.cancel(call, force=True)
        if isinstance(error, RayError):
            raise TaskError(f"distill failed:\n{error}") from error
        raise
