"""The forward pass over the cache through the kernels of `trinity.ops.decode`; `infer.forward` is its reference.

`decode` runs on static buffers and reads lengths, tables and tokens on the device, so that a CUDA graph of it serves
every step; `prefill` runs a chunk of prompts. The residual stream is float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trinity.infer.attention import Kind, Step
from trinity.infer.cache import Cache
from trinity.infer.weights import LayerWeights, Matrix, check_fp8, layer_weights, pointers
from trinity.model.transformer import Transformer
from trinity.ops.decode import FEW
from trinity.ops.decode.attention import decode_attention
from trinity.ops.decode.experts import few_experts, many_experts
from trinity.ops.decode.products import best, gemv, norm_project, project
from trinity.ops.decode.prompts import prompt_attention
from trinity.ops.decode.rows import add_norm, choose, gate_rows, heads_to_cache, swiglu_rows
from trinity.ops.experts import grouped_experts, permute, sort_by_expert

Turn = tuple[Tensor, Tensor]


class Buffers:
    """Static memory of decoding `batch` rows, of which those with a negative slot are idle."""

    def __init__(self, kernels: "Kernels", batch: int) -> None:
        config, device, dtype = kernels.config, kernels.device, kernels.dtype

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
        self.parts = {
            ranges: (wide(H, ranges), wide(H, ranges), wide(H, ranges, K)) for ranges in set(kernels.ranges(batch))
        }
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


class _Stream(NamedTuple):
    """The residual stream between two kernels: what is done and what the next norm will add."""

    x: Tensor
    y: Tensor | None
    post: Tensor | None
    rows: Tensor | None = None
    weights: Tensor | None = None
    shared: Tensor | None = None


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
        self._library = self.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)
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

    # One token of each request.

    def decode(self, b: Buffers, cache: Cache) -> None:
        """One step of all rows: `b.logits`, then the most probable tokens in `b.tokens`, their log-probabilities, and
        positions that are one further."""
        angles = b.positions[:, None] * self._inverse
        turn = (angles.cos(), angles.sin())
        b.x.copy_(self.model.embed_tokens(b.tokens[None])[0])
        stream = _Stream(b.x, None, None)
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
        self, b: Buffers, cache: Cache, w: LayerWeights, number: int, turn: Turn, s: _Stream, moe: int
    ) -> _Stream:  # fmt: skip
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
        return _Stream(x, b.y, w.ffn_post)

    def _many_layer(
        self, b: Buffers, cache: Cache, w: LayerWeights, number: int, turn: Turn, s: _Stream, moe: int
    ) -> _Stream:  # fmt: skip
        self._add_norm(b, s, w.attn_norm)
        project(b.h, w.qkvg.weight, b.qkvg, scale=w.qkvg.scale)
        self._attend(b, cache, w, number, turn)
        project(b.o, w.o.weight, b.o_out, scale=w.o.scale)
        self._add_norm(b, _Stream(b.x, b.o_out, w.attn_post), w.ffn_norm)
        if w.dense is not None:
            up, down = w.dense
            project(b.h, up.weight, b.ffn_many, scale=up.scale)
            project(swiglu_rows(b.ffn_many), down.weight, b.y, scale=down.scale)
            return _Stream(b.x, b.y, w.ffn_post)
        assert w.router is not None
        assert w.bias is not None
        assert w.gathered is not None
        project(b.h, w.router, b.scores)
        indices, config = b.indices[moe], self.config
        choose(b.scores, w.bias, config.route_norm, config.route_scale, indices, b.factors, b.slots)
        many_experts(b.h, indices, w.gathered, b.act.flatten(0, 1), b.outputs)
        shared = b.outputs.view(b.batch, -1, config.dim)[:, -1] if w.gathered.num_shared else None
        return _Stream(b.x, b.outputs, w.ffn_post, b.rows, b.factors, shared)

    def _attend(self, b: Buffers, cache: Cache, w: LayerWeights, number: int, turn: Turn) -> None:
        pool, local = cache.pools[w.kind], w.kind == "local"
        heads = (self.config.num_heads, self.config.num_kv_heads)
        decode_attention(
            b.qkvg, w.q_norm, w.k_norm, turn if local else None, heads, self.config.norm_eps, b.positions, b.slots,
            pool.tables, pool.keys[number], pool.values[number], b.o, b.parts[self.ranges(b.batch)[not local]],
            window=self.config.window if local else None, ring=pool.ring_blocks,
        )  # fmt: skip

    def _add_norm(self, b: Buffers, s: _Stream, norm: Tensor) -> None:
        add_norm(
            s.x, s.y, s.post, norm, self.config.norm_eps, b.x, b.h,
            rows_Nk=s.rows, weights_Nk=s.weights, shared_ND=s.shared,
        )  # fmt: skip

    # Chunks of prompts.

    def prefill(self, step: Step, *, return_experts: bool = False) -> tuple[Tensor, Tensor | None]:
        """As `infer.forward.forward`: features after the final norm [N, D] and the chosen experts [N, L, k]."""
        angles = step.positions_1N[0, :, None] * self._inverse
        turn = (angles.cos(), angles.sin())
        x = self.model.embed_tokens(step.tokens_1N)[0].float()
        h = torch.empty(x.shape, dtype=self.dtype, device=self.device)
        stream = _Stream(x, None, None)
        chosen: list[Tensor] = []
        for w, plan in zip(self.layers, step.plans(), strict=True):
            self._add_norm_rows(stream, w.attn_norm, h)
            qkvg = F.linear(h, w.qkvg.wide(self.dtype))
            o = self._attend_prompt(step, plan.kind, plan.layer, w, qkvg, turn)
            self._add_norm_rows(_Stream(x, self._linear(gate_rows(o, qkvg), w.o), w.attn_post), w.ffn_norm, h)
            if w.dense is not None:
                stream = _Stream(x, self._swiglu(h, w.dense), w.ffn_post)
                continue
            stream, indices = self._experts(x, h, w)
            if return_experts:
                chosen.append(indices.long())
        self._add_norm_rows(stream, self.model.norm.weight.detach(), h)
        return h, torch.stack(chosen, dim=1) if chosen else None

    def _add_norm_rows(self, s: _Stream, norm: Tensor, h: Tensor) -> None:
        eps = self.config.norm_eps
        add_norm(s.x, s.y, s.post, norm, eps, s.x, h, rows_Nk=s.rows, weights_Nk=s.weights, shared_ND=s.shared)

    def _linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        return F.linear(x, matrix.wide(self.dtype))

    def _swiglu(self, h: Tensor, pair: tuple[Matrix, Matrix]) -> Tensor:
        return self._linear(swiglu_rows(self._linear(h, pair[0])), pair[1])

    def _attend_prompt(
        self, step: Step, kind: Kind, number: int, w: LayerWeights, qkvg: Tensor, turn: Turn
    ) -> Tensor:  # fmt: skip
        """[N, H*K]; the new keys and values go into the cache."""
        config, local = self.config, w.kind == "local"
        old = None
        if kind.old_BS is not None and kind.table_Bn is not None:  # before the new keys take places of the ring
            old = (*kind.pool.gather(number, kind.table_Bn), kind.old_BS)
        q, k, v = heads_to_cache(
            qkvg, w.q_norm, w.k_norm, turn if local else None, (config.num_heads, config.num_kv_heads),
            config.norm_eps, kind.places_W, kind.pool.keys[number], kind.pool.values[number],
        )  # fmt: skip
        if step.rows_BC is None:  # one token of each request
            q, k, v = (x[:, None] for x in (q, k, v))
            if old is not None:
                # The table covers the new token too, whose place does not hold it yet.
                old = (old[0], old[1], old[2].where(old[2] != step.starts_B[:, None], -1))
        elif step.rows_BC.shape[0] == 1:
            q, k, v = (x[None] for x in (q, k, v))
        else:
            q, k, v = (x[step.rows_BC] for x in (q, k, v))
        if old is None and q.shape[0] == 1 and not local and self._library:
            o = _causal(q, k, v)
        else:
            window = config.window if local else None
            o = prompt_attention(q, k, v, step.starts_B, window, old)
        o = o.flatten(0, 1).flatten(1)
        return o if step.flat_N is None or q.shape[0] == 1 else o[step.flat_N]

    def _experts(self, x: Tensor, h: Tensor, w: LayerWeights) -> tuple[_Stream, Tensor]:
        assert w.router is not None
        assert w.bias is not None
        assert w.experts is not None
        config = self.config
        if h.dtype == torch.bfloat16 and self.device.type == "cuda":
            scores = torch.mm(h, w.router.t(), out_dtype=torch.float32)  # the products are exact, the sums float32
        else:
            scores = F.linear(h.float(), w.router.float())
        N, k = len(h), config.experts_per_token
        indices = torch.empty(N, k, dtype=torch.int32, device=self.device)
        factors = torch.empty(N, k, device=self.device)
        choose(scores, w.bias, config.route_norm, config.route_scale, indices, factors)
        order = sort_by_expert(indices.long(), config.num_experts)
        up, down = (matrix.wide(self.dtype) for matrix in w.experts)
        if self.device.type == "cuda":
            gate_up = F.grouped_mm(permute(h, order), up.transpose(1, 2), offs=order.ends_E)
            outputs = F.grouped_mm(swiglu_rows(gate_up), down.transpose(1, 2), offs=order.ends_E)
        else:
            outputs = grouped_experts(permute(h, order), up, down, order.ends_E)
        shared = None if w.shared is None else self._swiglu(h, w.shared)
        return _Stream(x, outputs, w.ffn_post, order.row_Nk, factors, shared), indices


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole prompts by the library's kernel, the quickest that takes these tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).contiguous()
