"""Measure the tokenizer: hostile text, training, and compression against two published pretokenisations.

    python bench/tokenizer.py DATA_DIR --out tokenizer.json

DATA_DIR holds `train-*.parquet` and `val.parquet` with the fields `text`, `domain` and `lang`. `--parts` chooses among
training, hostile text and compression against the rivals at the same size (three trainings more). Seconds of CPU are of
all threads together; wall times are of the machine as it is. Bytes are of UTF-8 text, memory is the process's peak
resident set.
"""

import argparse
import os
import platform
import random
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tokenizers

from trinity.base.files import read_json, write_json
from trinity.config import TokenizerConfig
from trinity.tokenizer import Tokenizer, train_tokenizer
from trinity.tokenizer.pretokenize import reference_steps, trinity_split
from trinity.tokenizer.report import Compression, compare, compression, digit_alignment, pieces, rival_splits

MEGABYTE = 1_000_000
PARTS = ["train", "hostile", "compression"]


class Texts:
    """The texts of parquet files, streamed; iterable more than once."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            for batch in pq.ParquetFile(path).iter_batches(64, columns=["text"]):
                yield from batch.column(0).to_pylist()


def hostile_texts(prose: str) -> dict[str, str]:
    """About a megabyte each."""
    units = {
        "digits": "7",
        "spaces": " ",
        "one letter": "a",
        "line breaks": "\n",
        "spaced line breaks": " \n",
        "combining marks": "\u0301",
        "ideographs": "\u4e2d",
        "mixed scripts": "a1\u4e2d \n!\u00e9",
        "replaced bytes": "\ufffd",
        "nulls": "\0",
        "punctuation": "!",
        "digits and spaces": "1 ",
    }
    texts = {name: unit * (MEGABYTE // len(unit.encode())) for name, unit in units.items()}
    return {"prose": prose, **texts, "spaces before a word": " " * MEGABYTE + "x"}


def hostile_bytes() -> dict[str, bytes]:
    """A megabyte each of what is not UTF-8."""
    return {
        "random bytes": random.Random(0).randbytes(MEGABYTE),
        "letters and 0xFF": b"a\xff" * (MEGABYTE // 2),
        "0xFF": b"\xff" * MEGABYTE,
        "cut ideographs": b"\xe4\xb8" * (MEGABYTE // 2),
    }


def bench_hostile(tokenizer: Tokenizer, prose: str) -> dict[str, Any]:
    """Seconds of CPU per megabyte for cutting alone (the saved pattern, the reference steps) and for whole encoding."""
    fast, steps = trinity_split(), reference_steps()
    rows: dict[str, Any] = {}
    for name, text in hostile_texts(prose).items():
        megabytes = len(text.encode()) / MEGABYTE
        cpu, wall = (value / megabytes for value in _best(lambda text=text: tokenizer.encode_batch([text])))
        rows[name] = {
            "pieces": len(pieces(text)),
            "tokens": int(tokenizer.encode_batch([text])[0].size),
            "split_seconds": _best(lambda text=text: fast.pre_tokenize_str(text), 1)[0] / megabytes,
            "reference_split_seconds": _best(lambda text=text: steps.pre_tokenize_str(text), 1)[0] / megabytes,
            "encode_seconds": cpu,
            "encode_wall_seconds": wall,
            "times_prose": cpu / rows["prose"]["encode_seconds"] if rows else 1.0,
        }
        print(f"  {name:22s} {cpu:6.3f} s/MB  {rows[name]['times_prose']:5.2f} x prose", flush=True)
    for name, data in hostile_bytes().items():
        cpu, wall = _best(lambda data=data: tokenizer.encode_bytes(data))
        times = cpu / rows["prose"]["encode_seconds"]
        rows[name] = {"encode_seconds": cpu, "encode_wall_seconds": wall, "times_prose": times}
        print(f"  {name:22s} {cpu:6.3f} s/MB  {times:5.2f} x prose", flush=True)
    return rows


def _best(function: Any, repeats: int = 3) -> tuple[float, float]:
    """(CPU seconds of the process, wall seconds), the best of either. What else the machine does is in the second."""
    found = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        function()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(cpu for cpu, _ in found), min(wall for _, wall in found)


def bench_training(texts: Texts, vocab_size: int) -> tuple[Tokenizer, dict[str, Any]]:
    num_bytes = sum(len(text.encode()) for text in texts)
    start, cpu = time.perf_counter(), time.process_time()
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=vocab_size), total_bytes=num_bytes)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record = {
        "bytes": num_bytes,
        "vocab_size": vocab_size,
        "learned": tokenizer.eos_id,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": peak,
        "fingerprint": tokenizer.fingerprint,
    }
    print(f"  {num_bytes / 1e6:.0f} MB, {tokenizer.eos_id} entries: {seconds:.0f} s, {peak / 1e9:.2f} GB", flush=True)
    return tokenizer, record


def bench_encoding(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    num_bytes = sum(len(text.encode()) for text in texts)
    seconds = _best(lambda: tokenizer.encode_batch(texts))[1]
    ids = tokenizer.encode_batch(texts)
    decode = _best(lambda: [tokenizer.decode(row.tolist()) for row in ids])[1]
    return {"encode_mb_per_second": num_bytes / seconds / 1e6, "decode_mb_per_second": num_bytes / decode / 1e6}


def held_out_groups(path: Path) -> dict[str, list[str]]:
    """Texts by domain and by language; "all" of a measure therefore counts each text twice."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in pq.read_table(path, columns=["text", "domain", "lang"]).to_pylist():
        groups[f"domain {row['domain']}"].append(row["text"])
        groups[f"language {row['lang']}"].append(row["text"])
    return dict(groups)


def as_table(rows: dict[str, Compression]) -> dict[str, Any]:
    return {
        name: {"bytes": row.bytes, "tokens": row.tokens, "bytes_per_token": row.bytes_per_token}
        for name, row in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokenizer", type=Path, help="use this one instead of training")
    parser.add_argument("--vocab-size", type=int, default=200_000)
    parser.add_argument("--compare-vocab-size", type=int, default=200_000)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to add the parts to")
    parser.add_argument("--save", type=Path, help="directory for the trained tokenizer")
    args = parser.parse_args()

    texts = Texts(sorted(args.data.glob("train-*.parquet")))
    groups = held_out_groups(args.data / "val.parquet")
    by_domain = [text for name, rows in groups.items() if name.startswith("domain ") for text in rows]
    prose = "".join(text for text in Texts([args.data / "train-web.parquet"]))[:MEGABYTE]
    result: dict[str, Any] = read_json(args.out) if args.out.exists() else {}
    result["machine"] = {"cores": os.cpu_count(), "python": platform.python_version()}
    result["tokenizers"] = tokenizers.__version__

    if "train" in args.parts or args.tokenizer is None:
        print("training", flush=True)
        tokenizer, result["training"] = bench_training(texts, args.vocab_size)
        if args.save:
            tokenizer.save(args.save)
    else:
        tokenizer = Tokenizer.load(args.tokenizer)
    if "hostile" in args.parts:
        print("hostile text", flush=True)
        result["hostile"] = bench_hostile(tokenizer, prose)
    if "compression" in args.parts:
        result["encoding"] = bench_encoding(tokenizer, by_domain)
        result["compression"] = as_table(compression(tokenizer, groups))
        rivals = {"trinity": trinity_split(), **rival_splits()}
        result["digit_alignment"] = {name: digit_alignment(split) for name, split in rivals.items()}
        print(f"comparison at {args.compare_vocab_size} entries", flush=True)
        comparison = compare(texts, groups, args.compare_vocab_size)
        for name, rows in comparison.items():
            print(f"  {name:12s} {rows['all'].bytes_per_token:.3f} bytes per token", flush=True)
        result["comparison"] = {
            "vocab_size": args.compare_vocab_size,
            **{name: as_table(rows) for name, rows in comparison.items()},
        }
    write_json(args.out, result)


if __name__ == "__main__":
    main()
