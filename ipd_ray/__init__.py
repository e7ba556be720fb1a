"""Offline RL that plans: MPC imagination in learned world models, distilled into a policy, on Ray.

    from ipd_ray import Policy, load_config, run

    summary = run("demo", load_config("demo", overrides=["seed=1"]), run_dir="runs/mine")
    policy = Policy.load("runs/mine")

What is named here is imported when it is first used, so that `ipd-ray --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipd_ray.api import run
    from ipd_ray.config import RunConfig
    from ipd_ray.config import load as load_config
    from ipd_ray.evaluate.acting import Policy

__version__ = "0.1.0"
__all__ = ["Policy", "RunConfig", "__version__", "load_config", "run"]

_PLACES = {
    "Policy": ("ipd_ray.evaluate.acting", "Policy"), "RunConfig": ("ipd_ray.config", "RunConfig"),
    "load_config": ("ipd_ray.config", "load"), "run": ("ipd_ray.api", "run"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ipd_ray' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
