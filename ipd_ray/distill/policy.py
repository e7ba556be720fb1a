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

    def forward(self, x_BNW: Tensor, mask: Tensor | None) -> Tensor:
        B, N, W = x_BNW.shape
        q, k, v = self.qkv(self.norm_1(x_BNW)).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        attended = self.merge(attended.transpose(1, 2).reshape(B, N, W))
        x_BNW = x_BNW + F.dropout(attended, self.dropout, self.training)
        wide = F.relu(self.up(self.norm_2(x_BNW)))  # as Decision Transformer; GELU costs a sixth of a step on a CPU
        return x_BNW + F.dropout(self.down(wide), self.dropout, self.training)


class TransformerPolicy(nn.Module):
    """(prompt_t, s_t, a_t) tokens of K steps to the action at every s_t.

    A token's only position is its timestep's learned embedding. Without a prompt its token is left out.
    """

    observation_mean: Tensor
    observation_std: Tensor
    prompt_mean: Tensor
    prompt_std: Tensor
    prompt_low: Tensor
    prompt_high: Tensor

    def __init__(self, observation_dim: int, action_dim: int, config: PolicyConfig, *, prompted: bool):
        super().__init__()
        self.prompted, self.max_timestep = prompted, config.max_timestep
        self.embed_observation = nn.Linear(observation_dim, config.width)
        self.embed_action = nn.Linear(action_dim, config.width)
        self.embed_prompt = nn.Linear(1, config.width) if prompted else None
        self.embed_timestep = nn.Embedding(config.max_timestep, config.width)
        nn.init.normal_(self.embed_timestep.weight, std=0.02)
        self.norm_in, self.norm_out = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.head = nn.Linear(config.width, action_dim)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        for name, value in (("mean", 0.0), ("std", 1.0), ("low", -1e9), ("high", 1e9)):
            self.register_buffer(f"prompt_{name}", torch.tensor(value))

    def forward(
        self, prompt_BK: Tensor, observation_BKO: Tensor, action_BKA: Tensor, timestep_BK: Tensor, valid_BK: Tensor
    ) -> Tensor:
        """Return actions (B, K, A) inside (-1, 1).

        prompt_BK: in its own units, clipped here to the range seen in training. observation_BKO: raw. action_BKA: the
        last one is not looked at. valid_BK: False on the left padding before an episode's start.
        """
        B, K = timestep_BK.shape
        time = self.embed_timestep(timestep_BK.clamp(max=self.max_timestep - 1))
        observation = (observation_BKO - self.observation_mean) / self.observation_std
        tokens = [self.embed_observation(observation) + time, self.embed_action(action_BKA) + time]
        if self.embed_prompt is not None:
            clipped = torch.minimum(torch.maximum(prompt_BK, self.prompt_low), self.prompt_high)
            tokens.insert(0, self.embed_prompt(((clipped - self.prompt_mean) / self.prompt_std)[..., None]) + time)
        kinds = len(tokens)
        x_BNW = self.norm_in(torch.stack(tokens, 2).reshape(B, K * kinds, -1)[:, :-1])
        mask = None if bool(valid_BK.all()) else _mask(valid_BK, kinds)
        for block in self.blocks:
            x_BNW = block(x_BNW, mask)
        at_observation = x_BNW[:, kinds - 2 :: kinds]
        return torch.tanh(self.head(self.norm_out(at_observation)))


def _mask(valid_BK: Tensor, kinds: int) -> Tensor:
    """(B, 1, N, N): causal, nothing looks at padding but itself (a row without any key would be NaN)."""
    valid_BN = valid_BK.repeat_interleave(kinds, 1)[:, :-1]
    N = valid_BN.shape[1]
    causal = torch.ones(N, N, dtype=torch.bool, device=valid_BK.device).tril()
    itself = torch.eye(N, dtype=torch.bool, device=valid_BK.device)
    return ((causal & valid_BN[:, None, :]) | itself)[:, None]
