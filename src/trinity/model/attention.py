"""Gated grouped-query attention with normalised queries and keys.

`project` and `output` are the two halves around the attention itself; inference puts a cache between them.
"""

from torch import Tensor, nn

from trinity.config.model import LayerType, ModelConfig
from trinity.model.linear import Linear
from trinity.model.norm import Kernels, RMSNorm
from trinity.model.rope import Rotation, reference_rotate, rotate, rotation
from trinity.ops import kernels as triton_kernels
from trinity.ops.attention import AttentionPlan
from trinity.ops.gate import gated_heads, reference_gated_heads
from trinity.ops.remake import remade, set_aside


class Attention(nn.Module):
    """One attention layer; `kind` decides RoPE (local layers only), the plan decides the mask."""

    def __init__(self, config: ModelConfig, kind: LayerType, kernels: Kernels) -> None:
        super().__init__()
        self.kind: LayerType = kind
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.rope_theta = config.rope_theta
        self.gate = config.attention_gate
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.widths = [heads, kv_heads, kv_heads, *([heads] if self.gate else [])]
        self.qkvg = Linear(config.dim, sum(self.widths), kernels)
        """Rows in the order q, k, v, gate; without `attention_gate` there is no gate."""
        self.o = Linear(heads, config.dim, kernels)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps, kernels) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps, kernels) if config.qk_norm else nn.Identity()
        self.rotate = rotate if kernels == "fast" else reference_rotate
        self.gated = gated_heads if kernels == "fast" else reference_gated_heads
        self.one_kernel = kernels == "fast" and self.head_dim.bit_count() == 1
        """Whether what follows the projection may be one kernel, which needs a power of two of channels."""

    def project(self, x_BTD: Tensor, positions: Tensor | Rotation) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(q [B,T,H,K], k [B,T,G,K], v [B,T,G,K], gate [B,T,H*K] or None).

        q and k are normalised, then turned in a local layer. `positions` is int [B, T], or what `rope.rotation` made of
        it, which layers can share; global layers ignore it.
        """
        x_BTW = self.qkvg(x_BTD)
        if self.one_kernel and triton_kernels.enabled(x_BTW):
            return self._split(x_BTW, positions)
        q, k, v, *gate = x_BTW.split(self.widths, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.kind == "local":
            if isinstance(positions, Tensor):
                positions = rotation(positions, self.head_dim, self.rope_theta)
            q, k = self.rotate(q, positions), self.rotate(k, positions)
        return q, k, v, gate[0] if gate else None

    def _split(self, x_BTW: Tensor, positions: Tensor | Rotation) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The rest of `project` as one kernel."""
        from trinity.ops.kernels.heads import SplitHeads

        turn = None
        if self.kind == "local":
            is_positions = isinstance(positions, Tensor)
            turn = rotation(positions, self.head_dim, self.rope_theta) if is_positions else positions
        gains, eps = (None, None), 0.0
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            gains, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        cos_sin = (None, None) if turn is None else (turn.cos, turn.sin)
        sizes = self.num_heads, self.num_kv_heads, self.head_dim
        return SplitHeads.apply(x_BTW, *gains, *cos_sin, *sizes, eps)

    def output(self, o_BTHK: Tensor, gate: Tensor | None) -> Tensor:
        """[B, T, D]: W_o(o * sigmoid(gate)), elementwise over all channels of all heads."""
        if gate is None:
            return self.o(o_BTHK.flatten(-2))
        return self.o(remade(self.gated(o_BTHK, gate), self.gated, o_BTHK, gate))

    def forward(self, x_BTD: Tensor, turn: Rotation, plan: AttentionPlan) -> Tensor:
        q, k, v, gate = self.project(x_BTD, turn)
        with set_aside():
            o_BTHK = plan.attend(q, k, v)
        return self.output(o_BTHK, gate)
