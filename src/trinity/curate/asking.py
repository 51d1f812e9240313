"""Gets the answers to the requests of a block that have none yet."""

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from trinity.config.curate import CurateConfig
from trinity.curate.answers import Answer, Journal, read_answers
from trinity.curate.client import Client
from trinity.curate.requests import Request, kept_sources, requests_of


def open_requests(work: Path, block: int, config: CurateConfig, retry: bool) -> Iterator[Request]:
    """Requests of a block without an answer; `retry`: also those whose attempts all failed."""
    known = read_answers(work, block)
    for request in requests_of(kept_sources(work, block), config):
        answer = known.get(request.key)
        if answer is None or (retry and answer.failure):
            yield request


class Asker:
    """Threads that ask, as many as the endpoints have room; blocks may share them."""

    def __init__(self, client: Client, work: Path, config: CurateConfig, retry: bool) -> None:
        self._client, self._work, self._config, self._retry = client, work, config, retry
        self._pool = ThreadPoolExecutor(client.slots, thread_name_prefix="ask")
        self._stopped = threading.Event()

    def ask_block(self, block: int) -> int:
        """Ask all open requests of a block and journal the answers; returns how many the budget did not allow.

        The first error of an endpoint that concerns all requests is raised once those under way have ended.
        """
        unasked = 0
        waiting = open_requests(self._work, block, self._config, self._retry)
        under_way: set[Future[Answer | None]] = set()
        with Journal(self._work, block) as journal:
            try:
                for request in waiting:
                    if self._stopped.is_set():
                        unasked += 1
                        continue
                    under_way.add(self._pool.submit(self._client.ask, request))
                    if len(under_way) >= self._client.slots:  # no more in memory than can be asked
                        done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                        unasked += self._keep(done, journal)
                unasked += self._keep(wait(under_way).done, journal)
            except BaseException:
                for future in under_way:
                    future.cancel()
                for future in wait(under_way).done:  # answers that were paid for are kept
                    if not future.cancelled() and future.exception() is None and future.result() is not None:
                        journal.write(future.result())  # pyright: ignore[reportArgumentType]
                raise
        return unasked

    def _keep(self, done: set[Future[Answer | None]], journal: Journal) -> int:
        unasked = 0
        failed: BaseException | None = None
        for future in done:
            error = future.exception()
            if error is not None:
                failed = error
                continue
            answer = future.result()
            if answer is None:
                unasked += 1
                self._stopped.set()  # the budget only shrinks: nothing later would be allowed but a shorter text
            else:
                journal.write(answer)
        if failed is not None:
            raise failed
        return unasked

    def close(self) -> None:
        """Wait for what is under way and close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()
