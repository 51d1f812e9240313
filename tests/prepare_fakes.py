"""A byte-level tokenizer with the interface of the real one, small enough to reason about; it pickles."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ByteTokenizer:
    """Token b is byte b; 256 ends a document."""

    vocab_size: int = 257
    eos_id: int = 256

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"bytes {self.vocab_size} {self.eos_id}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")
