"""What a program may use, and what became of it."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Of one program with all its children."""

    seconds: float = 10.0
    """Wall clock, from the first instruction to the end of the last child."""
    cpu_seconds: int = 10
    """Processor time of each process."""
    memory: int = 1024 * MIB
    """Bytes: address space of each process, and of all together where there is a cgroup for it."""
    processes: int = 32
    """Processes and threads at a time."""
    disk: int = 64 * MIB
    """Bytes in /tmp, the only place that can be written, and of each file."""
    files: int = 4096
    """Files in /tmp."""
    open_files: int = 128
    output: int = MIB
    """Bytes kept of standard output and of standard error, each; writing more fails."""

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: int
    """Exit status, or minus the number of the signal that ended it."""
    stdout: bytes
    stderr: bytes
    completed: bool
    """Whether a Python program ran to the end of its text: neither an exception nor `sys.exit` or `os._exit` on the
    way. Always False for commands."""
    timed_out: bool
    seconds: float
    """Wall clock."""
    cpu_seconds: float
    max_memory: int
    """Bytes resident at most, of the largest process."""
    problem: str = ""
    """One sentence where the sandbox itself failed and nothing is known of the program."""

    @property
    def text(self) -> str:
        """Standard output, then standard error."""
        return (self.stdout + self.stderr).decode("utf-8", "replace")
