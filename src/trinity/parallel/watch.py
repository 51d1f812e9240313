"""Who is missing, when a group of processes stands still: heartbeats through the store, and one sentence at the end.

Every rank has a thread that writes to the store, once a second, where the rank is and for how long. A rank that has
been at one place for the timeout reads all of them and says who did not arrive; rank 0 also looks for ranks that have
fallen silent. The first to know says so, and every rank ends with status 1, which `torchrun` answers with a restart.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from trinity.base.dist import Place

BEAT = 1.0
"""Seconds between two heartbeats."""
SILENT = 60.0
"""Seconds without a heartbeat after which a rank counts as lost."""
_NAMED = 4  # ranks that a sentence names


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said."""

    host: str
    place: str
    count: int
    seconds: float
    """At this place, by the rank's own clock."""
    beats: int
    end: str = ""
    """Why the rank left, where it failed; "finished" where it did not."""


class Watch:
    """Context manager around the work of a joined process.

    store: a connection of this thread's own, below a prefix that no other attempt uses. timeout: seconds without
    progress of this rank that end it. leave: what ends the process, `os._exit` but in tests.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        place: Place,
        timeout: float,
        *,
        beat: float = BEAT,
        silent: float = SILENT,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.store, self.rank, self.world_size, self.place = store, rank, world_size, place
        self.timeout, self.beat, self.silent, self.leave = timeout, min(beat, timeout / 4), silent, leave
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._lock = threading.Lock()
        self._beats = 0
        self._heard: dict[int, tuple[int, float]] = {}  # beats of a rank, and when this rank first saw them

    def __enter__(self) -> "Watch":
        self.place.arrive("the start")
        self._send()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._send("finished" if error is None else f"{kind.__name__ if kind else ''}: {error}"[:300])
        except RuntimeError:  # the store is gone with the process that held it, and so is who would have read this
            if error is None and self.rank == 0:
                raise

    # What the others hear

    def _send(self, end: str = "") -> None:
        with self._lock:
            self._beats += 1
            seconds = time.monotonic() - self.place.since
            beat = Heartbeat(socket.gethostname(), self.place.name, self.place.count, seconds, self._beats, end)
            self.store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def heartbeats(self) -> dict[int, Heartbeat]:
        """The last of every rank that has been heard at all."""
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        there = keys if self.store.check(keys) else [key for key in keys if self.store.check([key])]
        values = self.store.multi_get(there) if there else []
        return {int(k.removeprefix("beat/")): Heartbeat(**json.loads(v)) for k, v in zip(there, values, strict=True)}

    # The thread

    def _run(self) -> None:
        next_look, lost_store = time.monotonic() + self.silent / 4, None
        while not self._stop.wait(self.beat):
            try:
                self._send()
                stalled = time.monotonic() - self.place.since > self.timeout
                if stalled or (self.rank == 0 and time.monotonic() > next_look):
                    next_look = time.monotonic() + self.silent / 4
                    beats = self.heartbeats()
                    sentence = self._silent_ranks(beats)
                    if sentence is None and stalled:
                        sentence = missing(beats, self.world_size, self.timeout)
                    if sentence is not None and not self._stop.is_set():
                        self._end(sentence)
                lost_store = None
            except RuntimeError as error:  # DistStoreError, DistNetworkError and what older versions raise
                lost_store = lost_store or time.monotonic()
                if time.monotonic() - lost_store > min(self.silent, self.timeout):
                    reason = str(error).splitlines()[0][:200]
                    self._say(f"rank {self.rank} lost the store of the group at {self.place.name}: {reason}")
                    self.leave(1)
                    return

    def _silent_ranks(self, beats: dict[int, Heartbeat]) -> str | None:
        """A sentence about ranks that ended or whose heartbeats have stopped."""
        now = time.monotonic()
        for rank, beat in beats.items():
            if self._heard.get(rank, (0, 0.0))[0] != beat.beats:
                self._heard[rank] = (beat.beats, now)
        silent = [rank for rank in beats if now - self._heard[rank][1] > self.silent and not beats[rank].end]
        if not silent:
            return None
        first = beats[silent[0]]
        return (
            f"{_ranks(silent)} ({first.host}) sent no sign of life for {self.silent:g} s: last seen at {first.place}; "
            "its process or its machine died or hangs"
        )

    def _end(self, sentence: str) -> None:
        if self.first_to_say(sentence):
            self._say(sentence)
        self.leave(1)

    def first_to_say(self, sentence: str) -> bool:
        """Whether this rank is the one that tells the user, so that a thousand ranks say a thing once."""
        mine = f"{self.rank}: {sentence}"
        return self.store.compare_set("verdict", "", mine).decode(errors="replace") == mine

    @staticmethod
    def _say(sentence: str) -> None:
        print(f"trinity: {sentence}", file=sys.stderr, flush=True)

    # After a collective has failed

    def lost_peer(self, patience: float = 3.0) -> str:
        """Why a collective failed: who ended with an error, or who has gone silent, heard within `patience` seconds."""
        before = self.heartbeats()
        deadline = time.monotonic() + patience
        while True:
            beats = self.heartbeats()
            for rank, beat in beats.items():
                if beat.end and beat.end != "finished" and rank != self.rank:
                    return f"rank {rank} ({beat.host}) ended at {beat.place}: {beat.end}"
            if time.monotonic() > deadline:
                break
            time.sleep(self.beat / 4)
        others = [rank for rank in beats if rank != self.rank and not beats[rank].end]
        gone = [rank for rank in others if rank in before and beats[rank].beats == before[rank].beats]
        if not gone:
            return f"a connection between ranks broke at {self.place.name}, though every rank is alive: the network"
        first = beats[gone[0]]
        return f"{_ranks(gone)} ({first.host}) was lost: last seen at {first.place}"


def missing(beats: dict[int, Heartbeat], world_size: int, timeout: float) -> str:
    """One sentence about the ranks that are behind the others."""
    unheard = [rank for rank in range(world_size) if rank not in beats]
    if unheard:
        return f"{_ranks(unheard)} did not join within {timeout:g} s"
    furthest = max(beats.values(), key=lambda beat: beat.count)
    behind = [rank for rank, beat in beats.items() if beat.count < furthest.count]
    if not behind:
        return f"no rank came past {furthest.place} within {timeout:g} s: raise runtime.timeout if it takes longer"
    last = beats[behind[0]]
    end = f", where it ended: {last.end}" if last.end else ""
    return (
        f"{_ranks(behind)} ({last.host}) did not arrive at {furthest.place} within {timeout:g} s: "
        f"last seen at {last.place}, {last.seconds:.0f} s ago{end}"
    )


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:_NAMED]))
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank {listed}{more}" if len(ranks) == 1 else f"ranks {listed}{more}"
