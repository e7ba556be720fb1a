"""How what runs without ray gets at what needs it."""

from __future__ import annotations

import importlib
from typing import Any

from ipd_ray.errors import UserError


def ray_part(name: str, wanted_by: str, otherwise: str = "") -> Any:
    """Return a module of `ipd_ray.distributed`. Raises UserError where ray is not installed.

    wanted_by: what the user asked for that needs it; otherwise: what helps beside installing it.
    """
    try:
        return importlib.import_module(f"ipd_ray.distributed.{name}")
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("ray", "aiohttp"):
            raise
        raise UserError(
            f"{wanted_by}, but ray cannot be imported ({error}): `pip install ipd_ray` brings it"
            f"{', or ' * bool(otherwise)}{otherwise}."
        ) from None
