"""Chunks of prompts through the kernels of `trinity.ops.decode`; `infer.forward` is the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trinity.infer.attention import Kind, Step
from trinity.infer.buffers import Stream, Turn
from trinity.infer.kernels import Kernels
from trinity.infer.weights import LayerWeights, Matrix
from trinity.ops.decode.prompts import prompt_attention
from trinity.ops.decode.rows import add_norm, choose, gate_rows, heads_to_cache, swiglu_rows
from trinity.ops.experts import grouped_experts, permute, sort_by_expert


def prefill(kernels: Kernels, step: Step, *, return_experts: bool = False) -> tuple[Tensor, Tensor | None]:
    """As `infer.forward.forward`: features after the final norm [N, D] and the chosen experts [N, L, k]."""
    turn = kernels.turn(step.positions_1N[0])
    x = kernels.model.embed_tokens(step.tokens_1N)[0].float()
    h = torch.empty(x.shape, dtype=kernels.dtype, device=kernels.device)
    stream = Stream(x, None, None)
    chosen: list[Tensor] = []
    for w, plan in zip(kernels.layers, step.plans(), strict=True):
        _add_norm(kernels, stream, w.attn_norm, h)
        qkvg = F.linear(h, w.qkvg.wide(kernels.dtype))
        o = _attend(kernels, step, plan.kind, plan.layer, w, qkvg, turn)
        _add_norm(kernels, Stream(x, _linear(kernels, gate_rows(o, qkvg), w.o), w.attn_post), w.ffn_norm, h)
        if w.dense is not None:
            stream = Stream(x, _swiglu(kernels, h, w.dense), w.ffn_post)
            continue
        stream, indices = _experts(kernels, x, h, w)
        if return_experts:
            chosen.append(indices.long())
    _add_norm(kernels, stream, kernels.model.norm.weight.detach(), h)
    return h, torch.stack(chosen, dim=1) if chosen else None


def _add_norm(kernels: Kernels, s: Stream, norm: Tensor, h: Tensor) -> None:
    eps = kernels.config.norm_eps
    add_norm(s.x, s.y, s.post, norm, eps, s.x, h, rows_Nk=s.rows, weights_Nk=s.weights, shared_ND=s.shared)


def _linear(kernels: Kernels, x: Tensor, matrix: Matrix) -> Tensor:
    return F.linear(x, matrix.wide(kernels.dtype))


def _swiglu(kernels: Kernels, h: Tensor, pair: tuple[Matrix, Matrix]) -> Tensor:
    return _linear(kernels, swiglu_rows(_linear(kernels, h, pair[0])), pair[1])


def _attend(
    kernels: Kernels, step: Step, kind: Kind, number: int, w: LayerWeights, qkvg: Tensor, turn: Turn
) -> Tensor:  # fmt: skip
    """[N, H*K]; the new keys and values go into the cache."""
    config, local = kernels.config, w.kind == "local"
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
    if old is None and q.shape[0] == 1 and not local and kernels.library:
        o = _causal(q, k, v)
    else:
        window = config.window if local else None
        o = prompt_attention(q, k, v, step.starts_B, window, old)
    o = o.flatten(0, 1).flatten(1)
    return o if step.flat_N is None or q.shape[0] == 1 else o[step.flat_N]


def _experts(kernels: Kernels, x: Tensor, h: Tensor, w: LayerWeights) -> tuple[Stream, Tensor]:
    assert w.router is not None
    assert w.bias is not None
    assert w.experts is not None
    config = kernels.config
    if h.dtype == torch.bfloat16 and kernels.device.type == "cuda":
        scores = torch.mm(h, w.router.t(), out_dtype=torch.float32)  # the products are exact, the sums float32
    else:
        scores = F.linear(h.float(), w.router.float())
    N, k = len(h), config.experts_per_token
    indices = torch.empty(N, k, dtype=torch.int32, device=kernels.device)
    factors = torch.empty(N, k, device=kernels.device)
    choose(scores, w.bias, config.route_norm, config.route_scale, indices, factors)
    order = sort_by_expert(indices.long(), config.num_experts)
    up, down = (matrix.wide(kernels.dtype) for matrix in w.experts)
    if kernels.device.type == "cuda":
        gate_up = F.grouped_mm(permute(h, order), up.transpose(1, 2), offs=order.ends_E)
        outputs = F.grouped_mm(swiglu_rows(gate_up), down.transpose(1, 2), offs=order.ends_E)
    else:
        outputs = grouped_experts(permute(h, order), up, down, order.ends_E)
    shared = None if w.shared is None else _swiglu(kernels, h, w.shared)
    return Stream(x, outputs, w.ffn_post, order.row_Nk, factors, shared), indices


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole prompts by the library's kernel, the quickest that takes these tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).contiguous()
