"""Bits per byte by domain and by position: does the loss keep falling with the context?

Only documents of at least `seq_len` tokens count, and of each its first `seq_len`: the same documents stand behind
every position, so that a curve that falls is the model's doing and not the documents'.
"""

import itertools
import math
from typing import Any

import numpy as np
import torch

from trinity.base.errors import UserError
from trinity.base.rng import derive
from trinity.data.permutation import Permutation
from trinity.data.rows import Chunk, copy_chunk, empty_rows, finish_row, to_device
from trinity.data.shards import Shards
from trinity.evals.scoring import target_logprobs
from trinity.model.transformer import Transformer

FIRST = 64
"""Tokens of the first range of positions; each later one is as long as all before it."""


def ranges(seq_len: int) -> list[tuple[int, int]]:
    """[0, 64), [64, 128), [128, 256), ... up to `seq_len`."""
    edges = [0]
    while edges[-1] < seq_len:
        edges.append(min(seq_len, max(FIRST, 2 * edges[-1])))
    return list(itertools.pairwise(edges))


@torch.no_grad()
def evaluate(
    model: Transformer, store: Shards, bytes_V: np.ndarray, seq_len: int, documents: int, micro_rows: int = 1
) -> dict[str, Any]:
    """`{seq_len, domains: {name: {documents, bits_per_byte, loss, positions: [{from, to, loss, bits_per_byte,
    standard_error, tokens}]}}}`; up to `documents` documents of each domain in a fixed order.

    loss is nats per token, its standard error that over documents. Raises UserError when no document is long enough.
    """
    device = next(model.parameters()).device
    parts = ranges(seq_len)
    domains = {}
    for number, name in enumerate(store.domains):
        long = np.flatnonzero((store.domain_ids == number) & (store.lengths > seq_len))
        if not len(long):
            continue
        order = Permutation(derive(0, "positions", name), len(long))
        chosen = long[order(np.arange(len(long)))][:documents].tolist()
        nats_PD, bytes_PD, text_PD, count_PD = (np.zeros((len(parts), len(chosen))) for _ in range(4))
        for start in range(0, len(chosen), micro_rows):
            group = chosen[start : start + micro_rows]
            rows = empty_rows(len(group), seq_len)
            for row, doc in enumerate(group):
                copy_chunk(store, Chunk(doc, 0, seq_len), False, 0, rows.tokens_BT[row], rows.targets_BT[row])
                finish_row(rows, row, [Chunk(doc, 0, seq_len)])
            nats_BT = -target_logprobs(model, to_device(rows, device)).double().cpu().numpy()
            there_BT = rows.targets_BT >= 0
            size_BT = np.where(there_BT, bytes_V[np.where(there_BT, rows.targets_BT, 0)], 0)
            for part, (low, high) in enumerate(parts):
                at = slice(start, start + len(group))
                nats_PD[part, at] = nats_BT[:, low:high].sum(1)
                count_PD[part, at] = there_BT[:, low:high].sum(1)
                bytes_PD[part, at] = size_BT[:, low:high].sum(1)
                text_PD[part, at] = np.where(size_BT > 0, nats_BT, 0)[:, low:high].sum(1)
        positions = [
            {"from": low, "to": high, **_figures(nats_PD[p], count_PD[p], text_PD[p], bytes_PD[p])}
            for p, (low, high) in enumerate(parts)
        ]
        whole = _figures(nats_PD.sum(0), count_PD.sum(0), text_PD.sum(0), bytes_PD.sum(0))
        domains[name] = {"documents": len(chosen), **whole, "positions": positions}
    if not domains:
        raise UserError(
            f"no held-out document has more than {seq_len} tokens (the longest has {int(store.lengths.max())}): "
            "lower the length"
        )
    return {"seq_len": seq_len, "domains": domains}


def _figures(nats_D: np.ndarray, count_D: np.ndarray, text_D: np.ndarray, bytes_D: np.ndarray) -> dict[str, float]:
    losses_D = nats_D / np.maximum(count_D, 1)
    n = len(losses_D)
    return {
        "loss": float(nats_D.sum() / max(count_D.sum(), 1)),
        "standard_error": float(losses_D.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0,
        "bits_per_byte": float(text_D.sum() / math.log(2) / max(bytes_D.sum(), 1)),
        "tokens": int(count_D.sum()),
    }
