"""The model: embedding, sandwich-normalised blocks, final norm, LM head."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trinity.config.model import ModelConfig
from trinity.model.attention import Attention
from trinity.model.init import fill
from trinity.model.layout import Layout, LayoutMaker, make_layout
from trinity.model.linear import Embedding, FeedForward, Linear
from trinity.model.moe import Experts, MoE
from trinity.model.norm import Kernels, RMSNorm
from trinity.model.rope import Rotation, rotation
from trinity.model.router import Documents, LayerStats, Router
from trinity.ops import fp8
from trinity.ops.experts import describe_experts
from trinity.ops.matmul import describe_matmul
from trinity.ops.remake import remade, selective
from trinity.ops.rms_norm import reference_residual_norm, residual_norm

Recompute = Literal["none", "selective", "block"]


@dataclass(frozen=True)
class RoutingStats:
    """What routing did in one forward pass, by MoE layer; padding is in none of it.

    Returned, never stored: recomputation cannot count twice, and evaluation cannot count at all.
    """

    counts_LE: Tensor
    """int64: tokens of each expert."""
    sequence_loss: Tensor
    """Sum over MoE layers of the token-weighted mean over documents of sum_i f_i P_i; without its coefficient alpha."""
    logit_min_L: Tensor
    logit_max_L: Tensor
    entropy_L: Tensor
    """Mean over tokens of the entropy of the normalised scores, in nats."""
    margins_LEB: Tensor | None = None
    """int64: histograms of the margins (`balance.margin_bins`), where they are recorded."""


@dataclass(frozen=True)
class Features:
    """What the LM head, a loss or a scorer reads."""

    x_BTD: Tensor
    """After the final norm."""
    routing: RoutingStats


class Block(nn.Module):
    """x + post(attention(pre(x))), then the same with a dense FFN or experts (depth-scaled sandwich norm)."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels) -> None:
        super().__init__()
        self.kind = config.layers[layer]
        self.residual_norm = residual_norm if kernels == "fast" else reference_residual_norm
        self.attn = Attention(config, self.kind, kernels)
        self.attn_norm = RMSNorm(config.dim, config.norm_eps, kernels)
        self.attn_post_norm = RMSNorm(config.dim, config.norm_eps, kernels, gain=config.post_gain)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, kernels)
        self.ffn_post_norm = RMSNorm(config.dim, config.norm_eps, kernels, gain=config.post_gain)
        dense = layer < config.num_dense_layers
        self.ffn = FeedForward(config.dim, config.ffn_dim, kernels) if dense else None
        self.moe = None if dense else MoE(config, kernels)

    def feed_forward(self, x_BTD: Tensor, documents: Documents | None = None) -> tuple[Tensor, LayerStats | None]:
        """The second half of the block, norms and residual included; statistics only where `documents` are given."""
        return self._from_normed(x_BTD, self.ffn_norm(x_BTD), documents)

    def _from_normed(
        self, x_BTD: Tensor, h_BTD: Tensor, documents: Documents | None, chosen_BTk: Tensor | None = None
    ) -> tuple[Tensor, LayerStats | None]:
        """The same, from the residual stream and what `ffn_norm` made of it."""
        if self.moe is not None:
            y_BTD, stats = self.moe(h_BTD, documents, chosen_BTk)
        else:
            assert self.ffn is not None
            y_BTD, stats = self.ffn(h_BTD), None
        return self.residual_norm(x_BTD, y_BTD, self.ffn_post_norm.weight, None, self.ffn_post_norm.eps)[0], stats

    def forward(
        self, x_BTD: Tensor, layout: Layout, chosen_BTk: Tensor | None = None
    ) -> tuple[Tensor, LayerStats | None]:
        plan = layout.local_plan if self.kind == "local" else layout.global_plan
        h_BTD = remade(self.attn_norm(x_BTD), self.attn_norm, x_BTD)
        y_BTD = self.attn(h_BTD, layout.turn, plan)
        norms = self.attn_post_norm.weight, self.ffn_norm.weight, self.ffn_norm.eps
        x_BTD, h_BTD = self.residual_norm(x_BTD, y_BTD, *norms)
        assert h_BTD is not None
        remade(h_BTD, self.ffn_norm, x_BTD)
        return self._from_normed(x_BTD, h_BTD, layout.documents, chosen_BTk)


class Transformer(nn.Module):
    """Trinity: `forward` for logits, `features` for training, where the loss never builds all logits.

    Weights lie on the current default device in the default type and are unset until `init_weights` or a checkpoint
    sets them.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels = "fast", recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.kernels: Kernels = kernels
        self.recompute: Recompute = recompute
        """ "block" keeps only each block's input for the backward pass and computes the rest again; "selective" keeps
        products and computes again what is cheap (`ops/remake.py`)."""
        self.layout_maker: LayoutMaker = make_layout
        """Context parallelism hands in its own, as expert parallelism does with each MoE's dispatcher."""
        self.embed = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer, kernels) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, kernels)
        self.head = Linear(config.dim, config.vocab_size, kernels)

    @property
    def blocks(self) -> list[Block]:
        """The layers with their type."""
        return [cast("Block", block) for block in self.layers]

    def record_margins(self) -> None:
        """From now on count what quantile balancing needs, in forward passes with gradients."""
        for block in self.blocks:
            if block.moe is not None:
                block.moe.router.records_margins = True

    def use_fp8(self, device: torch.device) -> None:
        """From now on the products of the blocks' matrices, the router's aside, are those of `ops/fp8.py`.

        Raises UserError where the `device` that is to compute them has none, or a width does not fit.
        """
        config = self.config
        widths = {f"model.{name}": getattr(config, name) for name in ("dim", "ffn_dim", "expert_dim")}
        widths["model.num_kv_heads * model.head_dim"] = config.num_kv_heads * config.head_dim
        fp8.check(device, widths)
        for module in self.layers.modules():
            if isinstance(module, Linear | Experts):
                module.fp8 = True

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Truncated normal matrices of deviation init_scale / sqrt(dim), norm gains and zero biases.

        The values depend on seed, name and shape alone: neither on device, type nor order.
        """
        std = self.config.init_scale * self.config.dim**-0.5
        matrices = [(name, parameter) for name, parameter in self.named_parameters() if parameter.ndim > 1]
        with ThreadPoolExecutor() as pool:  # one stream a matrix, so the order does not matter
            list(pool.map(lambda entry: fill(entry[0], entry[1], std, seed), matrices))
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(module.gain)
            elif isinstance(module, Router):
                module.bias.zero_()
                module.momentum.zero_()

    def layout(
        self, shape: tuple[int, int], segments_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Layout:
        """Masks and positions of a batch of `shape` (B, T); see `layout.make_layout`."""
        device = self.embed.weight.device
        return self.layout_maker(self.config, shape, device, self.kernels, segments_BT, positions_BT)

    def paths(self, layout: Layout) -> dict[str, str]:
        """Which path each operation takes here, for the log of a run."""
        weight = self.embed.weight
        fast = self.kernels == "fast"
        first = self.blocks[0].attn.o
        products = describe_matmul(weight) if fast else str(weight.dtype).removeprefix("torch.")
        return {
            "local attention": layout.local_plan.describe(),
            "global attention": layout.global_plan.describe(),
            "experts": describe_experts(weight.device) if fast else "reference, loop over experts",
            "matrix products": fp8.describe(weight.device) if first.fp8 else products,
            "norms, RoPE, gate, routing": self._describe_small(weight.device) if fast else "reference",
        }

    def _describe_small(self, device: torch.device) -> str:
        if any(block._compiled_call_impl is not None for block in self.blocks):
            return "torch.compile, block by block"
        return "hand-written gradients" if device.type == "cpu" else "Triton kernels"

    def rotation(self, positions_BT: Tensor) -> Rotation:
        """RoPE's angles, to share between the layers: `Attention.project` takes it in place of positions."""
        return rotation(positions_BT, self.config.head_dim, self.config.rope_theta)

    def embed_tokens(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D]: the embedding, times sqrt(D) where the config says so."""
        x_BTD = self.embed(tokens_BT)
        return x_BTD * self.config.dim**0.5 if self.config.embed_scale else x_BTD

    def features(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        *,
        layout: Layout | None = None,
        chosen_BTLk: Tensor | None = None,
    ) -> Features:
        """All of the model but the head. A `layout` made before replaces segments and positions.

        `chosen_BTLk` (integers) are experts that the MoE layers take instead of selecting; -1 leaves them the choice.
        """
        if layout is None:
            layout = self.layout((tokens_BT.shape[0], tokens_BT.shape[1]), segments_BT, positions_BT)
        x_BTD = self.embed_tokens(tokens_BT)
        stats: list[LayerStats] = []
        for block in self.blocks:
            given = (x_BTD, layout)
            if chosen_BTLk is not None and block.moe is not None:
                given = (*given, chosen_BTLk[:, :, len(stats)].long())
            if self.recompute == "block" and torch.is_grad_enabled():
                x_BTD, layer_stats = checkpoint(block, *given, use_reentrant=False)
            elif self.recompute == "selective" and torch.is_grad_enabled():
                with selective():
                    x_BTD, layer_stats = block(*given)
            else:
                x_BTD, layer_stats = block(*given)
            if layer_stats is not None:
                stats.append(layer_stats)
        return Features(self.norm(x_BTD), self._gather(stats))

    def forward(
        self, tokens_BT: Tensor, segments_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] in the model's type."""
        return self.head(self.features(tokens_BT, segments_BT, positions_BT).x_BTD)

    def _gather(self, stats: list[LayerStats]) -> RoutingStats:
        device = self.embed.weight.device
        if not stats:
            counts_LE = torch.zeros(0, self.config.num_experts, dtype=torch.int64, device=device)
            nothing_L = torch.zeros(0, device=device)
            return RoutingStats(counts_LE, torch.zeros((), device=device), nothing_L, nothing_L, nothing_L)
        counts, losses, low, high, entropy, margins = zip(*stats, strict=True)
        return RoutingStats(
            torch.stack(counts),
            torch.stack(losses).sum(),
            torch.stack(low),
            torch.stack(high),
            torch.stack(entropy),
            None if margins[0] is None else torch.stack(margins),
        )
