"""What the weights of a mixture name: a domain, or the documents of some sources.

A weight's key is a domain of the shards, or `source:PATTERN` with `*`, `?` and `[...]` as in a shell (`*` also matches
`/`): all documents whose recorded source matches, such as `source:*/wikipedia/*`. Documents that a pattern of any phase
names belong to the pattern's group in every phase and no longer to their domain, so each document is in one group and
passes over it are counted once.
"""

import fnmatch
import re
from collections.abc import Sequence

import numpy as np

from trinity.base.errors import UsageError, UserError, nearest
from trinity.config import Phase
from trinity.data.rows import DocumentStore

PREFIX = "source:"


def is_pattern(key: str) -> bool:
    return key.startswith(PREFIX)


def group_documents(store: DocumentStore, phases: Sequence[Phase]) -> dict[str, np.ndarray]:
    """Document numbers, ascending, by group: every domain of the shards, then every pattern of the phases by name.

    Raises UsageError for a key that names nothing, UserError for two patterns that share a document and for a group
    of a phase without documents.
    """
    keys = {key: phase.name for phase in reversed(phases) for key in phase.weights}  # the first phase that names it
    for key, phase in keys.items():
        if not is_pattern(key) and key not in store.domains:
            raise UsageError(
                f"phase {phase!r} draws from domain {key!r}, but the domains of the shards are "
                f"{', '.join(store.domains)}{nearest(key, store.domains)}; "
                f"a weight of single sources is written {PREFIX}PATTERN"
            )
    owner = np.asarray(store.domain_ids, np.int64).copy()
    patterns = sorted(filter(is_pattern, keys))
    for number, key in enumerate(patterns, start=len(store.domains)):
        mine = _matching(store, key, keys[key])
        if (owner[mine] >= len(store.domains)).any():
            other = patterns[int(owner[mine].max()) - len(store.domains)]
            raise UserError(
                f"the weights {other!r} and {key!r} both name some documents: narrow one of them, or use one for both"
            )
        owner[mine] = number
    kind = np.uint32 if store.num_documents < 1 << 32 else np.int64
    names = [*store.domains, *patterns]
    groups = {name: np.flatnonzero(owner == number).astype(kind) for number, name in enumerate(names)}
    for key, phase in keys.items():
        if not len(groups[key]):
            taken = f" outside of {', '.join(patterns)}" if patterns else ""
            raise UserError(f"phase {phase!r} draws from domain {key!r}, which has no documents in the shards{taken}")
    return groups


def _matching(store: DocumentStore, key: str, phase: str) -> np.ndarray:
    matches = re.compile(fnmatch.translate(key.removeprefix(PREFIX))).match
    chosen = np.array([matches(source) is not None for source in store.sources], bool)
    if not chosen.any():
        names = list(store.sources)
        raise UsageError(
            f"phase {phase!r} draws from {key!r}, but no source of the shards matches; there are {len(names)}, such as "
            f"{', '.join(names[:3])}{nearest(key.removeprefix(PREFIX), names)}"
        )
    return chosen[store.source_ids]
