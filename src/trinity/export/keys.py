"""Which public tensor lies where in ours.

Ours fuses what one product computes (q, k, v and gate; gate and up) and stacks the experts; the public layout has one
tensor for each projection and each expert. `pieces` lists every public tensor with its place, in file order, and both
directions of the conversion follow that one list.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from trinity.config import ModelConfig


class Piece(NamedTuple):
    """A public tensor and the part of ours that holds it: `ours[expert][start : start + shape[0]]`."""

    public: str
    ours: str
    shape: tuple[int, ...]
    start: int = 0
    expert: int | None = None
    fused: str | None = None
    """Name under which a file may hold all experts of the layer in one tensor, shaped like ours."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of our tensor that this piece is."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part[self.start : self.start + self.shape[0]]


def is_bias(name: str) -> bool:
    """Whether a name, ours or public, is an expert bias, which stays float32 in every file.

    Beside it our state has `moe.router.momentum`, the only tensor that the format has no name for
    (`balance_state`).
    """
    return name.endswith((".expert_bias", "moe.router.bias"))


def pieces(config: ModelConfig) -> Iterator[Piece]:
    """Every tensor of the public layout, in the order of the forward pass."""
    dim, vocab = config.dim, config.vocab_size
    yield Piece("model.embed_tokens.weight", "embed.weight", (vocab, dim))
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.attn_norm.weight", (dim,))
        yield from _attention(config, f"{theirs}.self_attn", f"{ours}.attn")
        yield Piece(f"{theirs}.post_attention_layernorm.weight", f"{ours}.attn_post_norm.weight", (dim,))
        yield Piece(f"{theirs}.pre_mlp_layernorm.weight", f"{ours}.ffn_norm.weight", (dim,))
        if i < config.num_dense_layers:
            yield from _swiglu(f"{theirs}.mlp", f"{ours}.ffn", dim, config.ffn_dim)
        else:
            yield from _moe(config, f"{theirs}.mlp", f"{ours}.moe")
        yield Piece(f"{theirs}.post_mlp_layernorm.weight", f"{ours}.ffn_post_norm.weight", (dim,))
    yield Piece("model.norm.weight", "norm.weight", (dim,))
    yield Piece("lm_head.weight", "head.weight", (vocab, dim))


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of our state dict that `pieces` fills."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces(config):
        if piece.expert is not None:
            rows = piece.start + piece.shape[0]
            shapes[piece.ours] = (config.num_experts, rows, *piece.shape[1:])
        else:
            shapes[piece.ours] = (piece.start + piece.shape[0], *piece.shape[1:])
    return shapes


def _attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    start = 0
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys), ("gate_proj", queries)):
        yield Piece(f"{theirs}.{name}.weight", f"{ours}.qkvg.weight", (rows, config.dim), start)
        start += rows
    yield Piece(f"{theirs}.o_proj.weight", f"{ours}.o.weight", (config.dim, queries))
    yield Piece(f"{theirs}.q_norm.weight", f"{ours}.q_norm.weight", (config.head_dim,))
    yield Piece(f"{theirs}.k_norm.weight", f"{ours}.k_norm.weight", (config.head_dim,))


def _swiglu(theirs: str, ours: str, dim: int, hidden: int) -> Iterator[Piece]:
    yield Piece(f"{theirs}.gate_proj.weight", f"{ours}.gate_up.weight", (hidden, dim))
    yield Piece(f"{theirs}.up_proj.weight", f"{ours}.gate_up.weight", (hidden, dim), hidden)
    yield Piece(f"{theirs}.down_proj.weight", f"{ours}.down.weight", (dim, hidden))


def _moe(config: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    dim, hidden, experts = config.dim, config.expert_dim, config.num_experts
    yield Piece(f"{theirs}.router.gate.weight", f"{ours}.router.weight", (experts, dim))
    yield Piece(f"{theirs}.expert_bias", f"{ours}.router.bias", (experts,))
    if config.num_shared_experts:
        yield from _swiglu(f"{theirs}.shared_experts", f"{ours}.shared", dim, hidden * config.num_shared_experts)
    gate_up, down = f"{ours}.experts.gate_up", f"{ours}.experts.down"
    fused_gate_up, fused_down = f"{theirs}.experts.gate_up_proj", f"{theirs}.experts.down_proj"
    for e in range(experts):
        expert = f"{theirs}.experts.{e}"
        yield Piece(f"{expert}.gate_proj.weight", gate_up, (hidden, dim), 0, e, fused_gate_up)
        yield Piece(f"{expert}.up_proj.weight", gate_up, (hidden, dim), hidden, e, fused_gate_up)
        yield Piece(f"{expert}.down_proj.weight", down, (dim, hidden), 0, e, fused_down)
