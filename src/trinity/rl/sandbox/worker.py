"""One worker from outside: its process, its control group, the exchange with it."""

import fcntl
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from trinity.base.errors import UserError
from trinity.rl.sandbox import wire
from trinity.rl.sandbox.cgroup import Group, make_group
from trinity.rl.sandbox.guest import REPLY
from trinity.rl.sandbox.limits import MIB, Limits, Outcome
from trinity.rl.sandbox.view import PATH, interpreter

_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from trinity.rl.sandbox.guest import main; main(int(sys.argv[2]))"
)
_ROOT = str(Path(__file__).resolve().parents[3])
_FIRST_UID = 60_600
"""60578 to 61183 belong to nobody by systemd's and the distributions' tables."""
_START_SECONDS = 120.0
_GRACE = 30.0
_ENVIRONMENT = {
    "PATH": PATH,
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class MissingLayerError(UserError):
    """This machine lacks a layer of the isolation."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(
            f"programs that a model wrote cannot be isolated here: the layer '{layer}' is missing ({reason}); run "
            "where unprivileged user namespaces are allowed, or as root"
        )
        self.layer, self.reason = layer, reason


class LostWorkerError(Exception):
    """The worker's process is gone."""


class Worker:
    """A guest interpreter, ready for programs; `Sandbox` restarts one that is lost."""

    def __init__(
        self, number: int, limits: Limits, packages: Sequence[str], preload: Sequence[str], *, isolated: bool
    ) -> None:
        self._connection, theirs = socket.socketpair()
        self._isolated = isolated
        self.group = make_group(limits.memory + 128 * MIB, limits.processes + 16) if isolated else Group({})
        with theirs:
            self._process = subprocess.Popen(
                [interpreter(), "-s", "-S", "-P", "-B", "-c", _START, _ROOT, str(theirs.fileno())],
                env=_ENVIRONMENT,
                cwd="/",
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            self.group.add(self._process.pid)
            self._greet(number, limits, packages, preload)
        except BaseException:
            self.close()
            raise

    def _greet(self, number: int, limits: Limits, packages: Sequence[str], preload: Sequence[str]) -> None:
        settings = {
            "limits": asdict(limits),
            "packages": list(packages),
            "preload": list(preload),
            "isolated": self._isolated,
            "uid": _FIRST_UID + (os.getpid() + number) % 500,
            "hidden": [_ROOT],
            "outside": {link.name: str(link.readlink()) for link in Path("/proc/self/ns").iterdir()},
        }
        self._connection.settimeout(_START_SECONDS)
        try:
            wire.send(self._connection, wire.pack(settings))
            answer = wire.receive(self._connection)
        except OSError as error:
            raise UserError(f"a worker of the sandbox did not start: {error}") from None
        if not answer:
            raise UserError("a worker of the sandbox ended while it started: is there enough memory?")
        header, _ = wire.unpack(answer)
        if "layer" in header:
            raise MissingLayerError(header["layer"], header["reason"])
        if "failure" in header:
            raise UserError(f"a worker of the sandbox did not start: {header['failure']}")

    def run(
        self,
        *,
        source: bytes,
        folder: str,
        seconds: float,
        output: int,
        arguments: Sequence[str] = (),
        python: bool = True,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
    ) -> Outcome:
        """One program. Raises LostWorkerError when the worker does not answer."""
        files = files or {}
        header = {"python": python, "arguments": list(arguments), "files": list(files), "folder": folder}
        request = os.memfd_create("request", os.MFD_CLOEXEC)
        stdout, stderr = _output_file(output), _output_file(output)
        try:
            _write_whole(request, wire.pack(header, [source, stdin, *files.values()]))
            self._connection.settimeout(seconds + _GRACE)
            try:
                socket.send_fds(self._connection, [struct.pack("=d", seconds)], [request, stdout, stderr])
                reply = self._connection.recv(REPLY.size, socket.MSG_WAITALL)
            except OSError as error:
                raise LostWorkerError(str(error)) from None
            if len(reply) != REPLY.size:
                raise LostWorkerError("it ended")
            status, completed, timed_out, wall, cpu, memory = REPLY.unpack(reply)
            out, err = _written(stdout, output), _written(stderr, output)
            return Outcome(status, out, err, completed, timed_out, wall, cpu, memory)
        finally:
            for handle in (request, stdout, stderr):
                os.close(handle)

    def close(self) -> None:
        """End the worker and whatever runs in it."""
        self._connection.close()
        try:
            self._process.wait(timeout=5 if self._isolated else 10)
        except subprocess.TimeoutExpired:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.group.remove()


def _output_file(most: int) -> int:
    """A file in memory that cannot grow beyond `most` bytes."""
    handle = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(handle, most)
    fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return handle


def _written(handle: int, most: int) -> bytes:
    """What was written, by the place where the next byte would go: the program shares it."""
    return os.pread(handle, min(most, os.lseek(handle, 0, os.SEEK_CUR)), 0)


def _write_whole(handle: int, data: bytes) -> None:
    at = 0
    while at < len(data):
        at += os.write(handle, data[at:])
