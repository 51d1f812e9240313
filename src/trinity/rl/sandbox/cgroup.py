"""Control groups: limits over all processes of a worker together, where this process may make such groups."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A control group of one worker: one folder, or one for each controller of version 1."""

    folders: dict[str, Path]
    """By what it limits: memory, processes."""

    def add(self, pid: int) -> None:
        for folder in set(self.folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Its processes must have ended; what is left is left."""
        for folder in set(self.folders.values()):
            with contextlib.suppress(OSError):
                folder.rmdir()


def make_group(memory: int, processes: int) -> Group:
    """A new group with limits on memory (bytes) and processes, as far as there are controllers for them."""
    name = f"{_prefix()}{os.getpid()}-{uuid4().hex[:8]}"
    folders: dict[str, Path] = {}
    for kind, controller, file, value in (
        ("memory", "memory", "memory.limit_in_bytes", memory),
        ("processes", "pids", "pids.max", processes),
    ):
        for parent in _parents(controller):
            _sweep(parent)
            made = _try(parent / name, file if parent.is_relative_to(_ROOT / controller) else _second(file), value)
            if made is not None:
                folders[kind] = made
                break
    return Group(folders)


def _prefix() -> str:
    """Of the groups whose owners this process can see: numbers of processes are those of one namespace."""
    return f"trinity-{Path('/proc/self/ns/pid').stat().st_ino}-"


def _sweep(parent: Path) -> None:
    """Remove groups whose owner was killed. One that still has processes refuses."""
    for folder in parent.glob(f"{_prefix()}*"):
        owner = folder.name.removeprefix(_prefix()).split("-")[0]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _second(file: str) -> str:
    """The name that a file of version 1 has in version 2."""
    return {"memory.limit_in_bytes": "memory.max"}.get(file, file)


def _parents(controller: str) -> list[Path]:
    """Where a group could be made: this process's own groups and those above them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == controller:
            top = _ROOT / controller
        elif not controllers:
            top = _ROOT
        else:
            continue
        own = top / path.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return found


def _try(folder: Path, file: str, value: int) -> Path | None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return None
    try:
        if not (folder / "cgroup.procs").exists():
            raise FileNotFoundError(folder)
        (folder / file).stat()
        (folder / file).write_text(str(value))
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return None
    return folder
