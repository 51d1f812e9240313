"""System calls that Python's library lacks. Linux only, the standard library alone."""

import ctypes
import os
import struct
import sys

NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "process": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
}
"""CLONE_NEW* of linux/sched.h."""

MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 0x1, 0x2, 0x4  # MOUNT_ATTR_*
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_READ, PR_CAPBSET_DROP = 1, 4, 22, 23, 24
PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 28, 38, 47

# Numbers are the same on every architecture since 5.0.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR, _CLOSE_RANGE = 428, 429, 442, 436
_PER_MACHINE = {
    "x86_64": {"clone": 56, "capset": 126, "pivot_root": 155},
    "aarch64": {"clone": 220, "capset": 91, "pivot_root": 41},
}
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_SIGCHLD = 17

# PyDLL keeps the interpreter's lock over a call, which a call that forks depends on.
_libc = ctypes.PyDLL(None, use_errno=True)
if sys.platform == "linux":  # elsewhere the module may be imported, no more
    _libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def machine() -> str:
    return os.uname().machine


def _checked(result: int, what: str) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


def _syscall(what: str, number: int, *arguments: int | bytes | None) -> int:
    wide = [ctypes.c_char_p(a) if a is None or isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *wide), what)


def _number(name: str) -> int:
    return _PER_MACHINE[machine()][name]


def clone(flags: int) -> int:
    """Fork into new namespaces; 0 in the child. The caller must have one thread only."""
    python = ctypes.pythonapi
    before, child, parent = python.PyOS_BeforeFork, python.PyOS_AfterFork_Child, python.PyOS_AfterFork_Parent
    number = _number("clone")
    before()
    pid = _libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in (flags | _SIGCHLD, 0, 0, 0, 0)])
    (parent if pid else child)()
    return _checked(pid, "clone")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(kind: str | None, target: str, flags: int, data: str = "") -> None:
    """Mount a new file system of a kind at `target`, or change the propagation of what is there (kind None)."""
    name = kind.encode() if kind else None
    _checked(_libc.mount(name, target.encode(), name, ctypes.c_ulong(flags), data.encode()), f"mounting {target}")


def open_tree(path: str) -> int:
    """A descriptor of a copy of the mounts at and below `path`, attached nowhere yet."""
    flags = 1 | os.O_CLOEXEC | _AT_RECURSIVE  # OPEN_TREE_CLONE
    return _syscall(f"copying the mount of {path}", _OPEN_TREE, _AT_FDCWD, path.encode(), flags)


def set_attributes(tree: int, attributes: int) -> None:
    """Set MOUNT_ATTR_* on a tree of mounts, given by a descriptor."""
    settings = struct.pack("=QQQQ", attributes, 0, 0, 0)
    _syscall("mount_setattr", _MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, settings, len(settings))


def set_read_only(folder: int) -> None:
    """Make the one mount that a descriptor stands in read-only."""
    settings = struct.pack("=QQQQ", ATTR_RDONLY, 0, 0, 0)
    _syscall("mount_setattr", _MOUNT_SETATTR, folder, b"", _AT_EMPTY_PATH, settings, len(settings))


def move_mount(tree: int, target: str) -> None:
    """Attach what `open_tree` gave."""
    _syscall(f"mounting {target}", _MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), 4)  # MOVE_MOUNT_F_EMPTY_PATH


def pivot_root(new: str, old: str) -> None:
    _syscall("pivot_root", _number("pivot_root"), new.encode(), old.encode())


def detach(target: str) -> None:
    """Unmount, also what is in use."""
    _checked(_libc.umount2(target.encode(), 2), f"unmounting {target}")


def prctl(option: int, *arguments: int) -> int:
    filled = (*arguments, 0, 0, 0, 0)[:4]
    return _checked(_libc.prctl(option, *filled), f"prctl {option}")


def close_from(first: int) -> None:
    """Close every descriptor from `first` on."""
    _syscall("close_range", _CLOSE_RANGE, first, 0x7FFFFFFF, 0)


def count_capabilities() -> int:
    """How many capabilities this kernel has."""
    count = 0
    while _libc.prctl(PR_CAPBSET_READ, count, 0, 0, 0) >= 0:
        count += 1
    return count


def drop_capabilities(count: int) -> None:
    """Give up all capabilities for good: bounding, ambient, inheritable, permitted, effective."""
    prctl(PR_CAP_AMBIENT, 4)  # PR_CAP_AMBIENT_CLEAR_ALL
    for capability in range(count):
        prctl(PR_CAPBSET_DROP, capability)
    prctl(PR_SET_SECUREBITS, 0xEF)  # no rights by uid 0, none kept over setuid, none ambient; all locked
    give_up_capabilities()


def give_up_capabilities() -> None:
    """Empty the permitted, effective and inheritable sets."""
    _syscall("capset", _number("capset"), struct.pack("=Ii", 0x20080522, 0), bytes(24))


def apply_filter(program: bytes) -> None:
    """Put a seccomp filter on this thread and all its children; needs no new privileges to be set."""
    code = ctypes.create_string_buffer(program, len(program))
    wrapped = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    holder = ctypes.create_string_buffer(wrapped, len(wrapped))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(holder))
