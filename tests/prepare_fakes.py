"""A small corpus, and a byte-level tokenizer with the interface of the real one, small enough to reason about."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def corpus(folder: Path, documents: int = 120, seed: int = 0) -> Path:
    """jsonl, jsonl.gz, text and code, with duplicates across files and some documents to drop."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(map(str, rng.integers(0, 10**6, rng.integers(1, 200)))) for _ in range(documents)]
    folder.mkdir()
    lines = [json.dumps({"text": text, "domain": ("prose", "math")[i % 2], "id": i}) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join([*lines, '{"text": ""}', "no json", lines[3]]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[:20] + [json.dumps({"text": f"only here {i}"}) for i in range(20)]) + "\n")
    (folder / "c.txt").write_text(texts[0] + "\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "d.py").write_text("print('hello')\n" * 3)
    (folder / "sub" / "picture.png").write_bytes(b"\x89PNG")
    return folder


def everything(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
