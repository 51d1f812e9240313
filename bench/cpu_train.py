"""Forward and backward pass on a CPU: this model against transformers' AfmoeForCausalLM.

Both hold the same weights and see the same batch; the repeats alternate, so that what else the machine does hits
both. The measured work is the loss of the language model (mean cross-entropy of the next token) and all gradients.

The 50.6M configuration: width 384, 8 layers of which 2 dense, 6 query and 2 KV heads of 64, dense FFN 1024, 16
experts of 320, top-2, one shared expert, vocabulary 8192, window 128; rows 4 x 512.

    python bench/cpu_train.py --repeats 7 --dtype float32 bfloat16
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from trinity.config.model import ModelConfig
from trinity.export import import_afmoe
from trinity.model.transformer import Transformer
from trinity.ops.cross_entropy import IGNORE, fused_cross_entropy
from trinity.ops.matmul import cpu_has_bfloat16

ROWS, SEQ_LEN = 4, 512
SHAPE = {
    "vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 8, "num_dense_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024, "moe_intermediate_size": 320,
    "num_experts": 16, "num_experts_per_tok": 2, "num_shared_experts": 1, "route_scale": 2.448, "sliding_window": 128,
    "global_attn_every_n_layers": 4, "max_position_embeddings": 2048, "mup_enabled": True, "tie_word_embeddings": False,
}  # fmt: skip


def build(dtype: torch.dtype) -> tuple[nn.Module, Transformer, ModelConfig]:
    """transformers' model and ours with the same weights."""
    from transformers import AfmoeConfig, AfmoeForCausalLM

    torch.manual_seed(0)
    theirs = AfmoeForCausalLM(AfmoeConfig(**SHAPE))
    for name, parameter in theirs.named_parameters():
        if name.endswith(
            "router.gate.weight"
        ):  # zero in transformers' initialisation: every token would pick the same experts
            nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config, state = import_afmoe(folder, torch.float32)
    ours = Transformer(config)
    ours.load_state_dict(state)
    return cast("nn.Module", theirs).to(dtype).train(), ours.to(dtype), config


def loss_theirs(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def loss_ours(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    x_ND = model.features(tokens).x_BTD.flatten(0, 1)
    loss = fused_cross_entropy(x_ND, model.head.weight, targets.flatten())
    return loss.loss_sum / loss.num_tokens


def measure(loss_function, model, tokens) -> tuple[float, float, float]:
    """(loss, wall seconds, CPU seconds) of one forward and backward pass; gradients are freed outside of the clock."""
    model.zero_grad(set_to_none=True)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = loss_function(model, tokens)
    loss.backward()
    return loss.item(), time.perf_counter() - wall, time.process_time() - cpu


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def compare(dtype: torch.dtype, repeats: int) -> dict[str, object]:
    theirs, ours, config = build(dtype)
    tokens = torch.randint(0, config.vocab_size, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    contenders = {"transformers": (loss_theirs, theirs), "trinity": (loss_ours, ours)}
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, (loss_function, model) in contenders.items():
            losses[name], wall_seconds, cpu_seconds = measure(loss_function, model, tokens)
            if repeat:  # the first warms up
                wall[name].append(wall_seconds)
                cpu[name].append(cpu_seconds)
    medians = {name: statistics.median(seconds) for name, seconds in wall.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": config.num_params(),
        "tokens": ROWS * SEQ_LEN,
        "threads": torch.get_num_threads(),
        "amx": cpu_has_bfloat16(),
        "repeats": repeats,
        "loss": losses,
        "wall_seconds": {name: summary(seconds) for name, seconds in wall.items()},
        "cpu_seconds": {name: summary(seconds) for name, seconds in cpu.items()},
        "tokens_per_second": {name: round(ROWS * SEQ_LEN / seconds) for name, seconds in medians.items()},
        "speedup_wall": round(medians["transformers"] / medians["trinity"], 3),
        "speedup_cpu": round(statistics.median(cpu["transformers"]) / statistics.median(cpu["trinity"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="transformers")
    for dtype in options.dtype:
        print(json.dumps(compare(getattr(torch, dtype), options.repeats), indent=1), flush=True)


if __name__ == "__main__":
    main()
