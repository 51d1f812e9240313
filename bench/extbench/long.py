"""Needles at a long length with random weights: seconds to make the questions, to read the texts and to answer.

The answers are wrong, of course; the time does not depend on that. Weights of the preset's shape are drawn on the
device. `--tokenizer` makes real prompts; the vocabulary of the model is then at least the tokenizer's.
"""

import argparse
import time
from typing import Any

import torch

from trainbench.device import random_weights
from trinity.config import EvalConfig, resolve
from trinity.data.halves import Half
from trinity.data.shards import Shards
from trinity.evals import niah
from trinity.evals.generation import greedy
from trinity.evals.needles import Haystack
from trinity.model.transformer import Transformer
from trinity.stages.evaluations import haystack
from trinity.tokenizer import Tokenizer


@torch.no_grad()
def measure_long(options: argparse.Namespace) -> dict[str, Any]:
    """MK-NIAH at `--long-length`: 5 depths of 4 texts, each text read once and then each read again for every depth."""
    cuda = torch.cuda.is_available()
    config, _ = resolve(options.long_shape, overrides=[*options.set, f"model.max_positions={options.long_length}"])
    with torch.device("cuda" if cuda else "cpu"):
        model = Transformer(config.model)
    random_weights(model, config.model.init_scale * config.model.dim**-0.5)
    model.to(torch.bfloat16 if cuda else torch.float32).eval()
    tokenizer = Tokenizer.load(options.tokenizer)
    tokenizer.check_model_vocab(config.model.vocab_size)
    hay = Haystack(Half.EVALUATION)
    if options.shards:
        hay = haystack(Shards.open(options.shards / "val"), tokenizer, Half.EVALUATION)
    complete = greedy(model, tokenizer)
    found: dict[str, Any] = {"parameters": config.model.num_params(), "length": options.long_length}
    for name, samples, reuse in (("warm-up", 1, True), ("reading once", 4, True), ("reading each time", 1, False)):
        settings = EvalConfig(
            niah_lengths=(options.long_length,), niah_depths=5, niah_keys=5, niah_samples=samples, niah_reuse=reuse
        )
        started = time.perf_counter()
        asked = niah.questions(tokenizer, settings, seed=samples, haystack=hay)
        made = time.perf_counter()
        record = niah.evaluate(complete, tokenizer, asked)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - made
        read = sum(len(q.tokens) for q in asked) / (5 if reuse else 1)
        found[name] = {
            "questions": len(asked),
            "seconds_of_making": round(made - started, 2),
            "seconds": round(seconds, 2),
            "seconds_per_question": round(seconds / len(asked), 3),
            "prompt_tokens_per_second": round(read / seconds),
            "score": record["score"],
        }
    found["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30 if cuda else None
    return found
