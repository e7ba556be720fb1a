"""What is the planner worth, or the actor that learned its score? Each acts in the real environment, beside the
behaviour policy that it starts from.

    python benchmarks/scores/act.py RUN_FOLDER [--vary planner.horizon=8] [--vary "planner.kind=mpc"] [--episodes 10]
                                    [--inside 10]

RUN_FOLDER is a folder of `ipd-ray run` whose values and world model are in its store. A policy that is distilled from
plans can hardly be better than the planner: where this number is below the behaviour policy's, imagination cannot pay.
Each `--vary` is one planner, given as settings separated by blanks; without any, the run's own. An actor, where the run
has one, acts as it is.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ipd_ray import config as configs
from ipd_ray.api import job_of
from ipd_ray.config import EvaluateConfig, PlannerConfig, build
from ipd_ray.data.transitions import Log
from ipd_ray.errors import UserError
from ipd_ray.evaluate.episodes import evaluate
from ipd_ray.imagine.planner import plan
from ipd_ray.pipeline import inside_of, judge_of
from ipd_ray.runs import open_run
from ipd_ray.steps import actor_of, values_of, world_model_of
from ipd_ray.training import set_threads


class Acting:
    """MPC in the world model at every step of the real environment; where planner is None, `acts`: the behaviour policy
    if not given."""

    def __init__(self, log: Log, values: Any, world_model: Any, planner: PlannerConfig | None, acts: Any = None):
        self.spec, self.discount, self._scale = log.transitions.spec, log.discount, log.reward_scale
        self._values, self._world_model, self._planner = values, world_model, planner
        self._acts, self._unit = acts or values, torch.from_numpy(log.action_unit)
        self._generator = torch.Generator().manual_seed(0)

    def reset(self, mask: Any = None) -> None:
        """Nothing is remembered."""

    def act(self, observation: Any, reward: Any = None) -> Any:
        return self.act_flat(self.spec.flatten_observation(observation))

    def act_flat(self, observation: Any, reward: Any = None) -> Any:
        s = torch.from_numpy(observation)
        if self._planner is None:
            return self.spec.unscale_action(self._acts.act(s).numpy())
        planned = plan(
            s, self._world_model, self._values, self._planner, discount=self.discount, generator=self._generator,
            action_unit=self._unit,
        )
        return self.spec.unscale_action(planned.action.numpy())

    def value(self, observation: Any) -> Any:
        s = torch.from_numpy(self.spec.flatten_observation(observation))
        return self._values.v(s).numpy() / self._scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder whose values and world model are there")
    parser.add_argument("--vary", action="append", default=[], help="settings of one planner, separated by blanks")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--inside", type=int, default=0, help="whole episodes inside the world model beside")
    args = parser.parse_args()
    set_threads(1)
    run = open_run(args.run)
    job, config = job_of(run), build(run.config)
    log = job.log.load()
    values, world_model = values_of(job.values, "cpu"), world_model_of(str(run.artifact("world_model")), "cpu")
    planners: dict[str, PlannerConfig | None] = {"behaviour policy": None}
    for words in args.vary or [""]:
        changed = configs.load(None, None, [f"planner.{k}={v}" for k, v in config.planner] + words.split())
        planners[f"planner {words}".strip()] = changed.planner
    if "actor" in run.links:
        planners["actor"] = None
    judge = judge_of(config).model_copy(update={"episodes": args.inside or 1})
    inside = inside_of(config, judge, job.log, str(run.artifact("world_model")))
    for name, planner in planners.items():
        if planner is not None and planner.kind == "actor":
            continue
        acts = actor_of(str(run.artifact("actor")), "cpu") if name == "actor" else None
        acting = Acting(log, values, world_model, planner, acts)
        found = evaluate(acting, EvaluateConfig(episodes=args.episodes))
        if args.inside:
            returns, _, halted = inside.play(acting, "cpu")
            print(f"{name}, inside the world model: {returns.mean():.0f}, {100 * halted:.0f} % halted", flush=True)
        print(
            f"{name}: return {found['return_mean']:.0f} +- {found['return_std']:.0f} (std over episodes), "
            f"discounted {found['discounted_mean']:.0f}, {sum(found['lengths']) / len(found['lengths']):.0f} steps",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
