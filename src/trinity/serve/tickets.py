"""The answers of one HTTP request on their way through the worker, and how many of them the server takes."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from trinity.infer.sampling import SamplingParams
from trinity.serve.errors import ApiError, bad
from trinity.serve.metrics import Metrics
from trinity.serve.worker import Delivery, Job, Piece, Worker


class Desk:
    """Admits requests up to a number of answers. Used on the event loop only."""

    def __init__(self, max_batch: int, max_queued: int) -> None:
        self.open = 0
        """Answers under way or waiting."""
        self.draining = False
        self._max_batch = max_batch
        self._most = max_batch + max_queued
        self._seconds = 1.0
        """What a request took lately, a moving average."""

    def enter(self, answers: int) -> None:
        """Reserve room. Raises ApiError: 400 when there can never be so much, 429 when there is none now."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "10"})
        if answers > self._most:
            raise bad(f"{answers} answers at once are more than the {self._most} that this server takes", "n")
        if self.open + answers > self._most:
            wait = max(1, min(60, round(self._seconds * self.open / self._max_batch)))
            raise ApiError(
                429,
                f"{self.open} answers are under way or waiting and at most {self._most} may be; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )
        self.open += answers

    def leave(self, answers: int, seconds: float) -> None:
        """Give the room back."""
        self.open -= answers
        self._seconds = 0.9 * self._seconds + 0.1 * seconds


class Ticket:
    """Room for `answers` answers; `start` hands them to the worker, `pieces` yields their tokens as they come.

    Use as a context manager: leaving it stops whatever is still being generated.
    """

    def __init__(self, desk: Desk, worker: Worker, metrics: Metrics, answers: int) -> None:
        desk.enter(answers)
        self._desk, self._worker, self._metrics, self._answers = desk, worker, metrics, answers
        self._begun = time.monotonic()
        self._mailbox: asyncio.Queue[tuple[int, Delivery]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._closed = False

    def start(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        """Queue one answer for each prompt and its parameters. Raises ApiError when the engine has stopped."""
        assert len(prompts) == self._answers
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            job = Job(prompt, own, lambda delivery, index=index: self._mailbox.put_nowait((index, delivery)))
            self._worker.submit(job)
            self._jobs.append(job)

    async def pieces(self, deadline: float, quiet: float | None = None) -> AsyncIterator[tuple[int, Piece] | None]:
        """(number of the answer, token) until all are finished; None after each `quiet` seconds without a token.

        deadline: of the loop's clock. Raises ApiError when an answer fails or the deadline passes.
        """
        loop = asyncio.get_running_loop()
        last = {index: time.monotonic() for index in range(len(self._jobs))}
        begun = set[int]()
        while last:
            patience = deadline - loop.time()
            if quiet is not None:
                patience = min(patience, quiet)
            try:
                index, delivery = await asyncio.wait_for(self._mailbox.get(), max(0.0, patience))
            except TimeoutError:
                if loop.time() >= deadline:
                    raise ApiError(504, "the answer took longer than a request may", code="timeout") from None
                yield None
                continue
            if isinstance(delivery, ApiError):
                raise delivery
            now = time.monotonic()
            (self._metrics.next_token if index in begun else self._metrics.first_token).observe(now - last[index])
            self._metrics.new_tokens.inc()
            begun.add(index)
            last[index] = now
            if delivery.finish is not None:
                del last[index]
            yield index, delivery

    def close(self) -> None:
        """Stop what is unfinished and give the room back; may be called twice."""
        if self._closed:
            return
        self._closed = True
        for job in self._jobs:
            if not job.closed:
                self._worker.cancel(job)
        seconds = time.monotonic() - self._begun
        self._desk.leave(self._answers, seconds)
        self._metrics.duration.observe(seconds)
