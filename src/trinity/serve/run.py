"""Start the server, say where it listens, and end it without losing an answer that can still be finished."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import uvicorn

from trinity.base.errors import UserError
from trinity.config import ModelConfig
from trinity.serve.app import Service

log = logging.getLogger("trinity.serve")
SHARE_ON_GPU, SHARE_ON_CPU = 0.8, 0.5
"""Parts of the memory that is free once the model is loaded which the cache may come to."""
MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together."""
CLOSE_SECONDS = 5.0
"""Beyond the deadline of a shutdown, for the last words to be sent."""


class Server(uvicorn.Server):
    """uvicorn's server, which first lets answers finish and then ends what is left."""

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[str, int], None]) -> None:
        super().__init__(config)
        self.cut_short = False
        """Whether answers had to be ended."""
        self._service, self._on_start = service, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and tell the address."""
        await super().startup(sockets)
        if self.started and sockets:
            self._on_start(*sockets[0].getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what is new, wait for what is under way until the deadline, then end it with an error."""
        self._service.drain()
        ending = asyncio.get_running_loop().call_later(self._service.config.shutdown_seconds, self._abandon)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def _abandon(self) -> None:
        self.cut_short = self._service.desk.open > 0
        self._service.abandon()


def run(service: Service, on_start: Callable[[str, int], None]) -> bool:
    """Serve until SIGINT or SIGTERM. True when every answer under way was finished.

    Raises UserError when the address cannot be had.
    """
    config = service.config
    listener = listen(config.host, config.port)
    server = Server(server_settings(service), service, on_start)
    with listener, _ending_quietly():
        server.run([listener])
    return not server.cut_short


def server_settings(service: Service) -> uvicorn.Config:
    """uvicorn's settings for a service."""
    config = service.config
    # Sockets that only hold a place are cheap; more than this is an attack or a mistake.
    connections = max(1024, 4 * (config.max_batch + config.max_queued))
    return uvicorn.Config(
        service.app,
        # Whatever else is installed: this one bounds what is kept of a request's head.
        http="h11",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_level="error",  # not a line for each request that is no HTTP
        access_log=False,
        server_header=False,
        limit_concurrency=connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(config.shutdown_seconds + CLOSE_SECONDS),
        lifespan="on",
        ws="none",
    )


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more; here it has done its work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """A handler for signals whose work is done."""


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError when the name is unknown or the address taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"the host {host!r} is no address of this machine: {error.strerror or error}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror}; give another --port, or 0 for any"
        ) from None
    return listener


def find_cache_tokens(config: ModelConfig, device: torch.device, bytes_per_value: int, max_batch: int) -> int:
    """Tokens of prompts and answers whose keys and values fit into the free memory of `device`.

    At most what max_batch requests of the model's positions need. Raises UserError when not even one window fits.
    """
    if device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * SHARE_ON_GPU)
    else:
        budget = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * SHARE_ON_CPU)
    return fitting_tokens(config, budget, bytes_per_value, max_batch)


def fitting_tokens(config: ModelConfig, budget: int, bytes_per_value: int, max_batch: int) -> int:
    """As `find_cache_tokens`, for a budget in bytes.

    The rings of local layers cost a fixed sum; the rest goes by the bytes of a token in the global layers.
    """
    most = max_batch * config.max_positions
    whole = config.kv_cache_bytes(config.max_positions, batch=max_batch, bytes_per_value=bytes_per_value)
    if whole <= budget:
        return most
    rings = config.kv_cache_bytes(config.window, batch=max_batch, bytes_per_value=bytes_per_value)
    token = 2 * config.layers.count("global") * config.num_kv_heads * config.head_dim * bytes_per_value
    if token == 0 or budget < rings:
        raise UserError(
            f"{max_batch} answers at once need {rings >> 20} MiB for their windows and {budget >> 20} MiB are free; "
            "lower --max-batch"
        )
    # The rings' part of the global layers was counted too, which errs on the safe side.
    return min(most, max(config.window, (budget - rings) // token))
