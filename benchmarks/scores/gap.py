"""How much of what a planner finds, state by state, can a network know by heart?

    python benchmarks/scores/gap.py RUN_FOLDER [--updates 6000] [--width 256] [--layers 2] [--reach 0.3]

RUN_FOLDER is a folder of `ipd-ray run` whose values and world model are in its store. A network of the actor's kind
climbs the score of the run's own values (`planner.horizon` steps, then V of the log), which gradient plans climb for
each state anew; nothing else is learned. Told as it goes: what both gain over the behaviour policy, in the score's
units, on held-out states of the log and on states where the planner gets to inside the world model; at the end the
network's return inside the world model and in the real environment. What it lacks of the planner is the price of a fast
policy. Shapes: E elites, N states, A action.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable

import torch
from act import Acting
from torch import Tensor, nn

from ipd_ray.api import job_of
from ipd_ray.config import EvaluateConfig, build
from ipd_ray.errors import UserError
from ipd_ray.evaluate.episodes import evaluate
from ipd_ray.imagine.actor import Actor, Rollouts, behaviour_policy
from ipd_ray.imagine.planner import plan, plan_score
from ipd_ray.pipeline import inside_of, judge_of
from ipd_ray.runs import open_run
from ipd_ray.steps import Imagination
from ipd_ray.training import set_threads

STATES = 400
"""Looked at, of each kind."""
EPISODES, STEPS, EVERY = 40, 200, 20
"""The planner's walk inside the world model: that many at once, for that long, every so many steps looked at."""
POOL, LENGTH, RENEWED = 500, 40, 250
"""Where the network gets to: roll-outs, steps of each, and updates until they are made anew."""
BATCH, RATE, DECAY = 256, 1e-3, 0.998


def network(rollouts: Rollouts, width: int, layers: int, reach: float) -> Actor:
    """An actor that is the behaviour policy, with a change of any size to learn."""
    actor = behaviour_policy(rollouts, reach)
    o, a = rollouts.observation.shape[1], rollouts.log.transitions.spec.action_dim
    actor.change_net = Actor(o, a, width=width, layers=layers, reach=reach).change_net
    return actor


def learn(
    actor: Actor, rollouts: Rollouts, updates: int, score: Callable[[Tensor, Actor], Tensor],
    tell: Callable[[int, Actor], None],
) -> Actor:
    """Climb the score on states of the log and on those the network gets to, half and half; return the average."""
    E, average = rollouts.dynamics.elites, copy.deepcopy(actor).requires_grad_(False)
    changed = list(actor.change_net.parameters())
    optimizer = torch.optim.Adam(changed, lr=RATE, fused=True)
    reached, spread = rollouts.observation, float(rollouts.v.std())
    for i in range(updates):
        if i % RENEWED == 0:
            rows = rollouts.rows(POOL)
            first, frontier = rows // 10, 2 * rows // 5
            s = rollouts.starts(rollouts.rng(i), first=first, frontier=frontier, anywhere=rows - first - frontier)
            s = s[torch.randperm(len(s))]
            generator = torch.Generator().manual_seed(i)
            reached = rollouts.walk(lambda s, _: average.act(s), s, LENGTH, generator).states
        drawn = [pool[torch.randint(len(pool), (BATCH // 2,))] for pool in (rollouts.observation, reached)]
        states = torch.cat(drawn)[torch.randperm(BATCH)][: BATCH // E * E]
        optimizer.param_groups[0]["lr"] = RATE * (0.51 + 0.49 * math.cos(math.pi * i / updates))
        optimizer.zero_grad(set_to_none=True)
        (-score(states.reshape(E, -1, states.shape[-1]), actor).mean() / spread).backward()
        nn.utils.clip_grad_norm_(changed, 1.0)
        optimizer.step()
        kept: list[Tensor] = list(average.change_net.parameters())
        torch._foreach_lerp_(kept, [p.detach() for p in changed], 1.0 - min(DECAY, (i + 1) / (i + 10)))
        if (i + 1) % 1000 == 0 or i + 1 == updates:
            tell(i + 1, average)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder whose values and world model are there")
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--reach", type=float, default=0.3)
    parser.add_argument("--episodes", type=int, default=10, help="real ones, at the end")
    args = parser.parse_args()
    set_threads(1)
    torch.manual_seed(0)
    run = open_run(args.run)
    job, config = job_of(run), build(run.config)
    imagination = Imagination(
        inside_of(config, judge_of(config), job.log, str(run.artifact("world_model"))), job.values, config.actor
    )
    rollouts = imagination.rollouts("cpu")
    log, values, dynamics = rollouts.log, rollouts.values, rollouts.dynamics
    planner = config.planner.model_copy(update={"kind": "gradient", "reach": args.reach})
    unit = torch.from_numpy(log.action_unit)

    def planned(s: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (N, A) and scores (N,) of plans."""
        found = plan(
            s, dynamics, values, planner, discount=log.discount, generator=torch.Generator(), action_unit=unit
        )
        return found.action, found.best_score

    def score(state: Tensor, acts: Actor) -> Tensor:
        return plan_score(
            state, lambda _, s: acts.act(s), dynamics, values.v, horizon=planner.horizon, discount=log.discount
        )

    held = log.transitions.observation[log.holdout_steps]
    looked_at = {"held out": torch.from_numpy(held[:: max(1, len(held) // STATES)][:STATES])}
    s, visited = torch.from_numpy(log.transitions.observation[log.first_steps(EPISODES)]), []
    for k in range(STEPS):
        if k % EVERY == EVERY - 1:
            visited.append(s)
        s = dynamics.step_together(s, planned(s)[0])[0]
    looked_at["the planner's"] = torch.cat(visited)[:STATES]
    best = {name: planned(s)[1] for name, s in looked_at.items()}
    actor = network(rollouts, args.width, args.layers, args.reach)
    began = time.perf_counter()

    @torch.no_grad()
    def gains(acts: Actor) -> dict[str, Tensor]:
        every = {name: s.expand(dynamics.elites, -1, -1) for name, s in looked_at.items()}
        return {name: score(s, acts).mean(0) for name, s in every.items()}

    base = gains(actor)

    def tell(updates: int, acts: Actor) -> None:
        said = [
            f"{name} states {float((now - base[name]).mean()):.2f} of {float((best[name] - base[name]).mean()):.2f}"
            for name, now in gains(acts).items()
        ]
        print(f"{updates} updates, {time.perf_counter() - began:.0f} s: gain on {', on '.join(said)}", flush=True)

    learned = learn(actor, rollouts, args.updates, score, tell)
    returns, _, halted = imagination.play(learned, "cpu")
    real = evaluate(Acting(log, values, None, None, learned), EvaluateConfig(episodes=args.episodes))
    print(
        f"inside the world model {returns.mean():.0f} ({100 * halted:.0f} % halted), "
        f"really {real['return_mean']:.0f} +- {real['return_std']:.0f} (std over episodes)"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
