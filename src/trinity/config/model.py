"""The shape of a Trinity model, and the arithmetic that follows from it (no torch).

Sources: the published configurations of Trinity Nano, Mini and Large; the counting is checked against a built
model in the tests.
"""

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trinity.config.base import Frozen

LayerType = Literal["local", "global"]


class ModelConfig(Frozen):
    """Widths, depths and constants. Letters of the shape legend stand in brackets."""

    vocab_size: PositiveInt
    """Rows of the embedding and of the LM head [V]."""
    num_layers: PositiveInt
    num_dense_layers: Annotated[int, Field(ge=0)]
    """Leading layers with a dense FFN instead of experts."""
    dim: PositiveInt
    """Model width [D]."""
    num_heads: PositiveInt
    """Query heads [H]."""
    num_kv_heads: PositiveInt
    """Key and value heads [G]; divides num_heads."""
    head_dim: PositiveInt
    """Channels of a head [K]; even. num_heads * head_dim need not equal dim."""
    ffn_dim: PositiveInt
    """Hidden width of a dense SwiGLU FFN [F]."""
    expert_dim: PositiveInt
    """Hidden width of one routed expert; the shared expert has num_shared_experts times that."""
    num_experts: PositiveInt
    """Routed experts [E]."""
    experts_per_token: PositiveInt
    """Routed experts that a token visits [k]."""
    num_shared_experts: Annotated[int, Field(ge=0)] = 1
    route_scale: PositiveFloat = 1.0
    """Factor on the normalised routing weights."""
    route_norm: bool = True
    """Divide the selected scores by their sum; off is met in imported checkpoints only."""
    window: PositiveInt
    """Keys that a local layer sees, the token itself included [W]."""
    global_every: PositiveInt = 4
    """Layer i is global when (i + 1) % global_every == 0."""
    layer_types: tuple[LayerType, ...] | None = None
    """The kind of each layer; overrides global_every."""
    max_positions: PositiveInt = 131072
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-5
    embed_scale: bool = True
    """Multiply token embeddings by sqrt(dim) in the forward pass."""
    init_scale: PositiveFloat = 0.5
    """Weights start truncated-normal with standard deviation init_scale / sqrt(dim)."""
    post_norm_gain: PositiveFloat | None = None
    """Start of the gain of the second norm of each sandwich; None: 1 / sqrt(num_layers)."""
    qk_norm: bool = True
    """Off for ablation only: such a model cannot be exported."""
    attention_gate: bool = True
    """Off for ablation only: such a model cannot be exported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_dense_layers > self.num_layers:
            raise ValueError(f"num_dense_layers {self.num_dense_layers} exceeds num_layers {self.num_layers}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs of channels")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}")
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_layers} layers")
        return self

    @cached_property
    def layers(self) -> tuple[LayerType, ...]:
        """ "local" or "global" for each layer."""
        if self.layer_types is not None:
            return self.layer_types
        return tuple("global" if (i + 1) % self.global_every == 0 else "local" for i in range(self.num_layers))

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def post_gain(self) -> float:
        """Gain at which the second norm of each sandwich starts."""
        return self.post_norm_gain if self.post_norm_gain is not None else self.num_layers**-0.5

    def attention_params(self) -> int:
        """Parameters of one attention layer, without the layer's four norms."""
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        gate = heads * self.dim if self.attention_gate else 0
        qk = 2 * self.head_dim if self.qk_norm else 0
        return self.dim * (heads + 2 * kv) + gate + heads * self.dim + qk

    def num_params(self) -> int:
        """Trainable parameters; the expert biases are buffers and are not counted."""
        return self._count(self.num_experts)

    def num_active_params(self) -> int:
        """Parameters that one token passes through: k of E experts, embedding and head included."""
        return self._count(self.experts_per_token)

    def _count(self, experts: int) -> int:
        norms = 4 * self.dim
        dense = 3 * self.dim * self.ffn_dim
        expert = 3 * self.dim * self.expert_dim
        moe = self.num_experts * self.dim + (experts + self.num_shared_experts) * expert
        layers = self.num_layers * (self.attention_params() + norms)
        ffns = self.num_dense_layers * dense + self.num_moe_layers * moe
        return 2 * self.vocab_size * self.dim + layers + ffns + self.dim

    def mean_keys(self, kind: LayerType, seq_len: int) -> float:
        """Keys that a query of a full row of `seq_len` tokens sees on average."""
        window = min(self.window, seq_len) if kind == "local" else seq_len
        return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len

    def flops_per_token(self, seq_len: int, *, training: bool = True) -> float:
        """Multiply-adds counted as 2; a training step is three forward passes. Recomputation is not counted.

        Matrices of the active parameters (the embedding look-up is free, vectors are ignored), and the two attention
        products over the keys inside the causal mask and the window, rows without document borders.
        """
        vectors = self.num_layers * (4 * self.dim + (2 * self.head_dim if self.qk_norm else 0)) + self.dim
        matrices = self.num_active_params() - self.vocab_size * self.dim - vectors
        keys = sum(self.mean_keys(kind, seq_len) for kind in self.layers)
        forward = 2 * matrices + 4 * self.num_heads * self.head_dim * keys
        return forward * (3 if training else 1)

    def kv_cache_bytes(self, seq_len: int, *, batch: int = 1, bytes_per_value: int = 2) -> int:
        """Bytes of K and V after `seq_len` tokens: at most `window` keys in a local layer, all in a global one."""
        keys = sum(min(self.window, seq_len) if kind == "local" else seq_len for kind in self.layers)
        return 2 * batch * keys * self.num_kv_heads * self.head_dim * bytes_per_value
