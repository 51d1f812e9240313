"""The graph on Ray Data. What streams through it are numbers of blocks; their content is in committed files.

So back-pressure is the number of tasks and of blocks in hand, the object store stays all but empty, and a task that is
lost with its worker or node is run again without a trace of the first attempt.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trinity.base.errors import UserError
from trinity.config.curate import ClusterConfig, CurateConfig, EndpointConfig
from trinity.curate.asking import Asker
from trinity.curate.client import Client, PurseLike
from trinity.curate.purse import Purse
from trinity.data.ray_team import LOCAL, Row, guarded, opened, ray_cluster, ray_jobs

BLOCKS_IN_HAND = 2
"""Blocks that an asking worker has at a time: one under way, one waiting."""


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
        jobs = [(item,) for item in items]
        yield from ray_jobs(self._ray, function, jobs, shared, self._workers(len(jobs)), **self.task)

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
        finished = asked.map(done, compute=ray.data.TaskPoolStrategy(size=self._workers(len(blocks))), **self.task)
        for row in finished.iter_rows():
            yield opened(row)

    def _workers(self, most: int) -> int | None:
        """As many tasks at a time as the settings say; None: as many as there are CPUs."""
        limit = self._settings.workers
        return None if limit is None else min(limit, most)

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
