"""The graph on Ray Data. What streams through it are numbers of blocks; their content is in committed files.

So back-pressure is the number of tasks and of blocks in hand, the object store stays all but empty, and a task that is
lost with its worker or node is run again without a trace of the first attempt.
"""

import json
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trinity.base.errors import UserError
from trinity.config.curate import ClusterConfig, CurateConfig, EndpointConfig
from trinity.curate.asking import Asker
from trinity.curate.client import Client, PurseLike
from trinity.curate.purse import Purse
from trinity.data.ray_team import LOCAL, ray_cluster

BLOCKS_IN_HAND = 2
"""Blocks that an asking worker has at a time: one under way, one waiting."""
Row = dict[str, Any]


def guarded(work: Callable[[], Any]) -> Row:
    """The JSON of a result, or what went wrong: an exception would be tried again by Ray without end."""
    outcome = {"result": "null", "refused": "", "errno": 0, "bug": ""}
    try:
        return {**outcome, "result": json.dumps(work())}
    except UserError as error:
        return {**outcome, "refused": str(error)}
    except OSError as error:
        return {**outcome, "refused": str(error), "errno": error.errno or -1}
    except Exception:
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


class Graph:
    """Work on blocks over a cluster that is connected."""

    def __init__(self, ray: Any, settings: ClusterConfig) -> None:
        self._ray, self._settings, self._here = ray, settings, os.getcwd()  # noqa: PTH109
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self.task = {"num_cpus": 1, "memory": settings.task_mib << 20}

    def each(self, function: Callable[..., Any], items: Sequence[Any], *shared: Any) -> Iterator[Any]:
        """Results of `function(item, *shared)`, as they come, of one task each."""
        if not items:
            return
        everything, here = self._ray.put((function, list(items), shared)), self._here
        get = self._ray.get

        def work(row: Row) -> Row:
            os.chdir(here)  # paths may be relative
            function, items, shared = get(everything)
            return guarded(lambda: function(items[row["item"]], *shared))

        rows = self._ray.data.from_items([{"item": n} for n in range(len(items))], override_num_blocks=len(items))
        mapped = rows.map(work, compute=self._tasks(len(items)), **self.task)
        for row in mapped.iter_rows():
            yield opened(row)

    def ask(
        self,
        blocks: Sequence[int],
        config: CurateConfig,
        endpoints: tuple[EndpointConfig, ...],
        work: Path,
        retry: bool,
        purse: PurseLike | None,
        finish: Callable[..., Any],
        shared: tuple[Any, ...],
    ) -> Iterator[Any]:
        """Ask the open requests of each block in actors, then `finish(block, *shared)` in tasks, streaming."""
        if not blocks:
            return
        ray = self._ray
        everything, here, get = ray.put((finish, shared)), self._here, ray.get
        workers = min(config.generate.workers, len(blocks))
        endpoints = tuple(one.model_copy(update={"concurrency": -(-one.concurrency // workers)}) for one in endpoints)

        def done(row: Row) -> Row:
            if row["bug"] or row["errno"] or row["refused"]:
                return row
            os.chdir(here)
            finish, shared = get(everything)
            return guarded(lambda: finish(json.loads(row["result"]), *shared))

        rows = ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks))
        asked = rows.map(
            AskingWorker,
            fn_constructor_args=(config, endpoints, work, retry, purse, here),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=BLOCKS_IN_HAND),
            num_cpus=0,
        )
        finished = asked.map(done, compute=self._tasks(len(blocks)), **self.task)
        for row in finished.iter_rows():
            yield opened(row)

    def _tasks(self, most: int) -> Any:
        """As many tasks at a time as the settings say; None: as many as there are CPUs."""
        limit = self._settings.workers
        return self._ray.data.TaskPoolStrategy(size=None if limit is None else min(limit, most))

    def purse(self, config: CurateConfig, tokens: int, money: float) -> PurseLike | None:
        """One for all workers, with what was spent so far; None without limits."""
        if config.budget.tokens is None and config.budget.money is None:
            return None
        actor = self._ray.remote(Purse).options(num_cpus=0, max_concurrency=8, max_restarts=0)
        return RemotePurse(actor.remote(config.budget, tokens, money))


class RemotePurse:
    """A purse that an actor holds. When that actor is lost the run stops: what was spent is read anew at the next."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def take(self, tokens: int, money: float) -> bool:
        import ray  # pyright: ignore[reportMissingImports]

        return ray.get(self._actor.take.remote(tokens, money))

    def settle(self, tokens: int, money: float) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        ray.get(self._actor.settle.remote(tokens, money))


class AskingWorker:
    """An actor that asks endpoints, for a block at a time; others fill the gap that the stragglers of one leave."""

    def __init__(
        self,
        config: CurateConfig,
        endpoints: tuple[EndpointConfig, ...],
        work: Path,
        retry: bool,
        purse: PurseLike | None,
        here: str,
    ) -> None:
        os.chdir(here)
        self._asker: Asker | None = None
        self._refused = ""
        try:
            self._asker = Asker(Client(config, endpoints, purse or Purse(config.budget)), work, config, retry)
        except UserError as error:
            self._refused = str(error)

    def __call__(self, row: Row) -> Row:
        if self._asker is None:
            return {"result": "null", "refused": self._refused, "errno": 0, "bug": ""}
        asker, block = self._asker, int(row["block"])

        def work() -> int:
            asker.ask_block(block)
            return block

        return guarded(work)


@contextmanager
def cluster(settings: ClusterConfig) -> Iterator[Graph]:
    """A graph on the cluster of the settings; UserError without `ray` or when it does not answer."""
    local = {"object_store_memory": settings.object_store_mib << 20}
    with ray_cluster(settings.ray, settings.workers, **(local if settings.ray == LOCAL else {})) as ray:
        yield Graph(ray, settings)
