"""How fast this project is: beside peers that nobody here wrote, and beside what the hardware allows.

    python benchmarks/speed/bench.py                          # everything but the curves
    python benchmarks/speed/bench.py --stages values,planning # these anew, the rest as measured before
    python benchmarks/speed/bench.py --curves                 # how time and memory grow
    python benchmarks/speed/bench.py --write                  # nothing measured: docs/performance.md drawn again

Contestants take turns (contest.py), each in a process and with threads of its own; what is missing here is skipped, and
said. Results lie in results/<machine>.json, one a machine; each stage holds all samples, its commit and the load of the
machine when it began. `make bench` measures all and writes docs/performance.md.

What one thread computes is counted in processor seconds, which leave out the time that others had the core; all else,
reading, several threads and GPUs, in seconds of the wall's clock. Both are in the samples.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import page
import torch
from contest import Contestant, Missing, interleave
from stages import HERE, PYTHONS, ROOT, STAGES, Entry, Stage

RESULTS = HERE / "results"
SCHEMA = 1
MILLION = 1_000_000
SIZES = (10_000, 100_000, MILLION)
"""Steps of the logs that memory is measured on."""


# ---- this machine


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = torch.cuda.get_device_name(0) if device.startswith("cuda") else processor()
    return {
        "device": name, "kind": device.partition(":")[0], "processor": processor(), "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1), "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    names = ("gymnasium", "minari", "mujoco", "numpy", "ray", "torch")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names if installed(n)}}


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def commit() -> str:
    """The commit that the numbers belong to; `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def result_path(about: dict[str, Any]) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['device']} {about['cores']} cores".lower()).strip("-")
    return RESULTS / f"{slug}.json"


# ---- measuring


class Bench:
    """One call of this script: where it measures, how long, and what for."""

    def __init__(self, device: str, threads: int, turns: int, seconds: float, folder: Path):
        self.device, self.threads, self.turns, self.seconds, self.folder = device, threads, turns, seconds, folder

    def race(self, stage: Stage) -> dict[str, Any]:
        """Let a stage's contestants take turns; return the samples and what is known of each."""
        extra = self.dataset(MILLION) if stage.reads else {}
        missing: dict[str, str] = {}
        with ExitStack() as stack:
            there: list[Contestant] = []
            for entry, contestant in [(e, self.contestant(e, extra)) for e in stage.entries]:
                stack.callback(contestant.close)
                try:
                    contestant.ready()
                    there.append(contestant)
                except Missing as reason:
                    missing[entry.name] = str(reason)
                    say(f"  SKIPPED: {entry.name}: {reason}")
            turns = interleave(there, self.turns, self.seconds)
            about = {c.name: c.about for c in there}
        samples = {name: [asdict(turn) for turn in of_one] for name, of_one in turns.items()}
        alone = self.device == "cpu" and self.threads == 1 and not stage.reads
        return {
            "samples": samples, "about": about, "missing": missing, "threads": self.threads,
            "clock": "cpu" if alone else "seconds",
        }  # fmt: skip

    def contestant(self, entry: Entry, extra: dict[str, Any]) -> Contestant:
        python = PYTHONS[entry.script]
        if not python.exists():
            environment = python.parents[1].name
            said = json.dumps({"missing": f"{environment} is not there: `make peers` makes it"})
            return Contestant(entry.name, [sys.executable, "-c", f"print({said!r})"])
        options = {"device": self.device, "threads": self.threads, **entry.options, **extra}
        command = [str(python), str(HERE / entry.script), entry.work, json.dumps(options)]
        return Contestant(entry.name, command, {"OMP_NUM_THREADS": str(self.threads), "MUJOCO_GL": "disable"})

    def dataset(self, steps: int) -> dict[str, Any]:
        """Have a Minari dataset of so many steps; return what contestants need to find it."""
        from ours import write_dataset

        root = self.folder / f"minari-{steps}"
        if not root.exists():
            say(f"  writing a Minari dataset of {steps:,} steps")
            write_dataset(steps, root)
        os.environ["MINARI_DATASETS_PATH"] = str(root)
        return {"root": str(root.parent), "dataset": "made-up/steps-v0"}

    # -- from the command to the first training step

    def start(self) -> dict[str, Any]:
        """Seconds from the start of a process to its first update of the policy, all before it cached."""
        small = [
            "values.updates=20", "world_model.max_updates=20", "actor.reaches=[0.15]", "actor.rounds=1",
            "correct.rounds=0", "select.starts=250", "distill.updates=20", "choose.without_imagination=false",
            f"runtime.device={self.device}",
        ]  # fmt: skip
        run = self.folder / "start"
        command = [
            sys.executable, "-m", "ipd_ray.cli", "distill", self.dataset(10_000)["dataset"], "--preset", "gym-small",
            "--run-dir", str(run),
        ]  # fmt: skip
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": self.environment()}
        subprocess.run([*command, *small], check=True, **quiet)
        found: dict[str, list[float]] = {"ipd_ray, local engine": [], "ipd_ray, ray engine": [], "bare Ray": []}
        missing = {}
        if not installed("ray"):
            missing = {name: "ray is not installed" for name in ("ipd_ray, ray engine", "bare Ray")}
            say("  SKIPPED: what needs ray: it is not installed")
        marker = self.folder / "began"
        for turn in range(3):
            for engine in ("local", "ray"):
                name = f"ipd_ray, {engine} engine"
                if name in missing:
                    continue
                rate = f"distill.learning_rate={1e-4 * (1 + len(found[name]) + 10 * (engine == 'ray'))}"
                began = time.time()
                subprocess.run([*command, *small, rate, f"runtime.engine={engine}"], check=True, **quiet)
                curves = (run.parent / "store" / "distill").glob("*/metrics.jsonl")
                newest = max(curves, key=lambda p: p.stat().st_mtime)
                found[name].append(json.loads(newest.read_text().splitlines()[0])["time"] - began)
            if "bare Ray" not in missing:
                began = time.time()
                subprocess.run([sys.executable, str(HERE / "bare_ray.py"), str(marker)], check=True, **quiet)
                found["bare Ray"].append(float(marker.read_text()) - began)
            say(f"  turn {turn + 1}: " + ", ".join(f"{n} {s[-1]:.1f} s" for n, s in found.items() if s))
        return {"seconds": {n: s for n, s in found.items() if s}, "missing": missing}

    # -- memory

    def memory(self) -> dict[str, Any]:
        """Peak bytes of each step's processes on logs of SIZES steps."""
        from footprint import STEPS

        found: dict[str, dict[str, dict[str, int]]] = {}
        for steps in SIZES:
            dataset = self.dataset(steps)["dataset"]
            for step in STEPS:
                script, run = str(HERE / "footprint.py"), str(self.folder / f"memory-{steps}" / "run")
                done = subprocess.run([sys.executable, script, step, dataset, run], check=True, stdout=subprocess.PIPE,
                                      text=True, env=self.environment())  # fmt: skip
                found.setdefault(step, {})[str(steps)] = json.loads(done.stdout.splitlines()[-1])
            say(f"  {steps:,} steps: " + ", ".join(
                f"{s} {found[s][str(steps)]['worker'] / 1e9:.2f} GB" for s in STEPS))  # fmt: skip
        return {"bytes": found}

    @staticmethod
    def environment() -> dict[str, str]:
        """Of processes that are no contestants."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "PYTHONPATH": path, "MUJOCO_GL": "disable", "RAY_USAGE_STATS_ENABLED": "0"}


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ipd-ray-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(bench: Bench, names: Sequence[str], path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Measure these stages; the file is written after each, so that a run that was cut short loses one at most."""
    content: dict[str, Any] = {}
    races = {stage.name: stage for stage in STAGES}
    work: dict[str, Callable[[], dict[str, Any]]] = {"start": bench.start, "memory": bench.memory}
    if "curves" in names:
        import curves

        work["curves"] = lambda: curves.measure(bench)
    for name in names:
        say(f"{name}{': ' + races[name].title if name in races else ''}")
        load, began = os.getloadavg()[0], time.perf_counter()
        found = bench.race(races[name]) if name in races else work[name]()
        content = read(path) if path.exists() else {"schema": SCHEMA, "stages": {}}
        content["machine"] = about
        content["stages"][name] = {
            **found, "load": round(load, 2), "took": round(time.perf_counter() - began, 1), "commit": commit(),
            "versions": versions(), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }  # fmt: skip
        write(path, content)
    return content


def read(path: Path) -> dict[str, Any]:
    """Read a machine's results. Raises ValueError for an unknown schema."""
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')!r}, this code reads {SCHEMA}: remove it.")
    return dict(content)


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> None:
    everything = [*(s.name for s in STAGES), "start", "memory"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", help=f"comma-separated: {', '.join([*everything, 'curves'])}; all: all but curves")
    parser.add_argument("--curves", action="store_true", help="also measure how time and memory grow")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md and plots; alone: only that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of every contestant, as runtime.threads")
    parser.add_argument("--turns", type=int, default=7, help="of each contestant")
    parser.add_argument("--seconds", type=float, default=0.6, help="of a turn")
    options = parser.parse_args(arguments)
    names = options.stages.split(",") if options.stages else []
    if unknown := [n for n in names if n not in ("all", *everything, "curves")]:
        raise SystemExit(f"--stages={','.join(unknown)} must be of {', '.join([*everything, 'curves'])}.")
    if not names and not (options.write or options.curves):
        names = ["all"]
    if names == ["all"]:
        names = list(everything)
    names += ["curves"] if options.curves and "curves" not in names else []
    about = machine(options.device)
    path = result_path(about)
    if names:
        with scratch() as folder:
            bench = Bench(options.device, options.threads, options.turns, options.seconds, folder)
            measure(bench, names, path, about)
        print(page.as_text(read(path)))
    if options.write:
        for written in page.write(ROOT, [read(p) for p in sorted(RESULTS.glob("*.json"))]):
            print(f"wrote {written}")


if __name__ == "__main__":
    main()
