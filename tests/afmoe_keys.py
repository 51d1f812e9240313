"""Public `afmoe` weights and settings as this project's, for tests; the product's own mapping is in export/."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trinity.config.model import LayerType, ModelConfig


def model_config(public: Mapping[str, Any]) -> ModelConfig:
    """The settings of a public config.json."""
    kinds: dict[str, LayerType] = {"sliding_attention": "local", "full_attention": "global"}
    return ModelConfig(
        vocab_size=public["vocab_size"],
        num_layers=public["num_hidden_layers"],
        num_dense_layers=public["num_dense_layers"],
        dim=public["hidden_size"],
        num_heads=public["num_attention_heads"],
        num_kv_heads=public["num_key_value_heads"],
        head_dim=public["head_dim"],
        ffn_dim=public["intermediate_size"],
        expert_dim=public["moe_intermediate_size"],
        num_experts=public["num_experts"],
        experts_per_token=public["num_experts_per_tok"],
        num_shared_experts=public["num_shared_experts"],
        route_scale=public["route_scale"],
        route_norm=True,
        window=public["sliding_window"],
        layer_types=tuple(kinds[kind] for kind in public["layer_types"]),
        max_positions=public["max_position_embeddings"],
        rope_theta=public["rope_parameters"]["rope_theta"],
        norm_eps=public["rms_norm_eps"],
        embed_scale=public["mup_enabled"],
    )


def to_ours(config: ModelConfig, public: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This project's state dict from public tensors (experts apart or fused); gradients map like weights."""
    ours = {
        "embed.weight": public["model.embed_tokens.weight"],
        "norm.weight": public["model.norm.weight"],
        "head.weight": public["lm_head.weight"],
    }
    norms = {"attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm"}
    norms |= {"ffn_norm": "pre_mlp_layernorm", "ffn_post_norm": "post_mlp_layernorm"}
    for layer in range(config.num_layers):
        theirs, mine = f"model.layers.{layer}.", f"layers.{layer}."

        def get(name: str, prefix: str = theirs) -> Tensor:
            return public[prefix + name]

        for name, public_name in norms.items():
            ours[f"{mine}{name}.weight"] = get(f"{public_name}.weight")
        projections = [get(f"self_attn.{name}_proj.weight") for name in ("q", "k", "v", "gate")]
        ours[f"{mine}attn.qkvg.weight"] = torch.cat(projections)
        ours[f"{mine}attn.o.weight"] = get("self_attn.o_proj.weight")
        ours[f"{mine}attn.q_norm.weight"] = get("self_attn.q_norm.weight")
        ours[f"{mine}attn.k_norm.weight"] = get("self_attn.k_norm.weight")
        if layer < config.num_dense_layers:
            ours[f"{mine}ffn.gate_up.weight"] = torch.cat([get("mlp.gate_proj.weight"), get("mlp.up_proj.weight")])
            ours[f"{mine}ffn.down.weight"] = get("mlp.down_proj.weight")
            continue
        shared = "mlp.shared_experts."
        ours[f"{mine}moe.shared.gate_up.weight"] = torch.cat(
            [get(f"{shared}gate_proj.weight"), get(f"{shared}up_proj.weight")]
        )
        ours[f"{mine}moe.shared.down.weight"] = get(f"{shared}down_proj.weight")
        ours[f"{mine}moe.router.weight"] = get("mlp.router.gate.weight")
        if f"{theirs}mlp.expert_bias" in public:  # absent among gradients
            ours[f"{mine}moe.router.bias"] = get("mlp.expert_bias")
            ours[f"{mine}moe.router.momentum"] = torch.zeros_like(get("mlp.expert_bias"))
        if f"{theirs}mlp.experts.gate_up_proj" in public:
            ours[f"{mine}moe.experts.gate_up"] = get("mlp.experts.gate_up_proj")
            ours[f"{mine}moe.experts.down"] = get("mlp.experts.down_proj")
            continue
        experts = range(config.num_experts)
        stacks = {
            name: torch.stack([get(f"mlp.experts.{e}.{name}_proj.weight") for e in experts])
            for name in ("gate", "up", "down")
        }
        ours[f"{mine}moe.experts.gate_up"] = torch.cat([stacks["gate"], stacks["up"]], dim=1)
        ours[f"{mine}moe.experts.down"] = stacks["down"]
    return ours
