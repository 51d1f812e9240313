"""Programs a second through the sandbox, every one in namespaces of its own.

    python bench/sandbox.py [--programs 600] [--workers N] [--repeats 3] [--out FILE]

Wall-clock figures say what a machine gave; on one that is shared with other work they say little. So the processor
time of a program is measured too, of everything that it causes in this process, the worker and the program (the
kernel's own threads, which take namespaces apart afterwards, are not part of it): the cores divided by it are what an
idle machine could give. For comparison: a fresh interpreter for every program without any isolation.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trinity.base.files import write_json
from trinity.rl.sandbox.pool import Sandbox

PROGRAM = """
def f(values):
    return sorted(v * v for v in values if v % 2)
assert f(range(10)) == [1, 9, 25, 49, 81]
assert f([]) == []
"""


def _processor() -> float:
    """Seconds of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def _measure(run: Callable[[int], bool], programs: int) -> dict[str, float]:
    """`run(n)` runs n programs, all processes of which have ended when it returns, and says whether all passed.

    The difference of two runs of different size leaves out what starting costs.
    """
    few = max(1, programs // 10)
    times = []
    for count in (few, programs + few):
        started, processor = time.monotonic(), _processor()
        assert run(count), "a program did not pass"
        times.append((time.monotonic() - started, _processor() - processor))
    wall, cpu = (times[1][i] - times[0][i] for i in range(2))
    return {"programs_per_second": programs / wall, "cpu_ms": 1000 * cpu / programs}


def _sandboxed(workers: int) -> Callable[[int], bool]:
    def run(count: int) -> bool:
        with Sandbox(workers=workers) as sandbox:
            outcomes = sandbox.run_all([PROGRAM] * count, seconds=30.0)
        return all(outcome.completed for outcome in outcomes)

    return run


def _fresh_interpreters(count: int) -> bool:
    return all(subprocess.run([sys.executable, "-I", "-c", PROGRAM], check=False).returncode == 0 for _ in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=600)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    runs = [_measure(_sandboxed(given.workers), given.programs) for _ in range(given.repeats)]
    fresh = _measure(_fresh_interpreters, max(20, given.programs // 20))
    cpu = statistics.median(run["cpu_ms"] for run in runs)
    result: dict[str, Any] = {
        "cores": cores,
        "workers": given.workers,
        "programs": given.programs,
        "programs_per_second": [round(run["programs_per_second"], 1) for run in runs],
        "cpu_ms_per_program": [round(run["cpu_ms"], 2) for run in runs],
        "cores_over_cpu_time": round(1000 * cores / cpu, 1),
        "fresh_interpreter_cpu_ms": round(fresh["cpu_ms"], 2),
        "load_average": os.getloadavg()[0],
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    if given.out:
        write_json(given.out, result)


if __name__ == "__main__":
    main()
