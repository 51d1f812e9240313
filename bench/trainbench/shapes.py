"""Shapes and variants of bench/train.py, and the rows that it trains on. No torch."""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from trinity.config import RunConfig, resolve
from trinity.data.rows import Chunk, Rows, empty_rows, finish_row

SHAPES: dict[str, dict[str, Any]] = {
    "nano": {"preset": "nano", "model": {}, "seq_len": 4096, "rows": 4, "peer_rows": 2, "step_tokens": 131_072},
    "small": {
        "preset": "nano",
        "model": {
            "vocab_size": 32768, "num_layers": 12, "num_dense_layers": 2, "ffn_dim": 3072, "expert_dim": 512,
            "num_experts": 64, "window": 1024,
        },
        "seq_len": 2048, "rows": 8, "peer_rows": 8, "step_tokens": 131_072,
    },
    "mini-group": {
        "preset": "mini",
        "model": {"num_layers": 4, "num_dense_layers": 0},
        "seq_len": 4096, "rows": 4, "peer_rows": 2, "step_tokens": 131_072,
    },
    "toy": {
        "preset": "nano",
        "model": {
            "vocab_size": 512, "num_layers": 3, "num_dense_layers": 1, "dim": 32, "num_heads": 2, "num_kv_heads": 1,
            "head_dim": 16, "ffn_dim": 64, "expert_dim": 16, "num_experts": 4, "experts_per_token": 2, "window": 32,
            "max_positions": 256,
        },
        "seq_len": 64, "rows": 2, "peer_rows": 2, "step_tokens": 256,
    },
}  # fmt: skip
"""`rows` and `peer_rows`: of a micro-batch. `model` overrides the preset's."""

VARIANTS: dict[str, dict[str, str]] = {
    "graphs": {"compile": "false", "cuda_graphs": "true"},
    "compiled-graphs": {"compile": "true", "cuda_graphs": "true"},
    "compiled": {"compile": "true", "cuda_graphs": "false"},
    "launched": {"compile": "false", "cuda_graphs": "false"},
    "fp8": {"compile": "false", "cuda_graphs": "true", "fp8": "true"},
}
"""Settings of `runtime` of each way to run the fast path, in order of interest."""


def sizes(options: argparse.Namespace) -> dict[str, int]:
    """seq_len, rows, peer_rows and step_rows, as given or the shape's."""
    shape = SHAPES[options.shape]
    seq_len = options.seq_len or shape["seq_len"]
    rows = options.micro_rows or shape["rows"]
    step_tokens = options.step_tokens or shape["step_tokens"]
    step_rows = max(1, round(step_tokens / (rows * seq_len))) * rows
    return {
        "seq_len": seq_len,
        "rows": rows,
        "peer_rows": options.peer_rows or shape["peer_rows"],
        "step_rows": step_rows,
    }


def make_config(options: argparse.Namespace, *overrides: str, layers: int = 0) -> RunConfig:
    """Settings of the run; `layers` (0: as given, else the shape's) is its number of layers."""
    shape = SHAPES[options.shape]
    model = dict(shape["model"])
    if layers := layers or options.layers:
        model["num_layers"] = layers
    size = sizes(options)
    names = _domains(options)
    shares = ", ".join(f'"{name}" = 1.0' for name in names)
    return resolve(
        shape["preset"],
        overrides=[
            *(f"model.{key}={value}" for key, value in model.items()),
            f"pretrain.seq_len={size['seq_len']}",
            f"pretrain.micro_rows={size['rows']}",
            "pretrain.warmup_steps=10",
            f"pretrain.batch=[{{ from_tokens = 0, rows = {size['step_rows']} }}]",
            f'pretrain.phases=[{{ name = "bench", tokens = {10**9}, weights = {{ {shares} }} }}]',
            f"data.streams={size['step_rows']}",
            f"runtime.recompute={options.recompute}",
            f"runtime.master_weights={'true' if options.weights == 'masters' else 'false'}",
            *overrides,
            *options.set,
        ],
    )[0]


def _domains(options: argparse.Namespace) -> list[str]:
    if options.shards is None:
        return ["made-up"]
    from trinity.data.shards import Shards

    return list(Shards.open(options.shards / "train").domains)


def batches(options: argparse.Namespace, config: RunConfig) -> Iterator[Rows]:
    """The rows of each step: from the shards, through the loader, or made up."""
    rows = config.pretrain.batch[0].rows
    if options.shards is None:
        step = 0
        while True:
            yield made_up_rows(rows, config.pretrain.seq_len, config.model.vocab_size, step, whole=options.whole_rows)
            step += 1
    from trinity.data.loader import Loader
    from trinity.data.shards import Shards
    from trinity.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer)
    tokenizer.check_model_vocab(config.model.vocab_size)
    shards = Shards.open(options.shards / "train")
    phase = config.pretrain.phases[0].model_copy(update={"tokens": min(10**9, shards.num_tokens // 2)})
    loader = Loader(
        shards, config.data, [phase], config.pretrain.seq_len, 0, tokenizer_fingerprint=tokenizer.fingerprint
    )
    try:
        step = 0
        while True:
            yield loader.next_rows(step, rows, 0)
            step += 1
    finally:
        loader.close()


def made_up_rows(rows: int, seq_len: int, vocab: int, seed: int, *, whole: bool = False) -> Rows:
    """Documents of log-normal length (median 600 tokens, cut at the row's end), or with `whole` one a row; tokens by a
    power law."""
    draws = np.random.default_rng([5, seed])
    made = empty_rows(rows, seq_len)
    for row in range(rows):
        tokens = (vocab * draws.random(seq_len + 1) ** 3).astype(np.int64)
        made.tokens_BT[row], made.targets_BT[row] = tokens[:-1], tokens[1:]
        chunks, at = [], 0
        while at < seq_len:
            drawn = seq_len if whole else max(8, int(draws.lognormal(np.log(600), 1.0)))
            length = min(seq_len - at, drawn)
            chunks.append(Chunk(row, 0, length))
            at += length
            made.targets_BT[row, at - 1] = -100
        finish_row(made, row, chunks)
    return made
