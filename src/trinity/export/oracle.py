"""The forward pass straight from the files of a public model directory, one layer in memory at a time.

It shares nothing with the model or with the key mapping: it reads the public names and the raw config.json and follows
the published formulas in the plainest way. The parity gate compares the model with it, so that a fault that writer and
reader have in common is seen too.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import silu

from trinity.base.files import read_json
from trinity.export.files import TensorFiles

Get = Callable[[str], torch.Tensor]


class OracleOutput(NamedTuple):
    logits_BTV: torch.Tensor
    indices_LNk: torch.Tensor
    """The experts that the files choose for each token in each MoE layer, int64."""
    regret_LN: torch.Tensor
    """How far the worst expert that was used lies, in biased score, below the worst that the files choose."""


@torch.no_grad()
def oracle_forward(directory: Path, tokens_BT: torch.Tensor, replay_LNk: torch.Tensor | None = None) -> OracleOutput:
    """Logits and routing in float32 of the model in `directory`; every row is one document from position 0.

    With `replay_LNk` those experts are used instead of the files' choice, weighed by the files' scores: two
    computations that differ by rounding may break a tie differently, and then their logits could not be compared.
    """
    raw = read_json(directory / "config.json")
    eps = raw["rms_norm_eps"]
    indices, regrets = [], []
    with TensorFiles(directory, raw.get("quantization_config")) as files:

        def get(name: str) -> torch.Tensor:
            return files.read(name).float()

        x_BTD = get("model.embed_tokens.weight")[tokens_BT]
        if raw["mup_enabled"]:
            x_BTD = x_BTD * math.sqrt(raw["hidden_size"])
        for i, kind in enumerate(raw["layer_types"]):
            layer = _scope(get, f"model.layers.{i}.")
            attention = _attention(
                _scope(layer, "self_attn."),
                _rms(x_BTD, layer("input_layernorm.weight"), eps),
                raw,
                local=kind == "sliding_attention",
            )
            x_BTD = x_BTD + _rms(attention, layer("post_attention_layernorm.weight"), eps)
            h_BTD = _rms(x_BTD, layer("pre_mlp_layernorm.weight"), eps)
            if i < raw["num_dense_layers"]:
                mixed = _swiglu(_scope(layer, "mlp."), h_BTD)
            else:
                replay_Nk = None if replay_LNk is None else replay_LNk[len(indices)]
                mixed, index_Nk, regret_N = _moe(_scope(layer, "mlp."), h_BTD, raw, replay_Nk)
                indices.append(index_Nk)
                regrets.append(regret_N)
            x_BTD = x_BTD + _rms(mixed, layer("post_mlp_layernorm.weight"), eps)
        logits_BTV = _rms(x_BTD, get("model.norm.weight"), eps) @ get("lm_head.weight").T
    num_tokens = tokens_BT.numel()
    return OracleOutput(
        logits_BTV,
        torch.stack(indices) if indices else torch.zeros(0, num_tokens, raw["num_experts_per_tok"], dtype=torch.int64),
        torch.stack(regrets) if regrets else torch.zeros(0, num_tokens),
    )


def _scope(get: Get, prefix: str) -> Get:
    return lambda name: get(prefix + name)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x_BTHK: torch.Tensor, theta: float) -> torch.Tensor:
    length, width = x_BTHK.shape[1], x_BTHK.shape[-1]
    frequency = theta ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(length).float()[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attention(get: Get, h_BTD: torch.Tensor, raw: Mapping[str, Any], *, local: bool) -> torch.Tensor:
    batch, length, _ = h_BTD.shape
    heads, groups, width = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]
    q = (h_BTD @ get("q_proj.weight").T).view(batch, length, heads, width)
    k = (h_BTD @ get("k_proj.weight").T).view(batch, length, groups, width)
    v = (h_BTD @ get("v_proj.weight").T).view(batch, length, groups, width)
    gate = torch.sigmoid(h_BTD @ get("gate_proj.weight").T)
    q = _rms(q, get("q_norm.weight"), raw["rms_norm_eps"])
    k = _rms(k, get("k_norm.weight"), raw["rms_norm_eps"])
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = distance >= 0
    if local:
        theta = raw["rope_parameters"]["rope_theta"]
        q, k = _rotate(q, theta), _rotate(k, theta)
        visible &= distance < raw["sliding_window"]
    k, v = (t.repeat_interleave(heads // groups, dim=2) for t in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(width)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhij,bjhk->bihk", weights, v).reshape(batch, length, heads * width)
    return (mixed * gate) @ get("o_proj.weight").T


def _swiglu(get: Get, h: torch.Tensor) -> torch.Tensor:
    gate, up = h @ get("gate_proj.weight").T, h @ get("up_proj.weight").T
    return (silu(gate) * up) @ get("down_proj.weight").T


def _moe(
    get: Get, h_BTD: torch.Tensor, raw: Mapping[str, Any], replay_Nk: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h_ND = h_BTD.flatten(0, 1)
    scores_NE = torch.sigmoid(h_ND @ get("router.gate.weight").T)
    biased_NE = scores_NE + get("expert_bias")
    best_Nk, index_Nk = biased_NE.topk(raw["num_experts_per_tok"], dim=-1)
    used_Nk = index_Nk if replay_Nk is None else replay_Nk
    regret_N = best_Nk.amin(-1) - biased_NE.gather(1, used_Nk).amin(-1)
    weight_Nk = scores_NE.gather(1, used_Nk)
    if raw["route_norm"]:
        weight_Nk = weight_Nk / (weight_Nk.sum(-1, keepdim=True) + 1e-20)
    weight_Nk = weight_Nk * raw["route_scale"]
    out_ND = _swiglu(_scope(get, "shared_experts."), h_ND) if raw["num_shared_experts"] else torch.zeros_like(h_ND)
    for e in range(raw["num_experts"]):
        rows, place = (used_Nk == e).nonzero(as_tuple=True)
        if len(rows):
            out_ND[rows] += weight_Nk[rows, place, None] * _swiglu(_scope(get, f"experts.{e}."), h_ND[rows])
    return out_ND.view_as(h_BTD), index_Nk, regret_N
