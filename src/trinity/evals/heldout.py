"""Loss and bits per byte on held-out rows, by domain."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from trinity.base import dist
from trinity.data.rows import IGNORE, Rows, to_device
from trinity.evals.scoring import target_logprobs
from trinity.model.transformer import Transformer
from trinity.tokenizer import Tokenizer


class HeldOut(Protocol):
    """Fixed rows by domain (`data.validation.ValidationRows` is one)."""

    @property
    def domains(self) -> Sequence[str]: ...
    def batches(self, domain: str, micro_rows: int, rank: int = 0, num_ranks: int = 1) -> Iterator[Rows]:
        """Equally many batches on every rank."""
        ...


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Bytes of text that each token stands for [vocab_size], int64; 0 for special tokens and for unused entries."""
    table = np.zeros(vocab_size, np.int64)
    for token in range(tokenizer.vocab_size):
        table[token] = len(tokenizer.decode_bytes([token], skip_special=True))
    return table


@torch.no_grad()
def evaluate(model: Transformer, rows: HeldOut, bytes_V: np.ndarray, micro_rows: int) -> dict[str, Any]:
    """`{loss, bits_per_byte, domains: {name: {loss, bits_per_byte, tokens}}}`; every rank gets the same.

    Loss is nats per target token, over all domains together too. Bits per byte counts only tokens that stand for text
    (the end of a document has no bytes), which makes models with different tokenizers comparable.
    """
    device = next(model.parameters()).device
    domains: dict[str, dict[str, float]] = {}
    totals = np.zeros(4)
    for domain in rows.domains:
        sums = np.zeros(4)  # nats, tokens, nats of text, bytes
        for batch in rows.batches(domain, micro_rows, dist.rank(), dist.world_size()):
            sums += _sums(model, batch, bytes_V, device)
        shared = dist.all_reduce_sum(torch.from_numpy(sums).to(device)).cpu().numpy()
        domains[domain] = {**_means(shared), "tokens": int(shared[1])}
        totals += shared
    return {**_means(totals), "domains": domains}


def _sums(model: Transformer, batch: Rows, bytes_V: np.ndarray, device: torch.device) -> np.ndarray:
    nats_BT = -target_logprobs(model, to_device(batch, device)).double().cpu().numpy()
    there_BT = batch.targets_BT != IGNORE
    bytes_BT = np.where(there_BT, bytes_V[np.where(there_BT, batch.targets_BT, 0)], 0)
    return np.array([nats_BT.sum(), there_BT.sum(), nats_BT[bytes_BT > 0].sum(), bytes_BT.sum()])


def _means(sums: np.ndarray) -> dict[str, float]:
    nats, tokens, text_nats, num_bytes = sums.tolist()
    return {"loss": nats / max(tokens, 1), "bits_per_byte": text_nats / math.log(2) / max(num_bytes, 1)}
