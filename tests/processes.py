"""Tests with several processes, joined by gloo, or by NCCL with a GPU each.

`run(work, ranks, *arguments)` imports `work` (a function `work(rank, *arguments)` of a module in tests/) in every
process; a failed assertion of any rank fails the test with that rank's traceback.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run(
    work: Callable[..., Any], ranks: int, *arguments: Any, backend: str = "gloo", timeout: float = 240
) -> list[Any]:
    """What `work(rank, *arguments)` returned on each rank."""
    context = mp.get_context("forkserver")
    # Imported once, by the server, before it has threads; each process is then a fork of it.
    context.set_forkserver_preload(["torch.distributed.fsdp", "trinity.stages.extend"])
    results: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as store:
        processes = [
            context.Process(
                target=_enter, args=(work, rank, ranks, backend, f"{store}/store", results, arguments), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
        found: dict[int, tuple[Any, str | None]] = {}
        while not results.empty():
            rank, value, error = results.get()
            found[rank] = (value, error)
    errors = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(found.items()) if error is not None]
    assert not errors, "\n".join(errors)
    assert not alive, f"{len(alive)} of {ranks} processes did not end"
    assert len(found) == ranks, f"exit codes {[process.exitcode for process in processes]}"
    return [found[rank][0] for rank in range(ranks)]


def _enter(
    work: Callable[..., Any],
    rank: int,
    ranks: int,
    backend: str,
    store: str,
    results: Any,
    arguments: tuple[Any, ...],
) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    shared = torch.distributed.FileStore(store, ranks)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(backend, store=shared, rank=rank, world_size=ranks)
    try:
        results.put((rank, work(rank, *arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        torch.distributed.destroy_process_group()
