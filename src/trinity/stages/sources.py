"""What feeds the stages: text through the loader, retrieval documents among it, conversations.

Each is a `train.Source` whose state is small JSON and the same for every number of ranks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from trinity.base import dist
from trinity.base.errors import UsageError
from trinity.base.rng import Draws, derive
from trinity.config import Phase
from trinity.data.chat import ChatRows
from trinity.data.loader import Loader, merge_states
from trinity.data.retrieval import LEAST_TOKENS, Hay, RetrievalDocuments
from trinity.data.rows import Chunk, Rows, empty_rows, finish_row
from trinity.data.shards import Shards
from trinity.optim.schedule import StepPlan
from trinity.stages.setup import Stage


class TextSource:
    """Rows of the shards, mixed by phase; a context manager, because the loader has a thread."""

    fingerprints: Mapping[str, str] = {}
    """Of what the rows are made of beside the shards."""

    def __init__(
        self, stage: Stage, shards: Shards, phases: Sequence[Phase], plan: StepPlan, length_bias: float = 0.0
    ) -> None:
        self._shards, self._plan = shards, plan
        self._micro_rows = stage.settings.micro_rows
        self._phases = [phase.name for phase in phases]
        self._loader = Loader(
            shards,
            stage.config.data,
            phases,
            stage.settings.seq_len,
            stage.config.runtime.seed,
            stage.data_rank,
            stage.data_size,
            length_bias=length_bias,
            tokenizer_fingerprint=stage.tokenizer.fingerprint,
        )

    def next_batch(self, step: int) -> list[Rows]:
        planned = self._plan[step]
        return self.rows(step, planned.rows).split(self._micro_rows)

    def rows(self, step: int, num_rows: int) -> Rows:
        """This rank's part of `num_rows` rows."""
        return self._loader.next_rows(step, num_rows, self._phases.index(self._plan[step].phase))

    def state_dict(self) -> dict[str, Any]:
        return merge_states(dist.gather_objects(self._loader.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)

    def describe(self, rows: Rows) -> list[dict[str, Any]]:
        """The documents of a micro-batch, for events."""
        return [self._shards.describe(chunk.doc) for chunks in rows.documents for chunk in chunks]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()


class RetrievalSource:
    """Text with a share of rows that are generated retrieval documents (`data.retrieval`).

    Rows are exchanged in units of gcd(batch, data.streams), the smallest that every possible number of ranks divides;
    the share is met over the steps. State: the loader's and the number of rows of either kind so far.
    """

    def __init__(self, stage: Stage, text: TextSource, plan: StepPlan, share: float, hay: Hay) -> None:
        settings = stage.config.retrieval
        self._text, self._plan, self._share, self._whole = text, plan, share, settings.whole_rows
        self._seq_len, self._micro_rows = stage.settings.seq_len, stage.settings.micro_rows
        if self._seq_len < LEAST_TOKENS:
            raise UsageError(
                f"{stage.name}.niah_share needs rows of at least {LEAST_TOKENS} tokens, not {self._seq_len}"
            )
        self._streams = stage.config.data.streams
        self._rank, self._ranks = stage.data_rank, stage.data_size
        self._seed = derive(stage.config.runtime.seed, "retrieval", stage.name)
        self._documents = RetrievalDocuments(stage.tokenizer, hay, settings, self._seed)
        self.fingerprints = {"set of retrieval documents": self._documents.fingerprint}
        self._most_parts = self._seq_len // LEAST_TOKENS
        self._rows = self._generated = 0

    def next_batch(self, step: int) -> list[Rows]:
        total = self._plan[step].rows
        unit = math.gcd(total, self._streams)
        wanted = self._share * (self._rows + total) - self._generated
        generated = min(total, max(0, round(wanted / unit) * unit))
        first = self._generated
        batches: list[Rows] = []
        if total > generated:
            batches += self._text.rows(step, total - generated).split(self._micro_rows)
        mine = range(first + self._rank, first + generated, self._ranks)
        for start in range(0, len(mine), self._micro_rows):
            batches.append(self._retrieval_rows(mine[start : start + self._micro_rows]))
        self._rows += total
        self._generated += generated
        return batches

    def _retrieval_rows(self, numbers: Sequence[int]) -> Rows:
        """Row number n holds one document as long as the row, or several of unequal lengths, as n tells: what is
        learned at short lengths carries over to long ones."""
        rows = empty_rows(len(numbers), self._seq_len)
        for row, number in enumerate(numbers):
            chunks, at = [], 0
            for part, length in enumerate(self._lengths(number)):
                made = self._documents.document(number * self._most_parts + part, length)
                rows.tokens_BT[row, at : at + length] = made.tokens_T
                rows.targets_BT[row, at : at + length] = made.targets_T
                chunks.append(Chunk(-1 - number, 0, length))
                at += length
            finish_row(rows, row, chunks)
        return rows

    def _lengths(self, number: int) -> list[int]:
        """Of the documents of a row: the whole row, or drawn evenly on a logarithmic scale until it is full."""
        draws = Draws(derive(self._seed, "lengths", number))
        lengths, left = [], self._seq_len
        whole = draws.below(1000) < 1000 * self._whole
        while left >= LEAST_TOKENS:
            drawn = LEAST_TOKENS * (self._seq_len / LEAST_TOKENS) ** (draws.below(1001) / 1000)
            length = self._seq_len if whole else min(left, int(drawn))
            if left - length < LEAST_TOKENS:
                length = left
            lengths.append(length)
            left -= length
        return lengths

    def describe(self, rows: Rows) -> list[dict[str, Any]]:
        generated = [chunk.doc for chunks in rows.documents for chunk in chunks if chunk.doc < 0]
        if generated:
            return [
                {"source": "retrieval", "id": str(-1 - doc), "domain": "retrieval", "offset": 0} for doc in generated
            ]
        return self._text.describe(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"text": self._text.state_dict(), "rows": self._rows, "generated": self._generated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._text.load_state_dict(state["text"])
        self._rows, self._generated = state["rows"], state["generated"]


class ChatSource:
    """Packed conversations, epoch after epoch; the last batch is filled up with rows of padding. State: rows so far."""

    def __init__(self, stage: Stage, data: ChatRows, plan: StepPlan, epochs: int) -> None:
        self._data, self._plan, self._micro_rows = data, plan, stage.settings.micro_rows
        self._rank, self._ranks = stage.data_rank, stage.data_size
        self._ends = np.cumsum([len(data.plan(epoch)) for epoch in range(epochs)])
        self._next_row = 0

    def next_batch(self, step: int) -> list[Rows]:
        total = self._plan[step].rows
        numbers = range(self._next_row + self._rank, self._next_row + total, self._ranks)
        self._next_row += total
        return self._data.rows([self._group(number) for number in numbers]).split(self._micro_rows)

    def _group(self, number: int) -> list[Chunk]:
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        if epoch == len(self._ends):
            return []
        plan = self._data.plan(epoch)
        return plan[number - int(self._ends[epoch]) + len(plan)]

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._next_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next_row = state["row"]


class HeldOutChats:
    """Held-out conversations as rows for `evals.heldout`; at most `num_rows`."""

    domains = ("conversations",)

    def __init__(self, data: ChatRows, num_rows: int) -> None:
        self._data, self._groups = data, data.plan(0)[:num_rows]

    def batches(self, domain: str, micro_rows: int, rank: int = 0, num_ranks: int = 1) -> Iterator[Rows]:
        per_rank = -(-len(self._groups) // num_ranks)
        mine = self._groups[rank::num_ranks]
        mine = mine + [[]] * (per_rank - len(mine))
        for start in range(0, per_rank, micro_rows):
            yield self._data.rows(mine[start : start + micro_rows])
