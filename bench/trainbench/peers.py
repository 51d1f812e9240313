"""Forward and backward of other implementations at the same sizes: all they share with a step of ours.

Both train on full rows without documents, in bfloat16 weights, with the mean cross-entropy of the next token; neither
clips, balances or has an optimizer here.
"""

import argparse
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainbench.device import matmul_peak, peak_gib, random_weights, speed, timed
from trainbench.shapes import make_config, sizes
from trinity.config import ModelConfig
from trinity.export.config import config_to_public


def measure(name: str, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    device, config, size = torch.device(options.device), make_config(options), sizes(options)
    rows, seq_len = size["peer_rows"], size["seq_len"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    build = {"transformers": _transformers, "torchtitan": _torchtitan}[name]
    loss_of, model, about = build(config.model, seq_len, device, dtype, options)
    keep({"rows": rows, "parameters": sum(p.numel() for p in model.parameters()), **about})
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.model.vocab_size, (rows, seq_len + 1), generator=draws).to(device)
    losses: list[Tensor] = []

    def work() -> None:
        model.zero_grad(set_to_none=True)
        loss = loss_of(tokens)
        loss.backward()
        losses.append(loss.detach())

    seconds = timed(work, device, options.repeats, 3)
    flops, peak = config.model.flops_per_token(seq_len), matmul_peak(device)
    keep({"loss": float(losses[-1]), "peak_gib": peak_gib(device)})
    keep({"fwd_bwd": speed(seconds, rows * seq_len, flops, peak)})


def _transformers(
    config: ModelConfig, seq_len: int, device: torch.device, dtype: torch.dtype, options: argparse.Namespace
) -> tuple[Callable[[Tensor], Tensor], nn.Module, dict[str, Any]]:
    import transformers
    from transformers import AfmoeConfig, AfmoeForCausalLM

    public = config_to_public(config, dtype=str(dtype).removeprefix("torch."))
    public = {k: v for k, v in public.items() if k not in ("architectures", "model_type", "auto_map")}
    torch.set_default_dtype(dtype)
    with device:
        model: Any = AfmoeForCausalLM(AfmoeConfig(**public))
    torch.set_default_dtype(torch.float32)
    random_weights(model, config.init_scale * config.dim**-0.5)
    model.train()

    def loss_of(tokens: Tensor) -> Tensor:
        # labels are shifted inside: the first T tokens have T - 1 targets, which costs the same
        return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss

    return loss_of, model, {"version": transformers.__version__}


def _torchtitan(
    config: ModelConfig, seq_len: int, device: torch.device, dtype: torch.dtype, options: argparse.Namespace
) -> tuple[Callable[[Tensor], Tensor], nn.Module, dict[str, Any]]:
    sys.path.insert(0, str(options.torchtitan))
    # The packages' own __init__ files import the trainer, its data sets and its configuration, which need more.
    for package in ("models", "models.qwen3", "components", "protocols", "config", "tools", "distributed"):
        _bare_package(f"torchtitan.{package}", options.torchtitan / "torchtitan" / package.replace(".", "/"))
    _stub("torchtitan.config", JobConfig=object)
    _stub("torchtitan.components.tokenizer", BaseTokenizer=object)
    _stub("torchtitan.protocols.model", ModelProtocol=_Module, BaseModelArgs=object, AttentionMasksType=object)
    _stub("torchtitan.protocols.train_spec", ModelProtocol=_Module, BaseModelArgs=object)
    arguments: Any = importlib.import_module("torchtitan.models.qwen3.model.args")
    code: Any = importlib.import_module("torchtitan.models.qwen3.model.model")
    moe: Any = importlib.import_module("torchtitan.models.moe")
    sparse = moe.MoEArgs(
        num_experts=config.num_experts,
        num_shared_experts=config.num_shared_experts,
        top_k=config.experts_per_token,
        score_func="sigmoid",
        route_norm=True,
        route_scale=config.route_scale,
        score_before_experts=False,
        use_grouped_mm=device.type == "cuda",
    )
    torch.set_default_dtype(dtype)
    with device:
        model = code.Qwen3Model(
            arguments.Qwen3ModelArgs(
                dim=config.dim,
                n_layers=config.num_layers,
                n_heads=config.num_heads,
                n_kv_heads=config.num_kv_heads,
                vocab_size=config.vocab_size,
                head_dim=config.head_dim,
                hidden_dim=config.ffn_dim,
                max_seq_len=seq_len,
                moe_enabled=True,
                moe_inter_dim=config.expert_dim,
                moe_args=sparse,
            )
        )
    torch.set_default_dtype(torch.float32)
    random_weights(model, config.init_scale * config.dim**-0.5)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype.is_floating_point and name in ("expert_bias", "tokens_per_expert"):
                module.register_buffer(name, torch.zeros_like(buffer, dtype=torch.float32))
    compiled = device.type == "cuda"
    if compiled:
        torch._dynamo.config.capture_scalar_outputs = True
        for layer in model.layers.values():
            layer.compile()

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return loss_of, model, {"version": "0.2.2", "compiled": compiled}


class _Module(nn.Module):
    """What torchtitan's ModelProtocol is to a model that runs alone."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


def _bare_package(name: str, folder: Any) -> None:
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def _stub(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
