"""A filmstrip of the policy: an evaluation episode again, in an environment that renders.

Renderers can take the process with them (GL), so all but Gymnasium's plain ones run in a process of their own:
`python -m ipd_ray.report.film` reads its task as JSON from stdin and answers with JSON on stdout.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ipd_ray.environment import variables
from ipd_ray.errors import UserError

FRAMES = 10
_WIDTH = 220
_PLAIN = "gymnasium.envs.classic_control"
_QUIET = {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy", "PYGAME_HIDE_SUPPORT_PROMPT": "1"}


@dataclass(frozen=True)
class Film:
    """Some frames of one episode."""

    frames: list[str]
    """PNG, base64."""
    steps: list[int]
    collected: list[float]
    """Raw reward collected before each frame."""
    length: int
    seed: int
    whole: bool
    """False where time was up before the episode was over."""


def film(
    policy: Path, environment: str | None, seed: int, max_steps: int | None, *, candidates: int = 1,
    candidate_std: float = 0.1, seconds: float = 25.0,
) -> Film | str:
    """Return the film, or why there is none; never raises for what an environment does.

    policy: a policy artifact. environment, seed, max_steps, candidates, candidate_std: as in the evaluation. seconds:
    what the episode may take.
    """
    from ipd_ray.evaluate.episodes import portable

    try:
        env_spec, function = portable(_environment_text(policy) or None, environment)
    except UserError as error:
        return str(error)
    task: dict[str, Any] = {
        "policy": str(policy),
        "environment": function,
        "env_spec": env_spec,
        "seed": seed,
        "max_steps": max_steps,
        "candidates": candidates,
        "candidate_std": candidate_std,
        "seconds": seconds,
    }
    if function is None and env_spec is None:
        return "the dataset names no environment; evaluate.environment gives one"
    if env_spec and _is_plain(env_spec):
        with variables(_QUIET), _one_thread():
            return record_or_reason(**task)
    if "MUJOCO_GL" in os.environ or "DISPLAY" in os.environ or sys.platform != "linux":
        return _in_process(task, _QUIET, seconds)
    reasons = []
    for gl in ("egl", "osmesa"):
        found = _in_process(task, {**_QUIET, "MUJOCO_GL": gl}, seconds)
        if isinstance(found, Film) or "mujoco" not in (env_spec or ""):
            return found
        reasons.append(f"{gl}: {found}")
    return "; ".join(reasons)


def _environment_text(policy: Path) -> str:
    try:
        return str(json.loads((policy / "artifact.json").read_text())["spec"].get("env_spec") or "")
    except (OSError, ValueError, KeyError, AttributeError):
        return ""


def _is_plain(env_spec: str) -> bool:
    try:
        return str(json.loads(env_spec).get("entry_point", "")).startswith(_PLAIN)
    except (ValueError, AttributeError):
        return False


def _in_process(task: dict[str, Any], variables: dict[str, str], seconds: float) -> Film | str:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ipd_ray.report.film"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=seconds + 35.0,
            env={**os.environ, **variables},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the renderer did not answer within {seconds + 35:.0f} s"
    except OSError as error:
        return f"the renderer could not be started ({error.strerror})"
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        return f"the renderer ended with exit code {done.returncode}"
    return answer if isinstance(answer, str) else Film(**answer)


def record_or_reason(
    policy: Path | str, environment: str | None, seed: int = 0, max_steps: int | None = None, seconds: float = 25.0,
    **ranked: Any,
) -> Film | str:
    """Play one episode in this process; return the film, or why there is none. ranked: see `record`."""
    try:
        return record(str(policy), environment, seed, max_steps, seconds, **ranked)
    except Exception as error:  # whatever a third party's renderer raises, the report is made
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def record(
    policy: str, environment: str | None, seed: int, max_steps: int | None, seconds: float, *,
    env_spec: str | None = None, candidates: int = 1, candidate_std: float = 0.1,
) -> Film | str:
    """Play one episode and keep evenly spaced frames. env_spec: where it is not the policy's own."""
    from ipd_ray.evaluate.acting import Policy
    from ipd_ray.evaluate.episodes import NoEnvironment, environment_maker

    acting = Policy.load(policy, device="cpu", candidates=candidates, candidate_std=candidate_std)
    spec = replace(acting.spec, env_spec=env_spec or acting.spec.env_spec)
    try:
        make = environment_maker(spec, environment, max_steps)
    except NoEnvironment as error:
        return str(error)
    env = make(render_mode="rgb_array")
    try:
        observation, _ = env.reset(seed=seed)
        acting.reset()
        kept: list[tuple[int, float, Any]] = []
        stride, step, total, reward, over = 1, 0, 0.0, None, False
        until = time.monotonic() + seconds
        while True:
            if step % stride == 0 or over:
                kept.append((step, total, env.render()))
            if len(kept) >= 8 * FRAMES:  # the length is not known beforehand: keep every second, go on at half the rate
                kept, stride = kept[::2], stride * 2
            if over or time.monotonic() > until:
                break
            observation, reward, terminated, truncated, _ = env.step(acting.act(observation, reward))
            total, step, over = total + float(reward), step + 1, bool(terminated or truncated)
    finally:
        env.close()
    if kept[0][2] is None:
        return "the environment returns no frame for render_mode=rgb_array"
    count = min(FRAMES, len(kept))
    chosen = [kept[round(i * (len(kept) - 1) / max(count - 1, 1))] for i in range(count)]
    return Film(
        [_png(frame) for _, _, frame in chosen], [s for s, _, _ in chosen], [c for _, c, _ in chosen], step, seed, over
    )


def _png(frame: Any) -> str:
    from PIL import Image

    image = Image.fromarray(frame).convert("RGB")
    height = max(1, round(image.height * _WIDTH / image.width))
    small = image.resize((_WIDTH, height), Image.Resampling.LANCZOS).quantize(128)
    data = io.BytesIO()
    small.save(data, format="PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One state a step: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Answer one task."""
    with _one_thread():
        answer = record_or_reason(**json.loads(sys.stdin.read()))
    print("\n" + json.dumps(asdict(answer) if isinstance(answer, Film) else answer))


if __name__ == "__main__":
    main()
