"""Memory of the forward pass through the kernels: static buffers, and the residual stream between two kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from trinity.config import ModelConfig
from trinity.ops.decode import FEW

Turn = tuple[Tensor, Tensor]
"""Cosine and sine of the angles of each token, [N, K / 2]."""


class Buffers:
    """Static memory of decoding `batch` rows, of which those with a negative slot are idle."""

    def __init__(
        self, config: ModelConfig, batch: int, ranges: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        """ranges: those that the keys of (local, global) layers are split into."""

        def wide(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device)

        def whole(*shape: int, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(batch, *shape, dtype=kind, device=device)

        H, K, D = config.num_heads, config.head_dim, config.dim
        self.batch = batch
        self.tokens = whole(kind=torch.int64)
        self.positions, self.slots = whole(), whole() - 1
        self.x, self.x_other, self.o_out, self.y = wide(D), wide(D), wide(D), wide(D)
        self.h = wide(D).to(dtype)
        self.qkvg = wide((2 * H + 2 * config.num_kv_heads) * K)
        self.o = wide(H * K).to(dtype)
        self.parts = {n: (wide(H, n), wide(H, n), wide(H, n, K)) for n in set(ranges)}
        self.ffn_few = wide(2 * config.ffn_dim)
        self.ffn_many = self.ffn_few.to(dtype)
        few = batch <= FEW
        outputs = config.experts_per_token + int(config.num_shared_experts > 0)
        width = config.expert_dim * max(1, config.num_shared_experts)
        self.scores = wide(config.num_experts)
        shape = (config.num_moe_layers, batch, config.experts_per_token)
        self.indices = torch.zeros(shape, dtype=torch.int32, device=device)
        """Chosen experts of each MoE layer."""
        self.factors = wide(config.experts_per_token)
        self.act = wide(outputs, width).to(torch.float32 if few else dtype)
        self.outputs = torch.zeros(batch * outputs, D, device=device)
        first = torch.arange(batch, device=device)[:, None] * outputs
        self.rows = first + torch.arange(config.experts_per_token, device=device)
        self.logits = wide(config.vocab_size)
        self.logprobs = wide()


class Stream(NamedTuple):
    """The residual stream between two kernels: what is done and what the next norm will add."""

    x: Tensor
    y: Tensor | None
    post: Tensor | None
    rows: Tensor | None = None
    weights: Tensor | None = None
    shared: Tensor | None = None
