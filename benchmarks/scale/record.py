"""Results of the scale benchmarks: one JSON file a script, with commit, versions, machine and load."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from ipd_ray.files import write_atomic
from ipd_ray.training import cores

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def write(name: str, found: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write what a script found; return the file."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    about = {
        "commit": commit or "unknown", "cores": cores(), "load": os.getloadavg(),
        "versions": {name: importlib.metadata.version(name) for name in ("ray", "torch")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_atomic(path, json.dumps({**found, "machine": about}, indent=1) + "\n")
    return path


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Return what was written; empty where nothing was."""
    path = folder / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
