"""Offline RL that plans: MPC imagination in learned world models, distilled into a policy, on Ray.

    from ipd_ray import Policy, RunConfig, run

    summary = run("demo", RunConfig(seed=1), run_dir="runs/mine")
    policy = Policy.load("runs/mine")

What is named here is imported when it is first used, so that `ipd-ray --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipd_ray.api import run
    from ipd_ray.config import RunConfig
    from ipd_ray.evaluate.acting import Policy

__version__ = "0.1.0"
__all__ = ["Policy", "RunConfig", "__version__", "run"]

_PLACES = {"Policy": "ipd_ray.evaluate.acting", "RunConfig": "ipd_ray.config", "run": "ipd_ray.api"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ipd_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
