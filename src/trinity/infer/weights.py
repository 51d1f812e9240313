"""The model's matrices as the kernels of `trinity.ops.decode` read them: the training model's own, or FP8 copies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trinity.base.errors import UserError
from trinity.config.model import LayerType
from trinity.model.linear import FeedForward
from trinity.model.transformer import Block, Transformer
from trinity.ops.block_fp8 import BLOCK, dequantize_blocks, quantize_blocks
from trinity.ops.decode.experts import ExpertWeights


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in] or [experts, out, in]; FP8 blocks where there is a scale."""

    weight: Tensor
    scale: Tensor | None = None

    def wide(self, dtype: torch.dtype) -> Tensor:
        """As a plain matrix, for products of many rows."""
        return self.weight if self.scale is None else dequantize_blocks(self.weight, self.scale).to(dtype)


@dataclass(frozen=True)
class LayerWeights:
    """One layer."""

    kind: LayerType
    attn_norm: Tensor
    attn_post: Tensor
    ffn_norm: Tensor
    ffn_post: Tensor
    q_norm: Tensor
    k_norm: Tensor
    qkvg: Matrix
    o: Matrix
    dense: tuple[Matrix, Matrix] | None
    """gate_up and down of a dense layer."""
    router: Tensor | None
    bias: Tensor | None
    experts: tuple[Matrix, Matrix] | None
    """gate_up and down of all routed experts."""
    shared: tuple[Matrix, Matrix] | None
    gathered: ExpertWeights | None
    """The same for the kernels that gather experts."""


@torch.no_grad()
def layer_weights(block: Block, *, fp8: bool) -> LayerWeights:
    """Views of a layer's tensors; with `fp8` its matrices, except the router's, as quantised copies."""

    def matrix(weight: Tensor) -> Matrix:
        return Matrix(*quantize_blocks(weight)) if fp8 else Matrix(weight.detach())

    def both(module: FeedForward) -> tuple[Matrix, Matrix]:
        return matrix(module.gate_up.weight), matrix(module.down.weight)

    attn, moe = block.attn, block.moe
    assert isinstance(attn.q_norm.weight, Tensor)
    assert isinstance(attn.k_norm.weight, Tensor)
    experts, shared, gathered = None, None, None
    if moe is not None:
        experts = (matrix(moe.experts.gate_up), matrix(moe.experts.down))
        shared = None if moe.shared is None else both(moe.shared)
        plain = None if shared is None else (shared[0].weight, shared[1].weight)
        scales = [m.scale for m in (*experts, *(shared or experts)) if m.scale is not None]
        gathered = ExpertWeights(experts[0].weight, experts[1].weight, plain, tuple(scales) or None)
    return LayerWeights(
        kind="local" if block.kind == "local" else "global",
        attn_norm=block.attn_norm.weight.detach(),
        attn_post=block.attn_post_norm.weight.detach(),
        ffn_norm=block.ffn_norm.weight.detach(),
        ffn_post=block.ffn_post_norm.weight.detach(),
        q_norm=attn.q_norm.weight.detach(),
        k_norm=attn.k_norm.weight.detach(),
        qkvg=matrix(attn.qkvg.weight),
        o=matrix(attn.o.weight),
        dense=None if block.ffn is None else both(block.ffn),
        router=None if moe is None else moe.router.weight.detach(),
        bias=None if moe is None else moe.router.bias,
        experts=experts,
        shared=shared,
        gathered=gathered,
    )


def check_fp8(model: Transformer) -> None:
    """Raises UserError when the model's matrices do not consist of whole blocks, as the kernels want them."""
    config = model.config
    sides = {
        "dim": config.dim,
        "num_heads * head_dim": config.num_heads * config.head_dim,
        "num_kv_heads * head_dim": config.num_kv_heads * config.head_dim,
        "expert_dim": config.expert_dim,
        "ffn_dim": config.ffn_dim,
    }
    for name, side in sides.items():
        if side % BLOCK:
            raise UserError(f"FP8 weights come in blocks of {BLOCK}, but {name} is {side}; use the model's own type")


def pointers(model: Transformer) -> tuple[int, ...]:
    """Where the model's tensors lie: other addresses mean that views of them are stale."""
    return tuple(tensor.data_ptr() for tensor in model.state_dict(keep_vars=True).values())
