"""When an imagined episode ends: bounds and a network, learned, serve every task; a known rule is better where there is
one. Shapes: B rows, N steps that went on, K that ended, O observation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipd_ray.data.transitions import Floats
from ipd_ray.errors import UserError, near_name

TerminationRule = Callable[[Tensor], Tensor]
"""Raw next observations (B, O) to a boolean (B,)."""


def never(observation_BO: Tensor) -> Tensor:
    """No state ends an episode."""
    return torch.zeros(len(observation_BO), dtype=torch.bool, device=observation_BO.device)


def hopper(observation_BO: Tensor) -> Tensor:
    """Gymnasium's Hopper: height over 0.7, |angle| under 0.2, every other state entry under 100."""
    healthy = (observation_BO[:, 0] > 0.7) & (observation_BO[:, 1].abs() < 0.2)
    return ~(healthy & (observation_BO[:, 1:].abs() < 100.0).all(1))


def walker2d(observation_BO: Tensor) -> Tensor:
    """Gymnasium's Walker2d: height in (0.8, 2), |angle| under 1."""
    height, angle = observation_BO[:, 0], observation_BO[:, 1]
    return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))


UNBOUNDED = float(np.finfo(np.float32).max)
"""Stands for no bound."""
_FEW = 5
"""Ended steps that must lie beyond a bound: fewer may be there by accident."""


def ending_bounds(went_on_NO: Floats, ended_KO: Floats) -> tuple[Floats, Floats, float]:
    """Bounds (O,) of single observations, low and high, beyond which every logged episode ended and some did, and the
    share of endings that lie within all of them.

    Many environments end an episode where an angle, a height or a position leaves its interval. A network draws such an
    edge only roughly, and what is planned inside the model walks along it (docs/notes.md). Halfway between the last
    step that went on and the first that ended; UNBOUNDED where there is no bound, as where no step went on. Next
    observations, raw.
    """

    def above(most: Floats, ended: Floats) -> Floats:
        beyond = ended > most
        first = np.where(beyond, ended, np.inf).min(0)
        halfway = most + 0.5 * (first - most)
        bound = np.where(halfway < first, halfway, most)  # the two may be neighbours in float32
        return np.where(beyond.sum(0) >= _FEW, bound, UNBOUNDED).astype(np.float32)

    if not len(went_on_NO):
        none = np.full(went_on_NO.shape[1], UNBOUNDED, np.float32)
        return -none, none, 1.0
    high, low = above(went_on_NO.max(0), ended_KO), -above(-went_on_NO.min(0), -ended_KO)
    within = ((ended_KO <= high) & (ended_KO >= low)).all(1)
    return low, high, float(within.mean())


RULES: dict[str, TerminationRule] = {"never": never, "hopper": hopper, "walker2d": walker2d}


def resolve(name: str) -> TerminationRule | None:
    """Return the rule of `world_model.termination`, None for the learned head. Raises UserError for an unknown one."""
    if name == "learned":
        return None
    if name in RULES:
        return RULES[name]
    module, sep, function = name.partition(":")
    if not sep:
        known = ["learned", *RULES]
        raise UserError(
            f"world_model.termination={name!r} must be one of {', '.join(known)} or package.module:function."
            + near_name(name, known)
        )
    return import_dotted("world_model.termination", module, function)


def import_dotted(field: str, module: str, function: str) -> Callable[..., Any]:
    """Return a user's function by dotted path. Raises UserError where it cannot be had."""
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{field}={module}:{function} cannot be imported ({error}): is its folder on PYTHONPATH?"
        ) from error
    if not callable(found):
        raise UserError(f"{field}={module}:{function} is {type(found).__name__}, not a function.")
    return found
