"""What a check found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    """As a person reads it."""
    problem: str = ""
    """One sentence with the remedy; empty where all is well."""
    numbers: tuple[tuple[str, float], ...] = ()
    """Measurements behind `value`, by unit."""

    @property
    def ok(self) -> bool:
        return not self.problem
