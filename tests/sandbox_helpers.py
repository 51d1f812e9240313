"""What tests of the sandbox share: one with small limits, and the same text run without any sandbox."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trinity.rl.sandbox.limits import MIB, Limits
from trinity.rl.sandbox.pool import Sandbox
from trinity.rl.sandbox.worker import MissingLayerError

SMALL = Limits(seconds=20.0, cpu_seconds=20, memory=512 * MIB, processes=16, disk=8 * MIB, files=200, output=64 * 1024)


@contextmanager
def small_sandbox(limits: Limits = SMALL) -> Iterator[Sandbox]:
    """A sandbox; the test is skipped where the kernel forbids one."""
    try:
        made = Sandbox(limits, workers=1)
    except MissingLayerError as error:
        pytest.skip(f"the kernel forbids a sandbox: {error}")
    with made:
        yield made


def outside(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same program without a sandbox: what an attack does where nothing holds it."""
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def processes_with(mark: str) -> list[int]:
    """Processes of this machine whose command line holds `mark`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in line:
                found.append(int(folder.name))
    return found
