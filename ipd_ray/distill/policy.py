"""The causal Transformer. Shapes: B windows, K context steps, O observation, A action, N tokens, W width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipd_ray.config import PolicyConfig


class Block(nn.Module):
    """Pre-norm attention and perceptron."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BNW: Tensor, mask: Tensor | None, noise_B: Tensor | None) -> Tensor:
        B, N, W = x_BNW.shape
        q, k, v = self.qkv(self.norm_1(x_BNW)).reshape(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        attended = self.merge(attended.transpose(1, 2).reshape(B, N, W))
        x_BNW = x_BNW + _dropped(attended, self.dropout, noise_B)
        wide = F.relu(self.up(self.norm_2(x_BNW)))  # as Decision Transformer; GELU costs a sixth of a step on a CPU
        return x_BNW + _dropped(self.down(wide), self.dropout, noise_B)


class TransformerPolicy(nn.Module):
    """Prompts, observations and actions of K steps to the action at every observation.

    tokens=step: one token a step, the sum of the embeddings of prompt_t, s_t and a_{t-1}; the action before a window's
    first step is not known: zero. tokens=separate: three a step, (prompt_t, s_t, a_t), as Decision Transformer
    (arXiv:2106.01345); without a prompt its token is left out. A token's only position is its timestep's embedding,
    which counts from the start of the window or of the episode (`PolicyConfig.timesteps`).
    """

    observation_mean: Tensor
    observation_std: Tensor
    prompt_mean: Tensor
    prompt_std: Tensor
    prompt_low: Tensor
    prompt_high: Tensor
    last_timestep: Tensor

    def __init__(self, observation_dim: int, action_dim: int, config: PolicyConfig, *, prompted: bool):
        super().__init__()
        self.prompted, self.separate = prompted, config.tokens == "separate"
        self.in_window = config.timesteps == "window"
        self.embed_observation = nn.Linear(observation_dim, config.width)
        self.embed_action = nn.Linear(action_dim, config.width)
        self.embed_prompt = nn.Linear(1, config.width) if prompted else None
        self.embed_timestep = nn.Embedding(config.told_apart, config.width)
        nn.init.normal_(self.embed_timestep.weight, std=0.02)
        self.norm_in, self.norm_out = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.head = nn.Linear(config.width, action_dim)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("last_timestep", torch.tensor(config.told_apart - 1))
        for name, value in (("mean", 0.0), ("std", 1.0), ("low", -1e9), ("high", 1e9)):
            self.register_buffer(f"prompt_{name}", torch.tensor(value))

    def forward(
        self,
        prompt_BK: Tensor,
        observation_BKO: Tensor,
        action_BKA: Tensor,
        timestep_BK: Tensor,
        valid_BK: Tensor,
        noise_B: Tensor | None = None,
    ) -> Tensor:
        """Return actions (B, K, A) inside (-1, 1).

        prompt_BK: in its own units, clipped here to the range seen in training. observation_BKO: raw. action_BKA: the
        last one is not looked at. timestep_BK: of the episode; not looked at where timesteps count in the window. Those
        after `last_timestep` share its embedding. valid_BK: False on the left padding before an episode's start.
        noise_B: odd int32 a window, with which dropout is done as `_dropped` says; None: no dropout.
        """
        if self.in_window:
            timestep_BK = (valid_BK.cumsum(1) - 1).clamp(min=0)
        time = self.embed_timestep(torch.minimum(timestep_BK, self.last_timestep))
        observation = self.embed_observation((observation_BKO - self.observation_mean) / self.observation_std)
        prompt = None
        if self.embed_prompt is not None:
            clipped = torch.minimum(torch.maximum(prompt_BK, self.prompt_low), self.prompt_high)
            prompt = self.embed_prompt(((clipped - self.prompt_mean) / self.prompt_std)[..., None])
        if self.separate:
            parts = [observation, self.embed_action(action_BKA)]
            tokens = [part + time for part in (parts if prompt is None else [prompt, *parts])]
            kinds = len(tokens)
            x_BNW = torch.stack(tokens, 2).flatten(1, 2)[:, :-1]  # the last action is what is asked for
        else:
            kinds = 1
            before = F.pad(torch.where(valid_BK[:, :-1, None], action_BKA[:, :-1], 0.0), (0, 0, 1, 0))
            x_BNW = observation + self.embed_action(before) + time + (0.0 if prompt is None else prompt)
        x_BNW = self.norm_in(x_BNW)
        mask = None if bool(valid_BK.all()) else _mask(valid_BK.repeat_interleave(kinds, 1)[:, : x_BNW.shape[1]])
        for block in self.blocks:
            x_BNW = block(x_BNW, mask, noise_B)
        at_observation = x_BNW[:, max(kinds - 2, 0) :: kinds]
        return torch.tanh(self.head(self.norm_out(at_observation)))


def _dropped(x_BNW: Tensor, rate: float, noise_B: Tensor | None) -> Tensor:
    """Dropout whose mask is the same for a window whichever batch it is a part of, at the cost of the usual one.

    A table of 32-bit words, drawn from torch's global generator for all windows, is multiplied by each window's odd
    number modulo 2^32: uniform again, so each value is kept with probability 1 - rate, windows being as good as
    independent.
    """
    if noise_B is None or rate == 0:
        return x_BNW
    table_NW = torch.randint(-(2**31), 2**31, x_BNW.shape[1:], dtype=torch.int32, device=x_BNW.device)
    kept = noise_B[:, None, None] * table_NW >= int(2**32 * rate) - 2**31
    return torch.where(kept, x_BNW * (1.0 / (1.0 - rate)), 0.0)


def _mask(valid_BN: Tensor) -> Tensor:
    """(B, 1, N, N): causal, nothing looks at padding but itself (a row without any key would be NaN)."""
    N = valid_BN.shape[1]
    causal = torch.ones(N, N, dtype=torch.bool, device=valid_BN.device).tril()
    itself = torch.eye(N, dtype=torch.bool, device=valid_BN.device)
    return ((causal & valid_BN[:, None, :]) | itself)[:, None]
