"""Near duplicates: precision, recall, speed, memory and growth, on documents with planted near-duplicates.

    python bench/curate.py [--documents 20000] [--rival] [--json FILE]

A document is 60 to 600 words drawn from a vocabulary with Zipf's frequencies. A share of the documents are copies of
earlier ones with words replaced, removed and added at random and the lines broken anew; the similarity of each copy to
its original (Jaccard, of shingles of five words) is computed exactly. The reference for precision and recall are the
pairs at or above the threshold: planted ones by that exact value, all others by exact comparison of the candidates that
were found. `--rival` runs the package datasketch over the same documents with the same bands, if it is installed.
One core; each size is run alone, smallest first, so that growth shows.
"""

import argparse
import json
import os
import random
import resource
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.files import write_json
from trinity.config.curate import DuplicatesConfig
from trinity.curate.minhash import Hasher, find_near, jaccard
from trinity.curate.words import shingles, word_hashes

PLANTED = 0.2
VOCABULARY = 30_000


def make(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """(documents, number of the original of each or -1)."""
    draw = random.Random(seed)
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(10, VOCABULARY + 10)
    words = np.array(["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randrange(2, 10))) for _ in shares])
    cumulative = np.cumsum(shares / shares.sum())
    documents: list[str] = []
    originals: list[int] = []
    sources: list[int] = []
    for number in range(count):
        if sources and draw.random() < PLANTED:
            origin = draw.choice(sources)
            documents.append(_changed(documents[origin].split(), draw, words))
            originals.append(origin)
            continue
        picked = words[np.searchsorted(cumulative, generator.random(draw.randrange(60, 600)))]
        documents.append(" ".join(picked.tolist()))
        originals.append(-1)
        sources.append(number)
    return documents, originals


def _changed(words: list[str], draw: random.Random, vocabulary: np.ndarray) -> str:
    """A copy with as many changes as make similarities from about 0.4 to 1."""
    changed = []
    rate = draw.choice((0.0, 0.005, 0.01, 0.02, 0.04, 0.08))
    for word in words:
        what = draw.random()
        if what < rate:
            changed.append(str(vocabulary[draw.randrange(len(vocabulary))]))
            if what < rate / 3:
                continue
            if what < 2 * rate / 3:
                changed.append(word)
        else:
            changed.append(word)
    return "\n".join(" ".join(changed[i : i + 12]) for i in range(0, len(changed), 12))


def measure(count: int, settings: DuplicatesConfig) -> dict[str, Any]:
    """One size: speeds, and how well the planted copies are found."""
    documents, originals = make(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hasher = Hasher(settings)
    start = time.process_time()
    signatures = np.stack([hasher.signature(text) for text in documents])
    hashed = time.process_time()
    found = find_near(signatures, np.ones(count, bool), settings)
    grouped = time.process_time()
    return {
        "documents": count,
        "megabytes": sum(map(len, documents)) / 1e6,
        "hash_seconds": hashed - start,
        "group_seconds": grouped - hashed,
        "documents_per_second_per_core": count / (grouped - start),
        "megabytes_per_second_per_core": sum(map(len, documents)) / 1e6 / (grouped - start),
        "memory_beyond_texts_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "signature_bytes_per_document": signatures.nbytes // count,
        "compared_per_document": int(found.candidates) / count,
        **_quality(documents, originals, found.keeper_N, settings),
    }


def _quality(
    documents: list[str], originals: list[int], keeper: np.ndarray, settings: DuplicatesConfig
) -> dict[str, Any]:
    cache: dict[int, np.ndarray] = {}

    def of(number: int) -> np.ndarray:
        if number not in cache:
            cache[number] = np.unique(shingles(word_hashes(documents[number]), settings.ngram))
        return cache[number]

    similarity = {i: jaccard(of(i), of(o)) for i, o in enumerate(originals) if o >= 0}
    wanted = [i for i, value in similarity.items() if value >= settings.threshold]
    hit = [i for i in wanted if keeper[i] == keeper[originals[i]]]
    dropped = np.flatnonzero(keeper != np.arange(len(documents)))
    family = [o if o >= 0 else i for i, o in enumerate(originals)]
    right = [i for i in dropped.tolist() if _close_to_group(i, keeper, family, of, settings.threshold)]
    bands = [(0.4, 0.6), (0.6, 0.7), (0.7, 0.75), (0.75, 0.8), (0.8, 0.9), (0.9, 1.01)]
    return {
        "planted": len(similarity),
        "planted_at_threshold": len(wanted),
        "recall": len(hit) / max(1, len(wanted)),
        "dropped": len(dropped),
        "precision": len(right) / max(1, len(dropped)),
        "precision_of_families": float(np.mean([family[i] == family[keeper[i]] for i in dropped]))
        if len(dropped)
        else 1.0,
        "found_by_similarity": {
            f"{low:g} to {min(high, 1.0):g}": {
                "planted": sum(low <= v < high for v in similarity.values()),
                "found": sum(
                    low <= v < high and bool(keeper[i] == keeper[originals[i]]) for i, v in similarity.items()
                ),
            }
            for low, high in bands
        },
    }


def _close_to_group(i: int, keeper: np.ndarray, family: list[int], of: Any, threshold: float) -> bool:
    """Whether a dropped document is as similar to an earlier member of its group as the threshold asks."""
    members = np.flatnonzero(keeper == keeper[i])
    return any(family[m] == family[i] and jaccard(of(i), of(int(m))) >= threshold for m in members if m != i)


def rival(count: int, settings: DuplicatesConfig) -> dict[str, Any]:
    """datasketch over the same documents."""
    from datasketch import MinHash, MinHashLSH  # pyright: ignore[reportMissingImports]

    documents, originals = make(count)
    rows = settings.permutations // settings.bands
    start = time.process_time()
    lsh = MinHashLSH(num_perm=settings.permutations, params=(settings.bands, rows))
    group = np.arange(count)
    for number, text in enumerate(documents):
        words = text.split()
        runs = {" ".join(words[i : i + settings.ngram]).encode() for i in range(len(words) - settings.ngram + 1)}
        minhash = MinHash(num_perm=settings.permutations)
        minhash.update_batch(list(runs))
        near = [int(key) for key in lsh.query(minhash)]
        lsh.insert(str(number), minhash)
        if near:
            group[number] = min(group[other] for other in near)
    seconds = time.process_time() - start
    planted = [(i, o) for i, o in enumerate(originals) if o >= 0]
    return {
        "documents": count,
        "documents_per_second_per_core": count / seconds,
        "found_of_planted": sum(bool(group[i] == group[o]) for i, o in planted) / len(planted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--rival", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = DuplicatesConfig()
    sizes = [options.documents // 4, options.documents // 2, options.documents]
    runs = [measure(size, settings) for size in sizes]
    result: dict[str, Any] = {"settings": settings.model_dump(), "runs": runs}
    times = [run["hash_seconds"] + run["group_seconds"] for run in runs]
    result["growth"] = [later / earlier for earlier, later in pairwise(times)]
    result["growth_of_grouping"] = [
        later["group_seconds"] / earlier["group_seconds"] for earlier, later in pairwise(runs)
    ]
    if options.rival:
        result["datasketch"] = rival(options.documents // 4, settings)
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
