"""Joining the processes that `torchrun` (or any launcher with its environment variables) started into one group.

    with joined("auto", timeout=600, settings=...):   # does nothing in a single process
        ...

gloo on a CPU; NCCL for tensors on a GPU and gloo for the small things on the host. Ranks that were started with other
settings or other code are refused through the store, before any collective could hang over it.
"""

import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist

from trinity.base import dist
from trinity.base.console import clean, redact
from trinity.base.errors import UsageError, UserError
from trinity.base.package import package_fingerprint
from trinity.parallel.watch import Watch

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_BROKEN = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|socket", re.IGNORECASE)
_MARGIN = 60.0  # the watch speaks before a collective's own timeout does
_LEAVING = timedelta(seconds=30)


@dataclass(frozen=True)
class Launch:
    """What the launcher says in the environment."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    attempt: int
    """Restarts of the group before this one."""
    agent_store: bool
    """The launcher keeps the store; else rank 0 does."""


def attempt() -> int:
    """How often the launcher has started this group again; 0 the first time."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launched() -> Launch | None:
    """How this process was launched; None for a single one. Raises UsageError when the environment is incomplete."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return None
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start the processes with "
            "torchrun --nproc-per-node N -m trinity ..."
        )
    rank, world_size, local_rank, port = (int(os.environ[name]) for name in _VARIABLES if name != "MASTER_ADDR")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(rank, world_size, local_rank, os.environ["MASTER_ADDR"], port, attempt(), agent)


@contextmanager
def joined(device: str, *, timeout: float, settings: Mapping[str, Any] | None) -> Iterator[None]:
    """The process is a member of its group inside; a single process goes on alone.

    device: auto, cpu or cuda. timeout: seconds in which a rank must come to its next place (`base.dist.place`).
    settings: what must be equal on all ranks, nested or flat, as must the package's code; None compares nothing.
    Raises UsageError for a GPU that is not there. What goes wrong afterwards is said once by one rank, and every rank
    leaves with SystemExit: ranks that disagree, a rank that did not come, one that was lost, and any UserError of the
    work itself.
    """
    launch = launched()
    if launch is None:
        yield
        return
    gpu = _device(launch, device)
    store = _store(launch, timeout, host=not launch.agent_store and launch.rank == 0)
    with Watch(_store(launch, timeout), launch.rank, launch.world_size, dist.place, timeout) as watch:
        try:
            if settings is not None:
                mine = {"code": package_fingerprint(), **settings}
                agree(store, launch.rank, launch.world_size, mine, timeout)
            torch_dist.init_process_group(
                "gloo" if gpu is None else "cpu:gloo,cuda:nccl",
                # Sockets of an attempt that was killed must not be found by the next one.
                store=torch_dist.PrefixStore("group", store),
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timedelta(seconds=timeout + _MARGIN),
                device_id=gpu,
            )
            yield
            _leave_together(store, launch.world_size)
            torch_dist.destroy_process_group()
        except UserError as error:
            _say_once(store, watch, str(error))
            raise SystemExit(2 if isinstance(error, UsageError) else 1) from error
        except RuntimeError as error:
            if not _is_broken(error):
                raise
            _say_once(store, watch, f"{watch.lost_peer()} ({str(error).splitlines()[0][:200]})")
            raise SystemExit(1) from error


def agree(
    store: torch_dist.Store, rank: int, world_size: int, settings: Mapping[str, Any], timeout: float = 600.0
) -> None:
    """Compare `settings` over the ranks through the store. Raises UserError on every rank when they differ, naming a
    rank and the keys, and on rank 0 when a rank does not come."""
    flat = _flat(json.loads(json.dumps(settings, default=str)))
    store.set(f"settings/{rank}", json.dumps({"host": socket.gethostname(), "settings": flat}, sort_keys=True))
    if rank == 0:
        verdict = _compare(store, world_size, timeout)
        store.set("agreed", verdict)
    else:
        store.wait(["agreed"], timedelta(seconds=timeout))
        verdict = store.get("agreed").decode()
    if verdict:
        raise UserError(verdict)


def _compare(store: torch_dist.Store, world_size: int, timeout: float) -> str:
    """A sentence about what differs, or an empty one."""
    keys = [f"settings/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:
        late = [key.removeprefix("settings/") for key in keys if not store.check([key])]
        return f"{len(late)} of {world_size} ranks did not join within {timeout:g} s, such as rank {late[0]}"
    first, *others = (json.loads(value) for value in store.multi_get(keys))
    for rank, other in enumerate(others, start=1):
        names = sorted(first["settings"].keys() | other["settings"].keys())
        differ = [n for n in names if first["settings"].get(n) != other["settings"].get(n)]
        if differ:
            listed = "; ".join(
                f"{n} is {first['settings'].get(n)!r} on rank 0 and {other['settings'].get(n)!r} on rank {rank}"
                for n in differ[:3]
            )
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            remedy = (
                "install the same package on both" if differ == ["code"] else "start every rank with the same command"
            )
            return f"the ranks disagree: {listed}{more} ({first['host']}, {other['host']}); {remedy}"
    return ""


def _device(launch: Launch, device: str) -> torch.device | None:
    """This rank's GPU, made the current one; None to work on the CPU."""
    there = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not there:
        raise UsageError("runtime.device = cuda, but no GPU is visible: use runtime.device=cpu")
    if not there:
        return None
    if launch.local_rank >= there:
        raise UsageError(
            f"local rank {launch.local_rank} has no GPU of its own on {socket.gethostname()}, which shows {there}: "
            f"use --nproc-per-node {there}"
        )
    gpu = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(gpu)
    return gpu


def _store(launch: Launch, timeout: float, *, host: bool = False) -> torch_dist.Store:
    """A connection to the store, below a prefix of this attempt: a restarted group never reads what a dead one
    wrote."""
    try:
        store = torch_dist.TCPStore(
            launch.address,
            launch.port,
            launch.world_size,
            is_master=host,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=host,
        )
    except RuntimeError as error:
        raise UserError(
            f"rank {launch.rank} cannot reach the store of the group at {launch.address}:{launch.port}: "
            f"{str(error).splitlines()[0][:200]}"
        ) from error
    return torch_dist.PrefixStore(f"trinity/attempt-{launch.attempt}", store)


def _leave_together(store: torch_dist.Store, world_size: int) -> None:
    """Wait until every rank is through with its last collective, which a rank that leaves earlier would break."""
    if store.add("leaving", 1) == world_size:
        store.set("left", "1")
    try:
        store.wait(["left"], _LEAVING)
    except RuntimeError:
        if dist.is_main():  # the store may have gone with rank 0, whose work is done then
            raise


def _is_broken(error: RuntimeError) -> bool:
    return isinstance(error, torch_dist.DistError) or _BROKEN.search(str(error)) is not None


def _say_once(store: torch_dist.Store, watch: Watch, sentence: str) -> None:
    """One rank speaks; the others wait until it has, because the launcher ends all when the first one leaves."""
    try:
        if watch.first_to_say(sentence):
            _say(sentence)
            store.set("said", "1")
        else:
            store.wait(["said"], timedelta(seconds=5))
    except RuntimeError:  # no store any more: better twice than never
        _say(sentence)


def _say(sentence: str) -> None:
    print(f"trinity: {redact(clean(sentence))}", file=sys.stderr, flush=True)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
