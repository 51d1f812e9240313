"""Which documents of all blocks stay: exact duplicates by hash, near ones by signature; the first is kept."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trinity.base.files import atomic_write, read_json, write_json
from trinity.config.curate import CurateConfig
from trinity.curate.blocks import block_path, read_block
from trinity.curate.minhash import find_near
from trinity.curate.tally import Tallies, Tally

KEEP, REPORT = "keep.npy", "duplicates.json"


def decide(work: Path, blocks: Sequence[int], config: CurateConfig) -> None:
    """Write `work/keep.npy`, one flag for each document of all blocks in order, and `work/duplicates.json`.

    Returns at once when both are there. Memory: about 50 bytes for each document; signatures are a memory map.
    """
    if (work / REPORT).exists() and (work / KEEP).exists():
        return
    start = time.perf_counter()
    clean = work / "clean"
    hashes, sizes = [], []
    for block in blocks:
        rows = read_block(block_path(clean, block), ["hash"])["hash"]
        sizes.append(len(rows))
        hashes.append(np.frombuffer(b"".join(rows), ">u8").reshape(-1, 2))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    total = int(starts[-1])
    keeper = np.arange(total)
    exact, near = Tally(), Tally()
    if config.has("deduplicate") and total:
        key = np.concatenate(hashes)
        order = np.lexsort((key[:, 1], key[:, 0]))  # stable: the first of equal ones stays the first
        again = (key[order[1:]] == key[order[:-1]]).all(axis=1)
        firsts = np.maximum.accumulate(np.where(np.concatenate([[True], ~again]), np.arange(total), 0))
        keeper[order] = order[firsts]
    alive = keeper == np.arange(total)
    exact_gone = np.flatnonzero(~alive)
    near_gone = np.zeros(0, int)
    found = None
    if config.has("deduplicate") and config.duplicates.near and total:
        found = find_near(_signatures(work, blocks, starts, config), alive, config.duplicates)
        near_gone = np.flatnonzero(alive & (found.keeper_N != np.arange(total)))
        keeper[near_gone] = found.keeper_N[near_gone]
    keep = keeper == np.arange(total)
    _count(clean, blocks, starts, keeper, (exact_gone, near_gone), (exact, near))
    exact.seconds = time.perf_counter() - start
    tallies: Tallies = {}
    if config.has("deduplicate"):
        tallies["exact duplicates"] = exact
        if config.duplicates.near:
            tallies["near duplicates"] = near
    with atomic_write(work / KEEP) as file:
        np.save(file, keep, allow_pickle=False)
    write_json(
        work / REPORT,
        {
            "starts": starts.tolist(),
            "compared": found.candidates if found is not None else 0,
            "tallies": {name: tally.as_json() for name, tally in tallies.items()},
        },
    )
    (work / "signatures.npy").unlink(missing_ok=True)


def kept_rows(work: Path, block: int) -> np.ndarray:
    """Numbers of the block's documents that stay. `block` counts from 0 in the order of the blocks."""
    starts = read_json(work / REPORT)["starts"]
    keep = np.load(work / KEEP, mmap_mode="r")
    return np.flatnonzero(keep[starts[block] : starts[block + 1]])


def _signatures(work: Path, blocks: Sequence[int], starts: np.ndarray, config: CurateConfig) -> np.ndarray:
    shape = (int(starts[-1]), config.duplicates.permutations)
    whole = np.lib.format.open_memmap(work / "signatures.npy", "w+", np.dtype(np.uint32), shape)
    for number, block in enumerate(blocks):
        rows = read_block(block_path(work / "clean", block), ["signature"])["signature"]
        whole[starts[number] : starts[number + 1]] = np.frombuffer(b"".join(rows), np.uint32).reshape(-1, shape[1])
    return whole


def _count(
    clean: Path,
    blocks: Sequence[int],
    starts: np.ndarray,
    keeper: np.ndarray,
    gone: tuple[np.ndarray, np.ndarray],
    tallies: tuple[Tally, Tally],
) -> None:
    """Documents, tokens and examples of both kinds of duplicates, a block at a time."""
    exact, near = tallies
    names: dict[int, str] = {}
    exact_gone, near_gone = (set(numbers.tolist()) for numbers in gone)
    shown: set[int] = set()
    for numbers in gone:
        shown |= set(keeper[numbers[:5]].tolist())
    for number, block in enumerate(blocks):
        rows: dict[str, list[Any]] = read_block(block_path(clean, block), ["tokens", "source", "id"])
        for row, (tokens, source, id) in enumerate(zip(rows["tokens"], rows["source"], rows["id"], strict=True)):
            document = int(starts[number]) + row
            where = f"{source}/{id}"
            if document in shown:
                names[document] = where
            exact.taken += 1
            exact.tokens_in += tokens
            if document in exact_gone:
                exact.drop("exact duplicate", f"{where} is {names.get(int(keeper[document]), 'an earlier one')}")
                continue
            exact.given += 1
            exact.tokens_out += tokens
            near.taken += 1
            near.tokens_in += tokens
            if document in near_gone:
                near.drop("near duplicate", f"{where} is close to {names.get(int(keeper[document]), 'an earlier one')}")
                continue
            near.given += 1
            near.tokens_out += tokens
