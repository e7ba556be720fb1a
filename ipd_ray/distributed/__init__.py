"""The method on a Ray cluster: the only place that imports ray. Its modules are imported inside functions only.

cluster: joining one, and what it can give. pool: actors for steps and shards. distill: Ray Train for step 5.
engine: the three of them behind `ipd_ray.engine.Engine`. nodes: asking each node. jobs: runs submitted to a cluster;
credentials: what such a job is handed.
"""

from __future__ import annotations

import importlib
from typing import Any

from ipd_ray.errors import UserError


def ray_part(name: str, wanted_by: str, otherwise: str = "") -> Any:
    """Return a module of this package. Raises UserError where ray is not installed.

    wanted_by: what the user asked for that needs it; otherwise: what helps beside installing it.
    """
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("ray", "aiohttp"):
            raise
        raise UserError(
            f"{wanted_by}, but ray cannot be imported ({error}): `pip install ipd_ray` brings it"
            f"{', or ' * bool(otherwise)}{otherwise}."
        ) from None
