"""What the Transformer may look at, and what it may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ipd_ray.config import PolicyConfig
from ipd_ray.distill.policy import TransformerPolicy, _dropped

B, K, O, A = 3, 5, 4, 2  # noqa: E741


TOKENS = pytest.mark.parametrize("tokens", ["step", "separate"])


def network(prompted: bool = True, **options: Any) -> TransformerPolicy:
    torch.manual_seed(0)
    shape = {"context": K, "layers": 2, "heads": 2, "width": 16, "dropout": 0.5}
    config = PolicyConfig.model_validate({**shape, **options})
    model = TransformerPolicy(O, A, config, prompted=prompted).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)  # its own start is too small to tell outputs apart
    return model


def window(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "prompt": torch.randn(B, K, generator=g), "observation": torch.randn(B, K, O, generator=g),
        "action": torch.rand(B, K, A, generator=g), "timestep": torch.arange(10, 10 + K).expand(B, -1),
        "valid": torch.ones(B, K, dtype=torch.bool),
    }


def actions(model: TransformerPolicy, parts: dict[str, Tensor], **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(*{**parts, **changes}.values())


def changed(column: Tensor, step: int) -> Tensor:
    """A column that is another one from a step on."""
    other = column.clone()
    other[:, step:] = other[:, step:] * -2.0 + 3.0
    return other


@TOKENS
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("step", range(1, K))
def test_the_future_changes_nothing(prompted: bool, padded: bool, step: int, tokens: str):
    model, parts = network(prompted, tokens=tokens), window()
    parts["valid"][0, 0] = not padded
    before = actions(model, parts)
    later = {name: changed(parts[name], step) for name in ("prompt", "observation", "action")}
    after = actions(model, parts, **later)
    assert torch.allclose(before[:, :step], after[:, :step], atol=1e-6)
    assert (before[:, step:] - after[:, step:]).abs().min() > 1e-4


@TOKENS
def test_an_action_is_decided_without_itself_and_seen_afterwards(tokens: str):
    model, parts = network(tokens=tokens), window()
    before, after = actions(model, parts), actions(model, parts, action=changed(parts["action"], 2))
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6)
    assert (before[:, 3] - after[:, 3]).abs().min() > 1e-4


@TOKENS
@pytest.mark.parametrize("prompted", [True, False])
def test_what_stands_in_the_padding_changes_nothing(prompted: bool, tokens: str):
    model, parts, other = network(prompted, tokens=tokens), window(), window(seed=1)
    valid = torch.tensor([[False] * 3 + [True] * 2, [False] + [True] * 4, [True] * 5])
    before = actions(model, parts, valid=valid)
    replaced = {}
    for name in ("prompt", "observation", "action", "timestep"):
        mask = valid[..., None] if parts[name].ndim == 3 else valid
        replaced[name] = torch.where(mask, parts[name], other[name] * 7)
    after = actions(model, parts, **replaced, valid=valid)
    assert torch.allclose(before[valid], after[valid], atol=1e-6)
    # And a padded window is the short window.
    short = {name: values[:1, 3:] for name, values in parts.items()}
    assert torch.allclose(before[:1, 3:], actions(model, short), atol=1e-5)


@TOKENS
def test_the_prompt_matters_only_where_there_is_one(tokens: str):
    parts = window()
    for prompted in (True, False):
        model = network(prompted, tokens=tokens)
        difference = (actions(model, parts) - actions(model, parts, prompt=parts["prompt"] + 1.0)).abs().max()
        assert (difference > 1e-3) == prompted


def test_prompts_are_clipped_to_the_range_seen_in_training():
    model, parts = network(), window()
    model.prompt_low.fill_(-1.0)
    model.prompt_high.fill_(2.0)
    at, beyond = (actions(model, parts, prompt=torch.full((B, K), value)) for value in (2.0, 50.0))
    assert torch.equal(at, beyond)
    at, beyond = (actions(model, parts, prompt=torch.full((B, K), value)) for value in (-1.0, -50.0))
    assert torch.equal(at, beyond)
    assert not torch.allclose(at, actions(model, parts, prompt=torch.zeros(B, K)), atol=1e-4)


@TOKENS
def test_a_step_is_told_where_it_stands_in_the_window_and_not_in_the_episode(tokens: str):
    # Attention itself tells no order: with two steps swapped, only their positions say which came first.
    model, parts = network(tokens=tokens), window()
    parts["action"] = torch.zeros(B, K, A)
    before = actions(model, parts)
    assert torch.equal(before, actions(model, parts, timestep=parts["timestep"] + 700))
    swapped = {name: parts[name][:, [1, 0, 2, 3, 4]] for name in ("prompt", "observation")}
    assert (before[:, -1] - actions(model, parts, **swapped)[:, -1]).abs().min() > 1e-5


def test_later_timesteps_share_the_last_embedding():
    model, parts = network(timesteps="episode", max_timestep=20), window()
    late, later = (actions(model, parts, timestep=torch.full((B, K), value)) for value in (19, 5000))
    assert torch.equal(late, later)
    assert not torch.allclose(late, actions(model, parts, timestep=torch.full((B, K), 18)), atol=1e-4)


def test_timesteps_that_the_log_hardly_reaches_share_the_last_common_one():
    model, parts = network(timesteps="episode", max_timestep=20), window()
    model.last_timestep.fill_(7)
    at, late = (actions(model, parts, timestep=torch.full((B, K), value)) for value in (7, 15))
    assert torch.equal(at, late)


def test_actions_stay_inside_the_bounds():
    model, parts = network(), window()
    torch.nn.init.normal_(model.head.weight, std=3.0)
    assert actions(model, parts, observation=parts["observation"] * 1e3).abs().max() <= 1.0


def test_observations_are_taken_in_units_of_the_log():
    # (s - 5) / 2 of s' = 2 s + 5 is s.
    model, parts = network(), window()
    before = actions(model, parts)
    model.observation_mean.fill_(5.0)
    model.observation_std.fill_(2.0)
    assert torch.allclose(before, actions(model, parts, observation=parts["observation"] * 2.0 + 5.0), atol=1e-5)


def test_dropout_is_off_when_acting():
    model, parts = network(), window()
    assert torch.equal(actions(model, parts), actions(model, parts))
    noise = torch.tensor([1, -7, 12345], dtype=torch.int32)
    assert not torch.equal(actions(model, parts, noise=noise), actions(model, parts, noise=noise))


def test_dropout_keeps_its_share_and_the_mean_and_windows_apart():
    torch.manual_seed(0)
    noise = torch.randint(-(2**30), 2**30, (50,), dtype=torch.int32) * 2 + 1
    out = _dropped(torch.ones(50, 20, 64), 0.3, noise)
    kept = out > 0
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    # 64,000 values, 1280 a window: within five standard errors. Two windows both keep 0.49 of them.
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=5 * (0.21 / 64_000) ** 0.5)
    assert (kept.float().mean((1, 2)) - 0.7).abs().max() < 5 * (0.21 / 1280) ** 0.5
    both = kept.flatten(1).float() @ kept.flatten(1).float().T / 1280
    assert (both[~torch.eye(50, dtype=torch.bool)] - 0.49).abs().max() < 6 * (0.25 / 1280) ** 0.5
    assert _dropped(out, 0.3, None) is out


def test_a_window_is_dropped_out_alike_in_any_batch():
    model, parts, noise = network(), window(), torch.tensor([3, 99, -5], dtype=torch.int32)
    torch.manual_seed(1)
    whole = actions(model, parts, noise=noise)
    torch.manual_seed(1)
    part = actions(model, {name: values[1:] for name, values in parts.items()}, noise=noise[1:])
    assert torch.allclose(whole[1:], part, atol=1e-6)
