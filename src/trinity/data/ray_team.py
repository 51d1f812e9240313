"""Runs units of work over a Ray cluster with Ray Data: the extra `ray`."""

import json
import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trinity.base.errors import UserError
from trinity.data.team import RunJobs

LOCAL = "local"
Row = dict[str, Any]


@contextmanager
def ray_team(address: str, workers: int | None) -> Iterator[RunJobs]:
    """Gives what runs jobs on the cluster at `address`, as `team.run_jobs` does in processes of this machine.

    A task takes one CPU; at most `workers` run at a time (None: as many as there are CPUs). A task whose worker or node
    dies is run again elsewhere. Address, needs and errors: `ray_cluster`.
    """
    with ray_cluster(address, workers) as ray:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield lambda function, jobs, shared: map(tuple, ray_jobs(ray, function, jobs, shared, workers, num_cpus=1))


@contextmanager
def ray_cluster(address: str, workers: int | None, **local: Any) -> Iterator[Any]:
    """The module `ray`, connected, with `ray.data`.

    `address` is "auto", HOST:PORT or ray://HOST:PORT, or "local" for a cluster of this machine alone that ends with the
    call, has `workers` CPUs and further arguments of `ray.init`; a process that is connected already stays so. Every
    node must see the same files under the same paths and have this package. Raises UserError without the package `ray`
    and when no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it reports on itself in red where nothing is wrong
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("running on Ray needs the package ray: pip install 'trinity-moe[ray]'") from None
    _check_reachable(address)
    environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}  # one thread for each worker
    if ray.is_initialized():  # this process has its cluster already
        yield ray
        return
    options: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, **local} if address == LOCAL else {}
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself asks for minutes before it gives up."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address!r}: {error}") from None


def ray_jobs(
    ray: Any,
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    shared: tuple[Any, ...],
    workers: int | None,
    **task: Any,
) -> Iterator[Any]:
    """Results of `function(*job, *shared)`, which must be JSON, as they come, of one task each.

    At most `workers` run at a time (None: as many as there are CPUs); `task` is what a task needs.
    """
    if not jobs:
        return
    everything, here = ray.put((function, list(jobs), shared)), os.getcwd()  # noqa: PTH109

    def work(row: Row) -> Row:
        os.chdir(here)  # paths may be relative
        function, jobs, shared = ray.get(everything)
        return guarded(lambda: function(*jobs[row["job"]], *shared))

    numbers = ray.data.from_items([{"job": number} for number in range(len(jobs))], override_num_blocks=len(jobs))
    for row in numbers.map(work, compute=ray.data.TaskPoolStrategy(size=workers), **task).iter_rows():
        yield opened(row)


def guarded(work: Callable[[], Any]) -> Row:
    """The JSON of a result, or what went wrong: an exception would be tried again by Ray without end."""
    outcome = {"result": "null", "refused": "", "errno": 0, "bug": ""}
    try:
        return {**outcome, "result": json.dumps(work())}
    except UserError as error:
        return {**outcome, "refused": str(error)}
    except OSError as error:
        return {**outcome, "refused": error.strerror or str(error), "errno": error.errno or -1}
    except Exception:  # told by `opened`
        return {**outcome, "bug": traceback.format_exc()}


def opened(row: Row) -> Any:
    """The result of `guarded`, or its error, raised here."""
    if row["bug"]:
        raise RuntimeError(f"a task on the Ray cluster failed:\n{row['bug']}")
    if row["errno"]:
        raise OSError(row["errno"], row["refused"])
    if row["refused"]:
        raise UserError(row["refused"])
    return json.loads(row["result"])
