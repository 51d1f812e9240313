"""A tiny run on disk: tokenizer, shards, conversations and settings for a model that trains in a second."""

import json
from pathlib import Path
from random import Random

import numpy as np

from trinity.base.rng import Draws
from trinity.config import RunConfig, TokenizerConfig
from trinity.data import arithmetic
from trinity.data.halves import Half
from trinity.data.shard_writer import TokenDocument, write_shards
from trinity.evals.needles import Haystack
from trinity.tokenizer import Tokenizer, train_tokenizer


def noise(number: int, sentences: int) -> str:
    stream = Haystack(Half.TRAINING if number % 2 else Half.EVALUATION).sentences(Draws(number))
    return " ".join(next(stream) for _ in range(sentences))


def write_inputs(folder: Path) -> None:
    """`folder/tokenizer`, `folder/shards/{train,val}` and `folder/chats.jsonl`."""
    texts = [noise(number, 60) for number in range(40)] + [arithmetic.text(Random(i), 20, 9) for i in range(40)]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=400, sample_bytes=1_000_000))
    tokenizer.save(folder / "tokenizer")
    for split, part in (("train", texts[:36] + texts[40:76]), ("val", texts[36:40] + texts[76:])):
        write_text(folder / "shards" / split, part, tokenizer)
    rng = Random(0)
    lines = [json.dumps(arithmetic.conversation(rng, 9)) for _ in range(120)]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_text(directory: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    documents = [
        TokenDocument(
            np.append(tokenizer.encode_batch([text])[0], tokenizer.eos_id),
            domain="math" if "=" in text or "\n" in text else "prose",
            id=str(number),
            num_bytes=len(text),
        )
        for number, text in enumerate(texts)
    ]
    write_shards(
        directory,
        documents,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def tiny_config(folder: Path, **sections: dict) -> RunConfig:
    """Settings over `write_inputs`; each section's keys override those here."""
    stage = {"micro_rows": 2, "eval_every": 100, "eval_rows": 2}
    base = {
        "model": {
            "vocab_size": 512,
            "num_layers": 4,
            "num_dense_layers": 1,
            "dim": 32,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "ffn_dim": 64,
            "expert_dim": 16,
            "num_experts": 4,
            "experts_per_token": 2,
            "window": 32,
            "max_positions": 512,
        },
        "data": {
            "shards": str(folder / "shards"),
            "tokenizer": str(folder / "tokenizer"),
            "streams": 2,
            "buffer": 4,
            "prefetch": 1,
        },
        "optim": {"muon_lr": 0.02, "adamw_lr": 0.004},
        "checkpoint": {"every_steps": 2, "keep_last": 3},
        "pretrain": {
            **stage,
            "seq_len": 64,
            "batch": [{"from_tokens": 0, "rows": 4}],
            "phases": [
                {"name": "general", "tokens": 1024, "weights": {"prose": 0.5, "math": 0.5}},
                {"name": "quality", "tokens": 512, "weights": {"math": 1.0}},
            ],
        },
        "extend": {**stage, "seq_len": 512, "tokens": 8192, "batch_rows": 4, "niah_share": 0.5},
        "sft": {
            **stage,
            "seq_len": 64,
            "template_samples": 4,
            "sample_tokens": 8,
            "batch_rows": 4,
            "epochs": 1,
            "conversations": [str(folder / "chats.jsonl")],
        },
        "rl": {
            **stage,
            "seq_len": 64,
            "steps": 4,
            "prompts_per_step": 4,
            "group": 4,
            "max_new_tokens": 4,
        },
        "eval": {
            "niah_lengths": [384],
            "niah_depths": 2,
            "niah_keys": 1,
            "niah_samples": 1,
            "arithmetic_questions": 10,
        },
        "runtime": {"device": "cpu", "dtype": "float32", "threads": 1},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return RunConfig.model_validate({"name": "tiny", **base})
