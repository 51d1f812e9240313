"""Exact duplicates over all units, in bounded memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trinity.base.files import atomic_write

DOCUMENTS_AT_ONCE = 1 << 25
"""Hashes sorted in memory at once, about: 24 bytes each, and several times that during the sort."""


def choose_kept(scans: Sequence[Path], keep_path: Path, deduplicate: bool, at_once: int = DOCUMENTS_AT_ONCE) -> None:
    """Write which documents of all scans, in order, are kept, as a NumPy file of bool.

    Of equal documents that no filter dropped, the first in the order of the inputs is kept. Memory: a few bytes for
    each document, and one partition of the hashes.
    """
    keep = np.concatenate([_member(scan, "verdicts") == 0 for scan in scans])
    partitions = 1
    while partitions * at_once < keep.size:
        partitions *= 2
    for partition in range(partitions if deduplicate else 0):
        positions, keys, base = [], [], 0
        for scan in scans:
            halves = np.frombuffer(_member(scan, "hashes").tobytes(), ">u8").reshape(-1, 2)
            mine = keep[base : base + len(halves)] & (halves[:, 0] % partitions == partition)
            positions.append(base + np.flatnonzero(mine))
            keys.append(halves[mine])
            base += len(halves)
        position, key = np.concatenate(positions), np.concatenate(keys)
        order = np.lexsort((key[:, 1], key[:, 0]))  # stable: equal hashes stay in the order of the inputs
        key = key[order]
        again = (key[1:] == key[:-1]).all(axis=1)
        keep[position[order[1:][again]]] = False
    with atomic_write(keep_path) as file:
        np.save(file, keep, allow_pickle=False)


def _member(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as members:
        return members[name]
