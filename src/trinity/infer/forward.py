"""The model's layers over the cache: the training model's own modules, with cached attention and no statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trinity.infer.attention import Step
from trinity.model.router import Routing
from trinity.model.transformer import Block, Transformer


def forward(
    model: Transformer, step: Step, *, return_experts: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features after the final norm [N, D] and, on request, the chosen experts [N, L, k] int64."""
    with _watched_routers(model, return_experts) as indices:
        turn = model.rotation(step.positions_1N)
        x_1ND = model.embed_tokens(step.tokens_1N)
        for block, plan in zip(model.layers, step.plans(), strict=True):
            assert isinstance(block, Block)
            x_1ND = x_1ND + block.attn_post_norm(block.attn(block.attn_norm(x_1ND), turn, plan))
            x_1ND, _ = block.feed_forward(x_1ND)
        x_ND = model.norm(x_1ND)[0]
    return x_ND, torch.stack(indices, dim=1) if indices else None


@contextmanager
def _watched_routers(model: Transformer, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """A list that receives each MoE layer's chosen experts [N, k] while the model runs."""
    indices: list[torch.Tensor] = []

    def watch(_module: torch.nn.Module, _args: object, routing: Routing) -> None:
        indices.append(routing.indices_Nk)

    blocks = [block for block in model.layers if isinstance(block, Block) and block.moe is not None]
    hooks = [block.moe.router.register_forward_hook(watch) for block in blocks if wanted and block.moe is not None]
    try:
        yield indices
    finally:
        for hook in hooks:
            hook.remove()
