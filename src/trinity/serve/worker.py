"""One thread that owns the engine: it admits, steps and cancels; the event loop only hands over and receives.

The engine's requests wait in the engine itself, so that a prompt is admitted as soon as there is room. A step that
fails takes the answers under way with it, for their part of the cache is lost, and no others: a fresh engine goes on
with those that wait.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from trinity.base.errors import UserError
from trinity.infer.engine import Engine
from trinity.infer.request import Event, Finish, Request
from trinity.infer.sampling import SamplingParams
from trinity.serve.errors import ApiError, bad

log = logging.getLogger("trinity.serve")


@dataclass(frozen=True)
class Piece:
    """One token of an answer."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    text: str
    finish: Finish | None


Delivery = Piece | ApiError


@dataclass(eq=False)
class Job:
    """One answer to be generated. `deliver` is called on the event loop."""

    prompt: Sequence[int]
    params: SamplingParams
    deliver: Callable[[Delivery], None]
    request: Request | None = None
    closed: bool = False
    """Nothing is delivered any more: finished, failed or cancelled."""


@dataclass
class Gauges:
    """What the worker tells about itself; numbers are replaced whole, so that any thread may read them."""

    running: int = 0
    waiting: int = 0
    cache_bytes: int = 0
    failures: int = 0


@dataclass
class _Inbox:
    """What the loop hands over; only touched under the lock."""

    added: list[Job] = field(default_factory=list)
    cancelled: list[Job] = field(default_factory=list)
    failure: ApiError | None = None
    """Fail whatever is open, now."""
    stop: bool = False

    def __bool__(self) -> bool:
        return bool(self.added or self.cancelled or self.failure or self.stop)


class Worker:
    """Runs an engine in a thread of its own. `submit` and `cancel` may be called from any thread."""

    def __init__(self, make_engine: Callable[[], Engine], loop: asyncio.AbstractEventLoop) -> None:
        self.gauges = Gauges()
        self._make_engine = make_engine
        self._engine = make_engine()
        self._loop = loop
        self._jobs: dict[Request, Job] = {}
        self._inbox = _Inbox()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still takes jobs."""
        return not self._ended

    def submit(self, job: Job) -> None:
        """Queue a job; its tokens come through `job.deliver`, as do its failures."""
        with self._changed:
            if self._ended:
                raise ApiError(503, "the engine has stopped; see the server's log")
            self._inbox.added.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Stop a job and deliver nothing more of it."""
        with self._changed:
            job.closed = True
            self._inbox.cancelled.append(job)
            self._changed.notify()

    def fail_all(self, error: ApiError) -> None:
        """Every open job gets `error`."""
        with self._changed:
            self._inbox.failure = error
            self._changed.notify()

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread after its current step."""
        with self._changed:
            self._inbox.stop = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while self._take_inbox():
                deliveries: list[tuple[Job, Delivery]] = []
                self._advance(deliveries)
                self._hand_over(deliveries)
        except BaseException as error:
            log.critical("the engine's thread ended", exc_info=error)
            with self._changed:
                self._ended = True
                jobs = [*self._jobs.values(), *self._inbox.added]
            self._hand_over([(job, ApiError(500, "the engine has stopped; see the server's log")) for job in jobs])

    def _take_inbox(self) -> bool:
        """Wait for work and carry out what the loop wants; False when the thread shall end."""
        with self._changed:
            while not self._inbox and not self._jobs:
                self._count()
                self._changed.wait()
            inbox, self._inbox = self._inbox, _Inbox()
            self._ended = inbox.stop
        for job in inbox.cancelled:
            self._drop(job)
        deliveries: list[tuple[Job, Delivery]] = []
        for job in inbox.added:
            if not job.closed:
                deliveries += self._admit(job)
        self._count()
        if inbox.failure is not None or inbox.stop:
            error = inbox.failure or ApiError(503, "the server is shutting down")
            for job in list(self._jobs.values()):
                self._drop(job)
                deliveries.append((job, error))
        self._hand_over(deliveries)
        return not inbox.stop

    def _admit(self, job: Job) -> list[tuple[Job, Delivery]]:
        try:
            job.request = self._engine.submit(job.prompt, job.params)
        except UserError as error:
            return [(job, bad(str(error)))]
        self._jobs[job.request] = job
        return []

    def _drop(self, job: Job) -> None:
        if job.request is not None:
            self._engine.cancel(job.request)
            self._jobs.pop(job.request, None)

    def _advance(self, deliveries: list[tuple[Job, Delivery]]) -> None:
        """One step of the engine."""
        if not self._jobs:
            return
        try:
            events = self._engine.step()
        except Exception as error:
            deliveries += self._recover(error)
            return
        for event in events:
            job = self._jobs.get(event.request)
            if job is None:
                continue
            if event.finish is not None:
                del self._jobs[event.request]
            deliveries.append((job, _piece(event)))
        self._count()

    def _recover(self, error: Exception) -> list[tuple[Job, Delivery]]:
        """After a failed step: its requests fail, a new engine takes over those that wait."""
        log.error("a step of the engine failed", exc_info=error)
        self.gauges.failures += 1
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        told = ApiError(503 if full else 500, "the server ran out of memory" if full else "the engine failed")
        engine = self._make_engine()  # where that fails too, the thread ends and tells every job
        failed = [job for request, job in self._jobs.items() if request.slot is not None]
        waiting = [job for request, job in self._jobs.items() if request.slot is None]
        if not failed:  # admission itself failed; going on would fail for ever
            failed, waiting = waiting, []
        self._jobs, self._engine = {}, engine
        deliveries: list[tuple[Job, Delivery]] = [(job, told) for job in failed]
        for job in waiting:
            deliveries += self._admit(job)
        return deliveries

    def _count(self) -> None:
        engine = self._engine
        self.gauges.running, self.gauges.waiting = engine.num_running, engine.num_waiting
        self.gauges.cache_bytes = engine.cache.used_bytes

    def _hand_over(self, deliveries: list[tuple[Job, Delivery]]) -> None:
        """One call into the loop for a whole step."""
        if not deliveries:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, deliveries)
        except RuntimeError:  # the loop has ended; nobody is left to tell
            log.warning("%d answers ended after the server had", len(deliveries))


def _piece(event: Event) -> Piece:
    tops = event.request.completion.top_logprobs
    return Piece(event.token, event.logprob, tops[len(event.request.completion.tokens) - 1], event.text, event.finish)


def _deliver(deliveries: Sequence[tuple[Job, Delivery]]) -> None:
    for job, delivery in deliveries:
        if job.closed:
            continue
        job.closed = isinstance(delivery, ApiError) or delivery.finish is not None
        job.deliver(delivery)
