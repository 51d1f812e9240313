"""Speed of row filling and of the loader, on one core and a warm cache.

    python bench/data.py [--seq-len 8192] [--buffer 4096] [--tokens 33554432] [--json FILE]

Documents have log-normal lengths (median 600 tokens, mean about 1500, a few of 100 000 and more) and lie in a memory
map of 32-bit tokens, as a vocabulary of 200 000 needs. `list-based` keeps documents as lists of ints and is checked to
fill the same rows. Each speed is the median of the repeats; padding is not counted as tokens.
`largest doc` is the share of a batch of 8 rows that its largest document has, on average.
"""

import argparse
import json
import mmap
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.files import write_json
from trinity.config import DataConfig, Phase
from trinity.data.loader import Loader
from trinity.data.mixture import DocumentStream, Mixture
from trinity.data.packing import BestFit, Concat
from trinity.data.rows import Packer, Rows, empty_rows, finish_row
from trinity.data.rsdb import RSDB, ReferenceRSDB


class MappedStore:
    """Random tokens of random documents in a memory-mapped file."""

    domains = ("web", "code", "books")
    sources = ("made up",)
    fingerprint = tokenizer_fingerprint = "bench"

    def __init__(self, path: Path, num_tokens: int) -> None:
        rng = np.random.default_rng(0)
        lengths = np.exp(rng.normal(np.log(600), 1.35, num_tokens // 1000)).astype(np.int64) + 2
        self.lengths = lengths[: int(np.searchsorted(lengths.cumsum(), num_tokens))]
        self.domain_ids = rng.choice(3, len(self.lengths), p=[0.7, 0.25, 0.05])
        self.source_ids = np.zeros(len(self.lengths), np.int64)
        self._starts = (self.lengths.cumsum() - self.lengths).tolist()
        path.write_bytes(rng.integers(0, 200_000, int(self.lengths.sum()), dtype=np.uint32).tobytes())
        with path.open("rb") as file:
            self._tokens = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint32)
        self._tokens.sum()  # warms the cache

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def tokens(self, doc: int, start: int, stop: int) -> np.ndarray:
        first = self._starts[doc]
        return self._tokens[first + start : first + stop]

    def describe(self, doc: int) -> dict[str, Any]:
        return {"source": "bench", "id": str(doc), "domain": self.domains[self.domain_ids[doc]], "offset": 0}


PHASE = Phase(name="all", tokens=1, weights={"web": 0.6, "code": 0.3, "books": 0.1})


def seconds_per_call(call: Callable[[], object], repeats: int, calls: int) -> Iterator[float]:
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        yield (time.perf_counter() - start) / calls


def largest_share(rows: Rows) -> float:
    """Share of a batch's tokens that its largest document has."""
    tokens: Counter[int] = Counter()
    for chunks in rows.documents:
        for doc, _, length in chunks:
            tokens[doc] += length
    return max(tokens.values()) / tokens.total()


def check_same_rows(fast: RSDB, plain: ReferenceRSDB, seq_len: int) -> None:
    """In a function of its own: were the lists of `plain` alive, garbage collection would slow all later figures."""
    ours, theirs = np.empty((2, seq_len), np.int64), np.empty((2, seq_len), np.int64)
    for _ in range(64):
        assert fast.fill(*ours) == plain.fill(*theirs)
        assert np.array_equal(ours, theirs), "the list-based version fills other rows"


def bench_packer(packer: Packer | ReferenceRSDB, seq_len: int, rows: int, repeats: int) -> dict[str, Any]:
    """Tokens of documents (padding does not count) per second, for batches of 8 complete rows."""
    batch = 8
    tokens = chunks_seen = filled = 0

    def one_batch() -> Rows:
        nonlocal tokens, chunks_seen, filled
        out = empty_rows(batch, seq_len)
        for row in range(batch):
            chunks = packer.fill(out.tokens_BT[row], out.targets_BT[row])
            finish_row(out, row, chunks)
            tokens += sum(chunk.length for chunk in chunks)
            chunks_seen += len(chunks)
            filled += 1
        return out

    one_batch()  # fills the pool
    tokens = chunks_seen = filled = 0
    seconds = list(seconds_per_call(one_batch, repeats, max(1, rows // batch)))
    share = tokens / (filled * seq_len)
    chunks_per_row = chunks_seen / filled
    return {
        "tokens_per_second": share * batch * seq_len / statistics.median(seconds),
        "padding": 1 - share,
        "chunks_per_row": chunks_per_row,
        "largest_share": statistics.fmean(largest_share(one_batch()) for _ in range(50)),
        "state_bytes": None if isinstance(packer, ReferenceRSDB) else len(json.dumps(packer.state_dict())),
    }


def bench_loader(
    store: MappedStore, settings: DataConfig, seq_len: int, step_ms: float, repeats: int
) -> dict[str, Any]:
    """How long a step of 16 rows waits for them, when the rest of the step takes `step_ms` and leaves the CPU idle."""
    rows, waits = 16, []
    with Loader(store, settings, [PHASE], seq_len, seed=0) as loader:
        loader.next_rows(0, rows, 0)
        for step in range(1, 1 + repeats):
            time.sleep(step_ms / 1000)
            start = time.perf_counter()
            loader.next_rows(step, rows, 0)
            waits.append(time.perf_counter() - start)
        state_bytes = len(json.dumps(loader.state_dict()))
    wait = statistics.median(waits)
    return {
        "wait_ms": wait * 1000,
        "tokens_per_second": rows * seq_len / (wait + step_ms / 1000),
        "state_bytes": state_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--buffer", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1 << 25, help="size of the corpus")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        store = MappedStore(Path(folder) / "tokens", args.tokens)

        def source() -> DocumentStream:
            return Mixture(store, [PHASE], streams=1, seed=0, max_epochs=1_000_000).stream(0)

        packers: dict[str, Callable[[], Any]] = {
            "rsdb": lambda: RSDB(store, source(), args.buffer, 0),
            "rsdb, list-based": lambda: ReferenceRSDB(store, source(), args.buffer, 0),
            "concat": lambda: Concat(store, source()),
            "best-fit": lambda: BestFit(store, source(), args.buffer, 0),
            "single": lambda: Concat(store, source(), several=False),
        }
        check_same_rows(packers["rsdb"](), packers["rsdb, list-based"](), args.seq_len)

        results: dict[str, Any] = {
            "seq_len": args.seq_len,
            "buffer": args.buffer,
            "documents": store.num_documents,
            "mean_length": float(store.lengths.mean()),
            "packers": {},
            "loader": {},
        }
        print(f"T={args.seq_len}, buffer {args.buffer}, {store.num_documents:,} documents, ", end="")
        print(f"mean {store.lengths.mean():,.0f} tokens\n")
        print(f"{'packing':<18}{'M tokens/s':>12}{'padding':>9}{'largest doc':>13}{'chunks/row':>12}{'state KiB':>11}")
        for name, make in packers.items():
            found = bench_packer(make(), args.seq_len, 64 if "list" in name else 512, args.repeats)
            results["packers"][name] = found
            state = f"{found['state_bytes'] / 1024:.1f}" if found["state_bytes"] else "-"
            print(
                f"{name:<18}{found['tokens_per_second'] / 1e6:>12.1f}{found['padding']:>9.1%}"
                f"{found['largest_share']:>13.1%}{found['chunks_per_row']:>12.1f}{state:>11}"
            )
        speeds = {name: found["tokens_per_second"] for name, found in results["packers"].items()}
        results["speedup_over_lists"] = speeds["rsdb"] / speeds["rsdb, list-based"]
        print(f"\nrsdb is {results['speedup_over_lists']:.1f} times as fast as on lists\n")

        print(f"{'loader, 16 rows a step':<32}{'wait ms':>10}{'M tokens/s':>12}{'state KiB':>11}")
        for prefetch, step_ms in ((0, 0.0), (2, 0.0), (0, 20.0), (2, 20.0)):
            settings = DataConfig(buffer=args.buffer, streams=8, max_epochs=1_000_000, prefetch=prefetch)
            found = bench_loader(store, settings, args.seq_len, step_ms, 50)
            name = f"prefetch {prefetch}, step of {step_ms:.0f} ms"
            results["loader"][name] = found
            line = f"{name:<32}{found['wait_ms']:>10.2f}{found['tokens_per_second'] / 1e6:>12.1f}"
            print(f"{line}{found['state_bytes'] / 1024:>11.1f}")
        if args.json:
            write_json(args.json, results)


if __name__ == "__main__":
    main()
