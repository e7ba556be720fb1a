"""Who hears of a run: its own files, the terminal, Weights & Biases, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipd_ray.config import RunConfig, flatten
from ipd_ray.errors import UserError, first_line
from ipd_ray.progress import NOTE, Listener
from ipd_ray.runs import CURVES, human_seconds

logger = logging.getLogger(__name__)

BURST_SECONDS = 1.0
"""What is heard of a step within this time of its first word happened before: a resumed step's older lines."""


class Pace:
    """Rate and time left of one step, from what was done in this process in the last minute: workers come and go."""

    WINDOW, STEP = 60.0, 1.0

    def __init__(self) -> None:
        self._heard: deque[tuple[float, float]] = deque()
        self.done = self.total = 0.0
        self.rate = 0.0

    def update(self, done: float, total: float) -> None:
        """Hear that `done` of `total` is done now."""
        now = time.monotonic()
        self.done, self.total = done, total
        if not self._heard or (now - self._heard[0][0] < BURST_SECONDS and self.rate == 0.0):
            self._heard = deque([(self._heard[0][0] if self._heard else now, done)])
            return
        while len(self._heard) > 1 and now - self._heard[1][0] >= self.WINDOW:
            self._heard.popleft()
        since, before = self._heard[0]
        self.rate = (done - before) / max(now - since, 1e-9)
        if now - self._heard[-1][0] >= self.STEP:
            self._heard.append((now, done))

    @property
    def left(self) -> float:
        """Seconds; NaN where it is not known yet."""
        return (self.total - self.done) / self.rate if self.rate > 0 else math.nan


def _counted(done: int, total: int, metrics: Mapping[str, float]) -> tuple[float, float]:
    """What a bar shows. How long episodes last is not known before they end: evaluation counts ended ones."""
    if "episodes_ended" in metrics:
        return round(100 * metrics["episodes_ended"]), 100
    return done, total


def _rate(value: float) -> str:
    return f"{value:,.0f}/s" if value >= 10 else f"{value:.2g}/s"


def _ended(step: str, seconds: float, reused: bool) -> str:
    return f"{step:<22} {'reused, made' if reused else 'done'} in {human_seconds(seconds)}"


class RunFiles:
    """run.log with times, metrics.jsonl with every line of every learning curve."""

    def __init__(self, folder: Path):
        self._log = (folder / "run.log").open("a", buffering=1)
        self._curves = (folder / CURVES).open("w", buffering=1)

    def note(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self._curves.write(json.dumps({"part": step, "step": done, "total": total, **metrics}) + "\n")

    def end(self, step: str, seconds: float, reused: bool) -> None:
        self.note(f"{step}: {'reused, made' if reused else 'done'} in {human_seconds(seconds)}")

    def close(self) -> None:
        self._log.close()
        self._curves.close()


class PlainTerminal:
    """Lines for a log file or a pipe: one a step at most every few seconds."""

    EVERY = 10.0

    def __init__(self) -> None:
        self._paces: dict[str, Pace] = {}
        self._said: dict[str, float] = {}

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        count, of = _counted(done, total, metrics)
        pace = self._paces.setdefault(step, Pace())
        pace.update(count, of)
        now = time.monotonic()
        if now - self._said.setdefault(step, now) < self.EVERY:
            return
        self._said[step] = now
        left = "" if math.isnan(pace.left) else f", {_rate(pace.rate)}, {human_seconds(pace.left)} left"
        self.note(f"{step:<22} {count:>9,.0f} of {of:,.0f} ({100 * count / max(of, 1):.0f} %){left}{_shown(metrics)}")

    def end(self, step: str, seconds: float, reused: bool) -> None:
        self.note(_ended(step, seconds, reused))

    def close(self) -> None:
        return


class Logged:
    """Remarks as warnings of `logging`, what else there is to read as information."""

    def note(self, text: str) -> None:
        logger.log(logging.WARNING if text.startswith(NOTE) else logging.INFO, text.removeprefix(NOTE))

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        return

    def end(self, step: str, seconds: float, reused: bool) -> None:
        self.note(_ended(step, seconds, reused))

    def close(self) -> None:
        return


class RichTerminal:
    """Progress bars, one a step that works; what has ended scrolls away above them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.fields[label]:<22}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[detail]}", style="dim"), console=Console(stderr=True, highlight=False),
            transient=True, refresh_per_second=4,
        )
        self._tasks: dict[str, Any] = {}
        self._paces: dict[str, Pace] = {}

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        count, of = _counted(done, total, metrics)
        self._progress.start()  # again is nothing
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task("", total=of, label=step, detail="")
            self._paces[step] = Pace()
        pace = self._paces[step]
        pace.update(count, of)
        detail = "" if math.isnan(pace.left) else f"{_rate(pace.rate)}, {human_seconds(pace.left)} left"
        self._progress.update(self._tasks[step], completed=count, total=of, detail=detail + _shown(metrics))

    def end(self, step: str, seconds: float, reused: bool) -> None:
        if (task := self._tasks.pop(step, None)) is not None:
            self._progress.remove_task(task)
        self.note(_ended(step, seconds, reused))

    def close(self) -> None:
        self._progress.stop()


_HEADLINE = {
    "v_loss": "v_loss {:,.3g}", "nll": "nll {:,.3g}", "holdout_error": "holdout_error {:,.3g}",
    "imitation": "imitation {:,.3g}", "q_pi": "q_pi {:,.3g}",
    "imagined_steps_per_second": "{:,.0f} imagined steps/s", "accept_rate": "{:.0%} accepted",
    "actors": "{:.0f} actors",
}


def _shown(metrics: Mapping[str, float]) -> str:
    """The numbers that say most about a step."""
    found = [text.format(metrics[name]) for name, text in _HEADLINE.items() if name in metrics]
    return "  " + "  ".join(found) if found else ""


class WandbLog:
    """Weights & Biases: one curve a metric and part, the config, and the scores at the end."""

    def __init__(self, config: RunConfig, folder: Path, dataset: str):
        import wandb

        runtime = config.runtime
        try:
            self._run = wandb.init(
                project=runtime.wandb_project, name=folder.name, dir=str(folder),
                group=runtime.wandb_group or dataset.replace("/", "-"),
                mode=runtime.wandb if runtime.wandb != "off" else "disabled",
                config={**flatten(config.model_dump(mode="json")), "dataset": dataset},
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # whatever its client raises: no key, no network, no permission
            raise UserError(
                f"runtime.wandb={runtime.wandb}: Weights & Biases cannot be started ({first_line(error)}): `wandb "
                "login`, or set runtime.wandb=offline."
            ) from error
        self._folder = folder
        self._parts: set[str] = set()

    def note(self, text: str) -> None:
        return

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        part = step.replace(":", "_")
        if part not in self._parts:
            self._parts.add(part)
            self._run.define_metric(f"{part}/step", hidden=True)
            self._run.define_metric(f"{part}/*", step_metric=f"{part}/step")
        self._run.log({f"{part}/step": done, **{f"{part}/{name}": value for name, value in metrics.items()}})

    def end(self, step: str, seconds: float, reused: bool) -> None:
        self._run.summary[f"seconds/{step.replace(':', '_')}"] = seconds

    def close(self) -> None:
        summary = self._folder / "summary.json"
        if summary.exists():
            self._run.summary.update(flatten(json.loads(summary.read_text())))
        self._run.finish()


class TensorBoardLog:
    """TensorBoard event files in the run folder's `tensorboard/`; a new run of the folder replaces them."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def note(self, text: str) -> None:
        return

    def progress(self, step: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{step.replace(':', '_')}/{name}", value, done)

    def end(self, step: str, seconds: float, reused: bool) -> None:
        self._writer.add_scalar(f"seconds/{step.replace(':', '_')}", seconds, 0)

    def close(self) -> None:
        self._writer.close()


def terminal() -> Listener:
    """Bars where standard error is a terminal, lines where it is not."""
    return RichTerminal() if sys.stderr.isatty() else PlainTerminal()


def recorders(config: RunConfig, folder: Path, dataset: str) -> list[Listener]:
    """What writes learning curves down, as `runtime` asks for it."""
    others: list[Listener] = []
    if config.runtime.wandb != "off":
        others.append(WandbLog(config, folder, dataset))
    if config.runtime.tensorboard:
        others.append(TensorBoardLog(folder))
    return [RunFiles(folder), *others]
