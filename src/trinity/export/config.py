"""`ModelConfig` <-> the `config.json` of a public `afmoe` checkpoint.

Every field that some engine reads is written, also those that `transformers` ignores: without `score_func` one engine
routes by softmax and another raises, without `route_norm` one does not normalise, and some read the RoPE base only at
the top level.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trinity.base.errors import UserError
from trinity.config import ModelConfig

ARCHITECTURE = "AfmoeForCausalLM"
_KINDS = {"local": "sliding_attention", "global": "full_attention"}

# Public name -> field of ModelConfig, for the values that pass through unchanged.
_SAME = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_dense_layers": "num_dense_layers",
    "hidden_size": "dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_dim",
    "moe_intermediate_size": "expert_dim",
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "num_shared_experts": "num_shared_experts",
    "route_scale": "route_scale",
    "sliding_window": "window",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
}

# What this model cannot express: any other value in a file changes the function, so it is refused.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "score_func": "sigmoid",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
}


def config_to_public(
    config: ModelConfig,
    *,
    dtype: str,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    load_balance_coeff: float = 5e-4,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of config.json for weights stored as `dtype` ("bfloat16", "float32", "float16").

    `quantization` is the `quantization_config` of quantised weights; `dtype` is then that of all others.

    Raises UserError for an ablation (`qk_norm` or `attention_gate` off) that the format has no place for.
    """
    for switch in ("qk_norm", "attention_gate"):
        if not getattr(config, switch):
            raise UserError(
                f"model.{switch} is off: the afmoe format always has it, so this ablation cannot be exported; "
                "keep its training checkpoint"
            )
    public: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": "afmoe", "dtype": dtype}
    public |= {name: getattr(config, field) for name, field in _SAME.items()}
    public |= _FIXED
    public |= {
        "global_attn_every_n_layers": config.global_every,
        "layer_types": [_KINDS[kind] for kind in config.layers],
        "mup_enabled": config.embed_scale,
        "route_norm": config.route_norm,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "initializer_range": config.init_scale / config.dim**0.5,
        "load_balance_coeff": load_balance_coeff,
        "use_grouped_mm": True,
        "use_cache": True,
        "output_router_logits": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if quantization is not None:
        public["quantization_config"] = quantization
    return dict(sorted(public.items()))


def config_from_public(public: Mapping[str, Any], where: Path) -> ModelConfig:
    """The ModelConfig of a config.json's content; `where` is the file that messages name.

    `init_scale` comes back from `initializer_range`; `post_norm_gain`, a starting value only, is not part of the
    format. Raises UserError for another model type and for values that this model cannot compute.
    """
    model_type = public.get("model_type")
    if model_type != "afmoe":
        raise UserError(f"{where}: model_type is {model_type!r}, but only 'afmoe' models can be read")
    for name, value in _FIXED.items():
        if public.get(name, value) != value:
            raise UserError(f"{where}: {name} is {public[name]!r}, but only {value!r} can be computed")
    missing = [name for name in _SAME if public.get(name) is None]
    if missing:
        raise UserError(f"{where}: {missing[0]} is not set")
    fields = {field: public[name] for name, field in _SAME.items()}
    every = public.get("global_attn_every_n_layers") or 4
    fields |= {
        "global_every": every,
        "layer_types": _layer_types(public, every, where),
        "rope_theta": _rope_theta(public, where),
        "embed_scale": public.get("mup_enabled", False),
        "route_norm": public.get("route_norm", True),
    }
    try:
        config = ModelConfig(**fields)
        deviation = public.get("initializer_range")
        if not deviation:
            return config
        return ModelConfig(**{**fields, "init_scale": round(deviation * config.dim**0.5, 9)})
    except ValidationError as error:
        first = error.errors()[0]
        names = {field: name for name, field in _SAME.items()}
        key = ".".join(names.get(str(part), str(part)) for part in first["loc"])
        raise UserError(f"{where}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None


def _layer_types(public: Mapping[str, Any], every: int, where: Path) -> tuple[str, ...] | None:
    """None where the list says no more than `every` does."""
    given = public.get("layer_types")
    if given is None:
        return None
    kinds = {name: kind for kind, name in _KINDS.items()}
    unknown = [name for name in given if name not in kinds]
    if unknown:
        raise UserError(f"{where}: layer_types has {unknown[0]!r}; known are {', '.join(kinds)}")
    layers = tuple(kinds[name] for name in given)
    regular = tuple("global" if (i + 1) % every == 0 else "local" for i in range(len(layers)))
    return None if layers == regular else layers


def _rope_theta(public: Mapping[str, Any], where: Path) -> float:
    """The base from `rope_parameters` or from the top level; both given must agree, and scaling is refused."""
    parameters = public.get("rope_parameters") or {}
    scaling = public.get("rope_scaling") or {}
    kinds = {place.get(key) or "default" for place in (parameters, scaling) for key in ("rope_type", "type")}
    if kinds != {"default"}:
        raise UserError(f"{where}: RoPE of type {max(kinds - {'default'})!r} cannot be computed, only 'default'")
    found = {float(v) for v in (parameters.get("rope_theta"), public.get("rope_theta")) if v is not None}
    if len(found) > 1:
        raise UserError(
            f"{where}: rope_parameters.rope_theta is {parameters['rope_theta']} and rope_theta is "
            f"{public['rope_theta']}; they must agree"
        )
    return found.pop() if found else 10000.0
