"""The one training loop: resumes, logs, saves. What is learned lives in the trainer, where to stop in the caller."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ipd_ray.artifacts import Workspace


class Trainer(Protocol):
    """Something that learns by numbered updates and whose whole state is tensors."""

    def update(self, step: int) -> dict[str, Tensor]:
        """Do update number `step` and return scalars on the device, which hold until the next update.

        Depends on the state and `step` alone.
        """

    def state(self) -> dict[str, Tensor]:
        """Return all that `load_state` needs to go on bit for bit."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a state back."""


def train(
    trainer: Trainer,
    total: int,
    workspace: Workspace | None,
    log_every: int = 500,
    stop: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run updates up to `total`, yielding (updates done, mean metrics since the last line) every `log_every`.

    stop: asked after every line, and before the first update of a resumed training.

    Checkpoints fall on log lines only, so that a resumed learning curve equals an undisturbed one.
    """
    start = 0
    if workspace and (restored := workspace.restore()):
        tensors, meta = restored
        trainer.load_state(tensors)
        start = int(meta["step"])
    sums: dict[str, Tensor] = {}
    count, began = 0, time.monotonic()
    for step in range(start, total):
        if stop and count == 0 and stop():
            return
        for name, value in trainer.update(step).items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach().clone()
        count += 1
        if (step + 1) % log_every == 0 or step + 1 == total:
            metrics = dict(zip(sums, (torch.stack(list(sums.values())) / count).tolist(), strict=True))
            now = time.monotonic()
            if workspace:
                workspace.log(step + 1, total, {**metrics, "updates_per_second": count / max(now - began, 1e-9)})
            yield step + 1, metrics  # what the caller keeps of this line is there before a checkpoint goes beyond it
            if workspace and workspace.due() and step + 1 < total:
                workspace.checkpoint(step + 1, trainer.state())
            sums, count, began = {}, 0, now


def set_threads(threads: int) -> None:
    """Give this process `threads` CPU threads for tensor work."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(root: Path = Path("/")) -> float:
    """Bytes of memory that this process may use: the machine's, or less where its control group (v1, v2) has less, as a
    container's has. root: of the file system."""
    least = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    groups = root / "proc" / "self" / "cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        place = root / "sys" / "fs" / "cgroup" / folder
        for part in path.split("/"):  # a container sees its own group as the root, under whatever path
            place = place / part
            with suppress(OSError, ValueError):  # there is no such group, or its limit is "max"
                least = min(least, float((place / name).read_text()))
    return least


def resolve_device(name: str) -> str:
    """Return the torch device that `auto` stands for here."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_here(device: str) -> str:
    """Return the device, or cpu where this machine has no GPU: one that drives a cluster may have none."""
    return "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device


def exhaust(iterator: Iterator[tuple[int, dict[str, float]]]) -> dict[str, Any]:
    """Run a training to its end and return the last metrics."""
    last: dict[str, float] = {}
    for _, metrics in iterator:
        last = metrics
    return last
