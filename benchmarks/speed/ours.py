"""This project, baselines of our own and this machine's matrix product, as contestants.

    python benchmarks/speed/ours.py values '{"device": "cpu", "threads": 1}'

What a contestant does is said at its function. Shapes as in the package.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Missing, Work, serve
from logs import ACTION, made_up
from torch import Tensor, nn

from ipd_ray.config import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    PlannerConfig,
    PolicyConfig,
    RunConfig,
    ValuesConfig,
    WorldModelConfig,
    load,
)
from ipd_ray.data.transitions import Log, Spec, Transitions, prepare
from ipd_ray.estimate import Sizes, operations
from ipd_ray.training import set_threads, train

STEPS = 100_000
"""Of the log, where its length is not what is measured."""
PRESET = "gym-small"
"""Whose sizes are `as shipped`."""


# ---- the log and what is learned from it; speed depends on no weight, so none is trained


def transitions_of(steps: int, env_spec: str | None = None, **sizes: int) -> Transitions:
    """The made-up log as the package holds logs."""
    c = made_up(steps, **sizes)
    observation, action = c["observations"].shape[1], c["actions"].shape[1]
    spec = Spec(
        dataset="made-up/steps-v0", observation_space={"type": "Box", "shape": [observation], "dtype": "float32"},
        action_low=[-1.0] * action, action_high=[1.0] * action, action_shape=[action], action_dtype="float32",
        env_spec=env_spec,
    )  # fmt: skip
    ends = np.flatnonzero(c["terminals"] | c["timeouts"]) + 1
    return Transitions(
        observation=c["observations"], action=c["actions"], reward=c["rewards"],
        next_observation=c["next_observations"], terminal=c["terminals"], episode_start=np.concatenate([[0], ends]),
        spec=spec,
    )  # fmt: skip


def log_of(steps: int) -> Log:
    return prepare(transitions_of(steps), DataConfig(), 0)


def sizes_of(log: Log) -> Sizes:
    return Sizes.of(log.transitions, len(log.holdout_steps) / len(log.transitions))


def values_of(log: Log, config: ValuesConfig, device: str) -> Any:
    from ipd_ray.values.fit import frozen
    from ipd_ray.values.networks import ValueFunctions

    torch.manual_seed(0)
    t = log.transitions
    return frozen(ValueFunctions(t.observation_dim, t.spec.action_dim, config), device)


def world_model_of(log: Log, config: WorldModelConfig, device: str) -> Any:
    from ipd_ray.values.fit import frozen
    from ipd_ray.world_model.ensemble import Ensemble, WorldModel
    from ipd_ray.world_model.termination import resolve

    torch.manual_seed(0)
    t = log.transitions
    ensemble = Ensemble(config.elites, t.observation_dim, t.spec.action_dim, config)
    return WorldModel(frozen(ensemble, device), resolve(config.termination)).to(device)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def training(trainer: Any, total: int, items: int, options: Mapping[str, Any], every: int, about: Any) -> Work:
    """The package's own training loop: batches drawn, metrics kept; `every` updates a unit, `items` an update."""
    lines = train(trainer, total, None, log_every=every)

    def run(units: int) -> float:
        for _ in range(units):
            next(lines)
        synchronise(options["device"])
        return units * every * items

    return Work(run, about)


# ---- learning


def values(options: Mapping[str, Any]) -> Work:
    """Updates of step 1 as shipped: V, twin Q with LayerNorm, behaviour policy, return expectiles, targets of 10
    steps."""
    from ipd_ray.values.fit import ValueTrainer

    precision = options.get("precision", "float32")
    log, config = log_of(STEPS), RunConfig(values=ValuesConfig(updates=10**9, precision=precision))
    trainer = ValueTrainer(log, config.values, 0, options["device"])
    return training(trainer, 10**9, 1, options, 20, {"flops": operations("values", config, sizes_of(log))})


def _world_model_config(options: Mapping[str, Any]) -> WorldModelConfig:
    members, precision = options.get("members", 7), options.get("precision", "float32")
    return WorldModelConfig(
        members=members, elites=members, max_updates=10**9, eval_every=10**9, termination="never", precision=precision
    )


def world_model(options: Mapping[str, Any]) -> Work:
    """Updates of step 2 without the looks at held-out steps; termination by a rule, as the peers have it."""
    from ipd_ray.world_model.fit import WorldModelTrainer

    log, config = log_of(STEPS), RunConfig(world_model=_world_model_config(options))
    trainer = WorldModelTrainer(log, config.world_model, 0, options["device"])
    about = {"flops": operations("world_model", config, sizes_of(log))}
    return training(trainer, 10**9, 1, options, 5, about)


class _Separate(nn.Module):
    """One member: what step 2 learns, as one would write it for a single model."""

    def __init__(self, inputs: int, targets: int, config: WorldModelConfig):
        super().__init__()
        sizes = [inputs, *[config.width] * config.layers]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(config.width, 2 * targets))
        self.most, self.least = nn.Parameter(torch.full((targets,), 0.5)), nn.Parameter(torch.full((targets,), -10.0))

    def loss(self, inputs: Tensor, target: Tensor, power: float) -> Tensor:
        mean, raw = self.net(inputs).chunk(2, -1)
        log_variance = self.most - nn.functional.softplus(self.most - raw)
        log_variance = self.least + nn.functional.softplus(log_variance - self.least)
        nll = (mean - target).square() * torch.exp(-log_variance) + log_variance
        bounds = 0.01 * (self.most.sum() - self.least.sum())
        return (nll * torch.exp(power * log_variance.detach())).mean() + bounds


def world_model_loop(options: Mapping[str, Any]) -> Work:
    """Ours, a baseline: the same losses for separate models, one after the other, each with a fused optimiser; batches
    drawn from a table on the device."""
    config, log, device = _world_model_config(options), log_of(STEPS), options["device"]
    t = log.transitions
    inputs, targets = t.observation_dim + t.spec.action_dim, t.observation_dim + 1
    change = np.concatenate([t.next_observation - t.observation, log.reward[:, None]], 1)
    table = torch.from_numpy(np.concatenate([t.observation, t.action, change], 1)).to(device)
    models = [_Separate(inputs, targets, config).to(device) for _ in range(config.members)]
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        for m in models
    ]

    def run(units: int) -> float:
        rows = torch.randint(len(table), (units, config.members, config.batch_size)).to(device)
        for of_update in rows:
            for of_member, model, optimizer in zip(of_update, models, optimizers, strict=True):
                x, y = table[of_member].split([inputs, targets], 1)
                optimizer.zero_grad(set_to_none=True)
                model.loss(x, y, config.variance_power).backward()
                optimizer.step()
        synchronise(device)
        return units

    return Work(run)


# ---- planning


def _planning(options: Mapping[str, Any]) -> tuple[Log, RunConfig, Any, Any, Tensor]:
    """Log, settings, values, world model, and states to plan from (B, O)."""
    if options.get("shipped"):
        config = load(PRESET, overrides=["planner.kind=gradient"])
        world = config.world_model.model_copy(update={"termination": "never"})
        config = config.model_copy(update={"world_model": world})
    else:
        members = options["members"]
        planner = PlannerConfig(
            kind="mpc", candidates=options["candidates"], horizon=options["horizon"], **options.get("planner", {})
        )
        world = WorldModelConfig(members=max(2, members), elites=max(2, members), termination="never")
        config = RunConfig(planner=planner, world_model=world)
    log, device = log_of(10_000), options["device"]
    count = options.get("states", 250)
    states = torch.from_numpy(log.transitions.observation[:: len(log.transitions) // count][:count]).to(device)
    return log, config, values_of(log, config.values, device), world_model_of(log, world, device), states


class _NoValues:
    """In place of values: plans begin with no action and end in nothing, as mbrl-lib's do."""

    def act(self, observation: Tensor) -> Tensor:
        return observation.new_zeros(*observation.shape[:-1], ACTION)

    def v(self, observation: Tensor) -> Tensor:
        return observation.new_zeros(observation.shape[:-1])

    def q(self, observation: Tensor, action: Tensor) -> Tensor:
        return observation.new_zeros(2, *observation.shape[:-1])


def plan(options: Mapping[str, Any]) -> Work:
    """Step 4's plans for a shard of states; `shipped`: gradient plans of the preset's size; `plain`: without values."""
    from ipd_ray.imagine.planner import plan as decide

    log, config, values, model, states = _planning(options)
    values = _NoValues() if options.get("plain") else values

    def run(units: int) -> float:
        for number in range(units):
            decide(states, model, values, config.planner, discount=log.discount,
                   generator=torch.Generator().manual_seed(number))  # fmt: skip
        synchronise(options["device"])
        return units * len(states)

    return Work(run, {} if options.get("plain") else {"flops": operations("plan", config, sizes_of(log))})


def plan_one(options: Mapping[str, Any]) -> Work:
    """Ours, a baseline: MPPI for one state after the other, as TD-MPC2's and mbrl-lib's loops go; the same networks,
    the candidates of a state in one batch, each in one member."""
    log, config, values, model, states = _planning(options)
    planner, members, discount = config.planner, model.elites, log.discount
    each = -(-planner.candidates // members)
    action_dim = log.transitions.spec.action_dim

    @torch.no_grad()
    def mppi(state_O: Tensor) -> Tensor:
        z = state_O.expand(members, each, -1)
        noise = planner.noise_std * torch.randn(planner.horizon, members, each, action_dim, device=state_O.device)
        noise[:, :, 0] = 0.0
        score, alive = torch.zeros(members, each, device=state_O.device), 1.0
        actions = []
        for h in range(planner.horizon):
            actions.append((values.act(z) + noise[h]).clamp(-1.0, 1.0))
            z, reward, ended = model.step(z, actions[-1])
            score = score + discount**h * alive * reward
            alive = alive * (1.0 - ended)
        score = (score + discount**planner.horizon * alive * values.v(z)).flatten()
        weight = torch.softmax((score - score.max()) / score.std().clamp(min=1e-6) / planner.temperature, 0)
        return weight @ actions[0].flatten(0, 1)

    def run(units: int) -> float:
        for number in range(units):
            mppi(states[number % len(states)]).cpu()
        return units

    return Work(run, {"flops": operations("plan", config, sizes_of(log))})


# ---- distillation


def distill(options: Mapping[str, Any]) -> Work:
    """Updates of step 5 on the log alone; layers, width, heads, context, batch, tokens. Items are windows."""
    from ipd_ray.distill.fit import Corpus, DistillTrainer

    log = log_of(STEPS)
    policy = PolicyConfig(
        layers=options["layers"], width=options["width"], heads=options["heads"], context=options["context"],
        tokens=options["tokens"],
    )  # fmt: skip
    config = RunConfig(policy=policy, distill=DistillConfig(updates=10**9, batch_size=options["batch"]))
    corpus = Corpus.of(material_of(log), policy, config.distill)
    trainer = DistillTrainer(corpus, None, policy, config.distill, seed=0, device=options["device"])
    about = {"flops": operations("distill", config, sizes_of(log)) / options["batch"]}
    return training(trainer, 10**9, options["batch"], options, 2, about)


def material_of(log: Log) -> Any:
    """What is distilled, of the log alone."""
    from ipd_ray.data.shards import Segments
    from ipd_ray.distill.fit import Material
    from ipd_ray.distill.windows import Prompts

    t = log.transitions
    segments, steps = Segments.none(t.observation_dim, t.spec.action_dim), len(t)
    prompts = Prompts(log.return_parts[0], np.zeros((0, segments.length), np.float32))
    return Material(
        log, segments, np.zeros(0, bool), np.zeros(0, np.int64), 0.0, prompts, np.ones(steps, np.float32),
        np.zeros((0, segments.length), np.float32), 1.0,
    )  # fmt: skip


# ---- acting

ENVIRONMENT, LIMIT = "HalfCheetah-v5", 250
"""An environment that ends no episode early, and the steps of one."""


def _acting(options: Mapping[str, Any]) -> tuple[Any, EvaluateConfig]:
    import gymnasium as gym

    from ipd_ray.artifacts import prefixed
    from ipd_ray.distill.policy import TransformerPolicy
    from ipd_ray.evaluate.acting import Policy

    try:
        environment = gym.make(ENVIRONMENT)
    except Exception as error:  # whatever Gymnasium raises where MuJoCo is missing
        raise Missing(f"{ENVIRONMENT} cannot be made here ({error}): install ipd_ray[mujoco]") from None
    observation, action = environment.observation_space.shape[0], environment.action_space.shape[0]
    transitions = transitions_of(1000, environment.spec.to_json(), observation=observation, action=action)
    log, config = prepare(transitions, DataConfig(), 0), load(PRESET)
    torch.manual_seed(0)
    policy = TransformerPolicy(observation, action, config.policy, prompted=True)
    described = {
        "spec": transitions.spec.__dict__, "reward_scale": 1.0, "discount": log.discount, "prompt": "value",
        "policy": config.policy.model_dump(), "target_return": None,
        "values": {"values": config.values.model_dump(), "observation_dim": observation, "action_dim": action},
    }  # fmt: skip
    tensors = {**prefixed("policy", policy.state_dict()),
               **prefixed("values", values_of(log, config.values, "cpu").state_dict())}  # fmt: skip
    acting = Policy(described, tensors, options["device"])
    return acting, EvaluateConfig(episodes=options["episodes"], max_steps=LIMIT)


def evaluate(options: Mapping[str, Any]) -> Work:
    """Step 7's scoring of one policy, environments made and all."""
    from ipd_ray.evaluate.episodes import evaluate as score

    policy, config = _acting(options)
    return Work(lambda units: float(sum(sum(score(policy, config)["lengths"]) for _ in range(units))))


def evaluate_one(options: Mapping[str, Any]) -> Work:
    """Ours, a baseline: the same policy, one environment after the other, a batch of one observation."""
    import gymnasium as gym

    policy, config = _acting(options)

    def run(units: int) -> float:
        steps = 0
        for _ in range(units):
            environment = gym.make(ENVIRONMENT, max_episode_steps=config.max_steps)
            for episode in range(options["episodes"]):
                policy.reset()
                observation, _ = environment.reset(seed=config.seed + episode)
                over = False
                while not over:
                    observation, _, terminated, truncated, _ = environment.step(policy.act(observation))
                    over, steps = terminated or truncated, steps + 1
            environment.close()
        return float(steps)

    return Work(run)


# ---- reading


def write_dataset(steps: int, root: Path) -> str:
    """Write the log as a Minari dataset, and return its id."""
    from ipd_ray.data.export import export_minari

    export_minari(transitions_of(steps), [], "made-up/steps-v0", root=root)
    return "made-up/steps-v0"


def load_first(options: Mapping[str, Any]) -> Work:
    """Columns from the Minari dataset in `root`, which are also kept: what the first run on a dataset does."""
    from ipd_ray.data.minari_source import load as read

    def run(units: int) -> float:
        steps = 0
        for _ in range(units):
            cache = Path(tempfile.mkdtemp(dir=options["root"]))
            try:
                steps += len(read(options["dataset"], cache=cache))
            finally:
                shutil.rmtree(cache)
        return steps

    return Work(run)


def load_again(options: Mapping[str, Any]) -> Work:
    """Columns that an earlier run kept."""
    from ipd_ray.data.minari_source import load as read

    cache = Path(options["root"]) / "kept"
    read(options["dataset"], cache=cache)
    return Work(lambda units: float(sum(len(read(options["dataset"], cache=cache)) for _ in range(units))))


def load_minari(options: Mapping[str, Any]) -> Work:
    """Minari's own iteration into the same columns."""
    import minari

    def run(units: int) -> float:
        steps = 0
        for _ in range(units):
            parts: dict[str, list[Any]] = {
                name: [] for name in ("observation", "action", "reward", "next_observation", "terminal")
            }
            for episode in minari.load_dataset(options["dataset"]).iterate_episodes():
                parts["observation"].append(episode.observations[:-1])
                parts["next_observation"].append(episode.observations[1:])
                parts["action"].append(episode.actions)
                parts["reward"].append(episode.rewards)
                parts["terminal"].append(episode.terminations)
            steps += len({name: np.concatenate(part) for name, part in parts.items()}["reward"])
        return steps

    return Work(run)


# ---- the limit


def product(options: Mapping[str, Any]) -> Work:
    """This machine's batched matrix product, (groups, rows, width) by (groups, width, width); items are floating-point
    operations."""
    device, dtype = options["device"], getattr(torch, options.get("dtype", "float32"))
    groups, rows, width = options["groups"], options["rows"], options["width"]
    x = torch.randn(groups, rows, width, device=device).to(dtype)
    w = torch.randn(groups, width, width, device=device).to(dtype)
    out = torch.empty_like(x)
    each = 2.0 * groups * rows * width * width

    def run(units: int) -> float:
        for _ in range(units):
            torch.bmm(x, w, out=out)
        synchronise(device)
        return units * each

    return Work(run)


CONTESTANTS: dict[str, Callable[[Mapping[str, Any]], Work]] = {
    f.__name__: f
    for f in (
        values, world_model, world_model_loop, plan, plan_one, distill, evaluate, evaluate_one, load_first, load_again,
        load_minari, product,
    )
}  # fmt: skip


def build(name: str, options: Mapping[str, Any]) -> Work:
    set_threads(options["threads"])
    return CONTESTANTS[name](options)


if __name__ == "__main__":
    serve(lambda: build(sys.argv[1], json.loads(sys.argv[2])))
