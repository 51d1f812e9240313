"""The model behind the kernels of `trinity.ops.decode`: its weights as they read them, and a step of decoding.

`decode` runs on static buffers and reads lengths, tables and tokens on the device, so that a CUDA graph of it serves
every step. `infer.forward` is its reference; chunks of prompts run in `infer.prefill`. The residual stream is float32.
"""

import torch
from torch import Tensor

from trinity.infer.buffers import Buffers, Stream, Turn
from trinity.infer.cache import Cache
from trinity.infer.weights import LayerWeights, check_fp8, layer_weights, pointers
from trinity.model.transformer import Transformer
from trinity.ops.decode import FEW
from trinity.ops.decode.attention import decode_attention
from trinity.ops.decode.experts import few_experts, many_experts
from trinity.ops.decode.products import best, gemv, norm_project, project
from trinity.ops.decode.rows import add_norm, choose, swiglu_rows


class Kernels:
    """The model behind the kernels.

    Raises UserError with `fp8` for shapes without whole blocks; `infer.paths.why_not_kernels` tells whether it
    serves the model.
    """

    def __init__(self, model: Transformer, *, fp8: bool = False, limit: int | None = None) -> None:
        self.model, self.config, self.fp8 = model, model.config, fp8
        self.device, self.dtype = model.embed.weight.device, model.embed.weight.dtype
        self.limit = min(limit or self.config.vocab_size, self.config.vocab_size)
        """Token ids from here on never come."""
        if fp8:
            check_fp8(model)
        self.library = self.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)
        """Whether the library's attention kernels take the model's type."""
        self._pointers: tuple[int, ...] = ()
        self._inverse = self.config.rope_theta ** -(
            torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=self.device) / self.config.head_dim
        )
        self.refresh()

    def refresh(self) -> bool:
        """Look up the model's tensors again where they have moved; whether they had. FP8 copies stay as they are."""
        now = pointers(self.model)
        if now == self._pointers:
            return False
        self._pointers = now
        self.layers = [layer_weights(block, fp8=self.fp8) for block in self.model.blocks]
        return True

    def describe(self) -> str:
        weights = "FP8 weights" if self.fp8 else str(self.dtype).removeprefix("torch.")
        return f"Triton kernels, {weights}"

    def ranges(self, batch: int) -> tuple[int, int]:
        """Ranges that the keys of (local, global) layers are split into: enough programs to fill a GPU."""
        programs = 256 if self.device.type == "cuda" else 4
        share = max(1, programs // (batch * self.config.num_kv_heads))
        return min(16, share), min(64, share)

    def buffers(self, batch: int) -> Buffers:
        """Memory for decoding `batch` rows."""
        return Buffers(self.config, batch, self.ranges(batch), self.device, self.dtype)

    def turn(self, positions_N: Tensor) -> Turn:
        """The rotation at each position."""
        angles = positions_N[:, None] * self._inverse
        return angles.cos(), angles.sin()

    def decode(self, b: Buffers, cache: Cache) -> None:
        """One step of all rows: `b.logits`, then the most probable tokens in `b.tokens`, their log-probabilities, and
        positions that are one further."""
        turn = self.turn(b.positions)
        b.x.copy_(self.model.embed_tokens(b.tokens[None])[0])
        stream = Stream(b.x, None, None)
        moe = 0
        for layer, place in zip(self.layers, cache.places, strict=True):
            if b.batch <= FEW:
                stream = self._few_layer(b, cache, layer, place[1], turn, stream, moe)
            else:
                stream = self._many_layer(b, cache, layer, place[1], turn, stream, moe)
            moe += layer.router is not None
        head, norm = self.model.head.weight.detach(), self.model.norm.weight.detach()
        if b.batch <= FEW:
            x_out = b.x_other if stream.x is b.x else b.x
            norm_project(
                stream.x, stream.y, stream.post, norm, head, self.config.norm_eps, b.logits, x_out, b.h, tiles=4
            )  # fmt: skip
        else:
            self._add_norm(b, stream, norm)
            project(b.h, head, b.logits)
        best(b.logits, self.limit, b.tokens, b.logprobs)
        b.positions.add_(1)

    def _few_layer(
        self, b: Buffers, cache: Cache, w: LayerWeights, number: int, turn: Turn, s: Stream, moe: int
    ) -> Stream:  # fmt: skip
        eps = self.config.norm_eps
        x, other = s.x, b.x_other if s.x is b.x else b.x
        norm_project(x, s.y, s.post, w.attn_norm, w.qkvg.weight, eps, b.qkvg, other, b.h, scale=w.qkvg.scale)
        self._attend(b, cache, w, number, turn)
        gemv(b.o, w.o.weight, b.o_out, scale=w.o.scale)
        if w.dense is not None:
            up, down = w.dense
            norm_project(other, b.o_out, w.attn_post, w.ffn_norm, up.weight, eps, b.ffn_few, x, b.h, scale=up.scale)
            gemv(b.ffn_few, down.weight, b.y, scale=down.scale, swiglu=True)
        else:
            assert w.router is not None
            assert w.bias is not None
            assert w.gathered is not None
            norm_project(other, b.o_out, w.attn_post, w.ffn_norm, w.router, eps, b.scores, x, b.h)
            few_experts(
                b.scores, w.bias, self.config.route_norm, self.config.route_scale, b.h, w.gathered, b.act,
                b.indices[moe], b.factors, b.y,
            )  # fmt: skip
        return Stream(x, b.y, w.ffn_post)

    def _many_layer(
        self, b: Buffers, cache: Cache, w: LayerWeights, number: int, turn: Turn, s: Stream, moe: int
    ) -> Stream:  # fmt: skip
        self._add_norm(b, s, w.attn_norm)
        project(b.h, w.qkvg.weight, b.qkvg, scale=w.qkvg.scale)
        self._attend(b, cache, w, number, turn)
        project(b.o, w.o.weight, b.o_out, scale=w.o.scale)
        self._add_norm(b, Stream(b.x, b.o_out, w.attn_post), w.ffn_norm)
        if w.dense is not None:
            up, down = w.dense
            project(b.h, up.weight, b.ffn_many, scale=up.scale)
            project(swiglu_rows(b.ffn_many), down.weight, b.y, scale=down.scale)
            return Stream(b.x, b.y, w.ffn_post)
        assert w.router is not None
        assert w.bias is not None
        assert w.gathered is not None
        project(b.h, w.router, b.scores)
        indices, config = b.indices[moe], self.config
        choose(b.scores, w.bias, config.route_norm, config.route_scale, indices, b.factors, b.slots)
        many_experts(b.h, indices, w.gathered, b.act.flatten(0, 1), b.outputs)
        shared = b.outputs.view(b.batch, -1, config.dim)[:, -1] if w.gathered.num_shared else None
        return Stream(b.x, b.outputs, w.ffn_post, b.rows, b.factors, shared)

    def _attend(self, b: Buffers, cache: Cache, w: LayerWeights, number: int, turn: Turn) -> None:
        pool, local = cache.pools[w.kind], w.kind == "local"
        heads = (self.config.num_heads, self.config.num_kv_heads)
        decode_attention(
            b.qkvg, w.q_norm, w.k_norm, turn if local else None, heads, self.config.norm_eps, b.positions, b.slots,
            pool.tables, pool.keys[number], pool.values[number], b.o, b.parts[self.ranges(b.batch)[not local]],
            window=self.config.window if local else None, ring=pool.ring_blocks,
        )  # fmt: skip

    def _add_norm(self, b: Buffers, s: Stream, norm: Tensor) -> None:
        add_norm(
            s.x, s.y, s.post, norm, self.config.norm_eps, b.x, b.h,
            rows_Nk=s.rows, weights_Nk=s.weights, shared_ND=s.shared,
        )  # fmt: skip
