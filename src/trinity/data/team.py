"""Runs units of work in this process or in several, and reports what is done."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from trinity.base.errors import UserError

RunJobs = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], tuple[Any, ...]], Iterator[Any]]
"""Yields the results of `function(*job, *shared)` in the order in which the jobs end."""

_shared: tuple[Any, ...] = ()
"""In a worker process: the arguments that all jobs share, sent once rather than with each job."""


def run_jobs(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], shared: tuple[Any, ...], workers: int
) -> Iterator[Any]:
    """Yield the results of `function(*job, *shared)` in the order in which the jobs end.

    The first error of a job is raised once the jobs under way have ended; those not begun are given up. Workers are
    spawned, not forked: tokenizers and pyarrow run threads. They end when this process is killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield function(*job, *shared)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(shared,))
    try:
        for future in as_completed([pool.submit(_run, function, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; run the same command again, with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(shared: tuple[Any, ...]) -> None:
    global _shared
    _shared = shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of every worker on Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    return function(*job, *_shared)
