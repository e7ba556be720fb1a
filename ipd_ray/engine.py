"""Engines carry tasks out: on this machine's processes here, on Ray in `distributed`. Neither knows the method."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol

from ipd_ray.errors import TaskError
from ipd_ray.steps import DistillJob, run_distill


@dataclass(frozen=True)
class Task:
    """One call of a module-level function in some worker."""

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How one attempt at a task ended."""

    task: int
    result: Any = None
    error: str | None = None
    """Traceback of what the function raised; of a lost attempt, what is known of its end."""
    lost: Literal["worker", "machine"] | None = None
    """What died under it: the worker alone, which may be the task's doing, or the machine, which hardly is."""


class Workers(Protocol):
    """Where tasks run: at most `capacity` at a time."""

    def capacity(self, waiting: int) -> int:
        """Return how many more tasks can start now, given how many wait."""

    def start(self, number: int, task: Task) -> None:
        """Begin a task."""

    def wait(self, seconds: float) -> list[Outcome]:
        """Return the attempts that ended, at the latest after `seconds`."""


ATTEMPTS = 3
MACHINES = 10
"""Machines that may go down under one task: where they are taken back, a task that lasts a tenth as long as they do
meets with ten in a row once in 1e10 times, and one that takes them down itself ends."""


def drive(
    tasks: Sequence[Task],
    workers: Workers,
    *,
    tick: Callable[[], None] | None = None,
    done: Callable[[int, Any], None] | None = None,
    retry_errors: bool = False,
) -> dict[int, str]:
    """Carry out all tasks, starting again what a dead worker lost; return {task: traceback} of those set aside.

    A task is set aside when it has raised or lost its worker ATTEMPTS times (raised once, where `retry_errors` is not
    set), or lost MACHINES machines. `done` is called with each result, `tick` at least twice a second.
    """
    waiting = deque(range(len(tasks)))
    failures, machines = Counter[int](), Counter[int]()
    running: set[int] = set()
    failed: dict[int, str] = {}
    while waiting or running:
        for _ in range(min(len(waiting), workers.capacity(len(waiting)))):
            number = waiting.popleft()
            workers.start(number, tasks[number])
            running.add(number)
        for outcome in workers.wait(0.5):
            number, lost = outcome.task, outcome.lost
            running.discard(number)
            if outcome.error is None and not lost:
                if done:
                    done(number, outcome.result)
                continue
            count, limit = (machines, MACHINES) if lost == "machine" else (failures, ATTEMPTS)
            count[number] += 1
            if count[number] < limit and (lost or retry_errors):
                waiting.append(number)
            elif lost:
                said = f": {outcome.error}" if outcome.error else ""
                failed[number] = f"{tasks[number].name}: its {lost} died {count[number]} times{said}"
            else:
                failed[number] = outcome.error or ""
        if tick:
            tick()
    return failed


class Engine(Protocol):
    """What the pipeline asks for. All calls return when everything is done."""

    def run_steps(self, tasks: Sequence[Task], tick: Callable[[], None]) -> None:
        """Carry out independent steps side by side. Raises TaskError where one fails."""

    def map_shards(
        self, tasks: Sequence[Task], done: Callable[[int, Any], None], tick: Callable[[], None]
    ) -> dict[int, str]:
        """Carry out many small tasks; return {task: traceback} of those set aside."""

    def distill(self, job: DistillJob, tick: Callable[[], None]) -> None:
        """Carry out step 5."""

    def require_storage(self, places: Sequence[str]) -> None:
        """Raise UserError naming the machine that cannot read and write one of these paths or URIs."""

    def crew(self) -> tuple[int, int]:
        """Return how many workers are up, and how many more were asked for."""

    def close(self) -> None:
        """Let go of workers."""


def distill_task(job: DistillJob) -> Task:
    """Step 5 as a task of one process."""
    return Task("distill", run_distill, {"work": job.work, "place": job.place, "job": job})


class LocalEngine:
    """Processes of this machine; needs no ray."""

    def __init__(self, processes: int):
        self._pool = ProcessPool(max(1, processes))

    def run_steps(self, tasks: Sequence[Task], tick: Callable[[], None]) -> None:
        raise_failures(tasks, drive(tasks, self._pool, tick=tick))

    def map_shards(
        self, tasks: Sequence[Task], done: Callable[[int, Any], None], tick: Callable[[], None]
    ) -> dict[int, str]:
        return drive(tasks, self._pool, tick=tick, done=done, retry_errors=True)

    def distill(self, job: DistillJob, tick: Callable[[], None]) -> None:
        self.run_steps([distill_task(job)], tick)

    def require_storage(self, places: Sequence[str]) -> None:
        """Its only machine has been looked at."""

    def crew(self) -> tuple[int, int]:
        return len(self._pool), 0

    def close(self) -> None:
        self._pool.close()


def raise_failures(tasks: Sequence[Task], failed: Mapping[int, str]) -> None:
    """Raise TaskError for what was set aside."""
    if failed:
        raise TaskError("\n".join(f"{tasks[i].name} failed:\n{text}" for i, text in failed.items()))


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    task: int | None = field(default=None)


class ProcessPool:
    """Spawned processes, each with one task at a time; a dead one is replaced."""

    def __init__(self, size: int):
        self._size = size
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._workers)

    def capacity(self, waiting: int) -> int:
        return self._size - sum(w.task is not None for w in self._workers)

    def start(self, number: int, task: Task) -> None:
        worker = next((w for w in self._workers if w.task is None), None) or self._add()
        worker.task = number
        with suppress(OSError):  # a worker that died idle: `wait` finds it
            worker.pipe.send(task)

    def wait(self, seconds: float) -> list[Outcome]:
        busy = [w for w in self._workers if w.task is not None]
        ready = wait([w.pipe for w in busy] + [w.process.sentinel for w in busy], seconds)
        outcomes = []
        for worker in busy:
            if worker.pipe not in ready and worker.process.sentinel not in ready:
                continue
            number, worker.task = worker.task, None
            try:
                lost = not worker.pipe.poll()  # then its end is what is ready
                result, error = (None, None) if lost else worker.pipe.recv()
            except (EOFError, OSError):
                result, error, lost = None, None, True
            if lost:
                self._workers.remove(worker)
                worker.pipe.close()
                error = _end_of(worker.process)
            outcomes.append(Outcome(number if number is not None else -1, result, error, "worker" if lost else None))
        return outcomes

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _add(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs,), name=f"ipd-ray-{next(self._numbers)}", daemon=True
        )
        with _interrupts_held(), _main_left_alone():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker


def _end_of(process: multiprocessing.process.BaseProcess) -> str:
    """Say how a process ended whose pipe is closed."""
    process.join(5.0)
    code = process.exitcode
    if code == -signal.SIGKILL:
        return "killed, most likely for want of memory"
    return f"signal {-code} ({signal.strsignal(-code)})" if code is not None and code < 0 else f"exit code {code}"


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back meanwhile: the new process inherits that, and says nothing of it even while it is starting."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Keep `spawn` from running the user's script again in the new process: no task needs it, few are guarded."""
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(kept)


def _serve(pipe: Connection) -> None:
    """A worker's life: tasks in, results or tracebacks out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for task in _received(pipe):
        try:
            pipe.send((task.function(**task.arguments), None))  # raises for a result that cannot travel, too
        except Exception:
            with suppress(OSError):  # the parent is gone
                pipe.send((None, traceback.format_exc()))


def _die_with_parent() -> None:
    """End this process with its parent: two may never write one workspace."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
    os._exit(1)


def _received(pipe: Connection) -> Iterator[Task]:
    while True:
        try:
            yield pipe.recv()
        except (EOFError, OSError):
            return
