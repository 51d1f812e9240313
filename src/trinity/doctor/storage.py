"""Checks of the place where a run is kept: space, speed, and what the checkpoints count on."""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trinity.base.errors import UserError
from trinity.base.files import sync_folder
from trinity.doctor.finding import Finding

GIB, MIB = 1 << 30, 1 << 20
_SLOW = 20e6  # bytes a second under which saving a small model takes minutes


@contextmanager
def own_folder(place: Path) -> Iterator[Path]:
    """A new folder inside `place`, removed again. Raises UserError when `place` cannot be written."""
    folder = place / f".doctor-{secrets.token_hex(6)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror}; choose another with --path") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def examine_storage(place: Path, mebibytes: int = 64) -> list[Finding]:
    """Space, speed of writing and reading back `mebibytes`, and the features of the file system at `place`."""
    try:
        with own_folder(place) as folder:
            return [_space(folder, place), _speed(folder, place, mebibytes), *_features(folder, place)]
    except UserError as error:
        return [Finding("storage", str(place), str(error))]


def _space(folder: Path, place: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    state = os.statvfs(folder)
    problem = ""
    if usage.free < GIB:
        problem = f"{place} has {usage.free / GIB:.2f} GiB free: make room or choose another place for runs"
    elif state.f_files > 0 and state.f_favail < 1000:
        problem = f"{place} has room for {state.f_favail} more files only: remove small files or choose another place"
    return Finding("free disk", f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB", problem)


def _speed(folder: Path, place: Path, mebibytes: int) -> Finding:
    block = os.urandom(MIB)
    path = folder / "speed"
    started = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(mebibytes):
                file.write(block)
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("write speed", "-", f"writing {mebibytes} MiB to {place} failed: {error.strerror}; make room")
    speed = mebibytes * MIB / (time.perf_counter() - started)
    with path.open("rb") as file:
        whole = all(file.read(MIB) == block for _ in range(mebibytes))
    path.unlink()
    problem = "" if whole else f"{place} gave back other bytes than were written: the storage is damaged, use another"
    if whole and speed < _SLOW:
        problem = (
            f"{place} takes {speed / 1e6:.1f} MB/s, and a checkpoint of 1 GB {1e9 / speed:.0f} s: use faster storage"
        )
    return Finding("write speed", f"{speed / 1e6:.0f} MB/s with fsync", problem, (("bytes/s", speed),))


def _features(folder: Path, place: Path) -> list[Finding]:
    checks: dict[str, tuple[Callable[[Path], bool], str]] = {
        "atomic rename": (_renames, "checkpoints are committed by renaming a folder, files by replacing"),
        "fsync of folders": (_syncs, "without it a rename may be lost in a power failure"),
        "file locks": (_locks, "a run directory is locked, so that two runs never write it"),
        "appending": (_appends, "records of a run are appended"),
    }
    findings = []
    for name, (check, why) in checks.items():
        try:
            good, detail = check(folder), ""
        except OSError as error:
            good, detail = False, f" ({error.strerror})"
        problem = "" if good else f"the file system of {place} lacks {name}{detail}: {why}; keep runs elsewhere"
        findings.append(Finding(name, "yes" if good else "no", problem))
    return findings


def _renames(folder: Path) -> bool:
    aside, final = folder / "aside", folder / "final"
    aside.mkdir()
    (aside / "part").write_bytes(b"1")
    aside.rename(final)
    new, old = folder / "new", folder / "old"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    new.replace(old)
    return (final / "part").read_bytes() == b"1" and not aside.exists() and old.read_bytes() == b"new"


def _syncs(folder: Path) -> bool:
    sync_folder(folder)
    return True


def _locks(folder: Path) -> bool:
    path = folder / "lock"
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
    finally:
        os.close(first)
        os.close(second)


def _appends(folder: Path) -> bool:
    path = folder / "lines"
    for line in (b"a\n", b"b\n"):
        with path.open("ab") as file:
            file.write(line)
    return path.read_bytes() == b"a\nb\n"
