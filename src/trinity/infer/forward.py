"""The model's layers over the cache: the training model's own modules, with cached attention and no statistics."""

from typing import Any

import torch
from torch import nn

from trinity.infer.attention import Step
from trinity.model import Transformer
from trinity.model.rope import rotation


def forward(model: Transformer, step: Step, *, return_experts: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features after the final norm [1, N, D] and, on request, the chosen experts [N, L, k] int64."""
    config = model.config
    turn = rotation(step.positions_1N, config.head_dim, config.rope_theta)
    x_1ND = model.embed(step.tokens_1N)
    if config.embed_scale:
        x_1ND = x_1ND * config.dim**0.5
    experts: list[torch.Tensor] = []
    for block, plan in zip(model.layers, step.plans(), strict=True):
        x_1ND = x_1ND + block.attn_post_norm(block.attn(block.attn_norm(x_1ND), turn, plan))
        h_1ND = block.ffn_norm(x_1ND)
        if block.moe is None:
            y_1ND = block.ffn(h_1ND)
        else:
            y_1ND, indices_Nk = _mixture(block.moe, h_1ND)
            experts.append(indices_Nk)
        x_1ND = x_1ND + block.ffn_post_norm(y_1ND)
    return model.norm(x_1ND), torch.stack(experts, dim=1) if return_experts and experts else None


def _mixture(moe: Any, x_1ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_ND = x_1ND[0]
    routing = moe.router(x_ND)
    y_ND = moe.dispatcher(x_ND, routing.indices_Nk, routing.weights_Nk, moe.experts)
    if moe.shared is not None:
        y_ND = y_ND + moe.shared(x_ND)
    return y_ND[None], routing.indices_Nk
