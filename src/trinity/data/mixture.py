"""Which document comes next: an endless, repeatable order of documents for each stream, of a few numbers of state.

Inside a domain of n documents, document number c of stream s (of S) is number p = c * S + s of all streams together; it
is read in pass p // n over the domain, at place p % n of that pass's pseudorandom order. Nothing is shuffled in memory,
every pass reads every document once, and a stream is moved to any place by setting c.

Between domains, the next piece of text (a document, or the part of one that goes into a row) is chosen so that the
*tokens* delivered keep the shares that the weights ask for. With t_d tokens delivered from domain d in this phase, l_d
the length of its next piece and w_d its share, the domain with the smallest

    (t_d + u * l_d) / w_d

is next: weighted fair queueing (Demers, Keshav, Shenker 1989) in which a piece counts as delivered at a fraction u of
its length. No domain is ever away from its share by more than the longest pieces. u differs by stream, spread evenly
over (0, 1) in an order of its own for each domain and phase. So the expected share is exact from the first token on: a
rare domain of very long documents neither crowds the start of every stream nor waits for the end of the run.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trinity.base.rng import derive, uniform
from trinity.config import Phase
from trinity.data.groups import group_documents
from trinity.data.permutation import Permutation
from trinity.data.rows import DocumentStore

_BLOCK = 1024


class Mixture:
    """The documents of every domain and the shares of every phase: what all streams have in common.

    After `max_epochs` passes over a domain it leaves the mixture, and the others share its part by their weights.
    `length_bias` > 0 draws a document with odds length ** length_bias inside its domain: each pass looks at every
    document once and takes it with probability (length / longest) ** length_bias. The order stays random access, and no
    document is read more than `max_epochs` times however long it is.
    A domain here and below is a group of `groups.group_documents`: a domain of the shards, or what a weight names by
    its sources. Raises what that raises.
    """

    def __init__(
        self,
        store: DocumentStore,
        phases: Sequence[Phase],
        *,
        streams: int,
        seed: int,
        max_epochs: int,
        length_bias: float = 0.0,
    ) -> None:
        assert phases
        self.store, self.phases, self.num_streams, self.seed = store, tuple(phases), streams, seed
        self.max_epochs, self.length_bias = max_epochs, length_bias
        groups = group_documents(store, self.phases)
        self.groups = list(groups)
        self.members = list(groups.values())
        self.num_tokens = [int(store.lengths[members].sum()) for members in self.members]  # by group
        self.shares = [self._shares(phase) for phase in self.phases]

    def _shares(self, phase: Phase) -> list[float]:
        total = math.fsum(phase.weights.values())
        return [phase.weights.get(name, 0.0) / total for name in self.groups]

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the order of documents."""
        parts = [
            self.store.fingerprint,
            self.num_streams,
            self.seed,
            self.max_epochs,
            self.length_bias,
            [sorted(phase.weights.items()) for phase in self.phases],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def supply(self, phase: int | None = None) -> int:
        """Tokens that the domains of a phase (or of any phase) hold, all passes counted."""
        chosen = self.shares if phase is None else [self.shares[phase]]
        used = [tokens for d, tokens in enumerate(self.num_tokens) if any(shares[d] for shares in chosen)]
        return self.max_epochs * sum(used)

    def passes(self) -> dict[str, float]:
        """Passes over each domain that the phases ask for; with more than `max_epochs` it leaves before the end."""
        passes = {}
        for d, (name, held) in enumerate(zip(self.groups, self.num_tokens, strict=True)):
            asked = math.fsum(p.tokens * shares[d] for p, shares in zip(self.phases, self.shares, strict=True))
            passes[name] = asked / held if asked else 0.0
        return passes

    def stream(self, number: int) -> "DocumentStream":
        return DocumentStream(self, number)


class DocumentStream:
    """The documents of one stream in order: of each domain on its own, or of all domains of the phase by its shares."""

    def __init__(self, mixture: Mixture, number: int) -> None:
        assert 0 <= number < mixture.num_streams
        self._mixture, self._number = mixture, number
        self._load(0, [0] * len(mixture.groups), [0] * len(mixture.groups))

    def _load(self, phase: int, counts: list[int], tokens: list[int]) -> None:
        self.phase, self._tokens = phase, list(tokens)
        self._orders = [_DomainOrder(self._mixture, d, self._number, count) for d, count in enumerate(counts)]
        self._keys: list[float] = []  # of each domain's next document; made at the first `draw` of a phase
        self._fractions: dict[int, float] = {}

    def set_phase(self, phase: int) -> None:
        """Go by the shares of `phase` from now on. Domains go on where they were; the count of tokens starts anew."""
        assert 0 <= phase < len(self._mixture.phases)
        if phase != self.phase:
            self.phase, self._tokens = phase, [0] * len(self._tokens)
            self._keys, self._fractions = [], {}

    @property
    def shares(self) -> list[float]:
        """Share of the tokens of each domain in this phase; 0 for a domain that is no part of it."""
        return self._mixture.shares[self.phase]

    def pass_length(self, domain: int) -> int:
        """Documents of one pass over a domain that fall to this stream, rounded down."""
        return len(self._mixture.members[domain]) // self._mixture.num_streams

    def key(self, domain: int, length: int) -> float:
        """Of all domains, the one whose next piece (of `length` tokens) has the smallest key is to deliver it."""
        if domain not in self._fractions:
            mixture = self._mixture
            order = Permutation(derive(mixture.seed, "share", mixture.groups[domain], self.phase), mixture.num_streams)
            self._fractions[domain] = (int(order(np.array([self._number]))[0]) + 0.5) / mixture.num_streams
        return (self._tokens[domain] + self._fractions[domain] * length) / self.shares[domain]

    def deliver(self, domain: int, length: int) -> None:
        """Count tokens of a domain as delivered in this phase."""
        self._tokens[domain] += length

    def draw_from(self, domain: int, count: int) -> list[int]:
        """The next `count` documents of one domain, fewer when it is used up; they do not count as delivered."""
        order, drawn = self._orders[domain], []
        while len(drawn) < count and order.find():
            drawn.append(order.pop())
        return drawn

    def draw(self, count: int) -> list[int]:
        """The next `count` documents by the shares of the phase, delivered whole; fewer when all are used up."""
        if not self._keys:
            self._keys = [self._next_key(domain) for domain in range(len(self._orders))]
        keys, drawn = self._keys, []
        while len(drawn) < count:
            best = min(keys)
            if best == math.inf:
                break
            domain = keys.index(best)
            order = self._orders[domain]
            self.deliver(domain, order.next_length)
            drawn.append(order.pop())
            keys[domain] = self._next_key(domain)
        return drawn

    def _next_key(self, domain: int) -> float:
        order = self._orders[domain]
        if not self.shares[domain] or not order.find():
            return math.inf
        return self.key(domain, order.next_length)

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self.phase, "counts": [o.count for o in self._orders], "tokens": self._tokens.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._load(state["phase"], state["counts"], state["tokens"])


class _DomainOrder:
    """The documents of one domain for one stream. `count` is how many places of the order lie behind."""

    def __init__(self, mixture: Mixture, domain: int, stream: int, count: int) -> None:
        self._mixture, self._stream = mixture, stream
        self._members = mixture.members[domain]
        self._path = (mixture.seed, mixture.groups[domain])
        self._longest = (
            int(mixture.store.lengths[self._members].max()) if mixture.length_bias and len(self._members) else 0
        )
        self.count = count
        self._ahead = count  # the first place not looked at yet
        self._found: list[tuple[int, int, int]] = []  # (document, its length, its place), in reverse

    @property
    def next_length(self) -> int:
        return self._found[-1][1]

    def pop(self) -> int:
        document, _, place = self._found.pop()
        self.count = place + 1
        return document

    def find(self) -> bool:
        """Look ahead until there is a next document; False when the domain is used up."""
        mixture, size = self._mixture, len(self._members)
        while not self._found:
            first = self._ahead * mixture.num_streams + self._stream
            epoch = first // size if size else mixture.max_epochs
            if epoch >= mixture.max_epochs:
                return False
            left = -(((epoch + 1) * size - first) // -mixture.num_streams)  # places of this stream in this pass
            places = np.arange(self._ahead, self._ahead + min(left, _BLOCK))
            numbers = places * mixture.num_streams + self._stream
            order = Permutation(derive(*self._path, "order", epoch), size)
            documents = self._members[order(numbers - epoch * size)]
            lengths = mixture.store.lengths[documents]
            if mixture.length_bias:
                odds = (lengths / self._longest) ** mixture.length_bias
                taken = uniform(derive(*self._path, "length"), numbers) < odds
                places, documents, lengths = places[taken], documents[taken], lengths[taken]
            found = zip(documents.tolist(), lengths.tolist(), places.tolist(), strict=True)
            self._ahead += min(left, _BLOCK)
            self._found = list(found)[::-1]
        return True
