"""The policy as its users hold it: observations in, actions out, in the environment's own units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ipd_ray.artifacts import Artifact, stripped
from ipd_ray.config import PolicyConfig
from ipd_ray.data.transitions import Floats, Spec, Transitions
from ipd_ray.distill.policy import TransformerPolicy
from ipd_ray.errors import UserError
from ipd_ray.layers import block_generator
from ipd_ray.storage import ARTIFACT, Folder
from ipd_ray.training import resolve_device
from ipd_ray.values.fit import frozen, load_values

_STREAM = 88


class Policy:
    """A distilled policy with all that it needs: V for the prompt, normaliser, reward transform and spaces.

    policy = Policy.load("runs/mine/policy"); policy.reset(); action = policy.act(observation)

    One policy object drives one environment or a batch of them; it remembers the last K steps of each.
    """

    def __init__(
        self,
        described: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        device: str = "auto",
        *,
        candidates: int = 1,
        candidate_std: float = 0.1,
    ):
        """candidates: actions that Q ranks at every step, the policy's own and some with noise of `candidate_std`."""
        device = resolve_device(device)
        self.spec = Spec(**described["spec"])
        self.reward_scale = float(described["reward_scale"])
        """Raw rewards times this are the units of V."""
        self.discount = float(described["discount"])
        self.prompt = str(described["prompt"])
        # Policies saved before there was a choice have three tokens a step, and timesteps of the episode.
        config = PolicyConfig.model_validate({"tokens": "separate", "timesteps": "episode", **described["policy"]})
        values = described["values"]
        model = TransformerPolicy(
            values["observation_dim"], values["action_dim"], config, prompted=self.prompt != "none"
        )
        # Nor had they a step from which on time is not told apart.
        model.load_state_dict({"last_timestep": model.last_timestep, **stripped("policy", tensors)})
        self._model = frozen(model, device)
        self._values = load_values(stripped("values", tensors), values, device)
        self._target = described.get("target_return")
        self._device, self._context, self._rows = device, config.context, 0
        self._candidates, self._candidate_std = candidates, candidate_std

    @classmethod
    def load(
        cls, path: str | Path, device: str = "auto", *, candidates: int = 1, candidate_std: float = 0.1
    ) -> Policy:
        """Read a policy artifact: the `policy` folder of a run, by path or URI. Raises UserError where there is none.

        candidates, candidate_std: as in `evaluate.candidates`; 1 takes the policy's own action.
        """
        folder = Folder.of(path)
        if folder.exists(f"policy/{ARTIFACT}"):
            folder = folder / "policy"
        if not folder.exists(ARTIFACT):
            raise UserError(f"{path} holds no policy: give the folder of a finished run, or its policy/ folder.")
        artifact = Artifact(folder)
        described = artifact.described
        if described.get("step") not in ("distill", "choose"):
            raise UserError(
                f"{path} is the artifact of step {described.get('step')!r}, not a policy: give a run's policy/."
            )
        return cls(described, artifact.tensors(), device, candidates=candidates, candidate_std=candidate_std)

    def reset(self, mask: Any = None) -> None:
        """Forget the past: of every environment, or of those where `mask` (n,) is True."""
        if mask is None or self._rows == 0:
            self._rows = 0
            return
        rows = torch.as_tensor(np.asarray(mask, bool), device=self._device)
        if rows.shape != (self._rows,):
            raise UserError(
                f"reset(mask): mask has shape {tuple(rows.shape)}, but {self._rows} environments are acted in."
            )
        self._steps[rows] = 0
        self._asked[rows] = self._start_target()

    def act(self, observation: Any, reward: Any = None) -> NDArray[Any]:
        """Return the action for one observation or a batch (n, ...), in the environment's units, dtype and bounds.

        reward: of the step before, raw; lowers the target of prompt=fixed as it is collected, not looked at otherwise.
        """
        flat = self._flattened("act", observation)
        raw = self.act_flat(np.atleast_2d(flat), reward)
        return raw[0] if flat.ndim == 1 else raw

    def _flattened(self, method: str, observation: Any) -> Floats:
        """Observations as (O,) or (n, O). Raises UserError for what is none: one NaN would stay in the context."""
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
            raise UserError(f"{method}(observation): (observation, info), as reset() returns them: give the first.")
        try:
            flat = self.spec.flatten_observation(observation)
            if flat.ndim > 2:
                raise ValueError(f"{flat.ndim} axes")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            known = self._model.observation_mean.shape[0]
            try:
                given = f"shape {np.shape(observation)}"
            except ValueError:  # a list of unlike things
                given = f"type {type(observation).__name__}"
            raise UserError(
                f"{method}(observation): of {given}, but the policy knows {known} entries "
                f"({self.spec.observation_space}): give one observation of its environment, or a batch."
            ) from error
        if not (finite := np.isfinite(flat)).all():
            entry = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise UserError(
                f"{method}(observation): entry {entry} is {flat[entry]}: repair the observation, or call reset() where "
                "the episode is over."
            )
        return flat

    def act_flat(self, observation: Floats, reward: Any = None) -> NDArray[Any]:
        """As `act`, for a batch of observations that are flattened already, (n, O)."""
        s = torch.from_numpy(observation).to(self._device)
        if self._rows == 0:
            self._begin(len(s))
        elif len(s) != self._rows:
            raise UserError(f"act(observation): {len(s)} environments after {self._rows}: call reset() between them.")
        if reward is not None:
            collected = torch.as_tensor(np.atleast_1d(np.asarray(reward, np.float32)), device=self._device)
            if collected.shape != self._asked.shape:
                raise UserError(
                    f"act(reward): of shape {tuple(collected.shape)} for {self._rows} environments: give one each."
                )
            self._asked -= torch.where(self._steps > 0, collected, 0.0)  # not what ended an episode before a reset
        return self.spec.unscale_action(self._decide(s).cpu().numpy())

    def value(self, observation: Any) -> NDArray[np.float32]:
        """Return V of observations in raw reward units (discounted)."""
        s = torch.from_numpy(self._flattened("value", observation)).to(self._device)
        return np.asarray(self._values.v(s).cpu().numpy() / self.reward_scale, np.float32)

    @torch.no_grad()
    def along(self, t: Transitions, rows: int = 4096) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return what the policy would do along the log, were the log its past: actions in [-1, 1] of every step (T, A)
        and of the observation after each episode's last step (E, A). Candidates are not ranked. rows: at a time."""
        place = np.arange(len(t)) + t.episode  # episode after episode, each with one position more than steps
        last = t.episode_start[1:] - 1
        at_end = place[last] + 1
        size = len(t) + t.episodes

        def spread(of_steps: NDArray[Any], of_ends: NDArray[Any] | float) -> Tensor:
            out = np.zeros((size, *of_steps.shape[1:]), of_steps.dtype)
            out[place], out[at_end] = of_steps, of_ends
            return torch.from_numpy(out).to(self._device)

        observation, action = spread(t.observation, t.next_observation[last]), spread(t.action, 0.0)
        timestep = spread(t.timestep, t.timestep[last] + 1)
        begin = spread(place - t.timestep, (place - t.timestep)[last])
        if self.prompt == "fixed":
            collected = np.cumsum(t.reward.astype(np.float64))
            before = collected - t.reward - np.append(0.0, collected)[t.episode_start[:-1]][t.episode]
            prompt = spread(self._start_target() - before, self._start_target() - (before + t.reward)[last]).float()
        else:
            prompt = torch.cat([self._prompts(o) for o in observation.split(65_536)])
        out = []
        for ends in torch.arange(size, device=self._device).split(rows):
            position = ends[:, None] + torch.arange(1 - self._context, 1, device=self._device)
            valid = position >= begin[ends][:, None]
            position = torch.where(valid, position, ends[:, None])
            past = [torch.where(valid[..., None], c[position], 0.0) for c in (observation, action)]
            asked, when = (torch.where(valid, c[position], 0) for c in (prompt, timestep))
            out.append(self._model(asked, *past, when, valid)[:, -1].cpu().numpy())
        every = np.concatenate(out)
        return every[place], every[at_end]

    def _prompts(self, s: Tensor) -> Tensor:
        """(N,) what is asked for in observations (N, O), where that is a function of them alone."""
        if self.prompt == "value":
            return self._values.v(s)
        return self._values.return_expectiles(s)[1] if self.prompt == "outcome" else torch.zeros_like(s[:, 0])

    def _best_by_q(self, s_NO: Tensor, action_NA: Tensor) -> Tensor:
        """The best by min Q of the policy's action and noisy ones around it. The same noise after every reset."""
        shape = (self._candidates, *action_NA.shape)
        noise = torch.randn(shape, generator=block_generator(0, _STREAM, self._acted)).to(action_NA.device)
        noise[0] = 0.0
        self._acted += 1
        actions = (action_NA + self._candidate_std * noise).clamp(-1.0, 1.0)
        best = self._values.q(s_NO.expand(self._candidates, -1, -1), actions).amin(0).argmax(0)
        return actions[best, torch.arange(len(best), device=best.device)]

    def _start_target(self) -> float:
        return float(self._target) if self._target is not None else 0.0

    def _begin(self, rows: int) -> None:
        K, device = self._context, self._device
        self._rows, self._acted = rows, 0
        self._observation = torch.zeros(rows, K, self._model.observation_mean.shape[0], device=device)
        self._action = torch.zeros(rows, K, self.spec.action_dim, device=device)
        self._prompt = torch.zeros(rows, K, device=device)
        self._steps = torch.zeros(rows, dtype=torch.int64, device=device)
        self._asked = torch.full((rows,), self._start_target(), device=device)

    @torch.no_grad()
    def _decide(self, s: Tensor) -> Tensor:
        for past in (self._observation, self._action, self._prompt):
            past[:, :-1] = past[:, 1:].clone()
        self._observation[:, -1] = s
        self._action[:, -1] = 0.0
        self._prompt[:, -1] = self._asked if self.prompt == "fixed" else self._prompts(s)
        back = torch.arange(1 - self._context, 1, device=self._device)
        valid = self._steps[:, None] + back >= 0
        timestep = (self._steps[:, None] + back).clamp(min=0)
        action = self._model(self._prompt, self._observation, self._action, timestep, valid)[:, -1]
        if self._candidates > 1:
            action = self._best_by_q(s, action)
        self._action[:, -1] = action
        self._steps += 1
        return action
