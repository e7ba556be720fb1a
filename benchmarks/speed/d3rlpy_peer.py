"""d3rlpy's IQL and Decision Transformer as contestants, in an environment of their own (`make peers`).

    .venv-peers/bin/python benchmarks/speed/d3rlpy_peer.py iql '{"device": "cpu", "threads": 1}'

iql: whole steps of its own training loop, batch drawn and metrics kept. iql_update: its update alone, of one batch that
lies on the device. dt: batches drawn and updates. Settings are those of benchmarks/scores/peers.py, d3rlpy's own
scripts', but for Decision Transformer's size, which is ours.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from contest import Missing, Work, serve
from logs import made_up

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scores"))

STEPS = 100_000
"""Of the log."""
EPOCH = 20
"""Updates a unit."""


def _log() -> tuple[Any, Any]:
    """The log as benchmarks/scores holds it, and as d3rlpy does."""
    import d3rlpy
    import peers

    columns = made_up(STEPS)
    columns.pop("next_observations")
    bounds = [-1.0] * columns["actions"].shape[1], [1.0] * columns["actions"].shape[1]
    data = peers.Data(**columns, metadata={"dataset": "made-up", "action_low": bounds[0], "action_high": bounds[1]})
    return data, d3rlpy.dataset.MDPDataset(
        data.observations, data.actions, data.rewards, data.terminals.astype("float32"),
        data.timeouts.astype("float32"), action_space=d3rlpy.ActionSpace.CONTINUOUS,
    )  # fmt: skip


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def iql(options: Mapping[str, Any]) -> Work:
    import d3rlpy
    import peers

    data, log = _log()
    algo = peers.peer_of("iql", data, 1_000_000).config.create(device=options["device"])
    epochs: Iterator[Any] = algo.fitter(
        log, n_steps=10**9, n_steps_per_epoch=EPOCH, show_progress=False, with_timestamp=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(), save_interval=10**9,
    )  # fmt: skip

    def run(units: int) -> float:
        for _ in range(units):
            next(epochs)
        _synchronise(options["device"])
        return units * EPOCH

    return Work(run)


def iql_update(options: Mapping[str, Any]) -> Work:
    import peers
    from d3rlpy.torch_utility import TorchMiniBatch

    data, log = _log()
    algo = peers.peer_of("iql", data, 1_000_000).config.create(device=options["device"])
    algo.build_with_dataset(log)
    algo.config.reward_scaler.fit_with_transition_picker(log.episodes, log.transition_picker)
    batch = TorchMiniBatch.from_batch(
        log.sample_transition_batch(algo.config.batch_size), gamma=algo.config.gamma, compute_returns_to_go=False,
        device=options["device"], reward_scaler=algo.config.reward_scaler,
    )  # fmt: skip

    def run(units: int) -> float:
        for step in range(units):
            algo.impl.update(batch, step)
        _synchronise(options["device"])
        return units

    return Work(run)


def dt(options: Mapping[str, Any]) -> Work:
    """layers, width, heads, context, batch: its size."""
    import peers
    from d3rlpy.algos.utility import build_scalers_with_trajectory_slicer
    from d3rlpy.models import VectorEncoderFactory

    data, log = _log()
    peer = peers.peer_of("dt", data, 1_000_000)
    config = dataclasses.replace(
        peer.config, num_layers=options["layers"], num_heads=options["heads"], context_size=options["context"],
        batch_size=options["batch"],
        encoder_factory=VectorEncoderFactory([options["width"]], exclude_last_activation=True),
    )  # fmt: skip
    algo = config.create(device=options["device"])
    build_scalers_with_trajectory_slicer(algo, log)
    algo.create_impl(data.observations.shape[1:], data.actions.shape[1])

    def run(units: int) -> float:
        for _ in range(units):
            algo.update(log.sample_trajectory_batch(options["batch"], length=options["context"]))
        _synchronise(options["device"])
        return units * options["batch"]

    return Work(run)


CONTESTANTS: dict[str, Callable[[Mapping[str, Any]], Work]] = {"iql": iql, "iql_update": iql_update, "dt": dt}


def build(name: str, options: Mapping[str, Any]) -> Work:
    try:
        import structlog
    except ImportError:
        raise Missing("d3rlpy is not installed in this environment: `make peers` makes one") from None
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    torch.set_num_threads(options["threads"])
    return CONTESTANTS[name](options)


if __name__ == "__main__":
    serve(lambda: build(sys.argv[1], json.loads(sys.argv[2])))
