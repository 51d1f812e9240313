"""Shapes, variants and settings of bench/extension.py. No torch."""

import argparse
from dataclasses import dataclass
from typing import Any

from trinity.config import RunConfig, resolve

_WEIGHTS = "{ books = 0.35, docs = 0.3, web = 0.35 }"


@dataclass(frozen=True)
class Shape:
    """A model, and how much it is trained. Lengths and batches are in tokens."""

    model: dict[str, Any]
    target: int
    pretrain_length: int
    pretrain_tokens: int
    pretrain_batch: int
    extend_tokens: int
    extend_batch: int
    micro_tokens: int
    """Tokens of a forward pass."""
    settings: tuple[str, ...]


SHAPES = {
    "small": Shape(
        # 328.5 M parameters, 86 M active
        model={
            "vocab_size": 32768, "num_layers": 12, "num_dense_layers": 1, "dim": 512, "num_heads": 4, "num_kv_heads": 2,
            "head_dim": 128, "ffn_dim": 1536, "expert_dim": 256, "num_experts": 64, "experts_per_token": 8,
            "route_scale": 2.826, "window": 512,
        },
        target=16384,
        pretrain_length=2048,
        pretrain_tokens=70_000_000,
        pretrain_batch=32_768,
        extend_tokens=40_000_000,
        extend_batch=65_536,
        micro_tokens=32_768,
        settings=(
            "optim.muon_lr=0.01", "optim.adamw_lr=0.002", "runtime.device=cuda", "runtime.dtype=bfloat16",
            "runtime.compile=false", "pretrain.warmup_steps=30", "extend.niah_every=100",
            "eval.niah_samples=4", "eval.niah_depths=5", "eval.niah_keys=5",
        ),
    ),
    "toy": Shape(
        model={
            "vocab_size": 4096, "num_layers": 4, "num_dense_layers": 3, "dim": 128, "num_heads": 4, "num_kv_heads": 2,
            "head_dim": 32, "ffn_dim": 256, "expert_dim": 64, "num_experts": 4, "experts_per_token": 2,
            "global_every": 2, "window": 64,
        },
        target=1024,
        pretrain_length=256,
        pretrain_tokens=3_000_000,
        pretrain_batch=4096,
        extend_tokens=2_000_000,
        extend_batch=4096,
        micro_tokens=2048,
        settings=(
            "optim.muon_lr=0.02", "optim.adamw_lr=0.005", "runtime.device=cpu", "runtime.dtype=float32",
            "pretrain.niah_share=0.75", "extend.niah_share=0.75",
            "pretrain.warmup_steps=10", "extend.niah_every=100", "eval.niah_samples=4",
            "eval.niah_depths=5", "eval.niah_keys=5",
        ),
    ),
}  # fmt: skip

VARIANTS = ("3to1", "full", "nope")


FIRST = ("retrieval.tasks={lookup=1.0}", "retrieval.density=[0.3, 0.9]")
"""Of the retrieval documents of the pretraining: one kind of question, and many of them. The answers' loss of a model
of four layers falls by half within one million such tokens; with all kinds at once it had not after three."""


def run_config(options: argparse.Namespace, variant: str, seed: int, length: int, *, first: bool = False) -> RunConfig:
    """Settings of the pretraining (`first`) or of the extension at rows of `length` tokens."""
    shape = SHAPES[options.shape]
    longest = 4 * options.target
    attention = {"3to1": {}, "full": {"window": longest}, "nope": {"global_every": 1}}[variant]
    model = {**shape.model, "max_positions": longest, **attention}
    pretrain_tokens = options.pretrain_tokens or shape.pretrain_tokens
    extend_tokens = options.extend_tokens or shape.extend_tokens
    # As many streams as rows: whole steps are text or retrieval, so that the few answers of one step weigh as much as
    # all text of another. All sizes are powers of two.
    streams = max(shape.pretrain_batch // shape.pretrain_length, shape.extend_batch // length, 1)
    config, _ = resolve(
        "demo",
        overrides=[
            *(f"model.{key}={value}" for key, value in model.items()),
            f"data.shards={options.shards}",
            f"data.tokenizer={options.tokenizer}",
            f"runtime.seed={seed}",
            f"data.streams={streams}",
            "data.max_epochs=100",
            "data.buffer=256",
            "balance.rate=2e-3",
            "checkpoint.every_steps=1000000",
            "checkpoint.keep_last=1",
            f"pretrain.phases=[{{ name = 'all', tokens = {pretrain_tokens}, weights = {_WEIGHTS} }}]",
            f"pretrain.seq_len={shape.pretrain_length}",
            "pretrain.decay_fraction=0.2",
            "pretrain.eval_every=1000000",
            "pretrain.final_lr_scale=0.3",
            "pretrain.niah_share=0.4",
            f"extend.seq_len={length}",
            f"extend.tokens={extend_tokens}",
            "extend.warmup_steps=10",
            "extend.lr_scale=0.5",
            "extend.final_lr_scale=0.05",
            "extend.niah_share=0.5",
            "extend.eval_every=1000000",
            "extend.eval_rows=4",
            "extend.length_bias=1.0",
            f"extend.stop_at={options.stop_at}",
            f"eval.niah_lengths=[{options.target // 2}, {options.target}, {2 * options.target}]",
            "eval.niah_reuse=true",
            *shape.settings,
            *(FIRST if first else ()),
            *options.set,
        ],
    )
    rows = max(1, shape.pretrain_batch // config.pretrain.seq_len)
    micro = max(1, shape.micro_tokens // config.pretrain.seq_len)
    return resolve_rows(config, rows, micro, max(1, shape.extend_batch // length), max(1, shape.micro_tokens // length))


def resolve_rows(config: RunConfig, rows: int, micro: int, long_rows: int, long_micro: int) -> RunConfig:
    """The same settings with batches and micro-batches."""
    found = config.model_dump()
    found["pretrain"] |= {"batch": [{"from_tokens": 0, "rows": rows}], "micro_rows": min(rows, micro)}
    found["extend"] |= {"batch_rows": long_rows, "micro_rows": min(long_rows, long_micro)}
    return RunConfig.model_validate(found)
