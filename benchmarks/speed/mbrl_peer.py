"""mbrl-lib's ensemble and its MPPI planner as contestants, in an environment of their own (`make peers`).

    .venv-mbrl/bin/python benchmarks/speed/mbrl_peer.py world_model '{"device": "cpu", "threads": 1, "members": 7}'

world_model: its GaussianMLP, trained on a bootstrap a member by its own iterator and update. plan: its MPPIOptimizer on
its ModelEnv, one state after the other, each candidate in one member at every step, one round; it has no behaviour
policy and no value at the end, which ours have, so does less.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from contest import Missing, Work, serve
from logs import made_up

STEPS = 100_000
SILU = {"_target_": "torch.nn.SiLU"}


def _model(options: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
    from mbrl.models import GaussianMLP, OneDTransitionRewardModel

    observation, action = columns["observations"].shape[1], columns["actions"].shape[1]
    network = GaussianMLP(
        observation + action, observation + 1, options["device"], num_layers=4, ensemble_size=options["members"],
        hid_size=200, propagation_method="random_model", learn_logvar_bounds=True, activation_fn_cfg=SILU,
    )  # fmt: skip
    return OneDTransitionRewardModel(network, target_is_delta=True, normalize=True, learned_rewards=True)


def world_model(options: Mapping[str, Any]) -> Work:
    from mbrl.types import TransitionBatch
    from mbrl.util.replay_buffer import BootstrapIterator

    c = made_up(STEPS)
    log = TransitionBatch(
        c["observations"], c["actions"], c["next_observations"], c["rewards"], c["terminals"], c["timeouts"]
    )
    batches = BootstrapIterator(
        log, 256, options["members"], shuffle_each_epoch=True, permute_indices=False, rng=np.random.default_rng(0)
    )
    model = _model(options, c)
    model.update_normalizer(log)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    state = SimpleNamespace(batches=iter(batches))

    def run(units: int) -> float:
        for _ in range(units):
            try:
                batch = next(state.batches)
            except StopIteration:
                state.batches = iter(batches)
                batch = next(state.batches)
            model.update(batch, optimizer)
        return units

    return Work(run)


def plan(options: Mapping[str, Any]) -> Work:
    """members, candidates, horizon."""
    import gymnasium as gym
    from mbrl.models import ModelEnv
    from mbrl.planning.trajectory_opt import MPPIOptimizer

    c = made_up(1000)
    model = _model(options, c)
    observation, action = c["observations"].shape[1], c["actions"].shape[1]
    spaces = SimpleNamespace(
        observation_space=gym.spaces.Box(-np.inf, np.inf, (observation,), np.float32),
        action_space=gym.spaces.Box(-1.0, 1.0, (action,), np.float32),
    )
    inside = ModelEnv(spaces, model, lambda a, s: torch.zeros(len(s), 1, dtype=torch.bool, device=s.device))
    candidates = -(-options["candidates"] // options["members"]) * options["members"]
    low, high = [[-1.0] * action] * options["horizon"], [[1.0] * action] * options["horizon"]
    planner = MPPIOptimizer(1, candidates, 10.0, 0.2, 1.0, low, high, options["device"])
    state = SimpleNamespace(number=0)

    def run(units: int) -> float:
        for _ in range(units):
            s = c["observations"][state.number % len(c["observations"])]
            state.number += 1
            planner.optimize(lambda a, s=s: inside.evaluate_action_sequences(a, s, 1))[0].cpu()
        return units

    return Work(run)


CONTESTANTS: dict[str, Callable[[Mapping[str, Any]], Work]] = {"world_model": world_model, "plan": plan}


def build(name: str, options: Mapping[str, Any]) -> Work:
    try:
        import mbrl  # noqa: F401
    except ImportError:
        raise Missing("mbrl-lib is not installed in this environment: `make peers` makes one") from None
    torch.set_num_threads(options["threads"])
    return CONTESTANTS[name](options)


if __name__ == "__main__":
    serve(lambda: build(sys.argv[1], json.loads(sys.argv[2])))
