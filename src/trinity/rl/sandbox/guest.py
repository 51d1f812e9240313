"""The worker: an interpreter inside the view, warm, that makes a fresh set of namespaces for every program.

Three generations: the worker never touches a program's text or output; its child, process 1 of the new namespaces,
prepares /tmp, starts the program and waits for it; the program itself has given up everything. When process 1 ends,
the kernel kills whatever is left.
"""

import fcntl
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

from trinity.rl.sandbox import kernel, program, view, wire

WORK = "/tmp/work"
_RESULT = struct.Struct("=qdq")
REPLY = struct.Struct("=q??ddq")
"""status, completed, timed out, wall seconds, processor seconds, most memory of a process in bytes."""
_EVERYTHING = sum(kernel.NAMESPACES.values())
_INSIDE = 1000
"""User and group, as programs see themselves."""
_PROC_NAMES = {"mount": "mnt", "process": "pid", "network": "net"}
_PR_SET_CHILD_SUBREAPER = 36


class LayerError(Exception):
    """A layer of the isolation cannot be had: (layer, reason)."""


def main(control: int) -> None:
    """Serve requests that come over the socket `control`, until its other end is closed."""
    connection = socket.socket(fileno=control)
    settings, _ = wire.unpack(wire.receive(connection))
    try:
        worker = Worker(connection, settings)
    except LayerError as error:
        wire.send(connection, wire.pack({"layer": error.args[0], "reason": error.args[1]}))
        return
    except Exception as error:  # told to the other side, which has no other way to know
        wire.send(connection, wire.pack({"failure": f"{type(error).__name__}: {error}"}))
        return
    wire.send(connection, wire.pack({}))
    worker.serve()


class Worker:
    def __init__(self, connection: socket.socket, settings: dict[str, Any]) -> None:
        self._connection = connection
        self._limits: dict[str, Any] = settings["limits"]
        self._isolated: bool = settings["isolated"]
        packages: list[str] = settings["packages"]
        self._packages = view.package_folders(packages) if self._isolated else packages
        try:
            self._filter = program.filter_of_this_machine()
        except OSError as error:
            raise LayerError("system call filter", error.strerror) from None
        self._capabilities = kernel.count_capabilities()
        self._proc = -1
        if self._isolated:
            self._enter(settings["uid"], packages)
        sys.path[:] = [path for path in sys.path if path not in settings["hidden"]] + self._packages
        for name in settings["preload"]:
            importlib.import_module(name)
        if self._isolated:
            self._try_namespaces(settings["outside"])
        program.reset_signals()
        gc.collect()
        gc.disable()
        gc.freeze()  # shared pages stay shared over the forks

    def _enter(self, uid: int, packages: list[str]) -> None:
        """Move this process into the view, without rights on the machine."""
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        names = ("mount", "network", "ipc", "uts")
        as_root = os.geteuid() == 0 and self._may_become(uid)
        if as_root:
            self._unshare(names)
        else:
            uid_outside, gid_outside = os.geteuid(), os.getegid()
            self._unshare(("user", *names))
            self._write_maps(_INSIDE, uid_outside, gid_outside)
        try:
            view.build(packages)
        except OSError as error:
            raise LayerError("read-only view", error.strerror or str(error)) from None
        if as_root:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        else:
            kernel.give_up_capabilities()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or else its children may not write their own maps
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)

    def _may_become(self, uid: int) -> bool:
        """Whether this root may take on another user: root of a small container has few or none."""
        texts = []
        for file in ("uid_map", "gid_map", "setgroups"):
            handle = os.open(f"self/{file}", os.O_RDONLY, dir_fd=self._proc)
            texts.append(os.read(handle, 1 << 16).decode())
            os.close(handle)
        ranges = [[list(map(int, line.split())) for line in text.splitlines()] for text in texts[:2]]
        mapped = (any(first <= uid < first + size for first, _, size in lines) for lines in ranges)
        return texts[2].strip() == "allow" and all(mapped)

    def _unshare(self, names: tuple[str, ...]) -> None:
        for name in names:
            try:
                kernel.unshare(kernel.NAMESPACES[name])
            except OSError as error:
                raise LayerError(f"{name} namespace", error.strerror or str(error)) from None

    def _write_maps(self, inside: int, uid: int, gid: int) -> None:
        """Map one user and one group of the namespace around to `inside` in this process's own user namespace."""
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{inside} {uid} 1"),
            ("gid_map", f"{inside} {gid} 1"),
        ):
            handle = os.open(f"self/{file}", os.O_WRONLY, dir_fd=self._proc)
            os.write(handle, text.encode())
            os.close(handle)

    def _try_namespaces(self, outside: dict[str, str]) -> None:
        """Make a full set once, and see that each is another one than that of the machine."""
        for name, flag in kernel.NAMESPACES.items():
            user = kernel.NAMESPACES["user"]  # without which no other may be made
            try:
                pid = kernel.clone(flag | user)
            except OSError as error:
                raise LayerError(f"{name} namespace", error.strerror or str(error)) from None
            if pid == 0:
                kind = _PROC_NAMES.get(name, name)
                os._exit(int(os.readlink(f"self/ns/{kind}", dir_fd=self._proc) == outside[kind]))
            if os.waitpid(pid, 0)[1] != 0:
                raise LayerError(f"{name} namespace", "the kernel made none")

    def serve(self) -> None:
        while True:
            data, handles, _, _ = socket.recv_fds(self._connection, 8, 3)
            if not data:
                return
            seconds = struct.unpack("=d", data)[0]
            try:
                reply = self._run(handles, seconds)
            finally:
                for handle in handles:
                    os.close(handle)
            if reply is None:
                return
            self._connection.sendall(reply)

    def _run(self, handles: list[int], seconds: float) -> bytes | None:
        """Run the request of handles[0] with output to the others; None when nobody waits for the answer any more."""
        result, result_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        done, done_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        nonce = os.urandom(16)
        started = time.monotonic()
        ids = os.geteuid(), os.getegid()
        pid = kernel.clone(_EVERYTHING) if self._isolated else os.fork()
        if pid == 0:
            try:
                self._first_process(handles, result_end, done_end, nonce, ids)
            except BaseException as error:
                os.write(handles[2], f"the sandbox could not start the program: {error}\n".encode())
            os._exit(1)
        os.close(result_end)
        os.close(done_end)
        try:
            timed_out, wanted = self._wait(pid, seconds)
            if not wanted:
                return None
            status, cpu, memory = -int(signal.SIGKILL), 0.0, 0
            found = _read_now(result, _RESULT.size)
            if len(found) == _RESULT.size and not timed_out:
                status, cpu, memory = _RESULT.unpack(found)
            completed = _read_now(done, 17) == nonce
            return REPLY.pack(status, completed, timed_out, time.monotonic() - started, cpu, memory)
        finally:
            os.close(result)
            os.close(done)

    def _wait(self, pid: int, seconds: float) -> tuple[bool, bool]:
        """(whether the time ran out, whether the answer is still wanted); the child is gone afterwards."""
        handle = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.register(self._connection, select.POLLRDHUP)
        ready = dict(poll.poll(max(1, seconds * 1000)))
        wanted = self._connection.fileno() not in ready
        ended = handle in ready
        if not ended:
            if self._isolated:
                os.kill(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGTERM)  # it must end the others itself
        os.waitpid(pid, 0)
        os.close(handle)
        return not ended, wanted

    def _first_process(
        self, handles: list[int], result: int, done: int, nonce: bytes, ids: tuple[int, int]
    ) -> NoReturn:
        """Process 1: prepare, start, wait."""
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        header, parts = wire.unpack(_read_all(handles[0]))
        work = header["folder"]
        if self._isolated:
            self._write_maps(_INSIDE, *ids)
            socket.sethostname("sandbox")
            size = f"size={self._limits['disk']},nr_inodes={self._limits['files']},mode=0755"
            kernel.mount("tmpfs", "/tmp", kernel.MS_NOSUID | kernel.MS_NODEV, size)
            work = WORK
            os.mkdir(work)
        self._expendable()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        source, given, *contents = parts
        for path, content in zip(header["files"], contents, strict=True):
            _write_file(f"{work}/{path}", content)
        os.chdir(work)
        pid = os.fork()
        if pid == 0:
            try:
                self._become(header, source, given, handles, done, nonce)
            except BaseException as error:
                os.write(2, f"the sandbox could not start the program: {error}\n".encode())
            os._exit(126)
        if not self._isolated:
            _guard_family()
        while True:
            ended, status, used = os.wait4(-1, 0)
            if ended == pid:
                break
        code = os.waitstatus_to_exitcode(status)
        os.write(result, _RESULT.pack(code, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024))
        if not self._isolated:
            _end_family()
        os._exit(0)

    def _expendable(self) -> None:
        """Where memory runs out, programs go first."""
        folder = self._proc if self._isolated else os.open("/proc", os.O_PATH | os.O_CLOEXEC)
        handle = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=folder)
        os.write(handle, b"1000")
        os.close(handle)

    def _become(
        self, header: dict[str, Any], source: bytes, given: bytes, handles: list[int], done: int, nonce: bytes
    ) -> NoReturn:
        os.setsid()
        stdin = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        _write_whole(stdin, given)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(stdin, fcntl.F_ADD_SEALS, seals)
        os.lseek(stdin, 0, os.SEEK_SET)
        targets = [os.dup(handle) for handle in (stdin, handles[1], handles[2], done)]
        high = max(targets) + 8
        moved = [os.dup2(handle, high + i) for i, handle in enumerate(targets)]
        for number, handle in enumerate(moved):
            os.dup2(handle, number, inheritable=number < program.DONE)
        kernel.close_from(program.DONE + 1)
        program.confine(self._limits, self._filter, self._capabilities, namespaces=self._isolated)
        if not header["python"]:
            environment = {**os.environ, **({"PYTHONPATH": ":".join(self._packages)} if self._packages else {})}
            program.become_command(header["arguments"], environment)
        program.run_python(source, header["arguments"], nonce)


def _guard_family() -> None:
    """Without a process namespace: orphans come to this process, which ends them when it is told to end."""
    kernel.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: (_end_family(), os._exit(1)))


def _end_family() -> None:
    """Kill all descendants: children, and what comes to this process when its parent dies."""
    while True:
        with open("/proc/self/task/%d/children" % os.getpid()) as file:  # noqa: UP031
            children = [int(text) for text in file.read().split()]
        if not children:
            return
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)


def _read_now(handle: int, most: int) -> bytes:
    try:
        return os.read(handle, most)
    except BlockingIOError:
        return b""


def _read_all(handle: int) -> bytes:
    return os.pread(handle, os.fstat(handle).st_size, 0)


def _write_whole(handle: int, data: bytes) -> None:
    at = 0
    while at < len(data):
        at += os.write(handle, data[at:])


def _write_file(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755)
    _write_whole(handle, content)
    os.close(handle)
