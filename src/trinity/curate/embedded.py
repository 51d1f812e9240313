"""The project's own server beside the run: `trinity serve` on a run or model directory, reached over HTTP."""

import collections
import ctypes
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trinity.base.errors import UserError
from trinity.config.curate import EndpointConfig, GenerateConfig

START_SECONDS = 300.0
_ADDRESS = re.compile(r"and (http://\S+?/v1)\b")
_PR_SET_PDEATHSIG = 1


@contextmanager
def embedded(settings: GenerateConfig) -> Iterator[EndpointConfig]:
    """A server on any free port of loopback, ended with the block and with this process.

    Raises UserError with the server's own words when it does not start.
    """
    assert settings.model is not None
    if not Path(settings.model).exists():
        raise UserError(f"generate.model: there is no run or model directory {settings.model}")
    command = [sys.executable, "-m", "trinity", "serve", settings.model, "--name", Path(settings.model).resolve().name]
    command += ["--port", "0", "--max-batch", str(settings.concurrency), "--shutdown-seconds", "1"]
    command += ["--request-seconds", str(settings.timeout)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_end_with_parent
    )
    said: collections.deque[str] = collections.deque(maxlen=20)
    address: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.rstrip())
            found = _ADDRESS.search(line)
            if found and not address:
                address.append(found.group(1))
                ready.set()
        ready.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready.wait(1.0) and time.monotonic() < deadline:
            pass
        if not address:
            raise UserError(f"the embedded server did not start: {' '.join(said)[-500:] or 'it said nothing'}")
        name = Path(settings.model).resolve().name
        yield EndpointConfig(url=address[0], model=name, concurrency=settings.concurrency)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        listener.join(5)
        assert process.stderr is not None
        process.stderr.close()


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
