"""The process that becomes the program: limits, rights given up, the filter, and then the program's own text."""

import builtins
import gc
import linecache
import os
import platform
import resource
import signal
import sys
import traceback
from types import ModuleType
from typing import Any, NoReturn

from trinity.rl.sandbox import kernel, seccomp

DONE = 3
"""Descriptor that tells that a Python program's text has come to its end."""


def confine(limits: dict[str, Any], filter_program: bytes, capabilities: int, *, namespaces: bool) -> None:
    """Give up what programs must not have, of which so many capabilities. Afterwards there is no way back."""
    size, disk = resource.setrlimit, limits["disk"]
    size(resource.RLIMIT_AS, (limits["memory"],) * 2)
    size(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))
    size(resource.RLIMIT_FSIZE, (disk,) * 2)
    size(resource.RLIMIT_NOFILE, (limits["open_files"],) * 2)
    size(resource.RLIMIT_CORE, (1, 1))  # 0 would still start the machine's own handler of crashes, 1 does not: core(5)
    size(resource.RLIMIT_MEMLOCK, (0, 0))
    size(resource.RLIMIT_MSGQUEUE, (0, 0))
    size(resource.RLIMIT_SIGPENDING, (256, 256))
    if namespaces:  # elsewhere every process of the user counts
        size(resource.RLIMIT_NPROC, (limits["processes"] + 1,) * 2)  # the process that watches the program counts too
        kernel.drop_capabilities(capabilities)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.apply_filter(filter_program)


def become_command(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    try:
        os.execvpe(arguments[0], arguments, environment)
    except OSError as error:
        os.write(2, f"{arguments[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)  # as shells do


def run_python(source: bytes, arguments: list[str], nonce: bytes) -> NoReturn:
    """Run a program's text as `__main__`, as the interpreter does with a file, and leave with its status."""
    leave, write = os._exit, os.write  # the program may put others in their place
    _fresh_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["program.py", *arguments]
    status = 0
    gc.enable()
    try:
        text = source.decode()
        linecache.cache["program.py"] = (len(text), None, text.splitlines(keepends=True), "program.py")
        exec(compile(text, "program.py", "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
        write(DONE, nonce)
    except SystemExit as left:
        status = _status_of(left)
    except BaseException as error:
        status = 1
        traceback.print_exception(type(error), error, error.__traceback__.tb_next if error.__traceback__ else None)
    leave(_finish(status))


def _status_of(left: SystemExit) -> int:
    if left.code is None or isinstance(left.code, int):
        return (left.code or 0) & 0xFF
    print(left.code, file=sys.stderr)
    return 1


def _finish(status: int) -> int:
    """What an interpreter does at its end: wait for threads, exit handlers, flush."""
    try:
        threading: Any = sys.modules.get("threading")
        if threading is not None:
            threading._shutdown()
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        return status or 120  # as the interpreter itself
    return status


def _fresh_streams() -> None:
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1
    )


def reset_signals() -> None:
    """For the worker and process 1, which no program can reach with a signal that has no handler."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def filter_of_this_machine() -> bytes:
    """Raises OSError where no filter is known for the machine."""
    try:
        return seccomp.bpf(platform.machine())
    except KeyError:
        raise OSError(38, f"there is no list of system calls for {platform.machine()}") from None
