"""Loss and bits per byte on held-out rows, by domain."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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


@dataclass
class _Sums:
    """Sums over rows: of nats n, targets t, their products, and nats and bytes of tokens that stand for text."""

    values: np.ndarray = field(default_factory=lambda: np.zeros(8))

    def add(self, nats_BT: np.ndarray, there_BT: np.ndarray, bytes_BT: np.ndarray) -> None:
        n_B, t_B, text_BT = nats_BT.sum(1), there_BT.sum(1), bytes_BT > 0
        products = [n_B @ n_B, n_B @ t_B, t_B @ t_B]
        self.values += [n_B.sum(), t_B.sum(), *products, (t_B > 0).sum(), nats_BT[text_BT].sum(), bytes_BT.sum()]

    def means(self) -> dict[str, float]:
        nats, targets, nn, nt, tt, rows, text_nats, num_bytes = self.values.tolist()
        loss = nats / max(targets, 1)
        # Standard error of a ratio of sums, rows being the independent pieces.
        variance = max(nn - 2 * loss * nt + loss**2 * tt, 0) * rows / max(rows - 1, 1)
        return {
            "loss": loss,
            "standard_error": variance**0.5 / max(targets, 1),
            "bits_per_byte": text_nats / math.log(2) / max(num_bytes, 1),
            "tokens": int(targets),
        }


@torch.no_grad()
def evaluate(model: Transformer, rows: HeldOut, bytes_V: np.ndarray, micro_rows: int) -> dict[str, Any]:
    """`{loss, standard_error, bits_per_byte, tokens, domains: {name: the same}}`; every rank gets the same.

    Loss is nats per target token, over all domains together too. Bits per byte counts only tokens that stand for text
    (the end of a document has no bytes), which makes models with different tokenizers comparable.
    """
    device = next(model.parameters()).device
    domains: dict[str, dict[str, float]] = {}
    total = _Sums()
    for domain in rows.domains:
        sums = _Sums()
        for batch in rows.batches(domain, micro_rows, dist.rank(), dist.world_size()):
            nats_BT = -target_logprobs(model, to_device(batch, device)).double().cpu().numpy()
            there_BT = batch.targets_BT != IGNORE
            sums.add(nats_BT, there_BT, np.where(there_BT, bytes_V[np.where(there_BT, batch.targets_BT, 0)], 0))
        sums = _Sums(dist.all_reduce_sum(torch.from_numpy(sums.values).to(device)).cpu().numpy())
        domains[domain] = sums.means()
        total.values += sums.values
    return {**total.means(), "domains": domains}
