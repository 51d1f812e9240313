"""The same global batches whatever the number of ranks, from small state, assembled ahead of the step.

The data are S fixed logical streams, each with a share of every domain and a packer of its own. Row g of the run
(counted over all steps and ranks) comes from stream g mod S; rank r of R serves the streams s with s mod R = r. Because
R divides S and the rows of every step, each rank has as many rows of a step. Neither R nor a restart changes a batch.
"""

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, NamedTuple, Self

from trinity.base.errors import UserError
from trinity.base.rng import derive
from trinity.config import DataConfig, Phase
from trinity.data.mixture import Mixture
from trinity.data.packing import BestFit, Concat
from trinity.data.rows import DocumentStore, Packer, Rows, empty_rows, finish_row, without_borders
from trinity.data.rsdb import RSDB


class EndOfDataError(UserError):
    """A stream has no document left."""


class _Request(NamedTuple):
    num_rows: int
    phase: int


class Loader:
    """The rows of one rank, step by step.

    `seq_len` is T. `length_bias` favours long documents (`mixture.Mixture`). `tokenizer_fingerprint`, where given, must
    be the one that the shards were made with.
    Raises UserError when the number of ranks does not divide `settings.streams`, when the tokenizer is another one and
    when the phases ask for more tokens than there are; also what `Mixture` raises.
    """

    def __init__(
        self,
        store: DocumentStore,
        settings: DataConfig,
        phases: Sequence[Phase],
        seq_len: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        *,
        length_bias: float = 0.0,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        assert 0 <= rank < num_ranks
        if settings.streams % num_ranks:
            divisors = [n for n in range(1, settings.streams + 1) if settings.streams % n == 0]
            raise UserError(
                f"{num_ranks} data-parallel ranks cannot share data.streams = {settings.streams}: use a number of "
                f"ranks out of {divisors}, or for a new run a multiple of {num_ranks} as data.streams"
            )
        if tokenizer_fingerprint is not None and tokenizer_fingerprint != store.tokenizer_fingerprint:
            raise UserError(
                f"the shards {settings.shards} were made with another tokenizer (fingerprint "
                f"{store.tokenizer_fingerprint[:12]}) than {settings.tokenizer or 'the one of this run'} "
                f"({tokenizer_fingerprint[:12]}): point data.tokenizer at the right one or prepare the shards again"
            )
        self._settings, self._seq_len, self._num_ranks = settings, seq_len, num_ranks
        self.mixture = Mixture(
            store,
            phases,
            streams=settings.streams,
            seed=seed,
            max_epochs=settings.max_epochs,
            length_bias=length_bias,
        )
        self._check_supply()
        self._streams = {s: self.mixture.stream(s) for s in range(rank, settings.streams, num_ranks)}
        self._packers = {s: self._packer(store, s) for s in self._streams}
        self._num_rows = 0  # of all ranks, assembled so far
        self._consumed = self._snapshot()
        self._ahead: deque[tuple[_Request, Future[tuple[Rows, dict[str, Any]]]]] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loader") if settings.prefetch else None
        workers = min(settings.workers, len(self._packers))
        self._fillers = ThreadPoolExecutor(workers, thread_name_prefix="rows") if workers > 1 else None

    def _packer(self, store: DocumentStore, stream: int) -> Packer:
        settings, source = self._settings, self._streams[stream]
        size = -(-settings.buffer // settings.streams)
        key = derive(self.mixture.seed, settings.packing, stream)
        match settings.packing:
            case "rsdb":
                return RSDB(store, source, size, key)
            case "best-fit":
                return BestFit(store, source, size, key)
            case "concat":
                return Concat(store, source)
            case "single":
                return Concat(store, source, several=False)

    def _check_supply(self) -> None:
        if self._settings.packing not in ("rsdb", "concat"):
            return  # a phase's tokens also count padding, whose amount is not known beforehand
        phases = self.mixture.phases
        checks = [(f"phase {p.name!r} asks", p.tokens, self.mixture.supply(i)) for i, p in enumerate(phases)]
        for who, asked, held in [*checks, ("the phases ask", sum(p.tokens for p in phases), self.mixture.supply())]:
            if asked > held:
                raise UserError(
                    f"{who} for {asked:,} tokens, but the domains hold {held:,} in data.max_epochs = "
                    f"{self._settings.max_epochs} passes: ask for fewer, allow more passes, or prepare more text"
                )

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the batches, but for the rows of each step and the number of ranks."""
        settings = self._settings
        parts = [self.mixture.fingerprint, settings.packing, settings.buffer, settings.document_mask, self._seq_len]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def next_rows(self, step: int, num_rows: int, phase: int) -> Rows:
        """This rank's part of the next global batch: `num_rows` / ranks rows, refilled from `phases[phase]`.

        `num_rows` is the whole step's, over all ranks. The batch depends on what was asked for before, not on `step`,
        which only names the step in an error: batches are skipped by asking for them and dropping them.
        Raises UserError when ranks do not divide `num_rows` and when a stream is at its end; the state stays as it was.
        """
        if num_rows % self._num_ranks:
            low = num_rows - num_rows % self._num_ranks
            choices = [n for n in (low, low + self._num_ranks) if n]
            raise UserError(
                f"step {step} has {num_rows} rows, which {self._num_ranks} data-parallel ranks cannot share evenly: "
                f"ask for {' or '.join(map(str, choices))} rows"
            )
        request = _Request(num_rows, phase)
        try:
            rows, self._consumed = self._take(request)
        except BaseException as error:
            self._rewind()
            if isinstance(error, EndOfDataError):
                raise UserError(f"the data end at step {step}: {error}") from error
            raise
        if self._worker:  # the next step most likely asks for the same; if not, `_take` starts over from `_consumed`
            while len(self._ahead) < self._settings.prefetch:
                self._ahead.append((request, self._worker.submit(self._assemble, request)))
        return rows

    def _take(self, request: _Request) -> tuple[Rows, dict[str, Any]]:
        if self._ahead and self._ahead[0][0] == request:
            return self._ahead.popleft()[1].result()
        if self._ahead:
            self._rewind()
        return self._assemble(request)

    def _rewind(self) -> None:
        """Forget what was assembled ahead."""
        self._settle()
        self._restore(self._consumed)

    def _settle(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        for _, future in self._ahead:
            if not future.cancelled():
                future.exception()
        self._ahead.clear()

    def _assemble(self, request: _Request) -> tuple[Rows, dict[str, Any]]:
        numbers = [n % self._settings.streams for n in range(self._num_rows, self._num_rows + request.num_rows)]
        mine = [number for number in numbers if number in self._packers]
        rows = empty_rows(len(mine), self._seq_len)
        if self._fillers is None:
            self._fill(rows, list(enumerate(mine)), request.phase)
        else:
            streams = sorted(self._packers)
            shares: list[list[tuple[int, int]]] = [[] for _ in streams]
            for row, number in enumerate(mine):
                shares[streams.index(number)].append((row, number))  # a stream's rows stay in order, with one thread
            filling = [self._fillers.submit(self._fill, rows, share, request.phase) for share in shares if share]
            wait(filling)  # all of them: none may go on while the state is set back after an error
            for one in filling:
                one.result()
        if not self._settings.document_mask:
            without_borders(rows)
        self._num_rows += request.num_rows
        return rows, self._snapshot()

    def _fill(self, rows: Rows, share: Sequence[tuple[int, int]], phase: int) -> None:
        """Fill the rows of `share`, each (row, stream)."""
        for row, number in share:
            self._streams[number].set_phase(phase)
            chunks = self._packers[number].fill(rows.tokens_BT[row], rows.targets_BT[row])
            if not chunks:
                raise EndOfDataError(self._describe_end(number, phase))
            finish_row(rows, row, chunks)

    def _describe_end(self, stream: int, phase: int) -> str:
        mixture = self.mixture
        return (
            f"stream {stream} of {mixture.num_streams} has read every document of phase {mixture.phases[phase].name!r} "
            f"data.max_epochs = {mixture.max_epochs} times ({mixture.supply(phase):,} tokens over all streams; "
            f"{self._num_rows * self._seq_len:,} were served in all phases): ask for fewer tokens, allow more passes, "
            "or prepare more text"
        )

    def _snapshot(self) -> dict[str, Any]:
        return {
            "order": self._order(),
            "rows": self._num_rows,
            "streams": {str(s): packer.state_dict() for s, packer in self._packers.items()},
        }

    def _order(self) -> dict[str, Any]:
        """What must be the same for a saved state to mean the same documents."""
        return {
            "shards": self.mixture.store.fingerprint,
            "seed": self.mixture.seed,
            "streams": self.mixture.num_streams,
            "packing": self._settings.packing,
            "length_bias": self.mixture.length_bias,
            "groups": self.mixture.groups,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._num_rows = state["rows"]
        for stream, packer in self._packers.items():
            packer.load_state_dict(state["streams"][str(stream)])

    def state_dict(self) -> dict[str, Any]:
        """The state after the last rows handed out, whatever was assembled ahead: small, JSON.

        It holds the streams of this rank; `merge_states` joins those of all ranks to a state that any number of ranks
        loads. Treat it as read-only.
        """
        return self._consumed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a complete state, saved at any number of ranks. Raises UserError for a state of other data."""
        before = {"groups": list(self.mixture.store.domains), **state["order"]}  # states once had domains only
        for name, value in self._order().items():
            if before[name] != value:
                raise UserError(
                    f"the saved data state does not fit: it was written with {name} = {before[name]}, and this "
                    f"run has {value}; resume with the same value or start a new run"
                )
        missing = [s for s in range(self.mixture.num_streams) if str(s) not in state["streams"]]
        if missing:
            raise UserError(f"the saved data state is incomplete: streams {missing} of other ranks are missing from it")
        self._settle()
        self._restore(state)
        self._consumed = self._snapshot()

    def close(self) -> None:
        """Stop the background threads and wait for them."""
        self._settle()
        for pool in (self._worker, self._fillers):
            if pool:
                pool.shutdown()
        self._worker = self._fillers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One complete state from those of all ranks, in any order. Pure."""
    assert states
    first = states[0]
    streams: dict[str, Any] = {}
    for state in states:
        assert state["order"] == first["order"], "ranks disagree on their data"
        assert state["rows"] == first["rows"], "ranks are at different steps"
        streams.update(state["streams"])
    return {**first, "streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}
