"""A program that looks at its own confinement from inside, and what follows from what it saw."""

import json
from dataclasses import dataclass

from trinity.rl.sandbox.limits import Outcome

PROGRAM = """
import ctypes, json, os, socket

def refused(attempt):
    try:
        attempt()
    except OSError:
        return True
    return False

prctl = ctypes.CDLL(None).prctl
print(json.dumps({
    "process namespace": os.getpid() < 4,
    "user namespace": os.getuid() == 1000,
    "system call filter": prctl(21, 0, 0, 0, 0) == 2,
    "no new privileges": prctl(39, 0, 0, 0, 0) == 1,
    "no capabilities": all(prctl(23, n, 0, 0, 0) < 1 for n in range(64)),
    "no network": refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
    "read-only view": all(refused(lambda: open(p + "/trinity-check", "w")) for p in ("", "/usr", "/etc", "/dev")),
    "no host files": not any(os.path.exists(p) for p in ("/proc/1", "/sys/kernel", "/var", "/etc/shadow", "/boot")),
    "empty environment": len(os.environ) < 12,
}))
"""


@dataclass(frozen=True)
class Layer:
    """A layer of the isolation; `problem` is empty where it holds."""

    name: str
    problem: str = ""
    needed: bool = True
    """Whether programs are refused without it."""


def layers(outcome: Outcome) -> list[Layer]:
    """What `PROGRAM` saw. An outcome that cannot be read is a layer of its own that does not hold."""
    try:
        seen = json.loads(outcome.stdout)
    except ValueError:
        said = outcome.stderr.decode("utf-8", "replace").strip().splitlines()
        return [Layer("self-check", f"the checking program ended with {outcome.status}: {said[-1] if said else ''}")]
    return [Layer(name, "" if holds else "it does not hold inside") for name, holds in seen.items()]
